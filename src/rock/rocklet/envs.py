"""Environments in one sandbox: the rocklet's side of guest/envhost.py, which has the protocol.

An `EnvHost` starts one program inside and speaks to it over pipes, without a thread: a request costs a write, an answer
a read. Requests of one environment follow each other; those of several run side by side, each in its own process. What
environments are asked and answer is passed on unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rock.errors import (
    CommandTimeout,
    Conflict,
    EnvironmentEnded,
    ImageError,
    InvalidConfig,
    Lost,
    NotFound,
    RockError,
    SandboxError,
)
from rock.guest import envhost, frames
from rock.guest.frames import CALL, CLOSE, ENDED, ERROR, HEAD, HELLO, KILL, MAKE, NO_INDEX, PLAIN, RESET, STEP, Frame
from rock.protocol.enverrors import error_of
from rock.rocklet.envcalls import Answered, Batch, Call, Hosted, Lent
from rock.rocklet.envnames import Names
from rock.rocklet.envprogram import Link, program
from rock.runtime.base import ExitStatus, Handle, Process, Runtime
from rock.runtime.image.packages import CURRENT

_CLOSE_TIMEOUT = 10.0  # for what an environment does at its end; then it is killed
_RETURN_TIMEOUT = 2.0
_OPEN_TIMEOUT = 180.0  # importing takes seconds, and more on a busy machine


class EnvHost:
    """The environments of one sandbox.

    folder: where the packages are inside: a link `python`, and a folder `site`; None for an image whose own Python has
    them. timeout: seconds for one make, reset or step, after which the environment is killed. adapter: of the training
    set that it hosts, for guest/tasks.py.
    """

    KEY = "rock.envs"

    def __init__(
        self,
        runtime: Runtime,
        handle: Handle,
        *,
        folder: str | None = CURRENT,
        python: str | None = None,
        timeout: float = 600.0,
        adapter: str = "",
    ) -> None:
        self._runtime = runtime
        self._handle = handle
        self._folder = folder
        self._pythons = [python] if python else ["python3", "python"] if folder is None else [f"{folder}/python"]
        self._timeout = timeout
        self._adapter = adapter
        self._names = Names(handle.id, self._forget)
        self._envs: dict[int, Hosted] = {}
        self._free: list[int] = []  # pipes
        self._calls: dict[int, Call] = {}
        self._next_id = secrets.randbits(40)  # answers to a former rocklet must not look like answers to us
        self._next_env = 1
        self._link: Link | None = None
        self._failed: RockError | None = None
        self._ending: asyncio.Task[None] | None = None

    # ---- life

    async def open(self) -> None:
        """Start the host inside and wait until it has imported its packages.

        ImageError when the sandbox's image has none; SandboxError, with its last lines, when it does not come up.
        """
        await self._connect(await self._start())

    async def _start(self) -> Process:
        told = ""
        for python in self._pythons:
            try:
                host = program(self._folder, python, self.KEY, self._adapter)
                return await self._runtime.spawn(self._handle, host)
            except NotFound as error:
                told = error.message
        if self._folder is None:
            raise ImageError(f"the image has no Python to host environments with ({told})", sandbox_id=self._handle.id,
                             hint="use an image with python3 in its PATH, and gymnasium")  # fmt: skip
        raise ImageError(f"this sandbox has no environment packages ({told})", sandbox_id=self._handle.id,
                         hint="rock.make starts a sandbox that has them")  # fmt: skip

    async def attach(self) -> None:
        """Find the host and its environments again after a restart of the rocklet; NotFound when there is none."""
        await self._connect(await self._runtime.attach(self._handle, self.KEY))

    async def _connect(self, process: Process) -> None:
        self._link = link = Link(process, self._answer, self._end, self._nonsense)
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                answers = await self._zygote(HELLO, link.inlet.token.encode())
        except TimeoutError:
            await self.close()
            raise SandboxError(
                f"the host of environments did not start in {_OPEN_TIMEOUT:.0f} s",
                sandbox_id=self._handle.id,
                details={"stderr": link.tail.text},
            ) from None
        except BaseException:
            await self.close()
            raise
        for number, (env_id, pipe, *known) in answers["there"].items():
            hosted = self._envs[int(number)] = Hosted(env_id, pipe)
            if known:  # a host of an older release knows no names
                self._names.add(int(number), known[0])
                self._names.watch(int(number), hosted, known[1])
            if pipe is not None:
                self._greet(int(number), pipe)
        taken = {hosted.pipe for hosted in self._envs.values()}
        self._free = [pipe for pipe in envhost.PIPES if pipe not in taken]
        self._next_env = max((0, *self._envs)) + 1

    def _greet(self, number: int, pipe: int) -> None:
        """Somebody else may have read half of an answer: the next one begins after what answers this."""
        assert self._link is not None
        token = secrets.token_bytes(16)
        self._link.own[pipe + envhost.OWN].seek(token)
        self._link.outlets[pipe].send(number, _frame(HELLO, number, 0, NO_INDEX, token))

    async def _zygote(self, op: int, payload: bytes) -> Any:
        batch = Batch(1)
        self._send(batch, 0, op, 0, 0, 0, NO_INDEX, payload)
        return _plain_of((await batch.future)[0])

    async def detach(self) -> None:
        """Let go of it and leave it running, for `attach` by the next rocklet."""
        self._let_go(Lost("the rocklet is stopping", sandbox_id=self._handle.id))

    async def close(self) -> None:
        """Kill the host and all its environments. Idempotent; the sandbox may be gone already."""
        if self._link is not None:
            with contextlib.suppress(RockError):
                await self._link.process.kill_tree()
        self._let_go(NotFound("the environments of this sandbox were closed", sandbox_id=self._handle.id))

    def _let_go(self, why: RockError) -> None:
        self._fail(why)
        if self._ending is not None:
            self._ending.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.stop()
            link.process.close()

    # ---- environments

    async def make(
        self, env_id: str, kwargs: Mapping[str, Any] | None = None, *, timeout: float | None = None, **more: Any
    ) -> int:
        """Make an environment in a process of its own; answers its number, by which it is asked for.

        timeout: seconds for each thing that it is asked from then on, instead of the host's. more: "protocol" and what
        guest/hosting.py makes of it; "name", by which `number_of` finds it; "idle", seconds after which it is closed
        when nobody asks it for anything. NotFound for an id that nobody knows, with the nearest; ActionError with the
        traceback when it cannot be made.
        """
        number = self._next_env
        self._next_env += 1
        self._names.add(number, more.get("name"))
        hosted = self._envs[number] = Hosted(env_id, self._free.pop() if self._free else None)
        wish = {"env_id": env_id, "kwargs": dict(kwargs or {}), "pipe": hosted.pipe, **more}
        batch = Batch(1)
        try:
            self._send(batch, 0, MAKE, PLAIN, number, 0, NO_INDEX, _json(wish))
            _plain_of((await batch.future)[0])
        except BaseException:
            self._forget(number)
            raise
        hosted.timeout = timeout
        if hosted.timer is not None:  # that was for making it
            hosted.timer.cancel()
            hosted.timer = None
        self._names.watch(number, hosted, more.get("idle"))
        return number

    async def reset(
        self, number: int, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: (observation, info), as JSON has them."""
        wish = {"seed": seed} if options is None else {"seed": seed, "options": options}
        observation, info = await self._plain(RESET, number, wish)
        return observation, info

    async def step(
        self, number: int, action: Any, index: int | None = None
    ) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act: (observation, reward, terminated, truncated, info), as JSON has them.

        index: number of the step in the episode: the same one again gets the same answer, and another one than the
        next is a Conflict. EnvironmentRaised with the traceback when the environment raised (it stays usable),
        CommandTimeout when it took too long (it was killed), EnvironmentEnded with its last lines when it is dead,
        NotFound when it was closed.
        """
        index = NO_INDEX if index is None else index
        observation, reward, terminated, truncated, info = await self._plain(STEP, number, action, index)
        return observation, reward, terminated, truncated, info

    async def call(self, number: int, what: str, arguments: Sequence[Any]) -> Any:
        """Ask it for something else; what there is to ask for, its kind says."""
        return await self._plain(CALL, number, [what, *arguments])

    def number_of(self, name: str) -> int:
        """The number of the environment that was made with that name; NotFound."""
        return self._names.number_of(name)

    async def close_env(self, number: int) -> None:
        """Close an environment, whatever its state. Idempotent."""
        hosted = self._envs.get(number)
        if hosted is None or hosted.closed:
            return
        try:
            if hosted.lent is not None:
                hosted.lent(NotFound(f"environment {number} was closed", sandbox_id=self._handle.id))
                self.take_back(number)
            if hosted.ended is None and self._failed is None:
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await self._plain(CLOSE, number, None)
        except (RockError, TimeoutError):
            pass
        finally:
            self._forget(number)

    async def exchange(self, asked: Sequence[Frame]) -> list[Answered]:
        """What environments answer to these frames, in their order; each may be an error of its own.

        Those of several environments run side by side, those to one after each other. An answer is a whole frame,
        with the id of what was asked.
        """
        for _, _, number, *_ in asked:
            await self._at_home(number)
        batch = Batch(len(asked))
        for place, (op, flags, number, id, index, payload) in enumerate(asked):
            try:
                if op not in (RESET, STEP, CALL):
                    raise InvalidConfig(f"a frame with op {op} is none of reset, step and call")
                self._send(batch, place, op, flags, number, id, index, payload)
            except RockError as error:
                batch.put(place, error)
        return await batch.future

    def _forget(self, number: int) -> None:
        """Nobody asks for it again; its number and pipe are free once its process has ended."""
        hosted = self._envs.get(number)
        if hosted is None:
            return
        hosted.closed = True
        self._names.drop(number)
        if self._failed is not None:
            del self._envs[number]
        elif hosted.dead and hosted.lent is None:
            self._release(number, hosted)
        elif hosted.ended is None:  # else it was killed already
            self._kill(number)

    def environments(self) -> dict[int, str]:
        """Numbers and ids of the environments that are there."""
        return {number: h.env_id for number, h in self._envs.items() if h.ended is None and not h.closed}

    # ---- pipes that a client has (envdoor.py)

    def token_of(self, number: int) -> str | None:
        """What its pipes are given for; None when it has none of its own."""
        hosted = self._envs.get(number)
        if hosted is None or hosted.pipe is None:
            return None
        hosted.token = hosted.token or secrets.token_urlsafe(24)
        return hosted.token

    def is_token(self, number: int, token: str) -> bool:
        hosted = self._envs.get(number)
        if hosted is None or not hosted.token:
            return False
        return secrets.compare_digest(hosted.token.encode(), token.encode(errors="replace"))

    def lend(self, number: int, lost: Callable[[RockError], None]) -> Lent:
        """The pipes of an environment that is nobody's; `lost` is called when it ends or is taken back. Raises its end,
        Conflict."""
        hosted = self._envs[number]
        if hosted.ended is not None:
            raise hosted.ended
        if self._failed is not None or self._link is None or hosted.pipe is None or hosted.closed:
            raise self._failed or NotFound(f"there is no environment {number}", sandbox_id=self._handle.id)
        if hosted.lent is not None or hosted.asked:
            raise Conflict(f"environment {number} is being played", sandbox_id=self._handle.id)
        own = hosted.pipe + envhost.OWN
        self._link.own[own].stop()
        hosted.lent = lost
        hosted.returned.clear()
        channels = self._link.process.channels
        memory = self._link.memory
        part = None if memory is None else (memory, (hosted.pipe - envhost.PIPES.start) * frames.PART)
        return Lent(channels[hosted.pipe], channels[own], part, self._limit(hosted))

    def take_back(self, number: int) -> None:
        """The client has let go of the pipes, or has to. Idempotent."""
        hosted = self._envs.get(number)
        if hosted is None or hosted.lent is None:
            return
        hosted.lent = None
        hosted.returned.set()
        if self._link is None or hosted.pipe is None:
            return
        own = self._link.own[hosted.pipe + envhost.OWN]
        own.start()
        if hosted.dead:
            own.drain()
            self._release(number, hosted)
        elif hosted.ended is None:
            self._greet(number, hosted.pipe)

    def overdue(self, number: int, what: str) -> None:
        """The client that has the pipes found that something took too long."""
        hosted = self._envs.get(number)
        if hosted is not None and hosted.lent is not None:
            self._took_too_long(number, hosted, what)

    def nonsense(self, number: int, why: str) -> None:
        """The client that has the pipes could not make sense of an answer."""
        hosted = self._envs.get(number)
        if hosted is not None and hosted.lent is not None and hosted.pipe is not None:
            self._nonsense(hosted.pipe, why)

    async def _at_home(self, number: int) -> None:
        """Wait a little for pipes that their client is about to give back: it asks here next when it lost its way."""
        hosted = self._envs.get(number)
        if hosted is None or hosted.lent is None:
            return
        try:
            async with asyncio.timeout(_RETURN_TIMEOUT):
                await hosted.returned.wait()
        except TimeoutError:
            raise Conflict(f"environment {number} is being played by a client that has its pipes",
                           sandbox_id=self._handle.id) from None  # fmt: skip

    # ---- requests

    async def _plain(self, op: int, number: int, value: Any, index: int = NO_INDEX) -> Any:
        await self._at_home(number)
        batch = Batch(1)
        self._send(batch, 0, op, PLAIN, number, 0, index, _json(value))
        return _plain_of((await batch.future)[0])

    def _send(
        self, batch: Batch, place: int, op: int, flags: int, number: int, asker: int, index: int, payload: Any
    ) -> None:
        """Write a request; its answer comes to the batch. Raises what is known without asking."""
        pipe = None
        hosted = self._envs.get(number) if number else None
        if number:
            if hosted is None or hosted.closed:
                raise NotFound(
                    f"there is no environment {number} in sandbox {self._handle.id}",
                    sandbox_id=self._handle.id,
                    hint=self._names.why_gone(number),
                )
            if hosted.ended is not None:
                raise hosted.ended
        if self._failed is not None or self._link is None:
            raise self._failed or Lost("the host of environments was not started", sandbox_id=self._handle.id)
        self._next_id += 1
        id = self._next_id
        self._calls[id] = Call(batch, place, number, op, asker)
        if hosted is not None:
            pipe = None if op == MAKE else hosted.pipe
            loop = asyncio.get_running_loop()
            if not hosted.asked:
                hosted.since = loop.time()
            hosted.asked.append(id)
            if hosted.timer is None:
                hosted.timer = loop.call_at(hosted.since + self._limit(hosted), self._overdue, number)
        stream = 0 if op == MAKE else number
        message = HEAD.pack(len(payload), op, flags, number, id, index) + payload
        self._link.outlets[pipe or envhost.REQUESTS].send(stream, message)

    def _limit(self, hosted: Hosted) -> float:
        return self._timeout if hosted.timeout is None else hosted.timeout

    def _overdue(self, number: int) -> None:
        """The time of what was asked first is over, or would be if it were still that."""
        hosted = self._envs.get(number)
        if hosted is None:
            return
        hosted.timer = None
        if not hosted.asked:
            return
        loop = asyncio.get_running_loop()
        limit = self._limit(hosted)
        if hosted.since + limit > loop.time():
            hosted.timer = loop.call_at(hosted.since + limit, self._overdue, number)
            return
        self._took_too_long(number, hosted, frames.NAMES.get(self._calls[hosted.asked[0]].op, "call"))

    def _took_too_long(self, number: int, hosted: Hosted, what: str) -> None:
        self._env_failed(hosted, CommandTimeout(
            f"environment {hosted.env_id}: {what} took longer than {self._limit(hosted):g} s; it was killed",
            sandbox_id=self._handle.id, hint="make a new one",
        ))  # fmt: skip
        self._kill(number)

    def _env_failed(self, hosted: Hosted, why: RockError) -> None:
        """An environment is of no use any more: everything that it was asked fails."""
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
        if self._link is not None and self._failed is None:
            self._link.outlets[envhost.REQUESTS].send(0, _frame(KILL, number, 0, NO_INDEX, b""))

    # ---- answers

    def _answer(self, frame: bytes | bytearray, pipe: int | None = None) -> None:
        """A frame came: on the pipe that all share, or on the one of the environment that has `pipe`."""
        length, op, flags, number, id, index = HEAD.unpack_from(frame)
        if length != len(frame) - HEAD.size:
            raise ValueError("a frame of another length than it says")
        if op == ENDED:
            told = json.loads(frame[HEAD.size :])
            self._env_ended(number, int(told["status"]), str(told["stderr"]))
            return
        call = self._calls.get(id)
        if call is None or call.number != number:
            return  # an answer to a former rocklet, or to what was given up
        hosted = self._envs.get(number)
        if pipe is not None and (hosted is None or hosted.pipe != pipe):
            raise ValueError("an answer in another environment's name")
        del self._calls[id]
        if hosted is not None and hosted.asked:
            hosted.asked.remove(id)
            hosted.since = asyncio.get_running_loop().time()
        if op == ERROR:
            error, started = error_of(json.loads(frame[HEAD.size :]), self._handle.id)
            if not started and number in self._envs:
                refused = self._envs.pop(number)
                self._names.drop(number)
                self._free += [refused.pipe] if refused.pipe is not None else []
                if refused.timer is not None:
                    refused.timer.cancel()
            call.batch.put(call.place, error)
            return
        patched = frame if isinstance(frame, bytearray) else bytearray(frame)
        HEAD.pack_into(patched, 0, length, op, flags, number, call.id, index)
        call.batch.put(call.place, patched)

    def _nonsense(self, pipe: int, why: str) -> None:
        """What an environment answers makes no sense: it is of no use any more."""
        for number, hosted in self._envs.items():
            if hosted.pipe == pipe and hosted.ended is None:
                self._env_failed(hosted, EnvironmentEnded(
                    f"environment {hosted.env_id} was killed: what it answers makes no sense ({why})",
                    sandbox_id=self._handle.id, hint="make a new one",
                ))  # fmt: skip
                self._kill(number)

    def _env_ended(self, number: int, status: int, lines: str) -> None:
        hosted = self._envs.get(number)
        if hosted is None or self._link is None:
            return
        self._link.inlet.forget(number)
        hosted.dead = True
        if hosted.pipe is not None and hosted.lent is None:
            self._link.own[hosted.pipe + envhost.OWN].drain()  # its last answers may still be there
        code = os.waitstatus_to_exitcode(status)
        how = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"its process exited with status {code}"
        if code == -signal.SIGKILL:
            how += ", as happens when the sandbox is out of memory"
        last = lines.strip().splitlines()[-1:]
        self._env_failed(hosted, EnvironmentEnded(
            ": ".join([f"environment {hosted.env_id} ended: {how}", *last]),
            sandbox_id=self._handle.id,
            hint="make a new one",
            details={"stderr": lines, "exit": code},
        ))  # fmt: skip
        if hosted.lent is None:
            self._release(number, hosted)

    def _release(self, number: int, hosted: Hosted) -> None:
        """Its process is gone, and nobody has its pipes."""
        if hosted.pipe is not None:
            self._free.append(hosted.pipe)
            hosted.pipe = None
        if hosted.closed:
            self._envs.pop(number, None)

    def _end(self, nonsense: str | None) -> None:
        """Nothing comes any more, or nothing that makes sense."""
        if nonsense is not None:
            self._fail(
                SandboxError(f"the host of environments speaks nonsense: {nonsense}", sandbox_id=self._handle.id)
            )
        elif self._ending is None and self._link is not None:
            self._ending = asyncio.ensure_future(self._ended(self._link))

    async def _ended(self, link: Link) -> None:
        try:
            status = await link.process.wait()
        except RockError as error:
            self._fail(error)
            return
        last = link.tail.text.splitlines()[-1:]
        self._fail(SandboxError(": ".join([f"the host of environments ended: {_described(status)}", *last]),
                                sandbox_id=self._handle.id, details={"stderr": link.tail.text},
                                hint="make the environment again"))  # fmt: skip

    def _fail(self, error: RockError) -> None:
        self._failed = self._failed or error
        self._names.stop()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.batch.put(call.place, error)
        for hosted in self._envs.values():
            hosted.asked.clear()
            if hosted.lent is not None:
                hosted.lent(error)
            if hosted.timer is not None:
                hosted.timer.cancel()
                hosted.timer = None

    @property
    def failed(self) -> RockError | None:
        """Why the host is gone; None while it serves. The sandbox may then be given a new one."""
        return self._failed


def _frame(op: int, number: int, id: int, index: int, payload: bytes) -> bytes:
    return HEAD.pack(len(payload), op, PLAIN, number, id, index) + payload


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"an environment can only be given what JSON holds: {error}") from None


def _plain_of(answered: Answered) -> Any:
    """The value of an answer that is JSON; raises the error that came instead."""
    if isinstance(answered, RockError):
        raise answered
    try:
        return json.loads(memoryview(answered)[HEAD.size :].tobytes())
    except (ValueError, RecursionError) as error:
        raise EnvironmentEnded(f"what the environment answered is no JSON: {error}") from None


def _described(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"killed by signal {status.signal}" + (" (out of memory?)" if status.signal == signal.SIGKILL else "")
    return "exit status unknown" if status.code is None else f"exit status {status.code}"
