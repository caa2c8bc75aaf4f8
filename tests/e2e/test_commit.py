"""Images made of sandboxes: with what they wrote, in a registry and back, whatever happens meanwhile."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.e2e.test_images import small_root
from tests.e2e.test_kept_files import config, look, wait_until, written
from tests.image.registries import USER, Odd, docker_registry, odd_registry

from rock.errors import Conflict, ImageError, InvalidConfig, NotFound, ServerError, Unauthorized, Unsupported, from_wire
from rock.images.store import ImageStore
from rock.protocol.sandbox import CommitError, CommitPhase, CommitStatus
from rock.sync import Sandbox

PROGRAMS = ("chmod", "chown", "find", "ln", "mkdir", "mkfifo", "rm", "sleep", "sha256sum", "stat", "touch")
CHANGE = r"""
set -e
mkdir -p /work/deep /work/empty; chmod 1777 /work/empty
echo new > /work/deep/file; chmod 4751 /work/deep/file; ln /work/deep/file /work/hard
ln -s ../../../etc/passwd /work/link; mkfifo -m 620 /work/fifo
touch -d '2001-02-03 04:05:06.789' /work/old
rm /given/deleted; rm -r /given/again; mkdir /given/again; echo 1 > /given/again/only
chmod 711 /given/moved; echo changed >> /given/changed
"""
LOOK = r"""find /work /given -printf '%p %y %M %U %G %n %l ' \( -type d -printf '\n' -o -printf '%s %T@\n' \) | sort
find /work /given -type f -exec sha256sum {} + | sort"""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "registry"
    folder.mkdir()
    with docker_registry(folder) as address:
        yield address


def base_of(server: RunningServer, tmp_path: Path, name: str) -> ImageStore:
    """A small system under that name on the server's machine."""
    root = small_root(tmp_path / "root", *PROGRAMS, "sort")
    for path, text in (("deleted", "x"), ("again/old", "x"), ("moved", "y"), ("changed", "z\n")):
        (root / "given" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "given" / path).write_text(text)
    store = ImageStore(server.home / "images")
    store.import_any(root, name)
    return store


def box(server: RunningServer, image: str, **more: object) -> Sandbox:
    return Sandbox(config(server, image=image, auto_delete_seconds=None, **more))


def seen(sandbox: Sandbox, script: str = LOOK) -> str:
    done = sandbox.execute(["bash", "-c", script])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_pushed_and_pulled_again(own_server: Callable[..., RunningServer], tmp_path: Path, registry: str) -> None:
    server = own_server()
    base, child = f"{registry}/team/base:1", f"{registry}/team/child:1"
    store = base_of(server, tmp_path, base)
    with box(server, base) as sandbox:
        seen(sandbox, CHANGE)
        if os.geteuid() == 0:
            seen(sandbox, "chown 7:8 /work/hard; chown -h 1000:1000 /work/link")
        before = seen(sandbox)
        status = sandbox.commit(child, push=True)
        assert (status.phase, status.image_tag, status.error) == (CommitPhase.SUCCEEDED, child, None)
        assert status.pushed_digest is not None and status.completed_at is not None
        assert sandbox.get_commit_status() == status == sandbox.info().commit
        assert seen(sandbox) == before
    with box(server, child) as here:  # it is on this machine, too
        assert seen(here) == before
    made, parent = store.inspect(child), store.inspect(base)
    assert made.layers[:-1] == parent.layers and made.env == parent.env | made.env
    store.remove(child)
    store.remove(base)
    # A server holds a layer for a moment longer; the skeleton of `host` stays.
    assert wait_until(lambda: store.gc() >= 0 and len(list((store.folder / "layers").iterdir())) <= 1)
    with box(server, child) as back:
        assert seen(back) == before
        assert "/given/deleted" not in before and "/given/again/old" not in before
        assert store.inspect(child).digest == status.pushed_digest
        seen(back, "echo more > /work/more")
        again = back.commit(f"{registry}/team/grandchild:1", push=True)
        assert again.phase is CommitPhase.SUCCEEDED
    store.remove(f"{registry}/team/grandchild:1")
    with box(server, f"{registry}/team/grandchild:1") as third:
        assert seen(third, "cat /work/more") == "more\n"
        assert len(store.inspect(f"{registry}/team/grandchild:1").layers) == 3
    assert not list((store.folder / "tmp").iterdir())


def test_of_this_machines_own_system(server: RunningServer) -> None:
    """It stays that system, with one more layer on top; and again."""
    store = ImageStore(server.home / "images")
    with box(server, IMAGE) as sandbox:
        before = written(sandbox)
        sandbox.arun("mkdir -p /usr/share/__pycache__ 2>/dev/null; true")
        first = sandbox.commit("team/first:1")
        assert first.image_digest and first.pushed_digest is None
        with pytest.raises(Unsupported, match="no registry can hold"):
            sandbox.commit("localhost:1/team/first:1", push=True)
        failed = sandbox.get_commit_status()
        assert (failed.failed_stage, failed.error_code) == ("push", CommitError.PUSH_FAILED)
    with box(server, "team/first:1") as second:
        assert look(second) == before
        second.arun("echo 2 > /work/second; rm /work/old")
        second.commit("team/second:1")
    with box(server, "team/second:1") as third:
        assert third.arun("cat /work/second; ls /work/old").output.startswith("2\n")
        assert third.arun("test -e /work/old").exit_code == 1, "the newest layer is on top"
        assert store.inspect("team/second:1").kind == "host"
    for name in ("team/first:1", "team/second:1"):
        store.remove(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user cannot write below /usr in an image from-host")
def test_what_the_machine_shows_cannot_be_kept(server: RunningServer) -> None:
    with box(server, IMAGE) as sandbox:
        sandbox.arun("mkdir -p /usr/local/share/mine; echo 1 > /usr/local/share/mine/file", check="raise")
        with pytest.raises(Unsupported, match=r"/usr is this machine's own.*/usr/local/share/mine/file"):
            sandbox.commit("team/no:1")
        assert sandbox.arun("echo goes on").output == "goes on\n"
        assert sandbox.get_commit_status().error_code is CommitError.COMMIT_FAILED
    assert not ImageStore(server.home / "images").has("team/no:1")


def test_of_a_stopped_one(server: RunningServer) -> None:
    sandbox = Sandbox(config(server))
    sandbox.start()
    before = written(sandbox)
    sandbox.stop()
    assert sandbox.commit("team/rest:1").phase is CommitPhase.SUCCEEDED
    with box(server, "team/rest:1") as made:
        assert look(made) == before
    sandbox.restart()
    assert look(sandbox) == before
    sandbox.delete()
    with pytest.raises(NotFound):
        sandbox.commit("team/rest:1")
    ImageStore(server.home / "images").remove("team/rest:1")
    plain = box(server, IMAGE)
    plain.start()
    plain.stop()
    with pytest.raises(Conflict, match="no files here"):
        plain.commit("team/rest:1")
    plain.delete()


COUNT = """
import os
files = [os.open(f"/work/{n:03}", os.O_RDWR | os.O_CREAT) for n in range(150)]
for fd in files: os.pwrite(fd, b"x" * 1_000_000, 0)
open("/work/ready", "w").close()
n = 0
while True:
    n += 1
    for fd in files: os.pwrite(fd, b"%09d" % n, 0)
"""
COUNTED = "import glob; print(*sorted({open(f).read(9) for f in glob.glob('/work/[0-9]*')}))"


def test_who_writes_stands_still_and_goes_on(server: RunningServer) -> None:
    with box(server, IMAGE, memory="1g") as sandbox:
        sandbox.arun("mkdir /work")
        writer = sandbox.processes.start(["python3", "-c", COUNT])
        stopped = sandbox.arun("sleep 600 & kill -STOP $!; echo $!").output.split()[-1]
        state = f"cut -d ' ' -f 3 /proc/{stopped}/stat"
        assert wait_until(lambda: sandbox.arun("ls /work/ready").exit_code == 0)
        asked = threading.Thread(target=sandbox.commit, args=("team/still:1",))
        asked.start()
        during = sandbox.execute(["echo", "waits for its turn"], timeout=60)  # a new program does not spoil it
        asked.join()
        assert during.stdout == "waits for its turn\n"
        assert sandbox.get_commit_status().phase is CommitPhase.SUCCEEDED
        assert sandbox.arun(state).output.strip() == "T", "it was stopped before, and stays so"
        read = "print(open('/work/149').read(9))"
        first = sandbox.execute(["python3", "-c", read]).stdout
        assert wait_until(lambda: sandbox.execute(["python3", "-c", read]).stdout > first), "it goes on"
        writer.signal(9)
    with box(server, "team/still:1") as made:
        values = [int(value) for value in made.execute(["python3", "-c", COUNTED]).stdout.split()]
        assert len(values) <= 2 and values[-1] - values[0] <= 1, "all files are of one moment"
    ImageStore(server.home / "images").remove("team/still:1")


def test_names_and_one_at_a_time(server: RunningServer) -> None:
    with box(server, IMAGE) as sandbox:
        with pytest.raises(NotFound, match="has no commit"):
            sandbox.get_commit_status()
        for name in ("a/UPPER", "host", "localhost/rock-build:x", "a@sha256:" + "0" * 64, "x\0y", "a/b\n:1"):
            with pytest.raises(InvalidConfig):
                sandbox.commit(name)
        sandbox.arun("mkdir /work; for i in {1..3000}; do echo > /work/$i; done")
        first = sandbox.commit_async("team/once:1")
        assert first.phase is CommitPhase.RUNNING
        again = sandbox.commit_async("team/once:1")
        if again.phase is CommitPhase.RUNNING:
            assert again.started_at == first.started_at
        try:
            sandbox.commit_async("team/other:1")
        except Conflict as error:
            assert "team/once:1" in error.message
        else:
            assert sandbox.get_commit_status().image_tag == "team/other:1", "the first was over by then"
        assert wait_until(lambda: sandbox.get_commit_status(5).phase is CommitPhase.SUCCEEDED)
    store = ImageStore(server.home / "images")
    for name in ("team/once:1", "team/other:1"):
        if store.has(name):
            store.remove(name)


@pytest.mark.parametrize("size", [300 << 20, pytest.param(3 << 30, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_what_no_layer_can_have(server: RunningServer, size: int) -> None:
    with box(server, IMAGE) as sandbox:
        sandbox.arun("mkdir /work; touch /work/.wh.name; truncate -s 1T /work/huge")
        with pytest.raises(InvalidConfig, match=r"over the limit|begins with \.wh\."):
            sandbox.commit("team/no:1")
        sandbox.arun(f"rm /work/.wh.name; truncate -s {size} /work/huge")
        assert sandbox.commit("team/holes:1").phase is CommitPhase.SUCCEEDED
    store = ImageStore(server.home / "images")
    with box(server, "team/holes:1") as made:
        assert made.arun("stat -c '%s %b' /work/huge").output.startswith(f"{size} ")
        assert int(made.arun("stat -c %b /work/huge").output) < 10_000, "zeros take no room"
    store.remove("team/holes:1")


def test_a_login_that_is_not_taken(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = own_server()
    folder = tmp_path / "closed"
    folder.mkdir()
    with docker_registry(folder, login=True) as address:
        name = f"{address}/team/child:1"
        store = base_of(server, tmp_path, "base:1")
        with box(server, "base:1") as sandbox:
            with pytest.raises(Unauthorized, match="refuses"):
                sandbox.commit(name, USER.username, "a wrong secret")
            status = sandbox.get_commit_status()
            assert (status.failed_stage, status.error_code) == ("login", CommitError.LOGIN_FAILED)
            assert not store.has(name), "nothing was made"
            with pytest.raises(ImageError, match="without a login"):
                sandbox.commit(name, push=True)
            status = sandbox.get_commit_status()
            assert (status.failed_stage, status.error_code) == ("push", CommitError.PUSH_FAILED)
            assert sandbox.commit(name, USER.username, USER.password).pushed_digest
            kept = [path for path in server.home.rglob("*") if path.is_file() and not path.is_symlink()]
            for secret in (USER.password, "a wrong secret"):
                assert not [path for path in kept if secret.encode() in path.read_bytes()]
        store.remove(name)
        with Sandbox(config(server, image=name, auto_delete_seconds=None, registry_username=USER.username,
                            registry_password=USER.password)) as back:  # fmt: skip
            assert seen(back, "cat /given/moved") == "y"


class Silent(Odd):
    """Takes an upload and never says so."""

    began = threading.Event()
    ended = threading.Event()

    def do_POST(self) -> None:
        self.began.set()
        self.ended.wait(100)
        self.close_connection = True

    def answer(self, path: str) -> bool:
        self.send(404, b"")
        return True


def lost(server: RunningServer, sandbox: Sandbox, number: int = signal.SIGKILL) -> CommitStatus:
    """The server is ended by a signal and started again; what became of the commit."""
    sandbox_id = sandbox.sandbox_id
    assert server.process is not None
    server.process.send_signal(number)
    assert server.process.wait(30) == (0 if number == signal.SIGTERM else -number), server.log()
    server.start(urlsplit(server.url).port or 0)
    info = Sandbox(base_url=server.url).attach(sandbox_id).info()
    assert info.commit is not None
    with pytest.raises(ServerError, match="the server ended"):
        raise_error(info.commit)
    return info.commit


def raise_error(status: CommitStatus) -> None:
    raise from_wire(status.error)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_of_the_server_while_it_is_pushed(
    own_server: Callable[..., RunningServer], tmp_path: Path, number: int
) -> None:
    server = own_server()
    store = base_of(server, tmp_path, "base:1")
    Silent.began.clear()
    Silent.ended.clear()
    with odd_registry(Silent, {"x": b""}) as address, box(server, "base:1") as sandbox:
        try:
            sandbox.commit_async(f"{address}/team/tool:1", push=True)
            assert Silent.began.wait(60)
            status = lost(server, sandbox, number)
        finally:
            Silent.ended.set()
        assert (status.phase, status.error_code) == (CommitPhase.FAILED, CommitError.PROCESS_LOST)
        if os.environ["ROCK_PROCESSES"] != "1":  # one of a killed server may have ended after the next one looked
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0, server.log()
            server.start(urlsplit(server.url).port or 0)
        assert not list((store.folder / "tmp").iterdir()), "nothing half-made is left"
        assert seen(sandbox, "cat /given/moved") == "y"
        assert sandbox.commit("team/after:1").phase is CommitPhase.SUCCEEDED


def state_of(command: bytes) -> str:
    """Of the process of this machine that has this command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes() == command:
                return (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
    return ""


def test_a_crash_while_it_is_packed(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    """Nobody stands still for ever."""
    server = own_server()
    with box(server, IMAGE) as sandbox:
        sandbox.processes.start(["sleep", "8765.4321"])
        many = "import os\nos.mkdir('/work')\nfor n in range(15000): open(f'/work/{n}', 'w').close()"
        assert sandbox.execute(["python3", "-c", many]).exit_code == 0
        command = b"sleep\x008765.4321\x00"
        assert state_of(command) == "S"
        sandbox.commit_async("team/lost:1")
        assert wait_until(lambda: state_of(command) == "T", 60)
        status = lost(server, sandbox)
        assert status.error_code is CommitError.PROCESS_LOST
        assert wait_until(lambda: state_of(command) == "S", 60)
        store = ImageStore(server.home / "images")
        assert not store.has("team/lost:1") and not list((store.folder / "tmp").iterdir())
        assert sandbox.arun("rm -r /work; echo goes on").output == "goes on\n"
        assert sandbox.commit("team/lost:1").phase is CommitPhase.SUCCEEDED


def test_stopped_meanwhile(server: RunningServer) -> None:
    """A commit of a sandbox that is stopped fails, or was done before; nothing of it is left either way."""
    store = ImageStore(server.home / "images")
    for _ in range(3):
        with box(server, IMAGE) as sandbox:
            sandbox.execute(["python3", "-c", "for n in range(5000): open(f'/tmp/{n}', 'w').close()"])
            sandbox.commit_async("team/gone:1")
        status = sandbox.get_commit_status(30)
        assert status.phase is not CommitPhase.RUNNING, status
        if status.phase is CommitPhase.SUCCEEDED:
            with box(server, "team/gone:1") as made:
                assert made.arun("ls /tmp | wc -l").output.strip() == "5000"
            store.remove("team/gone:1")
        assert not store.has("team/gone:1")
        assert not list((store.folder / "tmp").iterdir())


# ---- ROCK's dialect -------------------------------------------------------------------------------------------------


def asked(server: RunningServer, method: str, path: str, body: object = None) -> dict[str, object]:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    data = None if body is None else json.dumps(body)
    connection.request(method, f"/apis/envs/sandbox/v1{path}", data, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    found: dict[str, object] = json.loads(answer.read())
    connection.close()
    return found


def test_the_dialect(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    server = own_server()
    store = base_of(server, tmp_path, "base:1")
    folder = tmp_path / "closed"
    folder.mkdir()
    with docker_registry(folder, login=True) as address, box(server, "base:1") as sandbox:
        id = sandbox.sandbox_id
        none = asked(server, "GET", f"/commit/{id}")
        assert none["status"] == "Failed" and none["message"] == "get commit status failed"
        assert "STATUS_NOT_FOUND" in str(none["error"])
        name = f"{address}/team/child:1"
        spec = {"sandbox_id": id, "image_tag": name, "username": USER.username, "password": USER.password}
        began = asked(server, "POST", "/commit", spec)
        assert began["status"] == "Success"
        while (status := asked(server, "GET", f"/commit/{id}")["result"])["phase"] == "RUNNING":
            time.sleep(0.1)
        assert set(status) == {"sandbox_id", "image_tag", "phase", "started_at", "completed_at", "exit_code",
                               "failed_stage", "error_code", "error_message"}  # fmt: skip
        assert (status["sandbox_id"], status["image_tag"], status["phase"]) == (id, name, "SUCCEEDED")
        assert status["exit_code"] == 0 and status["error_code"] is status["error_message"] is None
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", status["started_at"])
        assert ImageStore(tmp_path / "other").pull(name, USER).layers
        asked(server, "POST", "/commit", {**spec, "password": "wrong"})
        while (status := asked(server, "GET", f"/commit/{id}")["result"])["phase"] == "RUNNING":
            time.sleep(0.1)
        assert (status["phase"], status["failed_stage"], status["error_code"]) == ("FAILED", "login", "LOGIN_FAILED")
        assert status["exit_code"] == 1 and "refuses" in status["error_message"]
        asked(server, "POST", "/commit", {**spec, "image_tag": "plain:1"})  # names no registry: stays here
        assert wait_until(lambda: store.has("plain:1"))
    gone = asked(server, "POST", "/commit", {**spec, "sandbox_id": "nobody"})
    assert gone["status"] == "Failed" and "SANDBOX_NOT_FOUND" in str(gone["error"])
    wrong = asked(server, "POST", "/commit", {**spec, "image_tag": "a\u2028b"})
    assert wrong["status"] == "Failed" and "image_tag" in str(wrong["error"])
