"""A server where nothing of Linux is: what macOS has, tried on Linux with all that taken away from its Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer

from rock import errors
from rock.actions import CreateBashSessionRequest
from rock.sync import Sandbox

WITHOUT = """
import os, select, socket, time
GONE = {
    os: ("O_PATH", "O_TMPFILE", "memfd_create", "pidfd_open", "pipe2", "sched_getaffinity", "setns", "unshare"),
    select: ("epoll",),
    socket: ("SOCK_SEQPACKET", "SO_PEERCRED", "AF_NETLINK"),
    time: ("CLOCK_BOOTTIME",),
}
for module, names in GONE.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(WITHOUT)
    path = ":".join([str(site), *filter(None, sys.path)])
    running = RunningServer(tmp_path_factory.mktemp("home"), ROCK_RUNTIME="process", ROCK_PROCESSES="1",
                            PYTHONPATH=path)  # fmt: skip
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROCK_HOME", str(running.home))  # clients send its owner key: nothing tells who they are
        yield running
        running.stop()
    assert list((running.home / "run" / "process").iterdir()) == []


def test_sessions_commands_and_files(bare: RunningServer, tmp_path: Path) -> None:
    with Sandbox(image="host", base_url=bare.url, env={"A": "of the sandbox"}) as sandbox:
        assert sandbox.arun("cd /tmp && echo $PWD $A && false").exit_code == 1
        assert sandbox.arun("pwd").output == "/tmp\n"
        seen = sandbox.arun("echo partial; sleep 1000", timeout=1.0)
        assert seen.timed_out and seen.output.startswith("partial\n")
        assert sandbox.arun("pwd").output == "/tmp\n", "the session goes on"
        assert sandbox.execute(["sh", "-c", "kill -9 $$"]).signal == 9
        with pytest.raises(errors.NotFound, match="no-such"):
            sandbox.execute(["no-such-program"])
        sandbox.fs.write(f"{tmp_path}/a/b", b"\0\1")
        assert sandbox.fs.read(f"{tmp_path}/a/b") == b"\0\1" == (tmp_path / "a/b").read_bytes()
        process = sandbox.processes.start("read line; echo got $line; exit 3")
        process.write_stdin("hello\n")
        assert process.wait().exit_code == 3 and process.logs().data == b"got hello\n"


def test_a_terminal(bare: RunningServer) -> None:
    with Sandbox(image="host", base_url=bare.url) as sandbox:
        sandbox.create_session(CreateBashSessionRequest(session="terminal", pty=(24, 80)))
        assert "24 80" in sandbox.arun("stty size", session="terminal").output


def test_what_needs_linux_is_told(bare: RunningServer) -> None:
    with pytest.raises(errors.InvalidConfig, match="no runtime 'namespace' on this machine"):
        Sandbox(image="host", runtime="namespace", base_url=bare.url).start()
    with pytest.raises(errors.Unsupported, match="isolates nothing"):
        Sandbox(image="host", minimum_isolation="userns", base_url=bare.url).start()
