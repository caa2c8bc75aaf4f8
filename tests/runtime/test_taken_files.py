"""Files that the server reads and removes without pid 1: what a sandbox may have put in their place."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rock.guest.init import process_tree
from rock.runtime.namespace.layers.snapshots import taken_file


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on the file system of the root, without a link in its path."""
    found = Path(os.path.realpath(tempfile.mkdtemp(prefix="rock-taken-")))
    if os.stat(found).st_dev != os.stat("/").st_dev:
        shutil.rmtree(found)
        found = Path(tempfile.mkdtemp(prefix="rock-taken-", dir="/var"))
    yield found
    shutil.rmtree(found)


def taken(path: Path, most: int = 100) -> bytes | None:
    entry = process_tree.read(os.getpid())
    assert entry is not None
    return taken_file(os.getpid(), entry.start, str(path), most)


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="/proc/PID/root of a sandbox is for root")


def test_a_file_is_read_and_removed(folder: Path) -> None:
    for size in (0, 5, 100, 70_000):
        (folder / "state").write_bytes(b"x" * size)
        assert taken(folder / "state", 1 << 20) == b"x" * size
        assert not (folder / "state").exists()
    (folder / "state").write_bytes(b"x" * 500)
    assert taken(folder / "state", 100) == b"x" * 100
    assert taken(folder / "state") is None  # it is gone


def test_other_files_are_left_alone(folder: Path) -> None:
    (folder / "file").write_bytes(b"x")
    (folder / "link").symlink_to(folder / "file")
    (folder / "inner").mkdir()
    (folder / "way").symlink_to(folder / "inner")
    (folder / "inner/file").write_bytes(b"x")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    for name in ("link", "way/file", "inner", "fifo", "socket", "missing", "missing/file", "../../proc/self/stat"):
        assert taken(folder / name) is None, name
    assert sorted(os.listdir(folder)) == ["fifo", "file", "inner", "link", "socket", "way"]
    assert os.listdir(folder / "inner") == ["file"]


def test_a_file_of_another_mount_is_left_alone() -> None:
    assert taken(Path("/proc/self/stat")) is None
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        assert taken(Path(file.name)) is None and os.path.exists(file.name)


def test_a_lease_delays_nothing(folder: Path) -> None:
    """A process with a lease could make an open wait for 45 seconds."""
    (folder / "state").write_bytes(b"x")
    fd = os.open(folder / "state", os.O_RDWR)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(writing, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(fd)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"x"  # it has the lease
        assert taken(folder / "state") is None and (folder / "state").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)


def test_another_process_with_the_number_is_not_the_sandbox(folder: Path) -> None:
    (folder / "state").write_bytes(b"x")
    assert taken_file(os.getpid(), 1, str(folder / "state"), 100) is None
    assert (folder / "state").exists()
