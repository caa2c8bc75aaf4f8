"""Environments in one sandbox: the rocklet's side of guest/envhost.py, which has the protocol.

An `EnvHost` starts one program inside and speaks to it over two pipes, without a thread: a request costs a write, an
answer a read. Requests of one environment follow each other; those of several run side by side, each in its own
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rock.envhub.packages import requirements_of
from rock.errors import ActionError, CommandTimeout, ImageError, Lost, NotFound, QuotaExceeded, RockError, SandboxError
from rock.guest import envhost
from rock.rocklet.envwire import Inlet, Outlet, Tail
from rock.runtime.base import ExitStatus, Handle, Process, Program, Runtime
from rock.runtime.image.packages import CURRENT, PackageSet, ensure
from rock.runtime.image.store import ImageStore

_OPEN_TIMEOUT = 180.0  # importing takes seconds, and more on a busy machine
_ENVIRONMENT = {
    "LANG": "C.UTF-8", "HOME": "/tmp", "MPLCONFIGDIR": "/tmp",
    # Some environments iterate over sets of words: with this a seed gives the same episode in every process
    "PYTHONHASHSEED": "0", "PYTHONPATH": "",
    # Threads do not survive a fork
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMEXPR_NUM_THREADS": "1",
}  # fmt: skip


async def prepare_image(store: ImageStore, image: str, progress: Callable[[str], None] | None = None) -> None:
    """Install what the environments of `image` need, if it is named after a package set and not there yet.

    Takes about a minute the first time. Other images are nobody's business here.
    """
    requirements = requirements_of(image)
    if requirements is not None:
        await asyncio.to_thread(ensure, store, PackageSet(image, requirements), progress)


@dataclass
class _Hosted:
    """An environment inside. `pipe`: its own way for requests, if it has one. `ended`: why it is no longer there."""

    env_id: str
    pipe: int | None = None
    closed: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: ActionError | None = None


class EnvHost:
    """The environments of one sandbox.

    folder: where the packages are inside: a link `python`, and a folder `site`. timeout: seconds for one make, reset or
    step, after which the environment is killed.
    """

    KEY = "rock.envs"

    def __init__(
        self,
        runtime: Runtime,
        handle: Handle,
        *,
        folder: str = CURRENT,
        python: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._runtime = runtime
        self._handle = handle
        self._folder = folder
        self._python = python or f"{folder}/python"
        self._timeout = timeout
        self._envs: dict[int, _Hosted] = {}
        self._free: list[int] = []  # pipes
        self._pending: dict[int, tuple[int, asyncio.Future[Any]]] = {}
        self._next_id = secrets.randbits(40)  # answers to a former rocklet must not look like answers to us
        self._next_env = 1
        self._link: _Link | None = None
        self._failed: RockError | None = None
        self._ending: asyncio.Task[None] | None = None

    # ---- life

    async def open(self) -> None:
        """Start the host inside and wait until it has imported its packages.

        ImageError when the sandbox's image has none; SandboxError, with its last lines, when it does not come up.
        """
        channels: dict[int, Literal["r", "w"]] = dict.fromkeys((envhost.REQUESTS, *envhost.PIPES), "r")
        program = Program(
            [self._python, "-s", "-P", "-B", "-X", "utf8", "-c", _source(), f"{self._folder}/site"],
            env={**_ENVIRONMENT, "NLTK_DATA": f"{self._folder}/nltk_data"}, cwd="/", stdout="null", stderr="pipe",
            channels={**channels, envhost.ANSWERS: "w"}, key=self.KEY, keep=True,
        )  # fmt: skip
        try:
            process = await self._runtime.spawn(self._handle, program)
        except NotFound as error:
            raise ImageError(
                f"this sandbox has no environment packages ({error.message})",
                sandbox_id=self._handle.id,
                hint="rock.make starts a sandbox that has them",
            ) from None
        await self._connect(process)

    async def attach(self) -> None:
        """Find the host and its environments again after a restart of the rocklet; NotFound when there is none."""
        await self._connect(await self._runtime.attach(self._handle, self.KEY))

    async def _connect(self, process: Process) -> None:
        self._link = link = _Link(process, self._answer, self._end)
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                there = await self._request(0, {"op": "hello", "token": link.inlet.token})
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
        for number, (env_id, pipe) in there.items():
            self._envs[int(number)] = _Hosted(env_id, pipe)
        taken = {hosted.pipe for hosted in self._envs.values()}
        self._free = [pipe for pipe in envhost.PIPES if pipe not in taken]
        self._next_env = max((0, *self._envs)) + 1

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

    async def make(self, env_id: str, kwargs: Mapping[str, Any] | None = None) -> int:
        """Make an environment in a process of its own; answers its number, by which it is asked for.

        NotFound for an id that nobody knows, with the nearest; ActionError with the traceback when it cannot be made.
        """
        number = self._next_env
        self._next_env += 1
        hosted = self._envs[number] = _Hosted(env_id, self._free.pop() if self._free else None)
        message = {"op": "make", "env": number, "env_id": env_id, "kwargs": dict(kwargs or {}), "pipe": hosted.pipe}
        try:
            async with hosted.lock:
                await self._ask(number, 0, message)
        except BaseException:
            self._forget(number)
            raise
        return number

    async def reset(self, number: int, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: (observation, info)."""
        observation, info = await self._ordered(number, {"op": "reset", "seed": seed})
        return observation, info

    async def step(self, number: int, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act: (observation, reward, terminated, truncated, info).

        ActionError with the traceback when the environment raised (it stays usable), CommandTimeout when it took too
        long (it was killed), ActionError with its last lines when it is dead, NotFound when it was closed.
        """
        observation, reward, terminated, truncated, info = await self._ordered(number, {"op": "step", "action": action})
        return observation, reward, terminated, truncated, info

    async def close_env(self, number: int) -> None:
        """Close an environment, whatever its state. Idempotent."""
        hosted = self._envs.get(number)
        if hosted is None or hosted.closed:
            return
        try:
            if hosted.ended is None and self._failed is None:
                await self._ordered(number, {"op": "close"})
        except ActionError:
            pass
        finally:
            self._forget(number)

    def _forget(self, number: int) -> None:
        """Nobody asks for it again; its number and pipe are free once its process has ended."""
        hosted = self._envs.get(number)
        if hosted is None:
            return
        hosted.closed = True
        if hosted.ended is not None or self._failed is not None:
            del self._envs[number]
        else:
            self._kill(number)

    def environments(self) -> dict[int, str]:
        """Numbers and ids of the environments that are there."""
        return {number: h.env_id for number, h in self._envs.items() if h.ended is None and not h.closed}

    # ---- requests

    async def _ordered(self, number: int, message: dict[str, Any]) -> Any:
        hosted = self._envs.get(number)
        if hosted is None or hosted.closed:
            raise NotFound(
                f"there is no environment {number} in sandbox {self._handle.id}",
                sandbox_id=self._handle.id,
                hint="it was closed; make a new one",
            )
        async with hosted.lock:
            return await self._ask(number, number, message)

    async def _ask(self, number: int, stream: int, message: dict[str, Any]) -> Any:
        hosted = self._envs[number]
        if hosted.ended is not None:
            raise hosted.ended
        try:
            async with asyncio.timeout(self._timeout):
                return await self._request(stream, message, number, hosted.pipe if stream else None)
        except TimeoutError:
            hosted.ended = CommandTimeout(
                f"environment {hosted.env_id}: {message['op']} took longer than {self._timeout:g} s; it was killed",
                sandbox_id=self._handle.id, hint="make a new one",
            )  # fmt: skip
            self._kill(number)
            raise hosted.ended from None

    async def _request(self, stream: int, message: dict[str, Any], number: int = 0, pipe: int | None = None) -> Any:
        if self._failed is not None or self._link is None:
            raise self._failed or Lost("the host of environments was not started", sandbox_id=self._handle.id)
        self._next_id += 1
        id = self._next_id
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[id] = (number, future)
        try:
            self._link.outlets[pipe or envhost.REQUESTS].send(stream, {"id": id, **message})
            return await future
        finally:
            self._pending.pop(id, None)

    def _kill(self, number: int) -> None:
        if self._link is not None and self._failed is None:
            self._link.outlets[envhost.REQUESTS].send(0, {"op": "kill", "env": number, "id": 0})

    # ---- answers

    def _answer(self, stream: int, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._env_ended(message["ended"], message["status"], message["stderr"])
            return
        number, future = self._pending.get(message["id"], (0, None))
        if "error" in message and not stream and number in self._envs:  # it was refused, and no process started
            refused = self._envs.pop(number)
            self._free += [refused.pipe] if refused.pipe is not None else []
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(self._error(message["error"]))
        else:
            future.set_result(message["ok"])

    def _error(self, error: dict[str, Any]) -> RockError:
        name, text = error["type"], error["message"]
        details = {"type": name, "traceback": error["traceback"]}
        if error["kind"] == "unknown":
            near = ", ".join(error.get("near", ()))
            return NotFound(
                text,
                sandbox_id=self._handle.id,
                hint=f"did you mean {near}?" if near else "`rock env list` shows what there is",
            )
        if error["kind"] == "import":
            return ActionError(
                f"the environment cannot be imported: {name}: {text}",
                sandbox_id=self._handle.id,
                details=details,
                hint="it needs a package that is not installed for it",
            )
        if error["kind"] == "refused":
            return QuotaExceeded(
                f"the sandbox cannot start another process: {text}",
                sandbox_id=self._handle.id,
                hint="close environments, or ask for more pids or memory",
            )
        if error["kind"] == "gone":
            return NotFound(text, sandbox_id=self._handle.id, hint="make a new one")
        return ActionError(f"the environment raised {name}: {text}", sandbox_id=self._handle.id, details=details)

    def _env_ended(self, number: int, status: int, lines: str) -> None:
        if self._link is not None:
            self._link.inlet.forget(number)
        hosted = self._envs.get(number)
        if hosted is None:
            return
        if hosted.pipe is not None:
            self._free.append(hosted.pipe)
            hosted.pipe = None
        code = os.waitstatus_to_exitcode(status)
        how = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"its process exited with status {code}"
        if code == -signal.SIGKILL:
            how += ", as happens when the sandbox is out of memory"
        if hosted.ended is None:
            hosted.ended = ActionError(
                f"environment {hosted.env_id} ended: {how}",
                sandbox_id=self._handle.id,
                hint="make a new one",
                details={"stderr": lines, "exit": code},
            )
        for other, future in list(self._pending.values()):
            if other == number and not future.done():
                future.set_exception(hosted.ended)
        if hosted.closed:
            del self._envs[number]

    def _end(self, nonsense: str | None) -> None:
        """Nothing comes any more, or nothing that makes sense."""
        if nonsense is not None:
            self._fail(
                SandboxError(f"the host of environments speaks nonsense: {nonsense}", sandbox_id=self._handle.id)
            )
        elif self._ending is None and self._link is not None:
            self._ending = asyncio.ensure_future(self._ended(self._link))

    async def _ended(self, link: _Link) -> None:
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
        for _, future in list(self._pending.values()):
            if not future.done():
                future.set_exception(error)

    @property
    def failed(self) -> RockError | None:
        """Why the host is gone; None while it serves. The sandbox may then be given a new one."""
        return self._failed


class _Link:
    """The pipes to the host."""

    def __init__(
        self, process: Process, answered: Callable[[int, dict[str, Any]], None], ended: Callable[[str | None], None]
    ) -> None:
        self.process = process
        self.inlet = Inlet(process.channels[envhost.ANSWERS], answered, ended)
        self.tail = Tail(process.stderr)
        self.outlets = {fd: Outlet(ours) for fd, ours in process.channels.items() if fd != envhost.ANSWERS}

    def stop(self) -> None:
        self.inlet.stop()
        self.tail.stop()
        for outlet in self.outlets.values():
            outlet.drop()


def _described(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"killed by signal {status.signal}" + (" (out of memory?)" if status.signal == signal.SIGKILL else "")
    return "exit status unknown" if status.code is None else f"exit status {status.code}"


@cache
def _source() -> str:
    """The program itself: given on the command line, so nothing has to be put into the image."""
    return Path(envhost.__file__).read_text(encoding="utf-8")
