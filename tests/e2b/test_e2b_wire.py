"""The E2B dialect by raw HTTP: credentials of other tenants, malformed and too large requests, and framing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from tests.conftest import RunningServer
from tests.e2b.conftest import DOMAIN, OWNER
from tests.leaks import Inventory
from tests.waiting import until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rock.protocol.keys import Access, CreateKey
from rock.sync import Client, Sandbox

UNARY, STREAM = "application/json", "application/connect+json"
Reply = tuple[int, Any, dict[str, str]]


def ask(
    server: RunningServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Reply:
    """(status, body, headers); a JSON body is parsed."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        data = json.dumps(body) if isinstance(body, dict | list) else body
        given = {"content-type": UNARY, **(headers or {})} if body is not None else headers or {}
        connection.request(method, path, data, given)
        reply = connection.getresponse()
        text = reply.read()
        found = {name.lower(): value for name, value in reply.getheaders()}
        with contextlib.suppress(ValueError):
            return reply.status, json.loads(text), found
        return reply.status, text, found
    finally:
        connection.close()


def control(server: RunningServer, key: str, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    return ask(server, method, f"/e2b{path}", body, {"X-API-KEY": key, **headers})


@pytest.fixture(scope="module")
def made(e2b: RunningServer, tenant: str) -> Iterator[dict[str, Any]]:
    """The response to a create."""
    status, found, _ = control(e2b, tenant, "POST", "/v2/sandboxes", {"templateID": "base", "timeout": 600})
    assert status == 201, found
    yield found
    control(e2b, tenant, "DELETE", f"/sandboxes/{found['sandboxID']}")


def inside(made: dict[str, Any], **more: str) -> dict[str, str]:
    return {"E2b-Sandbox-Id": made["sandboxID"], "E2b-Sandbox-Port": "49983", "X-Access-Token": made["envdAccessToken"],
            **more}  # fmt: skip


def rpc(server: RunningServer, made: dict[str, Any], method: str, message: Any, **headers: str) -> Reply:
    return ask(server, "POST", f"/e2b/{method}", message, inside(made, **headers))


def envelope(message: Any, flags: int = 0) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">BI", flags, len(data)) + data


def envelopes(data: bytes) -> list[tuple[int, Any]]:
    found = []
    while data:
        flags, length = struct.unpack_from(">BI", data)
        found.append((flags, json.loads(data[5 : 5 + length])))
        data = data[5 + length :]
    return found


def stream(server: RunningServer, made: dict[str, Any], method: str, body: bytes, **headers: str) -> Any:
    status, text, _ = ask(server, "POST", f"/e2b/{method}", body, {**inside(made, **headers), "content-type": STREAM})
    assert status == 200, text
    return envelopes(text if isinstance(text, bytes) else json.dumps(text).encode())


@contextlib.contextmanager
def started(
    server: RunningServer, made: dict[str, Any], body: bytes, method: str = "Start"
) -> Iterator[socket.socket]:
    """The connection of a Start or a Connect whose first event has arrived."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    headers = {**inside(made), "Host": host, "Content-Type": STREAM, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"POST /e2b/process.Process/{method} HTTP/1.1\r\n{head}\r\n".encode() + body)
        received = b""
        while b'"start"' not in received:
            received += connection.recv(4096)
        yield connection


# ---- credentials ----


def test_each_route_requires_a_credential(e2b: RunningServer, made: dict[str, Any]) -> None:
    sandbox_id = made["sandboxID"]
    routes = (("POST", "/v2/sandboxes"), ("GET", "/v2/sandboxes"), ("GET", f"/sandboxes/{sandbox_id}"),
              ("DELETE", f"/sandboxes/{sandbox_id}"), ("GET", "/snapshots"), ("GET", "/no/such"))  # fmt: skip
    for method, path in routes:
        assert ask(e2b, method, f"/e2b{path}")[0] == 401
        assert control(e2b, "wrong", method, path)[0] == 401
    named = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "49983"}
    tokens = ("", "wrong", made["envdAccessToken"][:-1] + "0" * (made["envdAccessToken"][-1] != "0") + "1",
              made["trafficAccessToken"])  # fmt: skip
    for token in tokens:
        for path in ("/health", "/files?path=/etc/passwd", "/metrics"):
            assert ask(e2b, "GET", f"/e2b{path}", None, {**named, "X-Access-Token": token})[0] == 401
    traffic = {**named, "E2B-Traffic-Access-Token": made["trafficAccessToken"]}
    assert ask(e2b, "GET", "/e2b/health", None, traffic)[0] == 401
    assert ask(e2b, "GET", "/files?path=/etc/passwd&signature=v1_" + "A" * 43)[0] == 401


def test_tenants_are_separate(e2b: RunningServer, made: dict[str, Any]) -> None:
    with Client(e2b.url, OWNER) as client:
        key = client.create_key(CreateKey(name="e2b", tenant="bob")).key
    sandbox_id = made["sandboxID"]
    assert control(e2b, key, "GET", f"/sandboxes/{sandbox_id}")[0] == 404
    assert control(e2b, key, "DELETE", f"/sandboxes/{sandbox_id}")[0] == 404
    assert control(e2b, key, "POST", f"/sandboxes/{sandbox_id}/connect", {"timeout": 1})[0] == 404
    assert control(e2b, key, "GET", "/v2/sandboxes")[1] == []
    # as for a sandbox that does not exist
    for path in ("/health", "/files?path=/etc/passwd"):
        found = ask(e2b, "GET", f"/e2b{path}", None, {"X-API-KEY": key, "E2b-Sandbox-Id": sandbox_id})
        assert found[0] == 502 and found[1]["message"] == "The sandbox was not found"
    # what the server holds of a sandbox is not reachable either
    foreign = {**made, "envdAccessToken": ""}
    watcher = rpc(e2b, made, "filesystem.Filesystem/CreateWatcher", {"path": "/tmp"})[1]["watcherId"]
    terminal = envelope({"process": {"cmd": "/bin/sh"}, "pty": {"size": {"rows": 9, "cols": 9}}, "tag": "shell"})
    with started(e2b, made, terminal):
        for method, message in (
            ("process.Process/SendInput", {"process": {"tag": "shell"}, "input": {"pty": "Cg=="}}),
            ("process.Process/SendSignal", {"process": {"tag": "shell"}, "signal": 9}), ("process.Process/List", {}),
            ("filesystem.Filesystem/RemoveWatcher", {"watcherId": watcher}),
        ):  # fmt: skip
            assert rpc(e2b, foreign, method, message, **{"X-API-KEY": key})[0] == 502
        port = {"X-API-KEY": key, "E2b-Sandbox-Port": "49999"}
        assert ask(e2b, "POST", "/e2b/contexts", {}, inside(made) | {"E2b-Sandbox-Port": "49999"})[0] == 201
        contexts = ask(e2b, "GET", "/e2b/contexts", None, inside(made) | {"E2b-Sandbox-Port": "49999"})[1]
        assert ask(e2b, "DELETE", f"/e2b/contexts/{contexts[0]['id']}", None, inside(foreign) | port)[0] == 502
        assert rpc(e2b, made, "process.Process/SendSignal", {"process": {"tag": "shell"}, "signal": 9})[0] == 200
    assert rpc(e2b, made, "filesystem.Filesystem/RemoveWatcher", {"watcherId": watcher})[0] == 200
    assert contexts == ask(e2b, "GET", "/e2b/contexts", None, inside(made) | {"E2b-Sandbox-Port": "49999"})[1]
    other = control(e2b, key, "POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60})[1]
    stolen = {**made, "envdAccessToken": other["envdAccessToken"]}
    assert ask(e2b, "GET", "/e2b/health", None, inside(stolen))[0] == 401  # a token is for one sandbox
    assert control(e2b, key, "DELETE", f"/sandboxes/{other['sandboxID']}")[0] == 204


def test_a_token_is_valid_as_long_as_its_key(e2b: RunningServer) -> None:
    with Client(e2b.url, OWNER) as client:
        key = client.create_key(CreateKey(name="e2b", tenant="carol"))
        other = client.create_key(CreateKey(name="e2b", tenant="carol")).key
        made = control(e2b, key.key, "POST", "/v2/sandboxes", {"timeout": 60})[1]
        assert ask(e2b, "GET", "/e2b/health", None, inside(made))[0] == 204
        client.revoke_key(key.id)
    assert ask(e2b, "GET", "/e2b/health", None, inside(made))[0] == 401
    assert control(e2b, other, "DELETE", f"/sandboxes/{made['sandboxID']}")[0] == 204


def test_a_key_that_may_only_read(e2b: RunningServer, made: dict[str, Any]) -> None:
    with Client(e2b.url, OWNER) as client:
        key = client.create_key(CreateKey(name="reader", tenant="alice", scopes=[Access.READ])).key
    assert control(e2b, key, "POST", "/v2/sandboxes", {"timeout": 60})[0] == 403
    assert control(e2b, key, "POST", f"/sandboxes/{made['sandboxID']}/timeout", {"timeout": 1})[0] == 403
    reads = control(e2b, key, "GET", f"/sandboxes/{made['sandboxID']}")[1]
    assert ask(e2b, "GET", "/e2b/files?path=/etc/hostname", None, inside(reads))[0] in (200, 404)
    start = {"process": {"cmd": "/bin/true"}}
    assert ask(e2b, "POST", "/e2b/process.Process/Start", envelope(start),
               {**inside(reads), "content-type": STREAM})[0] in (200, 403)  # fmt: skip
    status, found, _ = rpc(e2b, reads, "filesystem.Filesystem/MakeDir", {"path": "/tmp/x"})
    assert status == 403 and found["code"] == "permission_denied"
    port = {**inside(reads), "E2b-Sandbox-Port": "8000"}
    assert ask(e2b, "GET", "/e2b/x", None, port)[0] == 403


# ---- the control plane ----


@pytest.mark.parametrize("body", [
    b"{", b"[]", b'"x"', b"\xff\xfe", {"timeout": -1}, {"timeout": "soon"}, {"timeout": 1e300}, {"timeout": True,
    "metadata": 3}, {"templateID": "x" * 500}, {"templateID": 3}, {"metadata": {"a": 1}}, {"envVars": {"A=B": "1"}},
    {"envVars": {"A": "\0"}}, {"unknown": 1}, {"network": {"rules": {"a": 1}}}, {"volumeMounts": [{"name": "../x",
    "path": "/x"}]}, {"templateID": "a b\0"}, {"network": {"allowOut": ["not an address!"], "denyOut": ["0.0.0.0/0"]}},
])  # fmt: skip
def test_a_wrong_create_is_refused(e2b: RunningServer, tenant: str, body: Any) -> None:
    status, found, _ = control(e2b, tenant, "POST", "/v2/sandboxes", body)
    assert status in (400, 404) and isinstance(found["message"], str) and found["code"] == status, found


@pytest.mark.parametrize("query", [
    "limit=0", "limit=x", "nextToken=x", "state=sleeping", "order=up", "startedAfter=yesterday", "unknown=1",
    "startedAfter=99999-01-01T00:00:00Z",
])  # fmt: skip
def test_a_wrong_list_is_refused(e2b: RunningServer, tenant: str, query: str) -> None:
    assert control(e2b, tenant, "GET", f"/v2/sandboxes?{query}")[0] == 400


def test_unknown_routes_and_methods(e2b: RunningServer, tenant: str) -> None:
    assert control(e2b, tenant, "GET", "/no/such")[0] == 404
    assert control(e2b, tenant, "PATCH", "/v2/sandboxes")[0] == 405
    for sandbox_id in ("..", "a%2F..%2Fb", "x" * 300, "%00", "-"):
        assert control(e2b, tenant, "GET", f"/sandboxes/{sandbox_id}")[0] == 404
    status, found, _ = control(e2b, tenant, "GET", "/templates/x/tags")
    assert status == 400 and "is not supported" in found["message"] and found["error_code"] == "unsupported"
    assert control(e2b, tenant, "POST", "/v2/sandboxes", {"timeout": 9}, **{"Idempotency-Key": "a b"})[0] == 400


DIGEST = "a" * 64


@pytest.mark.parametrize("step", [
    {"type": "RUN"}, {"type": "ENV", "args": ["A"]}, {"type": "ENV", "args": ["A B", "1"]},
    {"type": "ENV", "args": ["A", "1\nRUN x"]}, {"type": "USER", "args": ["x\nRUN y"]},
    {"type": "RUN", "args": ["x", "a b"]},
    {"type": "WORKDIR", "args": ["/a", "/b"]}, {"type": "ENTRYPOINT", "args": ["x"]},
    {"type": "COPY", "args": ["a", "/b"]}, {"type": "COPY", "args": ["../a", "/b"], "filesHash": DIGEST},
    {"type": "COPY", "args": ["a", "/b", "", "x y"], "filesHash": DIGEST}, {"type": "COPY", "args": ["a", "/b"],
    "filesHash": "../../x"}, {"type": "COPY", "args": ["a", "/b"], "filesHash": DIGEST},
])  # fmt: skip
def test_a_wrong_step_of_a_build(e2b: RunningServer, tenant: str, step: dict[str, Any]) -> None:
    status, made, _ = control(e2b, tenant, "POST", "/v3/templates", {"name": "wrong"})
    assert status == 202
    path = f"/v2/templates/{made['templateID']}/builds/{made['buildID']}"
    status, found, _ = control(e2b, tenant, "POST", path, {"fromTemplate": "base", "steps": [step]})
    assert status == 400 and found["message"], found


def test_builds_of_others(e2b: RunningServer, tenant: str) -> None:
    with Client(e2b.url, OWNER) as client:
        weak = client.create_key(CreateKey(name="e2b", tenant="dave")).key
        scopes = [Access.READ, Access.CREATE, Access.IMAGES]
        other = client.create_key(CreateKey(name="e2b", tenant="erin", scopes=scopes)).key
    assert control(e2b, weak, "POST", "/v3/templates", {"name": "x"})[0] == 403
    made = control(e2b, tenant, "POST", "/v3/templates", {"name": "mine"})[1]
    path = f"/templates/{made['templateID']}"
    assert control(e2b, other, "GET", f"{path}/builds/{made['buildID']}/status")[0] == 404
    assert control(e2b, other, "POST", f"/v2{path}/builds/{made['buildID']}", {"fromTemplate": "base"})[0] == 404
    for name in ("../x", "a b", "base", "a" * 200, ""):
        assert control(e2b, tenant, "POST", "/v3/templates", {"name": name})[0] == 400
    assert control(e2b, tenant, "GET", f"{path}/files/x")[0] == 400
    link = control(e2b, tenant, "GET", f"{path}/files/{DIGEST}")[1]
    assert link["present"] is False
    upload = link["url"].removeprefix(e2b.url)
    assert ask(e2b, "PUT", upload[:-1] + ("0" if upload[-1] != "0" else "1"), b"x")[0] == 401
    assert ask(e2b, "PUT", upload.replace("a" * 64, "b" * 64), b"x")[0] == 401
    assert ask(e2b, "PUT", upload, b"no tar")[0] == 200
    assert control(e2b, tenant, "GET", f"{path}/files/{DIGEST}")[1]["present"] is True
    assert control(e2b, other, "GET", f"{path}/files/{DIGEST}")[1]["present"] is False
    steps = [{"type": "COPY", "args": ["a", "/b"], "filesHash": DIGEST}]
    spec = {"fromTemplate": "base", "steps": steps}
    assert control(e2b, tenant, "POST", f"/v2{path}/builds/{made['buildID']}", spec)[0] == 202
    status = f"{path}/builds/{made['buildID']}/status"
    until(lambda: control(e2b, tenant, "GET", status)[1]["status"] == "error", 30)
    assert "no tar" in control(e2b, tenant, "GET", status)[1]["reason"]["message"]


def test_older_routes(e2b: RunningServer, tenant: str) -> None:
    status, found, _ = control(e2b, tenant, "POST", "/sandboxes", {"templateID": "base", "timeout": 60, "secure": True})
    assert status == 201
    path = f"/sandboxes/{found['sandboxID']}"
    listed = control(e2b, tenant, "GET", "/sandboxes?state=running,paused")[1]
    assert listed[0]["sandboxID"] == found["sandboxID"]  # the newest
    assert control(e2b, tenant, "POST", f"{path}/refreshes", {"duration": 90})[0] == 204
    assert control(e2b, tenant, "POST", f"{path}/pause", {})[0] == 204
    assert control(e2b, tenant, "POST", f"{path}/pause", {})[0] == 409
    assert control(e2b, tenant, "POST", f"{path}/resume", {"timeout": 60})[0] == 201
    assert control(e2b, tenant, "DELETE", path)[0] == 204
    assert control(e2b, tenant, "DELETE", path)[0] == 404


# ---- the data plane ----


@pytest.mark.parametrize("sandbox_id", ["..", "../../x", "a/b", "x" * 200, "%2e%2e", "none"])
def test_a_sandbox_that_does_not_exist(e2b: RunningServer, tenant: str, sandbox_id: str) -> None:
    headers = {"X-API-KEY": tenant, "E2b-Sandbox-Id": sandbox_id}
    for method, path in (("GET", "/health"), ("GET", "/files?path=/x"), ("POST", "/process.Process/List")):
        status, found, _ = ask(e2b, method, f"/e2b{path}", {} if method == "POST" else None, headers)
        assert status == 502 and found["message"] == "The sandbox was not found", found


@pytest.mark.parametrize("port", ["0", "65536", "x", "049983", "-1", "１２"])
def test_a_wrong_port(e2b: RunningServer, made: dict[str, Any], port: str) -> None:
    headers = inside(made) | {"E2b-Sandbox-Port": port.encode().decode("latin-1")}
    assert ask(e2b, "GET", "/e2b/health", None, headers)[0] == 400


@pytest.mark.parametrize(("method", "message", "code"), [
    ("process.Process/List", b"{", "invalid_argument"), ("process.Process/List", b"[]", "invalid_argument"),
    ("process.Process/SendSignal", {"process": {"pid": 1 << 40}, "signal": 9}, "invalid_argument"),
    ("process.Process/SendSignal", {"process": {"pid": 4_000_000}, "signal": 9}, "not_found"),
    ("process.Process/SendSignal", {"process": {"pid": 5}, "signal": "SIGNAL_NONE"}, "invalid_argument"),
    ("process.Process/SendSignal", {"signal": 9}, "invalid_argument"),
    ("process.Process/SendInput", {"process": {"pid": 4_000_000}, "input": {"stdin": "!"}}, "not_found"),
    ("process.Process/Update", {"process": {"tag": "none"}}, "not_found"),
    ("filesystem.Filesystem/Stat", {"path": 3}, "invalid_argument"),
    ("filesystem.Filesystem/Stat", {"path": "/\0"}, "invalid_argument"),
    ("filesystem.Filesystem/Stat", {"path": "/none"}, "not_found"),
    ("filesystem.Filesystem/ListDir", {"path": "/tmp", "depth": -1}, "invalid_argument"),
    ("filesystem.Filesystem/Move", {"source": "/none", "destination": "/tmp/x"}, "not_found"),
    ("filesystem.Filesystem/GetWatcherEvents", {"watcherId": "none"}, "not_found"),
])  # fmt: skip
def test_a_wrong_unary_call(e2b: RunningServer, made: dict[str, Any], method: str, message: Any, code: str) -> None:
    status, found, _ = rpc(e2b, made, method, message)
    assert found["code"] == code and 400 <= status < 500 and found["message"], found


def test_other_codecs_and_compression_are_refused(e2b: RunningServer, made: dict[str, Any]) -> None:
    for headers in ({"content-type": "application/proto"}, {"content-encoding": "gzip"}):
        status, found, _ = ask(e2b, "POST", "/e2b/process.Process/List", b"{}",
                               {"content-type": UNARY, **inside(made), **headers})  # fmt: skip
        assert status == 501 and found["code"] == "unimplemented"
    assert rpc(e2b, made, "process.Process/None", {})[0] == 404


@pytest.mark.parametrize(("body", "code"), [
    (b"", "invalid_argument"), (b"\0\0", "invalid_argument"), (envelope(b"{"), "invalid_argument"),
    (envelope({"process": {}}), "invalid_argument"), (envelope({"process": {"cmd": "x"}}, 1), "unimplemented"),
    (struct.pack(">BI", 0, 100) + b"{}", "invalid_argument"),
    (struct.pack(">BI", 0, (1 << 32) - 1) + b"{}", "resource_exhausted"),
    (envelope({"process": {"cmd": "/bin/true", "envs": {"A=B": "1"}}}), "invalid_argument"),
    (envelope({"process": {"cmd": "/bin/true", "args": "x"}}), "invalid_argument"),
    (envelope({"process": {"cmd": "/no/such/program"}}), "invalid_argument"),
    (envelope({"process": {"cmd": "/bin/true", "cwd": "/none"}}), "invalid_argument"),
    (envelope({"process": {"cmd": "/bin/sh"}, "pty": {"size": {"rows": 1 << 30}}}), "invalid_argument"),
])  # fmt: skip
def test_a_wrong_stream(e2b: RunningServer, made: dict[str, Any], body: bytes, code: str) -> None:
    (flags, last), = stream(e2b, made, "process.Process/Start", body)
    assert flags == 2 and last["error"]["code"] == code and last["error"]["message"]


def test_a_stream_of_events(e2b: RunningServer, made: dict[str, Any]) -> None:
    start = {"process": {"cmd": "/bin/sh", "args": ["-c", "echo out; echo err >&2; exit 7"]}, "tag": "mine"}
    found = stream(e2b, made, "process.Process/Start", envelope(start))
    events = [message["event"] for flags, message in found[:-1] if flags == 0]
    assert found[-1] == (2, {}) and events[0]["start"]["pid"] > 0
    data = {kind: base64.b64decode(text) for event in events[1:-1] for kind, text in event["data"].items()}
    assert data == {"stdout": b"out\n", "stderr": b"err\n"}
    assert events[-1]["end"] == {"exitCode": 7, "exited": True, "status": "exit status 7", "error": "exit status 7"}


def test_the_time_limit_kills_the_program(e2b: RunningServer, made: dict[str, Any]) -> None:
    start = envelope({"process": {"cmd": "/bin/sleep", "args": ["97531"]}})
    found = stream(e2b, made, "process.Process/Start", start, **{"connect-timeout-ms": "300"})
    assert found[-1][1]["error"]["code"] == "deadline_exceeded"
    assert rpc(e2b, made, "process.Process/List", {})[1]["processes"] == []
    found = stream(e2b, made, "process.Process/Start", start, **{"connect-timeout-ms": "soon"})
    assert found[-1][1]["error"]["code"] == "invalid_argument"


def test_a_disconnect_does_not_end_the_program(e2b: RunningServer, made: dict[str, Any]) -> None:
    body = envelope({"process": {"cmd": "/bin/sh", "args": ["-c", "sleep 86420"]}, "tag": "left"})
    with started(e2b, made, body) as connection:
        assert connection.fileno() >= 0
    listed = rpc(e2b, made, "process.Process/List", {})[1]["processes"]
    assert [each["tag"] for each in listed] == ["left"]
    signal = {"process": {"tag": "left"}, "signal": "SIGNAL_SIGTERM"}
    assert rpc(e2b, made, "process.Process/SendSignal", signal)[0] == 200
    until(lambda: rpc(e2b, made, "process.Process/List", {})[1]["processes"] == [], 30)


def test_input_as_a_stream(e2b: RunningServer, made: dict[str, Any]) -> None:
    program = {"process": {"cmd": "/bin/sh", "args": ["-c", "cat > /tmp/streamed"]}, "tag": "reader", "stdin": True}
    body = envelope(program)
    with started(e2b, made, body) as connection:
        selector = {"tag": "reader"}
        data = [{"data": {"input": {"stdin": base64.b64encode(each).decode()}}} for each in (b"one ", b"two")]
        parts = [{"start": {"process": selector}}, {"keepalive": {}}, *data]
        sent = stream(e2b, made, "process.Process/StreamInput", b"".join(map(envelope, parts)))
        assert sent == [(0, {}), (2, {})]
        wrong = stream(e2b, made, "process.Process/StreamInput", envelope(parts[2]))
        assert wrong[-1][1]["error"]["code"] == "failed_precondition"
        assert rpc(e2b, made, "process.Process/CloseStdin", {"process": selector})[0] == 200
        received = b""
        while b'"end"' not in received:
            received += connection.recv(4096)
    assert ask(e2b, "GET", "/e2b/files?path=/tmp/streamed", None, inside(made))[1] == b"one two"


def test_a_signed_url_is_for_its_user(e2b: RunningServer, made: dict[str, Any]) -> None:
    token, path = made["envdAccessToken"], "/tmp/of-user"
    digest = hashlib.sha256(f"{path}:write:daemon:{token}".encode()).digest()
    query = urlencode({"path": path, "username": "daemon", "signature": f"v1_{base64.b64encode(digest).decode()[:43]}"})
    root = {"Authorization": f"Basic {base64.b64encode(b'root:').decode()}", "content-type": "application/octet-stream"}
    assert ask(e2b, "POST", f"/files?{query}", b"x", root)[0] == 200
    found = rpc(e2b, made, "filesystem.Filesystem/Stat", {"path": path})[1]["entry"]
    assert found["owner"] == "daemon"
    assert ask(e2b, "POST", f"/files?{query.replace('daemon', 'root')}", b"x", root)[0] == 401


# ---- files ----


@pytest.mark.parametrize(("kind", "body", "query"), [
    ("application/octet-stream", b"x", ""), ("multipart/form-data", b"x", ""), ("text/plain", b"x", "?path=/tmp/x"),
    ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx\r\n--b--", ""),
    ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nx\r\n--b--", ""),
    ("multipart/form-data; boundary=b", b"--b\r\nno end", ""),
    ("application/octet-stream", b"x", "?path=%00"), ("application/octet-stream", b"x", "?path=~other/x"),
])  # fmt: skip
def test_a_wrong_upload(e2b: RunningServer, made: dict[str, Any], kind: str, body: bytes, query: str) -> None:
    status, found, _ = ask(e2b, "POST", f"/e2b/files{query}", body, {**inside(made), "content-type": kind})
    assert status == 400 and found["message"], found


def test_compressed_uploads(e2b: RunningServer, made: dict[str, Any]) -> None:
    headers = {**inside(made), "content-type": "application/octet-stream"}
    for encoding, body in (("gzip", b"no gzip"), ("gzip", b"\x1f\x8b\x08\0\0\0\0\0"), ("br", b"x")):
        found = ask(e2b, "POST", "/e2b/files?path=/tmp/c", body, {**headers, "content-encoding": encoding})
        assert found[0] == 400, found
    assert ask(e2b, "GET", "/e2b/files?path=/tmp/c", None, inside(made))[0] == 404
    assert ask(e2b, "POST", "/e2b/files?path=/tmp/m", b"x", {**headers, "X-Metadata-a": "1"})[0] == 400


# ---- the code interpreter, and ports ----


def test_wrong_requests_to_the_interpreter(e2b: RunningServer, made: dict[str, Any]) -> None:
    headers = {**inside(made), "E2b-Sandbox-Port": "49999"}
    for body in (b"{", {}, {"code": 3}, {"code": "1", "language": "r"}, {"code": "1", "env_vars": {"A=": "1"}},
                 {"code": "1", "unknown": 1}):  # fmt: skip
        assert ask(e2b, "POST", "/e2b/execute", body, headers)[0] == 400
    assert ask(e2b, "POST", "/e2b/execute", {"code": "1", "context_id": "none"}, headers)[0] == 404
    assert ask(e2b, "DELETE", "/e2b/contexts/none", None, headers)[0] == 404
    assert ask(e2b, "POST", "/e2b/contexts", {"cwd": "/none"}, headers)[0] == 400


def test_lines_that_are_no_events_of_the_cell_are_skipped(e2b: RunningServer, made: dict[str, Any]) -> None:
    lines = b'{"id":"x","type":"done"}\nnot json\n[1]\n'
    code = f"""
import os
for fd in range(3, 20):
    try:
        os.write(fd, {lines!r})
    except OSError:
        pass
print('after')
"""
    headers = {**inside(made), "E2b-Sandbox-Port": "49999"}
    status, found, _ = ask(e2b, "POST", "/e2b/execute", {"code": code}, headers)
    assert status == 200 and b'"text":"after\\n"' in found


def test_websockets_of_ports(e2b: RunningServer, made: dict[str, Any]) -> None:
    url = e2b.url.replace("http", "ws") + "/e2b/x"
    named = {**inside(made), "E2b-Sandbox-Port": "8123"}
    for headers, status in ((named | {"E2b-Sandbox-Id": "none", "X-API-KEY": OWNER}, 502), ({}, 401),
                            ({"X-API-KEY": OWNER}, 404), (named, 503)):  # fmt: skip
        with pytest.raises(InvalidStatus) as caught:
            connect(url, additional_headers=headers, proxy=None, open_timeout=60)
        assert caught.value.response.status_code == status, headers


def test_hosts_of_ports(e2b: RunningServer, made: dict[str, Any]) -> None:
    sandbox_id = made["sandboxID"]
    closed = ask(e2b, "GET", "/", None, {"Host": f"8123-{sandbox_id}.{DOMAIN}"})
    assert closed[0] == 502 and "port is not open" in closed[1]["message"]
    gone = ask(e2b, "GET", "/", None, {"Host": f"8123-{'0' * 32}.{DOMAIN}"})
    assert gone[0] == 502 and gone[1]["message"] == "The sandbox was not found"
    with Sandbox("host", memory="64m", cpus=0.1, base_url=e2b.url, api_key=OWNER) as native:  # not of this dialect
        native.processes.start(["python3", "-m", "http.server", "8123", "--bind", "127.0.0.1"])
        path = f"/v1/sandboxes/{native.sandbox_id}/ports/8123/"
        until(lambda: ask(e2b, "GET", path, None, {"X-API-KEY": OWNER})[0] == 200, 30)
        closed = ask(e2b, "GET", "/", None, {"Host": f"8123-{native.sandbox_id}.{DOMAIN}"})
        assert closed[0] == 502 and closed[1]["message"] == "The sandbox was not found"
    for host in (f"0-{sandbox_id}.{DOMAIN}", f"99999-{sandbox_id}.{DOMAIN}", f"8123-{sandbox_id}.other", DOMAIN):
        assert ask(e2b, "GET", "/v1/sandboxes", None, {"Host": host})[0] == 401


# ---- crashes of the server ----


def test_a_crash_of_the_server(everything: None, tmp_path: Path) -> None:
    """Tokens, deadlines and programs survive it; a pause too."""
    server = RunningServer(tmp_path, ROCK_API_KEY=OWNER, ROCK_E2B_NETWORK="none", ROCK_E2B_MEMORY="256m")
    server.start()
    made = control(server, OWNER, "POST", "/v2/sandboxes", {"timeout": 600})[1]
    paused = control(server, OWNER, "POST", "/v2/sandboxes", {"timeout": 600})[1]
    assert control(server, OWNER, "POST", f"/sandboxes/{paused['sandboxID']}/pause", {})[0] == 204
    command = "while [ ! -e /tmp/go ]; do sleep 0.05; done; echo went; exit 5"
    with started(server, made, envelope({"process": {"cmd": "/bin/sh", "args": ["-c", command]}})):
        (program,) = rpc(server, made, "process.Process/List", {})[1]["processes"]
        server.kill()
    server.start()
    (same,) = rpc(server, made, "process.Process/List", {})[1]["processes"]
    assert (same["pid"], same["config"]["args"]) == (program["pid"], ["-c", command])
    with started(server, made, envelope({"process": {"pid": program["pid"]}}), "Connect") as connection:
        headers = {**inside(made), "content-type": "application/octet-stream"}
        assert ask(server, "POST", "/e2b/files?path=/tmp/go", b"", headers)[0] == 200
        received = b""
        while b'"exitCode":5' not in received:
            received += connection.recv(4096)
    assert base64.b64encode(b"went\n") in received
    assert control(server, OWNER, "GET", f"/sandboxes/{paused['sandboxID']}")[1]["state"] == "paused"
    assert control(server, OWNER, "POST", f"/sandboxes/{paused['sandboxID']}/connect", {"timeout": 1})[0] == 201
    ended = f"/sandboxes/{paused['sandboxID']}"
    until(lambda: control(server, OWNER, "GET", ended)[0] == 404, 30, "the timeout is not enforced")
    server.stop()
    server.assert_clean(Inventory())


def test_the_audit_log_names_calls(e2b: RunningServer, tenant: str) -> None:
    made = control(e2b, tenant, "POST", "/v2/sandboxes", {"timeout": 60})[1]["sandboxID"]
    assert control(e2b, tenant, "POST", f"/sandboxes/{made}/timeout", {"timeout": 50})[0] == 204
    assert control(e2b, tenant, "DELETE", f"/sandboxes/{made}")[0] == 204

    def actions() -> list[str]:
        items = ask(e2b, "GET", f"/v1/audit?target={made}", None, {"X-API-KEY": OWNER})[1]["items"]
        return [f"{item['tenant']} {item['action']} {item['status']}" for item in reversed(items)]

    expected = ["alice e2b:sandboxes 201", "alice e2b:sandboxes/timeout 204", "alice e2b:sandboxes 204"]
    until(lambda: actions() == expected, 30)
