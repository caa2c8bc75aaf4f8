"""Released clients of other systems against a server of ours, each in a virtual environment of its own.

`make integrations` runs them and prints a table; the environments are kept in ROCK_TEST_CACHE/integrations. A script
below scripts/ runs in such an environment and prints one line of JSON for each check.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
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
    """One distribution. checks: (name, reason) of each check; "" is a pass. python: the version of Python that it
    needs, if not that of the tests. alone: requirements that are installed without their dependencies, where those
    exclude each other or need a GPU. environment: the system whose virtual environment it shares."""

    name: str
    requirements: tuple[str, ...]
    python: str = ""
    alone: tuple[str, ...] = ()
    environment: str = ""
    version: str = ""
    checks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[tuple[str, str]]:
        return [check for check in self.checks if check[1]]


CLIENT = ("pydantic>=2.11", "orjson>=3.10", "websockets>=15", "click>=8.2")  # what our client needs
HARBOR = ("harbor==0.25.0", "shortuuid", "typer", "requests", "pyyaml", "rich", "toml", "tenacity", "python-dotenv",
          "litellm>=1.92", "jinja2", "dirhash", "packaging", "semver", "fastapi", "uvicorn", "pathspec",
          "supabase>=2.28.2", "httpx", "filelock", "platformdirs", "pyjwt", "jsonschema", "certifi", *CLIENT)
# verl and the Tinker cookbook need versions of transformers that exclude each other, and packages for GPUs.
ALONE = ("verl==0.9.1", "tinker-cookbook==0.6.1")
TRAINING = ("stable-baselines3==2.9.2", "pettingzoo==1.27.0", "trl==1.16.0", "skyrl-gym==0.4.0", "ray", "hydra-core",
            "tensordict>=0.8,<=0.10", "codetiming", "requests", "chz", "termcolor", "tinker", "blobfile", "omegaconf",
            "tiktoken", "pyrage", "torchdata", "pylatexenc", "pillow", "aiohttp", "sympy", "cachetools", "uvicorn",
            "fastapi", *CLIENT)
# Without packages for tracking and analyses.
NEMO = ("nemo-gym==0.4.0", "openai<=2.7.2", "anthropic<=0.109.2", "omegaconf", "hydra-core", "aiohttp", "fastapi",
        "itsdangerous", "uvicorn", "rich", "mcp<2,>=1.27", "devtools", "tqdm", "urllib3", "psutil", "python-multipart",
        "yappi", "ray>=2.55.1", "wandb", "mlflow-skinny", "gprof2dot", "pydot", "GitPython", "pandas", *CLIENT)
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
    "minisweagent": System("mini-SWE-agent (mini-swe-agent)", ("mini-swe-agent==2.4.6", *CLIENT)),
    # Its floor of certifi is newer than the newest release of the index.
    "harbor": System("Harbor (harbor)", HARBOR, python="3.12", alone=("harbor==0.25.0",)),
    "smolagents": System("smolagents (smolagents)", ("smolagents==1.26.0", "e2b-code-interpreter==2.11.5", *CLIENT)),
    "training": System("stable-baselines3 (stable-baselines3)", TRAINING, alone=ALONE),
    "pettingzoo": System("PettingZoo (pettingzoo)", ("pettingzoo==1.27.0",), environment="training"),
    "trl": System("TRL (trl)", ("trl==1.16.0",), environment="training"),
    "skyrl": System("SkyRL-gym (skyrl-gym)", ("skyrl-gym==0.4.0",), environment="training"),
    "tinker": System("Tinker cookbook (tinker-cookbook)", ("tinker-cookbook==0.6.1",), environment="training"),
    "verl": System("verl (verl)", ("verl==0.9.1",), environment="training"),
    "nemo": System("NeMo Gym (nemo-gym)", NEMO, python="3.12", alone=("nemo-gym==0.4.0",)),
    "verifiers": System("verifiers, over E2B (verifiers)", ("verifiers==0.4.0", "e2b==2.63.0", *CLIENT)),
    "deepagents": System("LangChain deepagents (deepagents)",
                         ("deepagents==0.7.32", "langchain-tests==1.1.9", "pytest", *CLIENT)),
    "openai-agents": System("OpenAI Agents SDK, over E2B (openai-agents)",
                            ("openai-agents==0.24.0", "e2b-code-interpreter==2.11.5", *CLIENT)),
}


def environment_of(system: str) -> Path:
    """The virtual environment of a system, installed the first time."""
    system = SYSTEMS[system].environment or system
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    folder = cache / "integrations" / system
    folder.parent.mkdir(parents=True, exist_ok=True)
    spec = SYSTEMS[system]
    wanted = "\n".join((*spec.requirements, *spec.alone))
    ready = folder / "ready"
    with open(folder.parent / f"{system}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != wanted:
            subprocess.run([interpreter(spec.python), "-m", "venv", str(folder)], check=True)
            pip = [folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            if spec.alone:
                subprocess.run([*pip, "--no-deps", *spec.alone], check=True)
            subprocess.run([*pip, *(one for one in spec.requirements if one not in spec.alone)], check=True)
            ready.write_text(wanted)
    return folder


def interpreter(version: str) -> str:
    """A Python of that version ("" for that of the tests). Skips the test when this machine has none."""
    if not version or sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    name = f"python{version}"
    places = [shutil.which(name), *Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}")]
    for place in filter(None, places):
        if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:  # a shim may lead nowhere
            return str(place)
    pytest.skip(f"this machine has no {name}")


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
