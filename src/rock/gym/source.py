"""What an environment is made of: an id of Gymnasium, or a folder with an env.py."""

from __future__ import annotations

import io
import re
import tarfile
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import GraphInstance

from rock import errors
from rock.envlink import EnvLink, Player
from rock.protocol.env import OpenEnv
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import SandboxConfig

FILE = "env.py"
REQUIREMENTS = "requirements.txt"
INSIDE = "/tmp/rock-environment"
START_TIMEOUT = 1200.0  # the first one of a package set installs it
STEP_TIMEOUT = 300.0
_ID = re.compile(r"([\w.]+:)?([\w:.-]+/)?[\w:.-]+")
_LIMIT = 64 << 20
_LEFT_OUT = {".git", "__pycache__", ".venv"}


@dataclass(frozen=True)
class Source:
    """`env_id` of Gymnasium, or a `folder` whose env.py has `make_env`."""

    env_id: str
    folder: Path | None = None
    packages: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, packages: Sequence[str], trusted: bool) -> Source:
        """InvalidConfig says what to write instead. Code of a folder runs only when it is trusted, and inside."""
        if isinstance(packages, str):
            raise errors.InvalidConfig("packages is a list of requirements, not one string")
        if not text.startswith(("/", ".", "~")) and "://" not in text:
            return cls._named(text, packages)
        kind, found, rest = text.partition("://")
        if found and kind == "gym":
            return cls._named(rest, packages)
        if found and kind != "file":
            raise errors.InvalidConfig(f"source {text!r} is of no known kind", hint="an id, gym://ID, or a folder")
        folder = Path(rest if found else text).expanduser().resolve()
        if not (folder / FILE).is_file():
            raise errors.InvalidConfig(f"there is no {FILE} in {folder}", hint="it defines make_env(**kwargs)")
        if not trusted:
            raise errors.InvalidConfig(f"{folder} has code of its own, which runs in the sandbox",
                                       hint="pass trust_remote_code=True if that is wanted")  # fmt: skip
        return cls(folder.name, folder, (*packages, *_requirements(folder / REQUIREMENTS)))

    @classmethod
    def _named(cls, env_id: str, packages: Sequence[str]) -> Source:
        if not _ID.fullmatch(env_id) or len(env_id) > 256:
            raise errors.InvalidConfig(f"{env_id!r} is not the id of an environment", hint="for example CartPole-v1")
        return cls(env_id, None, tuple(packages))


def _requirements(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def _packed(folder: Path) -> bytes:
    """The folder as tar; InvalidConfig when it is too large."""
    buffer = io.BytesIO()
    size = 0

    def chosen(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal size
        size += entry.size
        return None if Path(entry.name).name in _LEFT_OUT else entry

    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=chosen)
            if size > _LIMIT:
                raise errors.InvalidConfig(f"{folder} is larger than {_LIMIT >> 20} MiB")
    return buffer.getvalue()


@dataclass
class Making:
    """What is needed to make an environment, and the link that is made for it."""

    source: Source
    kwargs: dict[str, Any]
    imports: Sequence[str] = ()
    task: str | None = None
    base_url: str | None = None
    api_key: str | None = None
    config: SandboxConfig | None = None
    exclusive: bool = False
    start_timeout: float = START_TIMEOUT
    step_timeout: float | None = STEP_TIMEOUT
    vector: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Player:
        """The environment; whatever fails, nothing of it is left."""
        folder = self.source.folder
        link = EnvLink(base_url=self.base_url, api_key=self.api_key, config=self.config, graph=_graph,
                       exclusive=self.exclusive or folder is not None, timeout=self.step_timeout)  # fmt: skip
        wish = OpenEnv(env_id=self.source.env_id, protocol="gym")
        if self.source.packages:
            wish.packages = list(self.source.packages)
        link.open(wish, self.start_timeout)
        try:
            made: dict[str, Any] = {"env_id": self.source.env_id, "protocol": "gym", "kwargs": self.kwargs}
            made.update(self.vector)
            if self.imports:
                made["imports"] = list(self.imports)
            if self.task:
                made["task"] = self.task
            if folder is not None:
                target = ROUTES["upload_dir"].url(sandbox_id=link.sandbox_id) + "?path=" + urllib.parse.quote(INSIDE)
                link.transport.json_raw("PUT", target, _packed(folder), content_type="application/x-tar")
                made["folder"] = INSIDE
            return Player(link, link.make(made, self.start_timeout))
        except BaseException:
            link.close()
            raise


def _graph(nodes: Any, edges: Any, links: Any) -> GraphInstance:
    for part in (nodes, edges, links):
        if part is not None and not isinstance(part, np.ndarray):
            raise ValueError("a graph is made of arrays")
    return GraphInstance(nodes, edges, links)


def described(player: Player) -> dict[str, Any]:
    """What the environment says of itself."""
    found = player.call("describe")
    if not isinstance(found, dict):
        raise errors.ServerError("malformed answer: no description of an environment")
    return found
