"""SWE-bench: logs, grading, reports, and an evaluation of real repositories with honest and dishonest agents."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.agents.layers import layer_or_skip
from tests.conftest import IMAGE, RunningServer

from rock import errors
from rock.jobs import reports, swebench
from rock.jobs.plan import AgentPlan, Plan, Retry
from rock.jobs.swebench import Instance, grade, parse_log, parse_unittest, status_of
from rock.jobs.tasks import local_tasks
from rock.sdk.job import Job
from rock.sync import Client

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "swe_evaluation"
LOG = """
============================= test session starts ==============================
tests/test_a.py::test_plain PASSED                                       [ 10%]
tests/test_a.py::test_skipped SKIPPED (no network)                       [ 20%]
tests/test_a.py::test_word[a b - c] PASSED                               [ 30%]
tests/test_a.py::test_bad FAILED                                         [ 40%]
----------------------------- Captured stdout call -----------------------------
=========================== short test summary info ============================
PASSED tests/test_a.py::test_bad
=================================== FAILURES ===================================
=========================== short test summary info ============================
\x1b[32mPASSED\x1b[0m tests/test_a.py::test_plain
PASSED tests/test_a.py::test_word[a b - c]
PASSED tests/test_a.py::test_cut[first one]
PASSED tests/test_a.py::test_two[x 1]
FAILED tests/test_a.py::test_two[x 2] - assert 1 == 2
SKIPPED [1] tests/test_a.py:7: no network
XFAIL tests/test_a.py::test_expected - a known defect
XPASS tests/test_a.py::test_surprise
FAILED tests/test_a.py::test_bad - AssertionError: x - y
ERROR tests/test_a.py::test_fixture - RuntimeError
=================== 2 failed, 5 passed, 1 skipped in 0.10s =====================
"""


def instance(**fields: Any) -> Instance:
    return Instance.parse({"instance_id": "a__b-1", "FAIL_TO_PASS": [], "PASS_TO_PASS": [], **fields})


def test_the_last_summary_of_a_log_counts() -> None:
    found = parse_log(LOG)
    name = "tests/test_a.py::"
    assert found[name + "test_plain"] == "PASSED" and found[name + "test_skipped"] == "SKIPPED"
    assert found[name + "test_bad"] == "FAILED" and found[name + "test_fixture"] == "ERROR"
    assert found[name + "test_word[a b - c]"] == "PASSED" and found[name + "test_two[x 2]"] == "FAILED"
    assert found[name + "test_expected"] == "XFAIL" and parse_log("") == {} and parse_log("\0\ud800") == {}


def test_grading_follows_swe_bench() -> None:
    name, statuses = "tests/test_a.py::", parse_log(LOG)
    assert status_of(name + "test_cut[first", statuses) == "PASSED"  # cut in the parameter, and unambiguous
    assert status_of(name + "test_two[x", statuses) is None  # one passed, and one failed
    assert status_of(name + "test_pla", statuses) is None  # not a parameter
    tests = [name + "test_expected", name + "test_skipped", name + "test_absent", name + "test_surprise"]
    done = grade(instance(FAIL_TO_PASS=tests, PASS_TO_PASS=json.dumps(tests)), statuses)
    assert done.fail_to_pass == ([tests[0]], tests[1:]) and done.pass_to_pass == (tests[:2], tests[2:])
    assert not done.resolved and set(done.tests_status()) == {
        "FAIL_TO_PASS", "PASS_TO_PASS", "FAIL_TO_FAIL", "PASS_TO_FAIL"}  # fmt: skip
    assert grade(instance(FAIL_TO_PASS=[name + "test_plain"]), statuses).resolved


def test_the_output_of_unittest() -> None:
    log = "test_a (t.A.test_a) ... ok\ntest_b (t.A.test_b) ... FAIL\ntest_c (t.A.test_c) ... skipped 'slow'\n" \
          "test_d (t.A.test_d) ... expected failure\ntest_e (t.A.test_e) ... ERROR\nnoise ... okay\n"  # fmt: skip
    assert list(parse_unittest(log).values()) == ["PASSED", "FAILED", "SKIPPED", "XFAIL", "ERROR"]


@pytest.mark.parametrize(
    "change",
    [{"instance_id": "../x"}, {"instance_id": ".."}, {"FAIL_TO_PASS": "no json"}, {"FAIL_TO_PASS": [1]},
     {"base_commit": "--output=/x"}, {"workdir": "testbed"}, {"parser": "perl"}, {"timeout": "soon"},
     {"timeout": -1}],
)  # fmt: skip
def test_a_wrong_instance_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidConfig):
        instance(**change)


def test_files_of_instances(tmp_path: Path) -> None:
    row = {"instance_id": "a", "FAIL_TO_PASS": "[]", "test_patch": "diff --git a/t/x.py b/t/x.py\n"}
    (tmp_path / "list.json").write_text(json.dumps([row]))
    (tmp_path / "lines.jsonl").write_text(json.dumps(row) + "\n\n")
    for name in ("list.json", "lines.jsonl"):
        (task,) = local_tasks(tmp_path / name)
        assert task.name == "a" and task.spec["kind"] == "swe"
    assert Instance.parse(row).command.endswith("'t/x.py'")
    for bad in ("{", "[1]", "nothing", '[{"x": 1}]'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(errors.InvalidConfig, match=r"bad\.json"):
            local_tasks(tmp_path / "bad.json")


# ---- evaluation of real repositories


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swe")
    subprocess.run([sys.executable, str(EXAMPLE / "projects.py"), str(folder)], check=True, capture_output=True)
    return folder


def evaluated(server: RunningServer, path: Path, agent: str, command: str | None = None,
              only: str | None = None, **fields: Any) -> tuple[Any, list[Any], Any]:
    """(result, trials, job) of an agent on the instances of a data set."""
    plan = Plan(name="swe", kind="swe", agents=[AgentPlan(name=agent, command=command)], concurrency=3,
                environment={"image": IMAGE, "memory": "256m", "cpus": 0.5}, retry=Retry(tries={}), **fields)
    tasks = [task for task in local_tasks(path) if only is None or task.name.startswith(only)]
    result = asyncio.run(Job(plan, tasks=tasks, base_url=server.url).run())
    with Client(server.url) as client:
        return result, client.jobs.trials(result.job_id), client.jobs.get(result.job_id)


def test_the_oracle_resolves_and_nop_does_not(server: RunningServer, data: Path, tmp_path: Path) -> None:
    done, trials, job = evaluated(server, data, "oracle")
    assert done.score == 1.0 and all(trial.result["swe"]["resolved"] for trial in trials)
    skipped = trials[1].result["swe"]["tests_status"]["PASS_TO_PASS"]["success"]
    assert any("test_many" in test for test in skipped) and any("test_open_end" in test for test in skipped)
    *files, (name, report) = reports.swe(job, trials, "org/model")
    assert name == f"org__model.{job.job_id}.json" and report["schema_version"] == 2
    assert report["resolved_instances"] == report["completed_instances"] == report["total_instances"] == 3
    assert report["resolved_ids"] == sorted(trial.task for trial in trials) and report["incomplete_ids"] == []
    path, one = files[0]
    assert path == f"logs/run_evaluation/{job.job_id}/org__model/{trials[0].task}/report.json"
    assert one[trials[0].task]["resolved"] and one[trials[0].task]["patch_successfully_applied"]
    assert {"infra_failure_instances", "ambiguous_failure_instances", "empty_patch_instances", "error_instances",
            "unresolved_instances", "submitted_instances", "failure_reasons"} <= set(report)  # fmt: skip
    done, trials, job = evaluated(server, data, "nop")
    *_, (_, report) = reports.swe(job, trials, "nop")
    assert done.score == 0.0 and report["empty_patch_instances"] == 3 and report["completed_instances"] == 0


FIX = """python3 -c "
text = open('intervals.py').read()
open('intervals.py', 'w').write(text.replace('< merged', '<= merged').replace('in intervals:', 'in sorted(intervals):'))
" """
CHEATS = {
    "tests": "echo 'import unittest' > tests/test_intervals.py",
    "folder": "rm -rf tests; mkdir /tmp/fake; echo > /tmp/fake/test_intervals.py; ln -s /tmp/fake tests",
    "conftest": "printf 'def pytest_runtest_makereport(*a): pass' > conftest.py; echo 'import os' > sitecustomize.py",
    "history": "git log --all --format=%s; git cat-file --batch-all-objects --batch-check; "
               "find / -xdev -name model.patch -o -name test.patch -o -name instances.jsonl 2>/dev/null",
    "hooks": "mkdir -p .git/hooks; printf '#!/bin/sh\\ntouch /tmp/x' > .git/hooks/post-checkout; "
             "chmod +x .git/hooks/*; git config core.fsmonitor 'touch /tmp/x'; git config user.email a@b; "
             "git config user.name a; git commit -qam mine --allow-empty; git tag -f rock-base",
    "no repository": "rm -rf .git",
    "binary": "head -c 300000 /dev/urandom > blob.bin; printf 'caf\\351' > latin.txt; touch 'a b'; "
              "touch \"$(printf 'n\\377')\"",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_an_agent_cannot_change_its_tests(server: RunningServer, data: Path, name: str) -> None:
    """Without a repair nothing is resolved; with it, the changes around it do not matter, unless the repository is
    gone."""
    done, (trial,), _ = evaluated(server, data, "bash", CHEATS[name], "intervals")
    assert done.score == 0.0 and not trial.result["swe"]["resolved"]
    if name == "history":
        subject, *objects = trial.result["output"].splitlines()
        assert subject == "base" and len(objects) == 6  # commit, two trees, three files: nothing of the solution
        assert not any(".patch" in line or "jsonl" in line for line in objects)
    done, (trial,), _ = evaluated(server, data, "bash", f"{FIX}; {CHEATS[name]}", "intervals")
    assert done.score == (0.0 if name == "no repository" else 1.0), trial


def test_tests_that_hang_are_a_timeout_without_a_reward(server: RunningServer, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "instances.jsonl").read_text().splitlines()]
    for row in rows:
        row.update(timeout=2, repository=str(data / row["repository"]))
    path = tmp_path / "instances.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hang = "sed -i '1i while True: pass' ledger.py"
    done, (trial,), job = evaluated(server, path, "bash", hang, "ledger")
    assert done.score is None and trial.error.type == "VerifierTimeout" and trial.rewards is None
    *_, (_, report) = reports.swe(job, [trial], "x")
    assert report["ambiguous_failure_ids"] == report["error_ids"] == [trial.task] and report["resolved_instances"] == 0
    assert report["failure_reasons"] == {trial.task: "VerifierTimeout"}


def test_a_patch_that_does_not_apply_is_a_zero(server: RunningServer, data: Path, tmp_path: Path) -> None:
    row = json.loads((data / "instances.jsonl").read_text().splitlines()[0])
    absent = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-no\n+yes\n"
    row.update(patch=absent, repository=str(data / row["repository"]))
    path = tmp_path / "instances.json"
    path.write_text(json.dumps([row]))
    done, (trial,), _ = evaluated(server, path, "oracle")
    assert done.score == 0.0 and not trial.result["swe"]["applied"]
    assert trial.result["swe"]["log"].startswith(swebench.APPLY_FAILED)
    row.update(patch="diff --git a/../../tmp/out b/../../tmp/out\nnew file mode 100644\n--- /dev/null\n"
               "+++ b/../../tmp/out\n@@ -0,0 +1 @@\n+x\n")  # fmt: skip
    path.write_text(json.dumps([row]))
    assert evaluated(server, path, "oracle")[0].score == 0.0
    row.update(patch=row["patch"], test_patch="nonsense")
    path.write_text(json.dumps([{**row, "patch": "diff --git a/n b/n\nnew file mode 100644\n--- /dev/null\n+++ b/n\n"
                                 "@@ -0,0 +1 @@\n+x\n"}]))  # fmt: skip
    done, (trial,), _ = evaluated(server, path, "oracle")
    assert done.score is None and "test patch" in trial.error.message  # the data set is wrong, not the agent


def example(server: RunningServer, *options: str) -> str:
    """The output of the example."""
    done = subprocess.run([sys.executable, "-W", "error", str(EXAMPLE / "evaluate.py"), *options], capture_output=True,
                          text=True, timeout=400, env={**os.environ, "ROCK_BASE_URL": server.url})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example(server: RunningServer) -> None:
    found = example(server, "--agent", "none")
    for line in ("oracle: 3 of 3 resolved", "nop: 0 of 3 resolved", "bash: 1 of 3 resolved"):
        assert line in found


@pytest.mark.timeout(500)
def test_the_example_with_mini_swe_agent(env_server: RunningServer, env_images: Path) -> None:
    """The real agent in sandboxes without a network, with the scripted model of the example behind the gateway."""
    layer_or_skip("mini-swe-agent", env_images, fast=True)
    found = example(env_server)
    assert "mini-swe-agent: 2 of 3 resolved" in found and "oracle: 3 of 3 resolved" in found, found
    assert "the scripted model answered 12 calls" in found  # of four commands for each instance
    assert "mini-swe-agent: 2400 input tokens, 240 output tokens" in found
    with Client(env_server.url) as client:
        assert not [one for one in client.upstreams.list() if one.name == "scripted-model"]
        runs = client.runs.list()
    assert sorted(run.reward for run in runs if run.source == "upstream") == [0.0, 1.0, 1.0]
