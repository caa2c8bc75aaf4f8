"""The egress proxy: a separate process for all outbound connections of sandboxes with network "nat".

    server ── SOCK_SEQPACKET, JSON, descriptors ──► proxy ── a Gateway per sandbox ──► the network of this machine

Run by its path, `python -I -S proxy.py JSON`. As root it drops all privileges before it reads a byte from inside. It
exits when the server's socket closes; no connection then leaves a sandbox until a new server starts another proxy.
Requests: add (a sandbox; descriptors: TCP socket, UDP socket, file of its log), remove, list. Standard library only.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import asyncio
import contextlib
import ctypes
import encodings.idna  # noqa: F401 - before the rights to read it are given up
import json
import resource
import signal
import socket
from collections import deque
from typing import Any

from rock.egress.dns import Resolver
from rock.egress.gateway import Gateway
from rock.egress.log import Journal
from rock.egress.netlink import Routes
from rock.egress.policy import Policy
from rock.guest.init.link import pack, receive_packet, unpack

_NOBODY = 65534
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


class Proxy:
    def __init__(self, sock: socket.socket, options: dict[str, Any]) -> None:
        self._sock = sock
        self._resolver = Resolver(options["resolvers"])
        self._routes = Routes()
        self._doors: dict[str, Gateway] = {}
        self._buffer = bytearray(1 << 17)
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Serve until the server's socket closes."""
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        loop.add_reader(self._sock, self._readable)
        self._send({"ready": True})
        await self._ended.wait()
        loop.remove_reader(self._sock)
        loop.remove_writer(self._sock)
        self._routes.close()
        await asyncio.gather(*(door.close() for door in self._doors.values()), *self._tasks, return_exceptions=True)

    def _readable(self) -> None:
        while not self._ended.is_set():
            try:
                data, fds = receive_packet(self._sock, self._buffer)
            except BlockingIOError:
                return
            except OSError:
                data, fds = memoryview(b""), []
            if not data:
                self._ended.set()
                return
            self._take(unpack(data, fds), fds)

    def _take(self, request: dict[str, Any], fds: list[int]) -> None:
        reply: dict[str, Any] = {}
        try:
            if request["op"] == "add":
                self._add(request, fds)
            elif request["op"] == "remove":
                door = self._doors.pop(request["sandbox"], None)
                if door is not None:
                    self._close(door, request["id"])
                    return
            else:
                found = self._doors.get(request["sandbox"])
                reply = {"connections": found.journal.listed() if found is not None else None}
        except (OSError, ValueError, TypeError, KeyError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)
        self._send({"id": request["id"], **reply})

    def _add(self, request: dict[str, Any], fds: list[int]) -> None:
        tcp, udp, log = fds
        policy = Policy(request["egress"])
        old = self._doors.pop(request["sandbox"], None)
        if old is not None:
            self._close(old, 0)
        ways = socket.socket(fileno=os.dup(tcp)), socket.socket(fileno=os.dup(udp))
        for sock in ways:
            sock.setblocking(False)
        self._doors[request["sandbox"]] = Gateway(policy, ways, Journal(os.dup(log)), self._resolver,
                                              self._routes)

    def _close(self, door: Gateway, number: int) -> None:
        async def close() -> None:
            await door.close()
            if number:
                self._send({"id": number})

        task = asyncio.create_task(close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, message: dict[str, Any]) -> None:
        self._outgoing.append(pack(message))
        self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._outgoing:
            data, fds = self._outgoing[0]
            try:
                socket.send_fds(self._sock, [data], fds)
            except BlockingIOError:
                loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._ended.set()
                return
            self._outgoing.popleft()
            for fd in fds:
                os.close(fd)
        loop.remove_writer(self._sock)


def _give_up_rights() -> None:
    """Drop all privileges, so that untrusted input cannot act with the server's rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a user namespace with one user has no other id
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def main() -> None:
    options = json.loads(sys.argv[1])
    sock = socket.socket(fileno=int(options["fd"]))
    os.set_inheritable(sock.fileno(), False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C at the server's terminal must not end the proxy
    _give_up_rights()
    asyncio.run(Proxy(sock, options).run())


if __name__ == "__main__":
    main()
