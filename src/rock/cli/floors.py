"""What `rock bench` puts its figures next to: bash on pipes, alone and behind a bare HTTP server.

The HTTP server is uvicorn as ROCK's is, over an application that does nothing but hand a line to a bash: no routes, no
keys, no ids, no framing, no isolation. It is a process of its own, `python -m rock.cli.floors FOLDER`.
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
from collections.abc import Iterator
from pathlib import Path

from rock.cli.serve import http_over, listen, run
from rock.errors import Unavailable
from rock.wire.asgi import Answer, Receive, Request, Scope, Send

_NOTE = "floor.json"


class Shell:
    """A bare bash on pipes: a line in, a line out."""

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
def bare_server() -> Iterator[str]:
    """The URL of a bare HTTP server; each path of it has a bash of its own."""
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as folder:
        child = subprocess.Popen([sys.executable, "-m", "rock.cli.floors", folder])
        note, end = Path(folder) / _NOTE, time.monotonic() + 60
        try:
            while not note.exists():
                if child.poll() is not None or time.monotonic() > end:
                    raise Unavailable("the bare server did not start")
                time.sleep(0.02)
            yield f"http://127.0.0.1:{json.loads(note.read_text())['port']}"
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(60)


async def serve(folder: Path) -> None:
    """Until SIGTERM."""
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
    (folder / ".note").write_text(json.dumps({"port": listener.getsockname()[1]}))
    (folder / ".note").rename(folder / _NOTE)
    await http.serve(sockets=[listener])
    for shell in shells.values():
        await shell.close()


if __name__ == "__main__":
    run(serve(Path(sys.argv[1])))
