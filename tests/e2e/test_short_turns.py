"""Who passes things on asks the kernel for short turns; programs of sandboxes have the kernel's own."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer

from rock.guest.init import process_tree
from rock.sync import Sandbox

_GETATTR = {"x86_64": 315, "aarch64": 275}
_SHORT = 100_000
_INSIDE = """
import ctypes, os, struct
buffer = ctypes.create_string_buffer(48)
ctypes.CDLL(None).syscall(%d, 0, buffer, 48, 0)
print(struct.unpack("IIQiIQQQ", buffer.raw)[5])
"""


def _slice(pid: int) -> tuple[int, int]:
    """Nanoseconds that a process asks for, and its flags."""
    buffer = ctypes.create_string_buffer(48)
    if ctypes.CDLL(None).syscall(_GETATTR[os.uname().machine], pid, buffer, 48, 0) != 0:
        return 0, 0
    fields = struct.unpack("IIQiIQQQ", buffer.raw)
    return int(fields[5]), int(fields[2])


def test_a_server_asks_for_short_turns_and_its_programs_do_not(server: RunningServer) -> None:
    if os.uname().machine not in _GETATTR or _slice(os.getpid())[0] == 0:
        pytest.skip("this kernel tells of no turns: Linux 6.12 does")
    usual = _slice(os.getpid())[0]
    assert _slice(server.pid) == (_SHORT, 1)
    with Sandbox(base_url=server.url, image=IMAGE, memory="256m", cpus=1.0) as sandbox:
        seen = sandbox.execute(["python3", "-c", _INSIDE % _GETATTR[os.uname().machine]])
        assert int(seen.stdout) == usual != _SHORT
        tree = [entry.pid for entry in process_tree.descendants(process_tree.scan(), server.pid)]
        ones = [pid for pid in tree if Path(f"/proc/{pid}/comm").read_text() == "rock-init\n"]
        launchers = int(os.environ["ROCK_PROCESSES"])
        assert [_slice(pid) for pid in ones].count((_SHORT, 1)) == launchers + 1  # and pid 1
