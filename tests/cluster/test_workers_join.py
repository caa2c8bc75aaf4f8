"""Workers that join a server on this machine: they get sandboxes, are drained, are lost, give up, and come back."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until

from rock.errors import Lost, NoCapacity, RockError, Unavailable
from rock.protocol.node import WorkerInfo, WorkerState
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox, SandboxConfig

LONG = pytest.mark.skipif(not os.environ.get("ROCK_TEST_CLUSTER"), reason="of make cluster: set ROCK_TEST_CLUSTER=1")
LEASE, GRACE = "3", "3.6"  # seconds: short, so that losing one takes three and not sixty


class Site:
    """A server, and what joined it."""

    def __init__(self, folder: Path, lease: str = LEASE, grace: str = GRACE) -> None:
        self.folder = folder
        self.server: RunningServer = server(
            folder / "server", ROCK_WORKER_LEASE=lease, ROCK_WORKER_GRACE=grace
        )
        self.machines: dict[str, Machine] = {}

    def join(self, name: str, **environment: str) -> Machine:
        words = ("--join", self.server.url, "--token", TOKEN, "--name", name)
        machine = Machine(self.folder / name, *words, **environment)
        self.machines[name] = machine
        machine.start()
        until(lambda: self.state(name) is WorkerState.READY)
        return machine

    def worker(self, name: str) -> WorkerInfo | None:
        with Client(self.server.url, KEY) as client:
            return next((worker for worker in client.list_workers() if worker.name == name), None)

    def images(self, name: str) -> list[str]:
        worker = self.worker(name)
        return [] if worker is None or worker.status is None else worker.status.images

    def state(self, name: str) -> WorkerState | None:
        worker = self.worker(name)
        return None if worker is None else worker.state

    def config(self, **more: Any) -> SandboxConfig:
        return SandboxConfig(base_url=self.server.url, api_key=KEY, image=IMAGE, memory="64m", cpus=0.2, **more)

    def cli(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rock.cli.main", "--base-url", self.server.url, "--api-key", KEY, "worker", *words],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def end(self) -> None:
        try:
            self.server.stop()
        finally:
            for machine in self.machines.values():
                machine.end()
        for machine in self.machines.values():
            machine.assert_clean()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.end()


def test_join_drain_lose_and_come_back(site: Site) -> None:
    with pytest.raises(NoCapacity):
        Sandbox(site.config()).start()
    one = site.join("one")
    worker = site.worker("one")
    assert worker is not None and worker.status is not None
    assert worker.epoch == 1 and worker.status.cpus == os.cpu_count()
    until(lambda: IMAGE in site.images("one"))
    assert worker.status.host_ip == "127.0.0.1"
    first = Sandbox(site.config())
    first.start()
    assert first.execute("echo here").stdout == "here\n"
    assert_keys_hold(site, str(first.sandbox_id))

    # A worker that is being drained keeps what it has, and gets nothing more.
    assert json.loads(site.cli("drain", "one", "--json"))["state"] == "draining"
    with pytest.raises((NoCapacity, Unavailable)):
        Sandbox(site.config()).start()
    assert first.execute("echo still").stdout == "still\n"
    assert "draining" in site.cli("ls")
    site.cli("undrain", "one")

    # Stopped for longer than its lease it is lost; what it had is told to be, within seconds.
    one.signal(signal.SIGSTOP)
    with Client(site.server.url, KEY) as client:
        until(lambda: client.get_sandbox(str(first.sandbox_id)).state is State.STOPPED, 30.0)
        told = client.get_sandbox(str(first.sandbox_id))
        assert told.cause is Cause.LOST and "one was lost" in str(told.reason)
    assert site.state("one") is WorkerState.LOST
    with pytest.raises(Lost):
        first.execute("echo gone")
    with pytest.raises((NoCapacity, Unavailable)):
        Sandbox(site.config()).start()
    one.signal(signal.SIGCONT)  # it sees that its lease is over before it does anything else
    until(lambda: site.state("one") is WorkerState.READY)
    info = site.worker("one")
    assert info is not None and info.epoch == 2
    until(lambda: one.sandboxes() == set())
    with Sandbox(site.config()) as second:
        assert second.execute("echo here").stdout == "here\n"


@LONG
def test_a_restart_within_the_lease_changes_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, "120", "144")
    try:
        one = site.join("one")
        with Sandbox(site.config()) as sandbox:
            port = one.note()
            assert port is not None
            one.kill()
            one.start(port)
            until(lambda: one.log().count("joined as worker one, epoch 1") == 2)
            assert sandbox.execute("echo again").stdout == "again\n"
            info = site.worker("one")
            assert info is not None and info.epoch == 1
    finally:
        site.end()


def test_an_outage_of_a_worker_is_logged_once(tmp_path: Path) -> None:
    """The pauses between attempts grow to a few seconds, and the worker is followed again afterwards."""
    site = Site(tmp_path, "120", "144")
    try:
        one = site.join("one", ROCK_RUNTIME="fake")
        port = one.note()
        assert port is not None
        one.kill()
        until(lambda: "events of worker one" in site.server.log(), 20)
        time.sleep(4.0)  # at least two more attempts fail
        one.start(port)
        until(lambda: "events of worker one: available again" in site.server.log(), 20)
        assert site.server.log().count("events of worker one") == 2
    finally:
        site.end()


@LONG
def test_a_worker_keeps_what_nobody_took_for_lost(site: Site) -> None:
    """The only server is away for longer than a lease: a worker that keeps its sandboxes has them afterwards, one that
    does not has stopped them; neither makes new ones meanwhile."""
    keeps, stops = site.join("keeps"), site.join("stops", ROCK_LEASE_LOST="stop")
    boxes: dict[str, Sandbox] = {}
    for name, other in (("keeps", "stops"), ("stops", "keeps")):
        site.cli("drain", other)
        boxes[name] = Sandbox(site.config())
        boxes[name].start()
        site.cli("undrain", other)
    port = int(site.server.url.rpartition(":")[2])
    site.server.kill()
    until(lambda: "no new sandboxes" in keeps.log() and "ROCK_LEASE_LOST=stop" in stops.log(), 30.0)
    until(lambda: stops.sandboxes() == set(), 30.0)
    assert keeps.sandboxes() == {str(boxes["keeps"].sandbox_id)}
    assert command(keeps, "PUT", "/node/v1/sandboxes/x", {})[0] == 503  # without a lease nothing is made
    site.server.start(port)
    until(lambda: site.state("keeps") is WorkerState.READY and site.state("stops") is WorkerState.READY)
    assert boxes["keeps"].execute("echo here").stdout == "here\n"
    with pytest.raises(RockError), Client(site.server.url, KEY) as client:
        until(lambda: client.get_sandbox(str(boxes["stops"].sandbox_id)).cause is Cause.LOST, 30.0)
        boxes["stops"].execute("echo gone")


def started(site: Site) -> Sandbox:
    """A sandbox, if need be at a second try: where the machine has no time for heartbeats, a lease is over."""
    end = time.monotonic() + 60.0
    while True:
        sandbox = Sandbox(site.config())
        try:
            sandbox.start()
            return sandbox
        except Unavailable:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def test_who_may_join(site: Site, tmp_path: Path) -> None:
    one = site.join("one")
    spec = {"name": "two", "url": "http://127.0.0.1:9", "holder": "h" * 16, "status": {}}
    assert ask(site.server.url, "POST", "/v1/workers", spec, None)[0] == 401
    assert ask(site.server.url, "POST", "/v1/workers", spec, "wrong")[0] == 401
    assert ask(site.server.url, "POST", "/v1/workers", spec, TOKEN)[0] == 422  # no status
    for bad in ({"name": "../x"}, {"name": "local"}, {"url": "file:///etc"}, {"url": "http://a b/"}, {"holder": ""}):
        assert ask(site.server.url, "POST", "/v1/workers", {**spec, **bad}, TOKEN)[0] in (400, 422)
    # What a worker joins by opens nothing else.
    for method, path in (("GET", "/v1/sandboxes"), ("GET", "/v1/workers"), ("POST", "/v1/sandboxes"),
                         ("POST", "/v1/workers/one/drain"), ("GET", "/v1/sandboxes/x/files/content"),
                         ("POST", "/v1/sandboxes/x/execute")):  # fmt: skip
        assert ask(site.server.url, method, path, None, TOKEN)[0] in (403, 404)
    # A name is one machine's, and commands are for one epoch.
    status = site.worker("one")
    assert status is not None and status.status is not None
    epoch = status.epoch
    taken = {**spec, "name": "one", "status": status.status.model_dump(mode="json")}
    assert ask(site.server.url, "POST", "/v1/workers", taken, TOKEN)[0] == 409
    assert command(one, "GET", "/node/v1/status", None, {"x-rock-epoch": f"one/{epoch}"})[0] == 200
    assert command(one, "GET", "/node/v1/status", None, {"x-rock-epoch": f"one/{epoch - 1}"})[0] == 503
    assert command(one, "GET", "/node/v1/status", None, {"x-rock-epoch": f"two/{epoch}"})[0] == 503
    # One that has not been lost is forgotten by force alone; then it has to join anew.
    assert ask(site.server.url, "DELETE", "/v1/workers/one", None, KEY)[0] == 409
    with started(site) as sandbox:
        site.cli("rm", "one", "--force")
        with pytest.raises(RockError):
            sandbox.execute("echo gone")
        with Client(site.server.url, KEY) as client:
            assert client.get_sandbox(str(sandbox.sandbox_id)).cause is Cause.LOST
    until(lambda: site.state("one") is WorkerState.READY)
    again = site.worker("one")
    assert again is not None and again.epoch > epoch
    # A rocklet with a wrong token ends, and says why.
    done = subprocess.run(
        [sys.executable, "-c", "from rock.cli.scripts import rocklet_main; rocklet_main()", "--port", "0", "--join",
         site.server.url, "--token", "wrong"],
        env={**os.environ, "ROCK_HOME": str(tmp_path / "wrong"), "ROCK_POOL_SIZE": "0"}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "key is missing or wrong" in done.stderr


def assert_keys_hold(site: Site, owned: str) -> None:
    """On the way to a worker that joined too a key is for what it is for, and the workers' token for nothing else."""

    def run(sandbox_id: str, key: str) -> int:
        return ask(site.server.url, "POST", f"/v1/sandboxes/{sandbox_id}/execute", {"command": "id"}, key)[0]

    def made(**spec: Any) -> str:
        status, body = ask(site.server.url, "POST", "/v1/keys", {"name": "x", "tenant": "team", **spec}, KEY)
        assert status == 201, body
        return str(json.loads(body)["key"])

    user, reader = made(), made(scopes=["read"])
    with Sandbox(site.config().model_copy(update={"api_key": user})) as sandbox:
        sandbox_id = str(sandbox.sandbox_id)
        assert [run(sandbox_id, key) for key in (user, reader, TOKEN)] == [200, 403, 404]
        assert [run(owned, key) for key in (user, reader)] == [404, 404] and run(owned, TOKEN) in (403, 404)
        status, body = ask(site.server.url, "GET", "/v1/server", None, user)
        assert status == 200 and not any(worker["images"] for worker in json.loads(body)["workers"])


def ask(url: str, method: str, path: str, body: Any, key: str | None,
        headers: dict[str, str] | None = None) -> tuple[int, Any]:  # fmt: skip
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    sent = {"content-type": "application/json", **(headers or {})}
    if key is not None:
        sent["authorization"] = f"Bearer {key}"
    try:
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def command(
    machine: Machine, method: str, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    return ask(f"http://127.0.0.1:{machine.note()}", method, path, body, TOKEN, headers)
