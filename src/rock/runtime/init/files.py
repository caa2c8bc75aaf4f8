"""Base of runtimes with our pid 1 in their sandboxes: programs, files and ports over an `InitLink`."""

from __future__ import annotations

import binascii
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rock import errors
from rock.guest.init.files import BATCH
from rock.runtime.base import FileStat, Handle, Process, Program
from rock.runtime.init.link import InitLink, token_user


class Space(NamedTuple):
    """Usage of a file system: used and total bytes, used and total inodes."""

    used: int
    size: int
    files: int
    most_files: int


class InitSandboxes:
    """Base of such runtimes. Subclasses implement `link`; `complete` fills the open fields of a Program."""

    def link(self, handle: Handle) -> InitLink:
        """The connection to a sandbox's pid 1. Lost when it is gone."""
        raise NotImplementedError

    async def linked(self, handle: Handle) -> InitLink:
        """As `link`, but may wait for the connection."""
        return self.link(handle)

    def complete(self, handle: Handle, program: Program) -> Program:
        """The program with the sandbox's environment, working directory and user filled in."""
        raise NotImplementedError

    # ---- programs ----

    async def spawn(self, handle: Handle, program: Program) -> Process:
        return await (await self.linked(handle)).spawn(self.complete(handle, program))

    async def attach(self, handle: Handle, key: str) -> Process:
        return await (await self.linked(handle)).attach(key)

    async def processes(self, handle: Handle) -> list[str]:
        return await (await self.linked(handle)).kept()

    async def pause(self, handle: Handle) -> None:
        await (await self.linked(handle)).request("hold", patience=60.0)

    async def resume(self, handle: Handle) -> None:
        await (await self.linked(handle)).request("release", patience=60.0)

    # ---- files ----

    async def _ask(self, handle: Handle, op: str, **fields: Any) -> tuple[dict[str, Any], list[int]]:
        return await (await self.linked(handle)).request(op, fields, patience=660.0)

    async def _ask_fd(self, handle: Handle, op: str, **fields: Any) -> tuple[dict[str, Any], int]:
        return _single(await self._ask(handle, op, **fields), handle)

    async def open_read(self, handle: Handle, path: str, *, user: str | None = None) -> int:
        return (await self._ask_fd(handle, "open_read", path=path, user=user))[1]

    async def open_write(
        self, handle: Handle, path: str, *, append: bool = False, mode: int | None = None, parents: bool = True,
        user: str | None = None,
    ) -> tuple[int, str]:
        reply, fd = await self._ask_fd(handle, "open_write", path=path, append=append, mode=mode, parents=parents,
                                       user=user)
        return fd, str(reply["token"])

    async def commit_write(self, handle: Handle, token: str) -> None:
        if token:
            await self._ask(handle, "commit_write", token=token, user=token_user(token))

    async def abort_write(self, handle: Handle, token: str) -> None:
        if token:
            await self._ask(handle, "abort_write", token=token, user=token_user(token))

    async def write_entries(self, handle: Handle, entries: Sequence[Mapping[str, Any]]) -> None:
        """Create folders, links and small files in one request, see FileBatches of rocklet/transfers/folders.py."""
        await self._ask(handle, "write_entries", entries=list(entries))

    async def read_files(self, handle: Handle, paths: Sequence[str]) -> list[bytes | None]:
        """Contents of small files by one request, see FileBatches of rocklet/transfers/folders.py."""
        reply, _ = await self._ask(handle, "read_files", paths=list(paths))
        found = [None if data is None else binascii.a2b_base64(data) for data in reply["files"]]
        if len(found) != len(paths) or sum(len(data or b"") for data in found) > BATCH:
            raise errors.Lost("the sandbox's pid 1 answered with other files", sandbox_id=handle.id)
        return found

    async def space(self, handle: Handle, path: str = "/") -> Space:
        """Usage of the file system at a path, as programs inside see it."""
        reply, _ = await self._ask(handle, "space", path=path)
        return Space(*(int(number) for number in reply["space"]))

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat:
        reply, _ = await self._ask(handle, "stat", path=path, follow=follow)
        return FileStat(*reply["stat"])

    async def list(self, handle: Handle, path: str, *, offset: int = 0, limit: int = 10_000) -> list[FileStat]:
        reply, _ = await self._ask(handle, "list", path=path, offset=offset, limit=limit)
        return [FileStat(*entry) for entry in reply["entries"]]

    async def remove(self, handle: Handle, path: str, *, recursive: bool = False) -> None:
        await self._ask(handle, "remove", path=path, recursive=recursive)

    async def make_dir(self, handle: Handle, path: str, *, parents: bool = True, mode: int = 0o755,
                       user: str | None = None) -> None:
        await self._ask(handle, "make_dir", path=path, parents=parents, mode=mode, user=user)

    async def symlink(self, handle: Handle, target: str, path: str) -> None:
        await self._ask(handle, "symlink", path=path, target=target)

    async def move(self, handle: Handle, source: str, target: str) -> None:
        await self._ask(handle, "move", source=source, target=target)

    async def chmod(self, handle: Handle, path: str, mode: int, *, recursive: bool = False) -> None:
        await self._ask(handle, "chmod", path=path, mode=mode, recursive=recursive)

    async def chown(self, handle: Handle, path: str, user: str, *, recursive: bool = False) -> None:
        await self._ask(handle, "chown", path=path, owner=user, recursive=recursive)

    # ---- ports ----

    async def dial(self, handle: Handle, port: int, *, host: str = "127.0.0.1", timeout: float = 10.0) -> int:
        spec = {"port": port, "host": host, "timeout": timeout}
        return _single(await (await self.linked(handle)).request("dial", spec, patience=timeout + 5), handle)[1]

    async def listen(self, handle: Handle, port: int) -> int:
        reply, fds = await (await self.linked(handle)).request("listen", {"port": port})
        for fd in fds:
            os.close(fd)
        found = reply.get("port")
        if not isinstance(found, int) or not 0 < found < 65536:
            raise errors.Lost("the sandbox's pid 1 answered without a port", sandbox_id=handle.id)
        return found

    async def accept(self, handle: Handle, port: int) -> int:
        return _single(await (await self.linked(handle)).request("accept", {"port": port}, patience=None), handle)[1]

    async def unlisten(self, handle: Handle, port: int) -> None:
        await (await self.linked(handle)).request("unlisten", {"port": port})


def _single(answer: tuple[dict[str, Any], list[int]], handle: Handle) -> tuple[dict[str, Any], int]:
    """The descriptor of a response that must have exactly one."""
    reply, fds = answer
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise errors.Lost("the sandbox's pid 1 answered without a descriptor", sandbox_id=handle.id)
    return reply, fds[0]


def merged(*environments: Mapping[str, str] | None) -> dict[str, str]:
    """Merge environments; later ones win."""
    result: dict[str, str] = {}
    for environment in environments:
        result.update(environment or {})
    return result
