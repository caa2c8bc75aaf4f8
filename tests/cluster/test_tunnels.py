"""A worker without inbound ports: commands, streams, terminals, transfers and restarts over its tunnels."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rock.http.tunnels import _MOST_WAITING
from rock.protocol.keys import Access, CreateKey
from rock.protocol.node import WorkerState
from rock.sync import Client, Sandbox, SandboxConfig


class Site:
    """A server, and a worker that it reaches by tunnels only."""

    def __init__(self, folder: Path) -> None:
        self.server: RunningServer = server(folder / "server")
        self.worker = Machine(folder / "worker", "--join", self.server.url, "--token", TOKEN, "--name", "inner",
                              "--tunnel")  # fmt: skip
        self.worker.start()
        self.ready()

    def ready(self) -> None:
        with Client(self.server.url, KEY) as client:
            until(lambda: [found.state for found in client.list_workers()] == [WorkerState.READY], 30)

    def sandbox(self) -> Sandbox:
        return Sandbox(SandboxConfig(base_url=self.server.url, api_key=KEY, image=IMAGE, memory="128m", cpus=0.2))

    def end(self) -> None:
        try:
            self.server.stop()
        finally:
            self.worker.end()
        self.worker.assert_clean()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("tunnels"))
    yield made
    made.end()


def test_everything_works(site: Site) -> None:
    with Client(site.server.url, KEY) as client:
        assert [found.url for found in client.list_workers()] == ["tunnel://inner"]
    data = os.urandom(20 << 20)
    with site.sandbox() as sandbox:
        assert sandbox.arun("cd /tmp; x=5; echo $((x + 1))").output.strip() == "6"
        sandbox.fs.write("/tmp/data", data)
        assert sandbox.fs.read("/tmp/data") == data
        assert sandbox.execute("wc -c < /tmp/data").stdout.strip() == str(len(data))
        process = sandbox.processes.start("for i in 1 2 3; do echo $i; sleep 0.1; done")
        assert process.wait(10).exit_code == 0 and process.logs().data == b"1\n2\n3\n"
        sandbox.processes.start(["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1", "-d", "/tmp"])

        def listing(host: str, path: str) -> bytes:
            connection = http.client.HTTPConnection(host, timeout=30)
            try:
                connection.request("GET", path, headers={"x-rock-api-key": KEY})
                return connection.getresponse().read()
            finally:
                connection.close()

        path = f"/v1/sandboxes/{sandbox.sandbox_id}/ports/8000/"
        until(lambda: b"data" in listing(site.server.url.removeprefix("http://"), path))
        with sandbox.port_forward(8000) as forward:  # a WebSocket through the tunnel
            assert b"data" in listing(forward.address, "/")
            assert listing(forward.address, "/data") == data


def test_many_at_once(site: Site) -> None:
    """More requests than streams wait: each opens another one."""
    with site.sandbox() as sandbox, ThreadPoolExecutor(40) as pool:
        began = time.monotonic()
        outputs = list(pool.map(lambda number: sandbox.execute(f"sleep 0.5; echo {number}").stdout, range(40)))
        assert outputs == [f"{number}\n" for number in range(40)]
        assert time.monotonic() - began < 15


def test_a_restarted_server_and_a_restarted_worker(site: Site) -> None:
    with site.sandbox() as sandbox:
        sandbox.arun("y=7")
        port = int(site.server.url.rpartition(":")[2])
        site.server.kill()
        site.server.start(port)
        assert sandbox.arun("echo $y").output.strip() == "7"
        site.worker.kill()
        site.worker.start()
        assert sandbox.arun("echo $y").output.strip() == "7"


def test_who_may_open_one(site: Site) -> None:
    url = site.server.url.replace("http", "ws", 1) + "/v1/workers/inner/tunnel"
    with Client(site.server.url, KEY) as client:
        scopes = tuple(scope for scope in Access if scope not in (Access.OPEN, Access.WORKER))
        tenant = client.create_key(CreateKey(name="x", tenant="x", scopes=scopes)).key
    for key, status in ((None, 401), ("wrong", 401), (tenant, 403)):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers):
            pass
        assert refused.value.response.status_code == status, key
    # Another identity of the same name gets no request of this worker, and a bounded number of streams.
    headers = {"authorization": f"Bearer {TOKEN}", "x-rock-holder": "x" * 24}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connect(url, additional_headers=headers)) for _ in range(_MOST_WAITING)]
        with pytest.raises(InvalidStatus) as full, connect(url, additional_headers=headers):
            pass
        assert full.value.response.status_code == 429
        with site.sandbox() as sandbox:
            assert sandbox.execute("echo mine").stdout == "mine\n"
        for stream in opened:
            with pytest.raises(TimeoutError):
                stream.recv(timeout=0)


def test_settings_that_exclude_each_other(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "--join", "http://127.0.0.1:9", "--name", "x", "--tunnel", "--token", TOKEN,
                      "--advertise", "http://127.0.0.1:1")  # fmt: skip
    with pytest.raises(AssertionError, match="ROCK_TUNNEL excludes"):
        machine.start()
