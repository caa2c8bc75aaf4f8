"""The owner key of a server of this account that has no other key: read from ROCK_HOME and sent to that server alone.

The key is made anew at each start of a server, and is sent only to the port that the server of this ROCK_HOME has. So
another program that gets the port later, and the key with it, has a key that no server takes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from rock import settings
from rock.protocol.routes import OTHER_KEY
from rock.sdk.http import Address
from rock.settings import NOTE, OWNER_KEY

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FRESH = 1.0  # seconds for which a key is not looked at again
_KEYS = (OTHER_KEY, "authorization", "x-api-key", "x-key", "xrl-authorization")

_Mark = tuple[int, int, int]  # of the file: when it was written, inode, size


class _Cache:
    """What was read last: the server's port and its key, until when that is believed, and of which file it came."""

    port, key = 0, ""
    until = 0.0
    home = Path()
    mark: _Mark = (0, 0, 0)


def key_for(address: Address) -> str:
    """The owner key of the server at an address; empty when it is no server of this account that has one."""
    if address.host not in _LOOPBACK:
        return ""
    now = time.monotonic()
    if now >= _Cache.until or _Cache.port != address.port:  # or this server has started since
        _read(settings.home())
        _Cache.until = now + _FRESH
    return _Cache.key if _Cache.port == address.port else ""


def headers_for(address: Address, given: Mapping[str, str]) -> dict[str, str]:
    """The header with that key; none beside a key that is `given`."""
    key = "" if has_key(given) else key_for(address)
    return {OTHER_KEY: key} if key else {}


def has_key(given: Mapping[str, str]) -> bool:
    """Whether these headers have a key."""
    return any(name.lower() in _KEYS for name in given)


def _read(home: Path) -> None:
    mark, port, key = (0, 0, 0), 0, ""
    try:
        found = os.stat(home / OWNER_KEY)
        mark = (found.st_mtime_ns, found.st_ino, found.st_size)
        if (mark, home) == (_Cache.mark, _Cache.home):
            return
        if not hasattr(os, "geteuid") or found.st_uid in (0, os.geteuid()):
            text = (home / OWNER_KEY).read_text("ascii").strip()
            port = int(json.loads((home / NOTE).read_text())["port"])
            key = text if text.isprintable() and len(text) <= 200 else ""
    except (OSError, ValueError, KeyError, TypeError):
        mark, port, key = (0, 0, 0), 0, ""  # no server runs, or this account may not read that
    _Cache.home, _Cache.mark, _Cache.port, _Cache.key = home, mark, port, key
