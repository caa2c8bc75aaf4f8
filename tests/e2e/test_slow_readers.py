"""Readers that stop reading: what they do not take is not held for them, and they hold up nobody else."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer, give_image

from rock.sync import Sandbox, SandboxConfig

READERS = 6
OFFERED = 200 << 20  # bytes that each of them could have
HELD = 12 << 20  # bytes that may be held for each: two frames of a stream, buffers of sockets and of the allocator
FLOOD = """
import http.server, os, socketserver
class Endless(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(200): self.wfile.write(bytes(1 << 20))
    def log_message(self, *_): pass
class Raw(socketserver.BaseRequestHandler):
    def handle(self):
        for _ in range(200): self.request.sendall(bytes(1 << 20))
class Many(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
if os.fork() == 0: Many(("127.0.0.1", 7001), Raw).serve_forever()
Many(("127.0.0.1", 7000), Endless).serve_forever()
"""


@pytest.fixture(scope="module")
def offering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Sandbox]]:
    """A sandbox in which everything is endless, nearly."""
    server = RunningServer(tmp_path_factory.mktemp("slow"))
    give_image(server.home)
    server.start(seconds=100)
    try:
        yield from _filled(server)
    finally:
        server.stop()


def _filled(server: RunningServer) -> Iterator[tuple[RunningServer, Sandbox]]:
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="1g")) as sandbox:
        sandbox.processes.start(["python3", "-c", FLOOD])
        sandbox.execute(["sh", "-c", f"head -c {OFFERED} /dev/zero > /tmp/large"])
        ready = "for p in 7000 7001; do until (exec 3<>/dev/tcp/127.0.0.1/$p) 2>/dev/null; do sleep 0.1; done; done"
        assert sandbox.execute(["bash", "-c", ready], timeout=60).exit_code == 0
        writer = sandbox.processes.start(["head", "-c", str(16 << 20), "/dev/zero"])
        assert writer.wait(60).exit_code == 0
        sandbox.execute(["true"])
        server.environment["process"] = writer.id
        yield server, sandbox


def resident(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def stalled(server: RunningServer, head: str, body: bytes = b"") -> socket.socket:
    """A connection that has asked, has seen the first bytes of its answer, and reads no more."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(60)
    made.connect((host, int(port)))
    length = f"content-length: {len(body)}\r\ncontent-type: application/json\r\n" if body else ""
    made.sendall(f"{head}\r\nhost: localhost\r\n{length}\r\n".encode() + body)
    assert made.recv(1024).split(b" ")[1] in (b"200", b"101"), head
    return made


def upgrade(path: str) -> str:
    key = base64.b64encode(os.urandom(16)).decode()
    return (f"GET {path} HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            f"sec-websocket-version: 13\r\nsec-websocket-key: {key}")  # fmt: skip


FLOODED = json.dumps({"command": ["head", "-c", str(OFFERED), "/dev/zero"]}).encode()
RUN = json.dumps({"command": f"head -c {OFFERED} /dev/zero"}).encode()
ASK: dict[str, Callable[[RunningServer, str], socket.socket]] = {
    "program": lambda s, at: stalled(s, f"POST {at}/execute?stream=1 HTTP/1.1", FLOODED),
    "session": lambda s, at: stalled(s, f"POST {at}/sessions/default/run?stream=1 HTTP/1.1", RUN),
    "log": lambda s, at: stalled(s, f"GET {at}/processes/{s.environment['process']}/logs?limit={8 << 20} HTTP/1.1"),
    "file": lambda s, at: stalled(s, f"GET {at}/files/content?path=/tmp/large HTTP/1.1"),
    "archive": lambda s, at: stalled(s, f"GET {at}/files/archive?path=/tmp/large HTTP/1.1"),
    "port": lambda s, at: stalled(s, f"GET {at}/ports/7000/ HTTP/1.1"),
    "tunnel": lambda s, at: stalled(s, upgrade(f"{at}/tcp/7001")),
    "terminal": lambda s, at: stalled(s, upgrade(f"{at}/terminal?command=yes")),
}


@pytest.mark.parametrize("kind", ASK)
def test_a_reader_that_stops_costs_bounded_memory(offering: tuple[RunningServer, Sandbox], kind: str) -> None:
    server, sandbox = offering
    count = 1 if kind == "session" else READERS  # a session runs one command at a time
    before = resident(server.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(contextlib.closing(ASK[kind](server, f"/v1/sandboxes/{sandbox.sandbox_id}")))
        time.sleep(1.0)
        grown = resident(server.pid) - before
        print(f"{kind}: {grown / count / 1e6:.1f} MB each")
        assert sandbox.execute(["echo", "others"]).stdout == "others\n"
        assert grown < count * HELD, f"{grown / count / 1e6:.1f} MB for each of {count}"
    end = time.monotonic() + 60
    while kind == "program" and sandbox.execute(["sh", "-c", "pgrep -xc head"]).stdout.strip() != "0":
        assert time.monotonic() < end  # nobody is there to read it
        time.sleep(0.1)


def test_idle_and_half_open_connections_cost_little(offering: tuple[RunningServer, Sandbox]) -> None:
    """`make load` has 10,000 of them."""
    server, sandbox = offering
    before = resident(server.pid)
    with contextlib.ExitStack() as stack:
        for number in range(300):
            made = stack.enter_context(contextlib.closing(stalled(server, "GET /healthz HTTP/1.1")))
            if number % 3 == 0:
                made.sendall(b"POST /v1/sandboxes HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
            elif number % 3 == 1:
                made.sendall(b"GET /v1/sandb")
        assert sandbox.execute(["echo", "others"]).stdout == "others\n"
        grown = resident(server.pid) - before
        assert grown < 300 * (64 << 10), f"{grown / 300 / 1024:.0f} KB each"
    assert sandbox.execute(["echo", "others"]).stdout == "others\n"
