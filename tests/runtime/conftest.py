"""Fixtures of the runtimes' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.boxes import Maker, namespace_box, process_box


@pytest.fixture(params=["process", "namespace"])
def box(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    """A context manager that makes a sandbox of each runtime in turn."""
    return (lambda: process_box(tmp_path)) if request.param == "process" else (lambda: namespace_box(tmp_path))
