"""A server with an owner's key, for all tests of keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.conftest import RunningServer, give_image
from tests.leaks import Inventory

OWNER = "the owner's key"


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Its key is OWNER. Each test has tenants of its own."""
    server = RunningServer(tmp_path_factory.mktemp("guarded"), ROCK_API_KEY=OWNER)
    give_image(server.home)
    server.start()
    yield server
    server.stop()
    server.assert_clean(Inventory())
