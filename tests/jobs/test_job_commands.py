"""`rock job` and `rock dataset` as a user runs them, and data sets in a folder and in a bucket."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer

from rock.errors import Conflict, InvalidConfig, NotFound
from rock.protocol.jobs import JobTask
from rock.store.datasets import BucketFiles, Datasets, FolderFiles
from rock.store.s3 import Bucket
from rock.sync import Client

TASKS = Path(__file__).parent.parent / "envs" / "harbor"


def rock(server: RunningServer | None, *words: str, code: int = 0, **environment: str) -> str:
    reach = ["--base-url", server.url] if server is not None else []
    done = subprocess.run([sys.executable, "-m", "rock", *reach, *words], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment}, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr + done.stdout


def ids(server: RunningServer) -> list[str]:
    return [row["job_id"] for row in json.loads(rock(server, "job", "ls", "--json"))]


def test_a_job_from_start_to_report(server: RunningServer, tmp_path: Path) -> None:
    out = rock(server, "job", "run", str(TASKS), "--agent", "oracle", "--attempts", "2", "--memory", "256m")
    assert "2 completed, 0 failed" in out and "pass@2 1.000" in out
    (first, *_) = ids(server)
    events = [json.loads(line) for line in rock(server, "job", "run", str(TASKS), "--agent", "nop", "--jsonl",
                                                "--memory", "256m").splitlines()]  # fmt: skip
    assert [event["event"] for event in events] == ["run_started", "job_started", "job_done", "progress", "summary"]
    assert events[-1]["pass_rate"] == 0.0 and events[-1]["passed"] == 0 and events[2]["task_id"] == "greet"
    (second, *_) = ids(server)
    table = rock(server, "job", "show", second)
    assert "greet" in table and "completed" in table
    assert json.loads(rock(server, "job", "show", second, "--format", "rock"))["summary"]["pass_rate"] == 0.0
    assert json.loads(rock(server, "job", "show", second, "--format", "json"))["valid"] == 1
    assert json.loads(rock(server, "job", "show", second, "--task", "greet"))[0]["rewards"] == {"reward": 0.0}
    assert "--out" in rock(server, "job", "show", second, "--format", "harbor", code=1)
    assert len(rock(server, "job", "show", second, "--format", "harbor", "--out", str(tmp_path)).split()) == 3
    found = json.loads(rock(server, "job", "compare", second, first, "--json"))
    assert found["better"] == ["greet"] and found["difference"]["value"] == 1.0
    assert rock(server, "job", "rm", first, second).split() == [first, second]
    assert "no job" in rock(server, "job", "show", first, code=1)


def test_scripts_of_rock_run_for_each_task(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("b.json", "a"):
        (tmp_path / "set" / name).touch()
    path = tmp_path / "job.yaml"
    path.write_text("job_name: each\nenvironment: {memory: 256m}\n"
                    "script: 'echo $TASK $ROCK_TASK_ID $ROCK_DATASET $ROCK_SPLIT $ROCK_JOB_NAME $LEVEL'\n")  # fmt: skip
    rock(server, "job", "run", "--job-config", str(path), "--all", "--dataset", str(tmp_path / "set"), "--split", "dev",
         "--env", "LEVEL=2", "--concurrency", "2")  # fmt: skip
    with Client(server.url) as client:
        (job, *_) = client.jobs.list()
        trials = client.jobs.trials(job.job_id)
        assert [trial.result["output"].split()[:4] for trial in trials] == [
            ["a", "a", "set", "dev"], ["b", "b", "set", "dev"]]  # fmt: skip
        assert trials[0].result["output"].split()[4].startswith("set_a_2") and "rock_run_id" in job.labels
        assert trials[0].result["output"].split()[5] == "2"
        client.jobs.delete(job.job_id)


def test_a_failed_job_and_wrong_arguments(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("job_name: fails\nenvironment: {memory: 256m}\nscript: exit 7\n")
    assert "BashExitCode" in rock(server, "job", "run", str(path), code=1)
    (job, *_) = ids(server)
    assert rock(server, "job", "cancel", job).strip() == job  # a final job stays as it is
    with Client(server.url) as client:
        assert client.jobs.get(job).state.value == "failed"
        client.jobs.delete(job)
    for words, why in (((), "which job"), ((str(tmp_path / "absent"),), "no data set"),
                       ((str(TASKS), "--task", "absent"), "no task 'absent'"),
                       ((str(TASKS), "--agent", "absent"), "no agent 'absent'"),
                       ((str(path), "--all"), "needs a data set"), (("absent.yaml",), "no file")):  # fmt: skip
        assert why in rock(server, "job", "run", *words, code=1)


def test_the_progress_on_a_terminal(server: RunningServer, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "rock", "--base-url", server.url, "job", "run", str(TASKS), "--memory", "256m",
                   "--command", "sleep 1"]  # fmt: skip
        done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, stdin=theirs, timeout=120)
    finally:
        os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0 and "0/1 trials, 0 passed, 0 failed, 1 running" in shown and "reward 0" in shown
    assert "greet-0__1  0s" in shown and shown.count("\x1b[") > 1  # a row of the table, which is drawn again
    with Client(server.url) as client:
        client.jobs.delete(client.jobs.list()[0].job_id)


def test_bad_requests_are_errors_of_the_client(server: RunningServer) -> None:
    with Client(server.url) as client:
        job = client.jobs.create("bad", [JobTask(name="a")]).job_id
        bodies: list[tuple[str, Any]] = [
            ("/v1/jobs", {"name": "x", "tasks": []}), ("/v1/jobs", {"name": "x", "tasks": [{"name": "a\0b"}]}),
            ("/v1/jobs", {"name": "x", "tasks": [{"name": "a"}, {"name": "a"}]}),
            ("/v1/jobs", {"name": "x", "tasks": [{"name": "a"}], "attempts": 100_001}),
            ("/v1/jobs", {"name": "x", "tasks": [{"name": "a", "spec": {"x": "y" * (17 << 20)}}]}),
            (f"/v1/jobs/{job}/claim", {"holder": "a b"}), (f"/v1/jobs/{job}/claim", {"holder": "a", "lease": 0}),
            (f"/v1/jobs/{job}/heartbeat", {"holder": "a", "trials": {"x": 1}}),
            (f"/v1/jobs/{job}/trials/0/finish", {"token": 1, "outcome": "completed"}),
            (f"/v1/jobs/{job}/trials/99999999999999999999/finish", {"token": 1, "outcome": "completed"}),
            (f"/v1/jobs/{job}/trials/1/finish", {"token": 1, "outcome": "failed"}),
            (f"/v1/jobs/{job}/trials/1/finish", {"token": 1, "outcome": "completed", "rewards": {"a": "x"}}),
            (f"/v1/jobs/{job}/trials/1/finish", {"token": 1, "outcome": "completed", "result": {"x": "y" * 300_000}}),
            (f"/v1/jobs/{job}/trials/1/finish", {"token": 0, "outcome": "failed", "rewards": {"a": 1},
             "error": {"kind": "agent", "type": "x"}}),
            (f"/v1/jobs/{job}/trials/1/finish", {"token": 1, "outcome": "completed", "rewards": {"a": 1}}),
        ]  # fmt: skip
        for path, body in bodies:
            with pytest.raises((InvalidConfig, Conflict)):
                client.transport.json("POST", path, body)
        raw = b'{"token": 1, "outcome": "completed", "rewards": {"a": NaN}}'
        with pytest.raises(InvalidConfig):
            client.transport.call("POST", f"/v1/jobs/{job}/trials/1/finish", raw)
        for path in ("/v1/jobs/../x", "/v1/jobs/absent", "/v1/jobs?label=x", "/v1/jobs?limit=0"):
            with pytest.raises((InvalidConfig, NotFound)):
                client.transport.json("GET", path)
        assert client.jobs.delete(job).counts.pending == 1


# ---- data sets


@pytest.fixture(params=["folder", "s3"])
def datasets(request: pytest.FixtureRequest, tmp_path: Path) -> Datasets:
    if request.param == "folder":
        return Datasets(FolderFiles(tmp_path / "root"))
    endpoint = request.getfixturevalue("s3_endpoint")
    return Datasets(BucketFiles(Bucket(endpoint, "rock-test", f"sets-{os.getpid()}-{tmp_path.name}/", key="key",
                                       secret="secret")))  # fmt: skip


def test_a_data_set_is_uploaded_and_downloaded(datasets: Datasets, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "one" / "tests").mkdir(parents=True)
    (source / "one" / "tests" / "test.sh").write_bytes(b"\xff\0")
    (source / "one" / "task.toml").write_text("")
    (source / "two.json").write_text("{}")
    (source / "link").symlink_to("/etc/passwd")
    (source / "one" / "link").symlink_to("/etc")

    async def main() -> None:
        done = await datasets.upload(source, "acme/repairs", "test")
        assert (done.uploaded, done.skipped) == (2, 0)
        assert (await datasets.upload(source, "acme/repairs", "test")).skipped == 2
        assert (await datasets.upload(source, "acme/repairs", "test", overwrite=True)).uploaded == 2
        await datasets.upload(source, "acme/other", "train")
        assert sorted(await datasets.all()) == [("acme/other", "train"), ("acme/repairs", "test")]
        assert (await datasets.show("acme/repairs", "test")).task_ids == ["one", "two"]
        with pytest.raises(NotFound):
            await datasets.show("acme/repairs", "train")
        target = tmp_path / "target"
        assert await datasets.download("acme/repairs", "test", target) == ["one", "two.json"]
        assert (target / "one/tests/test.sh").read_bytes() == b"\xff\0" and not (target / "link").exists()
        with pytest.raises(Conflict, match="not empty"):
            await datasets.download("acme/repairs", "test", target)
        assert await datasets.download("acme/repairs", "test", tmp_path / "part", ["two"]) == ["two.json"]
        for bad in ("acme", "acme/../x", "/x/y", "a/b/c"):
            with pytest.raises(InvalidConfig):
                await datasets.show(bad, "test")

    asyncio.run(main())


def test_data_sets_on_the_command_line(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    assert "1 tasks uploaded" in rock(None, "dataset", "upload", str(TASKS), "acme/greetings", "--root", root)
    listed = json.loads(rock(None, "dataset", "ls", "--root", root, "--json"))
    assert listed == [{"id": "acme/greetings", "split": "test"}]
    assert rock(None, "dataset", "show", "acme/greetings", "--root", root).split() == ["greet"]
    rock(None, "dataset", "download", "acme/greetings", str(tmp_path / "copy"), "--root", root)
    copied = json.loads(rock(None, "dataset", "show", str(tmp_path / "copy"), "--json"))
    assert copied == [{"id": "greet", "kind": "harbor"}]
