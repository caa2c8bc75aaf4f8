"""Record and replay over a real server: entries, snapshots, divergence, repetition, limits, commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer

import rock
from rock.errors import Conflict, InvalidConfig, NotFound
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.recordings import RecordedEntry, Start, effective, starts
from rock.sync import Client, Sandbox, SandboxConfig


@pytest.fixture
def box(server: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, record=True) as made:
        yield made
    client = Client(server.url)
    for one in reversed(client.list_snapshots()):
        client.delete_snapshot(one.snapshot_id)


def test_everything_is_recorded_and_replayed(box: Sandbox) -> None:
    box.run("cd /tmp; x=1")
    box.files.write("/tmp/data", "first\n")
    box.create_session(CreateBashSessionRequest(session="work"))
    box.run("y=2; echo more >> /tmp/data; cat /tmp/data", session="work")
    assert list(box.stream("echo one; echo two", session="default"))
    box.execute("touch /tmp/executed; exit 3")
    assert box.files.read_text("/tmp/data") == "first\nmore\n"
    log = box.log()
    routes = [entry.route for entry in log]
    assert routes == ["run", "write_file", "create_session", "run", "run", "execute", "read_file"]
    assert [entry.number for entry in log] == list(range(1, 8)) and all(entry.finished_at for entry in log)
    assert json.loads(b64decode(log[3].response or ""))["output"] == "first\nmore\n"
    again = Sandbox.replay(box.sandbox_id or "")
    try:
        report = again.replayed
        assert report is not None and (report.diverged_at, report.replayed, report.left_out) == (None, 6, [])
        assert again.run("echo $x $PWD $(cat /tmp/data); ls /tmp/executed").output.split() == [
            "1", "/tmp", "first", "more", "/tmp/executed"]
        assert again.run("echo $y", session="work").output.strip() == "2"
        assert len(again.log()) == 6 + 2  # it is recorded too, and can be replayed
    finally:
        again.stop()


def test_a_replay_begins_at_the_newest_snapshot_and_obeys_rollbacks(box: Sandbox) -> None:
    box.run("cd /tmp; n=0")
    box.run("n=$((n+1)); echo $n >> count")
    first = box.checkpoint()
    box.run("n=$((n+1)); echo lost >> count")
    box.rollback(first)
    box.run("n=$((n+1)); echo $n >> count")
    assert box.run("cat count; echo $n").output.split() == ["1", "2", "2"]
    again = Sandbox.replay(box.sandbox_id or "")
    try:
        assert again.replayed is not None and again.replayed.snapshot == first.snapshot_id
        assert (again.replayed.replayed, again.replayed.diverged_at) == (2, None)
        assert again.run("cat count; echo $n").output.split() == ["1", "2", "2"]
        third = Sandbox.replay(again.sandbox_id or "")  # of a sandbox that began at a snapshot
        try:
            assert third.run("cat count; echo $n").output.split() == ["1", "2", "2"]
        finally:
            third.stop()
    finally:
        again.stop()
    Client(box.url).delete_snapshot(first.snapshot_id)
    fresh = Sandbox.replay(box.sandbox_id or "")  # without the snapshot: from the image
    try:
        assert fresh.replayed is not None and (fresh.replayed.snapshot, fresh.replayed.replayed) == (None, 4)
        assert fresh.run("cat /tmp/count; echo $n").output.split() == ["1", "2", "2"]
    finally:
        fresh.stop()


def test_divergence_is_reported(box: Sandbox) -> None:
    box.run("echo same")
    box.run("cat /proc/sys/kernel/random/uuid")
    box.run("echo same")
    again = Sandbox.replay(box.sandbox_id or "")
    again.stop()
    assert again.replayed is not None and (again.replayed.diverged_at, again.replayed.replayed) == (2, 3)


def test_a_client_repeats_its_program(box: Sandbox) -> None:
    def program(sandbox: Sandbox, last: str) -> list[str]:
        sandbox.files.write("/tmp/log", "")
        outputs = [sandbox.run("echo run >> /tmp/log; cat /proc/sys/kernel/random/uuid").output]
        outputs.append(sandbox.files.read_text("/tmp/log"))
        outputs.append(sandbox.run(f"echo {last} >> /tmp/log").output)
        return outputs

    before = program(box, "end")
    again = Sandbox.replay(box.sandbox_id or "", repeat=True)
    try:
        assert again.replayed is not None and again.replayed.diverged_at == 2
        entries = len(again.log())
        assert program(again, "end") == before  # also the output that no execution repeats
        assert len(again.log()) == entries  # nothing was executed
        assert again.run("cat /tmp/log").output.split() == ["run", "end"]  # now it is
    finally:
        again.stop()
    other = Sandbox.replay(box.sandbox_id or "", repeat=True)
    try:
        assert program(other, "other")[:2] == before[:2]
        assert other.run("cat /tmp/log").output.split() == ["run", "end", "other"]
        info = json.loads(subprocess.run(["curl", "-s", f"{other.url}/v1/recordings/{other.sandbox_id}"],
                                         capture_output=True, check=True).stdout)  # fmt: skip
        assert (info["repeats"], info["repeated"], info["diverged_at"]) == (box.sandbox_id, 3, 4)
    finally:
        other.stop()


def test_the_same_idempotency_key_gets_the_recorded_response(box: Sandbox) -> None:
    box.run("echo 0 > /tmp/n")
    target = f"/v1/sandboxes/{box.sandbox_id}/sessions/default/run"
    body = {"command": "echo x >> /tmp/n; wc -l < /tmp/n"}
    first = [box._transport.json("POST", target, body, key="once") for _ in range(2)]
    assert first[0] == first[1] and box.run("wc -l < /tmp/n").output.strip() == "2"
    assert [entry.route for entry in box.log()] == ["run", "run", "run"]


def test_what_is_too_large_or_not_recorded_is_reported(box: Sandbox) -> None:
    box.files.write("/tmp/large", os.urandom(2 << 20))
    box.run("head -c 1000000 /dev/zero | tr '\\0' a")  # a response over the limit
    entry, long = box.log()
    assert entry.request is None and entry.request_bytes == 0 and entry.finished_at
    assert long.response is None and long.response_bytes > 1_000_000
    again = Sandbox.replay(box.sandbox_id or "")
    again.stop()
    report = again.replayed
    assert report is not None and report.diverged_at == 1 and "is larger" in report.left_out[0]


def test_what_is_refused(server: RunningServer) -> None:
    with pytest.raises(InvalidConfig, match="record"):
        SandboxConfig(record=True, auto_delete_seconds=10)
    with Sandbox(IMAGE, memory="256m", cpus=1.0, base_url=server.url) as plain:
        with pytest.raises(NotFound, match="record=True"):
            plain.log()
        with pytest.raises(NotFound, match="record=True"):
            Sandbox.replay(plain.sandbox_id or "")
    with pytest.raises(NotFound):
        Sandbox.replay("there-is-none")


@pytest.mark.long
def test_steps_of_an_environment(server: RunningServer) -> None:
    config = SandboxConfig(image="host", memory="512m", cpus=1.0, record=True)
    env = rock.make("game:GuessTheNumber-v0-easy", config=config, exclusive=True)
    try:
        env.reset(seed=3)
        first = env.step("\\boxed{5}")
        sandbox_id = env.sandbox_id
        box = Sandbox()
        box.sandbox_id = sandbox_id
        log = box.log()
        assert log[0].route == "make_env" and len(log) >= 3, [entry.route for entry in log]
        again = Sandbox.replay(sandbox_id)
        again.stop()
        assert again.replayed is not None and again.replayed.diverged_at is None and again.replayed.replayed >= 3
        assert first is not None
    finally:
        env.close()


def test_a_recording_survives_a_crash_of_the_server(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    box = Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, record=True)
    box.start()
    box.run("echo kept > /tmp/file")
    server.kill()
    server.start()
    box = Sandbox.connect(box.sandbox_id or "", base_url=server.url)
    box.run("cat /tmp/file")
    assert [entry.route for entry in box.log()] == ["run", "run"]
    box.stop()
    rock_ = [sys.executable, "-m", "rock.cli.main", "--base-url", server.url]
    listed = subprocess.run([*rock_, "log", box.sandbox_id or ""], capture_output=True, text=True, check=True).stdout
    assert "cat /tmp/file" in listed and "0: kept" in listed
    replay = [*rock_, "replay", "--json", box.sandbox_id or ""]
    made = json.loads(subprocess.run(replay, capture_output=True, text=True, check=True).stdout)
    assert made["replayed"] == 2 and made["diverged_at"] is None
    assert Sandbox.connect(made["sandbox_id"], base_url=server.url).run("cat /tmp/file").output == "kept\n"
    Client(server.url).stop_sandbox(made["sandbox_id"])


def test_a_store_that_fails_is_a_typed_error_and_a_repetition_succeeds(
    own_server: Callable[..., RunningServer], tmp_path: Path,
) -> None:
    """Before, in the middle and at the end of a recorded request; a command that ran does not run again."""
    plan = tmp_path / "plan"
    plan.write_text("")
    server = own_server(ROCK_FAULTS=str(plan))
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, record=True) as box:
        # A server with several processes knows the process of a sandbox that it created, and does not read the store.
        read = ["store.get"] if os.environ["ROCK_PROCESSES"] == "1" else []
        points = [*read, "store.recorded.begin", "store.recorded.finish"]
        for place, point in enumerate(points):
            path = f"/v1/sandboxes/{box.sandbox_id}/execute"
            body = {"command": ["sh", "-c", f"echo {place} >> /tmp/lines; wc -l < /tmp/lines"], "timeout": 30}
            _replaced(plan, f"{point}=error")
            status, answer = _post(server.url + path, body, f"key-{place}")
            assert (status, answer.get("error", {}).get("code")) == (503, "unavailable"), (point, answer)
            _replaced(plan, "")
            status, answer = _post(server.url + path, body, f"key-{place}")
            assert status == 200 and answer["stdout"].split() == [str(place + 1)], (point, answer)
        assert len(box.log()) == len(points) and all(one.finished_at for one in box.log())


def _post(url: str, body: dict[str, Any], key: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Idempotency-Key": key})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _replaced(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def entry(number: int, route: str, snapshot: str | None = None, memory: str = "session") -> RecordedEntry:
    return RecordedEntry(number=number, at=0, finished_at=1, route=route, status=200, snapshot=snapshot, memory=memory,
                         exact=True)


def test_effective_entries_and_starts() -> None:
    log = [entry(1, "run"), entry(2, "checkpoint_sandbox", "a"), entry(3, "run"),
           entry(4, "checkpoint_sandbox", "b", "files"), entry(5, "run"), entry(6, "rollback_sandbox", "a"),
           entry(7, "run"), entry(8, "rollback_sandbox", "b"), entry(9, "run")]  # fmt: skip
    kept = effective(log)
    assert [one.number for one in kept] == [1, 2, 3, 4, 9]
    assert starts(kept) == [Start(snapshot="a", skip=2, kind="snapshot"), Start()]
    with pytest.raises(ValueError, match="another sandbox"):
        effective([entry(1, "rollback_sandbox", "elsewhere")])
    assert Conflict("x", hint="y").status == 409
