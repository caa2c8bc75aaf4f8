"""Requests without a key, on a server that asks for none.

Such a server serves its owner alone. A request without the owner key is let in when
1. Host names this server: a name or address of loopback, the address that it listens on, or a name of
   ROCK_PUBLIC_NAMES. A web page under a name that leads to 127.0.0.1 (DNS rebinding) has another one;
2. it comes from no page of another origin, by Origin and Sec-Fetch-Site, which programs do not send;
3. the kernel says that its socket is held by processes of the owner, or of root, outside of any sandbox: wire/peers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rock.admin.starting import is_loopback
from rock.errors import Unauthorized
from rock.wire.asgi import Scope
from rock.wire.peers import PEER

_HINT = ("use the account that started the server, or send the key that is in owner.key in its ROCK_HOME as header "
         "X-ROCK-API-Key (SDK and CLI: ROCK_API_KEY), or start the server with ROCK_API_KEY")  # fmt: skip
# Pages of programs inside have an origin of their own (port_headers.py): what they load is on a foreign site.
_PORTS = re.compile(r"/v1/sandboxes/[^/]+/ports/|/apis/envs/sandbox/v1/sandboxes/[^/]+/(?:proxy|vnc)(?:/|$)")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]@/?#\s]*)(?::[0-9]{1,5})?")


def names_of(host: str, public: str) -> frozenset[str]:
    """By what a server may be called: the address that it listens on, and those of ROCK_PUBLIC_NAMES."""
    names = [host, *public.split(",")]
    return frozenset(name.strip().lower().rstrip(".").strip("[]") for name in names if name.strip())


def check_host(scope: Scope, names: frozenset[str]) -> None:
    """Unauthorized when Host is none of `names`, nor a name of loopback."""
    found = [value for name, value in scope["headers"] if name == b"host"]
    if not found and scope.get("http_version") == "1.0":
        return
    text = found[0].decode("latin-1") if len(found) == 1 else ""
    match = _HOST.fullmatch(text)
    name = str(match[1]).strip("[]").lower().rstrip(".") if match is not None else ""
    if not name or not (is_loopback(name) or name in names):
        raise Unauthorized(
            f"Host: {text[:100]!r} is no name of this server" if found else "the request has no Host",
            hint="call it by an address of loopback, or add the name to ROCK_PUBLIC_NAMES of the server",
        )


def check_origin(scope: Scope) -> None:
    """Unauthorized for what a page of another origin sends."""
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    scheme = b"https" if scope["scheme"] in ("https", "wss") else b"http"
    if any(origin != scheme + b"://" + host for origin in origins):
        raise Unauthorized("the request comes from a web page of another origin", hint=_HINT)
    fetched = {name: value for name, value in scope["headers"] if name.startswith(b"sec-fetch-")}
    if fetched.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin"):
        return
    reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and not origins
    followed = fetched.get(b"sec-fetch-mode") == b"navigate" and fetched.get(b"sec-fetch-user") == b"?1"
    if not reads or not (followed or _PORTS.match(scope["path"])):
        raise Unauthorized("the request comes from a web page of another site", hint=_HINT)


async def check_owner(scope: Scope) -> None:
    """Unauthorized unless the kernel says that the client is the owner of this process, outside of any sandbox."""
    peer = (scope.get("state") or {}).get(PEER)
    problem = "the connection has no socket" if peer is None else await peer.refusal()
    if problem:
        raise Unauthorized(f"a request without a key has to come from the owner of this server, and {problem}",
                           hint=_HINT)  # fmt: skip


class Keyless:
    """The three checks in one. open_paths: for everybody, as far as the first two let them in."""

    def __init__(self, names: frozenset[str], open_paths: Iterable[str] = ()) -> None:
        self._names = names
        self._open = frozenset(open_paths)

    async def admits(self, scope: Scope) -> bool:
        """Whether the client is the owner; False on an open path, on which that is not looked at. Unauthorized."""
        check_host(scope, self._names)
        check_origin(scope)
        if scope["type"] == "http" and scope["path"] in self._open:
            return False
        await check_owner(scope)
        return True
