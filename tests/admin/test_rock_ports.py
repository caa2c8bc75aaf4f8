"""Ports in the ROCK dialect: its paths, its ways to name a port, and its failures."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer
from websockets.asyncio.client import ClientConnection, connect

from rock.sync import Sandbox

GUEST = Path(__file__).parent.parent / "e2e" / "port_guest.py"
BASE = "/apis/envs/sandbox/v1/sandboxes"
SECONDS = 20.0


class Proxied:
    def __init__(self, server: RunningServer, sandbox: Sandbox) -> None:
        self.address = urlsplit(server.url).netloc
        self.sandbox = sandbox
        self.base = f"{BASE}/{sandbox.sandbox_id}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=SECONDS)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path if path.startswith(BASE) else self.base + path, body, given)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def failed(self, path: str) -> str:
        answer, body = self.ask("GET", path)
        value = json.loads(body)
        assert answer.status == 200 and value["status"] == "Failed" and value["result"] is None
        assert value["message"] == ("vnc http proxy failed" if "/vnc" in path else "http proxy failed")
        return str(value["error"])

    def talk(self, path: str, work: Callable[[ClientConnection], Any], **options: Any) -> None:
        async def run() -> None:
            async with asyncio.timeout(SECONDS):
                url = f"ws://{self.address}{self.base}{path}"
                async with connect(url, proxy=None, max_size=None, **options) as socket:
                    await work(socket)

        asyncio.run(run())

    def closed(self, path: str, **options: Any) -> tuple[int | None, str | None]:
        seen: list[tuple[int | None, str | None]] = []

        async def work(socket: ClientConnection) -> None:
            await socket.wait_closed()
            seen.append((socket.close_code, socket.close_reason))

        self.talk(path, work, **options)
        return seen[0]


@pytest.fixture
def proxied(server: RunningServer) -> Iterator[Proxied]:
    with Sandbox(base_url=server.url, image=IMAGE, memory="512m", cpus=1.0, network="none") as sandbox:
        text = GUEST.read_text().replace('("127.0.0.1", 8000)', '("127.0.0.1", 8080)')
        sandbox.fs.write("/tmp/guest.py", text.encode())
        sandbox.processes.start(["python3", "/tmp/guest.py"])
        assert sandbox.arun("until [ -e /tmp/ready ]; do sleep 0.05; done", timeout=SECONDS).exit_code == 0
        yield Proxied(server, sandbox)


def test_http(proxied: Proxied) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for path, inside, headers in (
            ("/proxy/echo/a%2Fb?x=1", "/echo/a%2Fb?x=1", {}),
            ("/proxy", "/", {}),
            ("/proxy/port/8080/echo", "/echo", {}),
            ("/proxy/echo?rock_target_port=8080", "/echo?rock_target_port=8080", {}),
            ("/proxy/echo", "/echo", {"X_ROCK_Target_Port": "8080"}),
        ):
            answer, body = proxied.ask(method, path, None if method == "GET" else b"hello", **headers)
            seen = json.loads(body)
            assert answer.status == 200 and (seen["method"], seen["path"]) == (method, inside)
            assert seen["body"] == ("" if method == "GET" else "hello")
    answer, body = proxied.ask("HEAD", "/proxy/size/77")
    assert answer.headers["content-length"] == "77" and body == b""
    assert proxied.ask("GET", "/proxy/status/421")[0].status == 421


def test_redirections(proxied: Proxied) -> None:
    for path, prefix, headers in (
        ("/proxy/redirect", "/proxy", {}),
        ("/proxy/port/8080/redirect", "/proxy/port/8080", {}),
        ("/proxy/redirect?rock_target_port=8080", "/proxy/port/8080", {}),
        ("/proxy/redirect", "/proxy", {"X_ROCK_Target_Port": "8080"}),
    ):
        answer, _ = proxied.ask("GET", path, X_Location="/there", **headers)
        assert answer.status == 302 and answer.headers["location"] == f"{proxied.base}{prefix}/there"


def test_failures(proxied: Proxied) -> None:
    answer, body = proxied.ask("GET", "/proxy/port/8080/x?rock_target_port=8080")
    assert answer.status == 400 and "path, query" in json.loads(body)["detail"]
    answer, body = proxied.ask("GET", "/proxy/x", X_ROCK_Target_Port="http")
    assert answer.status == 400 and "http" in json.loads(body)["detail"]
    assert proxied.failed("/proxy/port/7999/").startswith("All connection attempts failed")
    assert proxied.failed("/vnc/").startswith("All connection attempts failed")
    assert "invalid HTTP" in proxied.failed("/proxy/port/9000/")
    assert proxied.failed(f"{BASE}/nobody/proxy/") == "sandbox nobody not started"
    assert proxied.failed(f"{BASE}/a%20b/proxy/") == "sandbox a b not started"
    proxied.sandbox.stop()
    assert proxied.failed("/proxy/").startswith(f"sandbox {proxied.sandbox.sandbox_id} not started")


def test_web_sockets(proxied: Proxied) -> None:
    async def work(socket: ClientConnection) -> None:
        assert socket.subprotocol == "two"
        for message in ("text", b"bytes"):
            await socket.send(message)
            assert await socket.recv() == message
        await socket.send("close 4321 enough")
        await socket.wait_closed()
        assert (socket.close_code, socket.close_reason) == (4321, "enough")

    proxied.talk("/proxy/port/8001/", work, subprotocols=["two"])
    proxied.talk("/proxy/?rock_target_port=8001", work, subprotocols=["two"])
    proxied.talk("/proxy/", work, subprotocols=["two"], additional_headers={"X-ROCK-Target-Port": "8001"})
    code, reason = proxied.closed("/proxy/port/7999/")
    assert code == 1011 and "All connection attempts failed" in str(reason)
    assert proxied.closed("/proxy/port/8001/refuse") == (1011, "it answered with 403")
    for path in ("/proxy/port/22/", "/proxy/port/80/", "/portforward?port=22", "/portforward", "/portforward?port=x"):
        assert proxied.closed(path)[0] == 1008


def test_portforward(proxied: Proxied) -> None:
    async def work(socket: ClientConnection) -> None:
        await socket.send(b"")
        await socket.send(b"quiet")
        assert [message async for message in socket] == [b"first"]
        assert socket.close_code == 1000

    proxied.talk("/portforward?port=9016", work)

    async def echo(socket: ClientConnection) -> None:
        data = b"x" * 1_000_000
        await socket.send(data)
        seen = 0
        while seen < len(data):
            seen += len(await socket.recv())

    proxied.talk("/portforward?port=9015", echo)
    assert proxied.closed("/portforward?port=7999")[0] == 1011
