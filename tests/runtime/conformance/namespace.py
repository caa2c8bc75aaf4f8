"""The runtime "namespace" in the suite, as root and as an ordinary user: tests/test_rootless.py runs the second."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from rock import errors
from rock.protocol.sandbox import Isolation
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import ROOT, HandMade, leftovers
from tests.runtime.conformance.subject import Subject


class OfNamespaces(Subject):
    image = "hand"

    def __init__(self, name: str, isolation: Isolation, *, native: bool = True) -> None:
        """native: False is the runtime as it is without the compiled extension."""
        self.name = name
        self.isolation = isolation
        self.native = native

    def missing(self) -> str | None:
        if (self.isolation == Isolation.NAMESPACES) != ROOT:
            return "this is root; tests/test_rootless.py is the share of an ordinary user" if ROOT else "needs root"
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(self._try(Path(folder)))

    async def _try(self, folder: Path) -> str | None:
        runtime = self.make(folder)
        try:
            await runtime.open()
        except errors.Unsupported as error:
            return f"no namespaces here: {error.message}"
        await runtime.close()
        return None if runtime.isolation == self.isolation else f"only {runtime.isolation.value} can be had here"

    def make(self, folder: Path) -> NamespaceRuntime:
        return NamespaceRuntime(folder / "run", 0, HandMade(folder / "image"), native=self.native)

    def leftovers(self, folder: Path) -> dict[str, list[str]]:
        return leftovers(folder)


SUBJECTS = [
    OfNamespaces("namespace", Isolation.NAMESPACES),
    OfNamespaces("namespace-fork", Isolation.NAMESPACES, native=False),
    OfNamespaces("namespace-rootless", Isolation.USERNS),
]
