"""What ROCK's agents have in common: sessions, commands before and after the installation, the model service, and a run
that is waited for."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rock import errors
from rock.protocol.action import (
    BashObservation,
    Check,
    CreateBashSessionRequest,
    CreateBashSessionResponse,
    Observation,
)
from rock.protocol.sandbox import SandboxInfo
from rock.sdk import primitives
from rock.sdk.sandbox.agent.config import AgentBashCommand, DefaultAgentConfig
from rock.sdk.sandbox.deploy import Deploy
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.model_service.base import ModelService, ModelServiceConfig
from rock.sdk.sandbox.processes import Processes
from rock.sdk.sandbox.scripts import run_nohup
from rock.sdk.sandbox.sessions import Sessions
from rock.sdk.transport import Transport


class Host(Protocol):
    """What an agent uses of its `Sandbox`."""

    sandbox_id: str | None
    files: Files
    sessions: Sessions
    processes: Processes
    deploy: Deploy
    runtime_envs: dict[str, Any]
    model_service: ModelService | None
    _transport: Transport

    async def arun(
        self, cmd: str, session: str | None = None, wait_timeout: float | None = 300, *, mode: str = "normal",
        check: Check = "silent",
    ) -> BashObservation: ...  # fmt: skip

    async def create_session(
        self, request: CreateBashSessionRequest | None = None, **fields: Any
    ) -> CreateBashSessionResponse: ...

    async def info(self) -> SandboxInfo: ...


class Agent(ABC):
    """An agent of one sandbox. model_service: from the installation on, if the configuration has one."""

    def __init__(self, sandbox: Host) -> None:
        self._sandbox = sandbox
        self.model_service: ModelService | None = None
        self.agent_session: str | None = None

    @abstractmethod
    async def install(self, config: Any) -> None:
        """Prepare the sandbox."""

    async def _open_session(self, name: str, env: Mapping[str, str]) -> None:
        self.agent_session = name
        await self._sandbox.create_session(CreateBashSessionRequest(session=name, env_enable=True, env=dict(env)))

    async def _run_commands(self, commands: Sequence[AgentBashCommand], step: str) -> None:
        """Run commands one after the other, without a session. RuntimeError: one has failed."""
        for number, command in enumerate(commands, 1):
            line = f"bash -c {shlex.quote(self._sandbox.deploy.format(command.command))}"
            seen = await self._sandbox.arun(line, None, command.timeout_seconds, mode="nohup")
            if seen.exit_code != 0:
                raise RuntimeError(
                    f"[{self._sandbox.sandbox_id}] {step} command {number} failed with exit code {seen.exit_code}: "
                    f"{(seen.output or seen.failure_reason)[:200]}"
                )

    async def _use_model_service(self, config: ModelServiceConfig) -> None:
        """The model service of the sandbox, started; it is created when there is none."""
        shared = self._sandbox.model_service
        self.model_service = shared or ModelService(self._sandbox, config)
        if not self.model_service.is_installed:
            await self.model_service.install()
        await self.model_service.start()
        self._sandbox.model_service = self.model_service

    async def _agent_run(
        self, cmd: str, session: str, wait_timeout: float, wait_interval: float = 30
    ) -> Observation:
        """Run a command in the background with the variables of a session, and wait for its end. exit_code: that of
        the agent; 1 with `failure_reason` after a timeout, which leaves the process running, and after an error.
        wait_interval has no effect: the end is noticed at once."""
        service = self.model_service

        async def started(pid: int) -> None:
            if service is not None and service.is_started:
                await service.watch_agent(pid)

        if service is not None and service.is_started:
            # After the variables of the configuration: these have the credential of the run.
            words = " ".join(f"{name}={shlex.quote(value)}" for name, value in service.environ.items())
            await self._sandbox.arun(f"export {words}", session, 60, check="raise")
        try:
            seen = await run_nohup(self._sandbox, cmd, session, wait_timeout, None, None, False, started)
        except errors.RockError as error:
            text = f"Failed to execute nohup command '{cmd[:200]}': {error}"
            return BashObservation(output=text, exit_code=1, failure_reason=text)
        if seen.exit_code is None:
            seen.exit_code = 1
        return seen

    async def start_model_service(self) -> None:
        """Start the model service. RuntimeError: the configuration has none."""
        if self.model_service is None:
            raise RuntimeError(f"ModelService is not initialized in {type(self).__name__}!")
        await self.model_service.start()


class DefaultAgent(Agent):
    """Base of ROCK's older agents: `_install` is theirs."""

    config: DefaultAgentConfig

    async def install(self, config: DefaultAgentConfig) -> None:
        """Commands before, the session, the agent beside the model service, commands after. RuntimeError."""
        self.config = config
        await self._run_commands(config.pre_init_bash_cmd_list, "pre-init")
        await self._open_session(config.agent_session, config.session_envs)
        calls = [self._install]
        if config.model_service_config is not None:
            service = ModelService(self._sandbox, config.model_service_config)
            self.model_service = service
            calls.append(service.install)
        await raise_first(calls)
        await self._run_commands(config.post_init_bash_cmd_list, "post-init")

    @abstractmethod
    async def _install(self) -> None:
        """Install what the agent needs."""


async def raise_first(calls: Sequence[Any]) -> None:
    """Make calls at the same time, and raise the first error once all have ended."""
    for result in await primitives.gather(calls):
        if isinstance(result, BaseException):
            raise result
