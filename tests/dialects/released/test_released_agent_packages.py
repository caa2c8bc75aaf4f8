"""Adapters for packages that run agents."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.conftest import RunningServer
from tests.dialects.released.conftest import OWNER
from tests.dialects.released.test_released_inspect import metadata

SOURCE = str(Path(__file__).parents[3] / "src")


def e2b_of(server: RunningServer) -> dict[str, str]:
    """The variables of E2B's SDKs for a server."""
    return {"E2B_API_URL": f"{server.url}/e2b", "E2B_SANDBOX_URL": f"{server.url}/e2b", "E2B_API_KEY": OWNER}


def test_mini_swe_agent(run_script: Callable[..., Any]) -> None:
    assert len(run_script("minisweagent", "minisweagent_client.py", PYTHONPATH=SOURCE).checks) >= 19


def test_smolagents(run_script: Callable[..., Any], released_server: RunningServer) -> None:
    environment = {**e2b_of(released_server), "PYTHONPATH": SOURCE}
    assert len(run_script("smolagents", "smolagents_client.py", **environment).checks) >= 15


def test_harbor(run_script: Callable[..., Any]) -> None:
    assert len(run_script("harbor", "harbor_client.py", timeout=900, PYTHONPATH=SOURCE).checks) >= 16


def test_four_packages_on_one_server(
    run_script: Callable[..., Any], released_server: RunningServer, tmp_path: Path
) -> None:
    """An agent of mini-SWE-agent, an oracle trial of Harbor, an evaluation of Inspect and a CodeAgent of smolagents, at
    the same time. None leaves a sandbox behind."""
    systems = ("minisweagent", "harbor", "inspect", "smolagents")
    before = released_server.inventory()
    with ThreadPoolExecutor(len(systems)) as pool:
        paths = {"inspect": metadata(tmp_path)}
        runs = [pool.submit(run_script, system, "together.py", system, PYTHONPATH=paths.get(system, SOURCE))
                for system in systems]  # fmt: skip
        for run in runs:
            run.result()
    released_server.assert_clean(before)


def test_deepagents(run_script: Callable[..., Any]) -> None:
    assert len(run_script("deepagents", "deepagents_client.py", timeout=900, PYTHONPATH=SOURCE).checks) >= 86


def test_verifiers(run_script: Callable[..., Any], released_server: RunningServer, tmp_path: Path) -> None:
    # The lock of its templates is in the temporary folder.
    environment = {**e2b_of(released_server), "PYTHONPATH": SOURCE, "TMPDIR": str(tmp_path)}
    assert len(run_script("verifiers", "verifiers_client.py", **environment).checks) >= 7


def test_openai_agents(run_script: Callable[..., Any], released_server: RunningServer) -> None:
    environment = {**e2b_of(released_server), "PYTHONPATH": SOURCE}
    assert len(run_script("openai-agents", "openai_agents_client.py", **environment).checks) >= 5
