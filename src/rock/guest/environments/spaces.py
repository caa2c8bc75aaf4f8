"""Descriptions of spaces and metadata: plain data, with arrays for bounds, from which the client makes the spaces."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

_TEXT_LENGTH = 4096  # characters of a text space without a maximum length


def spec_of(space: Any) -> dict[str, Any]:
    """The description of a space; TypeError for a kind that Gymnasium does not have.

    A subclass of Space with string elements (dtype str, such as minigrid's MissionSpace) is described as Text.
    """
    from gymnasium import spaces

    for kind in type(space).__mro__:
        name = kind.__name__
        older = kind.__module__.startswith("gym.spaces.")
        if name in _SPECS and (older or kind is getattr(spaces, name, None)):
            return {"kind": name, **_SPECS[name](space)}
    if isinstance(space, spaces.Space) and space.dtype is not None and space.dtype.kind == "U":
        return {"kind": "Text", "min": 0, "max": _TEXT_LENGTH, "characters": string.printable}
    raise TypeError(f"a space of type {type(space).__module__}.{type(space).__qualname__} is none of Gymnasium's")


def _optional(space: Any) -> dict[str, Any] | None:
    return None if space is None else spec_of(space)


_SPECS: dict[str, Any] = {
    "Box": lambda s: {"low": s.low, "high": s.high, "shape": list(s.shape), "dtype": s.dtype.str},
    "Discrete": lambda s: {"n": int(s.n), "start": int(s.start), "dtype": s.dtype.str},
    "MultiBinary": lambda s: {"n": list(s.n) if isinstance(s.n, (tuple, list)) or hasattr(s.n, "tolist") else int(s.n)},
    "MultiDiscrete": lambda s: {"nvec": s.nvec, "start": s.start, "dtype": s.dtype.str},
    "Text": lambda s: {"min": s.min_length, "max": s.max_length, "characters": "".join(s.character_list)},
    "Dict": lambda s: {"spaces": [[key, spec_of(item)] for key, item in s.spaces.items()]},
    "Tuple": lambda s: {"spaces": [spec_of(item) for item in s.spaces]},
    "Sequence": lambda s: {"space": spec_of(s.feature_space), "stack": bool(s.stack)},
    "Graph": lambda s: {"nodes": spec_of(s.node_space), "edges": _optional(s.edge_space)},
    "OneOf": lambda s: {"spaces": [spec_of(item) for item in s.spaces]},
}


def metadata_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "value", value) for key, value in metadata.items()}
