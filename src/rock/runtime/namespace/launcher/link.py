"""The rocklet's client of the launcher; restarts a crashed launcher."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rock import errors
from rock.host.child_process import ChildLink

_LAUNCHER = Path(__file__).with_name("launcher.py")


class LaunchLink(ChildLink):
    """One launcher at a time; its sandboxes survive it. `options` are those of `launcher.Launcher`, without the
    descriptor.

    made: called with the name of each run folder that the launcher prepared.
    """

    what = "the launcher"
    again = "the next request starts it again"

    def __init__(self, options: dict[str, Any], log: Path, made: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(_LAUNCHER, options, log)
        self._made = made

    def _greeted(self, data: bytes) -> None:
        if not data:
            raise errors.Unavailable("the launcher ended while it started", hint=f"see {self._log}")
        answer = json.loads(data)
        if "error" in answer:
            raise errors.Unsupported(f"this host cannot make namespaces: {answer['error']}",
                                     hint=f"`rock doctor` tells what is missing; the launcher's log is {self._log}")

    def _not_started(self, error: OSError | TimeoutError) -> errors.RockError:
        return errors.Unsupported(f"the launcher did not start: {error!r}", hint=f"see {self._log}")

    async def request(self, op: str, fields: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request to the launcher, with copies of `fds`. Raises Ended when the launcher dies meanwhile."""
        return await self.ask(op, fields, fds)

    def _told(self, message: dict[str, Any]) -> None:
        if "made" in message:
            self._made(str(message["made"]))
