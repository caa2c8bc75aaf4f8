"""Watchers of folders: the differences between two listings of a folder are its events.

A watcher of the service without streams has no task: its events are determined when a client requests them.
"""

from __future__ import annotations

import asyncio
import posixpath
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rock.dialects.e2b import connect
from rock.dialects.e2b.call import Call
from rock.dialects.e2b.connect import Events, Message
from rock.dialects.e2b.errors import RpcError
from rock.dialects.e2b.native import Sandbox
from rock.dialects.e2b.programs import Programs
from rock.errors import NotFound

EVERY = 0.2  # seconds between two listings of a watched folder
_MOST_ENTRIES = 20_000
_MOST_WATCHERS = 10_000  # of all sandboxes; the least recently used one is removed
_DEEPEST = 64

Listing = Callable[[Sandbox, str], AsyncIterator[dict[str, Any]]]


class Seen(NamedTuple):
    """What is compared of an entry."""

    kind: str
    size: int
    mtime: float
    mode: int
    uid: int
    gid: int


Folder = dict[str, Seen]


def changes(old: Folder, new: Folder) -> list[tuple[str, str]]:
    """(relative path, event type) of the differences between two listings. Pure."""
    gone = {name: seen for name, seen in old.items() if name not in new}
    came = {name: seen for name, seen in new.items() if name not in old}
    events: list[tuple[str, str]] = []
    for name, seen in gone.items():
        moved = next((other for other, found in came.items() if found == seen), None)
        if moved is None:
            events.append((name, "REMOVE"))
        else:
            events += [(name, "RENAME"), (moved, "CREATE")]
            del came[moved]
    for name, seen in came.items():
        events.append((name, "CREATE"))
        if seen.kind == "file" and seen.size:
            events.append((name, "WRITE"))
    for name, seen in new.items():
        before = old.get(name)
        if before is None or before == seen:
            continue
        if seen.kind != "directory" and (before.kind, before.size, before.mtime) != (seen.kind, seen.size, seen.mtime):
            events.append((name, "WRITE"))
        if (before.mode, before.uid, before.gid) != (seen.mode, seen.uid, seen.gid):
            events.append((name, "CHMOD"))
    return events


@dataclass
class Watcher:
    sandbox_id: str
    path: str
    recursive: bool
    folder: Folder = field(default_factory=dict)


class Watching:
    """The methods of watchers. listing: lists a folder."""

    def __init__(self, programs: Programs, listing: Listing) -> None:
        self._programs = programs
        self._listing = listing
        self._watchers: OrderedDict[str, Watcher] = OrderedDict()

    async def stream(self, call: Call, message: Message) -> Events:
        """The events of a folder until the client leaves."""
        watcher = await self._begin(call, message)
        yield {"start": {}}
        gate = self._programs.gate(call.sandbox.id)
        while True:
            await asyncio.sleep(EVERY)
            try:
                new = await gate.run(lambda: self._look(call.sandbox, watcher))
            except NotFound:
                return  # the folder was removed
            found, watcher.folder = changes(watcher.folder, new), new
            for event in found:
                yield {"filesystem": _event(event)}

    async def create(self, call: Call, message: Message) -> Message:
        watcher = await self._begin(call, message)
        watcher_id = secrets.token_hex(8)
        self._watchers[watcher_id] = watcher
        while len(self._watchers) > _MOST_WATCHERS:
            self._watchers.popitem(last=False)
        return {"watcherId": watcher_id}

    async def events(self, call: Call, message: Message) -> Message:
        watcher = self._find(call, message)
        try:
            new = await self._look(call.sandbox, watcher)
        except NotFound:
            new = {}
        found, watcher.folder = changes(watcher.folder, new), new
        return {"events": [_event(event) for event in found]}

    async def remove(self, call: Call, message: Message) -> Message:
        self._find(call, message)
        del self._watchers[connect.text(message, "watcherId")]
        return {}

    def _find(self, call: Call, message: Message) -> Watcher:
        watcher_id = connect.text(message, "watcherId")
        watcher = self._watchers.get(watcher_id)
        if watcher is None or watcher.sandbox_id != call.sandbox.id:
            raise RpcError("not_found", f"watcher with id {watcher_id[:80]!r} not found: create it again")
        self._watchers.move_to_end(watcher_id)
        return watcher

    async def _begin(self, call: Call, message: Message) -> Watcher:
        path = await call.path(connect.text(message, "path"))
        found = await call.sandbox.json("stat_file", query={"path": path, "follow": 1})
        if found["kind"] != "directory":
            raise RpcError("invalid_argument", f"{path} is not a directory")
        watcher = Watcher(call.sandbox.id, path, bool(connect.flag(message, "recursive")))
        watcher.folder = await self._look(call.sandbox, watcher)
        return watcher

    async def _look(self, sandbox: Sandbox, watcher: Watcher) -> Folder:
        """The entries of a watched folder. NotFound when it is gone; RpcError for too many entries."""
        found: Folder = {}
        folders = [("", 0)]
        while folders:
            relative, depth = folders.pop()
            try:
                async for item in self._listing(sandbox, posixpath.join(watcher.path, relative)):
                    name = posixpath.join(relative, item["name"])
                    found[name] = Seen(item["kind"], item["size"] if item["kind"] != "directory" else 0,
                                       item["mtime"] if item["kind"] != "directory" else 0.0,
                                       item["mode"], item["uid"], item["gid"])  # fmt: skip
                    if len(found) > _MOST_ENTRIES:
                        raise RpcError("resource_exhausted", f"{watcher.path} has over {_MOST_ENTRIES} entries: "
                                                             "watch a smaller folder")  # fmt: skip
                    if watcher.recursive and item["kind"] == "directory" and depth < _DEEPEST:
                        folders.append((name, depth + 1))
            except NotFound:
                if not relative:
                    raise
        return found


def _event(event: tuple[str, str]) -> Message:
    return {"name": event[0], "type": f"EVENT_TYPE_{event[1]}"}
