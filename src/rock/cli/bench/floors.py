"""Lower bounds for `rock bench`: bash on pipes, alone and behind a minimal HTTP server.

The HTTP server is uvicorn as in ROCK, over an application that passes a line to a bash: no routes, no keys, no ids, no
framing, no isolation. It is a separate process, `python -m rock.cli.bench.floors FOLDER`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rock.cli.serve.serve import http_over, listen, run
from rock.errors import Unavailable
from rock.host import atomic_file
from rock.http.asgi import Answer, Receive, Request, Scope, Send

_NOTE = "server.json"


class Shell:
    """A plain bash on pipes: a line in, a line out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @classmethod
    async def open(cls) -> Shell:
        return cls(await asyncio.create_subprocess_exec("bash", "--norc", "--noprofile", stdin=-1, stdout=-1))

    async def echo(self) -> bytes:
        self._stdin.write(b"echo hi\n")
        return await self._stdout.readline()

    async def close(self) -> None:
        self._stdin.close()
        await self._process.wait()


async def bare_commands(count: int) -> list[float]:
    """Milliseconds of `echo hi` in a bash on pipes: no server, no framing."""
    shell = await Shell.open()
    values = []
    for _ in range(count):
        began = time.perf_counter()
        await shell.echo()
        values.append((time.perf_counter() - began) * 1000)
    await shell.close()
    return values


@contextlib.contextmanager
def serving(folder: str, *words: str, env: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """(URL, pid) of a Python process that writes its port to the folder once it serves; it is stopped at the end."""
    note, log = Path(folder) / _NOTE, Path(folder) / "output.log"
    with log.open("wb") as out:
        child = subprocess.Popen([sys.executable, *words], env=env, stdout=out, stderr=out)
    try:
        yield f"http://127.0.0.1:{_port(child, note, log)}", child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)


def _port(child: subprocess.Popen[bytes], note: Path, log: Path) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end and child.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads(note.read_text())["port"])
        time.sleep(0.02)
    raise Unavailable(f"the server did not start: {log.read_text(errors='replace')[-500:]}",
                      hint="the text is the end of its log; repeat with less load on the machine")


@contextlib.contextmanager
def bare_server() -> Iterator[str]:
    """The URL of a minimal HTTP server; each of its paths has its own bash."""
    with (
        tempfile.TemporaryDirectory(prefix="rock-bench-") as folder,
        serving(folder, "-m", "rock.cli.bench.floors", folder) as (url, _),
    ):
        yield url


async def serve(folder: Path) -> None:
    """Serve until SIGTERM."""
    shells: dict[str, Shell] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive, {}).body()
        shell = shells.get(scope["path"])
        if shell is None:
            shell = shells[scope["path"]] = await Shell.open()
        await Answer(await shell.echo(), content_type=b"text/plain").send(send)

    listener = listen("127.0.0.1", 0)
    http = http_over(app)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(http, "should_exit", True))
    atomic_file.replace(folder / _NOTE, json.dumps({"port": listener.getsockname()[1]}))
    await http.serve(sockets=[listener])
    for shell in shells.values():
        await shell.close()


if __name__ == "__main__":
    run(serve(Path(sys.argv[1])))
