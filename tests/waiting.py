"""Waiting for what happens elsewhere in its own time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def slowness() -> float:
    """How much longer things take now than on an idle machine, by the programs that wait for a core: 1 to 20."""
    return min(20.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def until(what: Callable[[], bool], seconds: float = 120.0, why: str = "it did not happen") -> None:
    """Look again and again until it is so; AssertionError with `why` after `seconds` of an idle machine."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds * slowness(), why
        time.sleep(0.05)
