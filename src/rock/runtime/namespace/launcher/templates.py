"""The launcher's templates (processes/template.py) by snapshot: forks of it that hold the memory of copied processes.

The launcher forwards requests and replies, so that it never waits for a template. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

from rock.guest.init.link import pack, receive_packet, unpack
from rock.runtime.namespace.launcher import kernel

_BUFFER = 1 << 17
Work = Callable[[socket.socket, dict[str, Any]], None]


class _Holder:
    """A template: its socket, and the numbers of the requests that it has not answered."""

    def __init__(self, name: str, pid: int, sock: socket.socket) -> None:
        self.name = name
        self.pid = pid
        self.sock = sock
        self.waiting: list[int] = []


class Templates:
    """answer: sends a reply to a request with this number. work: runs in a new template, and never returns."""

    def __init__(self, answer: Callable[[dict[str, Any], dict[str, Any]], None], work: Work) -> None:
        self._answer = answer
        self._work = work
        self._by_name: dict[str, _Holder] = {}
        self._by_fd: dict[int, _Holder] = {}
        self._buffer = bytearray(_BUFFER)

    def __contains__(self, fd: object) -> bool:
        return fd in self._by_fd

    def forward(self, request: dict[str, Any], fds: Sequence[int], poll: select.poll) -> None:
        """Pass a request to the template of its snapshot, which is started if necessary."""
        try:
            if request["op"] == "take":  # by a new template, which has the request from its start
                self.forget(request["snapshot"], poll)
                holder = self._fork(request, poll)
            elif request["op"] == "finish":  # of a take
                if request["snapshot"] not in self._by_name:
                    raise ChildProcessError(errno.ECHILD, "it has ended")
                holder = self._by_name[request["snapshot"]]
                self._send(holder, request, fds)
            else:
                holder = self._by_name.get(request["snapshot"]) or self._fork(request, poll)
                try:
                    self._send(holder, request, fds)
                except BrokenPipeError:  # it was killed
                    self._drop(holder, poll)
                    holder = self._fork(request, poll)
                    self._send(holder, request, fds)
            holder.waiting.append(int(request["id"]))
        except OSError as error:
            number = errno.ECHILD if request["op"] == "finish" else error.errno or 0
            self._answer(request, {"error": f"template: {error.strerror or error}", "errno": number})

    @staticmethod
    def _send(holder: _Holder, request: dict[str, Any], fds: Sequence[int]) -> None:
        data, extra = pack(request)
        try:
            socket.send_fds(holder.sock, [data], [*fds, *extra])
        finally:
            for fd in extra:
                os.close(fd)

    def _fork(self, request: dict[str, Any], poll: select.poll) -> _Holder:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = kernel.fork_into(0)
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            try:
                ours.close()
                self._work(theirs, request)
            finally:
                os._exit(1)
        theirs.close()
        ours.setblocking(False)
        holder = _Holder(request["snapshot"], pid, ours)
        self._by_fd[ours.fileno()] = self._by_name[holder.name] = holder
        poll.register(ours, select.POLLIN)
        return holder

    def readable(self, fd: int, poll: select.poll) -> None:
        """Pass on a reply of a template, or handle its end."""
        holder = self._by_fd[fd]
        try:
            data, fds = receive_packet(holder.sock, self._buffer)
        except BlockingIOError:
            return
        except OSError:
            data, fds = memoryview(b""), []
        if not data:
            self._drop(holder, poll)
            return
        reply = unpack(data, fds)
        for extra in fds:
            os.close(extra)
        number = int(reply.pop("id"))
        if number in holder.waiting:
            holder.waiting.remove(number)
            self._answer({"id": number}, reply)

    def forget(self, name: str, poll: select.poll) -> None:
        """End the template of a snapshot. Idempotent."""
        holder = self._by_name.get(name)
        if holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGKILL)  # it is not reaped yet, so the number is not reused
            self._drop(holder, poll)

    def _drop(self, holder: _Holder, poll: select.poll) -> None:
        poll.unregister(holder.sock)
        del self._by_fd[holder.sock.fileno()]
        if self._by_name.get(holder.name) is holder:
            del self._by_name[holder.name]
        holder.sock.close()
        for number in holder.waiting:
            self._answer({"id": number}, {"error": "the template ended before it responded", "errno": errno.ECHILD})
