"""A cache of the objects of one kind: list, then watch; after an expired watch, list again.

The resourceVersions of events grow: one that is not above the position of the watch is duplicated or stale, and has no
effect. A deletion is applied only to the object with the uid that was deleted. The list is repeated every `resync`
seconds, which repairs the cache after an event that was never sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from rock.errors import RockError, Unavailable
from rock.kubernetes.client import Api, Expired, Object

log = logging.getLogger("rock.kubernetes")

_PAUSE, _LONGEST_PAUSE = 0.2, 10.0  # seconds between two attempts


def version_of(found: Object) -> int:
    """The resourceVersion, which grows with each change; 0 for one that is no number."""
    text = str((found.get("metadata") or {}).get("resourceVersion") or "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def name_of(found: Object) -> str:
    return str((found.get("metadata") or {}).get("name") or "")


def uid_of(found: Object) -> str:
    return str((found.get("metadata") or {}).get("uid") or "")


class Informer:
    """on_change: called with (object, whether it is gone) for each change, in order; it must not raise."""

    def __init__(
        self, api: Api, path: str, selector: str, on_change: Callable[[Object, bool], None], resync: float = 60.0
    ) -> None:
        self.objects: dict[str, Object] = {}  # by name
        self.synced = asyncio.Event()  # the first list has arrived
        self.connected = False  # a watch is open now
        self.lists = 0
        self._api = api
        self._path = path
        self._selector = selector
        self._on_change = on_change
        self._resync = resync
        self._position = 0  # resourceVersion up to which everything was seen
        self._listed = False  # the watch may continue from the position
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="pods")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        pause = _PAUSE
        while True:
            try:
                if not self._listed:
                    await self._list()
                self.connected, pause = True, _PAUSE
                await self._follow()
            except Expired:
                log.info("the watch of %s expired; listing again", self._path)
                self._listed = False
            except RockError as error:
                log.warning("%s: %s; trying again", self._path, error)
                self.connected = False
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except Exception:
                log.exception("watch of %s", self._path)
                self._listed = self.connected = False
                await asyncio.sleep(_LONGEST_PAUSE)

    async def _follow(self) -> None:
        """Apply events until the watch ends, or until it is time for the next list."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._resync):
                async with contextlib.aclosing(
                    self._api.watch(self._path, str(self._position), self._selector)
                ) as events:
                    async for kind, found in events:
                        self._apply(kind, found)
                await asyncio.sleep(_PAUSE)  # a server that ends each watch at once is not asked in a loop
                return
        self._listed = False

    async def _list(self) -> None:
        found, text = await self._api.list(self._path, self._selector)
        self.lists += 1
        version = int(text) if text.isascii() and text.isdigit() else 0
        if version < self._position:
            raise Unavailable("the API server sent a list that is older than the last event", hint="retry")
        here = {name_of(one): one for one in found if name_of(one)}
        for name in [name for name in self.objects if name not in here]:
            self._remove(self.objects[name])
        for one in here.values():
            self._put(one)
        self._position, self._listed = version, True
        self.synced.set()

    def _apply(self, kind: str, found: Object) -> None:
        version = version_of(found)
        if version <= self._position:
            return
        if kind in ("ADDED", "MODIFIED"):
            self._put(found)
        elif kind == "DELETED":
            known = self.objects.get(name_of(found))
            if known is not None and uid_of(known) == uid_of(found):
                self._remove(found)
        self._position = version

    def forget(self, name: str) -> None:
        """Remove an object from the cache, which is known to be outdated."""
        self.objects.pop(name, None)

    def _put(self, found: Object) -> None:
        name = name_of(found)
        known = self.objects.get(name)
        if known is not None:
            if version_of(found) <= version_of(known):
                return
            if uid_of(known) != uid_of(found):
                self._remove(known)
        self.objects[name] = found
        self._on_change(found, False)

    def _remove(self, found: Object) -> None:
        self.objects.pop(name_of(found), None)
        self._on_change(found, True)
