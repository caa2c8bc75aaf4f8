"""Spaces of Gymnasium, made again of what guest/spaces.py tells of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from rock.errors import ServerError

Space = spaces.Space[Any]
_DEPTH = 32


def space_of(spec: Any) -> Space:
    """The space of a description. ServerError for one that describes none: it comes from inside the sandbox."""
    try:
        return _made(spec, 0)
    except ServerError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, OverflowError) as error:
        raise ServerError(f"malformed answer: no space ({type(error).__name__}: {error})") from None


def _made(spec: Any, depth: int) -> Space:
    maker = _MAKERS.get(spec["kind"])
    if maker is None or depth > _DEPTH:
        raise ServerError(f"malformed answer: no space of kind {str(spec['kind'])[:40]!r}")
    return maker(spec, depth + 1)


def _dtype(spec: Any) -> Any:
    dtype = np.dtype(str(spec["dtype"]))
    if dtype.kind not in "biuf":
        raise ServerError(f"malformed answer: no space has elements of {dtype}")
    return dtype


def _box(spec: Any, _: int) -> Space:
    dtype = _dtype(spec)
    return spaces.Box(spec["low"], spec["high"], tuple(spec["shape"]), dtype.type)


def _discrete(spec: Any, _: int) -> Space:
    return spaces.Discrete(int(spec["n"]), start=int(spec["start"]), dtype=_dtype(spec).type)


def _multi_binary(spec: Any, _: int) -> Space:
    n = spec["n"]
    return spaces.MultiBinary(n if isinstance(n, int) else [int(item) for item in n])


def _multi_discrete(spec: Any, _: int) -> Space:
    return spaces.MultiDiscrete(spec["nvec"], dtype=_dtype(spec).type, start=spec["start"])


def _text(spec: Any, _: int) -> Space:
    return spaces.Text(int(spec["max"]), min_length=int(spec["min"]), charset=str(spec["characters"]))


def _dict(spec: Any, depth: int) -> Space:
    found = spaces.Dict({})
    for key, item in spec["spaces"]:
        found.spaces[key] = _made(item, depth)  # in the environment's own order, which is not always that of the keys
    return found


def _tuple(spec: Any, depth: int) -> Space:
    return spaces.Tuple([_made(item, depth) for item in spec["spaces"]])


def _sequence(spec: Any, depth: int) -> Space:
    return spaces.Sequence(_made(spec["space"], depth), stack=bool(spec["stack"]))


def _graph(spec: Any, depth: int) -> Space:
    edges = None if spec["edges"] is None else _made(spec["edges"], depth)
    nodes: Any = _made(spec["nodes"], depth)
    return spaces.Graph(nodes, edges)  # which kinds it takes it checks itself


def _one_of(spec: Any, depth: int) -> Space:
    return spaces.OneOf([_made(item, depth) for item in spec["spaces"]])


_MAKERS: dict[Any, Callable[[Any, int], Space]] = {
    "Box": _box, "Discrete": _discrete, "MultiBinary": _multi_binary, "MultiDiscrete": _multi_discrete, "Text": _text,
    "Dict": _dict, "Tuple": _tuple, "Sequence": _sequence, "Graph": _graph, "OneOf": _one_of,
}  # fmt: skip
