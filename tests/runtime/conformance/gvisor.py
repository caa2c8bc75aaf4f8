"""The runtime "gvisor" in the suite, over Debian's runsc, unpacked into the tests' cache where it is missing."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from rock import errors
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.gvisor.runtime import GvisorRuntime
from tests import packages
from tests.runtime.boxes import HandMade, leftovers
from tests.runtime.conformance.subject import Subject

ALL = bool(os.environ.get("ROCK_TEST_GVISOR"))
GUESTS = Path(tempfile.gettempdir()) / f"rock-test-guests-{os.geteuid()}"  # pid 1's Pythons, for all runs

_KNOWN = {
    "test_kept_programs_are_attached_again": "what one reader was sent and did not read, the next one does not get",
    "test_programs_inherit_nothing_of_the_server": "its /proc/self/fd cannot be listed by ls",
    "test_programs_start_with_clean_signals_and_descriptors": "its /proc/self/status tells no signals",
}


class OfGvisor(Subject):
    name = "gvisor"
    isolation = Isolation.GVISOR
    image = "hand"
    # A short run has tests/runtime/test_gvisor.py of it: what programs and files do, other subjects try too.
    sample = None
    known = _KNOWN

    def missing(self) -> str | None:
        if not ALL:
            return "takes minutes: set ROCK_TEST_GVISOR=1, as `make gvisor` does"
        return self.cannot()

    def cannot(self) -> str | None:
        """Why it cannot be had here at all."""
        if os.geteuid() != 0:
            return "needs root"
        try:
            packages.runsc()
        except packages.CannotBeHad as error:
            return str(error)
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(self._try(Path(folder)))

    async def _try(self, folder: Path) -> str | None:
        runtime = self.make(folder)
        await runtime.open()
        try:
            await runtime.probe()
        except errors.Unsupported as error:
            return error.message
        finally:
            await runtime.close()
        return None

    def make(self, folder: Path) -> GvisorRuntime:
        return GvisorRuntime(folder / "run", GUESTS, HandMade(folder / "image"), str(packages.runsc()))

    def config(self, **values: Any) -> SandboxConfig:
        return super().config(**{"runtime": "gvisor", **values})

    def leftovers(self, folder: Path) -> dict[str, list[str]]:
        return leftovers(folder)


SUBJECTS = [OfGvisor()]
