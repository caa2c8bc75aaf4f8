"""Run a program as on a kernel without nftables, whose socket is refused: `python without_nftables.py PROGRAM...`."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from rock.runtime.namespace.launcher.kernel import NUMBERS

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
code = [
    (LOAD, 0, 0, 0), (EQUAL, 0, 5, NUMBERS["socket"]),
    (LOAD, 0, 0, 16), (EQUAL, 0, 3, 16),  # AF_NETLINK
    (LOAD, 0, 0, 32), (EQUAL, 0, 1, 12),  # NETLINK_NETFILTER
    (RETURN, 0, 0, 0x50000 | errno.EPROTONOSUPPORT), (RETURN, 0, 0, 0x7FFF0000),
]  # fmt: skip
packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(packed)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
