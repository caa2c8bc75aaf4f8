"""These tests install ROCK's own client from PyPI and take minutes, so they run on demand: `make compat`.

What is installed is kept in ROCK_TEST_CACHE (~/.cache/rock-tests unless told otherwise), never in the checkout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_rock import RlRock, install

WANTED = "ROCK_TEST_COMPAT"


@pytest.fixture(scope="session")
def rl_rock() -> Callable[[str], RlRock]:
    """Clients by version."""
    if not os.environ.get(WANTED):
        pytest.skip(f"installs ROCK's own client from PyPI: `make compat`, or {WANTED}=1")
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    made: dict[str, RlRock] = {}

    def find(version: str) -> RlRock:
        if version not in made:
            made[version] = install(version, cache)
        return made[version]

    return find
