"""`sandbox.process`: whole scripts, written into the sandbox and run there."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING

from rock import errors
from rock.protocol.action import BashObservation
from rock.sdk import primitives

if TYPE_CHECKING:
    from rock.sdk.sandbox.session import Sessions

CLEAN_UP = 15.0  # seconds


class Scripts:
    """Scripts of a shell. A program by itself is `sandbox.execute`, one in the background `sandbox.start_process`."""

    def __init__(self, sandbox: Sessions) -> None:
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
        await self._sandbox.fs.write(path, script_content)
        try:
            return await self._sandbox.arun(command, None, wait_timeout, wait_interval, "nohup")
        finally:
            if cleanup:
                await primitives.settle(lambda: self._remove(path), CLEAN_UP)

    async def _remove(self, path: str) -> None:
        try:
            await self._sandbox.fs.remove(path)
        except errors.NotFound:
            return  # the script removed itself
