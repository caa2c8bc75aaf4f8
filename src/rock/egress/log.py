"""The connection log of a sandbox: the latest entries in memory and in a file, one JSON object per line. Standard
library only.

The server opens the file and the proxy writes it, because the proxy may not open files. The file outlives both, and the
sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from typing import Any

KEPT = 1000  # entries
_LARGEST = 1 << 20  # file size in bytes at which it is rewritten
_LONGEST_LINE = 2048


class OpenEntry:
    """The entry of an open connection."""

    def __init__(self, number: int, address: str, port: int, protocol: str) -> None:
        self.number = number
        self.at = time.time()
        self.address = address
        self.port = port
        self.protocol = protocol
        self.host: str | None = None
        self.allowed = False
        self.reason: str | None = None
        self.sent = 0
        self.received = 0

    def plain(self, ended_at: float | None) -> dict[str, Any]:
        return {"number": self.number, "at": self.at, "ended_at": ended_at, "protocol": self.protocol,
                "host": self.host, "address": self.address, "port": self.port, "allowed": self.allowed,
                "reason": self.reason, "sent": self.sent, "received": self.received}


class Journal:
    """The log of one sandbox. fd: its file, which the log owns from now on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        data = os.pread(fd, 2 * _LARGEST, 0)
        self._ended: deque[dict[str, Any]] = deque(_entries(data), KEPT)
        self.total = max((int(entry["number"]) for entry in self._ended), default=0)
        self._size = os.fstat(fd).st_size
        if not data.endswith(b"\n") or self._size > len(data):
            self._rewrite()
        self._open: dict[int, OpenEntry] = {}

    def begin(self, address: str, port: int, protocol: str = "tcp") -> OpenEntry:
        self.total += 1
        entry = self._open[self.total] = OpenEntry(self.total, address, port, protocol)
        return entry

    def end(self, entry: OpenEntry) -> None:
        """Complete the entry and write it. Idempotent."""
        if self._open.pop(entry.number, None) is None:
            return
        plain = entry.plain(time.time())
        self._ended.append(plain)
        line = json.dumps(plain).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk: the log continues in memory
            if self._size + len(line) > _LARGEST:
                self._rewrite()
            else:
                self._size += os.pwrite(self._fd, line, self._size)

    def _rewrite(self) -> None:
        data = b"".join(json.dumps(entry).encode() + b"\n" for entry in self._ended)
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))
        self._size = len(data)

    def listed(self) -> dict[str, Any]:
        """As protocol.network.ConnectionList."""
        items = sorted([*self._ended, *(entry.plain(None) for entry in self._open.values())],
                       key=lambda entry: int(entry["number"]))
        return {"items": items, "total": self.total, "dropped": self.total - len(items)}

    def close(self) -> None:
        for entry in list(self._open.values()):
            entry.reason = entry.reason or "the sandbox or its proxy ended"
            self.end(entry)
        os.close(self._fd)


def read(path: str) -> dict[str, Any]:
    """The log file of an ended sandbox, as `Journal.listed`; empty without a file."""
    try:
        with open(path, "rb") as file:
            items = _entries(file.read(2 * _LARGEST))[-KEPT:]
    except FileNotFoundError:
        items = []
    total = max((int(entry["number"]) for entry in items), default=0)
    return {"items": items, "total": total, "dropped": total - len(items)}


def _entries(data: bytes) -> list[dict[str, Any]]:
    """Parse entries; skips a line that a crash truncated."""
    found = []
    for line in data.split(b"\n"):
        if not 0 < len(line) <= _LONGEST_LINE:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("number")) is int:
            found.append(entry)
    return found
