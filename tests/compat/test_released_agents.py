"""Agents of the released rl-rock with its own model service, which it starts inside the sandbox: it uses commands,
sessions and files of our server."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_rock import HERE, NEWEST, RlRock
from tests.agents.test_model_service import AGENT
from tests.conftest import IMAGE, RunningServer

from rock.sync import Sandbox

# What the service imports beside the client's own packages. Its extra `model-service` names more, which PyPI may lack.
PACKAGES = ("fastapi", "uvicorn", "psutil", "openai", "opentelemetry-sdk", "opentelemetry-exporter-otlp")
INSTALL = (
    "mkdir -p runtime-env/bin && ln -s $(command -v python3) runtime-env/bin/python && "
    "printf '#!/bin/sh\\nPYTHONPATH=/opt/service:/opt/client exec python3 -S -m rock.cli.main \"$@\"\\n' "
    "> runtime-env/bin/rock && chmod +x runtime-env/bin/rock"
)

pytestmark = [pytest.mark.compat, pytest.mark.timeout(1200), pytest.mark.usefixtures("whole")]


def service_packages(cache: Path) -> Path:
    """The packages of the service, installed the first time."""
    folder = cache / "rl-rock" / f"service-{sys.implementation.cache_tag}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade",
                   "--only-binary", ":all:", "--target", str(folder), *PACKAGES]  # fmt: skip
            done = subprocess.run(pip, text=True, capture_output=True)
            if done.returncode != 0:
                pytest.skip(f"the packages of the service cannot be installed here: {done.stderr.strip()[-300:]}")
            (folder / "ready").touch()
    return folder


def test_an_agent_with_the_service_of_rl_rock(
    rl_rock: Callable[[str], RlRock], own_server: Callable[..., RunningServer], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    client, service = rl_rock(NEWEST), service_packages(cache)
    packages = next((client.python.parent.parent / "lib").glob("python*/site-packages"))
    server = own_server(ROCK_HOST_MOUNTS=f"{service.resolve()}:{packages.resolve()}")
    mounts = {"/opt/service": str(service.resolve()), "/opt/client": str(packages.resolve())}
    with Sandbox(IMAGE, base_url=server.url, mounts=mounts, memory="1g", idle_timeout=0) as sandbox:
        sandbox.files.write("/tmp/agent.py", AGENT)
        seen = client.script(
            [str(HERE / "agent_script.py")], server.url, tmp_path, 300.0, TEST_BOX=sandbox.sandbox_id or "",
            ROCK_RTENV_PYTHON_V31114_INSTALL_CMD=INSTALL,
        )  # fmt: skip
        *requests, last = seen["requests"]
        assert [json.loads(one)["messages"][-1]["content"] for one in requests] == ["begin", ""]
        assert last.strip() == "SESSION_END"
        assert (seen["output"].strip(), seen["code"]) == ("the end", 0)
        assert sandbox.exec("cat /tmp/pre /tmp/project/made.txt").stdout.split() == ["pre", "made"]
