"""A server of a bench's own, and raw connections to it, whose cost is small next to what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rock.guest.init import process_tree

IMAGE = "bench:1"


@contextlib.contextmanager
def server(main: str = "", **environment: str) -> Iterator[tuple[str, int, Path]]:
    """(URL, pid, home) of a server with an image IMAGE; whatever it has is stopped with it. main: the path of another
    program that runs it."""
    from rock.images.store import ImageStore

    with tempfile.TemporaryDirectory(prefix="rock-bench-") as folder:
        home = Path(folder)
        ImageStore(home / "images").from_host(IMAGE)
        environ = {**os.environ, "ROCK_POOL_SIZE": "0", **environment, "ROCK_HOME": folder}
        program = [main] if main else ["-m", "rock.cli.server"]
        command = [sys.executable, *program, "--host", "127.0.0.1", "--port", "0"]
        with open(home / "output.log", "wb") as log:
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{_port(home, process)}", process.pid, home
        finally:
            died = process.poll()
            process.send_signal(signal.SIGTERM)
            process.wait(120)
            if died is not None:
                logs = [home / "output.log", home / "logs" / "server.log"]
                print(f"the server ended by itself ({died}):", *(p.read_text()[-3000:] for p in logs if p.exists()))


def _port(home: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((home / "server.json").read_text())["port"])
        time.sleep(0.02)
    raise SystemExit((home / "output.log").read_text())


def raise_file_limit() -> int:
    """As many descriptors as may be had."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def memory(pid: int) -> int:
    """Bytes of a process, pages that it shares split among those who share them; 0 for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except FileNotFoundError:
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def available() -> int:
    """Bytes of memory that the machine could still give."""
    text = Path("/proc/meminfo").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("MemAvailable")).split()[1]) << 10


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """A process and all below it."""
    return [root, *(entry.pid for entry in process_tree.descendants(process_tree.scan(), root))]


def percentiles(times: list[float]) -> str:
    """Milliseconds: minimum / median / 99th percentile."""
    ordered = sorted(times)
    return " / ".join(f"{at(ordered, share) * 1e3:.2f}" for share in (0.0, 0.5, 0.99))


def at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Raw(asyncio.Protocol):
    """One kept-alive connection that asks the same again and again: `ask` sends, and its answer's end is awaited."""

    def __init__(self) -> None:
        self._buffer = b""
        self._done: asyncio.Future[int] | None = None
        self.body = b""  # of the last answer
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator or self._done is None:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
        if len(body) >= length:
            self._buffer, self.body = b"", body
            if not self._done.done():
                self._done.set_result(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(str(exc or "closed")))

    async def ask(self, request: bytes) -> int:
        """The status of the answer."""
        assert self.transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._done


async def connect(url: str) -> Raw:
    host, _, port = url.removeprefix("http://").partition(":")
    _, made = await asyncio.get_running_loop().create_connection(Raw, host, int(port))
    return made


def request(method: str, path: str, key: str = "", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
    if key:
        lines.append(f"authorization: Bearer {key}")
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
