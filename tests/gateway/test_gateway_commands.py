"""`rock upstream` and `rock runs`, the stop of a server, and large requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rock.sync import Client
from tests.conftest import RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body
from tests.gateway.test_pull import Agent, text_of
from tests.waiting import slowness

SECRET = "sk-secret-of-a-command"


def rock(server: RunningServer, *words: str, input: str = "", code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rock.cli.main", "--base-url", server.url, *words], input=input, capture_output=True,
        text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_upstreams_and_runs(server: RunningServer, upstream: FakeUpstream, tmp_path: Path) -> None:
    assert "no upstreams" in rock(server, "upstream", "ls")
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    for place, (words, given) in enumerate((
        (("--key-stdin",), {"input": SECRET + "\n"}), (("--key-file", str(file)), {}),
        (("--key-env", "A_KEY"), {"A_KEY": SECRET}),
    )):  # fmt: skip
        rock(server, "upstream", "set", f"u{place}", upstream.url, *words, **given)
        with Client(server.url) as client, client.runs.create(upstream=f"u{place}", tags={"n": str(place)}) as run:
            chat({"base_url": run.base_url, "api_key": run.api_key}, chat_body("a"))
        assert upstream.seen()[-1]["headers"]["authorization"] == f"Bearer {SECRET}"
    rock(server, "upstream", "set", "u0", upstream.url, "--model", "small=large")  # keeps its key
    listed = json.loads(rock(server, "upstream", "ls", "--json"))
    assert [row["has_key"] for row in listed] == [True] * 3 and listed[0]["models"] == {"small": "large"}
    rock(server, "upstream", "set", "u0", upstream.url, "--no-key")
    rock(server, "upstream", "set", "u0", upstream.url, "--key-stdin", "--no-key", code=1)
    rock(server, "upstream", "set", "u0", upstream.url, "--key-stdin", input=" \n", code=1)
    assert run.id in rock(server, "runs", "ls", "--tag", "n=2")
    assert run.id not in rock(server, "runs", "ls", "--tag", "n=1")
    assert run.id in rock(server, "runs", "ls", "--upstream", "u2")
    assert run.id not in rock(server, "runs", "ls", "--upstream", "u1")
    assert json.loads(rock(server, "runs", "show", run.id))["counts"]["done"] == 1
    assert "openai-chat" in rock(server, "runs", "calls", run.id)
    (call,) = json.loads(rock(server, "runs", "calls", run.id, "--json", "--bodies"))
    assert call["request"] == chat_body("a")
    rock(server, "runs", "export", run.id, "--format", "openai", "-o", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())
    with Client(server.url) as client:
        active = client.runs.create(pull=True)
        assert active.id in rock(server, "runs", "end", active.id, "--reward", "0.5")
        assert active.refresh().reward == 0.5
        ids = [info.id for info in client.runs.list()]
    rock(server, "runs", "rm", *ids)
    rock(server, "runs", "rm", "run-unknown", code=1)
    rock(server, "upstream", "rm", "u0", "u1", "u2")
    rock(server, "upstream", "rm", "u0", code=1)
    assert "no runs" in rock(server, "runs", "ls")


def test_a_stop_does_not_wait_for_long_polls(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    with Client(server.url) as client:
        run = client.runs.create(pull=True)
        agent = Agent(run, chat_body("a"))
        assert run.next(wait=30).call is not None
        polling = threading.Thread(target=lambda: run.next(1, wait=300))
        polling.start()
        time.sleep(0.3)
        port = int(server.url.rpartition(":")[2])
        assert server.process is not None
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        assert time.monotonic() - began < 4 * slowness()
        status, _, headers = agent.wait()
        assert status == 503 and headers["x-should-retry"] == "true"
        server.start(port)
        again = Agent(run, chat_body("a"), x_stainless_retry_count="1")
        run.answer(1, text="after the stop")
        assert text_of(again.wait()) == "after the stop" and len(run.calls()) == 1
        run.delete(force=True)
        polling.join(60)


def test_large_requests(server: RunningServer, upstream: FakeUpstream) -> None:
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url)
        run = client.runs.create(upstream="fake")
        address = {"base_url": run.base_url, "api_key": run.api_key}
        threads = [threading.Thread(target=chat, args=(address, chat_body(str(n) * (3 << 20)))) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert run.refresh().counts.done == 4
        status, body, _ = chat(address, chat_body("x" * (33 << 20)))
        assert status == 400 and "over" in body["error"]["message"]
        run.delete(force=True)
        client.upstreams.delete("fake")
