"""Device access and disk I/O weight of all sandboxes: a second line of defense behind mounts without devices and the
missing right to create one.

    version 1   one group of `devices`, and one of `blkio`, for all sandboxes: the zygote joins them, so each pid 1
                starts inside and a create has no extra cost
    version 2   a BPF program at the parent folder of the sandboxes' groups, and io.weight there

Unavailable as an ordinary user, and where the host denies it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

from rock.runtime.namespace.launcher import kernel
from rock.runtime.namespace.limits import cgroups

# Character devices by number; None is every minor: null zero full random urandom, tty, ptmx, terminals
ALLOWED: tuple[tuple[int, int | None], ...] = (
    (1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None))
_WEIGHT = "100"  # of 1000, or of 10000: the default weight
_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH, _CGROUP_DEVICE_TYPE, _CGROUP_DEVICE = 5, 8, 15, 6
_CHARACTER, _MAKE = 2, 1  # kinds of devices, and of access

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class SharedGroups:
    """The cgroups of all sandboxes of a server, created by its launcher."""

    def __init__(self, run_dir: str) -> None:
        self.folders: list[str] = []
        for controller in ("devices", "blkio"):
            folder = cgroups.shared_folder(run_dir, controller)
            if folder is None:
                continue
            with contextlib.suppress(OSError):
                os.makedirs(folder, exist_ok=True)
                if controller == "devices":
                    _limit(folder)
                self.folders.append(folder)
                for name in ("blkio.weight", "blkio.bfq.weight"):
                    with contextlib.suppress(OSError):
                        cgroups.write(f"{folder}/{name}", _WEIGHT)

    def join(self) -> None:
        """Move this process and its future children into them."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                cgroups.write(f"{folder}/cgroup.procs", "0")

    def remove(self) -> None:
        """Remove them when they contain no sandbox."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def remove_shared(run_dir: str) -> None:
    """Remove empty groups of a server's sandboxes: its launcher may have ended before the last sandbox."""
    for controller in ("devices", "blkio"):
        folder = cgroups.shared_folder(run_dir, controller)
        if folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _limit(folder: str) -> None:
    """Version 1: deny everything that is not allowed."""
    cgroups.write(f"{folder}/devices.deny", "a")
    for major, minor in ALLOWED:
        cgroups.write(f"{folder}/devices.allow", f"c {major}:{'*' if minor is None else minor} rw")


def limit_folder(folder: str) -> None:
    """Version 2: the same for all groups below a folder. OSError when the kernel or the host denies it."""
    code = program()
    kept = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQIIQII", _CGROUP_DEVICE_TYPE, len(code) // 8, ctypes.addressof(kept),
                             ctypes.addressof(licence), 0, 0, 0, 0, 0)
    loaded = _bpf(_PROG_LOAD, attributes)
    try:
        group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(_PROG_ATTACH, struct.pack("=IIII", group, loaded, _CGROUP_DEVICE, 0))
        finally:
            os.close(group)
    finally:
        os.close(loaded)


def program() -> bytes:
    """The BPF program that the kernel runs when a device is opened or created: 1 to open allowed devices, else 0."""
    # Registers 2 to 4: the kind of device and the access, the major and the minor number
    code = [_instruction(0x61, 2, 1, 0), _instruction(0x61, 3, 1, 4), _instruction(0x61, 4, 1, 8),
            _instruction(0xBF, 5, 2), _instruction(0x57, 5, value=0xFFFF), _instruction(0x77, 2, value=16)]
    rules = []
    for major, minor in ALLOWED:
        body = [_instruction(0xB7, 0, value=1), _instruction(0x95)]
        if minor is not None:
            body.insert(0, _instruction(0x55, 4, offset=2, value=minor))
        rules += [_instruction(0x55, 3, offset=len(body), value=major), *body]
    refused = [_instruction(0xB7, 0, value=0), _instruction(0x95)]
    # The low half is the kind, the high half the access
    code += [_instruction(0x55, 5, offset=len(rules) + 1, value=_CHARACTER),
             _instruction(0x45, 2, offset=len(rules), value=_MAKE), *rules, *refused]
    return b"".join(code)


def _instruction(what: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", what, source << 4 | to, offset, value)


def _bpf(command: int, attributes: bytes) -> int:
    number = _BPF.get(kernel.MACHINE)
    if number is None:
        raise OSError(38, "bpf: this machine is not supported")
    kept = ctypes.create_string_buffer(attributes, max(128, len(attributes)))
    result = int(_libc.syscall(ctypes.c_long(number), ctypes.c_long(command), kept, ctypes.c_long(len(kept))))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf: {os.strerror(ctypes.get_errno())}")
    return result
