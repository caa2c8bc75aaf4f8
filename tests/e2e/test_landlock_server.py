"""A server where namespaces are forbidden, as in a container with default settings: Landlock for who asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import Inventory

from rock import errors
from rock.runtime.landlock import ruleset
from rock.sync import Client, Sandbox, SandboxConfig

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or ruleset.version() < 4,
                                reason="isolation landlock takes root, and Landlock of version 4")
_CONFINED = str(Path(__file__).parent.parent / "confined.py")


def test_namespaces_are_forbidden_and_landlock_is_there(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, ROCK_RUNTIME="landlock", PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    server.prefix = [sys.executable, _CONFINED]
    server.start()
    try:
        common = {"base_url": server.url, "image": "host", "memory": "128m", "cpus": 1.0}
        with Sandbox(SandboxConfig(**common)) as sandbox:
            info = sandbox.info()
            assert (info.isolation, info.runtime) == ("landlock", "landlock")
            assert sandbox.execute(["sh", "-c", "echo $((6 * 7)); cat /root/.bashrc"]).stdout == "42\n"
            assert sandbox.arun("cd tmp; x=1").exit_code == 0
            assert sandbox.arun("echo $x; basename $PWD").output.split() == ["1", "tmp"]
        with pytest.raises(errors.Unsupported, match="minimum_isolation userns"):
            Sandbox(SandboxConfig(**common, minimum_isolation="userns")).start()
        with pytest.raises(errors.Unsupported, match="this host cannot run the namespace runtime"):
            Sandbox(SandboxConfig(**{**common, "image": "python:3.11"}, runtime="namespace")).start()
        with pytest.raises(errors.Unsupported, match="gvisor"):
            Sandbox(SandboxConfig(**common, isolation="gvisor")).start()
        with Client(server.url) as client:
            assert client.server_info().workers[0].isolation == "landlock"
    finally:
        server.stop()
    server.assert_clean(Inventory())


def test_it_is_never_chosen_by_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "ROCK_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, _CONFINED, sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1",
                           "--port", "0"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "this host cannot run the namespace runtime" in done.stdout + done.stderr
    assert "ROCK_RUNTIME=landlock" in done.stdout + done.stderr


def test_a_level_chooses_its_runtime(server: RunningServer) -> None:
    config = SandboxConfig(base_url=server.url, image="host", memory="128m", cpus=1.0, isolation="landlock")
    with Sandbox(config) as sandbox:
        assert sandbox.info().isolation == "landlock"
    with pytest.raises(errors.Unsupported, match="this runtime gives"):
        Sandbox(SandboxConfig(base_url=server.url, image="host", runtime="landlock", isolation="userns")).start()
