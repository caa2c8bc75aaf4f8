"""A PostgreSQL for the tests of clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.store.postgres_server import postgres


@pytest.fixture(scope="session")
def database() -> Iterator[Callable[[], str]]:
    """Makes an empty database, and answers its URL."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    with postgres() as make:
        yield make
