"""The environment class of Harbor: the sandbox of a trial.

    harbor run -p TASKS -a oracle -e rock.integrations.harbor:RockEnvironment --ek base_url=http://HOST:8080

The image is the one that the task names, or is built on the server of its environment/Dockerfile.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.environments.capabilities import EnvironmentCapabilities, EnvironmentResourceCapabilities
from harbor.environments.definition import (
    DOCKERFILE_NAME,
    require_agent_environment_definition,
    should_use_prebuilt_docker_image,
)
from harbor.models.task.config import NetworkMode
from harbor.models.trial.config import ResourceMode

from rock import errors
from rock.sdk.client import Client
from rock.sdk.sandbox import Sandbox

LABELS = {"rock.integration": "harbor"}  # of all sandboxes of this class
_SHELLS = ("bash", "sh")
_OUTPUT = 16 << 20  # bytes of each output of a command
_NETWORKS = ("none", "nat", "host")
_builds: WeakKeyDictionary[Any, dict[str, asyncio.Lock]] = WeakKeyDictionary()  # by event loop and image


class RockEnvironment(BaseEnvironment):  # type: ignore[misc]
    """One sandbox, for one trial. sandbox: the sandbox, once it was started.

    base_url, api_key: default to ROCK_BASE_URL and ROCK_API_KEY. build_network: "nat" (the default), "none" or "host",
    of the RUN steps of a Dockerfile. build_memory: their memory limit. Other options are those of `rock.Sandbox`, such
    as runtime, minimum_isolation and idle_timeout; the task has image, cpus, memory, disk, env and network.
    """

    def __init__(
        self,
        *args: Any,
        base_url: str | None = None,
        api_key: str | None = None,
        build_network: str = "nat",
        build_memory: str = "4g",
        **kwargs: Any,
    ) -> None:
        known = inspect.signature(BaseEnvironment.__init__).parameters
        options = {name: kwargs.pop(name) for name in kwargs.keys() - known.keys()}
        taken = sorted(options.keys() & {"image", "env", "cpus", "limit_cpus", "memory", "disk", "network", "egress"})
        if taken:
            raise errors.Unsupported(f"{', '.join(taken)}: the task and the options of Harbor have that",
                                     hint="use task.toml, --cpus, --memory-mb and the options for networks")
        if build_network not in _NETWORKS:
            raise errors.InvalidConfig(f"build_network={build_network!r} is no network",
                                       hint=f"there are {', '.join(_NETWORKS)}")
        reach = {"base_url": base_url, "api_key": api_key}
        self._reach: dict[str, Any] = {name: value for name, value in reach.items() if value is not None}
        self._build: dict[str, Any] = {"network": build_network, "memory": build_memory}
        self._options: dict[str, Any] = {"idle_timeout": 7200, **options}
        self._shell = _SHELLS[0]
        self.sandbox: Sandbox | None = None
        super().__init__(*args, **kwargs)
        self._sandbox_of("validation")  # unknown options are rejected before the first trial starts

    @staticmethod
    def type() -> str:
        return "rock"

    @property
    def capabilities(self) -> EnvironmentCapabilities:
        return EnvironmentCapabilities(
            disable_internet=True, network_allowlist=True, network_allowlist_hostnames=True,
            network_allowlist_wildcard_hostnames=True, network_allowlist_ipv4_addresses=True,
            network_allowlist_ipv6_addresses=True, network_allowlist_ipv4_cidrs=True, network_allowlist_ipv6_cidrs=True,
        )  # fmt: skip

    @classmethod
    def resource_capabilities(cls) -> EnvironmentResourceCapabilities:
        return EnvironmentResourceCapabilities(cpu_limit=True, cpu_request=True, memory_limit=True,
                                               memory_request=True, fractional_cpus=True)  # fmt: skip

    def _validate_definition(self) -> None:
        require_agent_environment_definition(self.environment_dir, docker_image=self.task_env_config.docker_image)

    # ---- life

    async def start(self, force_build: bool) -> None:
        """Find or build the image, and start the sandbox. A failure leaves no sandbox behind."""
        named = self.task_env_config.docker_image
        if named is None and not (self.environment_dir / DOCKERFILE_NAME).is_file():
            raise errors.Unsupported(f"{self.environment_name} is defined by Docker Compose",
                                     hint="use a task with a Dockerfile or a docker_image")
        prebuilt = should_use_prebuilt_docker_image(self.environment_dir, docker_image=named, force_build=force_build)
        image = named if prebuilt and named else await self._built(force_build)
        sandbox = self._sandbox_of(image)
        await sandbox.start()
        self.sandbox = sandbox
        try:
            self._shell = await self._find_shell(sandbox)
            await self.ensure_dirs(self._mount_targets(writable_only=True))
            await self._upload_environment_dir_after_start()
        except BaseException:
            await sandbox.stop()
            raise

    def _sandbox_of(self, image: str) -> Sandbox:
        options = {**self._options, **self._reach, "env": self._startup_env()}
        options["labels"] = {**LABELS, "harbor.session": self.session_id[:200], **options.get("labels", {})}
        request = self._resource_request_value("cpu", auto_mode=ResourceMode.REQUEST)
        limit = self._resource_limit_value("cpu", auto_mode=ResourceMode.REQUEST)
        if request is not None or limit is not None:
            options["cpus"] = float(request if request is not None else limit)
        if limit is not None:
            options["limit_cpus"] = float(limit)
        if self._effective_memory_mb is not None:
            options["memory"] = f"{self._effective_memory_mb}m"
        if self._effective_storage_mb is not None:
            options["disk"] = f"{self._effective_storage_mb}m"
        mode = self.network_policy.network_mode
        options["network"] = "none" if mode == NetworkMode.NO_NETWORK else "nat"
        if mode == NetworkMode.ALLOWLIST:
            options["egress"] = list(self.network_policy.allowed_hosts)
        return Sandbox(image, **options)

    async def _built(self, force: bool) -> str:
        """The image of the task's Dockerfile, by the hash of its folder. Trials of one task wait for one build."""
        words = re.sub(r"[^a-z0-9]+", "-", self.environment_name.lower()).strip("-")[:60] or "task"
        image = f"localhost/harbor/{words}:{self.environment_id[:16]}"
        locks = _builds.setdefault(asyncio.get_running_loop(), {})
        async with locks.setdefault(image, asyncio.Lock()):
            async with asyncio.timeout(self.task_env_config.build_timeout_sec), Client(**self._reach) as client:
                # Steps that were built before come from the cache of the server.
                await client.build_image(self.environment_dir, image, progress=self.logger.debug, **self._build,
                                         use_cache=not force)  # fmt: skip
        return image

    async def _find_shell(self, sandbox: Sandbox) -> str:
        for shell in _SHELLS:
            try:
                await sandbox.exec([shell, "-c", ":"], timeout=60, check=True, cwd="/")
                return shell
            except errors.NotFound:
                continue
        raise errors.StartFailed("the image has neither bash nor sh", hint="use an image with a shell")

    async def stop(self, delete: bool) -> None:
        """Stop the sandbox. Without `delete` it runs until its idle timeout, for `rock shell`."""
        sandbox, self.sandbox = self.sandbox, None
        if sandbox is None:
            return
        if delete:
            await sandbox.stop()
        else:
            self.logger.warning("sandbox %s runs until it is idle for %s s: rock shell %s", sandbox.sandbox_id,
                                self._options["idle_timeout"], sandbox.sandbox_id)  # fmt: skip

    def _running(self) -> Sandbox:
        if self.sandbox is None:
            raise errors.Conflict("the environment has no sandbox", hint="call start before")
        return self.sandbox

    # ---- commands

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> ExecResult:
        """Run a command by the shell of the image. TimeoutError: it was killed with all that it started."""
        name = self._resolve_user(user)
        done = await self._running().exec(
            [self._shell, "-c", command], cwd=cwd or self.task_env_config.workdir, env=self._merge_env(env),
            timeout=timeout_sec, user=None if name is None else str(name), max_output_bytes=_OUTPUT,
        )  # fmt: skip
        if done.timed_out:
            raise TimeoutError(f"Command timed out after {timeout_sec} seconds")
        if done.exit_code is None:
            raise errors.CommandFailed(f"the exit code is unknown: {done.failure_reason}")
        return ExecResult(stdout=done.stdout, stderr=done.stderr, return_code=done.exit_code)

    # ---- files. The names of the parameters are part of the interface of Harbor.

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        await self._running().files.upload_file(source_path, target_path)

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        await self._running().files.upload_dir(source_dir, target_dir, merge=True, check="raise")

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        Path(target_path).parent.mkdir(parents=True, exist_ok=True)
        await self._running().files.download_file(source_path, target_path)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        left_out = await self._running().files.download_dir(source_dir, target_dir)
        if left_out:
            self.logger.warning("%d special files of %s were left out", len(left_out), source_dir)

    async def is_dir(self, path: str, user: str | int | None = None) -> bool:
        return await self._kind(path) == "directory"

    async def is_file(self, path: str, user: str | int | None = None) -> bool:
        return await self._kind(path) == "file"

    async def _kind(self, path: str) -> str:
        try:
            return (await self._running().files.stat(path)).kind
        except errors.NotFound:
            return ""
