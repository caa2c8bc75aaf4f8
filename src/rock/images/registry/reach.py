"""Restricts the server's connections on behalf of a tenant: public addresses, and registries that the owner listed.

The check applies to the connected address at the time of the connection. It therefore covers names that resolve to
another address later, redirects, token services and unusual spellings of 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError
from urllib3.util.connection import create_connection

from rock import settings
from rock.egress.policy import Policy, Verdict
from rock.errors import ImageError
from rock.images.registry import rules

_PUBLIC = Policy(None)


class NearAddress(NewConnectionError):
    """An address of the server's own networks, which is not contacted for a tenant."""


def is_named(host: str, port: int) -> bool:
    """Whether the owner of the server listed a registry: HOST:PORT, or HOST for the default ports."""
    names = {f"{host}:{port}", host} if port in (80, 443) else {f"{host}:{port}"}
    return not names.isdisjoint(rules.named())


def addresses_of(host: str, port: int) -> list[str]:
    """The permitted addresses of a host. ImageError when it has only others; OSError without an address."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is empty or too long
        raise OSError(f"{host[:80]!r} is no host name: {error}") from None
    named = is_named(host, port)
    open_ones = [str(row[4][0]) for row in found if named or _is_open(str(row[4][0]), port)]
    if not open_ones:
        raise near(host)
    return open_ones


def near(host: str) -> ImageError:
    """The same error for each denied address: it does not reveal what listens there."""
    return ImageError(
        f"{host} is an address of the server's own networks, which this key may not have contacted",
        hint="the owner of the server can name a registry in ROCK_PRIVATE_REGISTRIES",
    )


def _is_open(text: str, port: int) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    return _PUBLIC.judge(address, port, own=_is_own(text))[0] is Verdict.ALLOW


def _is_own(address: str) -> bool:
    """Whether it is an address of this machine: only those can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


class _Guarded(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        host = self._dns_host
        try:
            allowed = addresses_of(host, self.port)
        except ImageError as error:
            raise NearAddress(self, error.message) from None
        except OSError as error:
            raise NewConnectionError(self, f"no address of {host}: {error}") from None
        problem: OSError | None = None
        for address in allowed:
            try:
                return create_connection((address, self.port), self.timeout, source_address=self.source_address,
                                         socket_options=self.socket_options)  # fmt: skip
            except OSError as error:
                problem = error
        raise NewConnectionError(self, f"{host} cannot be reached: {problem}")


class _GuardedTls(_Guarded, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Guarded


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _GuardedTls


def pool_for(url: str, public_only: bool) -> urllib3.PoolManager:
    """A connection pool for requests that begin at a URL. public_only: each to a public address, or to a listed
    registry.

    Behind a proxy of the environment the proxy connects; addresses are then only checked beforehand.
    """
    kinds: dict[str, Any] = {"retries": False, "timeout": urllib3.Timeout(connect=15, read=60), "maxsize": 8}
    proxy = settings.proxy_for(url)
    if proxy:
        return urllib3.ProxyManager(proxy, **kinds)
    made = urllib3.PoolManager(**kinds)
    if public_only:
        made.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return made
