"""Ports of programs in a sandbox without a network: HTTP, WebSockets and plain connections, and bad manners."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

import rock.sdk
from rock.errors import Conflict, InvalidConfig, RockError
from rock.sync import Sandbox, SandboxConfig

GUEST = Path(__file__).parent / "port_guest.py"
SECONDS = 20.0


def sockets(server: RunningServer) -> int:
    folder = f"/proc/{server.pid}/fd"
    found = 0
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            found += os.readlink(f"{folder}/{name}").startswith("socket:")
    return found


def whole_log(server: RunningServer) -> str:
    return (server.home / "output.log").read_text() + (server.home / "logs" / "server.log").read_text()


def memory_peak(server: RunningServer) -> int:
    """Bytes."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


class Guest:
    """A sandbox whose programs listen: HTTP on 8000, WebSockets on 8001, and bad manners from 9000 on."""

    def __init__(self, server: RunningServer, sandbox: Sandbox) -> None:
        self.server = server
        self.sandbox = sandbox
        self.address = urlsplit(server.url).netloc
        self.base = f"/v1/sandboxes/{sandbox.sandbox_id}"

    def open(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, port: int = 8000
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.address, timeout=SECONDS)
        connection.request(method, f"{self.base}/ports/{port}{path}", body, headers or {})
        return connection, connection.getresponse()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, port: int = 8000
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection, answer = self.open(method, path, body, headers, port)
        with contextlib.closing(connection):
            return answer, answer.read()

    def failure(self, port: int, path: str = "/", **headers: str) -> tuple[int, dict[str, Any]]:
        """(status, error) of a request that has to fail with an error of ours."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        answer, body = self.ask("GET", path, headers=given, port=port)
        error = dict(json.loads(body)["error"])
        assert answer.headers["x-rock-error"] == error["code"]
        return answer.status, error

    def url(self, path: str) -> str:
        return f"ws://{self.address}{self.base}{path}"


@pytest.fixture
def guest(server: RunningServer) -> Iterator[Guest]:
    config = SandboxConfig(base_url=server.url, image=IMAGE, memory="512m", cpus=1.0, network="none")
    with Sandbox(config) as sandbox:
        sandbox.fs.write("/tmp/guest.py", GUEST.read_bytes())
        sandbox.processes.start(["python3", "/tmp/guest.py"])
        assert sandbox.arun("until [ -e /tmp/ready ]; do sleep 0.05; done", timeout=SECONDS).exit_code == 0
        sandbox.execute("true")
        before, told = sockets(server), len(whole_log(server))
        yield Guest(server, sandbox)
        assert "Traceback" not in whole_log(server)[told:]
        until(lambda: sockets(server) <= before)  # every connection to a port was closed, whoever ended it


# ---- HTTP ----


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_methods_bodies_and_headers(guest: Guest, method: str) -> None:
    asked = {
        "X-Mine": "1",
        "Cookie": "a=b",
        "Authorization": "Basic Zm9v",
        "Connection": "X-Drop, keep-alive",
        "X-Drop": "1",
        "X-Forwarded-For": "10.1.1.1",
    }
    answer, body = guest.ask(method, "/echo%2Fa/b?x=1&y=%20", b"" if method == "GET" else b"hello", asked)
    seen = json.loads(body)
    assert answer.status == 200 and answer.headers["X-Answer"] == "yes" and "x-rock-error" not in answer.headers
    assert "Keep-Alive" not in answer.headers and answer.headers["Set-Cookie"] == "k=v"
    assert seen["method"] == method and seen["path"] == "/echo%2Fa/b?x=1&y=%20"
    assert seen["body"] == ("" if method == "GET" else "hello")
    headers = seen["headers"]
    assert headers["host"] == "localhost:8000" and headers["x-mine"] == "1" and headers["cookie"] == "a=b"
    assert headers["authorization"] == "Basic Zm9v" and "x-drop" not in headers
    assert headers["x-forwarded-for"] == "10.1.1.1, 127.0.0.1" and headers["x-forwarded-proto"] == "http"
    assert headers["x-forwarded-host"] == guest.address
    assert headers["x-forwarded-prefix"] == f"{guest.base}/ports/8000"


def test_head_empty_answers_and_early_hints(guest: Guest) -> None:
    answer, body = guest.ask("HEAD", "/size/12345")
    assert answer.status == 200 and answer.headers["content-length"] == "12345" and body == b""
    for path, status in (("/status/204", 204), ("/status/304", 304), ("/status/421", 421), ("/status/503", 503)):
        answer, body = guest.ask("GET", path)
        assert answer.status == status and "x-rock-error" not in answer.headers
    assert guest.ask("GET", "/hints")[1] == b"after the hints"
    answer, body = guest.ask("GET", "")
    assert json.loads(body)["path"] == "/"


def test_20_mb_both_ways_and_never_whole_in_memory(guest: Guest) -> None:
    size = 20 << 20
    peak = memory_peak(guest.server)
    assert len(guest.ask("GET", f"/size/{size}")[1]) == size
    part = os.urandom(1 << 20)
    want = hashlib.sha256(part * 20).hexdigest()
    for headers in ({"Content-Length": str(size)}, {}):  # and chunked
        _, body = guest.ask("POST", "/hash", iter([part] * 20), headers)
        assert json.loads(body) == {"size": size, "sha256": want, "chunked": not headers}
    assert len(guest.ask("GET", f"/chunked/{size}")[1]) == size
    assert memory_peak(guest.server) - peak < size // 2


def test_events_come_when_they_are_sent(guest: Guest) -> None:
    connection, answer = guest.open("GET", "/events")
    with contextlib.closing(connection):
        assert answer.headers["content-type"] == "text/event-stream"
        for number in range(3):
            assert answer.readline() == b"data: %d\n" % number and answer.readline() == b"\n"
            guest.sandbox.fs.write(f"/tmp/event{number}", b"")  # it waits for this
        assert answer.read() == b"data: end\n\n"


@pytest.mark.parametrize(
    ("location", "seen"),
    [
        ("/there?x=1#y", "{prefix}/there?x=1#y"),
        ("there", "there"),
        ("http://localhost:8000/there", "{prefix}/there"),
        ("http://127.0.0.1:8000", "{prefix}/"),
        ("http://{outside}/there", "{prefix}/there"),
        ("{prefix}/there", "{prefix}/there"),
        ("http://localhost:8001/there", "http://localhost:8001/there"),
        ("https://example.org/", "https://example.org/"),
        ("//example.org/", "//example.org/"),
    ],
)
def test_redirections_stay_on_the_port(guest: Guest, location: str, seen: str) -> None:
    known = {"prefix": f"{guest.base}/ports/8000", "outside": guest.address}
    answer, _ = guest.ask("GET", "/redirect", headers={"X-Location": location.format(**known)})
    assert answer.status == 302 and answer.headers["location"] == seen.format(**known)


def test_a_page_cannot_act_as_one_of_the_server(guest: Guest) -> None:
    answer, _ = guest.ask("GET", "/redirect", headers={"X-Location": "/x"})
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox ") and "same-origin" not in policy


# ---- failures ----


def test_a_port_where_nobody_listens(guest: Guest) -> None:
    status, error = guest.failure(7999)
    assert status == 503 and error["code"] == "unavailable" and "7999" in error["message"] and error["hint"]
    for port in ("0", "65536", "http", "-1", "08000000"):
        assert guest.ask("GET", "/", port=port)[0].status == 422, port  # type: ignore[arg-type]
    assert guest.ask("GET", "/", headers={"X-ROCK-Timeout": "soon"})[0].status == 422


def test_one_that_listens_on_the_other_loopback_only(guest: Guest) -> None:
    assert guest.ask("GET", "/", port=9020)[1] == b"six"


@pytest.mark.parametrize(
    ("port", "status", "code", "words"),
    [
        (9000, 502, "port_failed", "invalid HTTP"),  # garbage
        (9001, 502, "port_failed", "invalid HTTP"),  # one header without an end
        (9002, 502, "port_failed", "invalid HTTP"),  # headers without an end
        (9003, 504, "port_timeout", "within 1 s"),  # silence
        (9004, 502, "port_failed", "without a response"),  # closes at once
        (9017, 502, "port_failed", "broke"),
        (9005, 502, "port_failed", "control characters"),
        (9006, 502, "port_failed", "status 999"),
        (9007, 502, "port_failed", "headers"),  # too many
        (9008, 502, "port_failed", "more than 32 informational"),  # early hints without an end
        (9009, 502, "port_failed", "invalid HTTP"),  # two lengths
        (9010, 502, "port_failed", "invalid HTTP"),  # splits its answer
    ],
)
def test_answers_that_are_none(guest: Guest, port: int, status: int, code: str, words: str) -> None:
    began = time.monotonic()
    seen, error = guest.failure(port, X_ROCK_Timeout="1")
    assert (seen, error["code"]) == (status, code) and words in error["message"], error
    assert time.monotonic() - began < 10
    assert guest.ask("GET", "/echo")[0].status == 200


@pytest.mark.parametrize("port", [9021, 9022, 9023])  # informational answers, tiny chunks, headers: each without end
def test_a_flood_of_a_program_keeps_nobody_else_waiting(guest: Guest, port: int) -> None:
    def take() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection, answer = guest.open("GET", "/", port=port)
            with contextlib.closing(connection):
                while time.monotonic() < end and answer.read(1 << 16):
                    pass

    end = time.monotonic() + 4.0
    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    waited = []
    while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
        began = time.monotonic()
        connection = http.client.HTTPConnection(guest.address, timeout=SECONDS)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        waited.append(time.monotonic() - began)
    for thread in threads:
        thread.join()
    assert statistics.median(waited) < 0.2 and max(waited) < 1.5, (statistics.median(waited), max(waited))


@pytest.mark.parametrize("port", [9011, 9012, 9013])  # a length, chunks, an endless chunk head
def test_answers_that_break_off(guest: Guest, port: int) -> None:
    connection, answer = guest.open("GET", "/", port=port)
    with contextlib.closing(connection), pytest.raises(http.client.IncompleteRead):
        assert answer.status == 200
        answer.read()


def test_a_program_that_does_not_read_the_body(guest: Guest) -> None:
    answer, body = guest.ask("POST", "/", b"x" * (30 << 20), {"X-ROCK-Timeout": "1"}, port=9003)
    assert answer.status == 504 and json.loads(body)["error"]["code"] == "port_timeout"
    answer, body = guest.ask("POST", "/", b"x" * (30 << 20), {"X-ROCK-Timeout": "1"}, port=9014)
    assert answer.status == 413 and body == b"no"


def test_a_slow_client_is_not_a_slow_program(guest: Guest) -> None:
    def parts() -> Iterator[bytes]:
        for word in (b"one ", b"two ", b"three"):
            time.sleep(0.6)
            yield word

    answer, body = guest.ask("POST", "/echo", parts(), {"Content-Length": "13", "X-ROCK-Timeout": "0.5"})
    assert answer.status == 200 and json.loads(body)["body"] == "one two three"


def test_an_answer_before_the_body_was_sent(guest: Guest) -> None:
    host, _, port = guest.address.partition(":")
    with socket.create_connection((host, int(port)), SECONDS) as client:
        head = f"POST {guest.base}/ports/9014/ HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
        client.sendall(head.encode())
        seen = b""
        while not seen.endswith(b"no"):
            part = client.recv(4096)
            assert part, seen
            seen += part
        assert seen.startswith(b"HTTP/1.1 413")


def test_streams_and_tunnels_do_not_hold_up_a_server_that_stops(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_DRAIN_SECONDS="1")  # which are not waited for any longer
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="512m", network="none")) as sandbox:
        sandbox.fs.write("/tmp/guest.py", GUEST.read_bytes())
        sandbox.processes.start(["python3", "/tmp/guest.py"])
        sandbox.arun("until [ -e /tmp/ready ]; do sleep 0.05; done", timeout=SECONDS)
        guest = Guest(server, sandbox)
        connection, answer = guest.open("GET", "/events")
        assert answer.readline() == b"data: 0\n"
        with contextlib.closing(connection), sandbox.port_forward(9015) as forward:
            with socket.create_connection((forward.host, forward.port), SECONDS) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                assert server.process is not None
                began = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(SECONDS) == 0
                assert time.monotonic() - began < 10
                with contextlib.suppress(ConnectionError):
                    assert client.recv(1) == b""
        assert "Traceback" not in server.log()
        server.start(port=urlsplit(server.url).port or 0)
        assert guest.ask("GET", "/echo")[0].status == 200  # the sandbox and its programs went on


@pytest.mark.parametrize("path", ["/events", "/forever"])
def test_a_client_that_leaves(guest: Guest, path: str) -> None:
    before = sockets(guest.server)
    connection, answer = guest.open("GET", path)
    answer.read(1)
    assert sockets(guest.server) > before
    answer.close()
    connection.close()
    until(lambda: sockets(guest.server) <= before)


def test_a_client_that_leaves_before_it_is_answered(guest: Guest) -> None:
    before = sockets(guest.server)
    host, _, port = guest.address.partition(":")
    start = "{} HTTP/1.1\r\nhost: localhost\r\n"
    for head in (f"GET {start}\r\n", f"POST {start}content-length: 9\r\n\r\nabc"):
        with socket.create_connection((host, int(port)), SECONDS) as client:
            client.sendall(head.format(f"{guest.base}/ports/9003/").encode())
            # With several processes, a kept connection to that of the sandbox may carry the request.
            until(lambda: sockets(guest.server) > before + (os.environ["ROCK_PROCESSES"] == "1"))
        until(lambda: sockets(guest.server) <= before)


def test_a_sandbox_that_is_stopped_during_a_stream(guest: Guest) -> None:
    connection, answer = guest.open("GET", "/events")
    with contextlib.closing(connection):
        assert answer.readline() == b"data: 0\n"
        stopper = threading.Thread(target=guest.sandbox.stop)
        stopper.start()
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        stopper.join()
    status, error = guest.failure(8000)
    assert status == 410 and error["code"] == "expired"


def test_a_stream_counts_as_activity(guest: Guest) -> None:
    connection, answer = guest.open("GET", "/events")
    with contextlib.closing(connection):
        answer.readline()
        time.sleep(0.5)
        info = json.loads(guest_get(guest, f"/node/v1/sandboxes/{guest.sandbox.sandbox_id}"))
        assert info.get("idle_seconds", 0.0) == 0.0


def guest_get(guest: Guest, path: str) -> bytes:
    connection = http.client.HTTPConnection(guest.address, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


def test_the_key_of_the_server_stays_outside(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_API_KEY="secret")
    config = SandboxConfig(base_url=server.url, api_key="secret", image=IMAGE, memory="512m", network="none")
    with Sandbox(config) as sandbox:
        sandbox.fs.write("/tmp/guest.py", GUEST.read_bytes())
        sandbox.processes.start(["python3", "/tmp/guest.py"])
        sandbox.arun("until [ -e /tmp/ready ]; do sleep 0.05; done", timeout=SECONDS)
        guest = Guest(server, sandbox)
        assert guest.ask("GET", "/echo")[0].status == 401
        for given, left in (
            ({"Authorization": "Bearer secret"}, None),
            ({"X-ROCK-API-Key": "secret", "Authorization": "Bearer theirs"}, "Bearer theirs"),
        ):
            answer, body = guest.ask("GET", "/echo", headers=given)
            assert answer.status == 200 and b"secret" not in body
            assert json.loads(body)["headers"].get("authorization") == left


# ---- WebSockets ----


def talk(guest: Guest, path: str, work: Callable[[ClientConnection], Any], **options: Any) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(SECONDS):
            async with connect(guest.url(path), proxy=None, max_size=None, compression=None, **options) as socket:
                return await work(socket)

    return asyncio.run(run())


def test_a_websocket(guest: Guest) -> None:
    async def work(socket: ClientConnection) -> None:
        assert socket.subprotocol == "two"
        for message in ("text \N{SNOWMAN}", b"\0bytes", "", b"", "x" * 1_000_000):
            await socket.send(message)
            assert await socket.recv() == message
        await socket.send("where")
        assert json.loads(await socket.recv())["path"] == "/some%2Fwhere?x=1"
        await socket.send("close 4321 enough")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "enough")

    talk(guest, "/ports/8001/some%2Fwhere?x=1", work, subprotocols=["one", "two"])


def test_the_program_sees_why_a_websocket_was_closed(guest: Guest) -> None:
    async def work(socket: ClientConnection) -> None:
        await socket.send("remember")
        await socket.recv()
        await socket.close(4000, "bye")

    talk(guest, "/ports/8001/", work)
    until(lambda: guest.sandbox.execute("cat /tmp/closed").stdout == "4000 bye")


@pytest.mark.parametrize(
    ("port", "path", "status"), [(8001, "/refuse", 403), (7999, "/", 503), (9000, "/", 502), (9004, "/", 502)]
)
def test_a_websocket_that_is_refused(guest: Guest, port: int, path: str, status: int) -> None:
    async def work(socket: ClientConnection) -> None:
        raise AssertionError("it was opened")

    with pytest.raises(InvalidStatus) as refusal:
        talk(guest, f"/ports/{port}{path}", work)
    assert refusal.value.response.status_code == status
    assert ("x-rock-error" in refusal.value.response.headers) == (status != 403)


def test_a_websocket_whose_program_vanishes(guest: Guest) -> None:
    async def work(socket: ClientConnection) -> None:
        await socket.send("abort")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011

    talk(guest, "/ports/8001/", work)


# ---- plain connections ----


def test_a_tunnel(guest: Guest) -> None:
    size = 20 << 20

    async def work(socket: ClientConnection) -> None:
        async def say() -> None:
            for _ in range(20):
                await socket.send(b"x" * (1 << 20))
            await socket.send(b"")

        saying = asyncio.create_task(say())
        seen = 0
        async for message in socket:
            assert isinstance(message, bytes)
            if not message:
                break
            seen += len(message)
        assert seen == size
        await saying
        await socket.wait_closed()
        assert socket.close_code == 1000

    talk(guest, "/tcp/9015", work)  # an echo that hangs up after the end of what it read


def test_a_tunnel_of_which_one_end_ends_first(guest: Guest) -> None:
    async def work(socket: ClientConnection) -> None:
        await socket.send(b"quiet")
        assert await socket.recv() == b"first" and await socket.recv() == b""
        await socket.send(b"still heard")
        await socket.send(b"")
        await socket.wait_closed()
        assert socket.close_code == 1000

    talk(guest, "/tcp/9016", work)
    until(lambda: guest.sandbox.execute("cat /tmp/heard").stdout == "quietstill heard")


def test_tunnels_that_break(guest: Guest) -> None:
    async def text(socket: ClientConnection) -> None:
        await socket.send("no bytes")
        await socket.wait_closed()
        assert socket.close_code == 1003

    async def reset(socket: ClientConnection) -> None:
        await socket.send(b"x")
        await socket.wait_closed()
        assert socket.close_code == 1011

    talk(guest, "/tcp/9015", text)
    talk(guest, "/tcp/9017", reset)
    with pytest.raises(InvalidStatus) as refusal:
        talk(guest, "/tcp/7999", text)
    assert refusal.value.response.status_code == 503

    async def stop(socket: ClientConnection) -> None:
        await socket.send(b"here")
        assert await socket.recv() == b"here"
        await asyncio.to_thread(guest.sandbox.stop)
        await socket.wait_closed()
        assert socket.close_code == 1011

    talk(guest, "/tcp/9015", stop)


# ---- ports of this machine ----


def exchange(address: tuple[str, int], data: bytes, seconds: float = SECONDS) -> bytes:
    with socket.create_connection(address, seconds) as client:
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        parts = iter(lambda: client.recv(1 << 16), b"")
        seen = b"".join(parts)
        sender.join()
        return seen


def test_a_forwarded_port(guest: Guest, free_port: Callable[[], int]) -> None:
    with guest.sandbox.port_forward(9015) as forward:
        assert forward.host == "127.0.0.1" and forward.port > 0
        data = os.urandom(3 << 20)
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda n: exchange((forward.host, forward.port), data + b"%d" % n), range(8))
            assert all(seen == data + b"%d" % n for n, seen in enumerate(answers))
        with pytest.raises(Conflict), guest.sandbox.port_forward(9015, forward.port):
            raise AssertionError("it is taken")
    with pytest.raises(ConnectionRefusedError):
        exchange((forward.host, forward.port), b"")
    local = free_port()
    with guest.sandbox.port_forward(8000, local) as forward:
        assert forward.url == f"http://127.0.0.1:{local}"
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", local, timeout=SECONDS)) as connection:
            for _ in range(2):  # over one connection
                connection.request("GET", "/size/10")
                assert connection.getresponse().read() == b"x" * 10
    with guest.sandbox.port_forward(7999) as forward:
        failures: list[RockError] = []
        forward.failed = failures.append
        with contextlib.suppress(ConnectionError):
            assert exchange((forward.host, forward.port), b"") == b""
        until(lambda: [error.code for error in failures] == ["unavailable"])
    for remote, wanted in ((0, 0), (65536, 0), (1, -1)):
        with pytest.raises(InvalidConfig), guest.sandbox.port_forward(remote, wanted):
            raise AssertionError("that is no port")


def test_a_forwarded_port_from_asynchronous_code(guest: Guest) -> None:
    async def work() -> None:
        sandbox = rock.sdk.Sandbox(guest.sandbox.config)
        sandbox.sandbox_id = guest.sandbox.sandbox_id
        async with sandbox.port_forward(9015) as forward:
            reader, writer = await asyncio.open_connection(forward.host, forward.port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()

    asyncio.run(work())


def test_the_address_of_a_port(guest: Guest) -> None:
    url = guest.sandbox.port_url(8000)
    assert url == f"{guest.server.url}{guest.base}/ports/8000/"
    with urllib.request.urlopen(url + "size/3", timeout=SECONDS) as answer:
        assert answer.read() == b"xxx"


def test_the_command_port_forward(guest: Guest) -> None:
    sandbox_id = str(guest.sandbox.sandbox_id)
    command = [sys.executable, "-W", "error", "-m", "rock.cli.main", "port-forward", sandbox_id, "0:9015", "0:7999"]
    with (subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
          contextlib.ExitStack() as stack):  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        stack.callback(process.kill)  # a failed assertion must not wait for it
        addresses = []
        for remote in (9015, 7999):
            address, _, there = process.stdout.readline().strip().partition(" -> ")
            assert there == f"{sandbox_id[:12]}:{remote}"
            host, _, port = address.partition(":")
            addresses.append((host, int(port)))
        assert exchange(addresses[0], b"hello" * 1000) == b"hello" * 1000
        with contextlib.suppress(ConnectionError):
            exchange(addresses[1], b"")
        assert "nothing listens on port 7999" in process.stderr.readline()
        with socket.create_connection(addresses[0], SECONDS) as left_open:
            left_open.sendall(b"x")
            assert left_open.recv(1) == b"x"
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 130
        assert "Traceback" not in process.stderr.read()
    done = subprocess.run([*command[:6], sandbox_id, "x:80"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1 and "LOCAL:]REMOTE" in done.stderr


def test_the_command_port_forward_ends_with_its_sandbox(guest: Guest) -> None:
    command = [sys.executable, "-m", "rock.cli.main", "port-forward", str(guest.sandbox.sandbox_id), "0:9015"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        port = int(process.stdout.readline().partition(" ")[0].rpartition(":")[2])
        guest.sandbox.stop()
        with contextlib.suppress(ConnectionError):
            exchange(("127.0.0.1", port), b"")
        assert process.wait(SECONDS) == 1
        assert "is gone" in process.stderr.read()
