"""The runtime "fake" in the suite."""

from __future__ import annotations

from pathlib import Path

from rock.runtime.fake import FakeRuntime
from tests.runtime.conformance.subject import Subject


class OfFake(Subject):
    name = "fake"
    image = "whatever"

    def make(self, folder: Path) -> FakeRuntime:
        return FakeRuntime()


SUBJECTS = [OfFake()]
