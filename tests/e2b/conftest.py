"""A server with the owner's key and a domain for ports, and E2B's SDKs in ROCK_TEST_CACHE."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import Inventory

from rock.errors import NotFound
from rock.protocol.keys import Access, CreateKey
from rock.sync import Client

HERE = Path(__file__).parent
OWNER = "e2b_0123456789abcdef"
DOMAIN = "ports.test"
CACHE = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
EVERYTHING = "ROCK_TEST_INTEGRATIONS"


@pytest.fixture(scope="session")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Its template "base" is this machine's own system. Its sandboxes have a network of their own only."""
    server = RunningServer(tmp_path_factory.mktemp("e2b"), ROCK_API_KEY=OWNER, ROCK_E2B_DOMAIN=DOMAIN,
                           ROCK_E2B_NETWORK="none", ROCK_E2B_MEMORY="512m", ROCK_E2B_CPUS="1")  # fmt: skip
    server.start()
    yield server
    with Client(server.url, OWNER) as client:
        for one in client.list_snapshots():
            with contextlib.suppress(NotFound):
                client.delete_snapshot(one.snapshot_id, tenant=one.tenant)
    server.stop()
    server.assert_clean(Inventory())


@pytest.fixture(scope="session")
def tenant(e2b: RunningServer) -> str:
    """The key of a tenant."""
    with Client(e2b.url, OWNER) as client:
        scopes = [Access.READ, Access.RUN, Access.CREATE, Access.IMAGES]
        return client.create_key(CreateKey(name="e2b", tenant="alice", scopes=scopes)).key


@pytest.fixture
def everything() -> None:
    """Of tests that are no part of the short half."""
    if not os.environ.get(EVERYTHING):
        pytest.skip(f"the short half is tested without it: {EVERYTHING}=1")


@pytest.fixture(scope="session")
def python_sdk() -> str:
    """The Python with E2B's SDKs. Skips where they cannot be installed."""
    folder = _kept("e2b-python", HERE / "sdks.txt", sys.implementation.cache_tag or "", _install)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session")
def charts_python() -> str:
    """A Python with matplotlib. Skips where it cannot be installed."""
    folder = _kept("e2b-charts", HERE / "charts.txt", sys.implementation.cache_tag or "", _install)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="session")
def javascript_sdk() -> Path:
    """A folder with E2B's SDKs for node. Skips where they cannot be installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    return _kept("e2b-javascript", HERE / "package.json", "node", _install_npm)


def _kept(name: str, pins: Path, tag: str, install: Callable[[Path, Path], str]) -> Path:
    """A folder of the cache, which `install` has filled once."""
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    cache = CACHE / name
    folder = cache / f"{digest}-{tag}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            problem = install(folder, pins)
            if problem:
                pytest.skip(f"E2B's SDKs cannot be installed here: {problem[-300:]}")
            (folder / "ready").touch()
    return folder


def _install(folder: Path, pins: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
           "-r", pins]  # fmt: skip
    done = subprocess.run(pip, text=True, capture_output=True)
    return done.stderr.strip() if done.returncode else ""


def _install_npm(folder: Path, pins: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(pins, folder / "package.json")
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    done = subprocess.run(npm, cwd=folder, text=True, capture_output=True)
    return (done.stderr or "npm failed").strip() if done.returncode else ""


def environment(server: RunningServer, key: str) -> dict[str, str]:
    """The variables by which E2B's SDKs find a server."""
    return {"PATH": os.environ["PATH"], "HOME": str(server.home), "E2B_API_URL": f"{server.url}/e2b",
            "E2B_SANDBOX_URL": f"{server.url}/e2b", "E2B_API_KEY": key, "NO_COLOR": "1"}  # fmt: skip


def results(text: str) -> dict[str, str]:
    """The problem of each check by its name, "" where it passed: lines of a program of checks."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {each["check"]: each["problem"] for each in found}
