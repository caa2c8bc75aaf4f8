"""The sandbox provider "rock" of NeMo Gym, which an entry point registers.

    sandbox:
      rock:
        base_url: http://HOST:8080
        api_key: KEY
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_gym.sandbox.providers.base import (
    SandboxCreateError,
    SandboxExecResult,
    SandboxHandle,
    SandboxSpec,
    SandboxStatus,
)

from rock import errors
from rock.protocol.sandbox import State
from rock.sdk.sandbox import Sandbox

LABELS = {"rock.integration": "nemo_gym"}  # of all sandboxes of this provider
RUNTIME_FAILED = 125  # return code of a command without an exit code, as of the other providers
_OUTPUT = 16 << 20  # bytes of each output
_STATES = {State.PENDING: SandboxStatus.STARTING, State.RUNNING: SandboxStatus.RUNNING}


class RockProvider:
    """Sandboxes for environments of NeMo Gym. It implements the protocol SandboxProvider.

    image: default image. timeout: default seconds of a command. options: of `rock.Sandbox`, such as base_url, api_key,
    network, runtime and idle_timeout; provider_options of a spec replace them.
    """

    name = "rock"

    def __init__(self, image: str | None = None, timeout: float | None = None, **options: Any) -> None:
        self._image = image
        self._timeout = timeout
        self._options = options
        if image is not None:
            Sandbox(image, **options)  # an unknown option is rejected here

    async def create(self, spec: SandboxSpec) -> SandboxHandle:
        """Start a sandbox. SandboxCreateError, with the typed error as its cause."""
        try:
            sandbox = Sandbox(spec.image or self._image, **self._fields(spec))
            await sandbox.start()
        except errors.RockError as error:
            raise SandboxCreateError(f"{type(error).__name__}: {error}") from error
        try:
            if spec.workdir is not None:
                await sandbox.files.mkdir(spec.workdir)
        except BaseException as error:
            await sandbox.stop()
            if isinstance(error, errors.RockError):
                raise SandboxCreateError(f"workdir: {error}") from error
            raise
        return SandboxHandle(str(sandbox.sandbox_id), self.name, (sandbox, spec.workdir))

    def _fields(self, spec: SandboxSpec) -> dict[str, Any]:
        if spec.image is None and self._image is None:
            raise errors.InvalidConfig("no image was given", hint="set image in the spec, or in the provider's options")
        if spec.entrypoint is not None:
            raise errors.Unsupported("entrypoint: a sandbox has no main program",
                                     hint="start the program with exec and `nohup ... &`")
        if getattr(spec, "ports", None):
            raise errors.Unsupported("ports: NeMo Gym 0.4 has no endpoints", hint="leave ports out")
        fields: dict[str, Any] = {**self._options, **_plain(spec.provider_options)}
        fields["labels"] = {**LABELS, **fields.get("labels", {}), **{str(k): str(v) for k, v in spec.metadata.items()}}
        fields["env"] = {**fields.get("env", {}), **spec.env}
        if spec.ttl_s is not None:
            fields["max_lifetime"] = float(spec.ttl_s)
            fields.setdefault("idle_timeout", int(spec.ttl_s) or 1)
        if spec.ready_timeout_s is not None:
            fields["startup_timeout"] = float(spec.ready_timeout_s)
        resources = spec.resources
        wanted = {"cpus": resources.cpu, "memory": _sized(resources.memory_mib, "m"),
                  "disk": _sized(resources.disk_gib, "g"), "gpus": resources.gpu,
                  "gpu_type": resources.gpu_type}  # fmt: skip
        return {**fields, **{name: value for name, value in wanted.items() if value is not None}}

    async def exec(
        self,
        handle: SandboxHandle,
        command: str,
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_s: int | float | None = None,
        user: str | int | None = None,
    ) -> SandboxExecResult:
        """Run a command by the image's shell. error_type: None, "timeout" or "sandbox"."""
        sandbox, workdir = handle.raw
        limit = self._timeout if timeout_s is None else float(timeout_s)
        try:
            done = await sandbox.exec(
                ["/bin/sh", "-c", command], cwd=cwd or workdir, env=env, timeout=limit,
                user=None if user is None else str(user), max_output_bytes=_OUTPUT,
            )  # fmt: skip
        except errors.RockError as error:
            return SandboxExecResult(None, f"{type(error).__name__}: {error}", RUNTIME_FAILED, "sandbox")
        if done.timed_out:
            return SandboxExecResult(done.stdout, done.stderr, RUNTIME_FAILED, "timeout")
        if done.exit_code is None:
            return SandboxExecResult(done.stdout, done.failure_reason, RUNTIME_FAILED, "sandbox")
        return SandboxExecResult(done.stdout, done.stderr, done.exit_code)

    async def upload_file(self, handle: SandboxHandle, source_path: Path, target_path: str) -> None:
        await handle.raw[0].files.upload_file(source_path, target_path)

    async def download_file(self, handle: SandboxHandle, source_path: str, target_path: Path) -> None:
        Path(target_path).parent.mkdir(parents=True, exist_ok=True)
        await handle.raw[0].files.download_file(source_path, target_path)

    async def status(self, handle: SandboxHandle) -> SandboxStatus:
        try:
            info = await handle.raw[0].info()
        except errors.NotFound:
            return SandboxStatus.STOPPED
        except errors.RockError:
            return SandboxStatus.UNKNOWN
        return _STATES.get(info.state, SandboxStatus.STOPPED)

    async def close(self, handle: SandboxHandle) -> None:
        """Stop the sandbox. No effect when that was done."""
        await handle.raw[0].stop()

    async def aclose(self) -> None:
        """No effect: the provider holds nothing."""


def _sized(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value}{unit}"


def _plain(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {str(name): value for name, value in (options or {}).items()}
