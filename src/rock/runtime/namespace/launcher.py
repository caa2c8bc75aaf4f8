"""The launcher: a small single-threaded process that forks sandboxes. Run by its path, `python -I -S launcher.py JSON`.

    rocklet ── SOCK_SEQPACKET, JSON ──► launcher ── clone with namespaces ──► child.py becomes pid 1 of a sandbox

Requests: create, ranges (make user namespaces ahead), floor (a bare namespace fork, for the benchmark). It answers in
the order in which sandboxes become ready, several at once, and ends when its socket does; sandboxes stay.
Standard library only, and few modules: what it imports is what every pid 1 weighs.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # make our own modules importable by path, without running the packages' own code
    import types

    _source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for _name in ("rock", "rock.guest", "rock.runtime", "rock.runtime.namespace"):
        _package = types.ModuleType(_name)
        _package.__path__ = [os.path.join(_source, *_name.split(".")[1:])]
        sys.modules[_name] = _package

import contextlib
import errno
import gc
import json
import select
import signal
import socket
import time
from collections import deque
from typing import Any

from rock.guest import proctree
from rock.guest.wire import pack, receive_packet, unpack
from rock.runtime.namespace import child, kernel, mounts, seccomp, userns

_ALL = (kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET)
_START_PATIENCE = 60.0


class Launcher:
    """options: privileged, userns (whether sandboxes get a uid range), staging, dynmods."""

    def __init__(self, sock: socket.socket, options: dict[str, Any]) -> None:
        self.sock = sock
        self.privileged = bool(options["privileged"])
        self.mapped = bool(options["userns"])
        self.staging = str(options["staging"])
        self.most = max(2, min(8, 2 * (os.cpu_count() or 1)))
        self.ranges = userns.Ranges()
        self.bpf = seccomp.build() if seccomp.supported() else b""
        self.buffer = bytearray(1 << 17)
        self.queue: deque[dict[str, Any]] = deque()
        self.starting: dict[int, tuple[int, int, float]] = {}  # ready descriptor -> request, pid, deadline
        self.spare: deque[int] = deque()
        self.outgoing: deque[tuple[bytes, list[int]]] = deque()

    def prepare(self) -> None:
        """A mount namespace of our own with the staging folder; as an ordinary user a user namespace first."""
        if self.privileged:
            kernel.unshare(kernel.CLONE_NEWNS)
        else:
            uid, gid = os.geteuid(), os.getegid()
            kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
            userns.become_root(uid, gid)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
        mounts.prepare_staging(self.staging)
        if self.privileged:
            self._favour_moves()

    def _favour_moves(self) -> None:
        """Make moving a process into a cgroup cheap: 14 ms become 0.3 ms.

        The kernel's switch for it is an option of any hierarchy, so we mount a private empty one, in our own mount
        namespace; it goes away with us.
        """
        with contextlib.suppress(OSError):
            os.mkdir(f"{self.staging}/dynmods")
            options = "none,name=rock,favordynmods"
            kernel.mount("rock", f"{self.staging}/dynmods", "cgroup", kernel.MS_NOSUID | kernel.MS_NODEV, options)

    def run(self) -> None:
        wake_reader, wake_writer = socket.socketpair()
        wake_reader.setblocking(False)
        wake_writer.setblocking(False)
        signal.set_wakeup_fd(wake_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a Ctrl-C at the server's terminal is not for us
        self.sock.setblocking(False)
        self.poll = select.poll()
        self.poll.register(self.sock, select.POLLIN)
        self.poll.register(wake_reader, select.POLLIN)
        alive = True
        while alive:
            for fd, _ in self._wait():
                if fd == self.sock.fileno():
                    alive = self._read()
                elif fd == wake_reader.fileno():
                    with contextlib.suppress(BlockingIOError):
                        wake_reader.recv(4096)
                elif fd in self.starting:
                    self._settle(fd)
            self._reap()
            self._give_up()
            while self.queue and len(self.starting) < self.most:
                self._start(self.queue.popleft())

    def _wait(self) -> list[tuple[int, int]]:
        if self.outgoing:
            self.poll.modify(self.sock, select.POLLIN | select.POLLOUT)
        if self.spare and not self.queue and not self.starting:
            ready = self.poll.poll(0)
            if not ready:
                with contextlib.suppress(OSError):
                    self.ranges.get(self.spare.popleft())
            return ready
        return self.poll.poll(1000 if self.starting else None)

    def _read(self) -> bool:
        self._flush()
        while True:
            try:
                data, fds = receive_packet(self.sock, self.buffer)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            request = unpack(data, fds)
            for fd in fds:
                os.close(fd)
            if request["op"] == "create":
                self.queue.append(request)
            elif request["op"] == "ranges":
                self.spare.extend(base for base in request["bases"] if base not in self.ranges)
            elif request["op"] == "floor":
                self._answer(request, {"seconds": floor()})
            else:
                self._answer(request, {"error": f"unknown request {request['op']!r}", "errno": errno.EINVAL})

    def _answer(self, request: dict[str, Any], reply: dict[str, Any]) -> None:
        self.outgoing.append(pack({"id": request["id"], **reply}))
        self._flush()

    def _flush(self) -> None:
        while self.outgoing:
            data, fds = self.outgoing[0]
            try:
                socket.send_fds(self.sock, [data], fds)
            except BlockingIOError:
                return
            except OSError:
                self.outgoing.clear()
                return
            self.outgoing.popleft()
            for fd in fds:
                os.close(fd)
        self.poll.modify(self.sock, select.POLLIN)

    # ---- sandboxes ----

    def _start(self, spec: dict[str, Any]) -> None:
        spec["privileged"] = self.privileged
        namespace = -1
        try:
            if self.mapped and self.privileged:
                namespace = self.ranges.get(spec["base"])
            else:
                spec["base"] = 0
            reading, writing = os.pipe2(os.O_CLOEXEC)
            flags = _ALL & ~(kernel.CLONE_NEWNET if spec["network"] == "host" else 0)
            try:
                pid = kernel.fork_into(flags)
            except OSError:
                os.close(reading)
                os.close(writing)
                raise
        except OSError as error:
            self._answer(spec, {"error": f"namespaces: {error}", "errno": error.errno})
            return
        if pid == 0:
            signal.set_wakeup_fd(-1)
            child.live(spec, self.staging, namespace, self.bpf, writing)
        os.close(writing)
        self.starting[reading] = spec["id"], pid, time.monotonic() + _START_PATIENCE
        self.poll.register(reading, select.POLLIN)

    def _settle(self, fd: int) -> None:
        number, pid, _ = self.starting.pop(fd)
        self.poll.unregister(fd)
        data = os.read(fd, 4096)
        os.close(fd)
        entry = proctree.read(pid)
        reply: dict[str, Any] = json.loads(data) if data else {"error": "it was killed while it started", "errno": 0}
        if "error" not in reply:
            reply = {"pid": pid, "start": entry.start} if entry else {"error": "its pid 1 ended at once", "errno": 0}
        else:
            reply["hint"] = child.explain(int(reply["errno"]))
        self._answer({"id": number}, reply)

    def _give_up(self) -> None:
        now = time.monotonic()
        for _, pid, deadline in list(self.starting.values()):
            if deadline < now:
                os.kill(pid, signal.SIGKILL)  # its descriptor then reads as ended

    @staticmethod
    def _reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def floor() -> float:
    """Seconds from a fork with all namespaces to the answer of a bash on pipes in them; nothing else is made."""
    started = time.perf_counter()
    theirs_in, ours_out = os.pipe2(os.O_CLOEXEC)
    ours_in, theirs_out = os.pipe2(os.O_CLOEXEC)
    pid = kernel.fork_into(_ALL)
    if pid == 0:
        try:
            os.dup2(theirs_in, 0)
            os.dup2(theirs_out, 1)
            for shell in ("/bin/bash", "/bin/sh"):
                with contextlib.suppress(OSError):
                    os.execve(shell, [shell], {"PATH": "/usr/bin:/bin"})
        finally:
            os._exit(127)
    os.close(theirs_in)
    os.close(theirs_out)
    os.write(ours_out, b"echo ready\n")
    os.read(ours_in, 100)
    seconds = time.perf_counter() - started
    os.close(ours_in)
    os.close(ours_out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return seconds


def main() -> None:
    """Prepare, tell {"ready": true} or {"error"} on the socket, and serve."""
    options = json.loads(sys.argv[1])
    sock = socket.socket(fileno=int(options["fd"]))
    os.set_inheritable(sock.fileno(), False)
    launcher = Launcher(sock, options)
    kernel.set_title(b"rock-init")
    try:
        launcher.prepare()
    except OSError as error:
        sock.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
        return
    sock.send(b'{"ready": true}')
    gc.collect()
    gc.freeze()
    launcher.run()


if __name__ == "__main__":
    main()
