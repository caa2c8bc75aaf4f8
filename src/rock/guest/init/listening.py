"""Ports inside: connections to those of programs, and loopback ports of the server, on which pid 1 listens.

    listen {"port": P}    -> {"port": P}; 0 lets the kernel choose. Idempotent for a port that pid 1 listens on
    accept {"port": P}    -> a connection, as soon as a program inside has opened one
    unlisten {"port": P}  -> closed; pending accepts fail

Each accepted connection is passed to the server.

A port stays open when the server restarts: connections wait in its backlog until the next server accepts them. pid 1
accepts no connection without a request, so the backlog of the kernel is the limit. Standard library only.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from typing import Any, Protocol

from rock.guest.init.link import Connection, Fault, Loop, of_os_error

_BACKLOG = 256
_MOST_PORTS = 8
_MOST_WAITING = 64  # pending accepts of one port


class Server(Protocol):
    """The part of pid 1 that replies."""

    connections: list[Connection]

    def answer(self, connection: Connection, number: int, reply: dict[str, Any], fds: list[int]) -> None: ...

    def refuse(self, connection: Connection, number: int, fault: Fault) -> None: ...


class _Port:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.waiting: deque[tuple[Connection, int]] = deque()
        self.watched = False


class Listening:
    """The ports of one pid 1."""

    def __init__(self, loop: Loop, server: Server) -> None:
        self._loop = loop
        self._server = server
        self._ports: dict[int, _Port] = {}

    def listen(self, wanted: int) -> int:
        """Listen on a port of 127.0.0.1; returns its number. Fault when another program has it."""
        if not 0 <= wanted < 65536:
            raise Fault("invalid_config", f"{wanted} is not a port")
        if wanted in self._ports:
            return wanted
        if len(self._ports) >= _MOST_PORTS:
            raise Fault("unavailable", f"pid 1 listens on {_MOST_PORTS} ports already")
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", wanted))
            sock.listen(_BACKLOG)
            port = int(sock.getsockname()[1])
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise Fault("conflict", f"port {wanted} inside is in use by another program") from None
            raise of_os_error(error, f"port {wanted} inside") from None
        self._ports[port] = _Port(sock)
        return port

    def accept(self, connection: Connection, number: int, port: int) -> None:
        found = self._ports.get(port)
        if found is None:
            raise Fault("not_found", f"pid 1 does not listen on port {port}")
        if len(found.waiting) >= _MOST_WAITING:
            raise Fault("unavailable", f"{_MOST_WAITING} requests wait for connections to port {port} already")
        found.waiting.append((connection, number))
        self._serve(found)

    def unlisten(self, port: int) -> None:
        found = self._ports.pop(port, None)
        if found is None:
            return
        self._watch(found, False)
        found.sock.close()
        for connection, number in found.waiting:
            self._server.refuse(connection, number, Fault("not_found", f"port {port} was closed"))

    def _serve(self, port: _Port) -> None:
        """Give accepted connections to the pending requests of servers that are still connected."""
        while port.waiting:
            connection, number = port.waiting[0]
            if connection not in self._server.connections:
                port.waiting.popleft()
                continue
            try:
                accepted, _ = port.sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._watch(port, False)  # the connection stays in the backlog
                    self._loop.later(0.1, lambda: self._serve(port) if port in self._ports.values() else None)
                    return
                continue  # the client has left
            port.waiting.popleft()
            accepted.setblocking(False)
            self._server.answer(connection, number, {}, [accepted.detach()])
        self._watch(port, bool(port.waiting))

    def _watch(self, port: _Port, wanted: bool) -> None:
        if wanted and not port.watched:
            self._loop.watch(port.sock.fileno(), lambda: self._serve(port))
        elif port.watched and not wanted:
            self._loop.unwatch(port.sock.fileno())
        port.watched = wanted


# ---- connections to ports inside, returned as connected sockets ----

def start_connection(loop: Loop, server: Server, connection: Connection, number: int, request: dict[str, Any]) -> None:
    """Connect without blocking the loop, and reply with the socket."""
    host, port = str(request.get("host") or "127.0.0.1"), int(request["port"])
    timeout = max(0.0, min(float(request.get("timeout", 10)), 300.0))
    if not 0 < port < 65536:
        raise Fault("invalid_config", f"{port} is not a port")
    host = {"localhost": "127.0.0.1"}.get(host, host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise Fault("invalid_config", f"{host!r} is not an IP address") from None
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    what = f"port {port} of {host} inside"
    error = sock.connect_ex((host, port))
    if error not in (0, errno.EINPROGRESS):
        sock.close()
        raise _fault(error, what)
    settled = False

    def settle() -> None:
        nonlocal settled
        if settled:
            return
        settled = True
        loop.unwatch(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            sock.close()
            server.refuse(connection, number, _fault(error, what))
        else:
            server.answer(connection, number, {}, [sock.detach()])

    def give_up() -> None:
        nonlocal settled
        if not settled:
            settled = True
            loop.unwatch(sock.fileno())
            sock.close()
            server.refuse(connection, number, Fault("port_timeout", f"{what} did not answer in {timeout:g} s"))

    loop.watch(sock.fileno(), settle, select.EPOLLOUT)
    loop.later(timeout, give_up)


def _fault(error: int, what: str) -> Fault:
    if error in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET):
        return Fault("not_found", f"nothing listens on {what}")
    return of_os_error(OSError(error, os.strerror(error)), what)
