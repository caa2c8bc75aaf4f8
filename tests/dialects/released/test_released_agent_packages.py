"""Adapters for packages that run agents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import RunningServer
from tests.dialects.released.conftest import OWNER

SOURCE = str(Path(__file__).parents[3] / "src")


def test_mini_swe_agent(run_script: Callable[..., Any]) -> None:
    assert len(run_script("minisweagent", "minisweagent_client.py", PYTHONPATH=SOURCE).checks) >= 19


def test_smolagents(run_script: Callable[..., Any], released_server: RunningServer) -> None:
    e2b = {"E2B_API_URL": f"{released_server.url}/e2b", "E2B_SANDBOX_URL": f"{released_server.url}/e2b",
           "E2B_API_KEY": OWNER}  # fmt: skip
    assert len(run_script("smolagents", "smolagents_client.py", PYTHONPATH=SOURCE, **e2b).checks) >= 14
