"""The push channel of the web page: rows of sandboxes as columns, and their changes over one WebSocket per tab.

One task follows the store while tabs are open, and collects changed rows each second for all tabs. A tab has no state
here but its filter and the version that it has: a tab that is too slow for the kept changes loads its rows again.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from rock.admin.api.sandboxes import listing
from rock.errors import InvalidConfig, RockError, Unavailable
from rock.http.asgi import Receive, Request, Send
from rock.protocol.keys import Access, Caller
from rock.store.base import Query, Record, Store

log = logging.getLogger("rock.ui")

COLUMNS = ("sandbox_id", "name", "state", "cause", "image", "tenant", "worker", "isolation", "cpus", "memory",
           "created_at", "stopped_at", "deadline", "user_id", "experiment_id", "group", "labels",
           "version")  # fmt: skip
MOST_ROWS = 10_000
_TICK = 1.0  # seconds
_PING = 15.0  # seconds between two messages at most: a tab notices a server that is gone
_MOST_CHANGES = 1000  # records read in one tick
_KEPT_CHANGES = 4000  # records in the log of all ticks
_MOST_TABS = 1000
_LONGEST_MESSAGE = 8 << 10  # bytes from a tab
_MOST_DISTINCT = 500  # values of a column that are sent by index
_CACHED = 8  # compressed lists, one second each


def row_of(record: Record) -> list[Any]:
    """The values of COLUMNS. Times have milliseconds. deadline: the time at which a running sandbox ends in any case;
    None without one."""
    info, timeout = record.info, record.config.timeout
    found: list[Any] = []
    for name in COLUMNS:
        if name == "deadline":
            value: Any = info.started_at + timeout if timeout and info.started_at else None
        else:
            value = getattr(info, name)
        found.append(round(value, 3) if isinstance(value, float) and name != "cpus" else value)
    return found


def matches(record: Record, query: Query) -> bool:
    """Whether a record is one of the query's; the same conditions as those of the store."""
    info = record.info
    return (
        (query.tenant is None or record.tenant == query.tenant)
        and (not query.states or info.state in query.states)
        and all(getattr(info, name, None) == value for name, value in query.fields.items())
        and all(info.labels.get(name) == value for name, value in query.labels.items())
    )


def parse_filter(text: str, caller: Caller) -> Query:
    """The query of a tab's filter, for the tenant of its key. InvalidConfig."""
    if len(text) > _LONGEST_MESSAGE:
        raise InvalidConfig(f"the filter is over {_LONGEST_MESSAGE} bytes", hint="use fewer filters")
    return replace(listing(text.encode(), MOST_ROWS + 1), tenant=caller.tenant, after=None)


def encode(values: Sequence[Any]) -> dict[str, Any]:
    """A column, in the smallest of these forms: {"same": value}; {"times": [milliseconds]}, each as the difference to
    the one before; {"distinct": [value], "at": [index]}; {"plain": [value]}."""
    if all(value == values[0] for value in values):
        return {"same": values[0] if values else None}
    if all(isinstance(value, float) and value > 1e8 for value in values):
        times = [round(value * 1000) for value in values]
        return {"times": [times[0], *(b - a for a, b in itertools.pairwise(times))]}
    known: dict[bytes, int] = {}
    distinct: list[Any] = []
    at: list[int] = []
    for value in values:
        index = known.setdefault(orjson.dumps(value), len(known))
        if index == len(distinct):
            distinct.append(value)
        at.append(index)
        if len(distinct) > _MOST_DISTINCT:
            return {"plain": values}
    return {"distinct": distinct, "at": at}


def _encoded(rows: list[list[Any]], version: int, start: int) -> bytes:
    shown = rows[:MOST_ROWS]
    columns = {name: encode([row[number] for row in shown]) for number, name in enumerate(COLUMNS)}
    data = {"version": version, "start": start, "count": len(shown), "columns": columns,
            "complete": len(rows) == len(shown)}  # fmt: skip
    return gzip.compress(orjson.dumps(data), 6, mtime=0)


@dataclass(frozen=True)
class _Tick:
    """Changed records of one version: the record, or None for a removed one."""

    version: int
    records: dict[str, Record | None]


class Live:
    """The changes of all sandboxes, for all tabs. store: of the admin."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tabs = 0
        self._version = 0
        self._start = int(time.time() * 1000)  # distinguishes versions of this process
        self._ticks: deque[_Tick] = deque()
        self._kept = 0
        self._changed: dict[str, None] = {}
        self._missed = False
        self._next = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lists: OrderedDict[tuple[str, str | None], tuple[float, asyncio.Task[bytes]]] = OrderedDict()

    async def close(self) -> None:
        """End the tasks; tabs reconnect to the next server."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- rows ----

    async def columns(self, caller: Caller, request: Request) -> bytes:
        """Rows of a filter, newest first, as gzipped JSON: {"version", "count", "columns", "complete"}. columns: see
        encode. complete: there are no others. Tabs with the same filter share the result for a second."""
        caller.require(Access.READ)
        raw: bytes = request.scope.get("query_string", b"")
        query = parse_filter(raw.decode("latin-1"), caller)
        key = raw.decode("latin-1"), caller.tenant
        known = self._lists.get(key)
        if known is None or known[0] < time.monotonic():
            known = self._lists[key] = (time.monotonic() + 1.0, asyncio.ensure_future(self._columns(query)))
            while len(self._lists) > _CACHED:
                self._lists.popitem(last=False)
            asyncio.get_running_loop().call_later(2.0, self._forget, key, known)
        return await asyncio.shield(known[1])

    def _forget(self, key: tuple[str, str | None], entry: tuple[float, asyncio.Task[bytes]]) -> None:
        if self._lists.get(key) is entry:
            del self._lists[key]

    async def _columns(self, query: Query) -> bytes:
        version = self._version
        records = await self._store.list(query)
        rows = [row_of(record) for record in records]
        return await asyncio.to_thread(_encoded, rows, version, self._start)

    # ---- changes ----

    async def serve(self, caller: Caller, receive: Receive, send: Send) -> None:
        """Serve one tab.

        Its messages: {"filter": "state=running", "version", "start"} of the rows that it has. Ours: {"version",
        "changed": [row], "gone": [id]}, {"reset": true} for a tab that has to load its rows again, {} to show that the
        server is there.
        """
        caller.require(Access.READ)
        if self._tabs >= _MOST_TABS:
            raise Unavailable(f"{_MOST_TABS} tabs are open on this server", hint="close some tabs")
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        self._tabs += 1
        if not self._tasks:
            self._changed.clear()
            self._lists.clear()  # changes after these lists were not followed
            self._tasks = [asyncio.create_task(self._follow(), name="page: changes"),
                           asyncio.create_task(self._tick(), name="page: ticks")]  # fmt: skip
        tab = _Tab(self, caller, send)
        reading = asyncio.ensure_future(tab.read(receive))
        writing = asyncio.ensure_future(tab.write())
        try:
            done, _ = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), RockError):
                    raise error
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
            self._tabs -= 1
            if not self._tabs:
                await self.close()
                self._ticks.clear()
                self._kept = 0

    async def _follow(self) -> None:
        while True:
            try:
                async for sandbox_id in self._store.watch():
                    if sandbox_id:
                        self._changed[sandbox_id] = None
                    else:
                        self._missed = True
            except RockError as error:
                log.info("changes of sandboxes are not followed now: %s", error)
            self._missed = True
            await asyncio.sleep(_TICK)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            if self._missed:
                self._missed = False
                self._ticks.clear()
                self._kept, self._version = 0, self._version + 2  # no tab has the version before it
                self._tell()
            elif self._changed:
                try:
                    await self._collect()
                except RockError as error:
                    log.info("changed sandboxes were not read: %s", error)
                    self._missed = True

    async def _collect(self) -> None:
        ids = list(self._changed)[:_MOST_CHANGES]
        records: dict[str, Record | None] = {}
        for number, sandbox_id in enumerate(ids):
            del self._changed[sandbox_id]
            records[sandbox_id] = await self._store.get(sandbox_id)
            if number % 20 == 19:
                await asyncio.sleep(0)  # lets requests run first
        self._version += 1
        self._ticks.append(_Tick(self._version, records))
        self._kept += len(records)
        while self._kept > _KEPT_CHANGES:
            self._kept -= len(self._ticks.popleft().records)
        self._tell()

    def _tell(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Until there is another version, or for that time."""
        try:
            async with asyncio.timeout(seconds):
                await self._next.wait()
        except TimeoutError:
            pass

    @property
    def version(self) -> int:
        return self._version

    @property
    def start(self) -> int:
        return self._start

    def since(self, version: int, query: Query) -> dict[str, Any]:
        """The message with the changes after a version."""
        if version == self._version:
            return {}
        if not self._ticks or self._ticks[0].version > version + 1:
            return {"reset": True, "version": self._version}
        merged: dict[str, Record | None] = {}
        for tick in self._ticks:
            if tick.version > version:
                merged |= tick.records
        changed, gone = [], []
        for sandbox_id, record in merged.items():
            if record is None:
                gone.append(sandbox_id)
            elif matches(record, query):
                changed.append(row_of(record))
            elif query.tenant is None or record.tenant == query.tenant:
                gone.append(sandbox_id)  # an id of another tenant is never sent
        if query.tenant is not None:
            gone = [sandbox_id for sandbox_id in gone if merged[sandbox_id] is not None or _may_be(sandbox_id, query)]
        return {"version": self._version, "changed": changed, "gone": gone}


def _may_be(sandbox_id: str, query: Query) -> bool:
    """Whether a removed id may have been one of the tenant's: chosen ids begin with its name."""
    return sandbox_id.startswith(f"{query.tenant}-")


@dataclass
class _Tab:
    """One WebSocket."""

    live: Live
    caller: Caller
    send: Send
    query: Query | None = None
    version: int = 0

    async def read(self, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None or len(text) > _LONGEST_MESSAGE:
                raise InvalidConfig("a message of a tab is over 8 KiB, or binary", hint='send {"filter": "..."}')
            try:
                wanted = orjson.loads(text)
                found, version, start = wanted["filter"], wanted["version"], wanted["start"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                found = None
            if not isinstance(found, str) or not isinstance(version, int):
                raise InvalidConfig(f"invalid message of a tab: {text[:80]!r}",
                                    hint='send {"filter": "...", "version": N, "start": N} of the loaded rows')
            self.query = parse_filter(found, self.caller)
            self.version = version if start == self.live.start else -1
            await self._say(self._message(self.query))

    async def write(self) -> None:
        while True:
            await self.live.wait(_PING)
            query = self.query
            if query is None:
                await self._say({})
                continue
            message = self._message(query)
            if not message or "reset" in message or message["changed"] or message["gone"]:
                await self._say(message)

    def _message(self, query: Query) -> dict[str, Any]:
        message = self.live.since(self.version, query)
        self.version = message.get("version", self.version)
        return message

    async def _say(self, message: dict[str, Any]) -> None:
        await self.send({"type": "websocket.send", "text": orjson.dumps(message).decode()})
