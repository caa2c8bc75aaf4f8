"""A real Ray cluster of three nodes on this machine, whose scheduler places sandboxes: `make ray`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from rock.errors import InvalidConfig, RockError
from rock.protocol.sandbox import SandboxConfig, SandboxInfo
from rock.scheduler.raylink import bundle_of
from rock.sync import Client, Sandbox, SandboxGroup

KEY = "a-key-of-the-tests"
LONG = 300.0
SPEC: dict[str, Any] = {"image": "x:1", "memory": "64m", "cpus": 1.0, "api_key": KEY, "startup_timeout": LONG}
ray_only = pytest.mark.skipif(not os.environ.get("ROCK_TEST_RAY"), reason="takes minutes and needs ray: make ray")
pytestmark = pytest.mark.timeout(900)


def test_what_a_sandbox_takes() -> None:
    spec = SandboxConfig(cpus=0.5, memory="1g", num_gpus=2, accelerator_type="A100",
                         labels={"rock.resource.disk_node": "1.5", "mine": "x"})  # fmt: skip
    assert bundle_of(spec) == {"CPU": 0.5, "memory": 1 << 30, "GPU": 2.0, "accelerator_type:A100": 0.001,
                               "disk_node": 1.5}  # fmt: skip
    for text in ("", "much", "-1", "inf", "nan"):
        with pytest.raises(InvalidConfig, match=r"rock\.resource\.x"):
            bundle_of(SandboxConfig(labels={"rock.resource.x": text}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def patiently(make: Callable[[], Any]) -> Any:
    """Ray gives a node thirty seconds to start, which a machine that is busy with other things may not have."""
    for _ in range(6):
        try:
            return make()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            last = error
    raise last


class World:
    """A cluster, and a server that is in it."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        # A machine that is busy with other things is slow, not broken.
        patience = {"RAY_health_check_timeout_ms": "60000", "RAY_health_check_initial_delay_ms": "60000"}
        os.environ.update(patience, RAY_USAGE_STATS_ENABLED="0")
        self.folder = folder
        self.size: dict[str, Any] = {"num_cpus": 40, "memory": 8 << 30, "object_store_memory": 80 << 20}
        self.port, self.head_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._kind = Cluster
        self.process: subprocess.Popen[bytes] | None = None
        self.cluster = self.make()
        self.nodes = [patiently(lambda more=more: self.cluster.add_node(**self.size, **more))
                      for more in ({}, {"resources": {"special": 3.0}})]  # fmt: skip

    def make(self) -> Any:
        """A cluster of its head alone, where the server looks for it once there is one."""

        def begin() -> Any:
            if self.process is None:
                self.head_port = free_port()  # what is left of one that did not start may be at the other
            made = self._kind()
            made.add_node(**self.size, include_dashboard=False, gcs_server_port=self.head_port)
            return made

        return patiently(begin)

    def start(self) -> None:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        environment = {
            **os.environ, "ROCK_HOME": str(home), "ROCK_API_KEY": KEY, "ROCK_SCHEDULER": "ray", "ROCK_RUNTIME": "fake",
            "ROCK_RAY_ADDRESS": f"127.0.0.1:{self.head_port}", "ROCK_ADVERTISE": self.url,
            "ROCK_RAY_HOME": str(self.folder / "nodes"), "ROCK_WORKER_LEASE": "30",
        }  # fmt: skip
        with open(self.folder / "output.log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1", "--port",
                                             str(self.port)], env=environment, stdout=log, stderr=log)  # fmt: skip
        until(lambda: self.workers() >= 3, LONG)

    def end(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def workers(self) -> int:
        try:
            with Client(self.url, KEY) as client:
                return len(client.server_info().workers)
        except RockError:
            return 0

    def sandboxes(self) -> list[SandboxInfo]:
        with Client(self.url, KEY) as client:
            return client.list_sandboxes()

    def reserved(self) -> int:
        """Placement groups of sandboxes, as Ray tells."""
        import ray
        from ray.util.placement_group import placement_group_table

        ray.init(address=f"127.0.0.1:{self.head_port}", namespace="rock", log_to_driver=False, ignore_reinit_error=True)
        try:
            return sum(row["state"] != "REMOVED" for row in placement_group_table().values())
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    pytest.importorskip("ray", reason="ray is not installed: make ray")
    made = World(tmp_path_factory.mktemp("ray"))
    try:
        made.start()
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.end(signal.SIGTERM)
        made.cluster.shutdown()


@ray_only
def test_ray_places_a_hundred(world: World) -> None:
    began = time.monotonic()
    boxes = SandboxGroup(base_url=world.url, size=100, **SPEC)
    boxes.start()
    print(f"100 sandboxes in {time.monotonic() - began:.1f} s")
    placed = Counter(info.worker for info in world.sandboxes() if info.group == boxes.group_id)
    assert placed.total() == 100 and max(placed.values()) <= 40  # no node has more cores
    assert world.reserved() == 100
    assert {seen.output for seen in boxes.arun_all("echo $((6*7))")} == {"42\n"}
    boxes.stop()
    until(lambda: world.reserved() == 0, LONG)


@ray_only
def test_custom_resources_and_what_waits(world: World) -> None:
    special = {"labels": {"rock.resource.special": "3"}}
    with Sandbox(base_url=world.url, **SPEC, **special) as first:
        where = first.info().worker
        waiting = Sandbox(base_url=world.url, **{**SPEC, "startup_timeout": 8.0}, **special)
        with pytest.raises(RockError):  # the only node that has it gave it away
            waiting.start()
    with Sandbox(base_url=world.url, **SPEC, **special) as second:
        assert second.info().worker == where
    until(lambda: world.reserved() == 0, LONG)


@ray_only
def test_a_server_that_was_killed_finds_its_reservations(world: World) -> None:
    boxes = SandboxGroup(base_url=world.url, size=20, **SPEC)
    boxes.start()
    world.end(signal.SIGKILL)
    world.start()
    assert Counter(info.state.value for info in world.sandboxes() if info.group == boxes.group_id) == {"running": 20}
    boxes.stop()
    until(lambda: world.reserved() == 0, LONG)


@ray_only
def test_a_node_is_lost(world: World) -> None:
    boxes = SandboxGroup(base_url=world.url, size=100, **SPEC)
    boxes.start()
    before = {info.sandbox_id: info.worker for info in world.sandboxes() if info.group == boxes.group_id}
    world.cluster.remove_node(world.nodes.pop())

    def told() -> Counter[str]:
        mine = [info for info in world.sandboxes() if info.group == boxes.group_id]
        return Counter(f"{info.state.value} {info.cause.value if info.cause else ''}".strip() for info in mine)

    until(lambda: told()["stopped lost"] > 0 and world.workers() == 2, LONG)
    until(lambda: told().total() == told()["running"] + told()["stopped lost"], LONG)
    gone = {info.worker for info in world.sandboxes() if info.cause is not None and info.sandbox_id in before
            and info.cause.value == "lost"}  # fmt: skip
    assert len(gone) == 1 and told()["stopped lost"] == Counter(before.values())[gone.pop()]
    until(lambda: world.reserved() == told()["running"], LONG)
    with Sandbox(base_url=world.url, **SPEC) as another:
        assert another.arun("echo on").output == "on\n"
    boxes.stop()
    until(lambda: world.reserved() == 0, LONG)


@ray_only
def test_the_head_is_lost_and_comes_back(world: World) -> None:
    """Without a store of its own a head that comes back is a new cluster: what ran in the old one is told as lost."""
    boxes = SandboxGroup(base_url=world.url, size=10, **SPEC)
    boxes.start()
    world.cluster.shutdown()
    until(lambda: world.workers() == 0, LONG)
    until(lambda: {info.state.value for info in world.sandboxes() if info.group == boxes.group_id} == {"stopped"}, LONG)
    world.cluster = world.make()
    until(lambda: world.workers() == 1, LONG)
    with Sandbox(base_url=world.url, **SPEC) as another:
        assert another.arun("echo on").output == "on\n"
