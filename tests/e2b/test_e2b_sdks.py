"""E2B's own SDKs, unmodified, against a server. The short half runs in `make test`; all checks of the Python SDK, and
the JavaScript SDK, run with ROCK_TEST_INTEGRATIONS=1."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.e2b.conftest import HERE, environment, results

SHORT = ("create_info_kill", "run", "background", "files", "code")
ALL = re.findall(r"^(?:async )?def check_(\w+)", (HERE / "checks.py").read_text(), re.MULTILINE)
IN_JAVASCRIPT = re.findall(r"^  async (\w+)\(", (HERE / "checks.mjs").read_text(), re.MULTILINE)


def python(program: str, server: RunningServer, key: str, names: tuple[str, ...]) -> dict[str, str]:
    done = subprocess.run([program, HERE / "checks.py", *names], text=True, capture_output=True, timeout=600,
                          cwd=server.home, env=environment(server, key))  # fmt: skip
    found = results(done.stdout)
    assert set(found) == set(names), done.stderr + server.log()
    return found


@pytest.fixture(scope="module")
def short(python_sdk: str, e2b: RunningServer, tenant: str) -> dict[str, str]:
    return python(python_sdk, e2b, tenant, SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_python(short: dict[str, str], name: str) -> None:
    assert not short[name], short[name]


@pytest.fixture(scope="module")
def whole(python_sdk: str, e2b: RunningServer, tenant: str) -> dict[str, str]:
    return python(python_sdk, e2b, tenant, tuple(name for name in ALL if name not in SHORT))


@pytest.mark.parametrize("name", [name for name in ALL if name not in SHORT])
def test_more_of_python(everything: None, request: pytest.FixtureRequest, name: str) -> None:
    found = request.getfixturevalue("whole")
    assert not found[name], found[name]


@pytest.fixture(scope="module")
def javascript(javascript_sdk: Path, e2b: RunningServer, tenant: str) -> dict[str, str]:
    program = javascript_sdk / "checks.mjs"  # beside its node_modules
    shutil.copy(HERE / "checks.mjs", program)
    done = subprocess.run(["node", program], text=True, capture_output=True, timeout=600, env=environment(e2b, tenant))
    found = results(done.stdout)
    assert set(found) == set(IN_JAVASCRIPT), done.stderr + e2b.log()
    return found


@pytest.mark.parametrize("name", IN_JAVASCRIPT)
def test_javascript(everything: None, request: pytest.FixtureRequest, name: str) -> None:
    found = request.getfixturevalue("javascript")
    assert not found[name], found[name]
