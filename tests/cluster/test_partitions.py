"""Three machines with addresses of their own: a writer on the first, a reader and a worker on the second, a worker on
the third. What the network between them does to sandboxes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.machines import KEY, TOKEN, Machine
from tests.cluster.net import Net, network
from tests.cluster.test_roles import loads, one_is_away
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until

from rock.errors import Lost, NoCapacity, RockError, SandboxError, Unavailable
from rock.protocol.node import WorkerInfo, WorkerState
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox, SandboxConfig

pytestmark = [
    pytest.mark.skipif(not os.environ.get("ROCK_TEST_CLUSTER"),
                       reason="takes minutes and root: set ROCK_TEST_CLUSTER=1, or make cluster"),
    pytest.mark.timeout(600),
]  # fmt: skip
WRITER, NEAR, FAR = 1, 2, 3  # machines
LEASE = 10.0
PORT = 8080


class Site:
    """The cluster, and what it is asked."""

    def __init__(self, folder: Path, net: Net, store: str) -> None:
        self.folder = folder
        self.net = net
        self.store = store
        self.writer = self._server("writer", WRITER, "write", 8080)
        self.readers = [self._server("reader", NEAR, "read", 8081)]
        self.url = f"{self.writer.url};{self.readers[0].url}"
        self.machines = {"near": self._worker("near", NEAR), "far": self._worker("far", FAR)}
        self.settle()

    def _server(self, name: str, machine: int, role: str, port: int) -> RunningServer:
        home = self.folder / name
        home.mkdir()
        address = self.net.address(machine)
        made = OnMachine(home, address, ROCK_API_KEY=KEY, ROCK_WORKER_KEY=TOKEN, ROCK_ROLE=role, ROCK_STORE=self.store,
                         ROCK_WORKER_LEASE=str(LEASE), ROCK_WORKER_GRACE=str(LEASE * 1.2))  # fmt: skip
        made.prefix = list(self.net.inside(machine))
        made.start(port, 90.0)
        return made

    def _worker(self, name: str, machine: int) -> Machine:
        servers = f"{self.writer.url},{self.readers[0].url}"
        made = Machine(self.folder / name, "--join", servers, "--token", TOKEN, "--name", name, "--host", "0.0.0.0",
                       prefix=self.net.inside(machine), ROCK_LEASE_LOST="stop")  # fmt: skip
        made.start(PORT + 2)
        return made

    def settle(self) -> None:
        """Both workers are there, and each server knows it."""
        self.net.rules()
        until(lambda: set(self.states().values()) == {WorkerState.READY}, 120.0)
        time.sleep(1.5)

    def workers(self) -> dict[str, WorkerInfo]:
        with Client(self.writer.url, KEY) as client:
            return {worker.name: worker for worker in client.list_workers()}

    def states(self) -> dict[str, WorkerState]:
        return {name: worker.state for name, worker in self.workers().items()}

    def config(self, **more: Any) -> SandboxConfig:
        usual = {"base_url": self.url, "api_key": KEY, "image": IMAGE, "memory": "64m", "cpus": 0.1}
        return SandboxConfig(**{**usual, **more})

    def on(self, name: str) -> Sandbox:
        """A running sandbox on that worker."""
        others = [other for other in self.machines if other != name]
        with Client(self.writer.url, KEY) as client:
            for other in others:
                client.drain_worker(other)
            try:
                made = Sandbox(self.config())
                made.start()
            finally:
                for other in others:
                    client.drain_worker(other, False)
            assert client.get_sandbox(str(made.sandbox_id)).worker == name
        return made

    def info(self, sandbox: Sandbox) -> Any:
        with Client(self.url, KEY) as client:
            return client.get_sandbox(str(sandbox.sandbox_id))

    def end(self) -> None:
        self.net.rules()
        try:
            self.writer.stop()
            for reader in self.readers:
                assert reader.process is not None
                reader.process.terminate()
                assert reader.process.wait(60) == 0, reader.log()
        finally:
            for machine in self.machines.values():
                machine.end()
        for machine in self.machines.values():
            machine.assert_clean()


class OnMachine(RunningServer):
    """A server that listens on the address of its machine."""

    def __init__(self, home: Path, address: str, **environment: str) -> None:
        super().__init__(home, **environment)
        self.address = address

    def command(self, port: int) -> list[str]:
        return [word if word != "127.0.0.1" else self.address for word in super().command(port)]

    def reached_at(self, port: int) -> str:
        return f"http://{self.address}:{port}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, database: Callable[[], str]) -> Iterator[Site]:
    with network(3) as net:
        made = Site(tmp_path_factory.mktemp("cluster"), net, database())
        try:
            yield made
        finally:
            made.end()


class Census(threading.Thread):
    """Sees which worker holds which sandbox, again and again: none may ever be on two."""

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self.site = site
        self.seen: dict[str, set[str]] = {}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            for name, machine in self.site.machines.items():
                for sandbox in machine.sandboxes():
                    self.seen.setdefault(sandbox, set()).add(name)

    def end(self) -> None:
        self.over.set()
        self.join(30)
        assert all(len(workers) == 1 for workers in self.seen.values()), self.seen


@pytest.fixture
def census(site: Site) -> Iterator[Census]:
    made = Census(site)
    made.start()
    yield made
    made.end()
    assert made.seen


def creates(site: Site, told: list[tuple[str, str]]) -> Callable[[], None]:
    """Makes sandboxes, asks something of them and stops them; what it was told goes into `told`."""

    def work() -> None:
        made = Sandbox(site.config(startup_timeout=60))
        try:
            made.start()
            assert made.execute("echo here").stdout == "here\n"
            made.stop()
            told.append((str(made.sandbox_id), "well"))
        except (Unavailable, NoCapacity, SandboxError) as error:
            told.append((str(made.sandbox_id or ""), f"{type(error).__name__}: {error}"))

    return work


def truthful(site: Site, told: list[tuple[str, str]]) -> None:
    """Whoever was told that all went well had a sandbox that was stopped by its user; nothing is left running."""
    with Client(site.url, KEY) as client:
        until(lambda: not client.list_sandboxes(states="pending,stopping"), 120.0)
        for name, what in told:
            if what == "well":
                info = client.get_sandbox(name)
                assert (info.state, info.cause) == (State.STOPPED, Cause.USER), (name, info)
        for info in client.list_sandboxes(states="running"):
            client.stop_sandbox(info.sandbox_id)  # of a start whose answer was not heard


def test_latency_and_loss(site: Site, census: Census) -> None:
    """200 ms from end to end and back, and every twentieth packet lost: slow, and nothing else."""
    told: list[tuple[str, str]] = []
    kept = [site.on("near"), site.on("far")]
    epochs = {name: worker.epoch for name, worker in site.workers().items()}
    site.net.rules(delay=0.1, loss=0.05)
    with loads(creates(site, told), creates(site, told)):
        time.sleep(LEASE * 2)
        until(lambda: len(told) >= 6, 240.0)
        for sandbox in kept:
            assert sandbox.execute("echo still").stdout == "still\n"
    site.settle()
    assert [what for _, what in told if what != "well"] == []
    assert {name: worker.epoch for name, worker in site.workers().items()} == epochs  # none was taken for lost
    for sandbox in kept:
        sandbox.stop()
    truthful(site, told)


@pytest.mark.parametrize("ways", ["both", "out", "in"])
def test_a_worker_is_cut_off(site: Site, census: Census, ways: str) -> None:
    """Both ways, or only what it sends, or only what it is sent: it gives up before it is taken for lost; whoever is on
    the other worker does not notice."""
    healthy, cut_off = site.on("near"), site.on("far")
    epoch = site.workers()["far"].epoch
    far = site.machines["far"]
    out = tuple((FAR, other) for other in (0, WRITER, NEAR))
    into = tuple((other, FAR) for other in (0, WRITER, NEAR))
    told: list[tuple[str, str]] = []
    gone_at, lost_at = 0.0, 0.0

    def well() -> None:
        assert healthy.execute("echo here").stdout == "here\n"

    with loads(creates(site, told), well) as running:
        site.net.rules(cut=(out if ways != "in" else ()) + (into if ways != "out" else ()))
        end = time.monotonic() + 120
        while not lost_at and time.monotonic() < end:
            held = str(cut_off.sandbox_id) in far.sandboxes()
            if not held and not gone_at:
                gone_at = time.monotonic()
            if site.info(cut_off).cause is Cause.LOST:
                lost_at = time.monotonic()
                assert not held, "it was taken for lost while it ran"
            time.sleep(0.05)
        assert gone_at and lost_at and gone_at <= lost_at
        with pytest.raises(Lost):
            cut_off.execute("echo gone")
        until(lambda: any(what == "well" for _, what in told[-1:]), 120.0)  # what is made now is made elsewhere
    assert running[1].errors == [] and running[1].done > 5
    assert site.states() == {"near": WorkerState.READY, "far": WorkerState.LOST}
    site.settle()
    assert site.workers()["far"].epoch == epoch + 1
    assert str(cut_off.sandbox_id) not in far.sandboxes()
    assert healthy.execute("echo still").stdout == "still\n"
    back = site.on("far")
    assert back.execute("echo back").stdout == "back\n"
    for sandbox in (healthy, back):
        sandbox.stop()
    truthful(site, told)


def test_a_cut_that_is_shorter_than_the_lease(site: Site, census: Census) -> None:
    kept = site.on("far")
    epoch = site.workers()["far"].epoch
    site.net.apart(WRITER, FAR)
    time.sleep(LEASE * 0.3)
    site.net.rules()
    until(lambda: kept.execute("echo still").stdout == "still\n")
    time.sleep(LEASE * 1.3)
    assert site.workers()["far"].epoch == epoch and kept.execute("echo still").stdout == "still\n"
    kept.stop()


def test_the_writer_is_cut_off_from_its_workers(site: Site, census: Census) -> None:
    """Heartbeats go to the reader; who reads does not notice; nothing is lost."""
    kept = [site.on("near"), site.on("far")]
    epochs = {name: worker.epoch for name, worker in site.workers().items()}

    def well() -> None:
        for sandbox in kept:
            assert sandbox.execute("echo here").stdout == "here\n"

    with loads(well) as running:
        site.net.rules(cut=((WRITER, NEAR), (NEAR, WRITER), (WRITER, FAR), (FAR, WRITER)))
        time.sleep(LEASE * 2)
        with pytest.raises(RockError):
            Sandbox(site.config(startup_timeout=5)).start()  # told, not hung
    assert running[0].errors == [] and running[0].done > 3
    site.settle()
    assert {name: worker.epoch for name, worker in site.workers().items()} == epochs
    for sandbox in kept:
        assert sandbox.execute("echo still").stdout == "still\n"
        sandbox.stop()


def test_one_role_is_away(site: Site, census: Census) -> None:
    one_is_away(site, LEASE * 1.5)
