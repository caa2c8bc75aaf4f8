"""Direct requests of clients to the worker of a sandbox: without the proxy, and with all of its checks."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import members_of
from tests.waiting import until

from rock.errors import NotFound, RockError, Unauthorized, Unsupported
from rock.http.direct import LIFETIME, DirectRequests, Grant, granted, signed
from rock.protocol.keys import GRANTED, OPERATOR, Access, Caller, CreateKey
from rock.sdk.http import Address
from rock.sync import Client, Sandbox, SandboxConfig


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("direct")
    give_image(home)
    running = RunningServer(home, ROCK_PROCESSES="2", ROCK_API_KEY=KEY)
    running.start()
    yield running
    running.stop()


def box(url: str, key: str = KEY, **fields: Any) -> Sandbox:
    config = {"base_url": url, "api_key": key, "image": IMAGE, "memory": "128m", **fields}
    sandbox = Sandbox(SandboxConfig.model_validate(config))
    sandbox.start()
    return sandbox


def access_to(url: str, sandbox_id: str, key: str = KEY) -> dict[str, Any]:
    with Client(url, key) as client:
        found: dict[str, Any] = client.transport.json("GET", f"/v1/sandboxes/{sandbox_id}/direct")
        return found


def warmed(sandbox: Sandbox) -> Sandbox:
    """After enough requests for direct ones."""
    for _ in range(12):
        assert sandbox.run("true").exit_code == 0
    return sandbox


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not run for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Plain(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


def status_of(path: str, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> int:
    connection = Plain(path)
    try:
        connection.request(method, target, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_requests_reach_the_process_without_the_server(pair: RunningServer) -> None:
    with box(pair.url) as sandbox:
        warmed(sandbox)
        with stopped(pair.pid):
            began = time.monotonic()
            assert [sandbox.run(f"echo {number}").output for number in range(20)] == [f"{n}\n" for n in range(20)]
            sandbox.files.write("/root/file", "content")
            assert sandbox.files.read("/root/file") == b"content"
            assert time.monotonic() - began < 8, "longer than a token is valid"
        assert sandbox.run("cat /root/file").output == "content"


def test_a_token_is_for_one_sandbox_and_its_data(pair: RunningServer) -> None:
    with box(pair.url) as one, box(pair.url) as other:
        access = access_to(pair.url, one.sandbox_id)
        bearer = {"authorization": f"Bearer {access['token']}"}
        sandbox, foreign = f"/v1/sandboxes/{one.sandbox_id}", f"/v1/sandboxes/{other.sandbox_id}"
        assert KEY not in json.dumps(access)
        assert oct(os.stat(access["path"]).st_mode & 0o777) == "0o600"
        assert oct(os.stat(os.path.dirname(access["path"])).st_mode & 0o777) == "0o700"
        path = access["path"]
        assert status_of(path, "GET", f"{sandbox}/sessions", bearer) == 200
        rows = (
            ("GET", f"{foreign}/sessions", 403), ("DELETE", sandbox, 403), ("POST", f"{sandbox}/stop", 403),
            ("GET", sandbox, 403), ("GET", f"{sandbox}/direct", 403), ("POST", "/v1/images/build", 403),
            ("GET", "/node/v1/sandboxes", 403), ("GET", "/v1/workers", 403), ("GET", "/health", 403),
            ("GET", f"{sandbox}/../{other.sandbox_id}/sessions", 404), ("GET", f"{sandbox}/nothing", 404),
            ("GET", f"{sandbox}//sessions", 404), ("GET", f"/v1/sandboxes/./{one.sandbox_id}/sessions", 403),
        )  # fmt: skip
        for method, target, status in rows:
            assert status_of(path, method, target, bearer) == status, (method, target)
        altered = access["token"][:-1] + ("1" if access["token"].endswith("0") else "0")
        for headers in ({}, {"authorization": f"Bearer {KEY}"}, {"x-rock-api-key": KEY},
                        {"authorization": f"Bearer {altered}"}, {"authorization": "Bearer direct."},
                        {"authorization": "Bearer direct." + "a" * 5000}):  # fmt: skip
            assert status_of(path, "GET", f"{sandbox}/sessions", headers) == 401, headers
        with Client(pair.url, str(access["token"])) as client, pytest.raises(Unauthorized):
            client.list_sandboxes()


def test_rights_and_tenants(pair: RunningServer) -> None:
    with Client(pair.url, KEY) as owner:
        reader = owner.create_key(CreateKey(name="reader", tenant="alpha", scopes=[Access.READ]))
        writer = owner.create_key(CreateKey(name="writer", tenant="alpha"))
        other = owner.create_key(CreateKey(name="other", tenant="beta"))
        sandbox = box(pair.url, writer.key)
        access = access_to(pair.url, sandbox.sandbox_id, reader.key)
        bearer = {"authorization": f"Bearer {access['token']}", "content-type": "application/json"}
        place = f"/v1/sandboxes/{sandbox.sandbox_id}"
        assert status_of(access["path"], "GET", f"{place}/sessions", bearer) == 200
        assert status_of(access["path"], "POST", f"{place}/sessions", bearer, b"{}") == 403
        with pytest.raises(NotFound):
            access_to(pair.url, sandbox.sandbox_id, other.key)
        warmed(sandbox)
        owner.revoke_key(writer.id)
        with pytest.raises(Unauthorized):
            access_to(pair.url, sandbox.sandbox_id, writer.key)
        began = time.monotonic()
        with pytest.raises(Unauthorized):
            while time.monotonic() - began < LIFETIME + 3:
                sandbox.run("true")
                time.sleep(0.2)
        owner.stop_sandbox(sandbox.sandbox_id)


def test_a_killed_process_and_a_stopped_sandbox(pair: RunningServer) -> None:
    with box(pair.url) as sandbox:
        warmed(sandbox)
        number = str((sandbox.info().worker or "").removeprefix("local").removeprefix("-") or "0")
        lock = str(pair.home / "processes" / number / "server.lock")
        for pid in members_of(pair.pid):
            held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
                    if os.path.lexists(f"/proc/{pid}/fd/{fd}")] if os.path.isdir(f"/proc/{pid}/fd") else []  # fmt: skip
            if lock in held and pid != pair.pid:
                os.kill(pid, signal.SIGKILL)
                break
        else:
            raise AssertionError("the process is not found")
        assert sandbox.run("echo again").output == "again\n"
        warmed(sandbox)
        with Client(pair.url, KEY) as client:
            client.stop_sandbox(sandbox.sandbox_id)
        with pytest.raises(RockError, match="stopped by its user"):
            sandbox.run("true")


def test_what_is_not_direct(pair: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with box(pair.url, record=True) as sandbox:
        with pytest.raises(Unsupported, match="recorded sandbox"):
            access_to(pair.url, sandbox.sandbox_id)
        warmed(sandbox)
        assert len(sandbox.log()) >= 12, "all requests are recorded"
    monkeypatch.setenv("ROCK_DIRECT", "off")
    with box(pair.url) as sandbox:
        warmed(sandbox)
        assert sandbox._transport._direct is None


def test_a_response_without_the_proof_is_not_used(pair: RunningServer) -> None:
    """As of another program at the address of a worker that ended."""
    seen: list[str] = []

    class Foreign(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.append(self.path)
            self.rfile.read(int(self.headers.get("content-length") or 0))
            data = b'{"output": "forged", "exit_code": 0}'
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.send_header("x-rock-direct", "f" * 64)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    foreign = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Foreign)
    thread = threading.Thread(target=foreign.serve_forever)
    thread.start()
    try:
        with box(pair.url) as sandbox:
            warmed(sandbox)
            transport = sandbox._transport
            assert transport._direct is not None
            target = transport._direct._targets[sandbox.sandbox_id]
            target.server = transport._worker(Address.parse(f"http://127.0.0.1:{foreign.server_port}"), "direct.x.y")
            target.renew_at = target.expires_at = time.monotonic() + 60
            assert sandbox.run("echo real").output == "real\n"
            assert len(seen) == 1 and target.server is None, "it is not used again"
    finally:
        foreign.shutdown()
        thread.join()
        foreign.server_close()


@pytest.mark.parametrize("direct", ["all", "machine"])
def test_a_worker_of_another_machine(tmp_path: Path, direct: str) -> None:
    """By its address, where the server permits it."""
    front = server(tmp_path / "server", ROCK_DIRECT=direct)
    machine = Machine(tmp_path / "w1", "--join", front.url, "--token", TOKEN, "--name", "w1", ROCK_RUNTIME="fake")
    machine.start()
    try:
        with Client(front.url, KEY) as client:
            until(lambda: len(client.list_workers()) == 1, 20, "it does not join")
        with box(front.url, image="x:1") as sandbox:
            if direct == "machine":
                with pytest.raises(Unsupported, match="offers no direct requests"):
                    access_to(front.url, sandbox.sandbox_id)
                warmed(sandbox)
                return
            access = access_to(front.url, sandbox.sandbox_id)
            assert access["url"] == f"http://127.0.0.1:{machine.note()}" and TOKEN not in json.dumps(access)
            warmed(sandbox)
            with stopped(front.pid):
                assert sandbox.run("echo direct").output == "direct\n"
    finally:
        front.stop()
        machine.end()


# ---- tokens ----


LEASE = ("w1", 3)
TENANT = Caller("alpha", frozenset({Access.READ}), key_id="k1")


async def served(token: str, path: str = "/v1/sandboxes/s1/sessions", key: str | None = "secret",
                 lease: tuple[str, int] | None = LEASE, only: bool = True,
                 kind: str = "http") -> tuple[int, dict[bytes, bytes], Any]:
    """(status, headers, the caller that the application sees) of a request with a token."""
    callers: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        callers.append((scope.get(GRANTED), dict(scope["headers"])))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-rock-direct", b"of a program")]})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    headers = [(b"authorization", f"Bearer {token}".encode()), (b"x-rock-call", b"1"), (b"x-own", b"kept")]
    scope = {"type": kind, "method": "GET", "path": path, "headers": headers, "query_string": b"",
             "extensions": {"websocket.http.response": {}}}  # fmt: skip
    await DirectRequests(app, key, lambda: lease, only)(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), callers


def test_tokens() -> None:
    now = time.time()
    token = signed(Grant("w1", 3, "s1", TENANT, now + 20), "secret")
    status, headers, seen = asyncio.run(served(token))
    assert status == 200 and seen == [(TENANT, {b"x-own": b"kept"})], "no header of the transport is passed"
    assert headers[b"x-rock-direct"] != b"of a program" and len(headers[b"x-rock-direct"]) == 64
    assert granted(token.encode(), "secret").caller == TENANT
    assert granted(signed(Grant("w1", 3, "s1", OPERATOR, now), "secret").encode(), "secret").caller == OPERATOR
    bad = {
        "expired": served(signed(Grant("w1", 3, "s1", TENANT, now - 1), "secret")),
        "another key": served(signed(Grant("w1", 3, "s1", TENANT, now + 20), "other")),
        "another epoch": served(token, lease=("w1", 4)),
        "another worker": served(token, lease=("w2", 3)),
        "no lease": served(token, lease=None),
        "no key": served(token, key=None),
        "changed": served(token.replace("direct.", "direct.A", 1)),
        "no token": served("direct"),
    }
    for name, request in bad.items():
        status, _, seen = asyncio.run(request)
        assert status == 401 and not seen, name
    for path in ("/v1/sandboxes/s2/sessions", "/v1/sandboxes/s1", "/node/v1/sandboxes", "/v1/images/build"):
        status, _, seen = asyncio.run(served(token, path))
        assert status in (403, 404) and not seen, path
    status, _, seen = asyncio.run(served(token, "/v1/sandboxes/s1/ports/80/", kind="websocket"))
    assert status == 403 and not seen, "a WebSocket would outlive its token"
    status, _, seen = asyncio.run(served("a key of the server", only=False))
    assert status == 200 and seen[0][0] is None, "it is authenticated as any other request"
