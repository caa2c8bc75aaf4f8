"""A writer and readers over one store and one worker, on this machine: each serves its own, refuses or hands on the
rest, and goes on while the other is away."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.cluster.test_workers_join import LONG, ask
from tests.conftest import IMAGE, RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body
from tests.gateway.conftest import upstream as upstream
from tests.waiting import until

from rock.errors import RockError, Unavailable, WrongRole
from rock.protocol.node import WorkerState
from rock.protocol.routes import role_for
from rock.protocol.sandbox import State
from rock.sdk.servers import Servers
from rock.sync import Client, Sandbox, SandboxConfig

DEAD = "http://127.0.0.1:9"
V1 = "/apis/envs/sandbox/v1"


class Site:
    """A writer, a reader, and a worker that knows both. more: settings of the servers."""

    def __init__(self, folder: Path, store: str, readers: int = 1) -> None:
        self.folder = folder
        self.store = store
        self.writer = self.server("writer", "write")
        self.readers = [self.server(f"reader{number}", "read") for number in range(readers)]
        servers = ",".join(made.url for made in (self.writer, *self.readers))
        self.worker = Machine(folder / "one", "--join", servers, "--token", TOKEN, "--name", "one")
        self.worker.start()
        with Client(self.readers[0].url, KEY) as client:
            until(lambda: [worker.state for worker in client.list_workers()] == [WorkerState.READY])
        self.reads = ",".join(reader.url for reader in self.readers)
        self.url = f"{self.writer.url};{self.reads}"
        time.sleep(1.1)  # by then each server has looked at the registry

    def server(self, name: str, role: str, **more: str) -> RunningServer:
        return server(self.folder / name, ROCK_ROLE=role, ROCK_STORE=self.store, ROCK_WORKER_LEASE="60", **more)

    def config(self, **more: Any) -> SandboxConfig:
        usual = {"base_url": self.url, "api_key": KEY, "image": IMAGE, "memory": "64m", "cpus": 0.2}
        return SandboxConfig(**{**usual, **more})

    def end(self) -> None:
        try:
            if self.writer.process is not None and self.writer.process.poll() is None:
                self.writer.stop()
        finally:
            for reader in self.readers:
                if reader.process is not None and reader.process.poll() is None:
                    reader.process.terminate()
                    assert reader.process.wait(30) == 0, reader.log()
            self.worker.end()
        self.worker.assert_clean()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("roles")
    made = Site(folder, str(folder / "shared.sqlite"))
    yield made
    made.end()


def test_each_serves_its_own(site: Site) -> None:
    with Sandbox(site.config()) as sandbox:
        name = str(sandbox.sandbox_id)
        assert sandbox.execute("echo here").stdout == "here\n"
        sandbox.fs.write("/tmp/x", b"1")
        assert sandbox.arun("cat /tmp/x").output.strip() == "1"
        with Client(site.readers[0].url, KEY) as reader, Client(site.writer.url, KEY) as writer:
            assert reader.get_sandbox(name).state is State.RUNNING and reader.get_sandbox(name).is_alive
            assert writer.get_sandbox(name).state is State.RUNNING
            assert reader.server_info().roles == ["read"] and writer.server_info().roles == ["write"]
            with pytest.raises(WrongRole) as refused:
                reader.stop_sandbox(name)
            assert refused.value.details == {"role": "write"} and "ROCK_WRITER" in str(refused.value.hint)
        with pytest.raises(WrongRole) as caught:
            Sandbox(site.config(base_url=site.writer.url)).attach(name).execute("echo here")
        assert caught.value.details == {"role": "read"}
        status, told = ask(site.readers[0].url, "POST", f"{V1}/stop", {"sandbox_id": name}, KEY)
        assert status == 421 and b"wrong_role" in told
        # The same in ROCK's words, each at the server of its role.
        told = json.loads(ask(site.readers[0].url, "GET", f"{V1}/is_alive?sandbox_id={name}", None, KEY)[1])
        assert told["result"]["is_alive"] is True
        body = {"sandbox_id": name, "command": ["cat", "/tmp/x"]}
        told = json.loads(ask(site.readers[0].url, "POST", f"{V1}/execute", body, KEY)[1])
        assert told["result"]["stdout"] == "1", told
    with Client(site.readers[0].url, KEY) as reader:
        assert reader.get_sandbox(name).state is State.STOPPED


def test_what_is_handed_on(site: Site) -> None:
    """With the address of the other role one server serves all; the caller's key goes with the request."""
    reader = site.server("handing-reader", "read", ROCK_WRITER=f"{DEAD},{site.writer.url}")
    writer = site.server("handing-writer", "write", ROCK_READER=site.readers[0].url)
    try:
        with Sandbox(site.config(base_url=reader.url)) as sandbox:
            assert sandbox.execute("echo here").stdout == "here\n"
            other = Sandbox(site.config(base_url=writer.url)).attach(str(sandbox.sandbox_id))
            assert other.execute("echo there").stdout == "there\n"
            assert "".join(chunk.text for chunk in other.stream("echo streamed")) == "streamed\n"
        assert ask(reader.url, "POST", "/v1/sandboxes", {"image": IMAGE}, "wrong")[0] == 401
        spec = {"image": IMAGE, "memory": "64m", "cpus": 0.2}
        name = json.loads(ask(reader.url, "POST", f"{V1}/start", spec, KEY)[1])["result"]["sandbox_id"]
        body = {"sandbox_id": name, "command": ["echo", "x"]}
        told = json.loads(ask(writer.url, "POST", f"{V1}/execute", body, KEY)[1])
        assert told["result"]["stdout"] == "x\n"
        assert json.loads(ask(reader.url, "POST", f"{V1}/stop", {"sandbox_id": name}, KEY)[1])["status"] == "Success"
    finally:
        for made in (reader, writer):
            assert made.process is not None
            made.process.terminate()
            assert made.process.wait(30) == 0, made.log()


def test_a_reader_hands_model_calls_on(site: Site, upstream: FakeUpstream) -> None:
    """The endpoint of agents on a reader is that of the writer, also for streams and bad secrets."""
    reader = site.server("calling-reader", "read", ROCK_WRITER=f"{DEAD},{site.writer.url}")
    try:
        with Client(site.writer.url, KEY) as writer:
            writer.upstreams.put("fake", upstream.url, key="sk-upstream")
        with Client(reader.url, KEY) as client:
            run = client.runs.create(upstream="fake", budget={"calls": 2})
            address = {"base_url": f"{reader.url}/gateway", "api_key": run.api_key}
            status, body, _ = chat(address, chat_body("a"))
            assert status == 200 and body["choices"][0]["message"]["content"] == "reply 1"
            status, text, _ = chat(address, chat_body("a", "reply 1", "b", stream=True))
            assert status == 200 and text.endswith("data: [DONE]\n\n")
            status, body, _ = chat(address, chat_body("more"))
            assert status == 400 and "budget" in body["error"]["message"]
            assert chat({**address, "api_key": KEY}, chat_body("a"))[0] == 401  # the key of the API is no secret
            calls = run.calls()
            assert [(call.state, call.parent) for call in calls] == [("done", None), ("done", 1)]
            run.end(1.0)
        with Client(site.writer.url, KEY) as writer:
            assert writer.runs.get(run.id).info.reward == 1.0
            writer.upstreams.delete("fake")
        assert not (site.folder / "calling-reader" / "gateway").exists()  # the calls are on the writer
        assert [seen["headers"]["authorization"] for seen in upstream.seen()] == ["Bearer sk-upstream"] * 2
    finally:
        assert reader.process is not None
        reader.process.terminate()
        assert reader.process.wait(30) == 0, reader.log()


def test_what_was_handed_on_to_the_same_role_is_told(site: Site, free_port: Callable[[], int]) -> None:
    port = free_port()
    made = [site.server("handing-on", "read", ROCK_WRITER=f"http://127.0.0.1:{port}")]
    try:
        made.append(server(site.folder / "handing-back", port, ROCK_ROLE="read", ROCK_STORE=site.store,
                           ROCK_WRITER=made[0].url))  # fmt: skip
        for asked in made:
            status, told = ask(asked.url, "POST", "/v1/sandboxes", {"image": IMAGE}, KEY)
            assert status == 421 and b"leads here" in told, told
    finally:
        for one in made:
            assert one.process is not None
            one.process.terminate()
            assert one.process.wait(30) == 0, one.log()


def test_protocols_of_other_systems_on_each_role(site: Site) -> None:
    begin = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-06-18"}}
    with Sandbox(site.config()) as sandbox:
        execute, command = f"/swerex/{sandbox.sandbox_id}/execute", {"command": ["echo", "rex"]}
        for method, path, body, status in (
            ("POST", "/mcp", begin, 200), ("POST", "/agentscope/get_status", {"identity": sandbox.sandbox_id}, 404),
            ("GET", "/openenv/game:Sokoban-v0-easy/schema", None, 200),
        ):  # fmt: skip
            assert ask(site.writer.url, method, path, body, KEY)[0] == status, path
            assert ask(site.readers[0].url, method, path, body, KEY)[0] == 421, path
        assert ask(site.readers[0].url, "POST", execute, command, KEY)[0] == 200
        assert ask(site.writer.url, "POST", execute, command, KEY)[0] == 421


def test_of_several_urls_the_next_is_asked(site: Site) -> None:
    with Sandbox(site.config(base_url=f"{DEAD},{site.writer.url};{DEAD},{site.readers[0].url}")) as sandbox:
        assert sandbox.execute("echo here").stdout == "here\n"
        sandbox.fs.write("/tmp/x", bytes(100_000))
        assert len(sandbox.fs.read("/tmp/x")) == 100_000
    with Client(f"{DEAD},{DEAD}", KEY) as client, pytest.raises(Unavailable):
        client.list_sandboxes()
    several = Servers.parse("http://a,http://b;http://c")
    assert (len(several.write), len(several.read), len(Servers.parse("http://a").read)) == (2, 1, 1)


def test_which_role_a_request_is_for() -> None:
    for method, path, role in (
        ("POST", "/v1/sandboxes", "write"), ("GET", "/v1/sandboxes", None), ("GET", "/v1/sandboxes/x", None),
        ("DELETE", "/v1/sandboxes/x", "write"), ("POST", "/v1/sandboxes/x/stop", "write"),
        ("POST", "/v1/sandboxes/x/execute", "read"), ("GET", "/v1/sandboxes/x/files/content", "read"),
        ("GET", "/v1/sandboxes/x/connections", None), ("POST", "/v1/envs", "write"), ("POST", "/v1/keys", "write"),
        ("POST", "/v1/sandboxes/x/envs", "read"), ("POST", "/v1/workers", None), ("POST", "/v1/workers/x/beat", None),
        ("POST", "/v1/workers/x/drain", "write"), ("GET", "/healthz", None), ("POST", f"{V1}/start_async", "write"),
        ("POST", f"{V1}/sandboxes/x/archive", "write"), ("GET", f"{V1}/sandboxes/x/proxy/port/8000/archive", "read"),
        ("POST", f"{V1}/sandboxes/x/proxy/restart", "read"), ("POST", f"{V1}/run_in_session", "read"),
        ("POST", f"{V1}/sandboxes/batch", None), ("GET", f"{V1}/get_status", None),
        ("POST", "/apis/v1/envs/gem/make", "write"), ("POST", "/apis/v1/envs/gem/step", "read"),
        ("POST", "/mcp", "write"), ("GET", "/openenv/x/ws", "write"), ("POST", "/agentscope/release", "write"),
        ("POST", "/swerex/x/execute", "read"), ("GET", "/swerex/x/is_alive", "read"),
    ):  # fmt: skip
        assert role_for(method, path) == role, (method, path)


class Load(threading.Thread):
    """Does something again and again; `errors` is what went wrong."""

    def __init__(self, work: Any) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.done = 0
        self.errors: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.work()
                self.done += 1
                self.over.wait(0.05)
            except Exception as error:
                self.errors.append(repr(error))
                self.over.wait(0.1)

    def end(self) -> None:
        self.over.set()
        self.join(120)
        assert not self.is_alive()


@contextlib.contextmanager
def loads(*works: Any) -> Iterator[list[Load]]:
    made = [Load(work) for work in works]
    for load in made:
        load.start()
    try:
        yield made
    finally:
        for load in made:
            load.end()


def one_is_away(site: Site, seconds: float) -> None:
    """Reads under load while the writer is killed, then creates and stops under load while every reader is."""
    with Sandbox(site.config()) as sandbox:
        name = str(sandbox.sandbox_id)

        def read() -> None:
            other = Sandbox(site.config()).attach(name)
            assert other.execute("echo here").stdout == "here\n"
            other.fs.write("/tmp/x", b"abc")
            assert other.fs.read("/tmp/x") == b"abc"
            with Client(site.url, KEY) as client:
                assert client.get_sandbox(name).is_alive
                assert any(info.sandbox_id == name for info in client.list_sandboxes())

        with loads(read, read, read) as readers:
            until(lambda: all(load.done >= 2 for load in readers))
            port = int(site.writer.url.rpartition(":")[2])
            site.writer.kill()
            before = [load.done for load in readers]
            time.sleep(seconds)
            until(lambda: all(load.done > count + 2 for load, count in zip(readers, before, strict=True)))
            with pytest.raises(RockError):
                Sandbox(site.config(startup_timeout=5)).start()
            site.writer.start(port)
        assert [load.errors for load in readers] == [[], [], []]

        def write() -> None:
            made = Sandbox(site.config(base_url=site.writer.url))
            made.start()
            made.stop()

        with loads(write, write) as writers:
            until(lambda: all(load.done >= 1 for load in writers))
            ports = [int(reader.url.rpartition(":")[2]) for reader in site.readers]
            for reader in site.readers:
                reader.kill()
            before = [load.done for load in writers]
            time.sleep(seconds)
            until(lambda: all(load.done > count for load, count in zip(writers, before, strict=True)))
            for reader, port in zip(site.readers, ports, strict=True):
                reader.start(port)
        assert [load.errors for load in writers] == [[], []]
        assert sandbox.execute("echo still").stdout == "still\n"


@LONG
def test_one_role_is_away_on_sqlite(site: Site) -> None:
    one_is_away(site, 2.0)
