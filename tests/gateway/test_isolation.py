"""Tenants, hostile requests through the loopback port, and the port itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from rock.errors import Conflict, Forbidden, InvalidConfig, NotFound, Unauthorized, Unsupported
from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox, SandboxConfig
from tests.conftest import IMAGE, RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body, http_json, http_raw
from tests.gateway.test_service import AGENT
from tests.waiting import until

RAW = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10) as sock:
    sock.settimeout(10)
    sock.sendall(sys.argv[2].encode().decode("unicode_escape").encode("latin-1"))
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
            if b"\\r\\n\\r\\n" in data:
                break
    except TimeoutError:
        pass
print(data.decode("latin-1"))
"""


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    made = RunningServer(tmp_path_factory.mktemp("keyed"), ROCK_API_KEY="the-key-of-the-owner")
    from tests.conftest import give_image

    give_image(made.home)
    made.start()
    yield made
    made.stop()


def test_a_tenant_sees_nothing_of_another(keyed: RunningServer, upstream: FakeUpstream) -> None:
    owner = Client(keyed.url, "the-key-of-the-owner")
    clients = []
    for tenant in ("alpha", "beta"):
        clients.append(Client(keyed.url, owner.create_key(CreateKey(name=tenant, tenant=tenant)).key))
    alpha, beta = clients
    reader = Client(keyed.url, owner.create_key(CreateKey(name="r", tenant="alpha", scopes=["read"])).key)
    owner.upstreams.put("shared", upstream.url, key="sk-owner")
    run = alpha.runs.create(upstream="shared", tags={"a": "1"})
    chat({"base_url": run.base_url, "api_key": run.api_key}, chat_body("private"))
    assert [info.id for info in alpha.runs.list()] == [run.id] and beta.runs.list() == []
    assert [info.id for info in owner.runs.list()] == [run.id]
    with pytest.raises(NotFound):
        beta.runs.get(run.id)
    mine = beta.runs.create(pull=True)
    mine.id = run.id
    for ask in (mine.calls, mine.end, mine.refresh, mine.delete, mine.trajectory, lambda: mine.next(wait=0),
                lambda: mine.answer(1, text="x"), lambda: mine.call(1)):  # fmt: skip
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(NotFound):
        beta.runs.create(replay={"run": run.id})
    with pytest.raises(NotFound):  # the owner's upstream is shared, but not the tenant's own
        owner.upstreams.delete("unknown")
    with pytest.raises(Forbidden):
        reader.runs.create(upstream="shared")
    assert reader.runs.get(run.id).calls()[0].request == chat_body("private")
    # an upstream of a tenant reaches no address of the server's own networks
    alpha.upstreams.put("mine", keyed.url, retries=0)
    assert [row.name for row in beta.upstreams.list()] == ["shared"]
    probe = alpha.runs.create(upstream="mine")
    status, body, _ = chat({"base_url": probe.base_url, "api_key": probe.api_key}, chat_body("x"))
    assert status == 502 and "private network" in body["error"]["message"]
    with pytest.raises(NotFound):
        beta.runs.create(upstream="mine")
    # the secret of a run is no key of the API, and a key of the API is no secret of a run
    with pytest.raises(Unauthorized):
        Client(keyed.url, run.api_key).runs.list()
    url = f"{keyed.url}/gateway/v1/chat/completions"
    assert http_raw("POST", url, b"{}", {"authorization": "Bearer the-key-of-the-owner"})[0] == 401
    sandbox = Sandbox(SandboxConfig(base_url=keyed.url, api_key="the-key-of-the-owner", image=IMAGE, memory="256m"))
    sandbox.start()
    try:
        with pytest.raises(NotFound):
            alpha.runs.create(sandbox=sandbox.sandbox_id, pull=True)
        for method in ("PUT", "DELETE"):
            status, _, _ = http_json(method, f"{keyed.url}/v1/sandboxes/{sandbox.sandbox_id}/gateway", {},
                                     {"authorization": f"Bearer {run.api_key}"})
            assert status == 401
    finally:
        sandbox.stop()


def test_hostile_requests_through_the_port(server: RunningServer) -> None:
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, network="none", memory="256m")) as sandbox:
        run = sandbox.start_run(pull=True)
        port = run.base_url.rpartition(":")[2]

        def raw(text: str) -> str:
            return sandbox.execute(["python3", "-c", RAW, port, text]).stdout.strip()

        for path in ("/healthz", "/v1/sandboxes", "/v1/runs", "/metrics", "/../v1/sandboxes", "/%2e%2e/v1/runs",
                     "/gateway/../v1/runs", "//v1/runs", "http://other/v1/runs", "/node/v1/status"):  # fmt: skip
            answer = raw(f"GET {path} HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
            assert answer.startswith(("HTTP/1.1 401", "HTTP/1.1 404", "HTTP/1.1 400", "HTTP/1.1 200")), answer
            assert "sandboxes" not in answer and "rock_" not in answer and "version" not in answer
        auth = f"authorization: Bearer {run.api_key}\\r\\n"
        assert "404" in raw(f"GET /v1/sandboxes HTTP/1.1\\r\\nhost: x\\r\\n{auth}\\r\\n")
        upgrade = ("connection: Upgrade\\r\\nupgrade: websocket\\r\\nsec-websocket-version: 13\\r\\n"
                   "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n")
        assert "426" in raw(f"GET /v1/responses HTTP/1.1\\r\\nhost: x\\r\\n{upgrade}\\r\\n")
        chunked = f"POST /v1/messages HTTP/1.1\\r\\ntransfer-encoding: chunked\\r\\n{auth}host: x\\r\\n\\r\\nzzzz\\r\\n"
        for text in ("\\x00\\x01\\x02\\xff", "GET / HTTP/9.9\\r\\n\\r\\n", chunked, "A" * 100_000,
                     "POST /v1/messages HTTP/1.1\\r\\ncontent-length: -5\\r\\n\\r\\n"):  # fmt: skip
            raw(text)
        flood = ("import socket\nsocks = []\nfor _ in range(400):\n    s = socket.create_connection(('127.0.0.1', "
                 f"{port}), 5)\n    s.sendall(b'GET / HTTP/1.1\\r\\n')\n    socks.append(s)\nprint(len(socks))")
        sandbox.execute(["python3", "-c", flood])
        assert raw(f"GET /v1/models HTTP/1.1\\r\\nhost: x\\r\\n{auth}\\r\\n").startswith("HTTP/1.1 200")
        assert http_json("GET", f"{server.url}/healthz")[0] == 200 and run.refresh().counts.calls == 0
        run.delete(force=True)


def test_ports_of_runs(server: RunningServer) -> None:
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, network="none", memory="256m")) as sandbox:
        taken = sandbox.processes.start(["python3", "-m", "http.server", "4000", "--bind", "127.0.0.1"])
        until(lambda: "200" in sandbox.execute(
            ["python3", "-c", "import urllib.request as u; print(u.urlopen('http://127.0.0.1:4000').status)"]).stdout)
        with pytest.raises(Conflict):
            sandbox.start_run(pull=True, port=4000)
        taken.kill()
        first = sandbox.start_run(pull=True, port=4001)
        assert first.base_url == "http://127.0.0.1:4001"
        second = sandbox.start_run(pull=True)
        assert second.base_url == first.base_url and second.api_key != first.api_key
        first.end()
        code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:4001').status)"
        assert sandbox.execute(["python3", "-c", code]).stdout.strip() == "200"
        for run in (first, second):
            run.delete(force=True)
    with Client(server.url) as client:
        with pytest.raises(NotFound):
            client.runs.create(sandbox="unknown", pull=True)
        with pytest.raises(InvalidConfig):
            client.runs.create(pull=True, port=4000)


PROBE = "import os, urllib.request as u; print(u.urlopen(os.environ['ROCK_RUN_URL']).status)"


def test_a_restarted_sandbox_has_its_port_again(server: RunningServer, upstream: FakeUpstream) -> None:
    """The run continues at the same address after stop and restart. A sandbox whose runs have ended gets no port."""
    config = SandboxConfig(base_url=server.url, image=IMAGE, network="none", memory="256m", auto_delete_seconds=600)
    sandbox = Sandbox(config)
    sandbox.start()
    with Client(server.url) as client:
        client.upstreams.put("again", upstream.url)
        run = sandbox.start_run(upstream="again")
        try:
            for calls in (1, 2):
                done = sandbox.execute(["python3", "-c", AGENT, json.dumps(chat_body(f"turn {calls}"))],
                                       env=run.environ)
                assert json.loads(done.stdout)["choices"], done
                assert run.refresh().counts.done == calls
                sandbox.stop()
                sandbox.restart()
            run.delete(force=True)
            sandbox.stop()
            sandbox.restart()
            assert "refused" in sandbox.execute(["python3", "-c", PROBE], env=run.environ).stderr
        finally:
            sandbox.delete()
            client.upstreams.delete("again")


@pytest.mark.parametrize("runtime", ["process", "fake"])
def test_other_runtimes(server: RunningServer, runtime: str) -> None:
    network = "host" if runtime == "process" else "none"
    config = SandboxConfig(base_url=server.url, image="host" if runtime == "process" else IMAGE, runtime=runtime,
                           network=network, minimum_isolation="none")
    with Sandbox(config) as sandbox:
        if runtime == "fake":
            with pytest.raises(Unsupported):
                sandbox.start_run(pull=True)
            return
        run = sandbox.start_run(pull=True)
        assert sandbox.execute(["python3", "-c", PROBE], env=run.environ).stdout.strip() == "200"
        run.delete(force=True)


def test_a_server_without_a_gateway(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_GATEWAY="off")
    with Client(server.url) as client, pytest.raises(NotFound):
        client.runs.list()
    assert http_json("POST", f"{server.url}/gateway/v1/chat/completions", {})[0] == 404
    assert not (server.home / "gateway").exists()
