"""Users by name or number, from the sandbox's own /etc/passwd and /etc/group, which are untrusted. Standard library
only."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from rock.guest.init import syscalls
from rock.guest.init.link import Fault

_MOST = 1 << 20  # maximum bytes read of a user database
_cache: dict[str, tuple[tuple[int, int, int], list[str]]] = {}
_HIGHEST = 0xFFFFFFFE


class User(NamedTuple):
    """The user of a program: `home` is the value of HOME."""

    uid: int
    gid: int
    groups: list[int]
    home: str


def find_in_image(text: str) -> User:
    """As `find`, from outside of a new sandbox whose root this process has. The files are read anew, and not through a
    link of /proc, which would lead out."""
    _cache.clear()
    try:
        return find(text)
    finally:
        _cache.clear()


def find(text: str) -> User:
    """Resolve "name", "uid", "name:group" or "uid:gid". Fault not_found names the missing part."""
    name, colon, group = text.partition(":")
    row = _passwd(name)
    if row is not None:
        login, uid, gid, home = row
    elif _number(name) is not None:
        login, uid, gid, home = "", _number(name) or 0, 0, "/"
    elif name == "root":  # also in images without a user database
        login, uid, gid, home = "", 0, 0, "/root" if os.path.isdir("/root") else "/"
    else:
        raise Fault("not_found", f"no such user: {name!r}")
    groups = [gid, *_groups_of(login)] if login else [gid]
    if colon:
        gid = _group(group)
        groups = [gid]
    return User(uid, gid, sorted(set(groups))[:256], home if home.startswith("/") else "/")


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        return None
    value = int(text)
    return value if value <= _HIGHEST else None


def _rows(path: str, width: int) -> Iterator[list[str]]:
    """The fields of each valid line of a user database; empty when it is missing or is not a regular file."""
    try:
        now = os.stat(path)
    except OSError:
        return
    version = (now.st_ino, now.st_size, now.st_mtime_ns)
    known = _cache.get(path)
    if known is None or known[0] != version:
        known = _cache[path] = version, _read(path)
    for line in known[1]:
        fields = line.split(":")
        if len(fields) >= width:
            yield fields


def _read(path: str) -> list[str]:
    try:
        fd = syscalls.open_plain(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        data = b""
        while len(data) < _MOST and (piece := os.read(fd, 65536)):
            data += piece
    except OSError:
        return []
    finally:
        os.close(fd)
    return data[:_MOST].decode("utf-8", "surrogateescape").split("\n")


def _passwd(name: str) -> tuple[str, int, int, str] | None:
    number = _number(name)
    by_number = None
    for fields in _rows("/etc/passwd", 6):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is None or gid is None:
            continue
        if fields[0] == name:
            return fields[0], uid, gid, fields[5]
        if number is not None and uid == number and by_number is None:
            by_number = fields[0], uid, gid, fields[5]
    return by_number


def _group(name: str) -> int:
    for fields in _rows("/etc/group", 3):
        gid = _number(fields[2])
        if fields[0] == name and gid is not None:
            return gid
    number = _number(name)
    if number is None:
        raise Fault("not_found", f"no such group: {name!r}")
    return number


def _groups_of(login: str) -> list[int]:
    found = []
    for fields in _rows("/etc/group", 4):
        gid = _number(fields[2])
        if gid is not None and login in fields[3].split(","):
            found.append(gid)
    return found
