"""The runtime "process" in the suite."""

from __future__ import annotations

from pathlib import Path

from rock.runtime.base import Handle
from rock.runtime.process.portable import PlainRuntime
from rock.runtime.process.runtime import ProcessRuntime
from tests.runtime.conformance.subject import Subject


class OfProcess(Subject):
    name = "process"

    def make(self, folder: Path) -> ProcessRuntime | PlainRuntime:
        return ProcessRuntime(folder / "run")

    def home(self, handle: Handle) -> Path:
        return Path(handle.data["home"])


class OfPlainProcess(OfProcess):
    """What macOS has of it: the same runtime without anything that only Linux has."""

    name = "process-plain"
    resets_reserved = False

    def make(self, folder: Path) -> PlainRuntime:
        return PlainRuntime(folder / "run")


SUBJECTS = [OfProcess(), OfPlainProcess()]
