"""Requests to the environments of a sandbox and their responses: the rocklet side of guest/environments/host.py.

A request costs one write and a response one read, without a thread. Requests of one environment run in order; those of
several environments run in parallel, each in its own process. Payloads are passed through without parsing. Clients on
the same machine can borrow the pipes of an environment and use it without the server (local_socket.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
from collections.abc import Callable
from typing import Any

from rock.errors import (
    CommandTimeout,
    Conflict,
    EnvironmentEnded,
    InvalidConfig,
    Lost,
    NotFound,
    RockError,
    SandboxError,
)
from rock.guest.environments import frames, host
from rock.guest.environments.frames import (
    ENDED,
    ERROR,
    FORK,
    HEAD,
    HELLO,
    IN_MEMORY,
    KILL,
    MAKE,
    NO_INDEX,
    PLAIN,
)
from rock.protocol.env import error_of
from rock.rocklet.environments.pipes import HostPipes
from rock.rocklet.environments.registry import Answered, Batch, Call, Hosted, LentPipes, Names, Owners
from rock.runtime.base import ExitStatus, Process

IN_USE = "wait until it is released, or open another environment"  # hint of errors


class Exchange:
    """The environments of one host, by number, and their pipes.

    timeout: seconds for one request, after which the environment is killed, unless it has its own timeout. failed: the
    reason why the host has ended; None while it serves. free: pipes that no environment uses.
    """

    def __init__(self, sandbox_id: str, timeout: float, lease: float) -> None:
        self.sandbox_id = sandbox_id
        self.names = Names(sandbox_id, self.forget)
        self.envs: dict[int, Hosted] = {}
        self.owners = Owners(self.envs, lease, self.forget)
        self.free: list[int] = []
        self.link: HostPipes | None = None
        self.failed: RockError | None = None
        self._timeout = timeout
        self._calls: dict[int, Call] = {}
        self._next_id = secrets.randbits(40)  # responses to an earlier rocklet process never match our requests
        self._ending: asyncio.Task[None] | None = None

    # ---- connection to the host ----

    def connect(self, process: Process) -> HostPipes:
        """Use this host from now on."""
        self.link = HostPipes(process, self._answer, self._end, self.nonsense)
        return self.link

    def let_go(self, why: RockError) -> None:
        """Disconnect from the host: all pending requests fail. Idempotent."""
        self._fail(why)
        if self._ending is not None:
            self._ending.cancel()
        link, self.link = self.link, None
        if link is not None:
            link.stop()
            link.process.close()

    def greet(self, number: int, pipe: int) -> None:
        """Send a greeting. An earlier reader may have consumed half of a response; valid data begins after the reply to
        the greeting."""
        assert self.link is not None
        token = secrets.token_bytes(16)
        self.link.own[pipe + host.OWN].seek(token)
        self.link.egress[pipe].send(number, framed(HELLO, number, 0, NO_INDEX, token))

    async def zygote(self, op: int, payload: bytes) -> Any:
        """A response of the host itself."""
        batch = Batch(1)
        self.send(batch, 0, op, 0, 0, 0, NO_INDEX, payload)
        return plain_of((await batch.future)[0])

    def forget(self, number: int) -> None:
        """Remove an environment; its number and pipe are free once its process has ended."""
        hosted = self.envs.get(number)
        if hosted is None:
            return
        hosted.closed = True
        self.names.drop(number)
        self.owners.drop(number)
        if self.failed is not None:
            del self.envs[number]
        elif hosted.dead and hosted.lent is None:
            self.release(number, hosted)
        elif hosted.ended is None:  # otherwise it was already killed
            self._kill(number)

    # ---- requests ----

    async def plain(self, op: int, number: int, value: Any, index: int = NO_INDEX) -> Any:
        """Send a request as JSON to an environment and return the response. Raises the environment's error."""
        batch = Batch(1)
        self.send(batch, 0, op, PLAIN, number, 0, index, json_of(value))
        return plain_of((await batch.future)[0])

    def send(
        self, batch: Batch, place: int, op: int, flags: int, number: int, asker: int, index: int, payload: Any
    ) -> None:
        """Write a request; the batch receives its response. Raises errors that are known without a request."""
        pipe = None
        hosted = self.usable(number) if number else None
        link = self._connected()
        flags &= ~IN_MEMORY
        if hosted is not None:
            pipe = None if op == MAKE else hosted.pipe
            if pipe is not None and link.memory is not None and not hosted.asked:
                flags |= IN_MEMORY  # a second response would replace the first one before it is read
        id = self._begin(Call(batch, place, number, op, asker), hosted)
        stream = 0 if op == MAKE else number
        message = HEAD.pack(len(payload), op, flags, number, id, index) + payload
        link.egress[pipe or host.REQUESTS].send(stream, message)

    def usable(self, number: int) -> Hosted:
        """An environment that has not ended; raises NotFound, or the error of its end."""
        hosted = self.envs.get(number)
        if hosted is None or hosted.closed:
            raise NotFound(
                f"there is no environment {number} in sandbox {self.sandbox_id}",
                sandbox_id=self.sandbox_id,
                hint=self.names.why_gone(number),
            )
        if hosted.ended is not None:
            raise hosted.ended
        return hosted

    def _connected(self) -> HostPipes:
        if self.failed is not None or self.link is None:
            raise self.failed or Lost("the host of environments was not started", sandbox_id=self.sandbox_id)
        return self.link

    def _begin(self, call: Call, hosted: Hosted | None) -> int:
        """Register a request and start its timer; returns its id."""
        self._next_id += 1
        self._calls[self._next_id] = call
        if hosted is not None:
            loop = asyncio.get_running_loop()
            if not hosted.asked:
                hosted.since = loop.time()
            hosted.asked.append(self._next_id)
            if hosted.timer is None:
                hosted.timer = loop.call_at(hosted.since + self.limit(hosted), self._overdue, call.number)
        return self._next_id

    def is_lent(self, number: int) -> bool:
        """Whether a client on this machine has the pipes of an environment."""
        hosted = self.envs.get(number)
        return hosted is not None and hosted.lent is not None

    def fork(self, number: int, children: dict[int, dict[str, Any]], reseed: bool) -> Batch:
        """Fork an environment. children: the fields of MAKE by the numbers of the children, which are in `envs`.
        The batch receives a response for each. It is one request, so all children continue from the same step."""
        link = self._connected()
        batch = Batch(len(children))
        asked = []
        for place, (child, spec) in enumerate(children.items()):
            id = self._begin(Call(batch, place, child, FORK, 0), self.envs[child])
            asked.append({**spec, "number": child, "id": id})
        payload = json.dumps({"env": number, "reseed": reseed, "children": asked}).encode()
        link.egress[host.REQUESTS].send(0, framed(FORK, number, 0, NO_INDEX, payload))
        return batch

    def limit(self, hosted: Hosted) -> float:
        """Timeout of one request in seconds."""
        return self._timeout if hosted.timeout is None else hosted.timeout

    def _overdue(self, number: int) -> None:
        """The timer of the oldest request fired; checks whether that request is still pending."""
        hosted = self.envs.get(number)
        if hosted is None:
            return
        hosted.timer = None
        if not hosted.asked:
            return
        loop = asyncio.get_running_loop()
        limit = self.limit(hosted)
        if hosted.since + limit > loop.time():
            hosted.timer = loop.call_at(hosted.since + limit, self._overdue, number)
            return
        self.took_too_long(number, hosted, frames.NAMES.get(self._calls[hosted.asked[0]].op, "call"))

    def took_too_long(self, number: int, hosted: Hosted, what: str) -> None:
        """Kill an environment whose request exceeded its timeout."""
        self._env_failed(hosted, CommandTimeout(
            f"environment {hosted.env_id}: {what} took longer than {self.limit(hosted):g} s; it was killed",
            sandbox_id=self.sandbox_id, hint="make a new one",
        ))  # fmt: skip
        self._kill(number)

    def _env_failed(self, hosted: Hosted, why: RockError) -> None:
        """The environment is unusable from now on: all its pending requests fail."""
        hosted.ended = hosted.ended or why
        if hosted.lent is not None:
            hosted.lent(hosted.ended)
        for id in hosted.asked:
            call = self._calls.pop(id)
            call.batch.put(call.place, hosted.ended)
        hosted.asked.clear()
        if hosted.timer is not None:
            hosted.timer.cancel()
            hosted.timer = None

    def _kill(self, number: int) -> None:
        if self.link is not None and self.failed is None:
            self.link.egress[host.REQUESTS].send(0, framed(KILL, number, 0, NO_INDEX, b""))

    # ---- responses ----

    def _answer(self, frame: bytes | bytearray, pipe: int | None = None) -> None:
        """Handle a frame from the shared pipe, or from the pipe of the environment that has `pipe`."""
        length, op, flags, number, id, index = HEAD.unpack_from(frame)
        if length != len(frame) - HEAD.size:
            raise ValueError("a frame of another length than it says")
        if op == ENDED:
            told = json.loads(frame[HEAD.size :])
            self._env_ended(number, int(told["status"]), str(told["stderr"]))
            return
        call = self._calls.get(id)
        if call is None or call.number != number:
            return  # the response to an earlier rocklet process or to an abandoned request
        hosted = self.envs.get(number)
        if pipe is not None and (hosted is None or hosted.pipe != pipe):
            raise ValueError("an answer in another environment's name")
        if flags & IN_MEMORY:
            frame, flags = self._in_memory(pipe, frame), flags & ~IN_MEMORY
            length = len(frame) - HEAD.size
        del self._calls[id]
        if hosted is not None and hosted.asked:
            hosted.asked.remove(id)
            hosted.since = asyncio.get_running_loop().time()
        if op == ERROR:
            error, started = error_of(json.loads(frame[HEAD.size :]), self.sandbox_id)
            if not started and number in self.envs:
                refused = self.envs.pop(number)
                self.names.drop(number)
                self.owners.drop(number)
                self.free += [refused.pipe] if refused.pipe is not None else []
                if refused.timer is not None:
                    refused.timer.cancel()
            call.batch.put(call.place, error)
            return
        patched = frame if isinstance(frame, bytearray) else bytearray(frame)
        HEAD.pack_into(patched, 0, length, op, flags, number, call.id, index)
        call.batch.put(call.place, patched)

    def _in_memory(self, pipe: int | None, frame: bytes | bytearray) -> bytearray:
        """The frame of a response in the memory of an environment, with room for the head. It is read by a system call:
        a mapping would assign memory of the server to the holes that the sandbox makes there. ValueError."""
        length = int.from_bytes(frame[HEAD.size :], "big")
        memory = None if self.link is None else self.link.memory
        if pipe is None or memory is None or len(frame) != HEAD.size + 8 or not 0 < length <= frames.PART:
            raise ValueError(f"a response of {length} bytes in memory")
        whole = bytearray(HEAD.size + length)
        with memoryview(whole) as view, view[HEAD.size :] as body:
            if os.preadv(memory, [body], (pipe - host.PIPES.start) * frames.PART) != length:
                raise ValueError("a response in memory that is not there")
        return whole

    def nonsense(self, pipe: int, why: str) -> None:
        """An environment sent invalid data: it is unusable from now on."""
        for number, hosted in self.envs.items():
            if hosted.pipe == pipe and hosted.ended is None:
                self._env_failed(hosted, EnvironmentEnded(
                    f"environment {hosted.env_id} was killed: what it answers makes no sense ({why})",
                    sandbox_id=self.sandbox_id, hint="make a new one",
                ))  # fmt: skip
                self._kill(number)

    def _env_ended(self, number: int, status: int, lines: str) -> None:
        hosted = self.envs.get(number)
        if hosted is None or self.link is None:
            return
        self.link.inlet.forget(number)
        hosted.dead = True
        if hosted.pipe is not None and hosted.lent is None:
            self.link.own[hosted.pipe + host.OWN].drain()  # its last responses may still be in the pipe
        code = os.waitstatus_to_exitcode(status)
        how = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"its process exited with status {code}"
        if code == -9:
            how += ", as happens when the sandbox is out of memory"
        last = lines.strip().splitlines()[-1:]
        self._env_failed(hosted, EnvironmentEnded(
            ": ".join([f"environment {hosted.env_id} ended: {how}", *last]),
            sandbox_id=self.sandbox_id,
            hint="make a new one",
            details={"stderr": lines, "exit": code},
        ))  # fmt: skip
        if hosted.lent is None:
            self.release(number, hosted)

    def release(self, number: int, hosted: Hosted) -> None:
        """Free the pipes of an environment whose process has ended and whose pipes are not lent."""
        if hosted.pipe is not None:
            self.free.append(hosted.pipe)
            hosted.pipe = None
        if hosted.closed:
            self.envs.pop(number, None)

    def _end(self, nonsense: str | None) -> None:
        """End the connection: the pipe is closed, or its data is invalid."""
        if nonsense is not None:
            self._fail(
                SandboxError(f"the host of environments speaks nonsense: {nonsense}", sandbox_id=self.sandbox_id)
            )
        elif self._ending is None and self.link is not None:
            self._ending = asyncio.ensure_future(self._ended(self.link))

    async def _ended(self, link: HostPipes) -> None:
        try:
            status = await link.process.wait()
        except RockError as error:
            self._fail(error)
            return
        last = link.tail.text.splitlines()[-1:]
        self._fail(SandboxError(": ".join([f"the host of environments ended: {_described(status)}", *last]),
                                sandbox_id=self.sandbox_id, details={"stderr": link.tail.text},
                                hint="make the environment again"))  # fmt: skip

    def _fail(self, error: RockError) -> None:
        self.failed = self.failed or error
        self.names.stop()
        self.owners.stop()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.batch.put(call.place, error)
        for hosted in self.envs.values():
            hosted.asked.clear()
            if hosted.lent is not None:
                hosted.lent(error)
            if hosted.timer is not None:
                hosted.timer.cancel()
                hosted.timer = None


def framed(op: int, number: int, id: int, index: int, payload: bytes) -> bytes:
    """A complete frame of JSON."""
    return HEAD.pack(len(payload), op, PLAIN, number, id, index) + payload


def json_of(value: Any) -> bytes:
    """Encode as JSON; InvalidConfig for values that JSON cannot represent."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"the argument cannot be written as JSON: {error}",
                            hint="use strings, numbers, bools, None, lists and dictionaries with text keys") from None


def plain_of(answered: Answered) -> Any:
    """The value of a JSON response; raises the error of an error response."""
    if isinstance(answered, RockError):
        raise answered
    try:
        return json.loads(memoryview(answered)[HEAD.size :].tobytes())
    except (ValueError, RecursionError) as error:
        raise EnvironmentEnded(f"what the environment answered is no JSON: {error}") from None


def _described(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"killed by signal {status.signal}" + (" (out of memory?)" if status.signal == 9 else "")
    return "exit status unknown" if status.code is None else f"exit status {status.code}"


# ---- lent pipes ----
#
# Clients on this machine can borrow the pipes of an environment, and use it without the server (local_socket.py).

_RETURN_TIMEOUT = 2.0


class PipeLending:
    """The lent pipes of the environments of one host, and their borrowers."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def token_of(self, number: int) -> str | None:
        """The token for borrowing the pipes of an environment; None when it has no pipes of its own."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.pipe is None:
            return None
        hosted.token = hosted.token or secrets.token_urlsafe(24)
        return hosted.token

    def is_token(self, number: int, token: str) -> bool:
        hosted = self._exchange.envs.get(number)
        if hosted is None or not hosted.token:
            return False
        return secrets.compare_digest(hosted.token.encode(), token.encode(errors="replace"))

    def lend(self, number: int, lost: Callable[[RockError], None]) -> LentPipes:
        """Lend the pipes of an environment; `lost` is called when the environment ends or the pipes are taken back.
        Raises the error of its end, or Conflict when the pipes are lent already."""
        hosted = self._exchange.envs[number]
        if hosted.ended is not None:
            raise hosted.ended
        if self._exchange.failed is not None or self._exchange.link is None or hosted.pipe is None or hosted.closed:
            raise self._exchange.failed or self._unknown(number)
        if hosted.lent is not None or hosted.asked:
            raise Conflict(f"environment {number} is in use by another client", sandbox_id=self._exchange.sandbox_id,
                           hint=IN_USE)
        own = hosted.pipe + host.OWN
        self._exchange.link.own[own].stop()
        hosted.lent = lost
        hosted.returned.clear()
        channels = self._exchange.link.process.channels
        memory = self._exchange.link.memory
        part = None if memory is None else (memory, (hosted.pipe - host.PIPES.start) * frames.PART)
        return LentPipes(channels[hosted.pipe], channels[own], part, self._exchange.limit(hosted))

    def _unknown(self, number: int) -> NotFound:
        return NotFound(f"there is no environment {number}", sandbox_id=self._exchange.sandbox_id,
                        hint="it was closed or never opened; open a new one")

    def take_back(self, number: int) -> None:
        """Take the pipes back, when the client returns them or the server needs them. Idempotent."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.lent is None:
            return
        hosted.lent = None
        hosted.returned.set()
        if self._exchange.link is None or hosted.pipe is None:
            return
        own = self._exchange.link.own[hosted.pipe + host.OWN]
        own.start()
        if hosted.dead:
            own.drain()
            self._exchange.release(number, hosted)
        elif hosted.ended is None:
            self._exchange.greet(number, hosted.pipe)

    def overdue(self, number: int, what: str) -> None:
        """The borrowing client reports that a request exceeded its timeout."""
        hosted = self._exchange.envs.get(number)
        if hosted is not None and hosted.lent is not None:
            self._exchange.took_too_long(number, hosted, what)

    def nonsense(self, number: int, why: str) -> None:
        """The borrowing client reports that a response was invalid."""
        hosted = self._exchange.envs.get(number)
        if hosted is not None and hosted.lent is not None and hosted.pipe is not None:
            self._exchange.nonsense(hosted.pipe, why)

    async def at_home(self, number: int) -> None:
        """Wait a short time for pipes that their client is about to return: a client that lost its connection repeats
        its request here."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.lent is None:
            return
        try:
            async with asyncio.timeout(_RETURN_TIMEOUT):
                await hosted.returned.wait()
        except TimeoutError:
            raise Conflict(f"environment {number} is in use by a client that holds its pipes",
                           sandbox_id=self._exchange.sandbox_id, hint=IN_USE) from None
