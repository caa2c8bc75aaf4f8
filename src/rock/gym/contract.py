"""The contract of an environment as immutable plain data: its spaces, its capabilities, and its sandbox."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from gymnasium import spaces

from rock.envs.client import EnvironmentHandle
from rock.errors import ServerError

UNKNOWN = "UnknownEnv-v1"


@dataclass(frozen=True)
class SpaceSpec:
    """A space as data. kind: "box", "discrete", "multi_binary", "multi_discrete", "text", "dict", "tuple", "sequence",
    "graph", "one_of". shape, dtype: those of the space; None for a space without one."""

    kind: str
    shape: tuple[int, ...] | None
    dtype: str | None
    _data: Mapping[str, Any] = field(repr=False, compare=False)
    _plain: str = field(repr=False)

    @classmethod
    def of(cls, about: Mapping[str, Any], space: Space) -> SpaceSpec:
        dtype = None if space.dtype is None else np.dtype(space.dtype).name
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(about["kind"])).lower()
        return cls(kind, space.shape, dtype, MappingProxyType(dict(about)), repr(_plain(about)))

    def to_space(self) -> Space:
        """Construct the Gymnasium space."""
        return space_of(self._data)

    to_gym_space = to_space

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"kind", "shape", "dtype"} and the fields of its kind, bounds as (nested) lists."""
        details = {name: value for name, value in _plain(self._data).items() if name not in ("kind", "shape", "dtype")}
        return {"kind": self.kind, "shape": None if self.shape is None else list(self.shape), "dtype": self.dtype,
                **details}  # fmt: skip


@dataclass(frozen=True)
class EnvContract:
    """The contract at the environment's creation. id: its Gymnasium id, or "UnknownEnv-v1". Spaces are those of one
    environment; num_envs is 1 for a single environment."""

    id: str
    render_mode: str | None
    num_envs: int
    metadata: Mapping[str, Any]
    observation_space: SpaceSpec
    action_space: SpaceSpec

    @classmethod
    def of(cls, about: Mapping[str, Any], observation: Space, action: Space) -> EnvContract:
        """Build the contract from an environment's description, and the (single) spaces constructed from it."""
        prefix = "single_" if about.get("num_envs") else ""
        spec = about.get("spec")
        return cls(
            str(spec["id"]) if spec else UNKNOWN, about["render_mode"], int(about.get("num_envs") or 1),
            MappingProxyType(dict(about["metadata"])), SpaceSpec.of(about[f"{prefix}observation_space"], observation),
            SpaceSpec.of(about[f"{prefix}action_space"], action),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "render_mode": self.render_mode, "num_envs": self.num_envs,
                "metadata": _plain(self.metadata), "observation_space": self.observation_space.to_dict(),
                "action_space": self.action_space.to_dict()}  # fmt: skip


@dataclass(frozen=True)
class EnvSandbox:
    """The location of an environment. requested_source: as given; resolved_source: with all defaults resolved, such as
    the commit of a branch; address: of the server."""

    requested_source: str
    resolved_source: str
    sandbox_id: str
    address: str


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.value if isinstance(value, Enum) else value


_RANDOM = {"observation_space", "action_space", "single_observation_space", "single_action_space", "_np_random"}


class Placed:
    """Mixin with the contract and the location of an environment or a vector. Specs are those of a single
    environment."""

    _player: EnvironmentHandle
    _process: int
    _sandbox: EnvSandbox
    _contract: EnvContract

    @property
    def sandbox_id(self) -> str:
        """The id of its sandbox."""
        return self._player.link.sandbox_id

    @property
    def sandbox(self) -> EnvSandbox:
        """Its location, and its resolved source."""
        return self._sandbox

    @property
    def env_contract(self) -> EnvContract:
        """The contract of each environment, as immutable plain data."""
        return self._contract

    @property
    def observation_space_spec(self) -> SpaceSpec:
        return self._contract.observation_space

    @property
    def action_space_spec(self) -> SpaceSpec:
        return self._contract.action_space

    def fork(self, n: int = 1, *, reseed: bool = False, partial: bool = False) -> list[Self]:
        """`n` copies (1 to 100) of this environment's process at this step. They continue as this one would, with the
        same random state, also of the spaces here, and are independent of it.

        reseed: draw new seeds in each copy. partial: return the copies that were started, at least one; otherwise an
        error of one closes the others. Unsupported, before any change: its process has threads, processes, connections,
        shared memory, or a library such as torch, and it does not declare fork_safe. QuotaExceeded: the sandbox has no
        room for more processes.
        """
        self._check_open()
        return [self._copy(player, reseed) for player in self._player.fork(n, reseed, partial)]

    def _copy(self, player: EnvironmentHandle, reseed: bool) -> Self:
        child = copy.copy(self)
        child._player = player
        child._process = os.getpid()
        for name in _RANDOM & vars(child).keys():
            vars(child)[name] = copy.deepcopy(vars(child)[name])
            if reseed and isinstance(vars(child)[name], spaces.Space):
                vars(child)[name].seed()
        if reseed:
            vars(child).pop("_np_random", None)
        return child

    def _check_open(self) -> None:
        """Raise Conflict when it is closed."""
        raise NotImplementedError


# ---- Gymnasium spaces from the descriptions of guest/environments/hosting.py ----

Space = spaces.Space[Any]
_DEPTH = 32


def space_of(spec: Any) -> Space:
    """The space of a description. ServerError for an invalid one: it comes from inside the sandbox."""
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
        found.spaces[key] = _made(item, depth)  # in the environment's own order, which may differ from that of the keys
    return found


def _tuple(spec: Any, depth: int) -> Space:
    return spaces.Tuple([_made(item, depth) for item in spec["spaces"]])


def _sequence(spec: Any, depth: int) -> Space:
    return spaces.Sequence(_made(spec["space"], depth), stack=bool(spec["stack"]))


def _graph(spec: Any, depth: int) -> Space:
    edges = None if spec["edges"] is None else _made(spec["edges"], depth)
    nodes: Any = _made(spec["nodes"], depth)
    return spaces.Graph(nodes, edges)  # Graph itself validates the kinds


def _one_of(spec: Any, depth: int) -> Space:
    return spaces.OneOf([_made(item, depth) for item in spec["spaces"]])


_MAKERS: dict[Any, Callable[[Any, int], Space]] = {
    "Box": _box, "Discrete": _discrete, "MultiBinary": _multi_binary, "MultiDiscrete": _multi_discrete, "Text": _text,
    "Dict": _dict, "Tuple": _tuple, "Sequence": _sequence, "Graph": _graph, "OneOf": _one_of,
}  # fmt: skip
