"""kill -9 of the runner and of the server while a job runs: nothing is lost, and no completed trial is repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer

from rock.errors import RockError
from rock.protocol.jobs import ClaimTrials, JobTask, TrialInfo, TrialState
from rock.sync import Client, Sandbox

# Each trial prints when its script began: a repeated script would print another time. Odd trials take long.
SCRIPT = 'date +%s%N; case $TASK in *[13579]) sleep SECONDS;; esac; echo "0.$RANDOM" > /tmp/reward; date +%s%N'


def job_file(folder: Path, seconds: float = 6) -> Path:
    path = folder / "job.json.yaml"  # JSON is YAML
    path.write_text(json.dumps({
        "job_name": "crash", "script": SCRIPT.replace("SECONDS", str(seconds)), "reward_file": "/tmp/reward",
        "environment": {"image": IMAGE, "memory": "128m", "cpus": 0.5},
    }))  # fmt: skip
    return path


class RunnerProcess:
    """`rock job ...` in a process of its own. It is killed at the end of a test."""

    def __init__(self, server: RunningServer, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rock", "--base-url", server.url, "job", *words, "--jsonl"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            env={**os.environ, "ROCK_HOME": str(server.home)},
        )  # fmt: skip

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def events(self, timeout: float = 120) -> list[dict[str, Any]]:
        """All events, at its end."""
        out, err = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, err + out
        return [json.loads(line) for line in out.splitlines()]


def wait_for(client: Client, condition: Callable[[list[TrialInfo]], bool], seconds: float = 60) -> tuple[str, Any]:
    """The only job, once its trials meet a condition."""
    end = time.monotonic() + seconds
    trials: list[TrialInfo] = []
    while time.monotonic() < end:
        for job in client.jobs.list():
            if job.name == "crash":
                trials = client.jobs.trials(job.job_id)
                if condition(trials):
                    return job.job_id, trials
        time.sleep(0.1)
    raise AssertionError(f"the trials did not come to that: {trials}")


def partly_done(trials: list[TrialInfo]) -> bool:
    done = sum(trial.state is TrialState.COMPLETED for trial in trials)
    return done >= 2 and sum(trial.state is TrialState.RUNNING for trial in trials) >= 2


def begun(server: RunningServer, job_id: str, seconds: float = 60) -> set[int]:
    """Numbers of the running trials whose long program runs; at least one."""
    end = time.monotonic() + seconds
    found: set[int] = set()
    with Client(server.url) as client:
        while not found and time.monotonic() < end:
            for trial in client.jobs.trials(job_id):
                if trial.state is not TrialState.RUNNING or trial.task[-1] in "02468":
                    continue
                try:
                    sandbox = Sandbox.connect(f"job-{job_id}-{trial.number}-0", base_url=server.url)
                    names = [process.info.command[-1] for process in sandbox.processes.list() if process.info.running]
                except (RockError, IndexError):
                    continue
                if {"rock-job:script", "rock-job:agent"} & set(names):
                    found.add(trial.number)
            time.sleep(0.05)
    assert found, "no program has begun"
    return found


def began(trial: TrialInfo) -> int:
    return int(trial.result["output"].split()[0])


def test_another_runner_replaces_a_killed_one(server: RunningServer, tmp_path: Path) -> None:
    runner = RunnerProcess(server, "run", str(job_file(tmp_path)), "--tasks", "t0,t1,t2,t3,t4,t5", "--concurrency", "3")
    with Client(server.url) as client:
        try:
            job_id, _ = wait_for(client, partly_done)
            programs = begun(server, job_id)
        finally:
            runner.kill()
        killed = time.time_ns()
        before = {trial.number: trial for trial in client.jobs.trials(job_id)}
        running = [number for number, trial in before.items() if trial.state is TrialState.RUNNING]
        assert running
        events = RunnerProcess(server, "resume", job_id, "--take-over").events()
        after = {trial.number: trial for trial in client.jobs.trials(job_id)}
        try:
            assert all(trial.state is TrialState.COMPLETED for trial in after.values())
            assert {trial.task for trial in after.values()} == {f"t{number}" for number in range(6)}
            for number, trial in before.items():
                if trial.state is TrialState.COMPLETED:
                    assert after[number] == trial  # not repeated
            for number in programs:
                assert after[number].result["reattached"] and after[number].token == 2 and after[number].tries == 1
                assert began(after[number]) < killed  # the same process
            started = [event["index"] for event in events if event["event"] == "job_started"]
            assert set(started) == {number for number, trial in before.items() if not trial.state.is_final}
            assert next(event for event in events if event["event"] == "run_started")["resumed"]
            assert events[-1]["event"] == "summary" and events[-1]["status"] == "completed"
        finally:
            client.jobs.delete(job_id)


GREET = Path(__file__).parent.parent / "envs" / "harbor" / "greet"
AGENT = 'mkdir -p /tmp/app; echo begun >> /tmp/starts; sleep 5; wc -l < /tmp/starts; ' \
        'echo "hello, world" > /tmp/app/greeting.txt'  # fmt: skip


def test_an_agent_goes_on_when_its_runner_was_killed(server: RunningServer) -> None:
    runner = RunnerProcess(server, "run", str(GREET), "--name", "crash", "--memory", "256m", "--command", AGENT)
    with Client(server.url) as client:
        try:
            job_id, _ = wait_for(client, lambda trials: trials[0].state is TrialState.RUNNING)
            assert begun(server, job_id) == {1}
        finally:
            runner.kill()
        RunnerProcess(server, "resume", job_id, "--take-over").events()
        (trial,) = client.jobs.trials(job_id)
        assert trial.rewards == {"reward": 1.0} and trial.tries == 1 and trial.token == 2
        assert trial.result["reattached"] and trial.result["output"] == "1\n"  # the agent ran once
        client.jobs.delete(job_id)


def test_a_server_that_is_killed_loses_nothing(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = own_server(ROCK_POOL_SIZE="0")
    port = int(server.url.rpartition(":")[2])
    runner = RunnerProcess(server, "run", str(job_file(tmp_path, 8)), "--tasks", "t0,t1,t2,t3,t4", "--concurrency", "2")
    try:
        with Client(server.url) as client:
            job_id, _ = wait_for(client, lambda trials: sum(one.state is TrialState.COMPLETED for one in trials) >= 1
                                 and sum(bool(one.state is TrialState.RUNNING) for one in trials) >= 1)  # fmt: skip
            programs = begun(server, job_id)
            before = {trial.number: trial for trial in client.jobs.trials(job_id)}
        server.kill()
        killed = time.time_ns()
        time.sleep(1.0)
        server.start(port)
        events = runner.events()
        with Client(server.url) as client:
            after = {trial.number: trial for trial in client.jobs.trials(job_id)}
    except BaseException:
        runner.kill()
        raise
    assert events[-1]["status"] == "completed" and len(after) == 5
    for number, trial in before.items():
        if trial.state is TrialState.COMPLETED:
            assert after[number] == trial
        elif number in programs:
            assert after[number].tries == 1 and began(after[number]) < killed  # the same process, over the restart
    assert all(trial.tries == 1 and trial.state is TrialState.COMPLETED for trial in after.values())


def test_a_detached_job_goes_on(server: RunningServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rock", "--base-url", server.url, "job", "run", str(job_file(tmp_path, 1)), "--tasks",
         "t0,t1", "--detach"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "ROCK_HOME": str(tmp_path)})  # fmt: skip
    job_id = done.stdout.strip()
    with Client(server.url) as client:
        found, trials = wait_for(client, lambda trials: all(trial.state.is_final for trial in trials))
        assert found == job_id and [trial.state.value for trial in trials] == ["completed"] * 2, done.stderr
        log = tmp_path / "jobs" / f"{job_id}.log"
        assert log.stat().st_mode & 0o777 == 0o600
        end = time.monotonic() + 30
        while '"summary"' not in log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        assert '"summary"' in log.read_text()
        client.jobs.delete(job_id)


def test_a_runner_without_its_lease_stores_nothing(server: RunningServer) -> None:
    """Two runners believe to have one trial: the server accepts the result of the later one."""
    from rock.errors import Conflict
    from rock.protocol.jobs import FinishTrial

    with Client(server.url) as client:
        job = client.jobs.create("fenced", [JobTask(name="a")])
        old = client.jobs.claim(job.job_id, ClaimTrials(holder="old")).items[0]
        new = client.jobs.claim(job.job_id, ClaimTrials(holder="new", take_over=True)).items[0]
        with pytest.raises(Conflict, match="another runner"):
            client.jobs.finish(job.job_id, 1, FinishTrial(token=old.token, outcome="completed", rewards={"reward": 1}))
        client.jobs.finish(job.job_id, 1, FinishTrial(token=new.token, outcome="completed", rewards={"reward": 0}))
        assert client.jobs.get(job.job_id).mean_reward == 0.0
        client.jobs.delete(job.job_id)
