"""`rocklet --join URL --workers 2`: two workers of a server on one machine, with one parent and one home."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import rocklet_process
from tests.waiting import until

from rock.cli.serve import group
from rock.errors import InvalidConfig, Unsupported
from rock.protocol.node import WorkerInfo, WorkerState
from rock.settings import Settings
from rock.sync import Client, Sandbox, SandboxConfig

SCRIPT = Path(sys.executable).with_name("rocklet")
KEY = "the key of the workers"


class Rocklets:
    """A `rocklet` with a home."""

    def __init__(self, home: Path, server: str) -> None:
        self.home = home
        self.server = server
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        environment = {**os.environ, "ROCK_HOME": str(self.home), "ROCK_API_KEY": KEY, "ROCK_POOL_SIZE": "0",
                       "ROCK_PROCESSES": "1"}  # fmt: skip
        command = [str(SCRIPT), "--port", "0", "--join", self.server, "--name", "far", *more]
        with open(self.home / "output.log", "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def process_of(self, number: int) -> int:
        """The pid of a process."""
        assert self.process is not None
        return rocklet_process(self.process.pid, self.home, number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(60) == 0, (self.home / "output.log").read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[RunningServer, Rocklets, Client]]:
    """A server without sandboxes of its own, and the workers that join it."""
    for name in ("server", "far"):
        (tmp_path / name).mkdir()
    give_image(tmp_path / "far")
    server = RunningServer(tmp_path / "server", ROCK_API_KEY=KEY, ROCK_WORKERS="none", ROCK_PROCESSES="1",
                           ROCK_WORKER_LEASE="3", ROCK_WORKER_GRACE="6")  # fmt: skip
    server.start()
    rocklets = Rocklets(tmp_path / "far", server.url)
    try:
        with Client(server.url, KEY) as client:
            yield server, rocklets, client
    finally:
        with Client(server.url, KEY) as client:
            for info in client.list_sandboxes(states="pending,running,stopping"):
                client.stop_sandbox(info.sandbox_id)
        rocklets.stop()
        server.stop()


def ready(client: Client) -> list[str]:
    return sorted(worker.name for worker in client.list_workers() if worker.state is WorkerState.READY)


def limit_of(worker: WorkerInfo) -> int | None:
    return None if worker.status is None else worker.status.sandbox_limit


def make(server: RunningServer, count: int) -> list[Sandbox]:
    made = []
    for number in range(count):
        config = SandboxConfig(base_url=server.url, api_key=KEY, image=IMAGE, memory="128m", cpus=0.5, network="none")
        made.append(Sandbox(config))
        made[-1].start()
        made[-1].arun(f"x={number}")
    return made


def test_each_process_is_a_worker_and_recovers_by_itself(
    cluster: tuple[RunningServer, Rocklets, Client]
) -> None:
    server, rocklets, client = cluster
    rocklets.start("--workers", "2")
    until(lambda: ready(client) == ["far", "far-1"], 60.0)
    sandboxes = make(server, 4)
    assert {one.info().worker for one in sandboxes} == {"far", "far-1"}

    killed, other = rocklets.process_of(1), rocklets.process_of(0)
    os.kill(killed, signal.SIGKILL)
    for number, sandbox in enumerate(sandboxes):
        assert sandbox.arun("echo $x", timeout=60).output == f"{number}\n"
    assert rocklets.process_of(0) == other and rocklets.process_of(1) != killed

    rocklets.kill()  # the parent: its processes end, and the next ones find the sandboxes
    rocklets.start("--workers", "2")
    for number, sandbox in enumerate(sandboxes):
        assert sandbox.arun("echo $x", timeout=60).output == f"{number}\n"


def test_the_number_of_processes_changes_without_a_loss(cluster: tuple[RunningServer, Rocklets, Client]) -> None:
    server, rocklets, client = cluster
    rocklets.start()
    until(lambda: ready(client) == ["far"], 60.0)
    [first] = make(server, 1)
    rocklets.stop()

    rocklets.start("--workers", "2")
    until(lambda: ready(client) == ["far", "far-1"], 60.0)
    assert first.arun("echo $x", timeout=60).output == "0\n"
    more = make(server, 3)
    assert {one.info().worker for one in more} == {"far", "far-1"}
    rocklets.stop()

    rocklets.start()
    assert rocklets.process is not None
    assert rocklets.process.wait(60) != 0
    assert "--workers 2" in (rocklets.home / "output.log").read_text()

    rocklets.start("--workers", "2")
    for number, sandbox in enumerate(more):
        assert sandbox.arun("echo $x", timeout=60).output == f"{number}\n"
        if sandbox.info().worker == "far-1":
            sandbox.stop()
    rocklets.stop()
    rocklets.start()
    assert first.arun("echo $x", timeout=60).output == "0\n"
    assert not (rocklets.home / "processes").exists()


def test_a_drain_reaches_all_processes(cluster: tuple[RunningServer, Rocklets, Client]) -> None:
    server, rocklets, client = cluster
    rocklets.start("--workers", "2")
    until(lambda: ready(client) == ["far", "far-1"], 60.0)
    sandboxes = make(server, 3)
    until((rocklets.home / "server.json").exists, 10.0)
    environment = {**os.environ, "ROCK_HOME": str(rocklets.home), "ROCK_API_KEY": KEY}
    drained = subprocess.run([sys.executable, "-m", "rock.cli.main", "worker", "drain", "--self"], env=environment,
                             capture_output=True, text=True, check=False)  # fmt: skip
    assert "it has 3" in drained.stdout, drained.stderr
    until(lambda: [limit_of(one) for one in client.list_workers()] == [0, 0], 20.0)
    for number, sandbox in enumerate(sandboxes):
        assert sandbox.arun("echo $x").output == f"{number}\n"


def test_a_taken_port_is_an_error_at_the_start(cluster: tuple[RunningServer, Rocklets, Client]) -> None:
    _, rocklets, _ = cluster
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rocklets.start("--workers", "2", "--port", str(taken.getsockname()[1] - 1))
        assert rocklets.process is not None
        assert rocklets.process.wait(60) != 0
        assert "cannot listen" in (rocklets.home / "output.log").read_text()


def test_settings_of_the_processes(tmp_path: Path) -> None:
    base = Settings(home=tmp_path, join="http://server:8080", worker_name="far", port=9000, sandbox_limit=5)
    one, two = group.settings_of(base, 2)
    assert (one.worker_name, one.port, one.home) == ("far", 9000, tmp_path)
    assert (two.worker_name, two.port, two.home) == ("far-1", 9001, tmp_path / "processes" / "1")
    assert one.sandbox_limit == two.sandbox_limit == 3

    advertised = Settings(home=tmp_path, join="http://s", port=0, advertise="https://[::1]:9000")
    assert [each.advertise for each in group.settings_of(advertised, 2)] == ["https://[::1]:9000", "https://[::1]:9001"]
    assert [each.port for each in group.settings_of(advertised, 2)] == [0, 0]

    with pytest.raises(Unsupported, match="joins none"):
        group.settings_of(Settings(home=tmp_path), 2)
    with pytest.raises(InvalidConfig, match="65535 to 65536"):
        group.settings_of(Settings(home=tmp_path, join="http://s", port=65535), 2)
    for url in ("http://host", "http://host:65535", "http://host:x"):
        with pytest.raises(InvalidConfig, match="has no port"):
            group.settings_of(Settings(home=tmp_path, join="http://s", advertise=url), 2)
