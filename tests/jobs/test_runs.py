"""Jobs against a real server: rewards, errors without a reward, retries, cancellation, hooks, and hostile results."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer

from rock import errors
from rock.jobs import reports
from rock.jobs.config import BashJobConfig, HarborJobConfig
from rock.jobs.plan import AgentPlan, Plan, Retry
from rock.jobs.tasks import bash_task, harbor_task
from rock.sdk.job import HarborTrial, Job, ScatterOperator, register_trial
from rock.sdk.sandbox.sandbox import Sandbox
from rock.sync import Client
from rock.sync import Sandbox as BlockingSandbox
from rock.sync.job import Job as BlockingJob
from rock.testing import FakeServer

GREET = Path(__file__).parent.parent / "envs" / "harbor" / "greet"
BOX = {"image": IMAGE, "memory": "256m", "cpus": 0.5}


def bash(server: RunningServer, script: str, **fields: Any) -> BashJobConfig:
    return BashJobConfig(environment={**BOX, "base_url": server.url}, script=script, **fields)


def greet(tmp_path: Path, test: str | None = None, solution: str | None = None, name: str = "task") -> Path:
    """The task of the data set tests with other scripts."""
    folder = tmp_path / name
    shutil.copytree(GREET, folder)
    if test is not None:
        (folder / "tests/test.sh").write_text(f"#!/bin/bash\nmkdir -p /logs/verifier\n{test}\n")
    if solution is not None:
        (folder / "solution/solve.sh").write_text(f"#!/bin/bash\n{solution}\n")
    return folder


def harbor(server: RunningServer, *folders: Path, agent: str = "oracle", **fields: Any) -> Job:
    command = fields.pop("command", None)
    plan = Plan(name="job", environment={"memory": "256m", "cpus": 0.5}, retry=Retry(first=0.05),
                agents=[AgentPlan(name=agent, command=command)], **fields)  # fmt: skip
    return Job(plan, tasks=[harbor_task(folder) for folder in folders], base_url=server.url)


def run(job: Job) -> Any:
    return asyncio.run(job.run())


def test_a_script_and_its_reward(server: RunningServer) -> None:
    job = bash(server, "echo out; echo err >&2; echo 0.5 > /tmp/reward", reward_file="/tmp/reward", attempts=2)
    done = run(Job(job, ScatterOperator(2), concurrency=4))
    assert done.status == "completed" and done.score == 0.5 and len(done.trial_results) == 4
    assert done.trial_results[3].raw_output == "out\nerr\n" and done.trial_results[3].exit_code == 0
    assert done.summary["pass_at_k"]["1"]["value"] == 0.0 and done.summary["valid"] == 4
    plain = run(Job(bash(server, "echo done")))
    assert plain.status == "completed" and plain.score is None and plain.summary["invalid"] == 1


def test_a_script_that_fails_or_takes_too_long(server: RunningServer) -> None:
    failed = run(Job(bash(server, "echo why; exit 3", reward_file="/tmp/x")))
    (trial,) = failed.trial_results
    assert (failed.status, trial.exit_code, trial.score) == ("failed", 3, None)
    assert trial.exception_info["exception_type"] == "BashExitCode" and "why" in trial.raw_output
    late = run(Job(bash(server, "echo begun; sleep 100", timeout=1)))
    assert late.trial_results[0].exception_info["exception_type"] == "ProcessTimeout"
    assert "begun" in late.trial_results[0].raw_output


def test_the_oracle_passes_and_nop_fails(server: RunningServer, tmp_path: Path) -> None:
    assert run(harbor(server, GREET)).score == 1.0
    nothing = run(harbor(server, GREET, agent="nop"))
    assert nothing.score == 0.0 and nothing.status == "completed"
    agents = [{"name": "nop"}, {"name": "oracle"}]
    both = HarborJobConfig(environment={**BOX, "base_url": server.url}, agents=agents, tasks=[{"path": str(GREET)}])
    done = run(Job(both, folder=tmp_path))
    assert {one.task_name: one.score for one in done.trial_results} == {"0-nop/greet": 0.0, "1-oracle/greet": 1.0}
    assert len(list(tmp_path.rglob("test-stdout.txt"))) == 2


def test_an_agent_cannot_see_tests_and_solution(server: RunningServer) -> None:
    spy = 'ls /tests /solution; find / -name solve.sh -not -path "/proc/*" 2>/dev/null; cat $ROCK_INSTRUCTION_FILE; ' \
          'mkdir -p /tests /logs/verifier /tmp/app; echo "echo 1 > /logs/verifier/reward.txt" > /tests/test.sh; ' \
          'echo 1 > /logs/verifier/reward.json; echo "hello, world" > /tmp/app/greeting.txt'  # fmt: skip
    (trial,) = run(harbor(server, GREET, agent="bash", command=spy)).trial_results
    assert "/tests" in trial.raw_output and "solve.sh" not in trial.raw_output and "greeting.txt" in trial.raw_output
    assert trial.score == 1.0
    forged = spy.replace("hello, world", "nothing")
    assert run(harbor(server, GREET, agent="bash", command=forged)).score == 0.0


def test_an_agent_that_takes_too_long_is_judged(server: RunningServer) -> None:
    plan = Plan(name="late", environment={"memory": "256m"}, agents=[AgentPlan(
        name="bash", command='mkdir -p /tmp/app; echo "hello, world" > /tmp/app/greeting.txt; sleep 100', timeout=2)])
    (trial,) = run(Job(plan, tasks=[harbor_task(GREET)], base_url=server.url)).trial_results
    assert trial.score == 1.0 and trial.result["agent"]["timed_out"]


HOSTILE = {
    "nan": ("echo nan > /logs/verifier/reward.txt", "not finite"),
    "infinite": ("echo '{\"reward\": 1e999}' > /logs/verifier/reward.json", "not finite"),
    "text": ("echo good > /logs/verifier/reward.txt", "could not convert"),
    "none": ("true", "wrote no reward"),
    "large": ("head -c 5000000 /dev/zero | tr '\\0' 1 > /logs/verifier/reward.txt", "65536 bytes"),
    "endless": ("ln -s /dev/zero /logs/verifier/reward.txt", "is a symlink"),
    "link": ("ln -s /etc/passwd /logs/verifier/reward.json", "is a symlink"),
    "pipe": ("mkfifo /logs/verifier/reward.txt", "is a fifo"),
    "folder": ("mkdir /logs/verifier/reward.txt", "is a directory"),
    "bytes": ("printf '\\377\\376' > /logs/verifier/reward.txt", "utf-8"),
    "nested": ("head -c 60000 /dev/zero | tr '\\0' '[' > /logs/verifier/reward.json", "nested too deeply|Expecting"),
    "boolean": ("echo '{\"reward\": true}' > /logs/verifier/reward.json", "not a number"),
    "list": ("echo '[1]' > /logs/verifier/reward.json", "not an object"),
    "many": ("python3 -c 'print({str(i): 1 for i in range(101)})' | tr \"'\" '\"' > /logs/verifier/reward.json",
             "more than 100"),
    "huge number": ("python3 -c 'print(\"{\\\"reward\\\": 1\" + \"0\" * 400 + \"}\")' > /logs/verifier/reward.json",
                    "too large|not finite"),
}  # fmt: skip


def test_a_hostile_reward_is_none(server: RunningServer, tmp_path: Path) -> None:
    folders = [greet(tmp_path, test, name=name.replace(" ", "-")) for name, (test, _) in HOSTILE.items()]
    done = run(harbor(server, *folders, agent="nop", concurrency=4))
    assert done.status == "failed" and done.score is None and done.summary["invalid"] == len(HOSTILE)
    for trial, (name, (_, why)) in zip(done.trial_results, HOSTILE.items(), strict=True):
        assert trial.rewards is None and trial.exception_info["exception_type"] == "NoReward", name
        assert re.search(why, trial.exception_info["exception_message"]), (name, trial)


def test_hostile_output_fits_into_the_result(server: RunningServer, tmp_path: Path) -> None:
    rewards = """echo '{"a": 0.5, "b": 1}' > /logs/verifier/reward.json"""
    noise = f"head -c 3000000 /dev/urandom; printf '\\033[2J\\377'; {rewards}"
    job = harbor(server, greet(tmp_path, noise, solution="head -c 3000000 /dev/urandom"), artifacts=["/tmp", "/absent"])
    job._folder = tmp_path / "out"
    (trial,) = run(job).trial_results
    assert trial.score == 0.75 and trial.rewards == {"a": 0.5, "b": 1.0}
    assert len(json.dumps(trial.result)) < 300_000
    found = trial.result["artifacts"]
    assert found[0]["destination"] == "1.tar" and found[1]["destination"] is None and "error" in found[1]
    logs = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 5 << 20 for path in logs) and any(path.name == "1.tar" for path in logs)


def test_tests_that_hang_are_a_timeout(server: RunningServer, tmp_path: Path) -> None:
    folder = greet(tmp_path, "echo 1 > /logs/verifier/reward.txt; sleep 100")
    done = run(Job(Plan(name="hang", environment={"memory": "256m"}, verifier_timeout=1.5), tasks=[harbor_task(folder)],
                   base_url=server.url))  # fmt: skip
    (trial,) = done.trial_results
    assert trial.score is None and trial.exception_info["exception_type"] == "VerifierTimeout"
    with Client(server.url) as client:
        assert client.jobs.trials(done.job_id)[0].tries == 1  # not retried


def test_a_lost_sandbox_is_retried_and_never_zero(server: RunningServer, tmp_path: Path) -> None:
    """The sandbox of the first try is stopped from outside; the second try gets the reward."""
    solution = "sleep 2; mkdir -p /tmp/app; echo hello, world > /tmp/app/greeting.txt"
    job = harbor(server, greet(tmp_path, solution=solution))
    stopped: list[str] = []

    def event(found: dict[str, Any]) -> None:
        if found["event"] == "job_started" and not stopped:
            stopped.append(found["sandbox_id"])
            threading.Thread(target=stop, args=(server.url, found["sandbox_id"])).start()

    job.on_event = event
    done = run(job)
    assert done.score == 1.0 and done.status == "completed"
    with Client(server.url) as client:
        (trial,) = client.jobs.trials(done.job_id)
    assert trial.tries == 2 and trial.history[0].kind == "infrastructure"


def stop(url: str, sandbox_id: str) -> None:
    with Client(url) as client:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if client.get_sandbox(sandbox_id).state.value == "running":
                    client.stop_sandbox(sandbox_id)
                    return
            except errors.NotFound:
                pass
            time.sleep(0.05)


def test_errors_of_the_infrastructure_end_without_a_reward(server: RunningServer, tmp_path: Path) -> None:
    folder = greet(tmp_path)
    text = (folder / "task.toml").read_text().replace('"python:3.11"', '"localhost/absent:1"')
    (folder / "task.toml").write_text(text)
    done = run(harbor(server, folder))
    (trial,) = done.trial_results
    assert done.status == "failed" and trial.score is None and done.summary["mean_reward"] is None
    assert trial.exception_info is not None


def test_a_job_is_cancelled(server: RunningServer) -> None:
    async def main() -> None:
        job = Job(bash(server, "sleep 100", attempts=4, concurrency=2), lease=3)
        await job.submit()
        (first, *_) = job._job_client.trials
        assert first.sandbox is not None and first.pid
        began = time.monotonic()
        await job.cancel()
        done = await job.wait(30)
        assert done.status == "cancelled" and time.monotonic() - began < 10
        assert {trial.status for trial in done.trial_results} == {"cancelled"}
        assert all(trial.score is None for trial in done.trial_results)

    asyncio.run(main())
    with Client(server.url) as client:
        assert client.list_sandboxes(states="pending,running", label="rock_job_id") == []


def test_a_changed_task_is_not_run(server: RunningServer, tmp_path: Path) -> None:
    folder = greet(tmp_path)
    job = harbor(server, folder)
    asyncio.run(job.create())
    (folder / "tests/test.sh").write_text("echo 1 > /logs/verifier/reward.txt")
    (trial,) = run(job).trial_results
    assert "has changed" in trial.exception_info["exception_message"] and trial.score is None


def test_the_interface_of_rock(server: RunningServer) -> None:
    """What ROLL uses: hooks of a subclass, and the sandbox and the process of a submitted trial."""
    seen: list[str] = []

    class Hooked(HarborTrial):
        async def on_sandbox_ready(self, sandbox: Sandbox) -> None:
            seen.append(str(sandbox.sandbox_id))
            await sandbox.fs.write("/tmp/app/greeting.txt", "hello, world\n")

    config = HarborJobConfig(environment={**BOX, "base_url": server.url}, agents=[{
        "name": "bash", "kwargs": {"command": "sleep 2"}}], tasks=[{"path": str(GREET)}])

    async def main() -> None:
        register_trial(HarborJobConfig, Hooked)
        try:
            job = Job(config, operator=ScatterOperator(1))
            await job.submit()
            client = job._job_client.trials[0]
            assert isinstance(client.trial, Hooked) and client.trial.config is config and client.pid
            assert (await client.sandbox.execute("echo inside")).stdout == "inside\n"
            done = await job.wait()
        finally:
            register_trial(HarborJobConfig, HarborTrial)
        assert done.score == 1.0 and seen == [f"job-{job.job_id}-1-0"]

    asyncio.run(main())


def test_the_blocking_job(server: RunningServer) -> None:
    done = BlockingJob(bash(server, "echo $((1 + 1))", attempts=3, concurrency=3)).run()
    assert done.status == "completed" and [one.raw_output for one in done.trial_results] == ["2\n"] * 3


def test_reports_of_a_job(server: RunningServer, tmp_path: Path) -> None:
    done = run(harbor(server, GREET, greet(tmp_path, "true", name="broken"), attempts=2))
    with Client(server.url) as client:
        detail, trials = client.jobs.get(done.job_id), client.jobs.trials(done.job_id)
    files = reports.write(tmp_path / "report", reports.harbor(detail, trials))
    assert len(files) == 6
    one = json.loads((tmp_path / "report/greet-0__1/result.json").read_text())
    assert one["verifier_result"] == {"rewards": {"reward": 1.0}} and one["reward_valid"] and not one["exception_info"]
    assert set(one) == {
        "id", "task_name", "trial_name", "trial_uri", "task_id", "source", "task_checksum", "config", "agent_info",
        "agent_result", "verifier_result", "exception_info", "started_at", "finished_at", "environment_setup",
        "agent_setup", "agent_execution", "verifier", "step_results", "failure_cause", "reward_valid"}  # fmt: skip
    bad = json.loads((tmp_path / "report/broken-1__2/result.json").read_text())
    assert bad["verifier_result"] is None and not bad["reward_valid"] and bad["failure_cause"] == "verifier"
    assert bad["exception_info"]["exception_type"] == "NoReward"
    total = json.loads((tmp_path / "report/result.json").read_text())
    (stats,) = total["stats"]["evals"].values()
    assert total["n_total_trials"] == 4 and stats["n_errors"] == 2 and stats["metrics"] == [{"mean": 1.0}]
    assert stats["pass_at_k"] == {"1": 1.0, "2": 1.0} and len(stats["exception_stats"]["NoReward"]) == 2
    found = reports.rock(detail, trials)
    assert found["score"] == 1.0 and found["summary"]["pass_rate"] == 1.0 and found["summary"]["failed"] == 2
    assert [one["score"] for one in found["trial_results"]] == [1.0, None, 1.0, None]


def test_names_of_tasks_are_never_paths(server: RunningServer, tmp_path: Path) -> None:
    agents = [AgentPlan(name="bash", command="true")]
    plan = Plan(name="../../escape", kind="bash", environment=dict(BOX), agents=agents)
    job = Job(plan, tasks=[bash_task("../../../etc/x", "echo hi", {}), bash_task("..", "echo ho", {})],
              base_url=server.url, folder=tmp_path / "out")  # fmt: skip
    run(job)
    assert {path.parent.name for path in tmp_path.rglob("output.txt")} == {"etc-x-0__1", "task-1__1"}
    assert all((tmp_path / "out") in path.parents for path in tmp_path.rglob("output.txt"))


def test_an_unknown_agent_is_refused_before_the_start(server: RunningServer) -> None:
    with pytest.raises(errors.InvalidConfig, match="no agent 'absent'"):
        run(harbor(server, GREET, agent="absent"))
    with pytest.raises(errors.InvalidConfig, match="has no command"):
        run(harbor(server, GREET, agent="bash"))
    with Client(server.url) as client:
        assert all(job.name != "absent" for job in client.jobs.list())


def test_a_program_that_ends_before_its_input_is_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Each program of a trial has an empty input. The programs of the fake runtime end before it is written."""
    with FakeServer() as fake:
        with BlockingSandbox("python:3.11", base_url=fake.url) as sandbox:
            for text in ("", "x"):
                sandbox.processes.start(["/bin/sh", "-c", "true"], stdin=text).wait(20)
        gc.collect()
    assert "never retrieved" not in caplog.text
