"""Real servers for the fault suite: processes that are killed with SIGKILL and started again in a tenth of a second.

One kind of world a set-up: "process" and "namespace" are the server of one machine, whose sandboxes outlive it; "apart"
is an admin and a rocklet in two processes, the sandboxes in the memory of the rocklet; "joined" is an admin and a
rocklet that joined it, with a real lease and the process runtime.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from rock.errors import Unavailable
from rock.protocol.routes import ROUTES
from rock.runtime.namespace import records
from rock.sync.transport import Transport

KINDS = ("process", "apart", "namespace", "joined")
KEY, TOKEN = "the owner's key", "what workers join by"
START = 100.0  # seconds for a server to serve


class Zygote:
    """The process that forks servers."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.zygote"]
        root = Path(__file__).parents[2]
        environ = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
                                       env=environ)  # fmt: skip

    def _ask(self, order: dict[str, Any]) -> int:
        writing: IO[str] | None = self._child.stdin
        reading: IO[str] | None = self._child.stdout
        assert writing is not None and reading is not None
        writing.write(json.dumps(order) + "\n")
        writing.flush()
        return int(reading.readline())

    def start(self, role: str, port: int, environ: dict[str, str], log: Path) -> int:
        return self._ask({"role": role, "port": port, "environ": environ, "log": str(log)})

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def close(self) -> None:
        self._child.communicate()


_given: set[int] = set()


def _free_port() -> int:
    """One that nobody listens on, and that no other server of this process has."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


class Server:
    """One server process with a home and a port that it keeps. `plan` is the file that its faults are read from."""

    def __init__(self, zygote: Zygote, folder: Path, role: str = "server", **environ: str) -> None:
        self.home = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.plan = folder / "plan"
        self.plan.write_text("")
        self.pid = 0
        self.starts = 0
        self._zygote = zygote
        self._role = role
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environ = {"ROCK_HOME": str(folder), "ROCK_POOL_SIZE": "0", "ROCK_FAULTS": str(self.plan), **environ}

    @property
    def alive(self) -> bool:
        if not self.pid:
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    def faults(self, text: str) -> None:
        """Have these faults from now on; "" for none."""
        beside = self.plan.with_suffix(".new")
        beside.write_text(text)
        beside.rename(self.plan)

    def start(self) -> float:
        """Start it and wait until it serves; answers the seconds that took."""
        began = time.monotonic()
        self.pid = self._zygote.start(self._role, self.port, self._environ, self.home / "output.log")
        self.starts += 1
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                if self._noted():
                    return time.monotonic() - began
            if not self.alive or time.monotonic() - began > START:
                raise AssertionError(f"the server did not start:\n{self.log()}")
            time.sleep(0.005)

    def _noted(self) -> bool:
        try:
            return bool(json.loads((self.home / "server.json").read_text())["pid"] == self.pid)
        except (OSError, ValueError):
            return False

    def ensure(self) -> bool:
        """Start it if it was killed, without faults; whether that was needed."""
        if self.alive:
            return False
        if self.pid:
            self._zygote.wait(self.pid)
            self.pid = 0
        self.faults("")
        self.start()
        return True

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        if self.pid:
            self._zygote.wait(self.pid)
            self.pid = 0

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self.pid and self.alive:
            os.kill(self.pid, signal.SIGTERM)
            self._zygote.wait(self.pid)
        elif self.pid:
            self._zygote.wait(self.pid)
        self.pid = 0

    def log(self) -> str:
        parts = [self.home / "output.log", self.home / "logs" / "server.log"]
        return "\n".join(p.read_text(errors="replace")[-6000:] for p in parts if p.exists())


class World:
    """The servers of one kind, and requests to them."""

    def __init__(self, kind: str, folder: Path, runtime: str = "process", **environ: str) -> None:
        """runtime: of a joined world. environ: of both of its servers."""
        assert kind in KINDS
        self.kind = kind
        self.key = KEY if kind == "joined" else None
        self.runtime = {"apart": "fake", "joined": runtime}.get(kind, kind)
        self._zygote = Zygote()
        self.worker: Server | None = None
        if kind == "joined":
            environ = {"ROCK_DRAIN_SECONDS": "0.5", **environ}
            self.server = Server(self._zygote, folder / "admin", ROCK_WORKERS="none", ROCK_WORKER_KEY=TOKEN,
                                 ROCK_API_KEY=KEY, **environ)  # fmt: skip
            self.worker = Server(
                self._zygote, folder / "worker", "rocklet", ROCK_RUNTIME=runtime, ROCK_JOIN=self.server.url,
                ROCK_API_KEY=TOKEN, ROCK_WORKER_NAME="one", **environ,
            )  # fmt: skip
            self.server.start()
            self.worker.start()
            self.http = Transport(self.server.url, KEY, reconnect_timeout=0)
            self._await_worker()
            return
        if kind == "apart":
            self.worker = Server(self._zygote, folder / "worker", "rocklet", ROCK_RUNTIME="fake")
            self.worker.start()
            environ = {"ROCK_DRAIN_SECONDS": "0.5", **environ}
            self.server = Server(self._zygote, folder / "admin", ROCK_WORKERS=f"there={self.worker.url}")
        else:
            self.server = Server(self._zygote, folder / "home", ROCK_RUNTIME=kind)
        self.server.start()
        self.http = Transport(self.server.url, reconnect_timeout=0)  # each failure is seen by the model

    def _await_worker(self) -> None:
        """Until sandboxes can be made."""
        end = time.monotonic() + START
        while not any(worker["state"] == "ready" for worker in self.ask("list_workers")["items"]):
            assert time.monotonic() < end, self.server.log()
            time.sleep(0.05)

    @property
    def outlives(self) -> bool:
        """Whether sandboxes live on when what holds them is killed."""
        return self.runtime != "fake"

    @property
    def holder(self) -> Server:
        """Whose children the sandboxes' launchers are, and in whose home they are."""
        return self.worker or self.server

    @property
    def records(self) -> set[str]:
        """Ids of sandboxes whose records are on the worker's disk."""
        home = self.worker.home if self.worker else self.server.home
        return {path.name for path in (home / "run" / "records").iterdir() if not path.name.startswith(".")}

    @property
    def pids(self) -> int:
        """How many pid 1 of sandboxes there are on this machine that a server of ours started."""
        if self.runtime == "namespace":
            return len(records.slots(self.holder.home / "run" / "namespace"))
        return len(self.roots)

    @property
    def roots(self) -> list[int]:
        """The pid 1 of each sandbox of the process runtime."""
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/fd/1").startswith(f"{self.holder.home}/run/process/"):
                    found.append(int(entry))
        return found

    def ensure(self) -> None:
        if self.worker is not None:
            self.worker.ensure()
        self.server.ensure()

    def calm(self) -> None:
        """No faults, and everything serves."""
        for server in filter(None, (self.server, self.worker)):
            server.faults("")
        for _ in range(5):
            self.ensure()
            with contextlib.suppress(Unavailable):  # it was about to be killed
                self.ask("health")
                return

    @property
    def lives(self) -> int:
        """How often what holds sandboxes in its memory was started."""
        return self.worker.starts if self.worker is not None and not self.outlives else 0

    def config(self, **fields: object) -> dict[str, object]:
        image = "python:3.11" if self.runtime == "fake" else "host"
        return {"image": image, "memory": "128m", "cpus": 0.5, "auto_clear_seconds": 3600, **fields}

    def ask(self, name: str, body: object = None, key: str | None = None, query: str = "", **path: str) -> Any:
        route = ROUTES[name]
        target = route.url(**path) + (f"?{query}" if query else "")
        return self.http.json(route.method, target, body, timeout=30.0, key=key)

    def launchers(self) -> list[int]:
        """Pids of the children of the server: of the namespace runtime that is its launcher."""
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                fields = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.holder.pid and fields[0] != "Z":
                    found.append(int(entry))
        return found

    def close(self) -> None:
        self.calm()
        for item in self.ask("list_sandboxes", query="state=pending,running,stopping&limit=500")["items"]:
            self.ask("stop_sandbox", sandbox_id=item["sandbox_id"])
        self.server.stop()
        if self.worker is not None:
            self.worker.stop()
        self._zygote.close()
