"""Sandboxes for evaluations of Inspect: the sandbox provider "rock".

    Task(..., sandbox="rock")
    Task(..., sandbox=SandboxEnvironmentSpec("rock", RockSandboxConfig(image="python:3.11", memory="2g")))

An entry point of the distribution registers it; Inspect imports this module when it looks for the name.
"""

from __future__ import annotations

import asyncio
import json
import logging
import posixpath
import tomllib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxConnection,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rock import errors
from rock.protocol.sandbox import State
from rock.protocol.wire import explain
from rock.sdk.sandbox import Sandbox

LABELS = {"rock.integration": "inspect_ai"}  # of all sandboxes of this provider
NOT_FOUND = 127  # exit code of a program that does not exist, as of a shell
_PREPARE = 60.0  # seconds
_ENDED = (errors.SandboxError, errors.ServerError, errors.EnvHubError, errors.Unauthorized, errors.Forbidden)

log = logging.getLogger(__name__)


class RockSandboxConfig(BaseModel):
    """Options of the sandbox of a sample; the names and units are those of `rock.Sandbox`.

    user: user of programs and files; None is the user of the image. working_dir: default working directory, made when
    it does not exist; None is the working directory of the image. idle_timeout: seconds without a request after which
    the sandbox stops, so it must exceed the longest response of the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = "python:3.11"
    user: str | None = None
    working_dir: str | None = Field(default=None, pattern="^/")
    memory: str | int | None = None
    cpus: float | None = None
    limit_cpus: float | None = None
    pids: int | None = None
    disk: str | int | None = None
    network: Literal["none", "nat", "bridge", "host"] | None = None
    egress: tuple[str, ...] | None = None
    runtime: str | None = None
    minimum_isolation: str | None = None
    pull: Literal["missing", "always", "never"] | None = None
    snapshot: str | None = None
    idle_timeout: int = 3600
    max_lifetime: float | None = None
    startup_timeout: float = 600.0

    def options(self) -> dict[str, Any]:
        """Keywords of `Sandbox`; a field that is not set has the default of the SDK."""
        found = self.model_dump(exclude_none=True, exclude={"user", "working_dir"})
        if "egress" in found:
            found["egress"] = list(found["egress"])
        return found


def read_config(given: object) -> RockSandboxConfig:
    """The configuration of a task: None, a RockSandboxConfig, or the name of a YAML, TOML or JSON file.

    InvalidConfig, Unsupported."""
    if given is None:
        return RockSandboxConfig()
    if isinstance(given, RockSandboxConfig):
        return given
    if not isinstance(given, str):
        raise errors.Unsupported(f"the sandbox provider rock cannot use a {type(given).__name__}",
                                 hint="use RockSandboxConfig, or the name of a YAML, TOML or JSON file")
    return _validated(_document(Path(given)), given)


def _document(path: Path) -> Any:
    import yaml  # a dependency of Inspect

    parse = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in parse:
        raise errors.InvalidConfig(f"{path}: the sandbox provider rock cannot read this kind of file",
                                   hint=f"the name ends in {', '.join(parse)}")
    try:
        return parse[path.suffix](path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise errors.InvalidConfig(f"cannot read {path}: {error}", hint="correct the file") from error


def _validated(fields: Any, source: str) -> RockSandboxConfig:
    try:
        return RockSandboxConfig.model_validate({} if fields is None else fields)
    except ValidationError as error:
        raise errors.InvalidConfig(f"the options in {source} are invalid: {explain(error, RockSandboxConfig)}",
                                   hint=f"the fields are {', '.join(RockSandboxConfig.model_fields)}") from error


@sandboxenv(name="rock")
class RockSandboxEnvironment(SandboxEnvironment):  # type: ignore[misc]
    """One sandbox, for one sample. sandbox: the ROCK sandbox. directory: the default working directory."""

    def __init__(self, sandbox: Sandbox, directory: str, user: str | None) -> None:
        super().__init__()
        self.sandbox = sandbox
        self.directory = directory
        self._user = user

    # ---- programs

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> Any:
        """Run a program. A timeout kills its process tree and is final: `timeout_retry` is for engines that lose
        commands, and a second execution would repeat the effects of the first. `concurrency` concerns local processes.
        """
        limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        try:
            done = await self.sandbox.exec(
                cmd, timeout=timeout, stdin=input, cwd=self._path(cwd or ""), env=env, user=user or self._user,
                max_output_bytes=limit,
            )  # fmt: skip
        except errors.PermissionDenied as error:
            raise PermissionError(str(error)) from error
        except errors.NotFound as error:
            await self._check_running(error)
            return ExecResult(False, NOT_FOUND, "", f"{error}\n")
        except _ENDED as error:
            raise SandboxUnavailableError(str(error)) from error
        if done.timed_out:
            raise TimeoutError(f"{cmd[:1]} took longer than {timeout} s; its process tree was killed")
        for text, dropped in ((done.stdout, done.stdout_dropped), (done.stderr, done.stderr_dropped)):
            if dropped:
                raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, text)
        if done.exit_code is None:
            raise SandboxUnavailableError(f"the exit code of {cmd[:1]} is unknown: {done.failure_reason}")
        return ExecResult(done.exit_code == 0, done.exit_code, done.stdout, done.stderr)

    # ---- files

    async def write_file(self, file: str, contents: str | bytes) -> None:
        path = self._path(file)
        try:
            await self.sandbox.files.write(path, contents, user=self._user)
        except errors.RockError as error:
            raise await self._file_error(error, file, path) from error

    async def read_file(self, file: str, text: bool = True) -> Any:
        path, limit = self._path(file), SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        try:
            data = await self.sandbox.files.read(path, length=limit + 1, user=self._user)
        except errors.RockError as error:
            raise await self._file_error(error, file, path) from error
        if len(data) > limit:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return data.decode() if text else data

    def _path(self, name: str) -> str:
        return posixpath.join(self.directory, name) if name else self.directory

    async def _file_error(self, error: errors.RockError, name: str, path: str) -> Exception:
        """The exception of Inspect's contract for an error of a file."""
        if isinstance(error, errors.PermissionDenied):
            return PermissionError(f"{name}: permission denied")
        if isinstance(error, errors.NotFound):
            await self._check_running(error)
            return FileNotFoundError(f"{name}: no such file or directory")
        if isinstance(error, _ENDED):
            return SandboxUnavailableError(str(error))  # type: ignore[no-any-return]
        if isinstance(error, errors.Conflict):
            return NotADirectoryError(f"{name}: a parent is not a directory")
        if isinstance(error, errors.InvalidConfig) and await self._is_folder(path):
            return IsADirectoryError(f"{name} is a directory")
        return error

    async def _is_folder(self, path: str) -> bool:
        try:
            return (await self.sandbox.files.stat(path)).kind == "directory"
        except errors.RockError:
            return False

    async def _check_running(self, error: errors.RockError | None) -> None:
        """SandboxUnavailableError when the sandbox, and not a file in it, is what does not exist."""
        try:
            info = await self.sandbox.info()
        except errors.RockError as gone:
            raise SandboxUnavailableError(str(gone)) from error
        if info.state is not State.RUNNING:
            raise SandboxUnavailableError(f"sandbox {info.sandbox_id} is {info.state.value}") from error

    # ---- people and polling

    async def connection(self, *, user: str | None = None) -> Any:
        """The command that opens a terminal in the sandbox."""
        if user is not None and user != self._user:
            raise errors.Unsupported("`rock shell` has no option for a user", hint="call connection() without a user")
        try:
            await self._check_running(None)
        except SandboxUnavailableError as error:
            raise ConnectionError(str(error)) from error
        return SandboxConnection(type="rock", command=f"rock shell {self.sandbox.sandbox_id}",
                                 container=self.sandbox.sandbox_id)  # fmt: skip

    def default_polling_interval(self) -> float:
        return 0.2

    # ---- life

    @classmethod
    async def task_init(cls, task_name: str, config: Any) -> None:
        """Check the configuration, and that the server responds, before the first sample."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise errors.Unsupported("the sandbox provider rock needs the event loop of asyncio",
                                     hint="unset INSPECT_ASYNC_BACKEND") from None
        read_config(config)
        await Sandbox.list(limit=1)

    @classmethod
    async def sample_init(cls, task_name: str, config: Any, metadata: dict[str, str]) -> dict[str, Any]:
        settings = read_config(config)
        async with AsyncExitStack() as stack:
            sandbox = await stack.enter_async_context(Sandbox(labels=LABELS, **settings.options()))
            directory = await _working_dir(sandbox, settings)
            stack.pop_all()
        return {"default": cls(sandbox, directory, settings.user)}

    @classmethod
    async def sample_cleanup(
        cls, task_name: str, config: Any, environments: dict[str, Any], interrupted: bool
    ) -> None:
        await asyncio.gather(*(one.as_type(cls).sandbox.stop() for one in environments.values()))

    @classmethod
    async def task_cleanup(cls, task_name: str, config: Any, cleanup: bool) -> None:
        if not cleanup:
            log.warning("the sandboxes of %s run until their idle timeout; `inspect sandbox cleanup rock` stops them",
                        task_name)  # fmt: skip

    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """Stop the sandboxes of this provider: all that the key can access, or the one with that id. NotFound."""
        found = await Sandbox.list(states=("pending", "running"), labels=LABELS)
        chosen = [info.sandbox_id for info in found if id is None or info.sandbox_id == id]
        if id is not None and not chosen:
            raise errors.NotFound(f"no sandbox {id} of an evaluation runs", hint="`rock ps` lists sandboxes")
        for sandbox_id in chosen:
            await (await Sandbox.connect(sandbox_id)).stop()

    @classmethod
    def config_files(cls) -> list[str]:
        return ["rock.yaml", "rock.toml"]

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> RockSandboxConfig:
        return _validated(config, "RockSandboxConfig")


async def _working_dir(sandbox: Sandbox, config: RockSandboxConfig) -> str:
    """The default working directory, which the user of the configuration can write. StartFailed."""
    if config.working_dir is None:
        done = await sandbox.exec(["pwd"], timeout=_PREPARE, user=config.user)
        directory = done.stdout.removesuffix("\n")
        if done.exit_code != 0 or not directory.startswith("/"):
            raise errors.StartFailed(f"the image has no working directory: {done.stderr or done.failure_reason}",
                                     hint="set working_dir")
        return directory
    await sandbox.files.mkdir(config.working_dir)
    if config.user is not None:
        await sandbox.files.chown(config.working_dir, config.user)
    return config.working_dir
