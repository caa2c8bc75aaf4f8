"""A server whose sandboxes are containers, as its users see it: sessions, files, ports, a crash, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rock import errors
from rock.sync import Sandbox, SandboxConfig
from tests.conftest import RunningServer
from tests.runtime.docker import engines
from tests.runtime.docker.engines import TestEngine


@pytest.fixture
def docker_server(engine: TestEngine, own_server: Callable[..., RunningServer]) -> RunningServer:
    return own_server(DOCKER_HOST=engine.host)


def config(server: RunningServer, **values: Any) -> SandboxConfig:
    return SandboxConfig(**{"base_url": server.url, "image": "rock-test/hand:1", "runtime": "docker", "memory": "256m",
                            "cpus": 1.0, **values})  # fmt: skip


def test_sessions_files_ports_and_a_crash(docker_server: RunningServer) -> None:
    sandbox = Sandbox(config(docker_server, env={"A": "1"}))
    sandbox.start()
    info = sandbox.info()
    assert (info.runtime, info.isolation, info.phases["image"].status) == ("docker", "container", "success")
    assert set(info.enforced) == {"memory", "cpus", "pids"} and "none" not in info.enforced.values()
    seen = sandbox.arun("cd /tmp; echo $A $FROM_IMAGE; false")
    assert (seen.output, seen.exit_code) == ("1 yes\n", 1)
    seen = sandbox.arun("echo partial; sleep 60", timeout=2)
    assert seen.timed_out and "partial" in seen.output
    assert sandbox.arun("pwd").output == "/tmp\n"
    sandbox.fs.write("/tmp/data", b"\0\1" * 100_000)
    assert sandbox.fs.read("/tmp/data") == b"\0\1" * 100_000
    assert sandbox.execute(["sh", "-c", "wc -c < /tmp/data; exit 3"]).exit_code == 3
    process = sandbox.processes.start("read a; echo got $a; exit 4")
    docker_server.kill()
    docker_server.start()
    found = Sandbox(config(docker_server)).attach(info.sandbox_id)
    assert found.arun("echo again; pwd").output == "again\n/tmp\n"
    same = found.processes.get(process.id)
    same.write_stdin("through\n")
    assert same.wait(30).exit_code == 4
    assert same.logs().data == b"got through\n"
    found.stop()
    assert engines.shared().containers(rock__sandbox=info.sandbox_id) == []


def test_what_is_refused_is_told_before_the_start(docker_server: RunningServer) -> None:
    for values, kind in (
        ({"oci_runtime": "kata"}, errors.Unsupported), ({"use_kata_runtime": True}, errors.Unsupported),
        ({"network": "nat"}, errors.Unsupported), ({"auto_delete_seconds": 60}, errors.Unsupported),
        ({"image": "rock-test/none:1", "pull": "never"}, errors.ImageError),
        ({"runtime": "namespace", "image": "python:3.11", "oci_runtime": "runc"}, errors.Unsupported),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            Sandbox(config(docker_server, **values)).start()
        assert caught.value.hint
    assert engines.shared().containers() == []


def test_the_doctor_tells_of_the_engine(docker_server: RunningServer) -> None:
    command = [sys.executable, "-m", "rock.cli.main", "doctor", "--json"]
    told = subprocess.run(command, capture_output=True, env={**os.environ, **docker_server.environment}, check=False)
    rows = {row["name"]: row for row in json.loads(told.stdout)}
    assert rows["container engine"]["ok"] is True
    assert rows["OCI runtime runc"]["ok"] is True and rows["OCI runtime runsc"]["ok"] is True
    assert "seccomp" in rows["containers"]["detail"] and "live-restore is off" in rows["containers"]["detail"]
    without = {**os.environ, "DOCKER_HOST": f"unix://{docker_server.home}/none"}
    told = subprocess.run(command, capture_output=True, env=without, check=False)
    rows = {row["name"]: row for row in json.loads(told.stdout)}
    assert rows["container engine"]["ok"] is None and "no container engine" in rows["container engine"]["detail"]
