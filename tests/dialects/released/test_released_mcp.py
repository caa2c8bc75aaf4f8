"""The released client of MCP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("transport", ["http", "stdio"])
@pytest.mark.parametrize("mode", ["legacy", "auto", "2026-07-28"])
def test_the_released_client(run_script: Callable[..., Any], transport: str, mode: str) -> None:
    assert len(run_script("mcp", "mcp_client.py", transport, mode).checks) >= 12


@pytest.mark.parametrize("transport", ["http", "stdio"])
def test_the_client_of_release_1(run_script: Callable[..., Any], transport: str) -> None:
    assert len(run_script("mcp1", "mcp1_client.py", transport).checks) >= 5


@pytest.mark.parametrize("system", ["mcp-agents", "mcp-pydantic"])
def test_agent_frameworks(run_script: Callable[..., Any], system: str) -> None:
    assert len(run_script(system, f"{system.replace('-', '_')}_client.py").checks) >= 2
