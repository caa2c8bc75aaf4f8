"""Thousands of starts at once, over simulated workers: who is answered when."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.machines import server, until
from tests.conftest import RunningServer

from rock.errors import NotFound
from rock.sdk.transport import Transport
from rock.sync import Client

KEY = "the-key-of-the-simulated-fleet"  # which its workers have
WORKER_REGISTRY = Path(__file__).parents[2] / "bench" / "fleet.py"
CONFIG = {"image": "python:3.11", "memory": "8m", "cpus": 0.01, "auto_clear_seconds": 0}
WORKERS = 16


@pytest.fixture(scope="module")
def worker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server over workers whose sandboxes have no shell, and so no descriptor."""
    folder = tmp_path_factory.mktemp("fleet")
    made = server(folder / "server", ROCK_API_KEY=KEY, ROCK_WORKER_KEY="", ROCK_WORKER_LEASE="120")
    with open(folder / "host.log", "wb") as log:
        host = subprocess.Popen(
            [sys.executable, str(WORKER_REGISTRY), "--host-of", f"{folder},0,{WORKERS},{made.url}"],
            stdin=subprocess.PIPE, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with Client(made.url, KEY) as client:
            until(lambda: len(client.list_workers()) == WORKERS, 60.0, "the workers did not join")
        yield made
    finally:
        made.kill()  # what ran was in the memory of the other
        host.kill()
        host.communicate()


async def ask(url: str, method: str, path: str, body: Any = None) -> Any:
    return await Transport(url, KEY).json(method, path, body, timeout=120)


def spec(name: str, size: int) -> dict[str, Any]:
    return {"config": {**CONFIG, "sandbox_id": name}, "size": size}


async def pending(url: str, name: str, size: int) -> int:
    """How many of a group do not run yet."""
    try:
        seen = await ask(url, "GET", f"/v1/groups/{name}")
    except NotFound:  # it is not its turn yet
        return size
    return sum(one["state"] == "pending" for one in seen["sandboxes"])


def test_a_single_create_is_not_behind_a_group(worker_registry: RunningServer) -> None:
    """Nor is what was stopped before its turn started."""
    size = 3000

    async def main() -> tuple[int, int]:
        await ask(worker_registry.url, "POST", "/v1/groups", spec("large", size))
        before = await pending(worker_registry.url, "large", size)
        last = f"/v1/sandboxes/large-{size - 1}"
        stopping = asyncio.create_task(ask(worker_registry.url, "POST", f"{last}/stop"))
        made = await ask(worker_registry.url, "POST", "/v1/sandboxes?wait=100", CONFIG)
        assert made["state"] == "running"
        after = await pending(worker_registry.url, "large", size)
        assert (await stopping)["state"] == "stopped"
        seen = await ask(worker_registry.url, "GET", "/v1/groups/large?wait=100")
        assert [one["state"] for one in seen["sandboxes"]] == [*["running"] * (size - 1), "stopped"]
        steps = (await ask(worker_registry.url, "GET", last))["state_history"]
        assert [step["event"] for step in steps] == ["stop", "destroyed"]
        return before, after

    before, after = asyncio.run(main())
    assert before > size / 2, f"only {before} were pending when the single create came"
    assert after > size / 10, f"{before} were pending before the single create and {after} when it was answered"


def test_groups_are_answered_in_turn(worker_registry: RunningServer) -> None:
    names, size = ["one", "two", "three"], 1100

    async def main() -> int:
        url = worker_registry.url
        asked = [asyncio.create_task(ask(url, "POST", "/v1/groups?wait=100", spec(name, size)), name=name)
                 for name in names]  # fmt: skip
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop().get_name()
        left = [await pending(worker_registry.url, name, size) for name in names if name != first]
        for made in await asyncio.gather(*asked):
            assert [one["state"] for one in made["sandboxes"]] == ["running"] * size
        return max(left)

    assert asyncio.run(main()) > size / 2, "all groups had most of their sandboxes when the first was answered"
