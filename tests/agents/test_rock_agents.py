"""ROCK's agents in sandboxes without a network: the phases of RockAgent and its YAML, and the classes of agents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rock.errors import CommandFailed, InvalidConfig
from rock.sync import Sandbox
from rock.sync.sandbox.agent import (
    AgentBashCommand,
    IFlowCli,
    IFlowCliConfig,
    Openhands,
    OpenhandsConfig,
    RockAgentConfig,
    SweAgent,
    SweAgentConfig,
)
from tests.conftest import RunningServer

YAML = """
agent_type: default
version: default
agent_session: my-agent
agent_installed_dir: /tmp/installed
project_path: /tmp/project
working_dir: {folder}
env:
  OPENAI_API_KEY: xx
  GREETING: "hello there"
pre_init_cmds:
  - command: echo pre-1 $(cat ${{working_dir}}/greeting) >> /tmp/order; test ! -e /tmp/tool
    timeout_seconds: 20
  - command: "echo pre-2 >> /tmp/order"
post_init_cmds:
  - command: echo post >> /tmp/order; test -e /tmp/tool
run_cmd: >-
  tool ${{prompt}} && echo bin ${{bin_dir}} && echo <<working_dir>> $GREETING && pwd && exit 7
agent_run_timeout: 60
agent_run_check_interval: 10
runtime_env_config:
  type: node
  custom_install_cmd: echo install >> /tmp/order; touch /tmp/tool
"""
NODE = (
    "mkdir -p runtime-env/bin && printf '#!/bin/sh\\necho v22.18.0\\n' > runtime-env/bin/node && "
    "printf '#!/bin/sh\\necho tool \"$@\"\\n' > runtime-env/bin/tool && "
    "cp runtime-env/bin/node runtime-env/bin/npm && chmod +x runtime-env/bin/*"
)
PYTHON = "mkdir -p runtime-env/bin && ln -s $(command -v python3) runtime-env/bin/python && " \
         "printf '#!/bin/sh\\necho sweagent \"$@\"; echo $OPENAI_BASE_URL\\n' > runtime-env/bin/sweagent && " \
         "chmod +x runtime-env/bin/sweagent"  # fmt: skip


@pytest.fixture(autouse=True)
def installers(monkeypatch: pytest.MonkeyPatch, server: RunningServer) -> None:
    """Runtime environments that need no network, by ROCK's own variables."""
    monkeypatch.setenv("ROCK_RTENV_NODE_V22180_INSTALL_CMD", NODE)
    for name in ("V31114", "V31212"):
        monkeypatch.setenv(f"ROCK_RTENV_PYTHON_{name}_INSTALL_CMD", PYTHON)


def written(sandbox: Sandbox, path: str) -> Any:
    return json.loads(sandbox.files.read(path))


def test_the_phases_of_a_yaml(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "greeting").write_text("salve")
    config = tmp_path / "rock_agent_config.yaml"
    config.write_text(YAML.format(folder=tmp_path / "work"))
    sandbox.agent.install(str(config))
    assert sandbox.exec("cat /tmp/order").stdout.split() == ["pre-1", "salve", "pre-2", "install", "post"]
    seen = sandbox.agent.run("it's a $HOME \"prompt\"")
    runtime, deployed = sandbox.agent.runtime_env, sandbox.deploy.working_dir
    assert runtime is not None and seen.output.splitlines() == [
        "tool it's a $HOME \"prompt\"", f"bin {runtime.bin_dir}", f"{deployed} hello there", "/tmp/project",
    ], seen.output  # fmt: skip
    assert seen.exit_code == 7  # ROCK loses it
    assert sandbox.agent.config.agent_session == "my-agent" and sandbox.model_service is None


def test_a_run_without_a_runtime_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    sandbox.agent.install(
        RockAgentConfig(run_cmd="pwd; echo ${prompt}", runtime_env_config=None, working_dir=str(tmp_path / "f"))
    )
    seen = sandbox.agent.run("x y")
    assert seen.output.splitlines() == [sandbox.deploy.working_dir, "x y"] and seen.exit_code == 0


def test_a_run_that_takes_too_long(sandbox: Sandbox) -> None:
    sandbox.agent.install(
        RockAgentConfig(run_cmd="echo begun; sleep 30", runtime_env_config=None, agent_run_timeout=2,
                        agent_run_check_interval=1)
    )  # fmt: skip
    seen = sandbox.agent.run("p")
    assert seen.exit_code == 1 and seen.output == "begun\n" and "did not complete within" in seen.failure_reason


def test_failures_of_an_installation(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = RockAgentConfig(pre_init_cmds=[AgentBashCommand(command="echo why; exit 3")], runtime_env_config=None)
    with pytest.raises(RuntimeError, match=r"pre-init command 1 failed with exit code 3: why"):
        sandbox.agent.install(failing)
    monkeypatch.setenv("ROCK_RTENV_PYTHON_V31114_INSTALL_CMD", "echo broken; exit 4")
    with pytest.raises(CommandFailed):
        sandbox.agent.install(RockAgentConfig())
    with pytest.raises(RuntimeError, match="not installed"):
        Sandbox("host").agent.run("p")
    with pytest.raises(FileNotFoundError, match="Agent config file not found"):
        sandbox.agent.install(str(tmp_path / "none.yaml"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Unsupported config file format: \.json"):
        sandbox.agent.install(str(tmp_path / "config.json"))
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="no mapping"):
        sandbox.agent.install(str(tmp_path / "config.yaml"))


def test_the_rules_of_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="must be less than agent_run_timeout"):
        RockAgentConfig(agent_run_timeout=30, agent_run_check_interval=30)
    with pytest.raises(InvalidConfig, match="working_dir does not exist"):
        RockAgentConfig(working_dir=str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match="working_dir is not a directory"):
        RockAgentConfig(working_dir=str(tmp_path / "file"))
    assert RockAgentConfig().model_dump()["agent_installed_dir"] == "/tmp/installed_agent"
    assert RockAgentConfig.model_validate({"runtime_env_config": {"type": "node"}}).runtime_env_config is not None


@pytest.mark.parametrize(("project", "repo"), [
    ("/testbed", {"repo_name": "testbed", "type": "preexisting"}),
    ("/home/x/project", {"path": "/home/x/project", "type": "local"}),
])  # fmt: skip
def test_swe_agent(sandbox: Sandbox, project: str, repo: dict[str, str]) -> None:
    agent = SweAgent(sandbox)
    agent.install(SweAgentConfig(swe_agent_install_cmd="pwd > where", project_path=project, instance_id="i-1",
                                 agent_run_timeout=60))  # fmt: skip
    folder = "/tmp/installed_agent"
    assert sandbox.exec(f"cat {folder}/where").stdout.strip() == folder
    made = written(sandbox, f"{folder}/generated_config.yaml")
    assert made["output_dir"] == f"{folder}/i-1" and made["env"]["repo"] == repo
    assert made["problem_statement"] == {"type": "text", "text": "", "id": "i-1"}
    seen = agent.run("fix it's bug")
    assert seen.output.splitlines()[0] == (
        f"sweagent run --config {folder}/generated_config.yaml --problem_statement.text fix it's bug"
    )


def test_iflow_cli(sandbox: Sandbox) -> None:
    install = (
        "printf '%s\\n' '#!/bin/sh' 'pwd; echo \"$@\"; echo \"<Execution Info>{\\\"session-id\\\": \\\"s-$$\\\"}"
        "</Execution Info>\"' > /usr/local/bin/iflow && chmod +x /usr/local/bin/iflow"
    )
    agent = IFlowCli(sandbox)
    agent.install(IFlowCliConfig(iflow_cli_install_cmd=install, project_path="/tmp/p", agent_run_timeout=60,
                                 iflow_settings={"modelName": "m"}))  # fmt: skip
    home = sandbox.run("echo ~").output.strip()
    assert written(sandbox, f"{home}/.iflow/settings.json") == {"modelName": "m"}
    log = f"{home}/.iflow/session_info.log"
    assert agent.run("one").exit_code == 0
    first = sandbox.files.read(log).decode()
    assert first.startswith("/tmp/p\n-r  -p one --yolo\n")
    session = first.partition('"session-id": "')[2].partition('"')[0]
    assert agent.run("two").exit_code == 0
    assert f"-r {session} -p two --yolo" in sandbox.files.read(log).decode()
    sandbox.files.write(log, '<Execution Info>{"session-id": "$(touch /tmp/evil)"}</Execution Info>')
    assert agent.run("three").exit_code == 0
    assert "-r  -p three" in sandbox.files.read(log).decode()
    assert sandbox.exec("ls /tmp/evil").exit_code != 0


def test_openhands(sandbox: Sandbox) -> None:
    infer = "import sys, os; print(os.getcwd(), sys.argv[1:], os.environ.get('PYTHONPATH'))"
    config = OpenhandsConfig(
        agent_workdir="/tmp/openhands", agent_prompt="do {{ instance.repo_path }}",
        python_install_cmd="mkdir -p runtime-env/bin && ln -s $(command -v python3) runtime-env/bin/python",
        openhands_sdk_install_cmd_list=[
            "mkdir -p /tmp/openhands/benchmarks/benchmarks/swebench/prompts",
            f'echo "{infer}" > /tmp/openhands/benchmarks/benchmarks/swebench/run_infer.py',
        ],
    )  # fmt: skip
    agent = Openhands(sandbox)
    agent.install(config)
    seen = agent.run("it fails", "/testbed", "org__repo-12", base_commit="abc", agent_run_timeout=60)
    assert seen.exit_code == 0, seen.output
    assert seen.output.startswith("/tmp/openhands/benchmarks ['.llm_config.json', '--dataset', 'eval'")
    assert "'./org__repo-12.json', '--max-iterations', '300', '--prompt-path'" in seen.output
    instance = written(sandbox, "/tmp/openhands/benchmarks/org__repo-12.json")
    assert (instance["repo_name"], instance["base_commit"], instance["project_path"]) == ("org/repo", "abc", "/testbed")
    assert written(sandbox, "/tmp/openhands/benchmarks/.llm_config.json")["num_retries"] == 100
