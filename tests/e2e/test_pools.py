"""Warm pools over a real server: images, snapshots, a restart, keys, commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until

from rock.errors import Conflict, InvalidConfig, NotFound
from rock.protocol.keys import CreateKey
from rock.protocol.pools import PoolInfo
from rock.sync import Client, Sandbox

WORKERS = int(os.environ["ROCK_PROCESSES"])  # each rocklet process is a worker


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    made = Client(server.url)
    yield made
    for pool in made.list_pools():
        made.delete_pool(pool.name)
    until(lambda: "rock_pool_ready{" not in metrics(server.url))
    for one in reversed(made.list_snapshots()):
        made.delete_snapshot(one.snapshot_id)


def metrics(url: str) -> str:
    return subprocess.run(["curl", "-s", f"{url}/metrics"], capture_output=True, text=True, check=True).stdout


def ready(client: Client, name: str, count: int, workers: int = 1) -> PoolInfo:
    """The pool, once each worker has so many unclaimed sandboxes for it; workers: those that have the pool."""
    def found() -> PoolInfo:
        return next(one for one in client.list_pools() if one.name == name)

    until(lambda: found().ready == workers * count, why=f"pool {name} has no {workers} times {count} sandboxes")
    return found()


def test_a_pool_of_an_image_serves_creates(server: RunningServer, client: Client) -> None:
    made = client.set_pool("web", image=IMAGE, memory="256m", minimum=2, maximum=4)
    assert (made.minimum, made.maximum, made.hit_rate) == (2, 4, None)
    ready(client, "web", 2, WORKERS)
    with Sandbox(IMAGE, memory="256m", cpus=1.0, base_url=server.url) as box:
        assert box.run("echo hi").output.strip() == "hi"
        with Sandbox(IMAGE, memory="4g", cpus=1.0, base_url=server.url):  # another size of /dev/shm
            found = ready(client, "web", 2, WORKERS)  # filled again
            assert (found.hits, found.misses, found.hit_rate) == (1, 0, 1.0)
    claims = r'^rock_pool_claims_total\{(worker="[^"]+",)?outcome="hit",pool="web"\} 1$'
    assert re.search(claims, metrics(server.url), re.MULTILINE)
    client.set_pool("web", image=IMAGE, memory="256m", minimum=0, maximum=1)
    assert client.delete_pool("web").name == "web" and not client.list_pools()
    with pytest.raises(NotFound):
        client.delete_pool("web")


def test_a_pool_of_a_snapshot_keeps_it_and_starts_its_processes(server: RunningServer, client: Client) -> None:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        box.run("cd /tmp; echo kept > file; x=5; sleep 1000 & job=$!")
        taken = box.checkpoint(name="base", ttl_seconds=0.5)
    client.set_pool("forks", snapshot="base", memory="256m", minimum=2)
    found = ready(client, "forks", 2)
    assert found.snapshot == taken.snapshot_id and client.get_snapshot("base").users == []
    with pytest.raises(Conflict, match="forks"):
        client.delete_snapshot("base")
    before = client.get_snapshot("base").used_at
    until(lambda: client.get_snapshot("base").used_at > before)  # its retention was over, and was extended
    with Sandbox(snapshot="base", memory="256m", cpus=1.0, base_url=server.url) as child:
        assert child.run("cat file; echo $x").output.split() == ["kept", "5"]
        if taken.memory == "processes":
            assert child.run("kill -0 $job && echo runs").output.strip() == "runs"
        assert client.get_snapshot("base").users == [child.sandbox_id]
        assert ready(client, "forks", 2).hits == 1
    client.delete_pool("forks")
    client.delete_snapshot("base")
    with pytest.raises(NotFound):
        client.set_pool("forks", snapshot="base")


def test_definitions_that_are_not_possible(server: RunningServer, client: Client) -> None:
    for options in ({}, {"image": IMAGE, "snapshot": "a"}, {"image": IMAGE, "minimum": 3, "maximum": 2},
                    {"image": IMAGE, "memory": "much"}, {"image": IMAGE, "maximum": 10**6}):
        with pytest.raises(InvalidConfig):
            client.set_pool("web", **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig):
        client.set_pool("a b", image=IMAGE)
    client.set_pool("none", image="127.0.0.1:1/there/is:none", memory="256m")
    def error() -> str:
        return "".join(client.list_pools()[0].errors.values())

    until(lambda: "127.0.0.1:1" in error() and "being prepared" not in error())


def test_pools_survive_restarts_and_belong_to_tenants(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_API_KEY="owner")
    owner = Client(server.url, "owner")
    key = owner.create_key(CreateKey(name="k", tenant="team")).key
    reader = owner.create_key(CreateKey.model_validate({"name": "r", "tenant": "team", "scopes": ["read"]})).key
    tenant = Client(server.url, key)
    tenant.set_pool("mine", image=IMAGE, memory="256m", minimum=1)
    owner.set_pool("ours", image=IMAGE, memory="256m", minimum=3)
    for client in (tenant, Client(server.url, reader)):
        assert [one.name for one in client.list_pools()] == ["mine"]
    ready(tenant, "mine", 3, WORKERS)  # pools of the same sandboxes share them
    owner.delete_pool("ours")
    ready(tenant, "mine", 1, WORKERS)
    server.kill()
    server.start()
    tenant = Client(server.url, key)
    ready(tenant, "mine", 1, WORKERS)
    with Sandbox(IMAGE, memory="256m", cpus=1.0, base_url=server.url, api_key=key):
        assert tenant.list_pools()[0].hits == 1
    rock = [sys.executable, "-m", "rock.cli.main", "--base-url", server.url, "--api-key", "owner", "pool"]
    listed = subprocess.run([*rock, "ls", "--json"], capture_output=True, text=True, check=True).stdout
    assert [(one["name"], one["tenant"], one["hits"]) for one in json.loads(listed)] == [("mine", "team", 1)]
    done = subprocess.run([*rock, "rm", "--tenant", "team", "mine"], capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n" and not tenant.list_pools()
