"""Hosts GEM environments inside a sandbox: one process imports `gem` once, and forks one process an environment.

    rocklet ──198──> zygote ──pipe──> child 17: an environment
       │^               ┆ forks
       │└──────199──────┴──────────────┐
       └──200 to 215─────────────> child 1 to 16: as many have a pipe of their own, which saves a hop

GEM seeds the global random state, so two environments in one process would disturb each other; importing it takes
seconds, so a process an environment can only be forked from one that has it.

Messages are JSON, cut into pieces of at most 4096 bytes, which the kernel writes to a pipe whole: so any number of
processes share the answering pipe without a lock. A piece is

    length of the payload (2 bytes) | flags (1: 1 the first, 2 the last of its message) | stream (4) | payload

in network byte order. Stream 0 is the zygote, stream n the environment of that number, which the rocklet chooses.

    -> 0  {"id", "op": "hello", "token"}                   <- 0  {"hello": token, "id", "ok": {n: [env id, pipe]}}
    -> 0  {"id", "op": "make", "env", "env_id", "kwargs",
           "pipe": its descriptor, or null}                <- n  {"id", "ok": n}
    -> n  {"id", "op": "reset", "seed"}                    <- n  {"id", "ok": [observation, info]}
    -> n  {"id", "op": "step", "action"}                   <- n  {"id", "ok": what GEM's step returns}
    -> n  {"id", "op": "close"}                            <- n  {"id", "ok": null}
    -> 0  {"id", "op": "kill", "env"}                      <- 0  {"id", "ok": whether there was one}
                                                           <- 0  {"ended": n, "status": as of wait, "stderr"}

Instead of "ok" there may be "error": {"kind", "type", "message", "traceback"}, kind being "unknown" (no such id),
"import", "environment" (it raised; it stays usable), "gone", "refused" (no process can be started) or "transport" (a
value that JSON cannot hold).

Runs as `python -c SOURCE FOLDER_OF_PACKAGES`: standard library and gem only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import select
import signal
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

REQUESTS, ANSWERS = 198, 199
PIPES = range(200, 216)
FIRST, LAST = 1, 2
HEADER = struct.Struct(">HBI")
PIECE = 4096 - HEADER.size  # PIPE_BUF: what a pipe takes whole
_READ = 1 << 16
_STDERR_KEPT = 8192
_TRACEBACK_KEPT = 8000
_REPR_KEPT = 2000
_PR_SET_PDEATHSIG = 1


def pieces(stream: int, payload: bytes) -> Iterator[bytes]:
    """A message cut into pieces."""
    starts = range(0, len(payload), PIECE) or range(1)
    for start in starts:
        part = payload[start : start + PIECE]
        flags = (FIRST if start == 0 else 0) | (LAST if start + PIECE >= len(payload) else 0)
        yield HEADER.pack(len(part), flags, stream) + part


class Joiner:
    """Makes messages of pieces again. A message whose beginning was lost is left out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._parts: dict[int, list[bytes]] = {}

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(stream, message) of all that is complete now."""
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= HEADER.size:
                length, flags, stream = HEADER.unpack_from(self._buffer, position)
                end = position + HEADER.size + length
                if end > len(self._buffer):
                    break
                part = bytes(self._buffer[position + HEADER.size : end])
                position = end
                if flags & FIRST:
                    self._parts[stream] = []
                elif stream not in self._parts:
                    continue
                self._parts[stream].append(part)
                if flags & LAST:
                    yield stream, b"".join(self._parts.pop(stream))
        finally:
            del self._buffer[:position]

    def forget(self, stream: int) -> None:
        """Leave out what came of a stream that will not be completed."""
        self._parts.pop(stream, None)


def answer(stream: int, message: dict[str, Any]) -> None:
    """Write a message to the rocklet; waits while the pipe is full."""
    for piece in pieces(stream, json.dumps(message).encode()):
        os.write(ANSWERS, piece)


def failure(error: BaseException, kind: str) -> dict[str, Any]:
    """An exception as it travels."""
    return {"kind": kind, "type": type(error).__name__, "message": str(error)[:_TRACEBACK_KEPT],
            "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_KEPT:]}


# ---- an environment's own process


class Unsendable(TypeError):
    """A value that JSON cannot hold."""


def plain(value: object) -> object:
    """What a value that JSON does not know travels as: numpy's numbers and arrays, sets."""
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    raise Unsendable(f"a value of type {type(value).__name__} cannot be sent as JSON")


def described(value: object) -> object:
    """As `plain`, and anything else by its type and repr: so an odd value in an info does not cost the whole step."""
    try:
        return plain(value)
    except Unsendable:
        return {"$type": f"{type(value).__module__}.{type(value).__qualname__}", "$repr": repr(value)[:_REPR_KEPT]}


def sendable(value: object, default: Callable[[object], object]) -> object:
    """The value with everything in it that JSON holds, checked."""
    if type(value) is str:
        return value
    try:
        return json.loads(json.dumps(value, default=default))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value) and default is described:
            return sendable({str(key): item for key, item in value.items()}, default)
        raise Unsendable(str(error)) from None


class Player:
    """One environment, in a process of its own."""

    def __init__(self, number: int, requests: int) -> None:
        self._number = number
        self._requests = requests
        self._env: Any = None

    def run(self, first: dict[str, Any]) -> None:
        """Make the environment and serve it until it is closed."""
        self._serve(first)
        joiner = Joiner()
        while self._env is not None:
            data = os.read(self._requests, _READ)
            if not data:
                return  # the zygote is gone
            for stream, payload in joiner.feed(data):
                if stream == self._number:  # else it was meant for one that had this pipe before, and died
                    self._serve(json.loads(payload))

    def _serve(self, request: dict[str, Any]) -> None:
        try:
            result: dict[str, Any] = {"ok": getattr(self, f"_{request['op']}")(request)}
        except Unsendable as error:
            result = {"error": failure(error, "transport")}
        except BaseException as error:
            missing = isinstance(error, ImportError) and request["op"] == "make"
            result = {"error": failure(error, "import" if missing else "environment")}
        answer(self._number, {"id": request["id"], **result})

    def _make(self, request: dict[str, Any]) -> int:
        import gem

        random.seed()  # every child inherits the same state
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        self._env = gem.make(request["env_id"], **request["kwargs"])
        return self._number

    def _reset(self, request: dict[str, Any]) -> list[object]:
        observation, info = self._env.reset(seed=request["seed"])
        return [sendable(observation, plain), sendable(info, described)]

    def _step(self, request: dict[str, Any]) -> list[object]:
        observation, reward, terminated, truncated, info = self._env.step(request["action"])
        return [sendable(observation, plain), float(reward), bool(terminated), bool(truncated),
                sendable(info, described)]

    def _close(self, request: dict[str, Any]) -> None:
        env, self._env = self._env, None
        if hasattr(env, "close"):
            env.close()


# ---- the zygote


class Child:
    """What the zygote knows of an environment's process."""

    def __init__(self, number: int, env_id: str, pipe: int | None, pid: int, requests: int, stderr: int) -> None:
        self.number = number
        self.env_id = env_id
        self.pipe = pipe
        self.pid = pid
        self.requests = requests
        self.stderr = stderr
        self.waiting: deque[bytes] = deque()
        self.tail = b""

    def read_stderr(self) -> bool:
        """Keep the end of what it prints; False at the end of it."""
        try:
            data = os.read(self.stderr, _READ)
        except BlockingIOError:
            return True
        self.tail = (self.tail + data)[-_STDERR_KEPT:]
        return bool(data)

    def send(self) -> bool:
        """Pass on what waits; True when nothing is left."""
        while self.waiting:
            try:
                os.write(self.requests, self.waiting[0])
            except BlockingIOError:
                return False
            except BrokenPipeError:
                self.waiting.clear()
                break
            self.waiting.popleft()
        return True


class Zygote:
    """Reads requests, forks environments, passes requests on, and tells when one ends."""

    def __init__(self, problem: dict[str, Any] | None) -> None:
        self._problem = problem
        self._children: dict[int, Child] = {}
        self._by_stderr: dict[int, Child] = {}
        self._by_requests: dict[int, Child] = {}
        self._poll = select.poll()
        self._joiner = Joiner()
        self._wake, self._wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the rocklet closes its end."""
        self._poll.register(REQUESTS, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd == REQUESTS:
                    data = os.read(REQUESTS, _READ)
                    if not data:
                        self._kill_all()
                        return
                    for stream, payload in self._joiner.feed(data):
                        self._request(stream, payload)
                elif fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, _READ)
                    self._reap()
                elif fd in self._by_stderr:
                    if not self._by_stderr[fd].read_stderr():
                        self._poll.unregister(fd)
                        del self._by_stderr[fd]
                elif fd in self._by_requests:
                    child = self._by_requests[fd]
                    if child.send():
                        self._poll.unregister(fd)
                        del self._by_requests[fd]

    def _request(self, stream: int, payload: bytes) -> None:
        if stream:
            child = self._children.get(stream)
            if child is None:
                gone = {"kind": "gone", "type": "", "message": f"there is no environment {stream}", "traceback": ""}
                answer(stream, {"id": json.loads(payload)["id"], "error": gone})
                return
            child.waiting.extend(pieces(stream, payload))
            if not child.send() and child.requests not in self._by_requests:
                self._by_requests[child.requests] = child
                self._poll.register(child.requests, select.POLLOUT)
            return
        request = json.loads(payload)
        if request["op"] == "hello":
            there = {number: [child.env_id, child.pipe] for number, child in self._children.items()}
            answer(0, {"hello": request["token"], "id": request["id"], "ok": there})
        elif request["op"] == "kill":
            child = self._children.get(request["env"])
            if child is not None:
                _kill(child)
            answer(0, {"id": request["id"], "ok": child is not None})
        elif request["op"] == "make":
            problem = self._problem or _unknown(request["env_id"])
            if problem is not None:
                answer(0, {"id": request["id"], "error": problem})
            else:
                self._fork(request)

    def _fork(self, request: dict[str, Any]) -> None:
        number = request["env"]
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        stderr, their_stderr = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError as error:
            for fd in (theirs, ours, stderr, their_stderr):
                os.close(fd)
            answer(0, {"id": request["id"], "error": failure(error, "refused")})
            return
        if pid == 0:
            self._become(number, request, theirs, their_stderr)  # and never comes back
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does it too; whoever is first
        os.close(theirs)
        os.close(their_stderr)
        os.set_blocking(ours, False)
        os.set_blocking(stderr, False)
        child = Child(number, request["env_id"], request["pipe"], pid, ours, stderr)
        self._children[number] = self._by_stderr[stderr] = child
        self._poll.register(stderr, select.POLLIN)

    def _become(self, number: int, request: dict[str, Any], requests: int, stderr: int) -> NoReturn:
        """In the child: let go of what is the zygote's, and be an environment."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            os.dup2(stderr, 1)  # what an environment prints must not get into the protocol
            os.dup2(stderr, 2)
            for child in self._children.values():
                os.close(child.requests)
                os.close(child.stderr)
            pipe = request["pipe"]
            for fd in (REQUESTS, self._wake, self._wake_end, *PIPES):
                if fd != pipe:
                    os.close(fd)
            _die_with_parent()
            Player(number, requests if pipe is None else pipe).run(request)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        by_pid = {child.pid: child for child in self._children.values()}
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            child = by_pid.get(found.si_pid)
            if child is not None:
                _kill(child)  # what it started and left behind; before its number can be used again
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                self._ended(child, status)

    def _ended(self, child: Child, status: int) -> None:
        del self._children[child.number]
        for known, fd in ((self._by_stderr, child.stderr), (self._by_requests, child.requests)):
            if known.pop(fd, None):
                self._poll.unregister(fd)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(child.stderr, _READ):
                child.tail = (child.tail + data)[-_STDERR_KEPT:]
        os.close(child.stderr)
        os.close(child.requests)
        if child.pipe is not None:
            _drain(child.pipe)
        answer(0, {"ended": child.number, "status": status, "stderr": child.tail.decode(errors="replace")})

    def _kill_all(self) -> None:
        for child in self._children.values():
            _kill(child)


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """A pipe of its own does not end with the zygote, so its end has to be told otherwise."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _drain(fd: int) -> None:
    """Throw away what an environment left unread, before another gets its pipe."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while any(events & select.POLLIN for _, events in poll.poll(0)):
        if not os.read(fd, _READ):
            return


def _unknown(env_id: str) -> dict[str, Any] | None:
    """The problem with an id that GEM does not know, with the nearest that it does."""
    import difflib

    from gem.envs.registration import ENV_REGISTRY

    if env_id in ENV_REGISTRY:
        return None
    return {"kind": "unknown", "type": "ValueError", "message": f"Environment {env_id} not found in registry.",
            "near": difflib.get_close_matches(env_id, ENV_REGISTRY, 3, 0.6), "traceback": ""}


def _import(folder: str) -> dict[str, Any] | None:
    """Import what all environments share; the problem when that fails."""
    sys.path.insert(0, folder)
    try:
        import gem
        import gem.envs  # registers the environments
    except BaseException as error:
        return failure(error, "import")
    del gem
    return None


def main() -> None:
    """Import, then serve."""
    os.dup2(2, 1)
    problem = _import(sys.argv[1])
    gc.collect()
    gc.freeze()  # children share the pages of what is here now
    Zygote(problem).run()


if __name__ == "__main__":
    main()
