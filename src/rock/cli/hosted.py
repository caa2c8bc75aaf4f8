"""A rocklet under a host program: `python -m rock.cli.hosted`, with settings from the environment.

It exits when its standard input closes, which happens whenever the host ends. Its sandboxes then end too, because no
process would manage them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

from rock.cli.output import status_of
from rock.cli.serve.serve import Rocklet, run_server, when_input_ends
from rock.settings import Settings

_ENDING = 30.0  # seconds for its sandboxes to end


class Hosted(Rocklet):
    """A rocklet that monitors its host."""

    async def open(self, *, later: bool = False) -> None:
        await super().open(later=later)
        loop = asyncio.get_running_loop()
        self._end: asyncio.Task[None] | None = None

        def begin() -> None:
            self._end = asyncio.create_task(self._over(), name="host gone")

        when_input_ends(lambda: loop.call_soon_threadsafe(begin))

    async def _over(self) -> None:
        self.node.lose("the program that hosted its worker is gone")
        await self.node.emptied(_ENDING)
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    with contextlib.suppress(OSError):  # Ray's workers are niced, which would delay heartbeats; requires root
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    return status_of(lambda: run_server(Settings.read(), Hosted))


if __name__ == "__main__":
    sys.exit(main())
