"""One environment in a process of its own: reads requests as frames from a pipe, and writes responses to a pipe.

A private response pipe takes whole frames of any size. Frames on the shared pipe are split into pieces.

A repeated request with the same index is executed once: its response is retained until the next request. A step whose
index is not the next one of its episode is rejected.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from rock.guest.environments import forking, frames, values
from rock.guest.environments.frames import FORK, HEAD, HELLO, IN_MEMORY, MAKE, NO_INDEX, OK, PLAIN, RESET, STEP
from rock.guest.environments.hosting import BadSource, Hosted, host
from rock.guest.environments.tasks import TaskError
from rock.guest.environments.values import Unsendable

_READ = 1 << 14
_LARGE = 16 << 10  # bytes of a response that uses the shared memory
_MOMENT = 2e-3  # seconds
_SKIPPED, _MOST_SKIPPED = 31, 1023
_TRACEBACK_KEPT = 8000
_VECTOR = 64  # byte strings of one write


class Refused(Exception):
    """A step whose number is not the next one."""


def failure(error: BaseException, kind: str) -> dict[str, Any]:
    """Encode an exception."""
    try:
        text = str(error)
    except Exception as another:
        text = f"<its text raised {type(another).__name__}>"
    return {"kind": kind, "type": type(error).__name__, "message": text[:_TRACEBACK_KEPT],
            "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_KEPT:]}


def write(fd: int, parts: list[Any]) -> None:
    """Write byte strings one after the other; waits while the pipe is full."""
    while parts:
        done = os.writev(fd, parts[:_VECTOR])
        while parts and done >= len(parts[0]):
            done -= len(parts[0])
            del parts[0]
        if done:
            parts[0] = memoryview(parts[0])[done:]


class EnvironmentWorker:
    """An environment and its pipes.

    control: a socket from the zygote; requests: the pipe of its requests, or the same socket. own: its private response
    pipe, or None; shared: the common one. memory: the memory for large responses, if any.
    """

    def __init__(
        self, number: int, control: int, requests: int, own: int | None, shared: int, memory: mmap.mmap | None = None
    ) -> None:
        self._number = number
        self._control = control
        self._requests = requests
        self._own = own
        self._shared = shared
        self._memory = memory
        self._env: Hosted | None = None
        self._closed = False
        self._listen()
        self._processors = os.sched_getaffinity(0)
        self._skip = 0 if len(self._processors) > 1 else sys.maxsize
        self._in_vain = 0  # consecutive unsuccessful waits
        self._expected: int | None = None  # number of the next step; None before the first reset
        self._last: tuple[int, int] | None = None  # op and index of the last executed request
        self._answer: tuple[int, int, list[Any]] = (OK, 0, [])

    def run(self, first: bytes) -> None:
        """Create the environment and serve it until it is closed."""
        self._serve(first)
        while not self._closed and self._env is not None:
            source = self._wait()
            data = os.read(source, _READ)
            if not data:
                return  # the zygote is gone
            for stream, message in self._joiners[source].feed(data):
                if stream == self._number:  # otherwise it was for a dead environment that had this pipe before
                    self._serve(message)
                elif stream == 0 and source == self._control:
                    self._fork(message)

    def _listen(self) -> None:
        sources = {self._requests, self._control}
        self._joiners = {fd: frames.Joiner() for fd in sources}
        self._poll = select.poll()
        for fd in sources:
            self._poll.register(fd, select.POLLIN)

    def _wait(self) -> int:
        """The descriptor with the next request. Spin briefly for it, because a sleeping process takes long to wake up.
        After an unsuccessful spin, skip an increasing number of spins."""
        if self._skip:
            self._skip -= 1
            return self._chosen(self._poll.poll())
        if self._in_vain:
            self._move()
        end = time.perf_counter() + _MOMENT
        while not (ready := self._poll.poll(0)):
            if time.perf_counter() > end:
                self._skip = min(_SKIPPED << self._in_vain, _MOST_SKIPPED)
                self._in_vain = min(self._in_vain + 1, 5)
                return self._chosen(self._poll.poll())
            os.sched_yield()
        self._in_vain = 0
        return self._chosen(ready)

    def _chosen(self, ready: list[tuple[int, int]]) -> int:
        return self._requests if len(ready) > 1 else ready[0][0]

    def _move(self) -> None:
        """Move to another CPU: a writer to a pipe wakes the reader on its own CPU, where client and environment would
        alternate."""
        try:
            with open("/proc/self/stat", "rb") as stat:
                here = int(stat.read().rpartition(b")")[2].split()[36])
            os.sched_setaffinity(0, self._processors - {here})
            os.sched_setaffinity(0, self._processors)
        except (OSError, ValueError, IndexError):
            pass

    def _serve(self, message: bytes) -> None:
        op, flags, _, id, index, payload = frames.unpack(message)
        if op == HELLO:
            self._send(OK, 0, id, index, [payload])
            return
        if (op, index) != self._last or index == NO_INDEX:
            self._do(op, flags, index, payload)
        answered, answered_flags, parts = self._answer
        if flags & IN_MEMORY and self._memory is not None:
            length = sum(map(len, parts))
            if _LARGE <= length <= len(self._memory):
                answered_flags, parts = answered_flags | IN_MEMORY, [self._put(self._memory, length, parts)]
        self._send(answered, answered_flags, id, index, list(parts))

    def _put(self, memory: mmap.mmap, length: int, parts: list[Any]) -> bytes:
        memory.seek(0)
        for part in parts:
            memory.write(part)
        return length.to_bytes(8, "big")

    def _do(self, op: int, flags: int, index: int, payload: bytes) -> None:
        """Execute the request, and retain the response."""
        plain = bool(flags & PLAIN)
        try:
            if op == STEP:
                self._count(index)
            self._last = (op, index)
            self._answer = OK, flags & PLAIN, getattr(self, f"_{frames.NAMES[op]}")(payload, plain)
            if op == RESET:
                self._expected = 0
        except Refused as error:
            self._error(error, "refused_step")  # the earlier response remains available
        except Unsendable as error:
            self._error(error, "transport")
        except TaskError as error:
            self._error(error, "task", code=error.code)
        except BaseException as error:
            self._error(error, _kind(error, op))

    def _count(self, index: int) -> None:
        expected = self._expected
        if index != NO_INDEX and expected is not None and index != expected:
            raise Refused(f"step {index} was asked for, and step {expected} is the next one")
        self._expected = (index if index != NO_INDEX else expected or 0) + 1

    def _error(self, error: BaseException, kind: str, **more: str) -> None:
        told = {**failure(error, kind), "next": self._expected, **more}
        answer = frames.ERROR, PLAIN, [json.dumps(told).encode()]
        if kind == "refused_step":
            self._last = None
        self._answer = answer

    def _send(self, op: int, flags: int, id: int, index: int, parts: list[Any]) -> None:
        length = sum(len(part) for part in parts)
        head = HEAD.pack(length, op, flags, self._number, id, index)
        if self._own is not None:
            if length < 4096:
                os.write(self._own, b"".join((head, *parts)))
            else:
                write(self._own, [head, *parts])
            return
        for piece in self._pieces(head + b"".join(bytes(part) for part in parts)):
            os.write(self._shared, piece)

    def _pieces(self, message: bytes) -> Iterator[bytes]:
        return frames.pieces(self._number, message)

    # ---- forks ----

    def _fork(self, message: bytes) -> None:
        """Fork this process: each child goes on from here as another environment."""
        op, _, _, _, _, payload = frames.unpack(message)
        asked = json.loads(payload)
        if op != FORK or (children := forking.receive(self._control, asked["count"])) is None:
            self._closed = True  # the zygote is gone
            return
        own = {self._control, self._requests, self._shared, *(fd for child in children for fd in child.fds)}
        own |= set() if self._own is None else {self._own}
        layers = [] if self._env is None else self._env.layers()
        try:
            forking.check(layers, own)
            child = forking.fork(children, lambda child, error: child.tell(failure(error, "refused")))
        except Exception as error:
            for one in children:
                one.tell(failure(error, "unforkable"))
            child = None
        if child is not None:
            self._become(child, own)
            self._begin_as(child, layers if asked["reseed"] else None, own)
            return
        for one in children:
            one.close()

    def _become(self, child: forking.ChildPipes, own: set[int]) -> None:
        """In a child: release what belongs to the parent, and serve the child's pipes."""
        self._number = child.number
        for fd in own - {self._shared, *child.fds}:
            with contextlib.suppress(OSError):  # of another child, and closed already
                os.close(fd)
        os.close(child.stderr)  # a copy is the standard error
        self._control, self._requests, self._own = child.control, child.requests, child.answers
        if self._memory is not None:
            self._memory.close()
        self._memory = child.part()
        self._last = None
        self._listen()

    def _begin_as(self, child: forking.ChildPipes, reseeded: list[Any] | None, own: set[int]) -> None:
        try:
            forking.reopen({self._control, self._requests, self._shared, *child.fds})
            if reseeded is not None:
                forking.reseed(reseeded)
        except Exception as error:
            child.tell(failure(error, "unforkable"))
            self._closed = True
            return
        child.tell({})
        forking.wait_for_adoption(child)

    # ---- operations ----

    def _make(self, payload: bytes, plain: bool) -> list[Any]:
        random.seed()  # every child inherits the same state
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        self._env = host(json.loads(payload))
        return [b"%d" % self._number]

    def _reset(self, payload: bytes, plain: bool) -> list[Any]:
        assert self._env is not None
        observation, info = self._env.reset(**_decoded(payload, plain))
        if plain:
            return [_json([_plain(observation, False), _plain(info, True)])]
        return values.encode_result([observation], info)

    def _step(self, payload: bytes, plain: bool) -> list[Any]:
        assert self._env is not None
        observation, reward, terminated, truncated, info = self._env.step(_decoded(payload, plain))
        if not self._env.vector:
            reward = reward if type(reward) in (float, int) and not plain else _number(reward)
            terminated, truncated = bool(terminated), bool(truncated)
        if plain:
            strict = [_plain(value, False) for value in (observation, reward, terminated, truncated)]
            return [_json([*strict, _plain(info, True)])]
        return values.encode_result([observation, reward, terminated, truncated], info)

    def _call(self, payload: bytes, plain: bool) -> list[Any]:
        assert self._env is not None
        what, *arguments = _decoded(payload, plain)
        result = self._env.call(what, arguments)
        return [_json(_plain(result, True))] if plain else values.encode(result, describe=True)

    def _close(self, payload: bytes, plain: bool) -> list[Any]:
        self._closed = True
        env, self._env = self._env, None
        if env is not None:
            env.close()
        return [b"null"] if plain else values.encode(None)


def _number(reward: Any) -> float:
    """A reward as a float; numpy floats retain their width."""
    return reward if type(reward).__module__ == "numpy" and getattr(reward, "shape", None) == () else float(reward)


def _kind(error: BaseException, op: int) -> str:
    if isinstance(error, BadSource):
        return "source"
    if isinstance(error, ImportError) and op == MAKE:
        return "import"
    return "unknown_env" if _is_unknown(error) else "environment"


def _is_unknown(error: BaseException) -> bool:
    return type(error).__name__ in ("NameNotFound", "NamespaceNotFound", "VersionNotFound", "DeprecatedEnv")


def _decoded(payload: bytes, plain: bool) -> Any:
    return json.loads(payload) if plain else values.decode(payload)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# ---- values as plain JSON, for clients without the binary encoding ----


def _simple(value: object) -> object:
    """Convert values that JSON lacks: numpy scalars and arrays, sets."""
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    raise Unsendable(f"a value of type {type(value).__name__} cannot be sent as JSON")


def _described(value: object) -> object:
    """As `_simple`, and other values as type and repr: an unsupported value in an info must not fail the step."""
    try:
        return _simple(value)
    except Unsendable:
        return values.described(value)


def _plain(value: object, describe: bool) -> object:
    """The value converted to plain JSON, validated."""
    if type(value) is str:
        return value
    try:
        return json.loads(json.dumps(value, default=_described if describe else _simple))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value) and describe:
            return _plain({str(key): item for key, item in value.items()}, describe)
        raise Unsendable(str(error)) from None
