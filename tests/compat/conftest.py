"""These tests install ROCK's own client from PyPI. The newest one, with what it imports and nothing more, is there for
`make test`; the older ones, and the cases that wait for the client's own polls, take minutes: `make compat`.

What is installed is kept in ROCK_TEST_CACHE (~/.cache/rock-tests unless told otherwise), never in the checkout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_rock import NEWEST, RlRock, install

WANTED = "ROCK_TEST_COMPAT"


@pytest.fixture(scope="session")
def rl_rock() -> Callable[[str], RlRock]:
    """Clients by version. Skips where one cannot be installed."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    made: dict[str, RlRock] = {}

    def find(version: str) -> RlRock:
        if version != NEWEST:
            skip_unless_wanted()
        if version not in made:
            made[version] = install(version, cache)
        return made[version]

    return find


@pytest.fixture
def whole() -> None:
    """Of tests that are no part of the fast half."""
    skip_unless_wanted()


def skip_unless_wanted() -> None:
    if not os.environ.get(WANTED):
        pytest.skip(f"takes minutes: `make compat`, or {WANTED}=1")
