"""Job files of ROCK and of Harbor are accepted as they are; fields without an effect here are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rock.errors import InvalidConfig, Unsupported
from rock.jobs.config import BashJobConfig, HarborJobConfig, JobConfig
from rock.jobs.plan import Plan, plan_of
from rock.jobs.tasks import harbor_task, harbor_tasks, local_tasks, selected
from rock.protocol.jobs import TrialError
from rock.sdk.harbor import HarborTask

TASKS = Path(__file__).parent.parent / "envs" / "harbor"

# Files in the format of ROCK 1.11 and of Harbor 0.25.
ROCK_BASH = """
job_name: my-bash-job
namespace: team
experiment_id: exp-1
labels: {suite: nightly}
timeout: 3600
environment:
  image: python:3.11
  memory: "8g"
  cpus: 2
  startup_timeout: 180
  auto_clear_seconds: 7200
  env: {TASK: demo, LEVEL: 3, DEBUG: true}
  uploads: [["./data", "/root/data"]]
  oss_mirror: {enabled: false}
  proxy: {enabled: false}
  tracking: {enabled: false}
script: |
  echo "hello $TASK"
"""
ROCK_HARBOR = """
experiment_id: exp-2
namespace: team
job_name: harbor-job
jobs_dir: /data/logs/user-defined/jobs
n_attempts: 2
timeout_multiplier: 1.5
debug: false
environment:
  image: python:3.11
  memory: 16g
  cpus: 4
  type: docker
  force_build: false
  delete: true
  env: {OPENAI_API_KEY: x}
orchestrator:
  type: local
  n_concurrent_trials: 2
  quiet: true
  retry: {max_retries: 1, exclude_exceptions: [VerifierTimeout], wait_multiplier: 1, min_wait_sec: 1, max_wait_sec: 60}
verifier: {override_timeout_sec: 120}
metrics: [{type: mean}]
agents:
  - name: oracle
    override_timeout_sec: 100
datasets:
  - path: TASKS
    task_names: ["gr*"]
artifacts: [/logs/artifacts]
"""
HARBOR = """
job_name: plain
n_attempts: 1
n_concurrent_trials: 3
environment: {type: docker, force_build: true, delete: false, env: ["A=1", "B=x=y"]}
agents: [{name: nop}, {name: oracle, model_name: anthropic/claude}]
tasks: [{path: TASKS/greet}]
"""


def loaded(tmp_path: Path, text: str) -> JobConfig:
    path = tmp_path / "job.yaml"
    path.write_text(text.replace("TASKS", str(TASKS)))
    return JobConfig.from_yaml(path)


def test_a_bash_job_of_rock(tmp_path: Path) -> None:
    config = loaded(tmp_path, ROCK_BASH)
    assert isinstance(config, BashJobConfig) and config.text() == 'echo "hello $TASK"\n'
    assert config.environment.env == {"TASK": "demo", "LEVEL": "3", "DEBUG": "true"}
    plan = plan_of(config)
    assert plan.name == "my-bash-job" and plan.timeout == 3600 and plan.uploads == [("./data", "/root/data")]
    assert plan.environment["namespace"] == "team" and plan.environment["auto_clear_seconds"] == 7200
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


def test_a_harbor_job_of_rock(tmp_path: Path) -> None:
    config = loaded(tmp_path, ROCK_HARBOR)
    assert isinstance(config, HarborJobConfig) and config.effective_timeout == 100 * 1.5 + 600
    plan = plan_of(config)
    assert (plan.attempts, plan.concurrency, plan.agent_factor, plan.verifier_timeout) == (2, 2, 1.5, 120)
    assert plan.agents[0].name == "oracle" and plan.artifacts == ["/logs/artifacts"] and plan.memory is None
    assert [task.name for task in harbor_tasks(config)] == ["greet"]
    assert "n_attempts: 2" in config.to_harbor_yaml() and "experiment_id" not in config.to_harbor_yaml()


def test_a_job_of_harbor(tmp_path: Path) -> None:
    config = loaded(tmp_path, HARBOR)
    assert isinstance(config, HarborJobConfig)
    plan = plan_of(config)
    assert plan.keep_sandboxes and plan.force_build and plan.concurrency == 3
    assert plan.environment["env"] == {"A": "1", "B": "x=y"}
    assert [agent.title for agent in plan.agents] == ["nop", "oracle+anthropic/claude"]
    assert loaded(tmp_path, ROCK_BASH.replace("script: |\n  echo", "script: echo")) is not None


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("agents.import_path", {"agents": [{"import_path": "my.module:Agent"}]}),
        ("tasks.git_url", {"tasks": [{"path": "x", "git_url": "https://example.com/x.git"}]}),
        ("datasets.registry", {"datasets": [{"name": "terminal-bench", "version": "2.0"}]}),
        ("datasets.registry", {"datasets": [{"name": "a/b", "registry": {"url": "https://example.com"}}]}),
        ("environment.type: daytona", {"environment": {"type": "daytona"}}),
        ("environment.import_path", {"environment": {"import_path": "x:Y"}}),
        ("environment.mounts_json", {"environment": {"mounts_json": [{"source": "/"}]}}),
        ("environment.oss_mirror.enabled", {"environment": {"oss_mirror": {"enabled": True}}}),
        ("environment.proxy.enabled", {"environment": {"proxy": {"enabled": True}}}),
        ("orchestrator.kwargs", {"orchestrator": {"kwargs": {"x": 1}}}),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=field) as found:
        JobConfig.from_dict({"n_attempts": 1, "tasks": [{"path": "x"}], **change})
    assert found.value.hint


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "scrip: x", "script: [x]", "n_attempts: 0\ntasks: [{path: x}]", "n_attempts: 1", ": :", "a: &a [*a]",
     "script: x\nscript_path: y", "script: x\ntimeout: .nan", "script: x\nenvironment: {memory: lots}",
     "!!python/object/apply:os.system ['touch /tmp/was-here']"],
)  # fmt: skip
def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidConfig):
        loaded(tmp_path, text)
    assert not Path("/tmp/was-here").exists()


def test_retries_follow_the_class_of_the_error(tmp_path: Path) -> None:
    retry = plan_of(loaded(tmp_path, ROCK_HARBOR)).retry
    lost = TrialError(kind="infrastructure", type="Lost")
    assert [retry.delay(lost, tries) for tries in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, None]
    assert retry.delay(TrialError(kind="environment", type="OutOfMemory"), 1) == 1.0
    assert retry.delay(TrialError(kind="environment", type="OutOfMemory"), 2) is None
    assert retry.delay(TrialError(kind="verifier", type="VerifierTimeout"), 1) is None
    assert retry.delay(TrialError(kind="request", type="InvalidConfig"), 1) is None
    assert Plan(name="x").retry.delay(TrialError(kind="agent", type="BashExitCode"), 1) is None


def test_tasks_are_selected_by_name() -> None:
    found = local_tasks(TASKS)
    assert [task.name for task in selected(found, ["greet"], None, None)] == ["greet"]
    assert selected(found, None, ["g*"], None) == []
    with pytest.raises(Exception, match="there is no task 'absent'"):
        selected(found, ["absent"], None, None)


def test_names_of_rock() -> None:
    from rock.sdk import bench, job
    from rock.sdk.envhub import config

    names = """Job JobConfig BashJobConfig HarborJobConfig TrialResult HarborTrialResult JobResult JobStatus JobClient
        TrialClient Operator ScatterOperator AbstractTrial HarborTrial BashTrial register_trial"""
    for name in names.split():
        assert hasattr(job, name), name
    assert bench.AgentConfig(name="oracle").name == "oracle" and bench.HarborJobConfig is HarborJobConfig
    assert config.EnvironmentConfig(image="x").image == "x" and config.ProxyConfig().port == 28080
    assert job.Job(BashJobConfig(script="x"), operator=job.ScatterOperator(3)).plan.attempts == 3


@pytest.mark.parametrize(
    ("toml", "setting"),
    [("[[steps]]\nname = 'one'\n", "steps"), ("[verifier]\nenvironment_mode = 'separate'\n", "environment_mode"),
     ("[verifier.environment]\ndocker_image = 'x'\n", "environment_mode"), ("[[verifier.collect]]\nx = 1\n", "collect"),
     ("[environment]\nnetwork_mode = 'allowlist'\nallowed_hosts = ['a']\n", "environment.network_mode"),
     ("[environment]\nallowed_hosts = ['a']\n", "environment.network_mode"),
     ("[agent]\nnetwork_mode = 'public'\n", "agent.network_mode"), ("[verifier]\nuser = 'x'\n", "verifier.user"),
     ("[verifier]\nallowed_hosts = ['a']\n", "verifier.allowed_hosts"), ("[agent]\nuser = 'x'\n", "agent.user"),
     ("[environment]\nos = 'windows'\n", "environment.os"), ("[environment]\ngpus = 1\n", "environment.gpus"),
     ("[[environment.mcp_servers]]\nname = 'x'\n", "environment.mcp_servers")],
)  # fmt: skip
def test_tasks_with_settings_that_are_not_provided(tmp_path: Path, toml: str, setting: str) -> None:
    """Refused by name when the task is loaded, and when a job is created; nothing starts."""
    folder = tmp_path / "task"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test.sh").write_text("exit 0\n")
    (folder / "instruction.md").write_text("do")
    (folder / "task.toml").write_text(toml)
    for load in (HarborTask.load, harbor_task, local_tasks):
        with pytest.raises(Unsupported, match=setting.replace(".", r"\.")) as refused:
            load(folder)
        assert any(setting in text for text in refused.value.details["settings"])
    (folder / "task.toml").write_text("[environment]\nnetwork_mode = 'no-network'\nos = 'linux'\ngpus = 0\n"
                                      "[verifier]\nenvironment_mode = 'shared'\n")  # fmt: skip
    assert HarborTask.load(folder).name == harbor_task(folder).name == "task"


def test_a_task_of_several_steps_has_no_instruction(tmp_path: Path) -> None:
    (tmp_path / "steps" / "one").mkdir(parents=True)
    (tmp_path / "task.toml").write_text("version = '1.0'\n")
    with pytest.raises(Unsupported, match="one step"):
        HarborTask.load(tmp_path)
