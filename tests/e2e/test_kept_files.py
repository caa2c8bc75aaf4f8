"""What a sandbox wrote outlives its stop, when that was asked for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.leaks import homes, members_of
from tests.waiting import until

from rock.actions import CreateBashSessionRequest
from rock.errors import Conflict, Expired, InvalidConfig, NotFound, RockError, Unsupported
from rock.protocol.sandbox import Cause, SandboxInfo, State
from rock.sync import Client, Sandbox, SandboxConfig

WRITE = r"""
set -e
mkdir -p /work/deep/er /work/empty; chmod 1777 /work/empty
head -c 300000 /dev/urandom > /work/deep/er/data.bin
ln /work/deep/er/data.bin /work/hard
ln -s ../../../../etc/passwd /work/link
mkfifo -m 620 /work/fifo
printf x > $'/work/not utf-8 \xff'
printf 's' > /work/setuid; chmod 4751 /work/setuid
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/work/sock")'
truncate -s 10M /work/sparse; printf end >> /work/sparse
touch -d '2001-02-03 04:05:06.789' /work/old
rm -f /etc/passwd; echo changed > /etc/hostname || true
"""

# Every file of the sandbox's own, and what it deleted; no atimes and no folder times of the system's folders.
LOOK = r"""
import hashlib, os, stat
def row(path):
    i = os.lstat(path)
    kind = stat.S_IFMT(i.st_mode)
    body = b""
    if kind == stat.S_IFREG: body = open(path, "rb").read()
    if kind == stat.S_IFLNK: body = os.readlink(os.fsencode(path))
    attributes = {}
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        attributes = {n: os.getxattr(path, n) for n in sorted(os.listxattr(path)) if n.startswith("user.")}
    return (os.fsencode(path), oct(i.st_mode), i.st_uid, i.st_gid, i.st_size, i.st_mtime_ns,
            hashlib.sha256(body).hexdigest(), i.st_nlink if kind == stat.S_IFREG else 0, attributes)
rows = []
for folder, folders, files in os.walk("/work"):
    rows += [row(os.path.join(folder, n)) for n in folders + files if n != "sock"]
for row_ in sorted(rows): print(row_)
for path in ("/etc/passwd", "/usr/share/doc"): print(path, os.path.lexists(path))
"""


def config(server: RunningServer, **fields: object) -> SandboxConfig:
    return SandboxConfig.model_validate(
        {"base_url": server.url, "image": IMAGE, "memory": "256m", "cpus": 1.0, "auto_delete_seconds": 600, **fields}
    )


def info_of(server: RunningServer, sandbox_id: str | None) -> SandboxInfo:
    assert sandbox_id is not None
    with Client(server.url) as client:
        return client.get_sandbox(sandbox_id)


def wait_for(server: RunningServer, sandbox_id: str | None, state: State, seconds: float = 30.0) -> SandboxInfo:
    end = time.monotonic() + seconds
    while (info := info_of(server, sandbox_id)).state is not state:
        assert time.monotonic() < end, info
        time.sleep(0.05)
    return info


def written(sandbox: Sandbox) -> str:
    """Fill a sandbox with files of every kind; answers what they look like."""
    done = sandbox.execute(["bash", "-c", WRITE])
    assert done.exit_code == 0, done.stderr
    if sandbox.execute(["chown", "1000:1000", "/work/hard"]).exit_code == 0:  # an ordinary user has one id only
        assert sandbox.execute(["chown", "-h", "7:8", "/work/link"]).exit_code == 0
    sandbox.execute(["python3", "-c", "import os; os.setxattr('/work/old', 'user.note', b'\\0x')"])
    return look(sandbox)


def look(sandbox: Sandbox) -> str:
    done = sandbox.execute(["python3", "-c", LOOK])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_files_survive_a_restart(server: RunningServer) -> None:
    sandbox = Sandbox(config(server))
    sandbox.start()
    try:
        before = written(sandbox)
        assert "/work/deep/er/data.bin" in before and "/etc/passwd False" in before
        sandbox.create_session(CreateBashSessionRequest(session="work"))
        first = sandbox.info()
        sandbox.stop()
        stopped = sandbox.info()
        assert (stopped.state, stopped.kept, stopped.is_alive) == (State.STOPPED, True, False)
        assert stopped.stopped_at is not None and stopped.auto_delete_at == stopped.stopped_at + 600
        with pytest.raises(Expired, match="restart it"):
            sandbox.arun("true")
        sandbox.restart()
        again = sandbox.info()
        assert (again.state, again.is_alive, again.kept) == (State.RUNNING, True, False)
        assert again.created_at == first.created_at and again.stopped_at is None and again.cause is None
        assert again.started_at is not None and first.started_at is not None and again.started_at > first.started_at
        assert look(sandbox) == before
        with pytest.raises(NotFound, match="session 'work'"):
            sandbox.arun("true", session="work")
        assert sandbox.arun("echo changed > /work/old; cat /work/old").output == "changed\n"
        steps = [(s.from_state.value, s.event, s.to_state.value) for s in again.state_history]
        assert steps == [
            ("pending", "launched", "running"), ("running", "stop", "stopping"), ("stopping", "destroyed", "stopped"),
            ("stopped", "restart", "pending"), ("pending", "launched", "running"),
        ]  # fmt: skip
    finally:
        sandbox.delete()


def test_without_the_wish_nothing_is_kept(server: RunningServer) -> None:
    for fields in ({"auto_delete_seconds": None}, {"auto_delete_seconds": 0}):
        sandbox = Sandbox(config(server, **fields))
        sandbox.start()
        sandbox.stop()
        with pytest.raises(Conflict, match=r"deleted when it stopped.*auto_delete_seconds"):
            sandbox.restart()
    with pytest.raises(Unsupported, match="cannot keep the files"):
        Sandbox(config(server, image="host", runtime="process")).start()
    with pytest.raises((InvalidConfig, ValueError), match="exclude each other"):
        Sandbox(config(server, auto_archive_seconds=5)).start()


def test_twenty_restarts_leave_nothing_behind(server: RunningServer) -> None:
    sandbox = Sandbox(config(server))
    sandbox.start()
    sandbox.stop()
    before = server.inventory()  # of a sandbox at rest
    sandbox.restart()
    for number in range(20):
        sandbox.arun(f"echo {number} >> /root/lives; rm -rf /tmp/*; mkdir -p /tmp/{number}")
        sandbox.stop()
        server.assert_clean(before)
        sandbox.restart()
    assert sandbox.arun("cat /root/lives").output == "".join(f"{n}\n" for n in range(20))
    assert len(sandbox.info().state_history) == 85
    sandbox.stop()
    sandbox.delete()


def test_who_restarts_at_the_same_time(server: RunningServer) -> None:
    sandbox = Sandbox(config(server))
    sandbox.start()
    sandbox.stop()
    outcomes: list[str] = []

    def call(key: str) -> None:
        try:
            with Client(server.url) as client:
                client.transport.json("POST", f"/v1/sandboxes/{sandbox.sandbox_id}/restart?wait=30", key=key)
            outcomes.append("ran")
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=call, args=(f"key-{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["conflict"] * 5 + ["ran"]
    winner = sandbox.info().state_history[-2].key
    outcomes.clear()
    call(str(winner))  # its answer got lost: it asks again
    assert outcomes == ["ran"] and sandbox.info().is_alive
    sandbox.delete()


def test_a_restart_of_what_runs_and_of_what_nobody_knows(server: RunningServer) -> None:
    with Sandbox(config(server)) as sandbox:
        with pytest.raises(Conflict, match=r"running.*stop it first"):
            sandbox.restart()
        with Client(server.url) as client, pytest.raises(NotFound):
            client.restart_sandbox("nobody")
    sandbox.delete()


def test_what_ended_by_itself_can_be_restarted(server: RunningServer) -> None:
    sandbox = Sandbox(config(server, timeout=1.0))
    sandbox.start()
    sandbox.arun("echo kept > /root/file")
    assert wait_for(server, sandbox.sandbox_id, State.STOPPED).cause is Cause.DEADLINE
    sandbox.restart()
    assert sandbox.arun("cat /root/file").output == "kept\n"
    sandbox.delete()


def test_its_time_is_over(server: RunningServer) -> None:
    sandbox = Sandbox(config(server, auto_delete_seconds=1))
    sandbox.start()
    sandbox.stop()
    gone = wait_for(server, sandbox.sandbox_id, State.DELETED)
    assert gone.deleted_at is not None and gone.stopped_at is not None and gone.deleted_at >= gone.stopped_at + 1
    assert wait_until(lambda: not info_of(server, sandbox.sandbox_id).kept)
    with pytest.raises(Conflict):
        sandbox.restart()
    sandbox.delete()
    with pytest.raises(NotFound):
        info_of(server, sandbox.sandbox_id)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_lists_have_no_history_unless_asked(server: RunningServer) -> None:
    with Sandbox(config(server, labels={"list": "yes"})) as sandbox, Client(server.url) as client:
        assert [i.state_history for i in client.list_sandboxes(label="list=yes")] == [[]]
        (told,) = client.list_sandboxes(label="list=yes", history="1")
        assert [step.event for step in told.state_history] == ["launched"]
    sandbox.delete()


# ---- a crash of the server ------------------------------------------------------------------------------------------


def test_kept_files_survive_a_crash(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    stopped, running = Sandbox(config(server)), Sandbox(config(server))
    for sandbox in (stopped, running):
        sandbox.start()
    before = written(stopped)
    stopped.stop()
    server.kill()
    server.start()
    for sandbox in (stopped, running):
        sandbox.url = server.url
    stopped.restart()
    assert look(stopped) == before
    assert running.arun("echo alive").output == "alive\n"


@pytest.mark.parametrize("delay", [0.01, 0.1, *(pytest.param(n, marks=pytest.mark.long) for n in (0.0, 0.03))])
def test_a_crash_in_the_middle_of_stops_and_restarts(own_server: Callable[..., RunningServer], delay: float) -> None:
    """Whatever was under way: afterwards each one runs or can be restarted, with its files."""
    server = own_server()
    sandboxes = [Sandbox(config(server)) for _ in range(4)]
    for sandbox in sandboxes:
        sandbox.start()
        sandbox.arun("echo kept > /root/file")
    for sandbox in sandboxes[2:]:
        sandbox.stop()

    def act(work: Callable[[], object]) -> None:
        try:
            work()
        except RockError:
            pass

    works = [*(s.stop for s in sandboxes[:2]), *(s.restart for s in sandboxes[2:])]
    threads = [threading.Thread(target=act, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(delay)
    server.kill()
    for thread in threads:
        thread.join(30)
    server.start()
    for sandbox in sandboxes:
        sandbox.url = server.url
        assert wait_until(lambda s=sandbox: s.info().state in (State.RUNNING, State.STOPPED))  # type: ignore[misc]
        if sandbox.info().state is State.STOPPED:
            sandbox.restart()
        assert sandbox.arun("cat /root/file").output == "kept\n"


def test_a_worker_that_lost_the_files_says_so(own_server: Callable[..., RunningServer]) -> None:
    from rock.guest.init.remove import remove_tree

    server = own_server()
    sandbox = Sandbox(config(server))
    sandbox.start()
    sandbox.stop()
    members = members_of(server.pid)
    server.kill()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in members))
    for home in homes(server.home):
        for slot in (home / "run" / "namespace").glob("n-*"):
            remove_tree(str(slot))
    server.start()
    sandbox.url = server.url
    until(lambda: not sandbox.info().kept)  # a rocklet process reports it when it has joined
    told = sandbox.info()
    assert (told.state, told.kept, told.auto_delete_at) == (State.STOPPED, False, None)
    assert told.reason is not None and "its files are gone" in told.reason
    with pytest.raises(Conflict, match="its files are gone"):
        sandbox.restart()
