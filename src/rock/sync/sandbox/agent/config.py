# GENERATED from src/rock/sdk/sandbox/agent/config.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Configurations of ROCK's agents."""

from __future__ import annotations

import os
from typing import Self

from pydantic import Field, model_validator

from rock import errors
from rock.protocol.wire import Wire
from rock.sync.sandbox.model_service.base import ModelServiceConfig
from rock.sync.sandbox.runtime_env.config import NodeRuntimeEnvConfig, PythonRuntimeEnvConfig

RuntimeEnvConfigType = NodeRuntimeEnvConfig | PythonRuntimeEnvConfig


class AgentConfig(Wire):
    """agent_type, version: for people."""

    agent_type: str
    version: str


class AgentBashCommand(Wire):
    """A command line for bash. timeout_seconds: after which the installation fails."""

    command: str
    timeout_seconds: int = Field(default=300, gt=0)


class DefaultAgentConfig(AgentConfig):
    """Configuration of the older agent classes."""

    agent_type: str = "default"
    version: str = "default"
    agent_session: str = "default-agent-session"
    pre_init_bash_cmd_list: list[AgentBashCommand] = Field(default_factory=list)
    post_init_bash_cmd_list: list[AgentBashCommand] = Field(default_factory=list)
    session_envs: dict[str, str] = Field(default_factory=dict)
    model_service_config: ModelServiceConfig | None = None


class RockAgentConfig(AgentConfig):
    """The fields of ROCK's agent YAML.

    project_path: working directory of the agent; without it, the deployed `working_dir` if
    `use_deploy_working_dir_as_fallback` is set. working_dir: a local folder that is uploaded.
    agent_session: the session whose variables the agent has. env: its variables.
    pre_init_cmds, post_init_cmds: before and after the installation of the runtime environment and the model service.
    agent_install_timeout, agent_run_timeout, agent_run_check_interval: seconds; the last one is accepted for
    compatibility and must be below agent_run_timeout: the end of the agent is noticed at once.
    run_cmd: command line with ${prompt} (quoted), ${working_dir} and ${bin_dir}. skip_wrap_run_cmd: do not put the
    runtime environment on its PATH. runtime_env_config: None for no runtime environment.
    """

    agent_type: str = "default"
    agent_name: str = Field(default_factory=lambda: os.urandom(16).hex())
    version: str = "default"
    agent_installed_dir: str = "/tmp/installed_agent"
    instance_id: str = Field(default_factory=lambda: f"instance-id-{os.urandom(16).hex()}")
    project_path: str | None = None
    use_deploy_working_dir_as_fallback: bool = True
    agent_session: str = Field(default_factory=lambda: f"agent-session-{os.urandom(16).hex()}")
    env: dict[str, str] = Field(default_factory=dict)
    pre_init_cmds: list[AgentBashCommand] = Field(default_factory=list)
    post_init_cmds: list[AgentBashCommand] = Field(default_factory=list)
    agent_install_timeout: int = Field(default=600, gt=0)
    agent_run_timeout: int = Field(default=1800, gt=0)
    agent_run_check_interval: int = Field(default=30, gt=0)
    working_dir: str | None = None
    run_cmd: str | None = None
    skip_wrap_run_cmd: bool = False
    runtime_env_config: RuntimeEnvConfigType | None = Field(
        default_factory=PythonRuntimeEnvConfig, discriminator="type"
    )
    model_service_config: ModelServiceConfig = Field(default_factory=ModelServiceConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.agent_run_check_interval >= self.agent_run_timeout:
            raise ValueError(
                f"agent_run_check_interval ({self.agent_run_check_interval}) must be less than agent_run_timeout "
                f"({self.agent_run_timeout})"
            )
        if self.working_dir is not None:
            folder = os.path.abspath(self.working_dir)
            if not os.path.exists(folder):
                raise ValueError(f"working_dir does not exist: {folder}")
            if not os.path.isdir(folder):
                raise ValueError(f"working_dir is not a directory: {folder}")
        return self


def read_yaml(path: str) -> dict[str, object]:
    """The mapping in a YAML file. FileNotFoundError; ValueError: another suffix, or not a mapping. Unsupported: the
    package for YAML is missing."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"Agent config file not found: {path}")
    suffix = os.path.splitext(path)[1]
    if suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"Unsupported config file format: {suffix}. Only .yaml is supported.")
    try:
        import yaml
    except ImportError:
        raise errors.Unsupported(
            "reading YAML needs a package that is not installed",
            hint="pip install 'rock-sandbox[rock-conf]', or pass a RockAgentConfig",
        ) from None
    with open(path, encoding="utf-8") as file:
        try:
            document = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no mapping")
    return document
