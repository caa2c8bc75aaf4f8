"""A server's files: checked, copied, restored, lost, and on a full disk. Real servers, killed with SIGKILL."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.world import Server, World

from rock.errors import RockError, StorageFull, Unavailable
from rock.sync import Sandbox, SandboxConfig

SEED = 20_261


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("process", tmp_path_factory.mktemp("world"))
    yield made
    made.close()


@pytest.fixture
def server(world: World) -> Server:
    world.server.ensure()
    return world.server


def box_of(server: Server) -> Sandbox:
    return Sandbox(SandboxConfig(base_url=server.url, image="host", runtime="process"))


def rock(home: Path, *words: str, status: int = 0, **environ: str) -> str:
    """A command of the CLI for a home; its output."""
    done = subprocess.run([sys.executable, "-m", "rock.cli.main", *words], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "ROCK_HOME": str(home), "ROCK_RUNTIME": "process", "ROCK_POOL_SIZE": "0",
                               **environ})  # fmt: skip
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return done.stdout + done.stderr


def doctor(home: Path, *words: str, status: int = 0) -> list[dict[str, Any]]:
    told = json.loads(rock(home, "doctor", "store", "--json", *words, status=status))
    assert told["ok"] == (status == 0)
    return [one for one in told["findings"] if not one["ok"]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_whole_home_has_no_findings(server: Server) -> None:
    with box_of(server) as box:
        box.arun("echo text")
        box.processes.start("echo text").wait()
        assert doctor(server.home, "--images") == []  # under a running server
        server.kill()
        assert doctor(server.home, "--images") == []
        server.start()
        assert box.arun("echo on").output == "on\n"


def test_what_is_damaged_is_found_and_moved(server: Server) -> None:
    boxes = [box_of(server) for _ in range(3)]
    for box in boxes:
        box.start()
        box.arun("echo text")
    run = server.home / "run"
    server.kill()
    names = [box.sandbox_id or "" for box in boxes]
    folders = [run / "spools" / json.loads((run / "records" / name).read_text())["spools"] for name in names]
    record = run / "records" / names[0]
    record.write_bytes(record.read_bytes()[:-5])
    journal = folders[1] / "journal"
    os.truncate(journal, journal.stat().st_size - 7)
    output = next(folders[2].glob("*.out"))
    data = bytearray(output.read_bytes())
    data[-2] ^= 1
    output.write_bytes(data)
    (run / "logs" / "of-nobody" / "p").mkdir(parents=True)
    kinds = {one["kind"]: one for one in doctor(server.home, status=1)}
    assert set(kinds) == {"record", "journal", "output", "orphan"}
    assert names[0] in kinds["record"]["detail"] and kinds["journal"]["path"] == str(journal)
    assert "5 bytes" in kinds["output"]["detail"]
    assert record.exists()  # looking changes nothing
    kinds = {one["kind"]: one for one in doctor(server.home, "--repair", status=1)}
    for kind, size in (("record", None), ("orphan", None)):
        assert Path(kinds[kind]["repaired"]).exists(), size
    assert not record.exists() and not (run / "logs" / "of-nobody").exists()
    server.start()
    with pytest.raises(RockError):
        boxes[0].arun("true")
    for box in boxes[1:]:
        assert box.arun("echo on").output == "on\n"
        box.close()
    assert doctor(server.home) == []


def test_a_repair_needs_a_stopped_server(server: Server) -> None:
    assert "rock admin stop --keep" in rock(server.home, "doctor", "store", "--repair", status=1)


@pytest.mark.parametrize("damage", ["header", "middle", "cut"])
def test_a_damaged_database_is_found(server: Server, tmp_path: Path, damage: str) -> None:
    for _ in range(3):
        box_of(server).close()
    with box_of(server):
        rock(server.home, "admin", "backup", str(tmp_path / "backup"))
    home = tmp_path / "home"
    home.mkdir()
    rock(home, "admin", "restore", str(tmp_path / "backup"))
    store = home / "rock.sqlite"
    data = bytearray(store.read_bytes())
    if damage == "header":
        data[:100] = bytes(100)
    elif damage == "middle":
        for at in random.Random(SEED).sample(range(4096, len(data)), 400):
            data[at] ^= 0x55
    store.write_bytes(data[:len(data) // 2] if damage == "cut" else data)
    assert {one["kind"] for one in doctor(home, status=1)} == {"store"}


def test_a_backup_is_consistent_under_load_and_goes_back(server: Server, tmp_path: Path) -> None:
    with box_of(server) as first:
        first.arun("echo state > /tmp/state-of-first; x=1")
        file = tmp_path / "backup"
        extra = [box_of(server) for _ in range(5)]
        with subprocess.Popen([sys.executable, "-m", "rock.cli.main", "admin", "backup", str(file)],
                              env={**os.environ, "ROCK_HOME": str(server.home)}) as copying:
            for box in extra:
                box.start()
            assert copying.wait(60) == 0
        assert file.stat().st_mode & 0o777 == 0o600
        refused = rock(server.home, "admin", "restore", str(file), status=1)
        assert "a server runs" in refused
        for box in extra:
            box.close()
        rock(server.home, "admin", "backup", str(file))
        late = box_of(server)
        late.start()
        server.kill()
        assert "is newer than the backup" in rock(server.home, "admin", "restore", str(file), status=1)
        rock(server.home, "admin", "restore", str(file), "--force")
        assert list(server.home.glob("rock.sqlite.replaced-*"))
        # One sandbox is younger than the backup: it is not ended in silence.
        told = rock(server.home, "admin", "start", "--port", str(server.port), status=1)
        assert "1 sandboxes are there" in told and "--adopt" in told
        rock(server.home, "admin", "start", "--port", str(server.port), "--adopt")
        assert first.arun("echo $x; cat /tmp/state-of-first").output == "1\nstate\n"
        assert late.arun("echo on").output == "on\n"
        late.close()
        rock(server.home, "admin", "stop", "--keep")
        server.start()


def test_a_backup_that_is_none(server: Server, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (tmp_path / "text").write_text("text")
    assert "is no backup" in rock(home, "admin", "restore", str(tmp_path / "text"), status=1)
    assert "there is no file" in rock(home, "admin", "restore", str(tmp_path / "none"), status=1)
    told = rock(home, "admin", "backup", str(tmp_path / "b"), status=1, ROCK_STORE="postgresql://u@127.0.0.1:1/x")
    assert "pg_dump" in told
    rock(server.home, "admin", "backup", str(tmp_path / "whole"))
    data = (tmp_path / "whole").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "cut").write_bytes(data[:int(share * len(data))])
        assert "backup" in rock(home, "admin", "restore", str(tmp_path / "cut"), status=1)
    assert not (home / "rock.sqlite").exists()


def reserved(server: Server) -> bool:
    file = server.home / "reserve"
    return file.exists() and file.stat().st_size > 0


def lose_store(home: Path) -> None:
    for path in home.glob("rock.sqlite*"):
        path.unlink()


@pytest.mark.parametrize("way", ["--adopt", "--abandon", "backup", "replaced"])
def test_a_store_that_is_gone_ends_nothing(server: Server, tmp_path: Path, way: str) -> None:
    """It started empty and killed every sandbox without a word."""
    box = box_of(server)
    box.start()
    box.arun("x=kept")
    pid = box.processes.start(["sleep", "600"]).info.pid
    rock(server.home, "admin", "backup", str(tmp_path / "backup"))
    server.kill()
    lose_store(server.home)
    if way == "replaced":
        other = tmp_path / "other"
        rock(other, "admin", "start", "--port", "0")
        rock(other, "admin", "stop")
        shutil.copy(other / "rock.sqlite", server.home / "rock.sqlite")
    told = rock(server.home, "admin", "start", "--port", str(server.port), status=1)
    assert "1 sandboxes are there" in told and "rock admin restore" in told
    assert alive(pid)
    if way in ("backup", "replaced"):
        rock(server.home, "admin", "restore", str(tmp_path / "backup"), "--force")
        server.start()
    else:
        rock(server.home, "admin", "start", "--port", str(server.port), way)
        if way == "--abandon":
            with pytest.raises(RockError):
                box.arun("true")
            end = time.monotonic() + 10
            while alive(pid) and time.monotonic() < end:
                time.sleep(0.05)
            assert not alive(pid)
        rock(server.home, "admin", "stop", "--keep")
        server.start()  # the new store is the right one from then on
    if way != "--abandon":
        assert box.arun("echo $x").output == "kept\n" and alive(pid)
        box.close()
        assert not alive(pid)


def test_a_store_that_is_removed_under_a_server(server: Server, tmp_path: Path) -> None:
    """Creates went on and were lost at the next start."""
    with box_of(server) as box:
        rock(server.home, "admin", "backup", str(tmp_path / "backup"))
        lose_store(server.home)
        with pytest.raises(Unavailable) as told:
            box_of(server).start()
        assert "was removed or replaced while the server runs" in str(told.value)
        assert box.arun("echo on").output == "on\n"
        server.kill()
        rock(server.home, "admin", "restore", str(tmp_path / "backup"))
        server.start()
        assert box.arun("echo on").output == "on\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_server_that_was_killed_on_a_full_disk_starts(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "rock-test", str(folder)], check=True)
    filler = folder / "filler"
    try:
        world = World("process", folder)
        server = world.server
        box = box_of(server)
        box.start()
        end = time.monotonic() + 10
        while not reserved(server) and time.monotonic() < end:
            time.sleep(0.05)
        assert (server.home / "reserve").stat().st_blocks * 512 >= 4 << 20
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
        while os.statvfs(folder).f_bavail:
            with filler.open("ab", buffering=0) as file:
                file.write(bytes(4096))
        with pytest.raises(StorageFull) as told:
            box.processes.start("true")
        assert str(folder) not in str(told.value) and told.value.retryable
        assert box.arun("echo on").output == "on\n"
        server.kill()
        server.start()  # it did not
        assert box.arun("echo on").output == "on\n"
        with pytest.raises(StorageFull):
            box_of(server).start()
        filler.unlink()
        end = time.monotonic() + 20
        while not reserved(server) and time.monotonic() < end:
            time.sleep(0.1)
        with box_of(server) as another:
            assert another.arun("echo on").output == "on\n"
        box.close()
        world.close()
    finally:
        filler.unlink(missing_ok=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)
