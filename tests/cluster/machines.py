"""Rocklets that join and servers without sandboxes of their own, as processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import RunningServer, give_image
from tests.leaks import Inventory, take_inventory
from tests.waiting import until

KEY = "the owner's key"
TOKEN = "what workers join by"


class Machine:
    """A rocklet. prefix: of its command line, as `ip netns exec NAME`."""

    def __init__(self, home: Path, *words: str, prefix: tuple[str, ...] = (), **environment: str) -> None:
        self.home = home
        self.home.mkdir(parents=True, exist_ok=True)
        self.words = words
        self.prefix = prefix
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        give_image(home)

    def start(self, port: int = 0) -> None:
        environment = {**os.environ, "ROCK_POOL_SIZE": "0", "ROCK_PROCESSES": "1", **self.environment,
                       "ROCK_HOME": str(self.home)}  # fmt: skip
        with open(self.home / "output.log", "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-c", "from rock.cli.scripts import rocklet_main; rocklet_main()",
                 "--port", str(port), *self.words],
                env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        until(lambda: self.note() is not None, 60.0, "the rocklet did not start")

    def note(self) -> int | None:
        """The port that it listens on."""
        assert self.process is not None and self.process.poll() is None, self.log()
        try:
            note = json.loads((self.home / "server.json").read_text())
        except (OSError, ValueError):
            return None
        return int(note["port"]) if note.get("pid") == self.process.pid else None

    def log(self) -> str:
        parts = [self.home / "output.log", self.home / "logs" / "server.log"]
        return "\n".join(part.read_text(errors="replace")[-4000:] for part in parts if part.exists())

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def end(self) -> None:
        """End it for good."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(60)

    def assert_clean(self, seconds: float = 20.0) -> None:
        """None of its sandboxes is left, after its end."""
        assert self.process is not None
        end = time.monotonic() + seconds
        while (left := take_inventory(self.home, self.process.pid) - Inventory()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, f"{left}\n{self.log()}"

    def sandboxes(self) -> set[str]:
        """Ids of those that have a record here."""
        folder = self.home / "run" / "records"
        return {entry.name.removesuffix(".json") for entry in folder.iterdir()} if folder.is_dir() else set()


def server(home: Path, port: int = 0, /, **environment: str) -> RunningServer:
    """A server without sandboxes of its own."""
    home.mkdir(parents=True, exist_ok=True)
    given = {"ROCK_API_KEY": KEY, "ROCK_WORKER_KEY": TOKEN, "ROCK_WORKERS": "none", "ROCK_PROCESSES": "1",
             **environment}  # fmt: skip
    made = RunningServer(home, **given)
    made.start(port)
    return made
