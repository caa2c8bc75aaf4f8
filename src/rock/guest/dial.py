"""Connections to ports inside, made from inside and handed out as connected sockets."""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import TYPE_CHECKING, Any

from rock.guest.fault import Fault, of_os_error

if TYPE_CHECKING:
    from rock.guest.init import Init
    from rock.guest.wire import Connection


def start(init: Init, connection: Connection, number: int, request: dict[str, Any]) -> None:
    """Connect without blocking the loop, and answer with the socket."""
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
        init.unwatch(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            sock.close()
            init.refuse(connection, number, _fault(error, what))
        else:
            init.answer(connection, number, {}, [sock.detach()])

    def give_up() -> None:
        nonlocal settled
        if not settled:
            settled = True
            init.unwatch(sock.fileno())
            sock.close()
            init.refuse(connection, number, Fault("port_timeout", f"{what} did not answer in {timeout:g} s"))

    init.watch(sock.fileno(), settle, select.EPOLLOUT)
    init.later(timeout, give_up)


def _fault(error: int, what: str) -> Fault:
    if error in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET):
        return Fault("not_found", f"nothing listens on {what}")
    return of_os_error(OSError(error, os.strerror(error)), what)
