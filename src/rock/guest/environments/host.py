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

    -> HELLO token      <- OK {"hello": token, "there": {n: [env id, pipe, name, idle, owner]}, "forks": whether it can}
    -> MAKE {"env_id", "protocol", "kwargs", "pipe": its descriptor, or null, "name", "idle", "owner"}  <- of n: OK n
    -> FORK {"env", "reseed", "children": [{"number", "id", and as MAKE}]}  <- of each child n, with its id: OK n
    -> KILL             <- ENDED, when the process of that environment is gone

For a fork the zygote makes a socket and a pipe for each child, and sends them to the environment, which forks itself
(forking.py). Each child reports on its socket that it serves; the kernel adds its pid, and makes the zygote its parent.

The kind of an error is "unknown" (no such id), "import", "environment" (it raised; it stays usable), "gone", "refused"
(no process can be started), "unforkable" (a fork would not continue as its parent), "unforked" (the environment ended
before its fork), "image" (its Python lacks a requirement), "source" (it defines no environment),
"refused_step" (the index is not the next one) or "transport" (a value that cannot be encoded).

Runs as one program on the command line, which rocklet/environments/pipes.py builds from these files. Its arguments are
the folder of packages and the adapter of a training set, or nothing. It uses the standard library and those packages
only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import traceback
import types
from collections import deque
from collections.abc import Iterable
from typing import Any, NoReturn

from rock.guest.environments import forking, frames, tasks
from rock.guest.environments.frames import FORK, HEAD, HELLO, KILL, MAKE, NO_INDEX, OK, PLAIN, Joiner, pieces
from rock.guest.environments.worker import EnvironmentWorker, failure

MEMORY, REQUESTS, ANSWERS = frames.MEMORY, 198, 199
PIPES = range(132, 160)
OWN = len(PIPES)  # the environment with the request pipe n writes responses to n + OWN
_READ = 1 << 16
_STDERR_KEPT = 8192
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def answer(env: int, op: int, id: int, message: Any, stream: int = 0) -> None:
    """Write a message of the zygote to the rocklet; waits while the pipe is full."""
    payload = json.dumps(message).encode()
    for piece in pieces(stream, HEAD.pack(len(payload), op, PLAIN, env, id, NO_INDEX) + payload):
        os.write(ANSWERS, piece)


# ---- zygote ----


class Child:
    """The zygote's state of an environment's process. `socket`: for requests, and for descriptors."""

    def __init__(self, number: int, request: dict[str, Any], pid: int, connection: socket.socket, stderr: int) -> None:
        self.number = number
        self.pipe: int | None = request["pipe"]
        self.known = [request["env_id"], self.pipe, *map(request.get, ("name", "idle", "owner"))]
        self.pid = pid
        self.socket = connection
        self.requests = connection.fileno()
        self.stderr = stderr
        self.waiting: deque[Packet] = deque()
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
                self.waiting[0].send(self.socket)
            except BlockingIOError:
                return False
            except ConnectionError:
                break
            self.waiting.popleft().close()
        self.drop()
        return True

    def drop(self) -> None:
        """Drop queued data."""
        while self.waiting:
            self.waiting.popleft().close()

    def close(self) -> None:
        self.drop()
        self.socket.close()
        os.close(self.stderr)


class Packet:
    """Queued data for an environment, with descriptors; those in `own` are closed afterwards."""

    def __init__(self, data: bytes, fds: tuple[int, ...] = (), own: tuple[int, ...] = ()) -> None:
        self._data = data
        self._fds = fds
        self._own = own

    def send(self, connection: socket.socket) -> None:
        """Raises BlockingIOError, and ConnectionError when the environment has ended."""
        if self._fds:
            try:
                socket.send_fds(connection, [self._data], self._fds)
            except (BlockingIOError, ConnectionError):
                raise
            except OSError:  # too many descriptors are on their way: the receiver expects a packet nevertheless
                connection.send(self._data)
        else:
            connection.send(self._data)

    def close(self) -> None:
        for fd in self._own:
            os.close(fd)


class Pending:
    """A child that an environment forks on request. `id`: of the request. `parent`: the number of the environment."""

    def __init__(self, parent: int, spec: dict[str, Any]) -> None:
        self.parent = parent
        self.number: int = spec["number"]
        self.id: int = spec["id"]
        self.spec = spec
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self.stderr, their_stderr = os.pipe2(os.O_CLOEXEC)
        except OSError:
            self.socket.close()
            theirs.close()
            raise
        self.socket.setblocking(False)
        os.set_blocking(self.stderr, False)
        pipe: int | None = spec["pipe"]
        pipes = () if pipe is None else (pipe, pipe + OWN)
        own = (theirs.detach(), their_stderr)
        offset = None if pipe is None else _offset(pipe)
        report = {"number": self.number, "offset": offset, "fds": len(own) + len(pipes)}
        self.packet = Packet(json.dumps(report).encode(), (*own, *pipes), own)

    def heard(self) -> tuple[int, dict[str, Any]] | None:
        """The pid and the report of the child; None while there is none. Empty once no process can send one."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(_READ, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return None
        except OSError:
            data, ancillary = b"", []
        for level, kind, value in ancillary:
            if data and level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                return _CREDENTIALS.unpack(value)[0], _object(data)
        return 0, {}

    def close(self) -> None:
        self.socket.close()
        os.close(self.stderr)


def _object(data: bytes) -> dict[str, Any]:
    try:
        report = json.loads(data)
    except (ValueError, RecursionError):
        report = None
    return report if isinstance(report, dict) else {"type": "ValueError", "message": "its report is no JSON object"}


class Zygote:
    """Reads requests, forks environments, forwards requests to them, and reports when one ends."""

    def __init__(self, problem: dict[str, Any] | None) -> None:
        self._problem = problem
        self._children: dict[int, Child] = {}
        self._by_pid: dict[int, Child] = {}
        self._pending: dict[int, Pending] = {}  # by their number
        self._by_socket: dict[int, Pending] = {}
        self._adopts = forking.adopt_orphans()
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
                elif fd in self._by_socket:
                    self._hear(self._by_socket[fd])
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
            self._forward(child, map(Packet, pieces(stream, message)))
        elif op == HELLO:
            for pending in list(self._pending.values()):  # this rocklet does not know them
                self._hear(pending)
                self._abandon(pending.number)
            there = {number: child.known for number, child in self._children.items()}
            answer(0, OK, id, {"hello": payload.decode(), "there": there, "forks": self._adopts})
        elif op == KILL:
            if env in self._pending:
                self._hear(self._pending[env])
            child = self._children.get(env)
            if child is not None:
                _kill(child)
            elif self._abandon(env):
                answer(env, frames.ENDED, 0, {"status": int(signal.SIGKILL), "stderr": ""})
        elif op == FORK:
            self._ask_to_fork(json.loads(payload))
        elif op == MAKE:
            request = json.loads(payload)
            problem = self._problem or _unknown(request)
            if problem is not None:
                answer(env, frames.ERROR, id, problem)
            else:
                self._fork(env, id, request, message)

    def _forward(self, child: Child, packets: Iterable[Packet]) -> None:
        child.waiting.extend(packets)
        if not child.send() and child.requests not in self._by_requests:
            self._by_requests[child.requests] = child
            self._poll.register(child.requests, select.POLLOUT)

    def _fork(self, number: int, id: int, request: dict[str, Any], message: bytes) -> None:
        with contextlib.ExitStack() as undo:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(ours.close)
                undo.callback(theirs.close)
                stderr, their_stderr = os.pipe2(os.O_CLOEXEC)
                undo.callback(os.close, stderr)
                undo.callback(os.close, their_stderr)
                pid = os.fork()
            except OSError as error:
                answer(number, frames.ERROR, id, failure(error, "refused"))
                return
            undo.pop_all()
        if pid == 0:
            ours.close()
            os.close(stderr)
            self._become(number, request["pipe"], message, theirs.detach(), their_stderr)  # never returns
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # parent and child both call it, because their order is undefined
        theirs.close()
        os.close(their_stderr)
        ours.setblocking(False)
        os.set_blocking(stderr, False)
        self._add(Child(number, request, pid, ours, stderr))

    def _add(self, child: Child) -> None:
        self._children[child.number] = self._by_stderr[child.stderr] = self._by_pid[child.pid] = child
        self._poll.register(child.stderr, select.POLLIN)

    # ---- forks of environments ----

    def _ask_to_fork(self, asked: dict[str, Any]) -> None:
        """Send an environment the descriptors of its children to be."""
        number: int = asked["env"]
        parent = self._children.get(number)
        packets = []
        for spec in asked["children"]:
            if parent is None:
                answer(spec["number"], frames.ERROR, spec["id"], _unforked(number))
                continue
            try:
                pending = Pending(number, spec)
            except OSError as error:
                answer(spec["number"], frames.ERROR, spec["id"], failure(error, "refused"))
                continue
            self._pending[pending.number] = self._by_socket[pending.socket.fileno()] = pending
            self._poll.register(pending.socket, select.POLLIN)
            packets.append(pending.packet)
        if parent is not None and packets:
            payload = json.dumps({"count": len(packets), "reseed": asked["reseed"]}).encode()
            message = HEAD.pack(len(payload), FORK, PLAIN, number, 0, NO_INDEX) + payload
            self._forward(parent, [*map(Packet, pieces(0, message)), *packets])

    def _hear(self, pending: Pending) -> None:
        """Read the report of a forked child, if there is one, and respond to the rocklet."""
        heard = pending.heard()
        if heard is None:
            return
        pid, report = heard
        self._release(pending)
        if not report and (pid in self._by_pid or pid in (1, os.getpid())):
            report = {"type": "ValueError", "message": f"process {pid} is no fork"}  # it sent a report of its own
        if pid and not report:
            self._add(Child(pending.number, pending.spec, pid, pending.socket, pending.stderr))
            answer(pending.number, OK, pending.id, pending.number)
            return
        pending.close()
        if not pid:
            report = _unforked(pending.parent, pending.parent in self._children)
        elif report.get("kind") not in ("refused", "unforkable"):
            report["kind"] = "unforkable"
        answer(pending.number, frames.ERROR, pending.id, report)

    def _release(self, pending: Pending) -> None:
        self._poll.unregister(pending.socket)
        del self._pending[pending.number], self._by_socket[pending.socket.fileno()]

    def _abandon(self, number: int) -> bool:
        """Do not serve a child that has not reported: it ends when it does. False when there is none."""
        pending = self._pending.get(number)
        if pending is None:
            return False
        self._release(pending)
        pending.close()
        return True

    # ---- processes ----

    def _become(self, number: int, pipe: int | None, message: bytes, control: int, stderr: int) -> NoReturn:
        """In the child: close the zygote's descriptors, and serve an environment."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            os.dup2(stderr, 1)  # output of an environment must not corrupt the protocol
            os.dup2(stderr, 2)
            os.close(stderr)
            for child in self._children.values():
                child.close()
            for pending in self._pending.values():
                pending.close()
            own = None if pipe is None else pipe + OWN
            for fd in (REQUESTS, self._wake, self._wake_end, *PIPES, *(p + OWN for p in PIPES)):
                if fd not in (pipe, own):
                    os.close(fd)
            forking.die_with_parent()
            memory = None if pipe is None else _part(pipe)
            requests = control if pipe is None else pipe
            EnvironmentWorker(number, control, requests, own, ANSWERS, memory).run(message)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            for pending in list(self._pending.values()):
                self._hear(pending)  # it may be one of these, whose report is older than its end
            child = self._by_pid.get(found.si_pid)
            if child is not None:
                _kill(child)  # kill its remaining children, before its pid can be reused
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                self._ended(child, status)

    def _ended(self, child: Child, status: int) -> None:
        del self._children[child.number], self._by_pid[child.pid]
        for known, fd in ((self._by_stderr, child.stderr), (self._by_requests, child.requests)):
            if known.pop(fd, None):
                self._poll.unregister(fd)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(child.stderr, _READ):
                child.tail = (child.tail + data)[-_STDERR_KEPT:]
        child.close()
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


def _offset(pipe: int) -> int:
    return (pipe - PIPES.start) * frames.PART


def _part(pipe: int) -> mmap.mmap | None:
    """The part of the memory that belongs to an environment's pipe; None without shared memory."""
    try:
        return mmap.mmap(MEMORY, frames.PART, offset=_offset(pipe))
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


def _unforked(number: int, lives: bool = False) -> dict[str, Any]:
    """The error for a child that did not report."""
    why = f"a fork of environment {number} ended before it served" if lives else f"there is no environment {number}"
    return {"kind": "unforked", "type": "", "message": why, "traceback": ""}


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
