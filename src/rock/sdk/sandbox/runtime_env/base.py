"""`RuntimeEnv`: the programs of a language in a folder of a sandbox, and commands with them first on the PATH."""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, Self

from rock import settings
from rock.protocol.action import BashObservation, CreateBashSessionRequest
from rock.protocol.sandbox import SandboxInfo
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.processes import Processes, raise_if_failed
from rock.sdk.sandbox.runtime_env.config import RuntimeEnvConfig
from rock.sdk.sandbox.sessions import Sessions


class Host(Protocol):
    """What a RuntimeEnv uses of its `Sandbox`."""

    sandbox_id: str | None
    files: Files
    sessions: Sessions
    processes: Processes
    runtime_envs: dict[str, Any]

    async def arun(
        self, cmd: str, session: str | None = None, wait_timeout: float | None = 300, *, mode: str = "normal"
    ) -> BashObservation: ...

    async def info(self) -> SandboxInfo: ...


class RuntimeEnv(ABC):
    """`await RuntimeEnv.create(sandbox, PythonRuntimeEnvConfig(...))`, then `run`.

    workdir: its folder inside. bin_dir: its programs. runtime_env_id: its key in `sandbox.runtime_envs`.
    """

    runtime_env_type: ClassVar[str] = ""
    _kinds: ClassVar[dict[str, type[RuntimeEnv]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        RuntimeEnv._kinds[cls.runtime_env_type] = cls

    def __init__(self, sandbox: Host, runtime_env_config: RuntimeEnvConfig) -> None:
        self.config = runtime_env_config
        self.runtime_env_id = os.urandom(4).hex()
        self.workdir = f"/tmp/rock-runtime-envs/{self.config.type}/{self.config.version}/{self.runtime_env_id}"
        self.initialized = False
        self._sandbox = sandbox
        self._session: str | None = None

    @classmethod
    async def create(cls, sandbox: Host, runtime_env_config: RuntimeEnvConfig) -> RuntimeEnv:
        """Install what a config asks for. ValueError: no such type. Unsupported: it cannot be had here.
        CommandFailed: a step of the installation failed, whose observation it has."""
        kind = cls._kinds.get(runtime_env_config.type)
        if kind is None:
            raise ValueError(f"Unsupported runtime type: {runtime_env_config.type}")
        made = kind(sandbox, runtime_env_config)
        await made.init()
        return made

    @property
    def bin_dir(self) -> str:
        """Where its programs are."""
        return f"{self.workdir}/runtime-env/bin"

    async def init(self) -> Self:
        """Install it. Nothing happens when it is there."""
        if self.initialized:
            return self
        await self._sandbox.files.mkdir(self.workdir)
        given = settings.runtime_env_install(self.config.type, self.config.version)
        if given:
            await self._step(f"cd {shlex.quote(self.workdir)} && {given}", "the installation failed")
        else:
            await self._install()
        await self._set_up()
        if self.config.custom_install_cmd:
            command = f"cd {shlex.quote(self.workdir)} && {self.config.custom_install_cmd}"
            await self._step(command, "custom_install_cmd failed")
        await self._link()
        self.initialized = True
        self._sandbox.runtime_envs[self.runtime_env_id] = self
        return self

    async def run(
        self,
        cmd: str,
        mode: str | None = None,
        wait_timeout: float | None = 600,
        error_msg: str = "runtime env command failed",
    ) -> BashObservation:
        """Run a command line with these programs first on the PATH, and what `config.env` has in the environment; in
        the background unless `mode` is "normal". CommandFailed, CommandTimeout: the status is not 0, or unknown."""
        wrapped = self.wrapped_cmd(cmd)
        seen = await self._sandbox.arun(wrapped, await self._open(), wait_timeout, mode=mode or "nohup")
        raise_if_failed(cmd, seen, seen.output, error_msg, self._sandbox.sandbox_id)
        return seen

    def wrapped_cmd(self, cmd: str, prepend: bool = True) -> str:
        """A command line that has these programs on its PATH: first, or last without `prepend`."""
        folder = shlex.quote(self.bin_dir)
        path = f"{folder}:$PATH" if prepend else f"$PATH:{folder}"
        return f"bash -c {shlex.quote(f'export PATH={path} && {cmd}')}"

    @abstractmethod
    async def _install(self) -> None:
        """Put the programs into `bin_dir`."""

    @abstractmethod
    async def _set_up(self) -> None:
        """What follows the installation, whoever did that."""

    async def _step(self, command: str, words: str) -> BashObservation:
        return await self.run(command, None, self.config.install_timeout, words)

    async def _open(self) -> str:
        if self._session is None:
            name = f"runtime-env-{self.config.type}-{self.config.version}-{self.runtime_env_id}"
            await self._sandbox.sessions.open(
                CreateBashSessionRequest(session=name, env_enable=True, env=self.config.env)
            )
            self._session = name
        return self._session

    async def _link(self) -> None:
        folder = self.config.extra_symlink_dir
        if not folder or not self.config.extra_symlink_executables:
            return
        for name in self.config.extra_symlink_executables:
            # Not a link: a Python that is called by one does not find its packages.
            text = f'#!/bin/sh\nexec {shlex.quote(f"{self.bin_dir}/{name}")} "$@"\n'
            await self._sandbox.files.write(f"{folder}/{name}", text, mode=0o755)

    async def _has_network(self) -> bool:
        return (await self._sandbox.info()).network != "none"
