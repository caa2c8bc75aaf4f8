"""The system call filter: allows the calls that ordinary programs need, and rejects all others.

    wrong architecture -> killed      x32, clone3, calls in no list -> ENOSYS (the C library then uses another)
    a call of syscall_list.REFUSED -> EPERM
    a call of syscall_list.ALLOWED -> allowed, or checked by arguments: new namespaces, devices, terminals, families
    and protocols of sockets, personalities, and limits and priorities of pid 1

A binary search over ranges with the same action finds the number, with some nine comparisons. The kernel caches which
calls are allowed with any arguments, and skips the filter for those.

Generated directly as classic BPF; standard library only.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable

from rock.runtime.namespace.launcher import syscall_list

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000
_LD, _JA, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_NEW_NAMESPACES = 0x7E020000
_CLONE_NEWTIME = 0x80
_X32 = 0x40000000
_FARTHEST = 255  # maximum distance of a conditional jump in instructions

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Protocols of IPv4 and IPv6 sockets: default, ICMP, TCP, UDP, ICMPv6. Others load modules: SCTP, MPTCP, UDP-Lite.
_PROTOCOLS = (0, 1, 6, 17, 58)
_UNIX, _INTERNET, _NETLINK = 1, (2, 10), 16
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_TERMINAL_IOCTLS = (0x5412, 0x541C, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCSETD (loads modules for line disciplines)
_PID_1 = 1
_ITSELF = 0

Instruction = tuple[int, int, int, int]
Code = list[Instruction]


def supported(machine: str | None = None) -> bool:
    """Whether there is a table for this architecture."""
    return (machine or platform.machine()) in _ARCHES


def inspected() -> frozenset[str]:
    """Names of the calls that are allowed with certain arguments only."""
    return frozenset(_by_arguments())


def build(machine: str | None = None, *, shared: bool = False, sockets: bool = True) -> bytes:
    """The filter as packed instructions, ready for the kernel.

    shared: for a sandbox without namespaces: denies access to the host's IPC, to information about its files and to
    other processes of its user, and unix sockets except pairs, because those of the host would be reachable. sockets:
    whether other sockets are allowed.
    """
    machine = machine or platform.machine()
    code: Code = [_load(_ARCH), (_JEQ, 1, 0, _ARCHES[machine]), _ret(_KILL), _load(_NR)]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, _X32), _refuse(errno.ENOSYS)]
    code += _search(_ranges(_verdicts(machine, shared=shared, sockets=sockets)))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


# ---- rules by name ----


def _verdicts(machine: str, *, shared: bool, sockets: bool) -> dict[int, Code]:
    """The action per call number; unknown numbers get ENOSYS."""
    looked_at = _by_arguments()
    if shared:
        looked_at |= _without_namespaces(sockets)
    verdicts = {}
    for name, number in syscall_list.NUMBERS[machine].items():
        if name in syscall_list.ALLOWED:
            verdicts[number] = looked_at.get(name, [_ret(_ALLOW)])
        elif name in syscall_list.REFUSED:
            verdicts[number] = [_refuse()]
    return verdicts


def _by_arguments() -> dict[str, Code]:
    """The calls that are allowed with certain arguments only."""
    return {
        "clone": _refuse_flags(0, _NEW_NAMESPACES),
        "unshare": _refuse_flags(0, _NEW_NAMESPACES | _CLONE_NEWTIME),
        "mknod": _no_devices(1),
        "mknodat": _no_devices(2),
        "socket": _sockets(unix=True),
        "ioctl": [_load(_argument(1)), *_refuse_values(_TERMINAL_IOCTLS), _ret(_ALLOW)],
        "personality": [_load(_argument(0)), *_allow_values(_PERSONALITIES), _refuse()],
        **_not_of_pid_1(),
    }


def _not_of_pid_1() -> dict[str, Code]:
    """Deny changes to limits, CPUs and priorities of pid 1. pid 1 has the same user as root inside, and a program that
    takes its descriptors or its CPU time would end the sandbox with the appearance of a machine failure."""
    mine: Code = [_load(_argument(0)), *_refuse_values((_PID_1,)), _ret(_ALLOW)]
    return {
        "prlimit64": [_load(_argument(0)), (_JEQ, 1, 0, _PID_1), _ret(_ALLOW), *_reading_only(2)],
        "sched_setaffinity": mine, "sched_setscheduler": mine, "sched_setparam": mine, "sched_setattr": mine,
        # One process only, not a group or a user, which may include pid 1.
        "setpriority": [*_only(0, 0), _load(_argument(1)), *_refuse_values((_PID_1,)), _ret(_ALLOW)],
        "ioprio_set": [*_only(0, 1), _load(_argument(1)), *_refuse_values((_PID_1,)), _ret(_ALLOW)],
    }


def _without_namespaces(sockets: bool) -> dict[str, Code]:
    """The calls that are denied, or checked further, where the host's names and processes are visible."""
    itself: Code = [*_only(0, _ITSELF), _ret(_ALLOW)]
    return {
        **{name: [_refuse()] for name in syscall_list.IPC | syscall_list.INOTIFY},
        "socket": _sockets(unix=False) if sockets else [_refuse(errno.EACCES)],
        "prlimit64": itself, "sched_setaffinity": itself, "sched_setscheduler": itself, "sched_setparam": itself,
        "sched_setattr": itself,
        "setpriority": [*_only(0, 0), *_only(1, _ITSELF), _ret(_ALLOW)],
        "ioprio_set": [*_only(1, _ITSELF), _ret(_ALLOW)],
    }


def _sockets(*, unix: bool) -> Code:
    """Internet sockets of the usual protocols, unix sockets, and netlink for routes; no packet, vsock or crypto
    sockets.

    Other netlink protocols appear unknown to the kernel: useradd and su then continue without its audit.
    """
    unknown = _refuse(errno.EPROTONOSUPPORT)
    internet = [_load(_argument(2)), *_allow_values(_PROTOCOLS), unknown]
    netlink = [_load(_argument(2)), *_allow_values((0,)), unknown]
    return [_load(_argument(0)), *(_allow_values((_UNIX,)) if unix else []),
            (_JEQ, 1, 0, _INTERNET[0]), (_JEQ, 0, len(internet), _INTERNET[1]), *internet,
            (_JEQ, 0, len(netlink), _NETLINK), *netlink, _refuse(errno.EAFNOSUPPORT)]


def _no_devices(argument: int) -> Code:
    return [_load(_argument(argument)), (_AND, 0, 0, 0o170000), *_refuse_values((0o020000, 0o060000)), _ret(_ALLOW)]


# ---- instructions ----


def _load(offset: int) -> Instruction:
    return _LD, 0, 0, offset


def _argument(index: int) -> int:
    """Offset of the low half of an argument; both architectures are little-endian."""
    return _ARGS + 8 * index


def _ret(value: int) -> Instruction:
    return _RET, 0, 0, value


def _refuse(number: int = errno.EPERM) -> Instruction:
    return _ret(_ERRNO | number)


def _refuse_flags(argument: int, flags: int) -> Code:
    return [_load(_argument(argument)), (_JSET, 0, 1, flags), _refuse(), _ret(_ALLOW)]


def _refuse_values(values: Iterable[int]) -> Code:
    return [part for value in values for part in ((_JEQ, 0, 1, value), _refuse())]


def _allow_values(values: Iterable[int]) -> Code:
    return [part for value in values for part in ((_JEQ, 0, 1, value), _ret(_ALLOW))]


def _only(argument: int, value: int) -> Code:
    """Continue when the 32-bit argument has this value; reject all others."""
    return [_load(_argument(argument)), (_JEQ, 1, 0, value), _refuse()]


def _reading_only(argument: int) -> Code:
    """Allow a null pointer, whose both halves are 0."""
    return [_load(_argument(argument)), (_JEQ, 1, 0, 0), _refuse(),
            _load(_argument(argument) + 4), (_JEQ, 1, 0, 0), _refuse(), _ret(_ALLOW)]


def _ranges(verdicts: dict[int, Code]) -> list[tuple[int, Code]]:
    """(first number, action) in order; neighbors with the same action are merged."""
    unknown: Code = [_refuse(errno.ENOSYS)]
    found: list[tuple[int, Code]] = []
    for number in range(max(verdicts) + 2):
        verdict = verdicts.get(number, unknown)
        if not found or found[-1][1] != verdict:
            found.append((number, verdict))
    return found


def _search(ranges: list[tuple[int, Code]]) -> Code:
    """The code of the range that contains the accumulator."""
    if len(ranges) == 1:
        return ranges[0][1]
    half = len(ranges) // 2
    below, above = _search(ranges[:half]), _search(ranges[half:])
    if len(below) <= _FARTHEST:
        return [(_JGE, len(below), 0, ranges[half][0]), *below, *above]
    return [(_JGE, 0, 1, ranges[half][0]), (_JA, 0, 0, len(below)), *below, *above]
