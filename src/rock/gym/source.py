"""Sources of environments (an id of Gymnasium, a folder, a hub's repository, an image), and the creation from them."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from gymnasium.spaces import GraphInstance

from rock import errors
from rock.envs.client import EnvironmentClient, EnvironmentHandle
from rock.gym.arguments import Arguments
from rock.gym.contract import EnvSandbox
from rock.gym.hub import FILE, HubSource, Tree
from rock.protocol.env import OpenEnv
from rock.protocol.routes import ROUTES

INSIDE = "/tmp/rock-environment"
_ID = re.compile(r"([\w.]+:)?([\w:.-]+/)?[\w:.-]+")
_KINDS = "an id, gym://ID, hf://ORG/REPO@REVISION, image://NAME, or a folder"


@dataclass(frozen=True)
class Source:
    """`env_id`: of Gymnasium, or the name in errors. resolved: the source with all defaults resolved. files: sent to
    the sandbox. folder, root: paths inside, of env.py, and of the import root. image: its own Python hosts the
    environment. packages: to be installed. task: one of several that make_env creates."""

    env_id: str
    resolved: str
    files: Tree | None = None
    folder: str | None = None
    root: str | None = None
    image: str | None = None
    packages: tuple[str, ...] = ()
    task: str | None = None


def find(asked: Arguments) -> Source:
    """The source of the arguments. InvalidConfig names an alternative, or an argument that does not apply. A repository
    is fetched here; its code runs only in its sandbox."""
    text = asked.source
    kind, found, rest = text.partition("://")
    if text.startswith(("/", ".", "~")) or kind == "file":
        return _folder(asked, rest if found and kind == "file" else text)
    if not found or kind == "gym":
        return _named(asked, rest if found else text)
    if kind == "hf":
        return _hub(asked, rest)
    if kind == "image":
        return _image(asked, rest)
    raise errors.InvalidConfig(f"source {text!r} is of no known kind", hint=_KINDS)


def _named(asked: Arguments, env_id: str) -> Source:
    asked.refuse(f"{env_id!r}, an id of Gymnasium,", "override", "cwd", "repo_root")
    if not _ID.fullmatch(env_id) or len(env_id) > 256:
        raise errors.InvalidConfig(f"{env_id!r} is not the id of an environment", hint="for example CartPole-v1")
    if asked.task is not None:
        raise errors.InvalidConfig("task chooses among the environments of a make_env, and an id has none",
                                   hint="leave it out; other words of the environment's own are kwargs")  # fmt: skip
    return Source(env_id, f"gym://{env_id}", image=asked.base_image, packages=tuple(asked.packages or ()))


def _folder(asked: Arguments, text: str) -> Source:
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise errors.InvalidConfig(f"there is no {FILE} in {folder}", hint="it is no folder")
    top, cwd = folder, PurePosixPath(_relative(str(asked.cwd or ".")))
    if asked.repo_root is not None:
        top = Path(asked.repo_root).expanduser().resolve()
        if not folder.is_relative_to(top):
            raise errors.InvalidConfig(f"{folder} is not below repo_root, which is {top}",
                                       hint="set repo_root to the folder itself or to one of its parents")
        cwd = PurePosixPath(folder.relative_to(top).as_posix()) / cwd
    if not asked.trust_remote_code:
        raise errors.InvalidConfig(f"{folder} has code of its own, which runs in the sandbox",
                                   hint="pass trust_remote_code=True if that is wanted")  # fmt: skip
    return _sent(asked, folder.name or "folder", f"file://{folder}", Tree.of_folder(top), str(cwd), asked.task)


def _hub(asked: Arguments, rest: str) -> Source:
    asked.refuse("a source hf://", "repo_root")
    wanted = HubSource.parse(rest)
    wanted.allow(asked.trust_remote_code, asked.allow_unpinned_hf)
    if wanted.task and asked.task and wanted.task != asked.task:
        raise errors.InvalidConfig(f"the source says {wanted.task!r} and task={asked.task!r}", hint="give one of them")
    cwd, task = _relative(str(asked.cwd or ".")), wanted.task or asked.task
    commit, raw = wanted.fetch()
    resolved = f"hf://{wanted.repository}@{commit}" + (f":{task}" if task else "")
    return _sent(asked, wanted.repository, resolved, Tree.of_tar(raw, f"hf://{wanted.repository}"), cwd, task)


def _sent(asked: Arguments, name: str, resolved: str, files: Tree, cwd: str, task: str | None) -> Source:
    if asked.override is not None:
        files = files.lay(Path(asked.override).expanduser().resolve(), cwd)
    files.check(cwd)
    packages = () if asked.base_image else (*(asked.packages or ()), *files.requirements(cwd))
    return Source(name, resolved, files, str(PurePosixPath(INSIDE, cwd)), INSIDE, asked.base_image, packages, task)


def _image(asked: Arguments, name: str) -> Source:
    asked.refuse("a source image://", "base_image", "packages", "override", "repo_root")
    if not name:
        raise errors.InvalidConfig("image:// names no image", hint="image://NAME, as `rock image ls` has it")
    cwd = str(asked.cwd or ".")
    if cwd != "." and not cwd.startswith("/"):
        raise errors.InvalidConfig(f"cwd={cwd!r} is not absolute", hint=f"the folder in the image with {FILE}")
    return Source(name, f"image://{name}", folder=cwd, image=name, task=asked.task)


def _relative(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        raise errors.InvalidConfig(f"cwd={text!r} does not lie in the source", hint="a folder in it, like envs/cart")
    return str(path)


@dataclass
class Making:
    """The inputs of an environment's creation, and its client. vector: fields of MakeEnv for a vector."""

    asked: Arguments
    vector: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[EnvironmentHandle, Source]:
        """Create the environment; a failure leaves nothing behind."""
        asked = self.asked
        link = EnvironmentClient(base_url=asked.base_url, api_key=asked.api_key, config=asked.limits, graph=_graph,
                       exclusive=asked.exclusive, timeout=asked.step_timeout, progress=asked.progress)  # fmt: skip
        asked = _registered(link, asked)
        source = find(asked)
        if source.files is not None or source.image is not None:
            link.exclusive = True  # other environments must not see its files
        spec = OpenEnv(env_id=source.env_id, protocol="gym")
        if source.packages:
            spec.packages = list(source.packages)
        if source.image is not None:
            spec.image = source.image
        link.open(spec, asked.start_timeout)
        try:
            made: dict[str, Any] = {"env_id": source.env_id, "protocol": "gym", "kwargs": asked.kwargs, **self.vector}
            optional = {"imports": list(asked.imports or ()), "task": source.task, "folder": source.folder,
                        "root": source.root}  # fmt: skip
            made.update({name: value for name, value in optional.items() if value})
            if source.files is not None:
                target = ROUTES["upload_dir"].url(sandbox_id=link.sandbox_id) + "?path=" + urllib.parse.quote(INSIDE)
                link.transport.json_raw("PUT", target, source.files.packed(), content_type="application/x-tar")
            return EnvironmentHandle(link, link.make(made, asked.start_timeout)), source
        except BaseException:
            link.close()
            raise


def _registered(link: EnvironmentClient, asked: Arguments) -> Arguments:
    """The arguments, with the source that is registered under the requested name."""
    if "://" in asked.source or asked.source.startswith(("/", ".", "~")):
        return asked
    try:
        about = link.about(asked.source)
    except (errors.NotFound, errors.InvalidConfig):
        return asked  # an id that only Gymnasium may know
    if about.version is None:
        return asked
    if about.protocol != "gym":
        raise errors.InvalidConfig(f"{asked.source} is an environment of GEM", hint="rock.make makes those")
    packages = [*about.asked, *(asked.packages or ())]
    return replace(asked, source=about.source, packages=packages, imports=[*about.imports, *(asked.imports or ())])


def _graph(nodes: Any, edges: Any, links: Any) -> GraphInstance:
    for part in (nodes, edges, links):
        if part is not None and not isinstance(part, np.ndarray):
            raise ValueError("a graph is made of arrays")
    return GraphInstance(nodes, edges, links)


def sandbox_of(requested: str, found: Source, player: EnvironmentHandle) -> EnvSandbox:
    """The location of an environment."""
    return EnvSandbox(requested, found.resolved, player.link.sandbox_id, player.link.transport.address.url)


def described(player: EnvironmentHandle) -> dict[str, Any]:
    """The environment's description of itself."""
    found = player.call("describe")
    if not isinstance(found, dict):
        raise errors.ServerError("malformed answer: no description of an environment")
    return found
