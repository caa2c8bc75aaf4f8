"""Volumes and their workers: placement, removal of a worker, its return."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.machines import KEY
from tests.cluster.test_workers_join import Site
from tests.waiting import until

from rock.errors import Conflict, InvalidConfig, NotFound, Unavailable
from rock.protocol.node import WorkerState
from rock.protocol.sandbox import SandboxGroupConfig, VolumeMount
from rock.sync import Client, Sandbox, SandboxGroup


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.end()


def volumes_of(site: Site, name: str) -> set[str]:
    folder = site.machines[name].home / "volumes"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def at(name: str, target: str) -> VolumeMount:
    return VolumeMount(name=name, target=target)


def test_sandboxes_run_on_the_worker_of_their_volumes(site: Site) -> None:
    with Client(site.server.url, KEY, reconnect_timeout=0) as client:
        with pytest.raises(Unavailable):
            client.create_volume("early")
        two = site.join("two")
        site.join("one")
        first = client.create_volume("first", worker="one")
        second = client.create_volume("second", worker="two")
        assert volumes_of(site, "one") == {first.volume_id} and volumes_of(site, "two") == {second.volume_id}
        assert client.create_volume("third").worker == "one"  # both have one volume
        assert client.create_volume("fourth").worker == "two"
        with pytest.raises(InvalidConfig, match="different workers: one, two"):
            Sandbox(site.config(volumes=[at("first", "/a"), at("second", "/b")])).start()
        for _ in range(3):
            with Sandbox(site.config(volumes=[at("second", "/a"), at("fourth", "/b")])) as sandbox:
                assert sandbox.info().worker == "two"
                assert sandbox.execute("touch /a/x /b/x").exit_code == 0
        config = SandboxGroupConfig(**site.config(volumes=[at("first", "/a")]).model_dump(), base_url=site.server.url,
                                    api_key=KEY, size=3)  # fmt: skip
        with SandboxGroup(config) as group:
            assert {sandbox.info().worker for sandbox in group.sandbox_list} == {"one"}
        site.cli("drain", "one")
        with pytest.raises(Unavailable, match="worker one, which has the volumes"):
            Sandbox(site.config(volumes=[at("first", "/a")])).start()
        site.cli("undrain", "one")
        two.kill()
        until(lambda: site.state("two") is WorkerState.LOST, 30.0)
        client.delete_volume("second")
        assert second.volume_id in volumes_of(site, "two")
        two.start()  # it returns with the files, which nothing names any more
        until(lambda: second.volume_id not in volumes_of(site, "two"), 30.0)
        until(lambda: site.state("two") is WorkerState.READY, 30.0)
        for name in ("first", "third", "fourth"):
            client.delete_volume(name)
    assert volumes_of(site, "one") == volumes_of(site, "two") == set()


def test_a_worker_with_volumes_is_removed_only_by_force(site: Site) -> None:
    one = site.join("one")
    with Client(site.server.url, KEY) as client:
        made = client.create_volume("data")
        with pytest.raises(Conflict, match="has 1 volumes, which are lost with it: data"):
            client.remove_worker("one")
        one.signal(signal.SIGSTOP)
        until(lambda: site.state("one") is WorkerState.LOST, 30.0)
        with pytest.raises(Conflict, match="has 1 volumes"):
            client.remove_worker("one")
        assert client.get_volume("data") == made
        client.remove_worker("one", force=True)
        with pytest.raises(NotFound):
            client.get_volume("data")
        one.signal(signal.SIGCONT)
        until(lambda: site.state("one") is WorkerState.READY, 30.0)
        until(lambda: volumes_of(site, "one") == set(), 30.0)  # nothing names them any more
        client.create_volume("data")
        client.delete_volume("data")
