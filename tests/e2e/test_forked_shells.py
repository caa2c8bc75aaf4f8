"""Shells of children and of rolled back sandboxes, which start with pid 1, and the ends of what a rollback replaces."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.leaks import homes
from tests.waiting import until

from rock.guest.init import native, process_tree
from rock.sync import Client, Sandbox

COMPILED = {"x86_64": "271", "aarch64": "73"}[os.uname().machine]  # ppoll


def records(server: RunningServer) -> list[dict[str, Any]]:
    """The records of the sandboxes of the namespace runtime."""
    found = []
    for path in (one for home in homes(server.home) for one in (home / "run/namespace").glob("n-*/record.json")):
        with contextlib.suppress(FileNotFoundError):  # it is removed meanwhile
            found.append(json.JSONDecoder().raw_decode(path.read_text())[0])
    return found


def record(server: RunningServer, box: Sandbox) -> dict[str, Any]:
    """Its only record, once what a rollback replaced is removed."""
    until(lambda: [one["id"] for one in records(server)].count(box.sandbox_id) == 1, 20)
    [found] = [one for one in records(server) if one["id"] == box.sandbox_id]
    return found


def remove(client: Client) -> None:
    for one in reversed(client.list_snapshots()):
        client.delete_snapshot(one.snapshot_id)


@pytest.mark.skipif(native.library is None, reason=f"no extension: {native.missing}")
def test_a_child_and_a_rollback_leave_pid_1_in_compiled_code(server: RunningServer) -> None:
    client = Client(server.url)
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        box.run("x=5")
        taken = box.checkpoint(memory="session")
        with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0, base_url=server.url) as child:
            assert child.run("echo $x").output == "5\n"
            box.rollback(taken)
            assert box.run("echo $x").output == "5\n"
            for one in (child, box):
                number = record(server, one)["pid"]
                assert Path(f"/proc/{number}/syscall").read_text().split()[0] == COMPILED
    remove(client)


def test_a_state_that_changes_what_the_shell_does_first(server: RunningServer) -> None:
    """Functions with the names of the commands of the start, options, read-only variables, and changed variables."""
    client = Client(server.url)
    script = ("unset() { echo hidden; }; alias unset='echo hidden'; readonly fixed=1; export A=old; umask 077; "
              "cd /usr; ulimit -Sn 100; shopt -s extglob; greet() { echo hello $1; }; set -u; "
              "text=$'a\\nb\\'c'; set -x")
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, env={"A": "first", "B": "kept"}) as box:
        box.run(script)
        taken = box.checkpoint(memory="session")
        assert taken.memory == "session"
        with Sandbox(snapshot=taken.snapshot_id, env={"A": "new", "B": "kept"}, memory="256m", cpus=1.0,
                     base_url=server.url) as child:
            ask = ("set +x; echo $fixed $A $B $PWD $- $(umask) $(ulimit -Sn) $(greet you); echo \"$text\"; "
                   "shopt extglob; env | grep -c __rock; ls /proc/$$/fd | grep -c 196; (fixed=2) 2>&1; :")
            found = child.run(ask).output
            lines = [line for line in found.splitlines() if not line.startswith("+")]
            assert lines[0].split()[:4] == ["1", "new", "kept", "/usr"], found
            assert "u" in lines[0].split()[4] and lines[0].split()[5:] == ["0077", "100", "hello", "you"], found
            assert lines[1:3] == ["a", "b'c"] and lines[3].split() == ["extglob", "on"], found
            assert lines[4:6] == ["0", "0"] and "readonly variable" in lines[6], found
    remove(client)


def test_a_session_with_other_settings_is_opened_as_it_was(server: RunningServer) -> None:
    client = Client(server.url)
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        box.create_session(session="work", env={"MINE": "yes"})
        box.run("y=7", session="work")
        box.run("x=5")
        taken = box.checkpoint(memory="session")
        with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0, base_url=server.url) as child:
            assert child.run("echo $x").output == "5\n"
            assert child.run("echo $y $MINE", session="work").output == "7 yes\n"
    remove(client)


@pytest.mark.one_process("it waits for the end of the whole server")
def test_a_crash_before_the_first_command_of_a_child(own_server: Callable[..., RunningServer]) -> None:
    """The shell has its state, and gets it once: later changes stay after another crash."""
    server = own_server()
    port = int(server.url.rpartition(":")[2])
    client = Client(server.url)

    def revive() -> None:
        assert server.process is not None
        server.process.wait(60)
        server.environment = {}
        server.start(port)

    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, reconnect_timeout=60) as box:
        box.run("x=5; show() { echo $x; }")
        taken = box.checkpoint(memory="session")
        server.kill()
        server.environment = {"ROCK_FAULTS": "session.spawned=kill@1"}
        server.start(port)
        thread = threading.Thread(target=revive)
        thread.start()
        with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0, base_url=server.url,
                     reconnect_timeout=60) as child:
            thread.join()
            assert server.environment == {}  # it was killed
            assert child.run("show").output == "5\n"
            child.run("x=6")
            server.kill()
            server.start(port)
            assert child.run("show").output == "6\n"
    remove(client)


def test_a_rollback_ends_the_processes_before_its_response(own_server: Callable[..., RunningServer]) -> None:
    """Its remains are removed in the background, or by the next start."""
    server = own_server()
    port = int(server.url.rpartition(":")[2])
    client = Client(server.url)
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, reconnect_timeout=60) as box:
        box.run("mkdir /tmp/many; for i in $(seq 2000); do echo $i > /tmp/many/$i; done")
        taken = box.checkpoint(memory="session")
        for kill in (False, False, True):
            box.run("sleep 1000 & for i in $(seq 2000); do echo $i > /tmp/many/$i; done")
            old = record(server, box)
            box.rollback(taken)
            if kill:
                server.kill()
            assert not process_tree.lives(old["pid"], old["start"])
            if kill:
                server.start(port)
            assert box.run("cat /tmp/many/7").output == "7\n"
            until(lambda: [one["id"] for one in records(server)] == [box.sandbox_id], 20)
    assert records(server) == []
    remove(client)
