"""Which parts of the machine's /usr only their owner may read.

An image made with `from-host` is mapped to the sandbox's users when root runs the server, so that root inside may write
everywhere. Then its root could also read what the machine's root alone may read: such files and folders are covered.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from rock.runtime.image.locks import storing, write_atomic
from rock.runtime.image.rootfs import Bind

_MOST = 200
_KEEP = 24 * 3600.0
# They change when a package is installed, removed or upgraded
_STAMPS = ("/var/lib/dpkg/status", "/var/lib/rpm/rpmdb.sqlite", "/lib/apk/db/installed", "/var/lib/pacman/local",
           "/usr/local", "/usr/local/bin", "/usr/local/lib", "/usr/local/etc", "/usr/local/share")  # fmt: skip


class HostScan:
    """The private parts of `roots`, looked for when packages have changed and once a day, and kept in `folder`."""

    def __init__(self, folder: Path, roots: Sequence[str] = ("/usr",)) -> None:
        self._folder = folder
        self._roots = roots
        self._known: tuple[float, tuple[Bind, ...] | None] = (float("-inf"), None)

    def masks(self) -> tuple[Bind, ...] | None:
        """Binds that cover what is private; None where there is too much of it to cover."""
        now = time.monotonic()
        if now - self._known[0] > 1.0:
            self._known = (now, self._load())
        return self._known[1]

    def _load(self) -> tuple[Bind, ...] | None:
        stamps = [os.stat(p).st_mtime_ns if os.path.exists(p) else 0 for p in _STAMPS]
        path = self._folder / "private.json"
        try:
            body = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            body = {}
        if body.get("stamps") != stamps or not 0 <= time.time() - body.get("at", 0) < _KEEP:
            found = [list(pair) for root in self._roots for pair in private_paths(root, _MOST + 1)]
            body = {"stamps": stamps, "at": time.time(), "found": found}
            with storing("saving what of /usr is private"):
                write_atomic(path, json.dumps(body).encode())
        found = body["found"]
        return None if len(found) > _MOST else tuple(Bind(self._cover(kind), target) for target, kind in found)

    def _cover(self, kind: str) -> str:
        """An empty folder or file, to be mounted over a private one."""
        path = self._folder / f"empty-{kind}"
        if not path.exists():
            with storing("making a cover"):
                if kind == "folder":
                    path.mkdir(mode=0o555, exist_ok=True)
                else:
                    path.touch(mode=0o444)
        return str(path)


def private_paths(root: str, limit: int) -> list[tuple[str, str]]:
    """(path, "file" or "folder") of what not everybody may read below `root`; stops after `limit`."""
    found: list[tuple[str, str]] = []
    todo = [root]
    while todo and len(found) < limit:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    if mode & 0o005 == 0o005:
                        todo.append(entry.path)
                    else:
                        found.append((entry.path, "folder"))
                elif stat.S_ISREG(mode) and not mode & 0o004:
                    found.append((entry.path, "file"))
    return found[:limit]
