"""Checkpoint, rollback and fork over a real server: files, lineage, tenants, retention, crashes, commands."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import homes, members_of
from tests.waiting import until

from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unsupported
from rock.protocol.action import CreateBashSessionRequest
from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox


@pytest.fixture
def box(server: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, labels={"a": "b"}) as made:
        yield made


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    made = Client(server.url)
    yield made
    for one in reversed(made.list_snapshots()):
        made.delete_snapshot(one.snapshot_id)


def show(box: Sandbox, path: str = "/tmp/file") -> str:
    return str(box.run(f"cat {path}").output.strip())


def put(box: Sandbox, text: str, path: str = "/tmp/file") -> None:
    assert box.run(f"echo {text} > {path}").exit_code == 0


def test_checkpoint_rollback_and_fork(box: Sandbox, client: Client) -> None:
    put(box, "one")
    box.run("cd /tmp; x=5")
    first = box.checkpoint(name="first", memory="session")
    assert (first.name, first.sandbox_id, first.state, first.memory) == ("first", box.sandbox_id, "ready", "session")
    assert any("of the shells of sessions default: background jobs" in line for line in first.left_out)
    assert box.run("echo $x $PWD").output.strip() == "5 /tmp"  # the original continues
    put(box, "two")
    second = box.checkpoint()
    assert second.parent == first.snapshot_id
    put(box, "three")
    children = box.fork(3, env={"CHILD": "yes"}, labels={"c": "d"})
    try:
        for number, child in enumerate(children):
            assert show(child) == "three" and child.run("echo $CHILD").output.strip() == "yes"
            assert client.get_sandbox(child.sandbox_id or "").labels == {"c": "d"}
            put(child, str(number))
        assert [show(child) for child in children] == ["0", "1", "2"] and show(box) == "three"
        assert len({child.sandbox_id for child in children}) == 3
        third = client.get_snapshot(children[0].config.snapshot or "")
        assert third.parent == second.snapshot_id and {child.sandbox_id for child in children} <= set(third.users)
    finally:
        for child in children:
            child.stop()
    box.rollback("first")
    assert show(box) == "one" and box.run("echo $x $PWD").output.strip() == "5 /tmp"
    put(box, "branch")
    assert box.checkpoint().parent == first.snapshot_id
    box.rollback(second)
    assert show(box) == "two"
    with Sandbox(snapshot="first", memory="256m", cpus=1.0) as other:
        assert show(other) == "one" and other.config.snapshot == "first"
        assert client.get_sandbox(other.sandbox_id or "").image == "host"


def test_sessions_and_processes_of_a_snapshot(box: Sandbox, client: Client) -> None:
    box.create_session(CreateBashSessionRequest(session="work"))
    box.run("cd /tmp; echo hi > here", session="work")
    process = box.processes.start("sleep 300")
    taken = box.checkpoint(memory="session")
    assert any("sleep 300" in line for line in taken.left_out) and any("work" in line for line in taken.left_out)
    box.run("rm /tmp/here", session="work")
    box.rollback(taken)
    assert box.run("cat /tmp/here; pwd", session="work").output.split() == ["hi", "/tmp"]
    with pytest.raises(NotFound):
        box.processes.get(process.id)
    assert box.run("ps ax | grep -c '[s]leep 300'").output.strip() == "0"


SHELL = r"""
plain=1; export exported="a b"; declare -i number=3; declare -a list=(x "y z" ''); declare -A map=([k]="v 1" [l]=2)
readonly fixed=7; text=$'line\n\ttab \'quote\' "double" $dollar \\ \001'; unset USER_GONE
greet() { local a=$1; echo "hi $a ${map[k]}"; }
alias ll='echo aliased'; shopt -s extglob nullglob; set -o noclobber; umask 027; trap 'echo trapped' USR1
mkdir -p "/tmp/dir with space"; cd "/tmp/dir with space"; ulimit -Sn 512
false
"""
SHOW = r"""
echo "status $?"; echo "$plain|$number|${#list[@]}|${list[1]}|${map[k]}|${map[l]}|$fixed|$PWD|$(umask)|$(ulimit -Sn)"
printf '%q\n' "$text"; greet you; ll; shopt extglob nullglob; set -o | grep noclobber; printenv exported; trap -p USR1
(fixed=8) 2>/dev/null || echo readonly
"""


def test_the_state_of_a_shell_continues_in_children(box: Sandbox, client: Client) -> None:
    box.create_session(CreateBashSessionRequest(session="work", env={"FROM": "session"}))
    box.run(SHELL, session="work")
    box.run("other=1; set -e; cd /var")
    taken = box.checkpoint(memory="session")
    assert taken.memory == "session"
    children = box.fork(2, memory="session", env={"exported": "changed", "NEW": "n"})
    try:
        expected = box.run(SHOW, session="work").output
        assert "status 1" in expected and "1|3|3|y z|v 1|2|7|/tmp/dir with space|0027|512" in expected, expected
        for child in children:
            assert child.run(SHOW, session="work").output == expected.replace("a b\n", "changed\n").replace(
                "status 1", "status 0")
            assert child.run("echo $FROM $NEW", session="work").output.split() == ["session", "n"]
            assert child.run("echo $other $PWD $-").output.split()[:2] == ["1", "/var"]
            assert "e" in child.run("echo $-").output
        with Sandbox(snapshot=box.checkpoint(memory="files").snapshot_id, memory="256m", cpus=1.0) as plain:
            assert plain.run("echo .$plain. $PWD", session="work").output.split() == ["..", "/"]
    finally:
        for child in children:
            child.stop()
    assert box.run("ls -A /tmp").output.split() == ["dir", "with", "space"], "no file of the dump is left"


def test_a_shell_that_cannot_be_carried(box: Sandbox, client: Client) -> None:
    box.create_session(CreateBashSessionRequest(session="terminal", pty=(24, 80)))
    with pytest.raises(Unsupported, match="terminal"):
        box.checkpoint(memory="session")
    taken = box.checkpoint()
    assert taken.memory == "files" and any("terminal" in line for line in taken.left_out)


def test_a_running_command_is_waited_for(box: Sandbox, client: Client) -> None:
    thread = threading.Thread(target=box.run, args=("sleep 1; echo done > /tmp/file",))
    thread.start()
    until(lambda: any(one.busy for one in box.sessions.list()), 10)
    with pytest.raises(Conflict, match="not quiet"):
        box.checkpoint(wait=0.1)
    taken = box.checkpoint(wait=10)
    thread.join()
    with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0) as other:
        assert show(other) == "done"


def test_what_is_refused(box: Sandbox, client: Client) -> None:
    put(box, "x")
    taken = box.checkpoint(name="one", files="copy")
    assert taken.files == "copy" and taken.bytes
    refused: list[tuple[type[RockError], str, Callable[[], object]]] = [
        (Conflict, "a snapshot one already", lambda: box.checkpoint(name="one")),
        (InvalidConfig, "memory", lambda: box.checkpoint(memory="all")),  # type: ignore[arg-type]
        (Unsupported, "takes files alone", lambda: box.checkpoint(memory="processes", files="copy")),
        (InvalidConfig, "name", lambda: box.checkpoint(name="../x")),
        (NotFound, "no snapshot nothing", lambda: box.rollback("nothing")),
        (NotFound, "no snapshot nothing", lambda: Sandbox(snapshot="nothing", memory="256m").start()),
        (InvalidConfig, "is of 'host'", lambda: Sandbox("python:3.11", snapshot="one", memory="256m").start()),
        (Unsupported, "disk", lambda: Sandbox(snapshot="one", memory="256m", disk="64m").start()),
        (Unsupported, "cannot start from a snapshot",
         lambda: Sandbox(snapshot="one", memory="256m", runtime="process").start()),
        (InvalidConfig, "cannot differ", lambda: box.fork(2, image="other")),
        (InvalidConfig, "no field 'nonsense'", lambda: box.fork(2, nonsense=1)),
        (InvalidConfig, "cpus", lambda: box.fork(2, cpus=-1)),
        (InvalidConfig, "count", lambda: box.fork(0)),
        (InvalidConfig, "count", lambda: box.fork(5000)),
    ]  # fmt: skip
    for kind, words, call in refused:
        with pytest.raises(kind, match=words):
            call()
    assert show(box) == "x" and [one.name for one in client.list_snapshots(box.sandbox_id)] == ["one"]
    with Sandbox("host", memory="256m", runtime="process", base_url=box.config.base_url) as plain, \
            pytest.raises(Unsupported, match="cannot take snapshots"):  # fmt: skip
        plain.checkpoint()
    box.stop()
    with pytest.raises(Conflict, match="stopped"):
        box.checkpoint()
    with pytest.raises(Conflict, match="stopped"):
        box.rollback("one")


def test_a_snapshot_outlives_its_sandbox_and_a_deleted_one_its_children(server: RunningServer, client: Client) -> None:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as first:
        put(first, "kept")
        taken = first.checkpoint()
    with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0) as child:
        client.delete_snapshot(taken.snapshot_id)
        assert show(child) == "kept" and client.list_snapshots() == []
        with pytest.raises(NotFound):
            client.get_snapshot(taken.snapshot_id)
        put(child, "more")
        assert show(child) == "more"
    until(lambda: not any((home / "run/namespace/snapshots").exists() for home in homes(server.home)), 10)


def test_retention_begins_with_the_last_use(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_SNAPSHOT_TTL="2")
    client = Client(server.url)
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        put(box, "x")
        short, long = box.checkpoint(), box.checkpoint(ttl_seconds=3600)
        with Sandbox(snapshot=short.snapshot_id, memory="256m", cpus=1.0, base_url=server.url) as child:
            until(lambda: client.get_snapshot(short.snapshot_id).used_at > short.used_at + 1.9, 15)  # it is in use
            assert show(child) == "x"
        box.stop()
        until(lambda: [one.snapshot_id for one in client.list_snapshots()] == [long.snapshot_id], 20)
    client.delete_snapshot(long.snapshot_id)


def test_a_killed_server_loses_no_snapshot(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    box = Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, reconnect_timeout=60)
    box.start()
    put(box, "one")
    box.run("cd /tmp; y=1; exec 7>>/tmp/log; echo a >&7")
    taken = box.checkpoint(name="base")
    put(box, "two")
    port = int(server.url.rpartition(":")[2])
    server.kill()
    server.start(port)
    assert show(box) == "two" and box.run("echo b >&7; cat log; echo $y").output.split() == ["a", "b", "1"]
    [child] = box.fork()
    assert show(child) == "two" and show(child, "/tmp/log") == "a\nb"
    box.rollback("base")
    server.kill()
    server.start(port)
    assert show(box) == "one" and show(child) == "two"
    client = Client(server.url)
    assert {one.name for one in client.list_snapshots()} == {"base", None}
    assert client.get_snapshot("base").snapshot_id == taken.snapshot_id
    box.stop()
    child.stop()
    for one in client.list_snapshots():
        client.delete_snapshot(one.snapshot_id)
    assert not any((home / "run/namespace/snapshots").exists() for home in homes(server.home))


POINTS = ("namespace.checkpoint.switched", "node.checkpoint.taken", "node.rollback.saved", "snapshot.delete.saved",
          "namespace.processes.taken", "namespace.processes.finished", "namespace.processes.adopted")  # fmt: skip
MORE = ("namespace.processes.known", "namespace.processes.started", "node.sessions.attached",
        "snapshot.create.saved", "namespace.checkpoint.frozen", "node.checkpoint.saved", "snapshot.create.made",
        "snapshot.rollback.begun", "snapshot.rollback.done", "node.snapshot.delete", "node.snapshot.dropped",
        "snapshot.delete.gone")  # fmt: skip


@pytest.mark.parametrize("points", [POINTS, pytest.param(MORE, marks=pytest.mark.long)])
def test_a_kill_at_each_step(
    own_server: Callable[..., RunningServer], tmp_path: Path, points: tuple[str, ...]
) -> None:
    """After each crash, of the server or of one of its rocklet processes: the sandbox runs with its files, no snapshot
    is half there, nothing is left over."""
    plan = tmp_path / "plan"
    plan.write_text("")
    server = own_server(ROCK_FAULTS=str(plan))
    port = int(server.url.rpartition(":")[2])
    client = Client(server.url)

    def plans(text: str) -> None:
        plan.with_suffix(".new").write_text(text)
        plan.with_suffix(".new").replace(plan)

    def revive(members: list[int]) -> None:
        process = server.process
        assert process is not None
        until(lambda: process.poll() is not None or members_of(process.pid) != members)
        plans("")  # a process that the server starts again would end at the same point
        if process.poll() is not None:
            server.start(port)

    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, reconnect_timeout=60) as box:
        put(box, "kept")
        box.checkpoint(name="base")
        for number, point in enumerate(points):
            server.kill()
            plans(f"{point}=kill@1")
            server.start(port)
            thread = threading.Thread(target=revive, args=(members_of(server.pid),))
            thread.start()
            error: RockError | None = None
            try:
                put(box, f"now{number}")
                box.checkpoint(name=f"n{number}")
                box.rollback(f"n{number}")
                client.delete_snapshot(f"n{number}")
            except (Conflict, NotFound) as found:  # a repeated request found what it had done
                error = found
            thread.join()
            assert show(box) == f"now{number}", (point, error)
            states = {one.name: one.state for one in client.list_snapshots()}
            assert states.pop("base") == "ready" and set(states.values()) <= {"ready"}, (point, states, error)
            box.rollback("base")
            assert show(box) == "kept"
            for name in states:
                client.delete_snapshot(name or "")
    client.delete_snapshot("base")
    until(lambda: not any((home / "run/namespace/snapshots").exists() for home in homes(server.home)), 10)


def test_tenants_see_only_their_own(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_API_KEY="owner-key")
    owner = Client(server.url, api_key="owner-key")
    keys = [owner.create_key(CreateKey(name=name, tenant=name)).key for name in ("aaa", "bbb")]
    one, two = (Client(server.url, api_key=key) for key in keys)
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url, api_key=keys[0]) as box:
        put(box, "secret")
        taken = box.checkpoint(name="mine")
        assert [item.name for item in one.list_snapshots()] == ["mine"] and two.list_snapshots() == []
        for name in ("mine", taken.snapshot_id):
            with pytest.raises(NotFound):
                two.get_snapshot(name)
            with pytest.raises(NotFound):
                two.delete_snapshot(name)
            with pytest.raises(NotFound):
                Sandbox(snapshot=name, memory="256m", base_url=server.url, api_key=keys[1]).start()
        for action, body in (("checkpoint", {}), ("rollback", {"snapshot": "mine"}), ("fork", {})):
            with pytest.raises(NotFound):
                two.transport.json("POST", f"/v1/sandboxes/{box.sandbox_id}/{action}", body)
        with pytest.raises(RockError, match="network"):
            box.fork(network="host")
        assert owner.get_snapshot(taken.snapshot_id, tenant="aaa").tenant == "aaa"
        owner.delete_snapshot("mine", tenant="aaa")


def test_commands(box: Sandbox, client: Client, server: RunningServer) -> None:
    def rock(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "rock.cli.main", "--base-url", server.url, *words],
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    put(box, "one")
    name = box.sandbox_id or ""
    first = rock("checkpoint", name, "--name", "first")
    put(box, "two")
    assert rock("run", "--snapshot", "first", "-m", "256m", "host", "--", "cat", "/tmp/file") == "one"
    child = rock("fork", name, "-n", "1")
    assert rock("exec", child, "cat", "/tmp/file") == "two"
    rock("rollback", name, "first")
    assert show(box) == "one"
    shown = json.loads(rock("snapshot", "show", "first"))
    assert shown["snapshot_id"] == first and name in shown["users"]
    assert [one["name"] for one in json.loads(rock("snapshot", "ls", "--json"))] == ["first", None]
    lines = rock("snapshot", "tree").splitlines()
    assert len(lines) == 2 and lines[0].startswith("first ") and lines[1].startswith("`- ")
    rock("stop", child)
    assert rock("snapshot", "rm", "first") == "first"
