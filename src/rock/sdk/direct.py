"""Direct requests to the worker of a sandbox, where the server offers them.

After some requests to one sandbox, the transport gets the address of its worker and a token from the server, and sends
further requests there. Whatever fails, a request goes to the server with the same idempotency key. A worker is
recognized by its proof in each response; a response without it is not used.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from rock import errors
from rock.protocol.routes import DIRECT, ERROR_CODE, PREFIX, SENT, is_data
from rock.sdk.connection import Connection
from rock.sdk.http import Address, Answer, Source

S = TypeVar("S")

CONNECT_TIMEOUT = 0.5  # seconds to reach a worker: the server is there anyway
_AFTER = 8  # requests to a sandbox before the first direct one
_MOST = 1000  # sandboxes
_PAUSE, _LONGEST_PAUSE = 2.0, 300.0  # seconds without direct requests after a failure; it doubles
_OFF = 600.0  # the same for a server that offers none
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Target(Generic[S]):
    """The state of one sandbox. server: of its worker, while the token is valid."""

    def __init__(self) -> None:
        self.uses = 0
        self.server: S | None = None
        self.proof = ""
        self.renew_at = 0.0
        self.expires_at = 0.0
        self.not_before = 0.0
        self.pause = _PAUSE

    def failed(self) -> None:
        """Its worker did not respond, or not as its worker."""
        self.server = None
        self.not_before = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)


class DirectRequests(Generic[S]):
    """base: the address of the server. make: a server from an address and a token. ask: a coroutine function that
    requests access to a sandbox."""

    def __init__(self, base: Address, make: Callable[[Address, str], S], ask: Callable[[str], Any]) -> None:
        self._base = base
        self._make = make
        self._ask = ask
        self._off_until = 0.0
        self._targets: OrderedDict[str, Target[S]] = OrderedDict()

    async def target(self, path: str) -> Target[S] | None:
        """Where a request goes instead of the server, whose worker is then known; None for the server."""
        if not path.startswith(PREFIX):
            return None
        path = path.partition("?")[0]
        now = time.monotonic()
        if now < self._off_until or not is_data(path):
            return None
        sandbox_id = path[len(PREFIX) :].partition("/")[0]
        found = self._targets.get(sandbox_id)
        if found is None:
            found = self._targets[sandbox_id] = Target()
            while len(self._targets) > _MOST:
                self._targets.popitem(last=False)
        found.uses += 1
        if found.server is not None and now < found.renew_at:
            return found
        if found.uses > _AFTER and now >= found.not_before:
            found.not_before = now + _PAUSE  # other calls of this process do not request it too
            await self._renew(sandbox_id, found)
        if found.server is not None and time.monotonic() >= found.expires_at:
            found.server = None
        return None if found.server is None else found

    async def _renew(self, sandbox_id: str, target: Target[S]) -> None:
        began = time.monotonic()
        try:
            access = await self._ask(sandbox_id)
            address = self._address(access)
        except errors.RockError as error:
            if isinstance(error, errors.ClientError) and (error.details.get("server") or error.status == 404):
                self._off_until = began + _OFF  # also an older server, which has no such route
            target.not_before = time.monotonic() + _PAUSE
            return
        if address is None:
            self._off_until = began + _OFF
            return
        seconds = float(access["seconds"])
        target.server, target.proof = self._make(address, str(access["token"])), str(access["proof"])
        target.renew_at, target.expires_at = began + seconds / 2, began + seconds - 1.0
        target.not_before = 0.0

    def _address(self, access: Any) -> Address | None:
        """The address of a worker that this client may use; None for one that it may not."""
        base = self._base
        if access.get("url"):
            found = Address.parse(str(access["url"]))
            return found if found.tls or not base.tls else None  # never less protected than the server
        if access.get("path") and base.host in _LOOPBACK and sys.platform == "linux":
            return Address(f"unix:{access['path']}", "localhost", 80, False, "", str(access["path"]))
        port = access.get("port")
        if not port or base.tls:
            return None
        host = f"[{base.host}]" if ":" in base.host else base.host
        return Address(f"http://{host}:{port}", base.host, int(port), False, "")


async def at_worker(
    direct: Target[Any],
    method: str,
    target: str,
    body: bytes | Source,
    timeout: float | None,
    key: str | None,
    content_type: str,
    whole: bool,
) -> tuple[Any, Connection | None, Answer] | None:
    """The answer of a worker to a request, as of `exchange` of a server; None when the server has to be asked, because
    nothing was begun there. Unavailable when the request is to be sent again."""
    server = direct.server
    assert server is not None
    try:
        connection, answer = await server.exchange(method, target, body, timeout, key, content_type, whole)
    except errors.Unavailable as error:
        direct.failed()
        if error.details.get("unsent") and isinstance(body, bytes):
            return None
        raise
    except errors.ServerError:  # not HTTP
        direct.failed()
        raise errors.Unavailable(f"{server.url} is not the worker", hint="try again", details=SENT) from None
    elsewhere = answer.status == errors.NotHere.status and answer.headers.get(ERROR_CODE) == errors.NotHere.code
    if answer.headers.get(DIRECT) == direct.proof and not elsewhere:
        return server, connection, answer
    if connection is not None and not whole:  # else it is released
        connection.close()
    direct.failed()
    if not isinstance(body, bytes):
        raise errors.Unavailable(f"{server.url} did not accept the request", hint="try again", details=SENT)
    return None
