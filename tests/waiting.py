"""Waiting for what happens elsewhere in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(what: Callable[[], bool], seconds: float = 120.0, why: str = "it did not happen") -> None:
    """Look again and again until it is so; AssertionError with `why` after `seconds`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.05)
