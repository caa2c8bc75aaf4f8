"""Creates that come close together go to a worker in one request, and each has an answer of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import RunningServer
from tests.waiting import until

from rock.admin.workers.batching import CreateBatcher
from rock.errors import RockError, Unavailable
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import SandboxConfig, State
from rock.sync import Client, Sandbox, SandboxGroup, SandboxGroupConfig
from rock.sync import SandboxConfig as ClientConfig

MANY = 40
CONFIG = {"image": "python:3.11"}
WRONG: list[Any] = [
    {"configs": [CONFIG], "sandboxes": [["one", 1]]},
    {"configs": [CONFIG], "sandboxes": [["../one", 0]]},
    {"configs": [{"image": ""}], "sandboxes": [["one", 0]]},
    {"configs": [], "sandboxes": []},
    {"configs": [CONFIG], "sandboxes": [["one", 0]] * 501},
    ["one"],
]


class Pair:
    """A server and a worker whose sandboxes are in memory."""

    def __init__(self, folder: Path) -> None:
        self.server: RunningServer = server(folder / "server")
        self.machine = Machine(folder / "worker", "--join", self.server.url, "--token", TOKEN, "--name", "one",
                               ROCK_RUNTIME="fake", ROCK_FAULTS=str(folder / "faults"))  # fmt: skip
        self.faults = folder / "faults"
        self.faults.write_text("")
        self.machine.start()
        until(lambda: bool(self.workers()))

    def workers(self) -> list[Any]:
        with Client(self.server.url, KEY) as client:
            return list(client.list_workers())

    def config(self) -> dict[str, Any]:
        return {"base_url": self.server.url, "api_key": KEY, "image": "python:3.11", "memory": "64m", "cpus": 0.2}

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """The worker itself."""
        connection = http.client.HTTPConnection("127.0.0.1", self.machine.note(), timeout=30)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"authorization": f"Bearer {TOKEN}"})
        reply = connection.getresponse()
        try:
            return reply.status, reply.read()
        finally:
            connection.close()

    def requests(self, route: str) -> int:
        """How many of a row the worker was asked."""
        status, text = self.ask("GET", "/metrics")
        assert status == 200
        found = re.findall(rf'rock_http_requests_total{{route="{route}",[^}}]*}} ([0-9.]+)', text.decode())
        return int(sum(map(float, found)))

    def end(self) -> None:
        try:
            self.server.stop()
        finally:
            self.machine.end()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    try:
        yield made
    finally:
        made.end()


def test_a_group_takes_few_requests_and_each_of_a_burst_its_own_answer(pair: Pair) -> None:
    group = SandboxGroup(SandboxGroupConfig(size=MANY, **pair.config()))
    group.start()
    assert len(pair.machine.sandboxes()) == MANY
    assert 1 <= pair.requests("node_create_many") < MANY / 2

    # One of a burst does not start: it is told why, and the others run.
    pair.faults.write_text("node.create.begun=error@5")

    def one(_: int) -> Sandbox | RockError:
        sandbox = Sandbox(ClientConfig(**pair.config()))
        try:
            sandbox.start()
        except RockError as error:
            return error
        return sandbox

    with ThreadPoolExecutor(MANY) as pool:
        outcomes = list(pool.map(one, range(MANY)))
    failed = [outcome for outcome in outcomes if isinstance(outcome, RockError)]
    started = [outcome for outcome in outcomes if isinstance(outcome, Sandbox)]
    assert len(failed) == 1 and isinstance(failed[0], Unavailable) and failed[0].sandbox_id
    with Client(pair.server.url, KEY) as client:
        assert client.get_sandbox(failed[0].sandbox_id).state is State.STOPPED
    ids = {str(sandbox.sandbox_id) for sandbox in started}
    assert len(ids) == MANY - 1 and ids <= pair.machine.sandboxes()
    for sandbox in started:
        sandbox.stop()
    group.stop()
    assert pair.machine.sandboxes() == set()

    for body in WRONG:  # what is no such request is refused, and nothing of it is made
        status, reply = pair.ask("PUT", "/node/v1/sandboxes", body)
        assert (status, json.loads(reply)["error"]["code"]) == (422, "invalid_config"), reply
    assert pair.machine.sandboxes() == set()


def test_a_sandbox_that_a_full_worker_rejects_is_placed_on_another(pair: Pair, tmp_path: Path) -> None:
    """Other sandboxes fill a worker between its report and the create: each worker rejects one create."""
    second = Machine(tmp_path / "second", "--join", pair.server.url, "--token", TOKEN, "--name", "two",
                     ROCK_RUNTIME="fake", ROCK_FAULTS=str(tmp_path / "faults-two"))  # fmt: skip
    (tmp_path / "faults-two").write_text("")
    second.start()
    try:
        until(lambda: len(pair.workers()) == 2)
        for file in (pair.faults, tmp_path / "faults-two"):
            file.write_text("node.create.begun=reject@1")
        sandboxes = [Sandbox(ClientConfig(**pair.config())) for _ in range(6)]
        for sandbox in sandboxes:
            sandbox.start()
        there = pair.machine.sandboxes() | second.sandboxes()
        assert there == {str(sandbox.sandbox_id) for sandbox in sandboxes}
        for sandbox in sandboxes:
            sandbox.stop()
    finally:
        second.end()


def test_a_worker_of_an_older_release_is_asked_one_by_one() -> None:
    asked: list[str] = []
    tried: list[bytes] = []

    async def older(
        method: str, path: str, query: str, body: AsyncIterator[bytes] | None, whole: bytes
    ) -> AsyncGenerator[int | bytes]:
        tried.append(whole)
        yield 404
        yield b'{"error": {"code": "not_found", "message": "no such route"}}'

    async def alone(sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        asked.append(sandbox_id)
        return NodeSandbox(sandbox_id=sandbox_id, alive=True)

    async def work() -> None:
        creates = CreateBatcher("old", older, alone)
        config = SandboxConfig(image="python:3.11")
        try:
            for _ in range(2):
                made = await asyncio.gather(*(creates.create(f"s{number}", config) for number in range(5)))
                assert [one.sandbox_id for one in made] == [f"s{number}" for number in range(5)]
        finally:
            await creates.close()
        with pytest.raises(Unavailable):
            gone = CreateBatcher("gone", cut, alone)
            await gone.close()
            await gone.create("s", config)

    async def cut(
        method: str, path: str, query: str, body: AsyncIterator[bytes] | None, whole: bytes
    ) -> AsyncGenerator[int | bytes]:
        raise AssertionError("nobody is asked any more")
        yield 0

    asyncio.run(asyncio.wait_for(work(), 30))
    assert len(asked) == 10
    assert len(tried) == 1 and json.loads(tried[0])["sandboxes"] == [[f"s{number}", 0] for number in range(5)]
