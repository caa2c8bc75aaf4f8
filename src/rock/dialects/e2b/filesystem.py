"""The service filesystem.Filesystem: status, folders, moves and removal of files, and watchers of folders."""

from __future__ import annotations

import posixpath
import stat as modes
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from rock.dialects.e2b import connect
from rock.dialects.e2b.call import Call, passwd
from rock.dialects.e2b.connect import Message
from rock.dialects.e2b.errors import RpcError
from rock.dialects.e2b.native import Sandbox
from rock.dialects.e2b.watching import Watching
from rock.errors import Conflict, InvalidConfig, NotFound
from rock.http.asgi import Answer
from rock.protocol.keys import Access

SERVICE = "/filesystem.Filesystem/"
_READS = ("Stat", "ListDir", "WatchDir", "CreateWatcher", "GetWatcherEvents", "RemoveWatcher")
_PAGE = 1000
_MOST_LISTED = 50_000
_DEEPEST = 100
_FRESH = 5.0  # seconds for which the names of users and groups are used
_REMEMBERED = 256
_TYPES = {"file": "FILE_TYPE_FILE", "directory": "FILE_TYPE_DIRECTORY", "symlink": "FILE_TYPE_SYMLINK"}


class Names:
    """The names of users and groups of sandboxes, by their numbers."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[float, dict[int, str], dict[int, str]]] = OrderedDict()

    async def of(self, sandbox: Sandbox) -> tuple[dict[int, str], dict[int, str]]:
        """(names of users, names of groups)."""
        known = self._known.get(sandbox.id)
        if known is None or time.monotonic() - known[0] > _FRESH:
            users = await passwd(sandbox)
            groups = await passwd(sandbox, "/etc/group", 3)
            known = time.monotonic(), _numbered(users), _numbered(groups)
            self._known[sandbox.id] = known
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return known[1], known[2]


def _numbered(rows: list[list[str]]) -> dict[int, str]:
    return {int(row[2]): row[0] for row in reversed(rows) if row[2].isascii() and row[2].isdigit()}


class FilesystemService:
    """Handlers by method name."""

    def __init__(self, watching: Watching) -> None:
        self._watching = watching
        self._names = Names()

    async def serve(self, method: str, call: Call) -> Answer | None:
        """The response to a call; None for an unknown method."""
        call.require(Access.READ if method in _READS else Access.RUN)
        watching = self._watching
        if method == "WatchDir":
            return await connect.server_stream(
                call.request, lambda message: watching.stream(call, message), call.cleanup)
        unary = {"Stat": self._stat, "ListDir": self._list_dir, "MakeDir": self._make_dir, "Move": self._move,
                 "Remove": self._remove, "CreateWatcher": watching.create, "GetWatcherEvents": watching.events,
                 "RemoveWatcher": watching.remove}.get(method)  # fmt: skip
        if unary is None:
            return None
        return await connect.unary(call.request, lambda message: unary(call, message))

    # ---- methods ----

    async def _stat(self, call: Call, message: Message) -> Message:
        return {"entry": await self.entry(call, await _stat_of(call, await call.path(connect.text(message, "path"))))}

    async def _list_dir(self, call: Call, message: Message) -> Message:
        path = await call.path(connect.text(message, "path"))
        depth = min(connect.number(message, "depth") or 1, _DEEPEST)
        if (await _stat_of(call, path, follow=True))["kind"] != "directory":
            raise RpcError("invalid_argument", f"{path} is not a directory")
        entries: list[Message] = []
        folders = [(path, depth)]
        while folders:
            folder, left = folders.pop(0)
            async for item in listed(call.sandbox, folder):
                entries.append(await self.entry(call, item))
                if len(entries) > _MOST_LISTED:
                    raise RpcError("resource_exhausted", f"{path} has over {_MOST_LISTED} entries: list its folders")
                if item["kind"] == "directory" and left > 1:
                    folders.append((item["path"], left - 1))
        return {"entries": entries}

    async def _make_dir(self, call: Call, message: Message) -> Message:
        path = await call.path(connect.text(message, "path"))
        found = await _stat_or_none(call, path)
        if found is not None and found["kind"] == "directory":
            raise RpcError("already_exists", f"directory already exists: {path}")
        if found is not None:
            raise RpcError("invalid_argument", f"{path} already exists and is not a directory")
        await make_dirs(call, path)
        return {"entry": await self.entry(call, await _stat_of(call, path))}

    async def _move(self, call: Call, message: Message) -> Message:
        source = await call.path(connect.text(message, "source"))
        target = await call.path(connect.text(message, "destination"))
        await _stat_of(call, source)
        await make_dirs(call, posixpath.dirname(target.rstrip("/")) or "/")
        await call.sandbox.read("move_file", {"source": source, "target": target})
        return {"entry": await self.entry(call, await _stat_of(call, target))}

    async def _remove(self, call: Call, message: Message) -> Message:
        path = await call.path(connect.text(message, "path"))
        try:
            await call.sandbox.read("remove_file", query={"path": path, "recursive": 1})
        except NotFound:
            pass  # as in E2B
        return {}

    # ---- entries ----

    async def entry(self, call: Call, item: dict[str, Any]) -> Message:
        """The EntryInfo of a native FileInfo. The type of a link is that of its target."""
        users, groups = await self._names.of(call.sandbox)
        kind = _TYPES.get(item["kind"], "FILE_TYPE_UNSPECIFIED")
        mode = modes.S_IMODE(item["mode"])
        letter = {"directory": "d", "symlink": "L"}.get(item["kind"], "-")
        made: Message = {
            "name": item["name"], "type": kind, "path": item["path"], "size": str(item["size"]), "mode": mode,
            "permissions": letter + modes.filemode(mode | modes.S_IFREG)[1:],
            "owner": users.get(item["uid"], str(item["uid"])), "group": groups.get(item["gid"], str(item["gid"])),
            "modifiedTime": datetime.fromtimestamp(item["mtime"], UTC).isoformat().replace("+00:00", "Z"),
        }  # fmt: skip
        if item["kind"] == "symlink":
            folder = posixpath.dirname(item["path"])
            made["symlinkTarget"] = posixpath.normpath(posixpath.join(folder, item["target"] or ""))
            target = await _stat_or_none(call, item["path"])
            if target is not None:
                made["type"] = _TYPES.get(target["kind"], "FILE_TYPE_UNSPECIFIED")
        return made


async def listed(sandbox: Sandbox, path: str) -> AsyncIterator[dict[str, Any]]:
    """The native FileInfos of a folder."""
    offset: int | None = 0
    while offset is not None:
        page = await sandbox.json("list_files", query={"path": path, "offset": offset, "limit": _PAGE})
        for item in page["items"]:
            yield item
        offset = page["next"] if len(page["items"]) == _PAGE else None


async def _stat_of(call: Call, path: str, follow: bool = False) -> dict[str, Any]:
    found = await call.sandbox.json("stat_file", query={"path": path, "follow": int(follow)})
    assert isinstance(found, dict)
    return found


async def _stat_or_none(call: Call, path: str) -> dict[str, Any] | None:
    try:
        return await _stat_of(call, path, follow=True)
    except (NotFound, InvalidConfig, Conflict):  # a part of the path may be a file
        return None


async def make_dirs(call: Call, path: str) -> None:
    """Create a folder and its parents; new ones belong to the user of the call. RpcError."""
    top, folder = "", path.rstrip("/") or "/"
    while (found := await _stat_or_none(call, folder)) is None:
        top, folder = folder, posixpath.dirname(folder) or "/"
    if found["kind"] != "directory":
        raise RpcError("invalid_argument", f"{folder} is not a directory")
    if not top:
        return
    try:
        await call.sandbox.read("make_dir", {"path": path})
    except Conflict as error:
        raise RpcError("already_exists", str(error)) from None
    account = await call.account()
    if account.uid or account.gid:
        await call.sandbox.read(
            "chown", {"paths": [top], "remote_user": f"{account.uid}:{account.gid}", "recursive": True})
