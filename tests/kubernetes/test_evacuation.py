"""A drain with archive: sandboxes of a machine that leaves continue on another one, from their files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.errors import RockError, Unsupported
from rock.protocol.node import EVACUATION
from rock.protocol.sandbox import Cause, State
from rock.sync import Client, Sandbox
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import IMAGE, RunningServer
from tests.kubernetes.pod_world import free_port
from tests.kubernetes.test_drain import drain
from tests.waiting import until


class Site:
    """A server with an archive, and two machines with the namespace runtime."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.front: RunningServer = server(folder / "server", self.port, **settings)
        self.machines = {}
        for name in ("w1", "w2"):
            machine = Machine(folder / name, "--join", self.front.url, "--token", TOKEN, "--name", name)
            machine.start()
            self.machines[name] = machine
        until(lambda: len(self.workers()) == 2, 20, "they do not join")

    def client(self) -> Client:
        return Client(self.front.url, KEY)

    def workers(self) -> dict[str, str]:
        """States by name."""
        with self.client() as client:
            return {one.name: one.state.value for one in client.list_workers()}

    def sandbox(self, worker: str, **fields: Any) -> Sandbox:
        """A running sandbox on a worker."""
        with self.client() as client:
            for other in set(self.machines) - {worker}:
                client.drain_worker(other)
            box = Sandbox(base_url=self.front.url, api_key=KEY, image=IMAGE, memory="128m", **fields)
            box.start()
            for other in self.machines:
                client.drain_worker(other, False)
        assert box.info().worker == worker
        return box

    def stop(self) -> None:
        with self.client() as client:
            for info in client.list_sandboxes():
                client.delete_sandbox(info.sandbox_id, force=True)
        self.front.stop()
        for machine in self.machines.values():
            machine.end()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    made = Site(folder, ROCK_ARCHIVE=str(folder / "archive"))
    yield made
    made.stop()


def test_sandboxes_continue_on_another_worker(site: Site) -> None:
    """Running and stopped ones; one without retention runs until the deadline, and its reason is reported."""
    kept = [site.sandbox("w1", retain=3600) for _ in range(3)]
    for number, box in enumerate(kept):
        box.run(f"echo {number} > /root/state")
    kept[1].checkpoint()
    kept.append(kept[1].fork(1)[0])  # which is on the snapshot, as its original
    for number in (1, 3):
        kept[number].run(f"cat /root/state >> /root/old; rm /root/state; echo {number} > /root/state")
    kept[2].stop()
    plain = site.sandbox("w1")
    other = site.sandbox("w2", retain=3600)
    with site.client() as client:
        info = client.drain_worker("w1", archive=True)
        assert info.evacuating and info.draining
        until(lambda: {client.get_sandbox(box.sandbox_id).state for box in kept} == {State.ARCHIVED}, 60,
              "they are not archived")  # fmt: skip
        moved = client.get_sandbox(kept[0].sandbox_id)
        assert moved.cause is Cause.DRAINED and "its worker w1 is drained" in (moved.reason or "")
        assert client.get_sandbox(kept[2].sandbox_id).cause is Cause.USER
        until(lambda: EVACUATION in client.get_sandbox(plain.sandbox_id).phases, 20, "the reason is missing")
        found = client.get_sandbox(plain.sandbox_id)
        assert found.state is State.RUNNING and "it has no retention" in found.phases[EVACUATION].message
        assert plain.run("echo on").output == "on\n"
        assert client.get_sandbox(other.sandbox_id).state is State.RUNNING
        for number, box in enumerate(kept):
            assert client.restart_sandbox(box.sandbox_id).worker == "w2"
            again = Sandbox.connect(box.sandbox_id, base_url=site.front.url, api_key=KEY)
            assert again.run("cat /root/state").output == f"{number}\n"
            assert number not in (1, 3) or again.run("cat /root/old").output == "1\n"
        assert not client.drain_worker("w1", False).evacuating


def test_a_machine_drains_itself_while_the_server_restarts(site: Site) -> None:
    """`rock worker drain --self --wait N --archive M`, the preStop hook; the server is killed meanwhile."""
    boxes = [site.sandbox("w2", retain=3600) for _ in range(6)]
    for box in boxes:
        box.run("head -c 1000000 /dev/urandom > /root/data; sha256sum /root/data > /root/sum")
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(
        drain(site.machines["w2"], "--self", "--wait", "55", "--archive", "54")))
    thread.start()
    with site.client() as client:
        until(lambda: any(client.get_sandbox(box.sandbox_id).state in (State.STOPPING, State.ARCHIVING, State.ARCHIVED)
                          for box in boxes), 30, "the evacuation does not begin")  # fmt: skip
    site.front.kill()
    site.front.start(site.port)
    with site.client() as client:
        until(lambda: {client.get_sandbox(box.sandbox_id).state for box in boxes} == {State.ARCHIVED}, 60,
              "the next server does not continue")  # fmt: skip
        thread.join(60)
        assert done[0].returncode == 0 and "has 0" in done[0].stdout, done[0].stderr
        for box in boxes:
            assert client.restart_sandbox(box.sandbox_id).worker == "w1"
            again = Sandbox.connect(box.sandbox_id, base_url=site.front.url, api_key=KEY)
            assert again.run("sha256sum -c /root/sum").exit_code == 0
            again.stop()


def test_a_server_without_an_archive_refuses_it(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        box = site.sandbox("w1", retain=60)
        with site.client() as client:
            with pytest.raises(Unsupported, match="the archive feature is disabled"):
                client.drain_worker("w1", archive=True)
            assert site.workers()["w1"] == "ready", "it is not drained"
        refused = drain(site.machines["w1"], "--self", "--wait", "6", "--archive", "5")
        assert refused.returncode != 0 and "still has 1 sandboxes" in refused.stderr
        with site.client() as client:
            message = client.get_sandbox(box.sandbox_id).phases[EVACUATION].message
        assert "the archive feature is disabled" in message
        assert box.run("echo on").output == "on\n", "it runs until the machine ends"
        with pytest.raises(RockError):
            box.archive()
    finally:
        site.stop()
