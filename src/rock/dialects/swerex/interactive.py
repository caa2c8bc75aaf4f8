"""Interactive programs of SWE-ReX: a program on a terminal of the sandbox, between the commands of a session.

It begins with the working directory and the exported variables of the session. A request writes a line and waits until
one of the expected texts is printed, or the program ends. Expected texts are literal: a pattern of a client must not
run in the server. A program that is not used for `IDLE` seconds is ended, because it keeps its sandbox alive.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import orjson

from rock.dialects.api import LocalApi, check_path
from rock.dialects.swerex.messages import Refused
from rock.errors import from_wire
from rock.http.asgi import App
from rock.protocol.keys import CALLER, Caller
from rock.protocol.routes import ROUTES

IDLE = 600.0  # seconds without a request after which a program is ended
_MOST_OF_ONE, _MOST = 64, 1024  # programs of one tenant, and in total
_HELD = 1 << 20  # bytes of output that a program may print ahead; while a request waits, the oldest are dropped
_ESCAPED = re.compile(r"\\(\W)")


@dataclass(frozen=True)
class Seen:
    """What a program printed up to an expected text. expected: that text; None: the program has ended."""

    output: str
    expected: str | None


class TerminalProgram:
    """One program, by the native WebSocket of terminals."""

    def __init__(self, app: App, caller: Caller, sandbox_id: str, command: str) -> None:
        self._inputs: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self._inputs.put_nowait({"type": "websocket.connect"})
        self._output = bytearray()
        self._changed = asyncio.Event()
        self._reading = asyncio.Event()
        self._refusal = bytearray()
        self.lock = asyncio.Lock()
        query = urlencode({"command": command, "rows": 24, "columns": 200, "term": "dumb"})
        path = ROUTES["terminal"].path.format(sandbox_id=sandbox_id)
        scope: dict[str, Any] = {
            "type": "websocket", "asgi": {"version": "3.0"}, "http_version": "1.1", "path": path, "scheme": "ws",
            "raw_path": path.encode(), "query_string": query.encode(), "client": None, "server": None, "headers": [],
            "subprotocols": [], "extensions": {"websocket.http.response": {}}, CALLER: caller,
        }  # fmt: skip
        self._task = asyncio.ensure_future(app(scope, self._inputs.get, self._send))
        self._task.add_done_callback(lambda _: self._changed.set())

    @property
    def has_ended(self) -> bool:
        return self._task.done()

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        """Messages of the terminal."""
        kind = message["type"]
        if kind == "websocket.send" and message.get("bytes"):
            if len(self._output) > _HELD:
                await self._reading.wait()  # the program waits too
                del self._output[: -_HELD // 2]
            self._output += message["bytes"]
            self._changed.set()
        elif kind == "websocket.http.response.body":
            self._refusal += message.get("body", b"")

    def write(self, data: bytes) -> None:
        self._inputs.put_nowait({"type": "websocket.receive", "bytes": data})

    async def read(self, expected: list[str], timeout: float | None) -> Seen:
        """Wait for one of the texts, the first that is printed, or for the end. TimeoutError."""
        wanted = [(text, _ESCAPED.sub(r"\1", text).encode()) for text in expected]
        self._reading.set()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self._changed.clear()
                    found = [(at, text, literal) for text, literal in wanted if (at := self._output.find(literal)) >= 0]
                    if found:
                        at, text, literal = min(found)
                        return Seen(self._take(at, at + len(literal)), text)
                    if self._task.done():
                        self._raise_refusal()
                        return Seen(self._take(len(self._output), len(self._output)), None)
                    await self._changed.wait()
        finally:
            self._reading.clear()

    def _take(self, end: int, consumed: int) -> str:
        taken = bytes(self._output[:end])
        del self._output[:consumed]
        return taken.decode(errors="backslashreplace")

    def _raise_refusal(self) -> None:
        """Raise the error of a terminal that was not opened."""
        if self._refusal:
            raise from_wire(orjson.loads(bytes(self._refusal)))
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error

    async def close(self) -> None:
        """End the program."""
        self._inputs.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await asyncio.wait({self._task}, timeout=2)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


Place = tuple[str, str, str]  # tenant, sandbox, native session


class InteractivePrograms:
    """The running programs, by session. app: serves the native API."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._running: dict[Place, TerminalProgram] = {}
        self._timers: dict[Place, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def find(self, place: Place) -> TerminalProgram | None:
        """The program of a session that has not ended."""
        found = self._running.get(place)
        if found is None or found.has_ended:
            self._forget(place)
            return None
        self._timers[place].cancel()
        self._timers[place] = asyncio.get_running_loop().call_later(IDLE, self._expire, place)
        return found

    async def start(self, api: LocalApi, place: Place, command: str) -> TerminalProgram:
        """Start a program with the folder and the variables of its session. Refused for too many."""
        owner, sandbox_id, session = place
        check_path({"sandbox_id": sandbox_id})
        own = sum(known[0] == owner and not program.has_ended for known, program in self._running.items())
        if own >= _MOST_OF_ONE or len(self._running) >= _MOST:
            raise Refused("SwerexException", f"{own} interactive programs run, of at most {_MOST_OF_ONE}; quit some")
        file = f"/tmp/.swerex-{secrets.token_hex(8)}"
        # the variables are as long as a user likes, so they are a file and not an argument
        prepare = {"command": f"{{ export -p; printf 'cd -- %q\\n' \"$PWD\"; }} > {file}", "check": "silent",
                   "timeout": 30.0}  # fmt: skip
        await api.json("run", prepare, sandbox_id=sandbox_id, session=session)
        more = f"stty -echo 2>/dev/null\nrm -f {file}\n{command}\n".encode("utf-8", "surrogatepass")
        await api.bytes("write_file", more, query={"path": file, "append": 1}, sandbox_id=sandbox_id)
        program = TerminalProgram(self._app, api.caller, sandbox_id, f". {file}")
        self._running[place] = program
        self._timers[place] = asyncio.get_running_loop().call_later(IDLE, self._expire, place)
        return program

    def _expire(self, place: Place) -> None:
        task = asyncio.ensure_future(self.end(place))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _forget(self, place: Place) -> TerminalProgram | None:
        timer = self._timers.pop(place, None)
        if timer is not None:
            timer.cancel()
        return self._running.pop(place, None)

    async def end(self, place: Place) -> None:
        """End the program of a session; no effect without one."""
        program = self._forget(place)
        if program is not None:
            await program.close()

    async def end_all(self, owner: str, sandbox_id: str) -> None:
        """End the programs of a sandbox."""
        for place in [known for known in self._running if known[:2] == (owner, sandbox_id)]:
            await self.end(place)

    async def close(self) -> None:
        """End all programs."""
        for place in list(self._running):
            await self.end(place)
        await asyncio.gather(*self._ending, return_exceptions=True)
