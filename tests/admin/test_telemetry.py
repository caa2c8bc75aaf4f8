"""What a server tells of itself: ids of requests, lines of its log, metrics; and how it stops."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.admin.conftest import OWNER
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import Inventory
from tests.waiting import until

from rock.errors import RockError, Unavailable
from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox, SandboxConfig
from rock.telemetry.context import CURRENT, Context
from rock.telemetry.logs import Text
from rock.telemetry.metrics import OTHER, Family, Number, merged, render

SECONDS = 60.0
Headers = dict[str, str]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with an owner's key that logs all it can, as JSON."""
    home = tmp_path_factory.mktemp("told")
    server = RunningServer(home, ROCK_API_KEY=OWNER, ROCK_LOG_FORMAT="json", ROCK_LOG_LEVEL="debug")
    give_image(home)
    server.start(seconds=100)
    yield server
    server.stop()
    server.assert_clean(Inventory())


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Servers whose sandboxes are plain processes, without images."""
    made: list[RunningServer] = []

    def make(**environment: str) -> RunningServer:
        made.append(RunningServer(tmp_path, ROCK_RUNTIME="process", **environment))
        made[-1].start(seconds=100)
        return made[-1]

    yield make
    for server in made:
        if server.process is not None and server.process.poll() is not None:
            server.start()  # what runs on has to be stopped
        server.stop()
        server.assert_clean(Inventory())


def ask(
    server: RunningServer, method: str, path: str, headers: Headers | None = None, body: Any = None
) -> tuple[int, Headers, str]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers or {})
        reply = connection.getresponse()
        told = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, told, reply.read().decode()
    finally:
        connection.close()


def key_of(server: RunningServer, **fields: Any) -> str:
    with Client(server.url, OWNER) as owner:
        return owner.create_key(CreateKey(name="t", **fields)).key


def metrics(server: RunningServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample, by name and labels, as Prometheus' own parser reads them."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    status, headers, text = ask(server, "GET", "/metrics", {"authorization": f"Bearer {OWNER}"})
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4"), text
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), family
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_metrics_count_what_happened(guarded: RunningServer) -> None:
    before = metrics(guarded)
    tenant = key_of(guarded, tenant="counted")
    with Sandbox(SandboxConfig(base_url=guarded.url, api_key=tenant, image=IMAGE, memory="256m")) as sandbox:
        for _ in range(3):
            assert sandbox.execute(["true"]).exit_code == 0
        sandbox.arun("echo hello")
        during = metrics(guarded)
    with pytest.raises(RockError):
        Sandbox(SandboxConfig(base_url=guarded.url, api_key=tenant, image=IMAGE, runtime="nowhere")).start()
    for number in range(20):  # no path makes a series of its own
        ask(guarded, "GET", f"/nowhere/{number}", {"authorization": f"Bearer {tenant}"})
    after = metrics(guarded)

    def grown(name: str, **labels: str) -> float:
        place = name, tuple(sorted(labels.items()))
        return after.get(place, 0.0) - before.get(place, 0.0)

    def counted() -> bool:  # what is counted when an answer has left, or when a sandbox's files are removed
        nonlocal after
        after = metrics(guarded)
        return bool(grown("rock_http_requests_total", route="execute", status="200") >= 3
                    and grown("rock_http_requests_total", route="none", status="404") >= 20
                    and after["rock_worker_sandboxes", ()] == 0
                    and after["rock_event_loop_lag_seconds_count", ()] > 0)  # fmt: skip

    until(counted)
    assert grown("rock_sandbox_creates_total", outcome="running", cause="") == 1
    assert sum(value for (name, labels), value in after.items()
               if name == "rock_sandbox_creates_total" and ("outcome", "refused") in labels) >= 1  # fmt: skip
    assert grown("rock_sandbox_start_seconds_count", outcome="running") == 1
    assert grown("rock_sandbox_ends_total", cause="stopped_by_user") == 1
    assert grown("rock_http_requests_total", route="execute", status="200") == 3
    assert grown("rock_http_request_seconds_count", route="execute") == 3
    assert grown("rock_http_request_seconds_sum", route="execute") > 0
    assert grown("rock_http_requests_total", route="none", status="404") == 20
    assert grown("rock_command_seconds_count", kind="program") == 3
    assert grown("rock_command_seconds_count", kind="session") == 1
    assert grown("rock_store_seconds_count", operation="insert") == 1
    buckets = [value for (name, labels), value in after.items()
               if name == "rock_http_request_seconds_bucket" and ("route", "execute") in labels]  # fmt: skip
    count = after["rock_http_request_seconds_count", (("route", "execute"),)]
    assert buckets == sorted(buckets) and buckets[-1] == count
    assert during["rock_sandboxes", (("state", "running"), ("tenant", "counted"))] == 1
    assert during["rock_worker_sandboxes", ()] == 1 and after["rock_worker_sandboxes", ()] == 0
    assert after["process_resident_memory_bytes", ()] > 1 << 20 and after["process_open_fds", ()] > 10
    assert after["rock_event_loop_lag_seconds_count", ()] > 0


def test_metrics_are_the_owners(guarded: RunningServer) -> None:
    every = key_of(guarded, tenant="curious", scopes=["read", "run", "create", "images"])
    assert ask(guarded, "GET", "/metrics")[0] == 401
    assert ask(guarded, "GET", "/metrics", {"authorization": f"Bearer {every}"})[0] == 403
    assert ask(guarded, "POST", "/metrics", {"authorization": f"Bearer {every}"})[0] in (403, 404, 405)


def test_labels_are_bounded_and_escaped() -> None:
    family: Family[Number] = Family("many", "counter", 'a "text"\nof two lines', ("who", "what"))
    for number in range(5000):
        family.of(f"caller {number}", "x").add()
    assert len(family.series) <= 1001
    assert family.of(OTHER, OTHER).value == 4000
    odd: Family[Number] = Family("odd", "gauge", "odd", ("name",))
    odd.of('a"b\\c\nd').set(1.5)
    assert render([odd]).decode().splitlines()[2] == 'odd{name="a\\"b\\\\c\\nd"} 1.5'


def lines_of(server: RunningServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.home / "logs" / "server.log").read_text().splitlines()]


def test_each_request_has_an_id(guarded: RunningServer) -> None:
    server = guarded
    owner, tenant = {"authorization": f"Bearer {OWNER}"}, key_of(server, tenant="mine")
    _, headers, _ = ask(server, "GET", "/v1/server", {**owner, "x-request-id": "job-7:step.3"})
    assert headers["x-request-id"] == "job-7:step.3"
    made = [ask(server, "GET", "/v1/server", {**owner, "x-request-id": bad})[1]["x-request-id"]
            for bad in ("", "a b", "x" * 129, 'quo"te', "caf\xe9")]  # fmt: skip
    assert len(set(made)) == 5 and all(len(name) == 16 and int(name, 16) for name in made)
    assert ask(server, "GET", "/v1/server", {**owner, "eagleeye-traceid": "ee-1"})[1]["x-request-id"] == "ee-1"
    assert ask(server, "GET", "/v1/server", {"x-request-id": "nobody"})[1]["x-request-id"] == "nobody"  # 401 too
    ask(server, "GET", "/v1/sandboxes/a%0Ab%1b/files/stat?path=/", {**owner, "x-request-id": "forged"})
    with Sandbox(SandboxConfig(base_url=server.url, api_key=tenant, image=IMAGE, memory="256m")) as sandbox:
        path = f"/v1/sandboxes/{sandbox.sandbox_id}/execute"
        called = {"authorization": f"Bearer {tenant}", "x-request-id": "exec-1", "content-type": "application/json"}
        assert ask(server, "POST", path, called, {"command": ["true"]})[0] == 200
        sandbox_id = sandbox.sandbox_id
    lines = lines_of(server)
    by_id = {line["request_id"]: line for line in lines if "request_id" in line}
    assert by_id["exec-1"]["sandbox_id"] == sandbox_id and by_id["exec-1"]["tenant"] == "mine"
    assert by_id["job-7:step.3"]["message"].startswith("GET /v1/server: 200 in ")
    assert by_id["forged"]["message"].startswith("GET /v1/sandboxes/a\nb\x1b/")  # one line of JSON all the same
    launched = [line for line in lines if line["logger"] == "rock.admin" and line.get("sandbox_id") == sandbox_id]
    assert launched[0]["message"].endswith("is running (launched)")
    assert launched[0]["tenant"] == "mine" and launched[0]["request_id"]


def test_no_secret_is_logged(guarded: RunningServer) -> None:
    """Keys, logins of registries, values of environments, input, output and files never get there."""
    server = guarded
    tenant = key_of(server, tenant="secretive")
    secrets = [f"s3cr3t-{name}" for name in ("env", "login", "stdin", "file", "session", "output", "typed", "query")]
    env, login, stdin, file, session, output, typed, query = secrets
    config = SandboxConfig(base_url=server.url, api_key=tenant, image=IMAGE, memory="256m", env={"TOKEN": env},
                           registry_username="me", registry_password=login)  # fmt: skip
    with Sandbox(config) as sandbox:
        sandbox.execute(["sh", "-c", f"cat; echo {output}"], env={"PASS": env}, stdin=stdin)
        sandbox.fs.write("/tmp/x", file.encode())
        sandbox.arun(f"export K={session}; echo {typed} >&2; false")
        sandbox.processes.start(f"sleep 0.1; echo {output}").wait()
        headers = {"authorization": f"Bearer {tenant}"}
        ask(server, "GET", f"/v1/sandboxes/{sandbox.sandbox_id}/files/stat?path=/{query}", headers)
        path = f"/v1/sandboxes/{sandbox.sandbox_id}/execute"
        ask(server, "POST", path, headers, {"command": [1], "env": {"A": env}})
        ask(server, "POST", path, headers, {"command": ["none"], "stdin": stdin})
    log = (server.home / "logs" / "server.log").read_text() + (server.home / "output.log").read_text()
    assert any(line["message"].startswith("POST /v1/sandboxes: 201") and line["tenant"] == "secretive"
               for line in lines_of(server))  # fmt: skip
    assert not [secret for secret in [*secrets, OWNER, tenant] if secret in log]


def test_an_event_is_one_line_of_text() -> None:
    record = logging.LogRecord("rock.x", logging.INFO, "x.py", 1, "GET %s", ("/a\n1999 \x1b[2J\x9b\u2028b",), None)
    token = CURRENT.set(Context("r1"))
    try:
        line = Text().format(record)
    finally:
        CURRENT.reset(token)
    assert line.isprintable() and line.endswith("GET /a\\n1999 \\x1b[2J\\x9b\\u2028b [request_id=r1]")


def test_a_traceback_cannot_be_taken_for_events(capsys: pytest.CaptureFixture[str]) -> None:
    """What is in an exception is of outside; another handler may have had the record before."""
    logger, handler = logging.Logger("rock.forged"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(Text())
    logger.addHandler(logging.NullHandler())
    logger.addHandler(handler)
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000 WARNING rock: forged \x1b[31m\r\u2028y")
    except ValueError as error:
        record = logger.makeRecord("rock.forged", logging.ERROR, "x.py", 1, "it failed", (), (type(error), error, None),
                                   sinfo="Stack\nof \x1b it")  # fmt: skip
    logging.Formatter().format(record)
    logger.handle(record)
    first, *rest = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert first.endswith("it failed") and len(rest) == 4
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


def test_a_server_that_stops_finishes_what_is_under_way(plain_server: Callable[..., RunningServer]) -> None:
    server = plain_server(ROCK_DRAIN_SECONDS="20")
    sandbox = Sandbox(SandboxConfig(base_url=server.url, runtime="process", image="host", minimum_isolation="none"))
    sandbox.start()
    told: list[str] = []
    kept = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS)
    kept.request("GET", "/healthz")
    kept.getresponse().read()
    worker = threading.Thread(target=lambda: told.append(sandbox.arun("sleep 3; echo whole").output))
    worker.start()
    wait_until(lambda: under_way(server) >= 1)
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    refused = None
    end = time.monotonic() + SECONDS
    while refused is None and time.monotonic() < end:  # until the signal is there
        kept.request("GET", "/v1/server")
        reply = kept.getresponse()
        refused = (reply.status, reply.getheader("retry-after"), reply.read()) if reply.status != 200 else None
        if refused is None:
            reply.read()
    kept.close()
    assert refused is not None and refused[0] == 503 and int(refused[1] or 0) >= 1 and b"stopping" in refused[2]
    worker.join(SECONDS)
    assert told == ["whole\n"] or told == ["whole"]
    assert server.process.wait(SECONDS) == 0
    server.start()


def test_a_server_that_stops_does_not_wait_for_ever(plain_server: Callable[..., RunningServer]) -> None:
    server = plain_server(ROCK_DRAIN_SECONDS="1")
    sandbox = Sandbox(SandboxConfig(base_url=server.url, runtime="process", image="host", minimum_isolation="none",
                                    reconnect_timeout=0))  # fmt: skip
    sandbox.start()
    told: list[RockError] = []

    def run() -> None:
        try:
            sandbox.arun("sleep 600")
        except RockError as error:
            told.append(error)

    worker = threading.Thread(target=run)
    worker.start()
    wait_until(lambda: under_way(server) >= 1)
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    worker.join(SECONDS)
    assert len(told) == 1 and isinstance(told[0], Unavailable) and "goes on" in told[0].message
    assert server.process.wait(SECONDS) == 0
    server.start()


def under_way(server: RunningServer) -> int:
    """Requests that are being served, but for the one that asks."""
    text = ask(server, "GET", "/metrics")[2]
    line = next(line for line in text.splitlines() if line.startswith("rock_http_requests_under_way "))
    return int(float(line.split()[1])) - 1


def wait_until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_metrics_of_processes_are_one_text() -> None:
    own = b'# HELP a_total A\n# TYPE a_total counter\na_total 1\n# HELP b B\n# TYPE b gauge\nb{c="{ }"} 2\n'
    other = b'# HELP b B\n# TYPE b gauge\nb{c="x\xe2\x80\xa8y"} 3\n# HELP d D\n# TYPE d histogram\nd_sum 4\nd_count 1\n'
    assert merged(own, {"w-1": other, "w-2": b""}).decode().split("\n") == [
        "# HELP a_total A", "# TYPE a_total counter", "a_total 1",
        "# HELP b B", "# TYPE b gauge", 'b{c="{ }"} 2', 'b{worker="w-1",c="x\u2028y"} 3',
        "# HELP d D", "# TYPE d histogram", 'd_sum{worker="w-1"} 4', 'd_count{worker="w-1"} 1', "",
    ]  # fmt: skip
    assert merged(own, {}) == own
