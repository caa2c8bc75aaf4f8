"""Fixtures of the tests over a real container engine."""

from __future__ import annotations

import pytest

from tests.runtime.docker import engines
from tests.runtime.docker.engines import TestEngine


@pytest.fixture(scope="module")
def engine() -> TestEngine:
    try:
        return engines.shared()
    except engines.CannotBeHad as error:
        pytest.skip(str(error))
