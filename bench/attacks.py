"""Attacks on the front of a server, and how long another tenant waits meanwhile.

    python bench/attacks.py [--seconds 6] [--only NAME] [--json]

Each attack runs in a process of its own against a server of this script's, with the key of one tenant or without any.
Another tenant asks for /healthz over a new connection and runs a session command, again and again; printed are the
median and the slowest of both in milliseconds, the growth of the server's memory in MB, and its most descriptors.
A row fails where the median is over 50 ms above the one without an attack.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.conftest import IMAGE, RunningServer, give_image

from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox

OWNER = "the-owner-of-this-benchmark"
MOST = 50.0  # milliseconds that another tenant may wait longer
PIECE = b"a" * 65536
HEAD = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"


class Target:
    """What an attack needs: where the server is, a tenant's key, and the ports of that tenant's program."""

    def __init__(self, port: int, key: str, sandbox_id: str) -> None:
        self.port, self.key, self.sandbox_id = port, key, sandbox_id

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def get(self, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path, headers={"authorization": f"Bearer {self.key}"})
            answer = connection.getresponse()
            while answer.read(65536):
                pass
        connection.close()

    def port_of(self, number: int) -> str:
        return f"/v1/sandboxes/{self.sandbox_id}/ports/{number}/"


def _stream(target: Target, first: bytes, piece: bytes) -> None:
    """Send without end, over one connection after the other."""
    while True:
        with contextlib.suppress(OSError), target.connect() as client:
            client.sendall(first)
            while True:
                client.sendall(piece)


def endless_header(target: Target) -> None:
    _stream(target, HEAD + b"x: ", PIECE)


def endless_url(target: Target) -> None:
    _stream(target, b"GET /", PIECE)


def small_headers(target: Target) -> None:
    _stream(target, HEAD, b"x: 1\r\n" * 10_000)


def endless_trailer(target: Target) -> None:
    start = b"PUT /healthz HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: "
    _stream(target, start, PIECE)


def tiny_chunks(target: Target) -> None:
    start = b"PUT /healthz HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    _stream(target, start, b"1\r\na\r\n" * 10_000)


def pipelined(target: Target) -> None:
    _stream(target, b"", (HEAD + b"\r\n") * 1000)


def half_open(target: Target) -> None:
    """As many connections as can be had, each with the beginning of a head."""
    held: list[socket.socket] = []
    while True:
        try:
            held.append(target.connect())
            held[-1].sendall(b"GET / HT")
        except OSError:
            for client in held[: len(held) // 2 + 1]:
                client.close()
            del held[: len(held) // 2 + 1]


def slow_heads(target: Target) -> None:
    """500 connections that each send a byte of a head now and then."""
    held: list[socket.socket] = []
    while True:
        while len(held) < 500:
            with contextlib.suppress(OSError):
                held.append(target.connect())
                held[-1].sendall(b"GET /healthz HTTP/1.1\r\nx: ")
        for client in list(held):
            try:
                client.sendall(b"a")
            except OSError:
                held.remove(client)
        time.sleep(0.2)


def small_frames(target: Target) -> None:
    """Pings over a WebSocket of the tenant's own."""
    ping = bytes([0x89, 0x80, 0, 0, 0, 0]) * 20_000
    path = f"/v1/sandboxes/{target.sandbox_id}/tunnel/9005"
    start = (f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {target.key}\r\nconnection: upgrade\r\n"
             "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    while True:
        with contextlib.suppress(OSError), target.connect() as client:
            client.sendall(start.encode())
            client.recv(4096)
            reader = threading.Thread(target=_swallow, args=(client,), daemon=True)
            reader.start()
            while True:
                client.sendall(ping)


def _swallow(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(1 << 20):
            pass


def _by_port(number: int) -> Callable[[Target], None]:
    def attack(target: Target) -> None:
        def work() -> None:
            while True:
                target.get(target.port_of(number))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        threads[0].join()

    return attack


# What the tenant's program answers, by port.
GUEST = r"""
import socket, threading
OK = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    9000: (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000),
    9001: (OK + b"x: ", b"a" * 65536),
    9002: (OK, b"x: 1\r\n" * 10000),
    9003: (OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10000),
    9004: (OK + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x: 1\r\n" * 10000),
    9005: (b"", b""),
}
def serve(client, first, piece):
    try:
        if piece:
            client.recv(65536)
            client.sendall(first)
            while True:
                client.sendall(piece)
        while client.recv(65536):
            pass
    except OSError:
        client.close()
def listen(port, first, piece):
    with socket.create_server(("127.0.0.1", port), backlog=64) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client, first, piece), daemon=True).start()
for port, (first, piece) in ANSWERS.items():
    threading.Thread(target=listen, args=(port, first, piece)).start()
"""

ATTACKS: dict[str, Callable[[Target], None]] = {
    "one header without end": endless_header,
    "a URL without end": endless_url,
    "small headers without end": small_headers,
    "a trailer without end": endless_trailer,
    "chunks of one byte": tiny_chunks,
    "pipelined requests": pipelined,
    "half-open connections": half_open,
    "slow heads": slow_heads,
    "small WebSocket frames": small_frames,
    "port: 100 Continue without end": _by_port(9000),
    "port: one header without end": _by_port(9001),
    "port: small headers without end": _by_port(9002),
    "port: chunks of one byte": _by_port(9003),
    "port: trailers without end": _by_port(9004),
}


class Probe:
    """What another tenant sees."""

    def __init__(self, server: RunningServer, sandbox: Sandbox) -> None:
        self._server, self._sandbox = server, sandbox

    def run(self, seconds: float) -> dict[str, Any]:
        """Milliseconds, for so long; failures are counted as the time that they took."""
        health: list[float] = []
        command: list[float] = []
        end, errors, descriptors = time.monotonic() + seconds, 0, 0
        while time.monotonic() < end:
            for times, work in ((health, self._health), (command, self._command)):
                began = time.perf_counter()
                try:
                    work()
                except Exception:
                    errors += 1
                times.append((time.perf_counter() - began) * 1e3)
            descriptors = max(descriptors, len(os.listdir(f"/proc/{self._server.pid}/fd")))
            time.sleep(0.02)
        return {"health": health, "command": command, "errors": errors, "descriptors": descriptors}

    def _health(self) -> None:
        connection = http.client.HTTPConnection(urlsplit(self._server.url).netloc, timeout=30)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status != 200:
                raise OSError
        finally:
            connection.close()

    def _command(self) -> None:
        assert self._sandbox.arun("echo hi").output.strip() == "hi"


def memory_of(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def row(name: str, seen: dict[str, Any], grown: float) -> dict[str, Any]:
    told: dict[str, Any] = {"attack": name, "errors": seen["errors"], "descriptors": seen["descriptors"],
                            "grown_mb": round(grown, 1)}
    for what in ("health", "command"):
        told[f"{what}_p50"] = round(statistics.median(seen[what]), 1)
        told[f"{what}_max"] = round(max(seen[what]), 1)
    return told


def show(told: dict[str, Any], bad: bool) -> None:
    print(f"{told['attack']:34} {told['health_p50']:8.1f} {told['health_max']:8.1f} {told['command_p50']:8.1f} "
          f"{told['command_max']:8.1f} {told['errors']:6d} {told['grown_mb']:8.1f} {told['descriptors']:6d}"
          f"{'  OVER' if bad else ''}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--only", help="attacks whose name has this in it")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = [name for name in ATTACKS if given.only is None or given.only in name]
    with tempfile.TemporaryDirectory(prefix="rock-attacks-") as folder:
        server = RunningServer(Path(folder), ROCK_API_KEY=OWNER)
        give_image(server.home)
        server.start()
        try:
            return play(server, names, given.seconds, given.json)
        finally:
            server.stop()


def play(server: RunningServer, names: list[str], seconds: float, as_json: bool) -> int:
    port = int(urlsplit(server.url).port or 0)
    with Client(server.url, OWNER) as owner:
        attacker = owner.create_key(CreateKey(name="attacker", tenant="attacker")).key
        other = owner.create_key(CreateKey(name="other", tenant="other")).key
    limits: dict[str, Any] = {"base_url": server.url, "image": IMAGE, "memory": "256m", "cpus": 1.0}
    with Sandbox(api_key=attacker, **limits) as hostile, Sandbox(api_key=other, **limits) as mine:
        hostile.fs.write("/tmp/guest.py", GUEST.encode())
        hostile.processes.start(["python3", "/tmp/guest.py"])
        target = Target(port, attacker, str(hostile.sandbox_id))
        probe = Probe(server, mine)
        probe.run(1.0)
        quiet = row("none", probe.run(seconds), 0.0)
        rows, failed = [quiet], 0
        if not as_json:
            print(f"{'':34} {'healthz':^17} {'session command':^17}")
            print(f"{'attack':34} {'p50 ms':>8} {'max':>8} {'p50 ms':>8} {'max':>8} {'errors':>6} {'grown MB':>8} "
                  f"{'fds':>6}")  # fmt: skip
            show(quiet, False)
        for name in names:
            before = memory_of(server.pid)
            process = multiprocessing.get_context("fork").Process(target=ATTACKS[name], args=(target,), daemon=True)
            process.start()
            time.sleep(0.5)
            seen = probe.run(seconds)
            grown = memory_of(server.pid) - before
            process.kill()
            process.join()
            rows.append(row(name, seen, grown))
            bad = seen["errors"] > 0 or any(rows[-1][f"{what}_p50"] - quiet[f"{what}_p50"] > MOST
                                            for what in ("health", "command"))  # fmt: skip
            failed += bad
            if not as_json:
                show(rows[-1], bad)
            probe.run(1.0)
        if as_json:
            print(json.dumps(rows, indent=1))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
