"""Hosts environments inside a sandbox: one process imports shared modules once, and forks one process per environment.

    rocklet ──198──> zygote ──pipe──> child 17: an environment
       │^               ┆ forks             │
       │└──────199──────┴───────────────────┘
       │──132 to 159────────────> child 1 to 28: each of these has a pipe of its own for requests, and
       └<─160 to 187───────────── one for responses, on which a large response travels in one piece, and
          197                     a part of this memory for large responses to a client on this machine

GEM seeds the global random state, so two environments in one process would disturb each other. Its import takes
seconds, so each environment is a fork of a process that has imported it.

frames.py defines the protocol, and worker.py executes requests. A message to environment 0 is for the zygote:

    -> HELLO token      <- OK {"hello": token, "there": {n: [env id, pipe, name, idle, owner]}}
    -> MAKE {"env_id", "protocol", "kwargs", "pipe": its descriptor, or null, "name", "idle", "owner"}  <- of n: OK n
    -> KILL             <- ENDED, when the process of that environment is gone

The kind of an error is "unknown" (no such id), "import", "environment" (it raised; it stays usable), "gone", "refused"
(no process can be started), "image" (its Python lacks a requirement), "source" (it defines no environment),
"refused_step" (the index is not the next one) or "transport" (a value that cannot be encoded).

Runs as one program on the command line, which rocklet/environments/pipes.py builds from these files. Its arguments are
the folder of packages and the adapter of a training set, or nothing. It uses the standard library and those packages
only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import select
import signal
import sys
import traceback
import types
from collections import deque
from typing import Any, NoReturn

from rock.guest.environments import frames, tasks
from rock.guest.environments.frames import HEAD, HELLO, KILL, MAKE, NO_INDEX, OK, PLAIN, Joiner, pieces
from rock.guest.environments.worker import EnvironmentWorker, failure

MEMORY, REQUESTS, ANSWERS = 197, 198, 199
PIPES = range(132, 160)
OWN = len(PIPES)  # the environment with the request pipe n writes responses to n + OWN
_READ = 1 << 16
_STDERR_KEPT = 8192
_PR_SET_PDEATHSIG = 1


def answer(env: int, op: int, id: int, message: Any, stream: int = 0) -> None:
    """Write a message of the zygote to the rocklet; waits while the pipe is full."""
    payload = json.dumps(message).encode()
    for piece in pieces(stream, HEAD.pack(len(payload), op, PLAIN, env, id, NO_INDEX) + payload):
        os.write(ANSWERS, piece)


# ---- zygote ----


class Child:
    """The zygote's state of an environment's process."""

    def __init__(self, number: int, request: dict[str, Any], pid: int, requests: int, stderr: int) -> None:
        self.number = number
        self.pipe: int | None = request["pipe"]
        self.known = [request["env_id"], self.pipe, *map(request.get, ("name", "idle", "owner"))]
        self.pid = pid
        self.requests = requests
        self.stderr = stderr
        self.waiting: deque[bytes] = deque()
        self.tail = b""

    def read_stderr(self) -> bool:
        """Retain the end of its standard error; False at end of file."""
        try:
            data = os.read(self.stderr, _READ)
        except BlockingIOError:
            return True
        self.tail = (self.tail + data)[-_STDERR_KEPT:]
        return bool(data)

    def send(self) -> bool:
        """Forward queued data; True when the queue is empty."""
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
    """Reads requests, forks environments, forwards requests to them, and reports when one ends."""

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

    def _request(self, stream: int, message: bytes) -> None:
        op, _, env, id, _, payload = frames.unpack(message)
        if stream:
            child = self._children.get(stream)
            if child is None:
                gone = {"kind": "gone", "type": "", "message": f"there is no environment {stream}", "traceback": ""}
                answer(stream, frames.ERROR, id, gone)
                return
            child.waiting.extend(pieces(stream, message))
            if not child.send() and child.requests not in self._by_requests:
                self._by_requests[child.requests] = child
                self._poll.register(child.requests, select.POLLOUT)
        elif op == HELLO:
            there = {number: child.known for number, child in self._children.items()}
            answer(0, OK, id, {"hello": payload.decode(), "there": there})
        elif op == KILL:
            child = self._children.get(env)
            if child is not None:
                _kill(child)
        elif op == MAKE:
            request = json.loads(payload)
            problem = self._problem or _unknown(request)
            if problem is not None:
                answer(env, frames.ERROR, id, problem)
            else:
                self._fork(env, id, request, message)

    def _fork(self, number: int, id: int, request: dict[str, Any], message: bytes) -> None:
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        stderr, their_stderr = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError as error:
            for fd in (theirs, ours, stderr, their_stderr):
                os.close(fd)
            answer(number, frames.ERROR, id, failure(error, "refused"))
            return
        if pid == 0:
            self._become(number, request["pipe"], message, theirs, their_stderr)  # never returns
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # parent and child both call it, because their order is undefined
        os.close(theirs)
        os.close(their_stderr)
        os.set_blocking(ours, False)
        os.set_blocking(stderr, False)
        child = Child(number, request, pid, ours, stderr)
        self._children[number] = self._by_stderr[stderr] = child
        self._poll.register(stderr, select.POLLIN)

    def _become(self, number: int, pipe: int | None, message: bytes, requests: int, stderr: int) -> NoReturn:
        """In the child: close the zygote's descriptors, and serve an environment."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            os.dup2(stderr, 1)  # output of an environment must not corrupt the protocol
            os.dup2(stderr, 2)
            for child in self._children.values():
                os.close(child.requests)
                os.close(child.stderr)
            own = None if pipe is None else pipe + OWN
            for fd in (REQUESTS, self._wake, self._wake_end, *PIPES, *(p + OWN for p in PIPES)):
                if fd not in (pipe, own):
                    os.close(fd)
            _die_with_parent()
            memory = None if pipe is None else _part(pipe)
            EnvironmentWorker(number, requests if pipe is None else pipe, own, ANSWERS, memory).run(message)
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
                _kill(child)  # kill its remaining children, before its pid can be reused
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
            _forget(child.pipe)
        told = {"status": status, "stderr": child.tail.decode(errors="replace")}
        answer(child.number, frames.ENDED, 0, told)

    def _kill_all(self) -> None:
        for child in self._children.values():
            _kill(child)


def _kill(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent: a pipe of its own does not close with the zygote."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _part(pipe: int) -> mmap.mmap | None:
    """The part of the memory that belongs to an environment's pipe; None without shared memory."""
    try:
        return mmap.mmap(MEMORY, frames.PART, offset=(pipe - PIPES.start) * frames.PART)
    except (OSError, ValueError):
        return None


def _forget(pipe: int) -> None:
    """Release an environment's pages of its part of the memory."""
    part = _part(pipe)
    if part is not None:
        with part, contextlib.suppress(OSError, ValueError):
            part.madvise(mmap.MADV_REMOVE)


def _drain(fd: int) -> None:
    """Discard unread data of a former environment, before another one gets its pipe."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while any(events & select.POLLIN for _, events in poll.poll(0)):
        if not os.read(fd, _READ):
            return


def _unknown(request: dict[str, Any]) -> dict[str, Any] | None:
    """The error for an id that GEM does not have, with similar ids."""
    env_id = request["env_id"]
    if request.get("protocol", "gem") != "gem" or request.get("imports"):
        return None
    import difflib

    try:
        from gem.envs.registration import ENV_REGISTRY
    except ImportError as error:
        return failure(error, "import")

    if env_id in ENV_REGISTRY:
        return None
    return {"kind": "unknown", "type": "ValueError", "message": f"Environment {env_id} not found in registry.",
            "near": difflib.get_close_matches(env_id, ENV_REGISTRY, 3, 0.6), "traceback": ""}


def _import(folder: str, adapter: str) -> dict[str, Any] | None:
    """Import shared modules, and the adapter of a training set; returns the error of a failure. Without a folder, the
    image's own Python provides the modules."""
    if not folder:
        return _own()
    sys.path.insert(0, folder)
    try:
        if os.path.isdir(os.path.join(folder, "gem")):
            if not os.path.isdir(os.path.join(folder, "reasoning_gym")):
                _without_reasoning_gym()
            import gem
            import gem.envs  # registers the environments

            del gem
        if os.path.isdir(os.path.join(folder, "gymnasium")):
            import gymnasium
            import gymnasium.vector

            del gymnasium
        if adapter:
            tasks.install(adapter)
    except tasks.TaskError as error:
        return {**failure(error, "task"), "code": error.code}
    except BaseException as error:
        return failure(error, "import")
    return None


def _without_reasoning_gym() -> None:
    """GEM imports reasoning-gym only to register an id for each of its data sets. The package set of the games has no
    reasoning-gym, so GEM finds one without data sets."""
    module = types.ModuleType("reasoning_gym")
    module.factory = types.SimpleNamespace(DATASETS={})  # type: ignore[attr-defined]
    sys.modules["reasoning_gym"] = module


def _own() -> dict[str, Any] | None:
    try:
        import gymnasium
        import gymnasium.vector

        del gymnasium
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:3]))
        told = f"the image's Python {version} ({sys.executable}) has no gymnasium: {error}"
        return {**failure(error, "image"), "message": told}
    except BaseException as error:
        return failure(error, "import")
    return None


def main() -> None:
    """Import, then serve."""
    os.dup2(2, 1)
    problem = _import(sys.argv[1], sys.argv[2])
    gc.collect()
    gc.freeze()  # children share the pages of existing objects
    Zygote(problem).run()


if __name__ == "__main__":
    main()
