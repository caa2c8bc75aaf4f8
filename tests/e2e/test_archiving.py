"""Stopped sandboxes in the archive and back: nothing is lost, nothing is left, whenever the server dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.e2e.test_kept_files import config, info_of, look, wait_for, wait_until, written

from rock.errors import Conflict, Expired, InvalidConfig, NotFound, RockError, ServerError, StartFailed, Unsupported
from rock.protocol.sandbox import State
from rock.sync import Client, Sandbox


def slots(server: RunningServer) -> list[Path]:
    return [*(server.home / "run" / "namespace").glob("n-*"), *server.home.glob("processes/*/run/namespace/n-*")]


def archives(server: RunningServer) -> list[Path]:
    folder = server.home / "archive"
    return list(folder.iterdir()) if folder.exists() else []


def stopped(server: RunningServer, **fields: object) -> tuple[Sandbox, str]:
    """A stopped sandbox with files of every kind, and what they look like."""
    sandbox = Sandbox(config(server, **fields))
    sandbox.start()
    before = written(sandbox)
    sandbox.stop()
    return sandbox, before


def test_there_and_back(server: RunningServer) -> None:
    sandbox, before = stopped(server)
    sandbox.archive()
    info = sandbox.info()
    assert (info.state, info.kept, info.is_alive) == (State.ARCHIVED, False, False)
    assert info.archive is not None and info.archive.size > 300_000 and info.archive.digest.startswith("sha256:")
    assert info.archived_at is not None and info.auto_delete_at == (info.stopped_at or 0) + 600
    assert wait_until(lambda: not slots(server))  # its worker has nothing of it any more
    (file,) = archives(server)
    assert file.stat().st_size == info.archive.size and file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Expired, match="restart it"):
        sandbox.arun("true")
    sandbox.archive()  # again is the same
    sandbox.restart()
    assert look(sandbox) == before
    again = sandbox.info()
    assert again.archive is None and again.archived_at is None and wait_until(lambda: not archives(server))
    assert [s.event for s in again.state_history][-4:] == ["archive", "archive_done", "restore", "launched"]
    assert sandbox.arun("ls /etc/passwd; stat -c %h /work/hard").output.endswith("2\n")
    sandbox.stop()
    sandbox.archive()
    sandbox.delete()
    assert not archives(server)


def test_deleted_files_and_opaque_folders_stay_so(server: RunningServer) -> None:
    """What the image has and the sandbox removed, or made anew, at / and where the image's folders are mounted."""
    look_at = "ls -A /etc | sort; ls -A /usr/share | sort | head -50; ls -A /usr/include"
    with Sandbox(config(server)) as sandbox:
        sandbox.arun("rm -rf /etc/default /etc/hosts.allow; mkdir -p /etc/default; echo 1 > /etc/default/only")
        sandbox.arun("mv /usr/share/doc /usr/share/moved; rm -rf /usr/include; mkdir /usr/include")
        sandbox.arun("echo 2 > /usr/include/only")
        before = sandbox.arun(look_at).output
        assert sandbox.arun("ls /etc/default").output == "only\n"
        sandbox.stop()
        sandbox.archive()
        sandbox.restart()
        assert sandbox.arun(look_at).output == before
        assert sandbox.arun("ls -A /etc/default").output == "only\n"
    sandbox.delete()


def test_by_itself_after_its_time(server: RunningServer) -> None:
    sandbox, before = stopped(server, auto_delete_seconds=None, auto_archive_seconds=1)
    told = sandbox.info()
    assert told.auto_archive_at == (told.stopped_at or 0) + 1 and told.auto_delete_at is None
    wait_for(server, sandbox.sandbox_id, State.ARCHIVED)
    sandbox.restart()
    assert look(sandbox) == before
    sandbox.delete()


def test_an_archive_is_deleted_when_its_time_is_over(server: RunningServer) -> None:
    sandbox = Sandbox(config(server, auto_delete_seconds=3))
    sandbox.start()
    sandbox.stop()
    sandbox.archive()
    wait_for(server, sandbox.sandbox_id, State.DELETED)
    assert wait_until(lambda: not archives(server) and info_of(server, sandbox.sandbox_id).archive is None)
    with pytest.raises(Conflict):
        sandbox.archive()
    sandbox.delete()


def test_what_cannot_be_archived(server: RunningServer) -> None:
    with Sandbox(config(server)) as sandbox:
        with pytest.raises(Conflict, match="stop it first"):
            sandbox.archive()
        for command, text in (
            ("truncate -s 1T /root/huge", "over the limit"),
            ("rm /root/huge; touch /root/.wh.name", r"begins with \.wh\."),
            ("rm /root/.wh.name; python3 -c '\nimport os\nos.chdir(\"/root\")\nfor n in range(300):\n"
             " os.mkdir(\"d\"); os.chdir(\"d\")'", "more than 256 deep"),
        ):  # fmt: skip
            sandbox.arun(command, check="raise")
            sandbox.stop()
            with pytest.raises(InvalidConfig, match=text):
                sandbox.archive()
            info = sandbox.info()
            assert (info.state, info.kept) == (State.STOPPED, True)
            assert not archives(server)
            sandbox.restart()
        sandbox.stop()
    sandbox.delete()
    plain = Sandbox(config(server, auto_delete_seconds=None))
    plain.start()
    plain.stop()
    with pytest.raises(Conflict, match="left no files"):
        plain.archive()
    plain.delete()


def test_a_server_without_an_archive(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_ARCHIVE="off")
    with pytest.raises(Unsupported, match="ROCK_ARCHIVE"):
        Sandbox(config(server, auto_delete_seconds=None, auto_archive_seconds=5)).start()
    with Sandbox(config(server)) as sandbox:
        sandbox.stop()
        with pytest.raises(Unsupported, match="ROCK_ARCHIVE"):
            sandbox.archive()


def test_a_damaged_archive_is_not_restored(server: RunningServer) -> None:
    sandbox, before = stopped(server)
    sandbox.archive()
    (file,) = archives(server)
    whole = file.read_bytes()
    for damaged in (whole[:-5000], whole + b"x" * 512, whole[:9000] + b"\x01" + whole[9001:], b"", b"\0" * len(whole)):
        file.write_bytes(damaged)
        with pytest.raises(RockError, match=r"not what was archived|could not be unpacked"):
            sandbox.restart()
        info = sandbox.info()
        assert info.state is State.ARCHIVED and info.archive is not None
        assert wait_until(lambda: not slots(server))
    file.unlink()
    with pytest.raises(NotFound, match="no archive"):
        sandbox.restart()
    file.write_bytes(whole)
    sandbox.restart()
    assert look(sandbox) == before
    sandbox.delete()


def test_a_stop_while_it_is_restored(server: RunningServer) -> None:
    sandbox, before = stopped(server)
    sandbox.archive()
    failures: list[BaseException] = []

    def call() -> None:
        try:
            sandbox.restart()
        except (RockError, StartFailed) as error:
            failures.append(error)

    with Client(server.url) as client:
        for delay in (0.0, 0.02, 0.1):
            thread = threading.Thread(target=call)
            thread.start()
            time.sleep(delay)
            client.stop_sandbox(str(sandbox.sandbox_id))
            thread.join(30)
            assert wait_until(lambda: sandbox.info().state in (State.ARCHIVED, State.STOPPED, State.RUNNING))
            if sandbox.info().state is State.RUNNING:  # the stop came before the restart
                sandbox.stop()
            if sandbox.info().state is State.STOPPED:
                sandbox.archive()
    sandbox.restart()
    assert look(sandbox) == before
    sandbox.delete()


@pytest.mark.parametrize("delay", [0.02, 0.15, *(pytest.param(n, marks=pytest.mark.long) for n in (0.0, 0.06, 0.4))])
def test_a_crash_while_it_is_archived_or_restored(own_server: Callable[..., RunningServer], delay: float) -> None:
    server = own_server()
    going, before = stopped(server)
    coming, _ = stopped(server)
    coming.archive()

    def act(work: Callable[[], object]) -> None:
        try:
            work()
        except RockError:
            pass

    threads = [threading.Thread(target=act, args=(work,)) for work in (going.archive, coming.restart)]
    for thread in threads:
        thread.start()
    time.sleep(delay)
    server.kill()
    for thread in threads:
        thread.join(30)
    server.start()
    done = (State.RUNNING, State.STOPPED, State.ARCHIVED)
    for sandbox in (going, coming):
        sandbox.url = server.url
        assert wait_until(lambda s=sandbox: s.info().state in done)  # type: ignore[misc]
        if sandbox.info().state is not State.RUNNING:
            sandbox.restart()
    assert look(going) == before
    assert "data.bin" in look(coming)
    assert wait_until(lambda: not archives(server)), archives(server)
    assert len(slots(server)) == 2


def test_an_archive_that_is_full(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    """Nowhere to write to: the sandbox stays stopped, with its files, and the reason is told."""
    place = tmp_path / "file"
    place.write_text("not a folder")
    server = own_server(ROCK_ARCHIVE=str(place / "archive"))
    sandbox, before = stopped(server)
    with pytest.raises(ServerError, match="cannot be accessed"):
        sandbox.archive()
    assert sandbox.info().kept
    place.unlink()
    sandbox.archive()
    sandbox.restart()
    assert look(sandbox) == before


def test_in_a_bucket(own_server: Callable[..., RunningServer], s3_endpoint: str, tmp_path: Path) -> None:
    """There and back over a real S3 server, in one piece and in several, and nothing of it left afterwards."""
    from rock.store.s3 import Bucket, S3Blobs

    url = f"s3://rock-test/{tmp_path.name}"
    server = own_server(
        ROCK_ARCHIVE=url, ROCK_S3_ENDPOINT=s3_endpoint, ROCK_S3_KEY="key", ROCK_S3_SECRET="secret"
    )
    bucket = S3Blobs(Bucket.parse(url, s3_endpoint, "us-east-1", "key", "secret"))
    sandbox, _ = stopped(server)
    sandbox.restart()
    sandbox.arun("head -c 40M /dev/urandom > /work/large", check="raise")
    before = look(sandbox)
    sandbox.stop()
    sandbox.archive()
    assert asyncio.run(bucket.list()) == [sandbox.sandbox_id]
    assert not archives(server) and wait_until(lambda: not slots(server))
    sandbox.restart()
    assert look(sandbox) == before
    assert wait_until(lambda: asyncio.run(bucket.list()) == [])
    small, before = stopped(server)
    small.archive()
    small.restart()
    assert look(small) == before
    small.stop()
    small.archive()
    small.delete()
    assert asyncio.run(bucket.list()) == []
