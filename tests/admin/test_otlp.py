"""Traces and metrics as a receiver of OTLP gets them: one trace from a call of the SDK to the process it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import Inventory
from tests.otlp_receiver import Receiver, Seen

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra rock-sandbox[otel] is not installed")

KEY = "the owner's key"
SECONDS = 60.0
USE = """
import json, sys
from rock.sync import Sandbox, SandboxConfig
plain = dict(runtime="process", image="host", network="host", minimum_isolation="none")
sandbox = Sandbox(SandboxConfig(**plain, labels={"job": "seven"}))
sandbox.start()
seen = {"id": sandbox.sandbox_id}
seen["program"] = sandbox.execute(["sh", "-c", "echo $TRACEPARENT"]).stdout.strip()
seen["own"] = sandbox.execute(["sh", "-c", "echo $TRACEPARENT"], env={"TRACEPARENT": "mine"}).stdout.strip()
seen["session"] = sandbox.arun("echo $TRACEPARENT; false").output.strip()
seen["status"] = sandbox.arun("echo $?").output.strip()
process = sandbox.processes.start("echo $TRACEPARENT")
process.wait()
seen["background"] = process.logs().data.decode().strip()
seen["streamed"] = "".join(part.text for part in sandbox.stream(["sh", "-c", "echo $TRACEPARENT"])).strip()
sandbox.stop()
print(json.dumps(seen))
"""
# A program with traces of its own
WITHIN = """
import os
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(os.environ["RECEIVER"] + "/v1/traces")))
trace.set_tracer_provider(provider)
with trace.get_tracer("trainer").start_as_current_span("training step"):
""" + "".join(f"    {line}\n" for line in USE.strip().splitlines())


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


def exporting(home: Path, receiver: Receiver, **environment: str) -> RunningServer:
    return RunningServer(
        home, ROCK_API_KEY=KEY, ROCK_OTEL_ENDPOINT=receiver.url, ROCK_OTEL_ATTRIBUTES="team=rl, site=here",
        ROCK_OTEL_INTERVAL="0.5", OTEL_BSP_SCHEDULE_DELAY="200", **environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[RunningServer]:
    server = exporting(tmp_path_factory.mktemp("traced"), receiver, ROCK_RUNTIME="process")
    server.start(seconds=100)
    yield server
    server.stop()
    server.assert_clean(Inventory())


def run(url: str, text: str, **environment: str) -> dict[str, str]:
    environ = {**os.environ, "ROCK_BASE_URL": url, "ROCK_API_KEY": KEY, **environment}
    done = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", text], env=environ, timeout=120,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def above(receiver: Receiver, span: Seen) -> list[str]:
    """Names of what a span is a part of, from itself to the beginning of its trace."""
    names = [span.name]
    while span.parent:
        span = known(receiver, span.parent)
        names.append(span.name)
    return names


def known(receiver: Receiver, span_id: str) -> Seen:
    receiver.until(lambda: any(span.id == span_id for span in receiver.spans))
    return next(span for span in receiver.spans if span.id == span_id)


def told(receiver: Receiver, traceparent: str) -> Seen:
    """The span that a process was told it belongs to."""
    _, trace, span_id, _ = traceparent.split("-")
    span = known(receiver, span_id)
    assert span.trace == trace
    return span


def test_one_trace_from_the_call_to_the_process(traced: RunningServer, receiver: Receiver) -> None:
    seen = run(traced.url, USE, ROCK_TRACE="1", ROCK_OTEL_ENDPOINT=receiver.url)
    program = told(receiver, seen["program"])
    assert above(receiver, program) == ["program", "execute", "rock execute"]
    assert program.said["rock.sandbox_id"] == seen["id"] and program.said["rock.label.job"] == "seven"
    assert program.resource["service.name"] == "rock-server"
    assert program.resource["team"] == "rl" and program.resource["site"] == "here"
    assert above(receiver, told(receiver, seen["session"])) == ["session", "run", "rock run"]
    background = told(receiver, seen["background"])
    assert above(receiver, background) == ["background", "start_process", "rock start_process"]
    assert above(receiver, told(receiver, seen["streamed"])) == ["spawn", "execute", "rock execute"]
    assert seen["own"] == "mine" and seen["status"] == "1"  # what a user set stays, and so does `$?`
    receiver.until(lambda: receiver.named("create sandbox"))
    create = receiver.named("create sandbox")[-1]
    assert above(receiver, create) == ["create sandbox", "start sandbox", "create_sandbox", "rock create_sandbox"]
    request = next(span for span in receiver.named("execute") if span.trace == program.trace)
    assert request.said["http.response.status_code"] == 200 and request.said["rock.request_id"]


def test_a_call_is_a_part_of_its_programs_own_trace(traced: RunningServer, receiver: Receiver) -> None:
    seen = run(traced.url, WITHIN, RECEIVER=receiver.url)
    chain = above(receiver, told(receiver, seen["session"]))
    assert chain == ["session", "run", "rock run", "training step"]
    assert above(receiver, told(receiver, seen["program"]))[-1] == "training step"


def test_without_a_caller_that_traces_a_trace_begins_at_the_server(traced: RunningServer, receiver: Receiver) -> None:
    seen = run(traced.url, USE)
    assert above(receiver, told(receiver, seen["program"])) == ["program", "execute"]


def test_metrics_are_exported_too(traced: RunningServer, receiver: Receiver) -> None:
    run(traced.url, USE)

    def points(name: str) -> list[tuple[dict[str, str], float]]:
        return [(labels, point.count if hasattr(point, "bucket_counts") else point.as_double)
                for found, labels, point in list(receiver.metrics) if found == name]  # fmt: skip

    receiver.until(lambda: any(labels["kind"] == "program" and n >= 3 for labels, n in points("rock_command_seconds")))
    receiver.until(lambda: any(labels["route"] == "execute" and n for labels, n in points("rock_http_requests_total")))
    assert any(n > 1 << 20 for _, n in points("process_resident_memory_bytes"))
    assert receiver.resources[-1]["team"] == "rl" and receiver.resources[-1]["service.name"] == "rock-server"


def test_one_trace_through_an_admin_and_its_rocklet(tmp_path: Path, receiver: Receiver) -> None:
    """Three processes: the client, the admin that forwards, the rocklet that has the sandbox."""
    (tmp_path / "rocklet").mkdir()
    (tmp_path / "admin").mkdir()
    rocklet = exporting(tmp_path / "rocklet", receiver, ROCK_RUNTIME="process")
    environ = {**os.environ, **rocklet.environment, "ROCK_HOME": str(rocklet.home), "ROCK_POOL_SIZE": "0"}
    command = [sys.executable, "-c", "from rock.cli.scripts import rocklet_main; rocklet_main()", "--port", "0"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and "serves" in child.stdout.readline()
            port = json.loads((rocklet.home / "server.json").read_text())["port"]
            admin = exporting(tmp_path / "admin", receiver, ROCK_WORKERS=f"one=http://127.0.0.1:{port}")
            admin.start(seconds=60)
            seen = run(admin.url, USE, ROCK_TRACE="1", ROCK_OTEL_ENDPOINT=receiver.url)
            span = told(receiver, seen["session"])
            assert above(receiver, span) == ["session", "run", "run", "rock run"]
            assert span.resource["service.name"] == "rock-rocklet"
            receiver.until(lambda: any(s.resource["service.name"] == "rock-rocklet"
                                       for s in receiver.named("create sandbox")))  # fmt: skip
            create = next(s for s in receiver.named("create sandbox") if s.resource["service.name"] == "rock-rocklet")
            assert above(receiver, create) == [
                "create sandbox", "node_create", "start sandbox", "create_sandbox", "rock create_sandbox",
            ]  # fmt: skip
            admin.stop()
        finally:
            child.terminate()
            assert child.wait(60) == 0


def test_a_receiver_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, ROCK_RUNTIME="process", ROCK_API_KEY=KEY, ROCK_OTEL_ENDPOINT="http://127.0.0.1:9",
                           ROCK_OTEL_INTERVAL="0.2", OTEL_BSP_SCHEDULE_DELAY="100")  # fmt: skip
    server.start(seconds=100)
    assert run(server.url, USE)["status"] == "1"
    server.stop()  # within its time
    assert "rock.telemetry: the receiver of " in server.log() or "did not take them" in server.log()
