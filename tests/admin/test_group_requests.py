"""Groups over the wire: all or as many as fit, in one request."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.waiting import until

from rock.errors import Conflict, InvalidConfig, NoCapacity, NotFound, QuotaExceeded, RockError
from rock.protocol.keys import Access, CreateKey, Quota
from rock.protocol.sandbox import SandboxGroupConfig, State
from rock.sdk.transport import Transport
from rock.sync import Client, SandboxGroup
from rock.testing import FakeServer

CONFIG = {"image": "any:1", "memory": "64m", "cpus": 1.0}
OWNER = "owner-key"


def ask(url: str, method: str, path: str, body: Any = None, key: str | None = None, once: str | None = None) -> Any:
    async def main() -> Any:
        return await Transport(url, key).json(method, path, body, timeout=120, key=once)

    return asyncio.run(main())


def group(url: str, size: int, *, key: str | None = None, once: str | None = None, wait: float = 60.0,
          config: dict[str, Any] | None = None, **fields: Any) -> Any:  # fmt: skip
    body = {"config": {**CONFIG, **(config or {})}, "size": size, **fields}
    return ask(url, "POST", f"/v1/groups?wait={wait:g}", body, key, once)


def states(url: str, key: str | None = None) -> Counter[str]:
    with Client(url, key) as client:
        return Counter(info.state.value for info in client.list_sandboxes())


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with FakeServer(api_key=OWNER, sandbox_limit=50) as server:
        yield server


@pytest.fixture
def url(fake: FakeServer) -> Iterator[str]:
    """A server with room for fifty, and nothing in it."""
    yield fake.url
    with Client(fake.url, OWNER) as client:
        for info in client.list_sandboxes():
            client.delete_sandbox(info.sandbox_id, force=True)


def test_one_request_makes_all(url: str) -> None:
    made = group(url, 40, key=OWNER)
    assert [one["sandbox_id"] for one in made["sandboxes"]] == [f"{made['group_id']}-{n}" for n in range(40)]
    assert {one["state"] for one in made["sandboxes"]} == {"running"} and made["missing"] == 0
    seen = ask(url, "GET", f"/v1/groups/{made['group_id']}", key=OWNER)
    assert [one["sandbox_id"] for one in seen["sandboxes"]] == [one["sandbox_id"] for one in made["sandboxes"]]
    ended = ask(url, "POST", f"/v1/groups/{made['group_id']}/stop", key=OWNER)
    assert {one["state"] for one in ended["sandboxes"]} == {"stopped"}
    with pytest.raises(NotFound):
        ask(url, "GET", "/v1/groups/none", key=OWNER)


def test_all_or_none(url: str) -> None:
    with pytest.raises(NoCapacity, match="room for 50 of the 51"):
        group(url, 51, key=OWNER)
    assert states(url, OWNER) == {}
    made = group(url, 51, key=OWNER, mode="best_effort")
    assert len(made["sandboxes"]) == 50 and made["missing"] == 1
    assert states(url, OWNER) == {"running": 50}
    with pytest.raises(NoCapacity):
        group(url, 1, key=OWNER, mode="best_effort")


def test_the_same_key_is_the_same_group(url: str) -> None:
    async def main() -> list[Any]:
        body = {"config": CONFIG, "size": 10}
        calls = [Transport(url, OWNER).json("POST", "/v1/groups?wait=60", body, timeout=120, key="once")
                 for _ in range(4)]  # fmt: skip
        return await asyncio.gather(*calls)

    answers = asyncio.run(main())
    assert len({one["group_id"] for one in answers}) == 1 and states(url, OWNER) == {"running": 10}
    assert group(url, 10, key=OWNER, once="once")["group_id"] == answers[0]["group_id"]
    ask(url, "POST", "/v1/sandboxes?wait=60", CONFIG, OWNER, "another")
    with pytest.raises(Conflict, match="not in a group"):
        group(url, 10, key=OWNER, once="another")


def test_names(url: str) -> None:
    made = group(url, 3, key=OWNER, config={"sandbox_id": "mine"})
    assert [one["sandbox_id"] for one in made["sandboxes"]] == ["mine-0", "mine-1", "mine-2"]
    with pytest.raises(Conflict):
        group(url, 3, key=OWNER, config={"sandbox_id": "mine"})
    group(url, 1, key=OWNER, config={"sandbox_id": "mine-1"})  # mine-1-0, which is no part of the other
    assert len(ask(url, "GET", "/v1/groups/mine", key=OWNER)["sandboxes"]) == 3
    with pytest.raises(InvalidConfig):
        group(url, 1, key=OWNER, config={"sandbox_id": "x" * 128})
    assert states(url, OWNER) == {"running": 4}


def test_bad_requests(url: str) -> None:
    for fields in ({"size": 0}, {"size": 1 << 20}, {"size": 2, "mode": "some"}, {"size": 2, "placement": "heap"},
                   {"size": 2, "sise": 3}, {"size": 2, "config": {"memory": "lots"}}):  # fmt: skip
        with pytest.raises(InvalidConfig):
            group(url, key=OWNER, **fields)  # type: ignore[arg-type]
    with pytest.raises(RockError, match="no network"):
        group(url, 2, key=OWNER, config={"network": "nat"})
    assert states(url, OWNER) == {}


def test_quotas_are_exact_for_a_group(url: str) -> None:
    every = [Access.CREATE, Access.RUN, Access.ADMIN]  # the fake runtime isolates nothing: not for all tenants
    with Client(url, OWNER) as client:
        mine = client.create_key(CreateKey(tenant="mine", name="a", scopes=every, quota=Quota(sandboxes=10)))
        other = client.create_key(CreateKey(tenant="other", name="b", scopes=every))
    with pytest.raises(QuotaExceeded):
        group(url, 11, key=mine.key)
    assert states(url, OWNER) == {}
    made = group(url, 7, key=mine.key, config={"sandbox_id": "mine-g"})
    with pytest.raises(QuotaExceeded):
        group(url, 4, key=mine.key)
    more = group(url, 4, key=mine.key, mode="best_effort")
    assert len(more["sandboxes"]) == 3 and more["missing"] == 1
    with pytest.raises(QuotaExceeded):
        group(url, 4, key=mine.key, mode="best_effort")
    for method, path in (("GET", ""), ("POST", "/stop")):
        with pytest.raises(NotFound):
            ask(url, method, f"/v1/groups/{made['group_id']}{path}", key=other.key)
    with pytest.raises(InvalidConfig, match="begin with other-"):
        group(url, 2, key=other.key, config={"sandbox_id": "mine-g"})


def test_the_client(url: str) -> None:
    with SandboxGroup(base_url=url, api_key=OWNER, size=20, **CONFIG) as boxes:
        assert [seen.output for seen in boxes.arun_all("echo $((6*7))")] == ["42\n"] * 20
    assert states(url, OWNER) == {"stopped": 20}
    with pytest.raises(NoCapacity):
        SandboxGroup(base_url=url, api_key=OWNER, size=60, start_retry_times=1, **CONFIG).start()
    spec = SandboxGroupConfig.model_validate({**CONFIG, "base_url": url, "api_key": OWNER, "size": 60,
                                              "mode": "best_effort"})  # fmt: skip

    def fills_the_worker() -> bool:
        with SandboxGroup(spec) as some:
            assert some.sandbox_list[-1].arun("echo here").output == "here\n"
            return len(some.sandbox_list) == 50

    # the reports of a worker count for a moment, so that its stopped sandboxes may still be counted
    until(fills_the_worker)


# ---- workers that fail ----


class Rocklet:
    """One of fake sandboxes, in a process of its own."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "ROCK_HOME": str(home), "ROCK_RUNTIME": "fake", "ROCK_POOL_SIZE": "0"}
        program = "from rock.cli.scripts import rocklet_main; rocklet_main()"
        self.process = subprocess.Popen([sys.executable, "-c", program, "--port", "0"], env=environment,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = f"http://127.0.0.1:{json.loads((home / 'server.json').read_text())['port']}"

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[tuple[RunningServer, list[Rocklet]]]:
    rocklets = [Rocklet(tmp_path / name) for name in ("a", "b")]
    home = tmp_path / "admin"
    home.mkdir()
    server = RunningServer(home, ROCK_WORKERS=f"a={rocklets[0].url},b={rocklets[1].url}")
    server.start()
    yield server, rocklets
    server.kill()
    for rocklet in rocklets:
        if rocklet.process.poll() is None:
            rocklet.end(signal.SIGKILL)  # what it has is in its memory


def test_one_of_a_group_cannot_start(two_workers: tuple[RunningServer, list[Rocklet]]) -> None:
    """What its worker refuses: another program of ours has a sandbox of that name there."""
    server, rocklets = two_workers
    for rocklet in rocklets:
        for name in ("gang-3", "some-3"):
            ask(rocklet.url, "PUT", f"/node/v1/sandboxes/{name}", {**CONFIG, "memory": "65m"})
    with pytest.raises(Conflict, match="gang-3"):
        group(server.url, 6, config={"sandbox_id": "gang"})
    members = ask(server.url, "GET", "/v1/groups/gang")["sandboxes"]
    assert {one["state"] for one in members} == {"stopped"}
    assert {one["cause"] for one in members} == {"start_failed"}
    assert all("gang-3" in one["reason"] for one in members)
    for rocklet in rocklets:
        left = ask(rocklet.url, "GET", "/node/v1/sandboxes")["sandboxes"]
        assert {one["sandbox_id"] for one in left} <= {"gang-3", "some-3"}
    some = group(server.url, 6, config={"sandbox_id": "some"}, mode="best_effort")
    assert Counter(one["state"] for one in some["sandboxes"]) == {"running": 5, "stopped": 1}
    assert some["error"]["error"]["code"] and Counter(one["worker"] for one in some["sandboxes"]) == {"a": 3, "b": 3}


def test_a_crash_in_between_is_finished(two_workers: tuple[RunningServer, list[Rocklet]]) -> None:
    """Killed while a gang starts: the next server starts the rest of it, or what cannot start ends all of it."""
    server, _ = two_workers
    made = group(server.url, 200, wait=0.0)
    server.kill()
    server.start()
    path = f"/v1/groups/{made['group_id']}"
    until(lambda: {one["state"] for one in ask(server.url, "GET", path)["sandboxes"]} == {State.RUNNING.value})
    ended = ask(server.url, "POST", path + "/stop")
    assert {one["state"] for one in ended["sandboxes"]} == {"stopped"}
