"""ROCK's class for iflow-cli. Its package is no longer in the npm registry: `iflow_cli_install_cmd` may install it from
elsewhere."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from pydantic import Field

from rock.sdk.sandbox.agent.config import RockAgentConfig, RuntimeEnvConfigType
from rock.sdk.sandbox.agent.rock_agent import RockAgent
from rock.sdk.sandbox.runtime_env.config import NodeRuntimeEnvConfig

_INFO = re.compile(r"<Execution Info>\s*(.*?)\s*</Execution Info>", re.DOTALL)
_TAIL = 1 << 20  # bytes of the log in which the last session is looked for


def _settings() -> dict[str, Any]:
    return {"selectedAuthType": "openai-compatible", "apiKey": "", "baseUrl": "", "modelName": "",
            "disableAutoUpdate": True, "shellTimeout": 360_000, "tokensLimit": 128_000}  # fmt: skip


class IFlowCliConfig(RockAgentConfig):
    """Configuration of iflow-cli. iflow_settings: its settings.json; apiKey and baseUrl are those of the model service
    where they are empty. iflow_log_file: its output, which has the session to continue."""

    agent_type: str = "iflow-cli"
    runtime_env_config: RuntimeEnvConfigType | None = Field(
        default_factory=NodeRuntimeEnvConfig, discriminator="type"
    )
    env: dict[str, str] = Field(default_factory=lambda: {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"})
    iflow_cli_install_cmd: str = "npm i -g @iflow-ai/iflow-cli@latest"
    iflow_settings: dict[str, Any] = Field(default_factory=_settings)
    iflow_log_file: str = "~/.iflow/session_info.log"


class IFlowCli(RockAgent):
    """iflow-cli: each run continues the session of the one before."""

    config_class = IFlowCliConfig

    async def install(self, config: str | RockAgentConfig = "rock_agent_config.yaml") -> None:
        """`RockAgent.install`, then iflow-cli and its settings."""
        await super().install(config)
        await self._install_with(self.config.iflow_cli_install_cmd, "iflow-cli installation failed")
        found = dict(self.config.iflow_settings)
        if self.model_service is not None and not found.get("baseUrl"):
            environ = self.model_service.environ
            found |= {"baseUrl": environ.get("OPENAI_BASE_URL", ""), "apiKey": environ.get("OPENAI_API_KEY", "")}
        made = await self._sandbox.arun("mkdir -p ~/.iflow && echo ~/.iflow", self.agent_session, 60, check="raise")
        home = made.output.strip().splitlines()[-1]
        await self._sandbox.files.write(f"{home}/settings.json", json.dumps(found, indent=2), mode=0o600)

    async def _create_agent_run_cmd(self, prompt: str) -> str:
        session = await self._last_session()
        log = self.config.iflow_log_file  # not quoted: it may begin with ~
        line = f'iflow -r "{session}" -p {shlex.quote(prompt)} --yolo > {log} 2>&1'
        if self.config.project_path:
            folder = shlex.quote(self.config.project_path)
            line = f"mkdir -p {folder} && cd {folder} && {line}"
        return self._runtime().wrapped_cmd(line)

    async def _last_session(self) -> str:
        """The session of the last run; "" for none. The log is written inside: only an id is taken from it."""
        command = f"tail -c {_TAIL} {self.config.iflow_log_file} 2>/dev/null || :"
        seen = await self._sandbox.arun(command, self.agent_session, 60)
        found = _INFO.findall(seen.output)
        try:
            session = json.loads(found[-1]).get("session-id", "") if found else ""
        except (ValueError, AttributeError):
            return ""
        return session if isinstance(session, str) and re.fullmatch(r"[\w.:-]{1,200}", session) else ""
