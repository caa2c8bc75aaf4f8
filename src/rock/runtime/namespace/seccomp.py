"""The system call filter: what no program in a sandbox needs and what has opened sandboxes before is refused.

    wrong architecture -> killed      x32, clone3 -> ENOSYS (the C library then uses clone, whose flags are looked at)
    a call in `_DENIED` -> EPERM      clone, unshare with namespaces, mknod of devices, odd sockets, TIOCSTI -> EPERM
    all else -> allowed

Built by hand as classic BPF; standard library only.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000
_LD, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_NEW_NAMESPACES = 0x7E020000
_CLONE_NEWTIME = 0x80

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SPECIAL = {
    "x86_64": {"clone": 56, "clone3": 435, "unshare": 272, "mknod": 133, "mknodat": 259, "socket": 41, "ioctl": 16,
               "personality": 135},
    "aarch64": {"clone": 220, "clone3": 435, "unshare": 97, "mknodat": 33, "socket": 198, "ioctl": 29,
                "personality": 92},
}
# Same numbers on both: pidfd_getfd, open_tree .. fspick, mount_setattr, process_madvise is left alone, quotactl_fd,
# io_uring_*, process_mrelease is left alone, kexec_file_load differs.
_COMMON = {
    "pidfd_getfd": 438, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "mount_setattr": 442, "quotactl_fd": 443, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "open_tree_attr": 467,
}
_DENIED = {
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "add_key": 248,
        "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "mount": 165,
        "umount2": 166, "pivot_root": 155, "setns": 308, "swapon": 167, "swapoff": 168, "reboot": 169,
        "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176,
        "create_module": 174, "get_kernel_syms": 177, "query_module": 178, "open_by_handle_at": 304, "acct": 163,
        "quotactl": 179, "nfsservctl": 180, "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305,
        "adjtimex": 159, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "syslog": 103,
        "vhangup": 153, "_sysctl": 156, "uselib": 134, "ustat": 136, "sysfs": 139, "lookup_dcookie": 212,
        "fanotify_init": 300, "name_to_handle_at": 303, "move_pages": 279, "migrate_pages": 256,
        "set_mempolicy": 238, "mbind": 237, "modify_ldt": 154,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "add_key": 217,
        "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "mount": 40,
        "umount2": 39, "pivot_root": 41, "setns": 268, "swapon": 224, "swapoff": 225, "reboot": 142,
        "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273, "delete_module": 106,
        "open_by_handle_at": 265, "acct": 89, "quotactl": 60, "nfsservctl": 42, "settimeofday": 170,
        "clock_settime": 112, "clock_adjtime": 266, "adjtimex": 171, "sethostname": 161, "setdomainname": 162,
        "syslog": 116, "vhangup": 58, "lookup_dcookie": 18, "fanotify_init": 262, "name_to_handle_at": 264,
        "move_pages": 239, "migrate_pages": 238, "set_mempolicy": 237, "mbind": 235,
    },
}
# Of a sandbox without namespaces. System V IPC and message queues: shm*, sem*, msg*, mq_open, mq_unlink.
_IPC = {"x86_64": (29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 220, 240, 241),
        "aarch64": (180, 181, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196)}
# By whom: prlimit64, sched_setaffinity, _setscheduler, _setparam, _setattr, setpriority (which and whom), ioprio_set.
_ONLY_ITSELF: dict[str, dict[int, tuple[int, ...]]] = {
    "x86_64": {302: (0,), 203: (0,), 144: (0,), 142: (0,), 314: (0,), 141: (0, 1), 251: (1,)},
    "aarch64": {261: (0,), 122: (0,), 119: (0,), 118: (0,), 274: (0,), 140: (0, 1), 30: (1,)},
}
_SOCKET_FAMILIES = (1, 2, 10)  # unix, IPv4, IPv6
_NETLINK = 16
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_TERMINAL_IOCTLS = (0x5412, 0x541C, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCSETD: it loads modules for line disciplines

Instruction = tuple[int, int, int, int]


def supported(machine: str | None = None) -> bool:
    """Whether there is a table for this machine."""
    return (machine or platform.machine()) in _ARCHES


def build(machine: str | None = None, *, shared: bool = False, sockets: bool = True) -> bytes:
    """The filter as packed instructions, ready for the kernel.

    shared: for a sandbox without namespaces: nothing that would reach into the host's IPC, or other processes of its
    user, and no unix sockets but pairs, as those of the host could be called. sockets: whether there are others.
    """
    machine = machine or platform.machine()
    special = _SPECIAL[machine]
    code: list[Instruction] = [
        _load(_ARCH), (_JEQ, 1, 0, _ARCHES[machine]), _ret(_KILL),
        _load(_NR),
    ]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, 0x40000000), _ret(_ERRNO | errno.ENOSYS)]
    code += _when(special["clone3"], [_ret(_ERRNO | errno.ENOSYS)])
    for number in sorted({*_DENIED[machine].values(), *_COMMON.values()}):
        code += _when(number, [_refuse()])
    code += _when(special["clone"], _refuse_flags(0, _NEW_NAMESPACES))
    code += _when(special["unshare"], _refuse_flags(0, _NEW_NAMESPACES | _CLONE_NEWTIME))
    for name, argument in (("mknod", 1), ("mknodat", 2)):
        if name in special:
            code += _when(special[name], _mknod(argument))
    if shared:
        code += _shared(machine)
        code += _when(special["socket"], _socket((2, 10)) if sockets else [_ret(_ERRNO | errno.EACCES)])
    else:
        code += _when(special["socket"], _socket(_SOCKET_FAMILIES))
    code += _when(special["ioctl"], [_load(_argument(1)), *_refuse_values(_TERMINAL_IOCTLS), _ret(_ALLOW)])
    code += _when(special["personality"], [_load(_argument(0)), *_allow_values(_PERSONALITIES), _refuse()])
    code.append(_ret(_ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _load(offset: int) -> Instruction:
    return _LD, 0, 0, offset


def _argument(index: int) -> int:
    """Offset of the low half of an argument; both machines are little-endian."""
    return _ARGS + 8 * index


def _ret(value: int) -> Instruction:
    return _RET, 0, 0, value


def _refuse() -> Instruction:
    return _ret(_ERRNO | errno.EPERM)


def _when(number: int, body: list[Instruction]) -> list[Instruction]:
    """The body, which ends in a return, for one call; the accumulator holds the call's number before and after."""
    return [(_JEQ, 0, len(body), number), *body]


def _refuse_flags(argument: int, flags: int) -> list[Instruction]:
    return [_load(_argument(argument)), (_JSET, 0, 1, flags), _refuse(), _ret(_ALLOW)]


def _refuse_values(values: Iterable[int]) -> list[Instruction]:
    return [part for value in values for part in ((_JEQ, 0, 1, value), _refuse())]


def _allow_values(values: Iterable[int]) -> list[Instruction]:
    return [part for value in values for part in ((_JEQ, 0, 1, value), _ret(_ALLOW))]


def _mknod(argument: int) -> list[Instruction]:
    return [_load(_argument(argument)), (_AND, 0, 0, 0o170000), *_refuse_values((0o020000, 0o060000)), _ret(_ALLOW)]


def _shared(machine: str) -> list[Instruction]:
    code: list[Instruction] = []
    for number in _IPC[machine]:
        code += _when(number, [_refuse()])
    for number, arguments in _ONLY_ITSELF[machine].items():
        code += _when(number, [part for index in arguments for part in (
            _load(_argument(index)), (_JEQ, 1, 0, 0), _refuse())] + [_ret(_ALLOW)])
    return code


def _socket(families: tuple[int, ...]) -> list[Instruction]:
    """Unix and internet sockets, and netlink for routes; nothing else, such as packet, vsock or crypto.

    Of netlink's other protocols the kernel seems to know nothing: useradd and su then go on without its audit.
    """
    netlink = [_load(_argument(2)), *_allow_values((0,)), _ret(_ERRNO | errno.EPROTONOSUPPORT)]
    return [_load(_argument(0)), *_allow_values(families), (_JEQ, 0, len(netlink), _NETLINK), *netlink,
            _ret(_ERRNO | errno.EAFNOSUPPORT)]
