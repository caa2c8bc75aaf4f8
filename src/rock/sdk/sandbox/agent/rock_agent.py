"""ROCK's configurable agent: a YAML file says how it is installed and run."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Any

from rock.protocol.action import Observation
from rock.sdk.sandbox.agent.base import Agent, Host, raise_first
from rock.sdk.sandbox.agent.config import AgentBashCommand, RockAgentConfig, read_yaml
from rock.sdk.sandbox.deploy import Deploy
from rock.sdk.sandbox.runtime_env import RuntimeEnv

__all__ = ["AgentBashCommand", "RockAgent", "RockAgentConfig"]


class RockAgent(Agent):
    """`sandbox.agent`: `await sandbox.agent.install("rock_agent_config.yaml")`, then `await sandbox.agent.run(prompt)`.

    A subclass may replace `install`, `_do_init` and `_create_agent_run_cmd`.
    """

    config_class: type[RockAgentConfig] = RockAgentConfig

    def __init__(self, sandbox: Host) -> None:
        super().__init__(sandbox)
        self.config: Any = None
        self.runtime_env: RuntimeEnv | None = None

    @property
    def deploy(self) -> Deploy:
        return self._sandbox.deploy

    async def install(self, config: str | RockAgentConfig = "rock_agent_config.yaml") -> None:
        """Prepare the sandbox: upload `working_dir`, open the session, run `pre_init_cmds`, install the runtime
        environment beside the model service, run `post_init_cmds`.

        config: the path of a YAML file, or an object. FileNotFoundError, ValueError; InvalidConfig: a field is wrong.
        RuntimeError: a command has failed; CommandFailed: a step of the runtime environment.
        """
        if isinstance(config, str):
            config = self.config_class.model_validate(read_yaml(config))
        self.config = config
        if config.working_dir:
            await self.deploy.deploy_working_dir(config.working_dir)
        await self._open_session(config.agent_session, config.env)
        await self._run_commands(config.pre_init_cmds, "pre-init")
        calls = [self._do_init]
        if config.model_service_config.enabled:
            calls.append(partial(self._use_model_service, config.model_service_config))
        await raise_first(calls)
        await self._run_commands(config.post_init_cmds, "post-init")

    async def run(self, prompt: str) -> Observation:
        """Run the agent, and wait for its end: its output and its true exit status. After `agent_run_timeout` seconds
        exit_code is 1, with a `failure_reason`, and the agent is left running."""
        if self.config is None or self.agent_session is None:
            raise RuntimeError("the agent is not installed: call install() first")
        command = await self._create_agent_run_cmd(prompt)
        return await self._agent_run(
            command, self.agent_session, self.config.agent_run_timeout, self.config.agent_run_check_interval
        )

    async def _do_init(self) -> None:
        """Install the runtime environment, once."""
        if self.config.runtime_env_config is None or (self.runtime_env is not None and self.runtime_env.initialized):
            return
        self.runtime_env = await RuntimeEnv.create(self._sandbox, self.config.runtime_env_config)

    async def _create_agent_run_cmd(self, prompt: str) -> str:
        """The command line of one run."""
        if not self.config.run_cmd:
            raise ValueError("run_cmd is not set: it is the command line that runs the agent")
        values = {"prompt": shlex.quote(prompt)}
        if self.runtime_env is not None:
            values["bin_dir"] = self.runtime_env.bin_dir
        line = self.deploy.format(self.config.run_cmd, **values)
        if self.config.skip_wrap_run_cmd or self.runtime_env is None:
            command = f"bash -c {shlex.quote(line)}"
        else:
            command = self.runtime_env.wrapped_cmd(line)
        path = self.config.project_path
        if path is None and self.config.use_deploy_working_dir_as_fallback:
            path = self.deploy.working_dir
        if path is None:
            return command
        folder = shlex.quote(str(path))
        return f"mkdir -p {folder} && cd {folder} && {command}"

    def _runtime(self) -> RuntimeEnv:
        """The runtime environment. RuntimeError without one."""
        if self.runtime_env is None:
            raise RuntimeError(f"{type(self).__name__} needs a runtime_env_config")
        return self.runtime_env

    async def _install_with(self, command: str, words: str) -> None:
        """Run an installation command in `agent_installed_dir`, with the runtime environment. CommandFailed."""
        folder = shlex.quote(self.config.agent_installed_dir)
        line = f"mkdir -p {folder} && cd {folder} && {command}"
        await self._runtime().run(line, wait_timeout=self.config.agent_install_timeout, error_msg=words)
