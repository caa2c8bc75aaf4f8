"""Where a server keeps what is its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rock.errors import Conflict
from rock.runtime import wholefile


def _lock(fd: int) -> None:
    """BlockingIOError when another process has it."""
    import fcntl  # the command-line client runs on machines without it too

    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Home:
    """The one folder of a server, locked for as long as it runs, with a note of where it listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    @property
    def note(self) -> Path:
        return self.folder / "server.json"

    def take(self) -> None:
        """Lock it; Conflict when another server has it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(lock)
        except OSError:
            os.close(lock)
            raise Conflict(
                f"a server is running already with ROCK_HOME={self.folder} ({self.read()})",
                hint="stop it with: rock admin stop, or set another ROCK_HOME",
            ) from None
        self._lock = lock

    def write(self, host: str, port: int, tls_cert: str = "") -> None:
        note = {"pid": os.getpid(), "host": host, "port": port, "tls_cert": tls_cert}
        wholefile.replace(self.note, json.dumps(note))

    def read(self) -> dict[str, Any] | None:
        """Where the server of this folder listens, if one runs now."""
        try:
            with open(self.folder / "server.lock", "a+") as lock:
                _lock(lock.fileno())
                return None
        except BlockingIOError:
            pass
        except OSError:
            return None
        try:
            note = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def release(self) -> None:
        if self._lock is not None:
            self.note.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
