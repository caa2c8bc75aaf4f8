"""Arguments of SandboxEnv and SandboxVectorEnv: each has one meaning, or is rejected with an alternative."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rock import errors
from rock.envs.client import Report
from rock.protocol.sandbox import SandboxConfig

START_TIMEOUT = 1200.0  # the first environment of a package set installs it
STEP_TIMEOUT = 300.0

AnyPath = str | os.PathLike[str]
Config = SandboxConfig | Mapping[str, Any] | AnyPath
Network = Literal["none", "nat", "host"]

_VECTOR_ONLY = ("num_envs", "vectorization_mode", "vector_kwargs", "autoreset_mode")
_MODES = {"NextStep": "next_step", "SameStep": "same_step", "Disabled": "disabled"}
CAPABILITIES = ("render", "vector", "next_step", "same_step", "disabled")


@dataclass
class Arguments:
    """The validated arguments. After `Arguments(...)`: `limits` are those of the sandbox, or None for the server's
    defaults; `kwargs` are passed to the environment's constructor, with `config` in them unless that was a
    SandboxConfig."""

    source: str
    kwargs: dict[str, Any]
    base_image: str | None = None
    rlmesh_package: str | None = None
    packages: Sequence[str] | None = None
    imports: Sequence[str] | None = None
    trust_remote_code: bool = False
    allow_unpinned_hf: bool = False
    build_memory: str | None = None
    task: str | None = None
    config: Config | None = None
    capabilities: Sequence[str] | None = None
    override: AnyPath | None = None
    cwd: AnyPath | None = None
    repo_root: AnyPath | None = None
    memory: str | None = None
    cpus: float | None = None
    network: Network | None = None
    base_url: str | None = None
    api_key: str | None = None
    exclusive: bool = False
    start_timeout: float = START_TIMEOUT
    step_timeout: float | None = STEP_TIMEOUT
    progress: Report = None
    limits: SandboxConfig | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.packages = (*_list_of("packages", self.packages), *_requirement(self.rlmesh_package))
        self.imports = _list_of("imports", self.imports)
        self.capabilities = _list_of("capabilities", self.capabilities)
        for name in self.capabilities:
            if name not in CAPABILITIES:
                raise errors.InvalidConfig(f"no capability {name!r}", hint=f"there are {', '.join(CAPABILITIES)}")
        if self.cwd is not None:
            self.cwd = os.fspath(self.cwd)
        if self.base_image is not None and self.packages:
            raise errors.InvalidConfig("nothing is installed in base_image: packages does not go with it",
                                       hint="put them into the image, or leave base_image out")  # fmt: skip
        if self.build_memory not in (None, "off", "auto"):
            raise errors.Unsupported(f"build_memory={self.build_memory!r}: nothing is built, packages are unpacked",
                                     hint="memory= limits the sandbox that the environment runs in")  # fmt: skip
        self._configure()

    def _configure(self) -> None:
        limits = None
        if isinstance(self.config, SandboxConfig):
            limits = self.config
        elif self.config is not None:
            self.kwargs = {**self.kwargs, "config": _mapping(self.config)}
        plain = {"memory": self.memory, "cpus": self.cpus, "network": self.network}
        plain = {name: value for name, value in plain.items() if value is not None}
        if plain:
            base = limits or SandboxConfig(image="host", memory="4g", cpus=1.0, auto_clear_seconds=600)
            limits = base.model_copy()
            for name, value in plain.items():
                try:
                    setattr(limits, name, value)
                except errors.InvalidConfig as error:
                    reason = error.message.removeprefix(f"{name}: ")
                    raise errors.InvalidConfig(f"{name}={value!r} is invalid: {reason}", hint=error.hint or
                                               "see rock.SandboxConfig, as in memory='2g', cpus=1") from None
        self.limits = limits

    def refuse(self, what: str, *names: str) -> None:
        """Raise InvalidConfig when one of these arguments is given: it does not apply to this kind of source."""
        for name in names:
            if getattr(self, name):
                raise errors.InvalidConfig(f"{name} does not go with {what.removesuffix(',')}", hint=_INSTEAD[name])

    def check(self, description: Mapping[str, Any]) -> None:
        """Raise Unsupported unless the environment's description has the requested capabilities."""
        found = {"render"} if description.get("render_mode") else set()
        if description.get("num_envs"):
            metadata = description.get("metadata")
            mode = metadata.get("autoreset_mode") if isinstance(metadata, dict) else None
            found |= {"vector", *([_MODES[mode]] if mode in _MODES else [])}
        missing = [name for name in self.capabilities or () if name not in found]
        if missing:
            there = ", ".join(sorted(found)) or "none of the capabilities"
            raise errors.Unsupported(f"{self.source} has no {', '.join(missing)}", hint=f"it has {there}")


_INSTEAD = {
    "base_image": "the image of the source is the one that it runs in",
    "packages": "put them into the image",
    "override": "it lays files over those of a folder or an hf:// source",
    "cwd": "it names the folder with env.py of a folder, an hf:// source or an image",
    "repo_root": "it is sent in place of a folder that lies in it",
}


def _requirement(rlmesh_package: str | None) -> tuple[str, ...]:
    """The requirement of RLMesh's own package, for environments that import it; ROCK itself needs none."""
    if rlmesh_package is None:
        return ()
    if not isinstance(rlmesh_package, str) or rlmesh_package == "local" or re.search(r"/|\\|\.whl$", rlmesh_package):
        raise errors.Unsupported(f"rlmesh_package={rlmesh_package!r} is no requirement",
                                 hint="name a release, like rlmesh==0.1.0; packages come from the package index")
    return (rlmesh_package,)


def for_single(kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that only the vector class accepts."""
    for name in _VECTOR_ONLY:
        if name in kwargs:
            raise TypeError(f"SandboxEnv is one environment and takes no {name}; SandboxVectorEnv does")


def _list_of(name: str, given: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(given, str):
        raise errors.InvalidConfig(f"{name} is a list, not one string", hint=f"{name}=[{given!r}]")
    return tuple(given or ())


def _mapping(config: Mapping[str, Any] | AnyPath) -> dict[str, Any]:
    """The configuration for make_env: a mapping, or the content of a JSON or TOML file."""
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config).expanduser()
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        hint = "a mapping, a JSON or TOML file with one, or a SandboxConfig"
        raise errors.InvalidConfig(f"config: {path} cannot be read: {error}", hint=hint) from None
    if not isinstance(found, dict):
        raise errors.InvalidConfig(f"config: {path} does not hold a mapping",
                                   hint="write a JSON object or a TOML file with fields of rock.SandboxConfig")
    return found
