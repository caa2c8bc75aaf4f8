"""Sandboxes of the Tinker cookbook: its SandboxInterface.

    from rock.integrations.tinker_cookbook import RockSandbox

    sandbox = await RockSandbox.create("python:3.11", memory="1g")
"""

from __future__ import annotations

import shlex
from typing import Any, Self

from tinker_cookbook.sandbox.sandbox_interface import SandboxResult, SandboxTerminatedError

from rock import errors
from rock.sdk.sandbox import Sandbox

LABELS = {"rock.integration": "tinker_cookbook"}  # of all sandboxes of this class
_OUTPUT = 128 << 10  # bytes
_ENDED = (errors.SandboxError, errors.Unauthorized, errors.Forbidden)
TIMED_OUT = 124  # exit codes of commands and files, as of `timeout` and of cat
FAILED = 1


class RockSandbox:
    """A sandbox of a rollout. sandbox: the ROCK sandbox, which runs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    @classmethod
    async def create(cls, image: str, **options: Any) -> Self:
        """Start a sandbox; options are those of `rock.Sandbox`. It stops after 3600 seconds without a request."""
        options["labels"] = {**LABELS, **options.get("labels", {})}
        options.setdefault("idle_timeout", 3600)
        sandbox = Sandbox(image, **options)
        await sandbox.start()
        return cls(sandbox)

    @property
    def sandbox_id(self) -> str:
        return str(self.sandbox.sandbox_id)

    async def send_heartbeat(self, timeout: int = 30) -> None:
        """A request restarts the idle timeout. SandboxTerminatedError: the sandbox has ended."""
        await self.run_command(":", timeout=timeout)

    async def run_command(
        self, command: str, workdir: str | None = None, timeout: int = 60, max_output_bytes: int | None = None
    ) -> SandboxResult:
        """Run a command by the image's shell. A timeout kills its process tree, and has the exit code 124.
        SandboxTerminatedError: the sandbox has ended."""
        limit = _OUTPUT if max_output_bytes is None else max_output_bytes
        try:
            done = await self.sandbox.exec(["/bin/sh", "-c", command], cwd=workdir, timeout=timeout,
                                           max_output_bytes=limit)  # fmt: skip
        except errors.NotFound as error:  # the directory, unless the sandbox is gone
            return await self._failed(error)
        except _ENDED as error:
            raise SandboxTerminatedError(str(error)) from error
        if done.timed_out:
            return SandboxResult(stdout=done.stdout, stderr=f"{done.stderr}\n{done.failure_reason}",
                                 exit_code=TIMED_OUT, metrics=_metrics(done))  # fmt: skip
        if done.exit_code is None:
            raise SandboxTerminatedError(f"the exit code is unknown: {done.failure_reason}")
        return SandboxResult(stdout=done.stdout, stderr=done.stderr, exit_code=done.exit_code, metrics=_metrics(done))

    async def read_file(self, path: str, max_bytes: int | None = None, timeout: int = 60) -> SandboxResult:
        """The text of a file in stdout, with replacements where it is not UTF-8; an error has the exit code 1."""
        try:
            data = await self.sandbox.files.read(await self._absolute(path), length=max_bytes)
        except errors.ClientError as error:
            return await self._failed(error)
        except _ENDED as error:
            raise SandboxTerminatedError(str(error)) from error
        return SandboxResult(stdout=data.decode(errors="replace"), stderr="", exit_code=0)

    async def write_file(
        self, path: str, content: str | bytes, executable: bool = False, timeout: int = 60
    ) -> SandboxResult:
        """Write a file, with its parent folders; an error has the exit code 1."""
        try:
            await self.sandbox.files.write(await self._absolute(path), content, mode=0o755 if executable else None)
        except errors.ClientError as error:
            return await self._failed(error)
        except _ENDED as error:
            raise SandboxTerminatedError(str(error)) from error
        return SandboxResult(stdout="", stderr="", exit_code=0)

    async def _absolute(self, path: str) -> str:
        """A path of the image's working directory."""
        if path.startswith("/"):
            return path
        here = await self.sandbox.exec(["/bin/sh", "-c", f'printf "%s/%s" "$PWD" {shlex.quote(path)}'], timeout=60)
        return here.stdout

    async def _failed(self, error: errors.RockError) -> SandboxResult:
        """The result for an error of a file or folder; SandboxTerminatedError when the sandbox has ended."""
        if isinstance(error, _ENDED):
            raise SandboxTerminatedError(str(error)) from error
        try:
            await self.sandbox.exec(["/bin/sh", "-c", ":"], timeout=60)
        except (*_ENDED, errors.NotFound) as gone:
            raise SandboxTerminatedError(str(gone)) from error
        return SandboxResult(stdout="", stderr=str(error), exit_code=FAILED)

    async def cleanup(self) -> None:
        """Stop the sandbox. No effect when that was done."""
        await self.sandbox.stop()


def _metrics(done: Any) -> dict[str, Any]:
    return {"duration": done.duration, "stdout_dropped": done.stdout_dropped, "stderr_dropped": done.stderr_dropped}
