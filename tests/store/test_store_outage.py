"""The database is away for longer than a lease: no sandbox ends, and calls wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.faults.world import KEY, World
from tests.store.postgres_server import Databases, postgres
from tests.waiting import until

from rock.protocol.node import WorkerState
from rock.sync import Client, Sandbox, SandboxConfig


@pytest.fixture(scope="module")
def database() -> Iterator[Databases]:
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    with postgres() as made:
        yield made


@pytest.fixture(scope="module")
def world(database: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("joined", tmp_path_factory.mktemp("outage"), ROCK_STORE=database())
    yield made
    made.close()


def config(world: World) -> SandboxConfig:
    return SandboxConfig(base_url=world.server.url, api_key=KEY, image="host", memory="256m", cpus=1.0)


@pytest.mark.parametrize("seconds", [9.0, pytest.param(28.0, marks=pytest.mark.long)])
def test_a_failover_ends_no_sandbox(world: World, database: Databases, seconds: float) -> None:
    with Sandbox(config(world)) as box, Client(world.server.url, KEY) as client:
        box.arun("x=kept")
        answers: list[Any] = []

        def command() -> None:
            answers.append(box.arun(f"sleep {seconds}; echo $x; echo once >> /tmp/{box.sandbox_id}; "
                                    f"cat /tmp/{box.sandbox_id}", wait_timeout=90).output)  # fmt: skip

        threads = [threading.Thread(target=command)]
        threads[0].start()
        time.sleep(0.5)
        away = threading.Thread(target=database.away, args=(seconds,))
        away.start()
        time.sleep(2.0)
        with Sandbox(config(world)) as made:  # it waits
            assert made.execute(["echo", "made"]).stdout == "made\n"
        for thread in (away, *threads):
            thread.join(90)
        assert answers == ["kept\nonce\n"]
        assert client.list_workers()[0].epoch == 1
        until(lambda: client.list_workers()[0].state is WorkerState.READY, 20.0)


def test_connections_that_are_cut_are_no_error(world: World, database: Databases) -> None:
    """Reads are asked once more at once; what changes something is asked again by the client, with its key."""
    with Sandbox(config(world)) as box:
        seen: list[BaseException] = []
        stop = threading.Event()

        def calls() -> None:
            client = Client(world.server.url, KEY)
            while not stop.is_set():
                try:
                    assert client.get_sandbox(str(box.sandbox_id)).state == "running"
                    client.list_sandboxes(states="running")
                    with Sandbox(config(world)):
                        pass
                except BaseException as error:
                    seen.append(error)

        threads = [threading.Thread(target=calls) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            time.sleep(0.5)
            database.cut()
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not seen, seen
