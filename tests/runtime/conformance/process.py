"""The runtime "process" in the suite."""

from __future__ import annotations

from pathlib import Path

from rock.runtime.base import Handle
from rock.runtime.process import ProcessRuntime
from tests.runtime.conformance.subject import Subject


class OfProcess(Subject):
    name = "process"

    def make(self, folder: Path) -> ProcessRuntime:
        return ProcessRuntime(folder / "run")

    def home(self, handle: Handle) -> Path:
        return Path(handle.data["home"])


SUBJECTS = [OfProcess()]
