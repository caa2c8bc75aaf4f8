"""The client for TypeScript, built with the TypeScript compiler, in node against a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.dialects.released.conftest import OWNER
from tests.ui.browser import Missing, typescript

CLIENT = Path(__file__).parents[3] / "clients" / "typescript"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the client, with the compiled modules."""
    try:
        compiler = typescript()
    except Missing as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("typescript") / "client"
    shutil.copytree(CLIENT, folder, ignore=shutil.ignore_patterns("dist", "node_modules"))
    made = subprocess.run([*compiler, "--project", "tsconfig.json"], cwd=folder, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert made.returncode == 0, made.stdout
    return folder


def test_the_client_for_typescript(released_server: RunningServer, built: Path, systems: dict[str, Any]) -> None:
    system = systems["typescript"]
    system.version = json.loads((built / "package.json").read_text())["version"]
    environ = {**os.environ, "ROCK_BASE_URL": released_server.url, "ROCK_API_KEY": OWNER, "ROCK_TEST_IMAGE": "host",
               "ROCK_TEST_ENVIRONMENT": "CartPole-v1"}  # fmt: skip
    done = subprocess.run(["node", "test/client.mjs"], cwd=built, env=environ, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    new = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    system.checks += [(one["check"], one["reason"]) for one in new]
    failed = [f"{one['check']}: {one['reason']}" for one in new if one["reason"]]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0 and len(new) > 15, done.stdout[-4000:] + done.stderr[-4000:]


def test_wrong_calls_do_not_compile(released_server: RunningServer, built: Path) -> None:
    (built / "src" / "wrong.ts").write_text(
        'import { Sandbox } from "./index.js";\nconst made = await Sandbox.create({ image: 5 });\n'
        'await made.exec(["true"], { timeouts: 1 });\n(await made.info()).nosuch;\n')  # fmt: skip
    done = subprocess.run([*typescript(), "--project", "tsconfig.json", "--noEmit"], cwd=built, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    (built / "src" / "wrong.ts").unlink()
    for line in (2, 3, 4):
        assert f"src/wrong.ts({line}," in done.stdout, done.stdout
