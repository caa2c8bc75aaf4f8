"""Files of a sandbox that only the namespace runtime has: its pid 1, its mounts, its /dev/shm."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rock import errors
from rock.images.records import Bind
from tests.runtime.boxes import HandMade, get, namespace_box, put, run


def test_pid_1_is_closed_to_file_operations_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/fd/3", "/proc/1/root/etc/passwd"):
                with pytest.raises((errors.PermissionDenied, errors.NotFound)):
                    await b.runtime.open_read(b.handle, path)
            with pytest.raises((errors.PermissionDenied, errors.InvalidConfig)):
                await b.runtime.open_write(b.handle, "/proc/sys/kernel/core_pattern")
            with pytest.raises(errors.PermissionDenied):
                await b.runtime.open_write(b.handle, "/usr/bin/bash")
            with pytest.raises(errors.InvalidConfig):
                await b.runtime.open_read(b.handle, "/dev/null")

    run(main())


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            fd, token = await b.runtime.open_write(b.handle, "/dev/shm/big")
            with pytest.raises(OSError, match="No space"):
                while True:
                    os.write(fd, bytes(1 << 20))
            os.close(fd)
            await b.runtime.abort_write(b.handle, token)
            assert await b.runtime.list(b.handle, "/dev/shm") == []

    run(main())


def test_mount_points_are_written_in_place(tmp_path: Path) -> None:
    """What is mounted onto a file cannot be renamed over; it is written in place then."""
    images = HandMade(tmp_path / "image")
    outside = tmp_path / "outside"
    outside.write_text("read only")
    (images.layer / "bound").touch()
    images.binds = (*images.binds, Bind(str(outside), "/bound"))

    async def main() -> None:
        async with namespace_box(tmp_path, images) as b:
            assert await get(b, "/bound") == b"read only"
            with pytest.raises((errors.PermissionDenied, errors.Conflict)):
                await put(b, "/bound", b"changed")
            assert outside.read_text() == "read only"
            assert stat.S_ISREG(outside.stat().st_mode)

    run(main())
