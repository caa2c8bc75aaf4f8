"""`sandbox.process`: whole scripts, written into the sandbox and run there."""

from __future__ import annotations

import shlex
import time
from typing import Protocol

from rock import errors
from rock.protocol.action import BashObservation
from rock.sdk import primitives
from rock.sdk.sandbox.files import Files

CLEAN_UP = 15.0  # seconds


class Runs(Protocol):
    """ROCK's `arun`."""

    async def arun(
        self, cmd: str, session: str | None, wait_timeout: float | None, wait_interval: float, mode: str, /
    ) -> BashObservation: ...


class Scripts:
    """Shell scripts. `sandbox.exec` runs one program, `sandbox.processes.start` a background process."""

    def __init__(self, files: Files, sandbox: Runs) -> None:
        self._files = files
        self._sandbox = sandbox

    async def execute_script(
        self,
        script_content: str,
        script_name: str | None = None,
        wait_timeout: float | None = 300,
        wait_interval: float = 10,
        cleanup: bool = True,
    ) -> BashObservation:
        """Write a script to /tmp and run it by bash (sh where there is no bash), apart from any session.

        script_name: its name below /tmp; one of our own unless given. wait_timeout: seconds; then it is left running
        and the observation says `timed_out`. cleanup: the file is removed afterwards. The status is the script's own.
        """
        path = f"/tmp/{script_name or f'script_{time.time_ns()}.sh'}"
        word = shlex.quote(path)
        command = f"if command -v bash > /dev/null 2>&1; then exec bash {word}; else exec sh {word}; fi"
        await self._files.write(path, script_content)
        try:
            return await self._sandbox.arun(command, None, wait_timeout, wait_interval, "nohup")
        finally:
            if cleanup:
                await primitives.settle(lambda: self._remove(path), CLEAN_UP)

    async def _remove(self, path: str) -> None:
        try:
            await self._files.remove(path)
        except errors.NotFound:
            return  # the script removed itself
