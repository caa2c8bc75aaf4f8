"""Homes of servers as fixtures: packed, and unpacked at another place.

Records of a home name folders of that home by absolute paths. A fixture names PLACE instead; `unpack` writes the new
place, with the checksum that the record's last member is.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from pathlib import Path

HERE = Path(__file__).parent
PLACE = b"/srv/rock"
# What a server makes anew: its log, the disk reserve, locks and notes of one run.
LEFT_OUT = {"reserve", "output.log", "logs", "server.lock", "server.json", "owner.key"}
_SUM = re.compile(rb', ?"crc": ?"[0-9a-f]{8}"\}\s*$')
_CGROUP = re.compile(rb"(/sys/fs/cgroup/[a-z,]+)/[^\"]*?(/rock-[0-9a-f]+)")


def moved(data: bytes, before: bytes, after: bytes) -> bytes:
    """A record whose paths below `before` are below `after`, with its checksum if it has one."""
    found = _SUM.search(data)
    if not found:
        return data.replace(before, after)
    text = data[: found.start()].replace(before, after)
    assert zlib.crc32(data[: found.start()] + b"}") == int(data[-10:-2], 16), "this is no record with a checksum"
    return text + b', "crc": "%08x"}' % zlib.crc32(text + b"}")


def without_machine(data: bytes) -> bytes:
    """A record without the cgroup that the machine ran the server in."""
    found = _SUM.search(data)
    if not found or not _CGROUP.search(data):
        return data
    text = _CGROUP.sub(rb"\1\2", data[: found.start()])
    return text + b', "crc": "%08x"}' % zlib.crc32(text + b"}")


def _names_places(path: str) -> bool:
    return path.startswith(("run/records/", "images/use/")) or path.endswith("/record.json")


def pack(home: Path, target: Path) -> int:
    """Write a home as a .tar.gz; returns its size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=9) as tar:
        for path in sorted(home.rglob("*")):
            name = path.relative_to(home).as_posix()
            if path.relative_to(home).parts[0] in LEFT_OUT or path.is_socket():
                continue
            info = tar.gettarinfo(path, name)
            info.uname = info.gname = ""
            if not info.isreg():
                tar.addfile(info)
                continue
            data = path.read_bytes()
            if _names_places(name):
                data = without_machine(moved(data, str(home).encode(), PLACE))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    target.write_bytes(buffer.getvalue())
    return len(buffer.getvalue())


def unpack(source: Path, home: Path) -> None:
    """Unpack a home, so that its records name the new place."""
    with tarfile.open(source) as tar:
        tar.extractall(home, filter="fully_trusted")
    home.chmod(0o700)
    for path in home.rglob("*"):
        if path.is_file() and _names_places(path.relative_to(home).as_posix()):
            path.write_bytes(moved(path.read_bytes(), PLACE, str(home).encode()))
