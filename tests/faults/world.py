"""Real servers for the fault suite: processes that are killed with SIGKILL and started again in a tenth of a second.

Kinds of worlds:

process, namespace  the server of one machine, whose sandboxes outlive it, with that runtime
apart               an admin and a rocklet in two processes, the sandboxes in the memory of the rocklet
joined              an admin and a rocklet that joined it, with a real lease and the process runtime
joined-namespace    the same with the namespace runtime
cluster             an admin and three rocklets that joined it, with the process runtime
branches            as namespace, with checkpoints, rollbacks, forks and pauses (branches.py)
postgres            as process, with PostgreSQL as the store
damage              as process; files of the rocklet are damaged between a kill and the next start
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from rock.errors import StorageFull, Unavailable, from_wire
from rock.protocol.routes import ROUTES
from rock.runtime.namespace import records
from rock.sync.transport import Transport
from tests.leaks import homes, members_of
from tests.store.postgres_server import Databases, postgres

KINDS = ("process", "apart", "namespace", "branches", "joined", "joined-namespace", "cluster", "postgres", "damage")
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
        self._environ = {"ROCK_HOME": str(folder), "ROCK_POOL_SIZE": "0", "ROCK_FAULTS": str(self.plan),
                         "ROCK_SNAPSHOT_TTL": "1000000", **environ}  # longer than the clock jumps

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
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)
        self.await_end()

    def await_end(self) -> None:
        """Wait for a process that was told to end, or was killed."""
        if self.pid:
            self._zygote.wait(self.pid)
        self.pid = 0

    def log(self) -> str:
        parts = [self.home / "output.log", self.home / "logs" / "server.log"]
        return "\n".join(p.read_text(errors="replace")[-6000:] for p in parts if p.exists())


class World:
    """The servers of one kind, and requests to them."""

    def __init__(self, kind: str, folder: Path, runtime: str = "process", **environ: str) -> None:
        """runtime: of the workers that join. environ: of all servers."""
        assert kind in KINDS
        self.kind = kind
        joins = kind.startswith("joined") or kind == "cluster"
        if kind == "joined-namespace":
            runtime = "namespace"
        self.key = KEY if joins else None
        alone = {"apart": "fake", "namespace": "namespace", "branches": "namespace"}
        self.runtime = runtime if joins else alone.get(kind, "process")
        self._zygote = Zygote()
        self._owned = contextlib.ExitStack()
        self.database: Databases | None = None
        self.workers: list[Server] = []
        if joins:
            environ = {"ROCK_DRAIN_SECONDS": "0.5", "ROCK_PROCESSES": "1", **environ}  # each server has one role
            self.server = Server(self._zygote, folder / "admin", ROCK_WORKERS="none", ROCK_WORKER_KEY=TOKEN,
                                 ROCK_API_KEY=KEY, **environ)  # fmt: skip
            names = ("one", "two", "three") if kind == "cluster" else ("one",)
            self.workers = [
                Server(self._zygote, folder / f"worker-{name}", "rocklet", ROCK_RUNTIME=runtime,
                       ROCK_JOIN=self.server.url, ROCK_API_KEY=TOKEN, ROCK_WORKER_NAME=name, **environ)
                for name in names
            ]  # fmt: skip
            for server in (self.server, *self.workers):
                server.start()
            self.http = Transport(self.server.url, KEY, reconnect_timeout=0)
            self._await_workers()
            return
        if kind == "apart":
            environ = {"ROCK_DRAIN_SECONDS": "0.5", "ROCK_PROCESSES": "1", **environ}
            self.workers = [Server(self._zygote, folder / "worker", "rocklet", ROCK_RUNTIME="fake",
                                   ROCK_PROCESSES="1")]  # fmt: skip
            self.workers[0].start()
            self.server = Server(self._zygote, folder / "admin", ROCK_WORKERS=f"there={self.workers[0].url}")
        else:
            if kind == "postgres":
                self.database = self._owned.enter_context(postgres())
                environ = {"ROCK_STORE": self.database(), **environ}
            self.server = Server(self._zygote, folder / "home", ROCK_RUNTIME=self.runtime, **environ)
        self.server.start()
        self.http = Transport(self.server.url, reconnect_timeout=0)  # each failure is seen by the model

    def _await_workers(self) -> None:
        """Until sandboxes can be made on each."""
        end = time.monotonic() + START
        while any(worker["state"] != "ready" for worker in self.ask("list_workers")["items"]):
            assert time.monotonic() < end, self.server.log()
            time.sleep(0.05)

    @property
    def worker(self) -> Server | None:
        """The first that is a process of its own."""
        return self.workers[0] if self.workers else None

    @property
    def servers(self) -> list[Server]:
        """The admin, then the workers."""
        return [self.server, *self.workers]

    @property
    def holders(self) -> list[Server]:
        """Those that hold sandboxes."""
        return self.workers or [self.server]

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
        """Ids of sandboxes whose records are on the disks of workers."""
        folders = [home / "run" / "records" for server in self.holders for home in homes(server.home)]
        return {path.name for folder in folders for path in folder.iterdir() if not path.name.startswith(".")}

    @property
    def pids(self) -> int:
        """How many pid 1 of sandboxes there are on this machine that a server of ours started."""
        if self.runtime == "namespace":
            folders = [home / "run" / "namespace" for server in self.holders for home in homes(server.home)]
            return sum(len(records.slots(folder)) for folder in folders)
        return len(self.roots)

    @property
    def roots(self) -> list[int]:
        """The pid 1 of each sandbox of the process runtime."""
        folders = tuple(f"{home}/run/process/" for server in self.holders for home in homes(server.home))
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/fd/1").startswith(folders):
                    found.append(int(entry))
        return found

    def ensure(self) -> None:
        for server in (*self.workers, self.server):
            server.ensure()

    def calm(self) -> None:
        """No faults, and everything serves."""
        for server in self.servers:
            server.faults("")
        end = time.monotonic() + START
        while True:
            self.ensure()
            try:
                self.ask("list_sandboxes", query="limit=1")
                return
            except (Unavailable, StorageFull):  # it was about to be killed, or its database is starting
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

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

    def look(self, sandbox_id: str, command: str) -> str:
        """What a shell command prints. The request has no idempotency key: a journal that is damaged refuses keys, and
        this one all the same tells what was executed. RockError."""
        route = ROUTES["execute"]
        headers = {"content-type": "application/json", "host": f"127.0.0.1:{self.server.port}"}
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30.0)) as connection:
            body = json.dumps({"command": ["sh", "-c", command], "timeout": 25})
            connection.request(route.method, route.url(sandbox_id=sandbox_id), body, headers)
            answer = connection.getresponse()
            body = json.loads(answer.read())
        if answer.status >= 300:
            raise from_wire(body, answer.status)
        return str(body["stdout"])

    def launchers(self, server: Server | None = None) -> list[int]:
        """Pids of the children of a server that holds sandboxes: of the namespace runtime that is its launcher."""
        pid = (server or self.holder).pid
        return [child for parent in members_of(pid) or [pid] for child in children(parent)]

    def zygotes(self, server: Server | None = None) -> list[int]:
        """Pids of the processes that pid 1 of new sandboxes are forked of: children of a launcher, and no pid 1."""
        return [pid for launcher in self.launchers(server) for pid in children(launcher) if not _is_pid_1(pid)]

    def close(self) -> None:
        self.calm()
        for item in self.ask("list_sandboxes", query="state=pending,running,stopping&limit=500")["items"]:
            self.ask("stop_sandbox", sandbox_id=item["sandbox_id"])
        for server in self.servers:  # all at once
            if server.alive:
                os.kill(server.pid, signal.SIGTERM)
        for server in self.servers:
            server.await_end()
        self._zygote.close()
        self._owned.close()


def children(pid: int) -> list[int]:
    """Pids of the children of a process."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry))
    return found


def _is_pid_1(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return len(line.split()) > 2  # of a namespace below ours
    return False
