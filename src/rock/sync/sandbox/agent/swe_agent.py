# GENERATED from src/rock/sdk/sandbox/agent/swe_agent.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""ROCK's class for SWE-agent."""

from __future__ import annotations

import copy
import json
import os
import shlex
from typing import Any

from pydantic import Field

from rock.sync.sandbox.agent.config import RockAgentConfig, RuntimeEnvConfigType
from rock.sync.sandbox.agent.rock_agent import RockAgent
from rock.sync.sandbox.runtime_env.config import PythonRuntimeEnvConfig

_TASK = """The repository {{working_dir}} has the following problem:

<problem>
{{problem_statement}}
</problem>

Change the code of the repository, and not its tests, so that the problem is solved. Reproduce it first, and check your
change afterwards."""

RUN_SINGLE: dict[str, Any] = {
    "output_dir": "",
    "env": {"repo": {}, "deployment": {"type": "local"}, "name": "local-deployment"},
    "problem_statement": {"type": "text", "text": "", "id": ""},
    "agent": {
        "templates": {
            "system_template": "You solve tasks with a computer.",
            "instance_template": _TASK,
            "next_step_template": "OBSERVATION:\n{{observation}}",
            "next_step_no_output_template": "The command succeeded without output.",
            "max_observation_length": 85_000,
        },
        "tools": {
            "execution_timeout": 1000,
            "env_variables": {"PAGER": "cat", "MANPAGER": "cat", "GIT_PAGER": "cat", "TQDM_DISABLE": "1",
                              "PIP_PROGRESS_BAR": "off"},
            "bundles": [{"path": "tools/registry"}, {"path": "tools/edit_anthropic"},
                        {"path": "tools/review_on_submit_m"}, {"path": "tools/diff_state"}],
            "registry_variables": {"USE_FILEMAP": "true"},
            "enable_bash_tool": True,
            "parse_function": {"type": "function_calling"},
        },
        "history_processors": [{"type": "cache_control", "last_n_messages": 2}],
        "model": {"name": "openai/gpt-4o", "per_instance_cost_limit": 0, "per_instance_call_limit": 100,
                  "total_cost_limit": 0, "temperature": 0.0, "top_p": 1.0, "api_base": "", "api_key": ""},
    },
}  # fmt: skip


class SweAgentConfig(RockAgentConfig):
    """Configuration of SWE-agent. default_run_single_config: its own configuration; output_dir, repo and the id of the
    problem are filled in, and the address and key of the model service where `model` has none."""

    agent_type: str = "swe-agent"
    runtime_env_config: RuntimeEnvConfigType | None = Field(
        default_factory=lambda: PythonRuntimeEnvConfig(version="3.12"), discriminator="type"
    )
    swe_agent_install_cmd: str = (
        "[ -d SWE-agent ] && rm -rf SWE-agent; git clone https://github.com/SWE-agent/SWE-agent.git && cd SWE-agent && "
        "pip install -e ."
    )
    default_run_single_config: dict[str, Any] = Field(default_factory=lambda: copy.deepcopy(RUN_SINGLE))


class SweAgent(RockAgent):
    """SWE-agent on a repository inside: `project_path`."""

    GENERATED_CONFIG_NAME = "generated_config.yaml"
    config_class = SweAgentConfig

    @property
    def config_path(self) -> str:
        """The configuration of SWE-agent, inside."""
        return f"{self.config.agent_installed_dir}/{self.GENERATED_CONFIG_NAME}"

    def install(self, config: str | RockAgentConfig = "rock_agent_config.yaml") -> None:
        """`RockAgent.install`, then SWE-agent and its configuration. ValueError: there is no project_path."""
        super().install(config)
        if not self.config.project_path:
            raise ValueError("SweAgent needs project_path: the repository inside")
        self._install_with(self.config.swe_agent_install_cmd, "SWE-agent installation failed")
        text = json.dumps(self._generated(), indent=2)  # JSON is YAML
        self._sandbox.files.write(self.config_path, text, mode=0o600)

    def _create_agent_run_cmd(self, prompt: str) -> str:
        program = shlex.quote(f"{self._runtime().bin_dir}/sweagent")
        config = shlex.quote(self.config_path)
        return f"{program} run --config {config} --problem_statement.text {shlex.quote(prompt)}"

    def _generated(self) -> dict[str, Any]:
        made: dict[str, Any] = copy.deepcopy(self.config.default_run_single_config)
        project = self.config.project_path.rstrip("/")
        made["output_dir"] = f"{self.config.agent_installed_dir}/{self.config.instance_id}"
        if "repo" in made.get("env", {}):
            if os.path.dirname(project) == "/":
                made["env"]["repo"] |= {"repo_name": os.path.basename(project), "type": "preexisting"}
            else:
                made["env"]["repo"] |= {"path": project, "type": "local"}
        if "problem_statement" in made:
            made["problem_statement"] |= {"text": "", "id": self.config.instance_id}
        model = made.get("agent", {}).get("model")
        if self.model_service is not None and isinstance(model, dict) and not model.get("api_base"):
            environ = self.model_service.environ
            model |= {"api_base": environ.get("OPENAI_BASE_URL", ""), "api_key": environ.get("OPENAI_API_KEY", "")}
        return made
