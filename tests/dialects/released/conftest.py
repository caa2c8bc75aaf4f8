"""Released clients of other systems against a server of ours, each in a virtual environment of its own.

`make integrations` runs them and prints a table; the environments are kept in ROCK_TEST_CACHE/integrations. A script
below scripts/ runs in such an environment and prints one line of JSON for each check.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.conftest import RunningServer, hosting

SCRIPTS = Path(__file__).parent / "scripts"
WANTED = "ROCK_TEST_INTEGRATIONS"
OWNER = "the owner's key of the released clients"


@dataclass
class System:
    """One distribution. checks: (name, reason) of each check; "" is a pass."""

    name: str
    requirements: tuple[str, ...]
    version: str = ""
    checks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[tuple[str, str]]:
        return [check for check in self.checks if check[1]]


SYSTEMS = {
    "mcp": System("MCP client (mcp)", ("mcp==2.3.0",)),
    "mcp1": System("MCP client, release 1 (mcp)", ("mcp==1.30.0",)),
    "mcp-agents": System("MCP of the OpenAI Agents SDK (openai-agents)", ("openai-agents==0.24.0",)),
    "mcp-pydantic": System("MCP of Pydantic AI (pydantic-ai-slim)", ("pydantic-ai-slim[mcp]==2.68.0",)),
    "swerex": System("SWE-ReX (swe-rex)", ("swe-rex==1.4.0", "aiohttp")),
    "openenv": System("OpenEnv (openenv)", ("openenv==0.10.0", "click>=8.2", "orjson>=3.10", "websockets>=15")),
    "inspect": System("Inspect (inspect_ai)", ("inspect_ai==0.3.285", "click>=8.2", "orjson>=3.10", "websockets>=15")),
    "typescript": System("Client for TypeScript (clients/typescript)", ()),
    "agentscope": System("AgentScope (agentscope-runtime)", ("agentscope-runtime==1.1.6.post2",)),
}


def environment_of(system: str) -> Path:
    """The virtual environment of a system, installed the first time."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    folder = cache / "integrations" / system
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = "\n".join(SYSTEMS[system].requirements)
    ready = folder / "ready"
    with open(folder.parent / f"{system}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check",
                            *SYSTEMS[system].requirements], check=True)  # fmt: skip
            ready.write_text(wanted)
    return folder


@pytest.fixture(scope="session")
def released_server(tmp_path_factory: pytest.TempPathFactory, env_images: Path) -> Iterator[RunningServer]:
    """Its key is OWNER. It can host environments."""
    if not os.environ.get(WANTED):
        pytest.skip(f"installs released clients from PyPI: `make integrations`, or {WANTED}=1")
    with hosting(tmp_path_factory.mktemp("released"), env_images, ROCK_API_KEY=OWNER) as server:
        yield server


@pytest.fixture
def systems() -> dict[str, System]:
    """The rows of the table."""
    return SYSTEMS


@pytest.fixture
def run_script(released_server: RunningServer) -> Callable[..., System]:
    """Run a script with the address and the key of the server; each of its checks is recorded."""

    def run(system: str, script: str, *words: str, timeout: float = 600.0, **environment: str) -> System:
        folder, found = environment_of(system), SYSTEMS[system]
        package = found.requirements[0].partition("==")[0].partition("[")[0]
        show = f"from importlib.metadata import version; print(version({package!r}))"
        found.version = subprocess.run([folder / "bin/python", "-c", show], check=True, text=True,
                                       capture_output=True).stdout.strip()  # fmt: skip
        environ = {**os.environ, "ROCK_BASE_URL": released_server.url, "ROCK_API_KEY": OWNER,
                   "PATH": f"{Path(sys.executable).parent}:{folder / 'bin'}:{os.environ['PATH']}", **environment}
        command = [folder / "bin/python", SCRIPTS / script, *words]
        done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=timeout)
        new = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
        found.checks += [(one["check"], one["reason"]) for one in new]
        assert done.returncode == 0 and new, done.stdout[-4000:] + done.stderr[-4000:]
        failed = [one for one in new if one["reason"]]
        assert not failed, "\n".join(f"{one['check']}: {one['reason']}" for one in failed)
        return found

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not os.environ.get(WANTED):
        return
    terminalreporter.section("released clients")
    terminalreporter.write_line("| system | version | tests executed | passed | not passed |")
    terminalreporter.write_line("|---|---|---|---|---|")
    for system in SYSTEMS.values():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in system.failed) or "none"
        passed = len(system.checks) - len(system.failed)
        terminalreporter.write_line(
            f"| {system.name} | {system.version or '-'} | {len(system.checks)} | {passed} | {reasons} |")
