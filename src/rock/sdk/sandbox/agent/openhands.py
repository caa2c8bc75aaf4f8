"""ROCK's class for OpenHands, with its benchmarks package."""

from __future__ import annotations

import json
import shlex
from typing import Any, Literal

from pydantic import Field

from rock.protocol.action import Observation
from rock.sdk.sandbox.agent.base import DefaultAgent
from rock.sdk.sandbox.agent.config import DefaultAgentConfig

DEFAULT_PROMPT = """The repository {{ instance.repo_path }} has this issue:

<issue>
{{ instance.problem_statement }}
</issue>

Change its code, and not its tests, so that the issue is solved. Its base commit is {{ instance.base_commit }}. The
environment is complete: install nothing. Reproduce the issue first, and run the tests that your change affects."""
_LLM: dict[str, Any] = {
    "model": "", "base_url": "", "api_key": "", "num_retries": 100, "retry_multiplier": 8.0, "retry_min_wait": 8,
    "retry_max_wait": 64, "timeout": None, "max_message_chars": 1_000_000, "temperature": 0.3, "top_p": 0.75,
    "top_k": 100, "max_input_tokens": 134_144, "max_output_tokens": 134_144, "stream": False, "caching_prompt": True,
    "native_tool_calling": True,
}  # fmt: skip
_INSTANCE: dict[str, Any] = {
    "instance_id": "", "problem_statement": "", "repo": "", "base_commit": "", "image_name": "", "FAIL_TO_PASS": "",
    "remote_user": "/root", "project_path": "", "script_folder": "/root",
}  # fmt: skip


def _run_single() -> dict[str, Any]:
    return {"instance": dict(_INSTANCE), "llm": dict(_LLM)}


class OpenhandsConfig(DefaultAgentConfig):
    """Configuration of OpenHands. python_install_cmd: creates {agent_workdir}/runtime-env; "" installs nothing.
    agent_prompt: a jinja template, if it differs from the default. max_iteration: calls of the model."""

    agent_type: Literal["openhands"] = "openhands"
    agent_session: str = "openhands-rollout-session"
    agent_workdir: str = "/openhands"
    python_install_cmd: str = "python3 -m venv runtime-env"
    openhands_sdk_install_cmd_list: list[str] = Field(
        default_factory=lambda: [
            "/openhands/runtime-env/bin/pip install openhands-agent-server==1.6.0 openhands-sdk==1.6.0 "
            "openhands-tools==1.6.0 openhands-workspace==1.6.0",
            "rm -rf /openhands/benchmarks",
            "git clone -b features/local_workspace_fix_early_stop https://github.com/shayue-wt/benchmarks.git "
            "/openhands/benchmarks",
            "/openhands/runtime-env/bin/pip install datasets huggingface-hub jinja2 pandas Pillow toml swebench tqdm "
            "'unidiff>=0.7.5,<0.8.0' 'modal>=1.1.4' commit0 pytest-json-report",
        ]
    )
    python_install_timeout: int = 300
    agent_install_timeout: int = 600
    default_run_single_config: dict[str, Any] = Field(default_factory=_run_single)
    agent_prompt: str = DEFAULT_PROMPT
    max_iteration: int = 300


class Openhands(DefaultAgent):
    """OpenHands: `run(problem_statement, project_path, instance_id)`."""

    config: OpenhandsConfig
    agent_prompt_path: str | None = None

    async def install(self, config: DefaultAgentConfig) -> None:
        """`DefaultAgent.install`. CommandFailed: a step has failed."""
        await super().install(config)
        self.agent_prompt_path = f"{self._benchmarks}/benchmarks/swebench/prompts/custom.j2"

    @property
    def _benchmarks(self) -> str:
        return f"{self.config.agent_workdir}/benchmarks"

    async def _install(self) -> None:
        config, files = self.config, self._sandbox.files
        await files.mkdir(config.agent_workdir)
        if config.python_install_cmd:
            line = f"cd {shlex.quote(config.agent_workdir)} && {config.python_install_cmd}"
            await self._step(line, config.python_install_timeout, "Python installation failed")
        if config.openhands_sdk_install_cmd_list:
            line = " && ".join(config.openhands_sdk_install_cmd_list)
            await self._step(line, config.agent_install_timeout, "OpenHands installation failed")
        if config.agent_prompt != DEFAULT_PROMPT:
            await files.write(f"{self._benchmarks}/benchmarks/swebench/prompts/custom.j2", config.agent_prompt)

    async def _step(self, line: str, timeout: float, words: str) -> None:
        command = f"bash -c {shlex.quote(line)}"
        seen = await self._sandbox.arun(command, self.agent_session, timeout, mode="nohup")
        if seen.exit_code != 0:
            raise RuntimeError(f"{words}: {(seen.output or seen.failure_reason)[-500:]}")

    async def run(
        self,
        problem_statement: str,
        project_path: str,
        instance_id: str,
        repo_name: str | None = None,
        base_commit: str = "",
        agent_run_timeout: int = 1800,
        agent_run_check_interval: int = 30,
    ) -> Observation:
        """Run OpenHands on a repository inside, and wait for its end. The model service is started first."""
        config = self.config
        if self.model_service is not None and not self.model_service.is_started:
            await self.model_service.start()
        llm = dict(config.default_run_single_config["llm"])
        if self.model_service is not None and not llm.get("base_url"):
            environ = self.model_service.environ
            llm |= {"base_url": environ.get("OPENAI_BASE_URL", ""), "api_key": environ.get("OPENAI_API_KEY", "")}
        instance = config.default_run_single_config["instance"] | {
            "instance_id": instance_id, "problem_statement": problem_statement, "project_path": project_path,
            "repo_name": repo_name or instance_id.split("-")[0].replace("__", "/"), "base_commit": base_commit,
        }  # fmt: skip
        name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in instance_id) + ".json"
        files = self._sandbox.files
        await files.write(f"{self._benchmarks}/.llm_config.json", json.dumps(llm, indent=4), mode=0o600)
        await files.write(f"{self._benchmarks}/{name}", json.dumps(instance, indent=4, ensure_ascii=False))
        line = (
            f"cd {shlex.quote(self._benchmarks)} && export PYTHONPATH=. && "
            f"{shlex.quote(config.agent_workdir)}/runtime-env/bin/python ./benchmarks/swebench/run_infer.py "
            f".llm_config.json --dataset eval --split test --note rock_rollout --select ./{shlex.quote(name)} "
            f"--max-iterations {config.max_iteration}"
        )
        if config.agent_prompt != DEFAULT_PROMPT:
            line += " --prompt-path benchmarks/swebench/prompts/custom.j2"
        command = f"bash -c {shlex.quote(line)}"
        return await self._agent_run(command, config.agent_session, agent_run_timeout, agent_run_check_interval)
