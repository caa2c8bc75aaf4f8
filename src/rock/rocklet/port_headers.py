"""What a request to a port and its answer say to the other side: pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

from rock.errors import NotFound, PortFailed
from rock.protocol.routes import ANSWER_WITHIN, ERROR_CODE, HANDED_ON, OTHER_KEY
from rock.rocklet.dialled import port_of
from rock.wire.asgi import Request

Headers = list[tuple[bytes, bytes]]

PREFIX = "rock.prefix"  # in a scope: the path under which the caller asked for the port, where it is not ours
MOST_HEADERS = 256
_HOP_BY_HOP = {
    b"connection", b"expect", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
    b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_OURS = {name.encode() for name in (ANSWER_WITHIN, OTHER_KEY, ERROR_CODE, HANDED_ON)}
_REPLACED = {b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-prefix", b"x-forwarded-proto"}
# They would speak for the whole server, which is not the program's.
_FOR_ALL = {b"alt-svc", b"clear-site-data", b"service-worker-allowed", b"strict-transport-security"}
# A browser must not let a page from a sandbox act as a page of this server, which could drive its API.
_CONFINED = (b"content-security-policy", b"sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts")
_CONTROL = bytes([*range(9), *range(10, 32), 127])
_HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}


@dataclass(frozen=True)
class Target:
    """What is asked of which port. path: with the query, as it was written. prefix: leads to the port from outside."""

    port: int
    path: bytes
    prefix: str
    outside: str

    @property
    def host(self) -> str:
        """As a program on the same machine would name it: development servers refuse other names."""
        return f"localhost:{self.port}"


def target_of(request: Request) -> Target:
    """What a request asks for. InvalidConfig, NotFound."""
    port = port_of(request.path["port"])
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    parts = raw.split(b"/", 6)  # "", v1, sandboxes, ID, ports, PORT, the rest
    known = ["v1", "sandboxes", request.path["sandbox_id"], "ports", request.path["port"]]
    if [unquote_to_bytes(part) for part in parts[1:6]] != [part.encode() for part in known]:
        raise NotFound(f"no such route: {request.scope['path']}")  # a slash of it was written as %2F
    rest = b"/" + (parts[6] if len(parts) > 6 else b"")
    query: bytes = request.scope.get("query_string", b"")
    own = request.scope.get(PREFIX) or f"/v1/sandboxes/{request.path['sandbox_id']}/ports/{port}"
    outer = (request.header(b"x-forwarded-prefix") or "").rstrip("/")
    outside = request.header(b"x-forwarded-host") or request.header(b"host") or ""
    return Target(port, rest + (b"?" + query if query else b""), outer + own, outside)


def _kept(headers: Headers, *more: set[bytes]) -> Headers:
    """Those that are not for the next hop only."""
    drop = set().union(_HOP_BY_HOP, *more)
    for name, value in headers:
        if name.lower() == b"connection":
            drop |= {word.strip().lower() for word in value.split(b",")}
    return [(name, value) for name, value in headers if name.lower() not in drop]


def inward(request: Request, target: Target) -> Headers:
    """Headers for the program inside, without Host and framing."""
    client = (request.scope.get("client") or ("",))[0]
    chain = [part.strip() for part in (request.header(b"x-forwarded-for") or "").split(",")]
    if client not in chain:  # a server that trusts what is in front of it has taken the client from there
        chain.append(client)
    scheme = {"ws": "http", "wss": "https"}.get(request.scope["scheme"], request.scope["scheme"])
    told = {
        "x-forwarded-for": ", ".join(part for part in chain if part),
        "x-forwarded-host": target.outside,
        "x-forwarded-prefix": target.prefix,
        "x-forwarded-proto": request.header(b"x-forwarded-proto") or scheme,
    }
    kept = _kept(request.headers, _REPLACED, _OURS)
    return [*kept, *((name.encode(), value.encode("latin-1")) for name, value in told.items() if value)]


def outward(status: int, headers: Headers, target: Target) -> Headers:
    """Headers for the client. PortFailed when the program's cannot be passed on."""
    if not 200 <= status < 600:
        raise PortFailed(f"port {target.port} answered with the status {status}")
    if len(headers) > MOST_HEADERS:
        raise PortFailed(f"port {target.port} answered with {len(headers)} headers; {MOST_HEADERS} are let through")
    drop = set(_FOR_ALL | _OURS)
    if status in (204, 304) or any(name == b"transfer-encoding" for name, _ in headers):
        drop.add(b"content-length")
    passed = []
    for name, value in _kept(headers, drop):
        if value.translate(None, _CONTROL) != value:
            raise PortFailed(f"port {target.port} answered with control characters in {name.decode('latin-1')!r}")
        passed.append((name, relocated(value, target) if name == b"location" else value))
    return [*passed, _CONFINED]


def relocated(location: bytes, target: Target) -> bytes:
    """A redirection as the client has to see it: one to the same port stays on it."""
    text = location.decode("latin-1")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return location
    if host is None:
        if parts.scheme or not text.startswith("/"):
            return location  # relative to the page, or no address of HTTP
    elif parts.netloc != target.outside and (host not in _HERE or port != target.port):
        return location
    path = text[len(text) - len(text.split("//", 1)[1]) + len(parts.netloc) :] if host is not None else text
    if path == target.prefix or path.startswith(target.prefix + "/"):
        return path.encode("latin-1")  # it knows X-Forwarded-Prefix
    return f"{target.prefix}{path if path.startswith('/') else '/' + path}".encode("latin-1")
