"""The process at the other end of a connection, as identified by the kernel.

A server without a key serves only its owner. The owner is recognized by the client's socket: the kernel reports the
socket's user (SO_PEERCRED for a Unix socket, NETLINK_SOCK_DIAG for a TCP connection over loopback) and its inode, by
which the processes that hold the socket are found in /proc. Both are looked up once per connection, and only for
requests without a key.

The user id is not sufficient: a sandbox of level `userns`, and a container of root, have the user id of their owner. A
holder therefore has to be in the user and pid namespace of this process, with no more seccomp filters than this process
has. Each unknown case is rejected: a closed socket, a holder that cannot be inspected, another platform.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PEER = "rock.peer"  # in the `state` of a scope: the Peer of its connection
IDENTIFIES = sys.platform == "linux" and hasattr(socket, "AF_NETLINK")

_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NETLINK_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")
# inet_diag_req_v2: family, protocol, extensions, pad, states; then inet_diag_sockid: ports, addresses, device, cookie.
_REQUEST = struct.Struct("=BBBxI2s2s16s16sIQ")
# inet_diag_msg up to the inode: family, state, timer, retransmits; sockid; expires, rqueue, wqueue, uid, inode.
_ANSWER = struct.Struct("=BBBB2s2s16s16sIQIIIII")
_NO_COOKIE = (1 << 64) - 1
_CONNECTED = frozenset({1, 4, 5, 8})  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT: a process holds the socket
_NO_DIAG = frozenset({errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP})
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_CREDENTIALS = struct.Struct("=iII")
_KNOWN = 256  # client processes in the cache
_LOOKED_AT = 4000  # descriptors of cached processes that are checked before all of /proc is scanned


@dataclass(frozen=True)
class Owner:
    """The socket at the other end. uid: in our user namespace. inode: of the socket; 0 when pid is set instead."""

    uid: int
    inode: int
    pid: int = 0


class Peer:
    """The other end of one connection. `refusal` is determined once: why it is not the server's owner."""

    __slots__ = ("_answer", "_asking", "_transport", "prove")

    def __init__(self, prove: Callable[[str, bool], bool] = lambda who, bounded: True) -> None:
        self.prove = prove  # Admission.prove of its connection: called when a request was accepted
        self._transport: asyncio.BaseTransport | None = None
        self._answer: str | None = None
        self._asking: asyncio.Future[str] | None = None

    def made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = transport

    async def refusal(self) -> str:
        """Why the client is not recognized as the owner of this server; empty when it is."""
        if self._answer is None:
            if self._asking is None:
                self._asking = asyncio.ensure_future(self._ask())
            self._answer = await asyncio.shield(self._asking)
            self._asking = None
        return self._answer

    async def _ask(self) -> str:
        if not IDENTIFIES:
            return "this platform does not tell the owner of a connection"
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        if sock is None:
            return "the connection has no socket"
        try:
            owner = owner_of(sock)
        except OSError as error:
            return f"the kernel does not tell the owner of the connection: {error}"
        if owner is None:
            return "its socket is not one of this machine's network namespace, or is closed"
        if not is_ours(owner.uid):
            return f"its socket belongs to user {owner.uid}"
        return await asyncio.get_running_loop().run_in_executor(_scanner(), _confined, owner)


@lru_cache(maxsize=1)
def _scanner() -> ThreadPoolExecutor:
    """One thread, so that /proc is scanned once at a time, independent of the number of connections."""
    return ThreadPoolExecutor(1, "peers")


def is_ours(uid: int) -> bool:
    """Whether a user id is that of this process, or root."""
    if uid == _overflow():  # the overflow id stands for every user that has no mapping in our user namespace
        return False
    return uid in (0, os.geteuid())


@lru_cache(maxsize=1)
def _overflow() -> int:
    """The user id of unmapped users; -1 in a user namespace that maps all of them."""
    try:
        mapped = Path("/proc/self/uid_map").read_text().split()
        if mapped == ["0", "0", "4294967295"]:
            return -1
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534


# ---- socket ----


def owner_of(sock: socket.socket) -> Owner | None:
    """The socket at the other end of `sock`; None when there is none in this network namespace. OSError."""
    if sock.family == socket.AF_UNIX:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(data)
        return Owner(uid, 0, pid) if pid > 0 else None
    here, there = sock.getsockname(), sock.getpeername()
    first, second = _plain(there[0]), _plain(here[0])
    if first.version != second.version or not first.is_loopback or not second.is_loopback:
        return None
    try:
        return _tcp(first, there[1], second, here[1])
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _NO_DIAG:
            raise
    return _listed(first, there[1], second, here[1])


def _listed(first: _Address, source_port: int, second: _Address, target_port: int) -> Owner | None:
    """`_tcp` by the tables in /proc/net, where a system call filter or the kernel's configuration forbids
    NETLINK_SOCK_DIAG: a server in a container. The duration grows with the number of connections. OSError."""
    ends = _hexadecimal(first, source_port), _hexadecimal(second, target_port)
    mapped = tuple(f"{'0' * 16}FFFF0000{end}" for end in ends) if first.version == 4 else None
    for name in ("tcp", "tcp6") if first.version == 4 else ("tcp6",):
        with open(f"/proc/self/net/{name}", encoding="ascii") as lines:
            for line in lines:
                row = line.split()
                found = tuple(row[1:3])
                if found in (ends, mapped) and int(row[3], 16) in _CONNECTED and row[9] != "0":
                    return Owner(int(row[7]), int(row[9]))
    return None


def _hexadecimal(address: _Address, port: int) -> str:
    """An address as /proc/net writes it: words of 32 bits in the machine's order."""
    words = struct.unpack(f"!{len(address.packed) // 4}I", address.packed)
    data = struct.pack(f"={len(words)}I", *words)
    return "".join(f"{word:08X}" for word in struct.unpack(f">{len(words)}I", data)) + f":{port:04X}"


def _tcp(first: _Address, source_port: int, second: _Address, target_port: int) -> Owner | None:
    """The owner of the connected TCP socket with exactly these ends. FileNotFoundError when there is none; OSError."""
    family = socket.AF_INET if first.version == 4 else socket.AF_INET6
    ends = (struct.pack("!H", source_port), struct.pack("!H", target_port),
            first.packed.ljust(16, b"\0"), second.packed.ljust(16, b"\0"))  # fmt: skip
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF, *ends, 0, _NO_COOKIE)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(1.0)
        diag.connect((0, 0))  # accept only messages of the kernel
        diag.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
        data = diag.recv(8192)
    kind = _HEADER.unpack_from(data)[1]
    if kind == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", data, _HEADER.size)[0]
        raise OSError(code, os.strerror(code))
    if kind != _SOCK_DIAG_BY_FAMILY or len(data) < _HEADER.size + _ANSWER.size:
        raise OSError("the answer of NETLINK_SOCK_DIAG makes no sense")
    _, state, _, _, *found, _, _, _, _, _, uid, inode = _ANSWER.unpack_from(data, _HEADER.size)
    # A lookup that finds no connection returns a listener on that port; a socket that its process has closed is
    # returned with the user 0 and no inode.
    if state not in _CONNECTED or inode == 0 or tuple(found[:2]) != ends[:2]:
        return None
    size = len(first.packed)
    found_pair = tuple(_plain_bytes(bytes(part), size) for part in found[2:4])
    return Owner(uid, inode) if found_pair == (first.packed, second.packed) else None


def _plain(text: str) -> _Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def _plain_bytes(data: bytes, size: int) -> bytes:
    """An address of a response; an IPv4 address may be encoded as an IPv6 one."""
    if size == 4 and data[:12] == b"\0" * 10 + b"\xff\xff":
        return data[12:]
    return data[:size]


# ---- processes that hold the socket ----

_known: OrderedDict[int, str] = OrderedDict()  # start times of accepted client processes, by pid


def _confined(owner: Owner) -> str:
    """Why a process that holds the socket is not accepted as the owner; empty when each of them is."""
    if owner.pid:
        with contextlib.suppress(OSError), _pinned(owner.pid) as process:
            return _foreign(process)
        return "its process cannot be looked at"
    link = f"socket:[{owner.inode}]"
    if _held_by_known(link):
        return ""
    holders = [pid for pid in _pids() if _holds(pid, link)]
    looked_at = 0
    for pid in holders:
        try:
            with _pinned(pid) as process:
                if not _has(process, link):
                    continue  # the pid belongs to another process now
                if problem := _foreign(process):
                    return problem
                began = _began(process)
        except OSError:
            continue  # it ended
        looked_at += 1
        _remember(pid, began)
    return "" if looked_at else "no process is found that holds its socket"


def _held_by_known(link: str) -> bool:
    """Whether a previously accepted client process holds the socket."""
    left = _LOOKED_AT
    for pid, began in reversed(list(_known.items())):
        try:
            with _pinned(pid) as process:
                names = os.listdir(_under(process, "fd"))
                left -= len(names)
                if left < 0:
                    return False
                if _began(process) != began or _foreign(process):
                    raise ProcessLookupError
                if any(_link(process, name) == link for name in reversed(names)):
                    _known.move_to_end(pid)
                    return True
        except OSError:
            _known.pop(pid, None)
    return False


def _remember(pid: int, began: str) -> None:
    _known[pid] = began
    _known.move_to_end(pid)
    while len(_known) > _KNOWN:
        _known.popitem(last=False)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _holds(pid: int, link: str) -> bool:
    folder = f"/proc/{pid}/fd/"
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        try:
            if os.readlink(folder + name) == link:
                return True
        except OSError:
            pass
    return False


@contextlib.contextmanager
def _pinned(pid: int) -> Iterator[int]:
    """/proc/PID as a descriptor, which never refers to another process. OSError."""
    fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _under(process: int, name: str) -> str:
    return f"/proc/self/fd/{process}/{name}"


def _has(process: int, link: str) -> bool:
    return any(_link(process, name) == link for name in os.listdir(_under(process, "fd")))


def _link(process: int, name: str) -> str:
    try:
        return os.readlink(f"fd/{name}", dir_fd=process)
    except FileNotFoundError:
        return ""


def _read(process: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    with open(fd, encoding="utf-8", errors="replace") as file:
        return file.read()


def _began(process: int) -> str:
    """The start time of a process, in clock ticks."""
    return _read(process, "stat").rpartition(")")[2].split()[19]


def _foreign(process: int) -> str:
    """The difference between a process and those of this server's owner; empty when there is none. OSError."""
    for kind, own in _own_namespaces().items():
        found = os.stat(f"ns/{kind}", dir_fd=process)
        if (found.st_dev, found.st_ino) != own:
            return f"its process is in another {kind} namespace: in a sandbox or a container"
    if _filters(_read(process, "status")) > _own_filters():
        return "its process has a system call filter, as programs in a sandbox have"
    return ""


@lru_cache(maxsize=1)
def _own_namespaces() -> dict[str, tuple[int, int]]:
    found = {}
    for kind in ("user", "pid"):
        with contextlib.suppress(FileNotFoundError):  # the kernel has no namespaces of that kind
            made = os.stat(f"/proc/self/ns/{kind}")
            found[kind] = (made.st_dev, made.st_ino)
    return found


def _own_filters() -> int:
    return _filters(Path("/proc/self/status").read_text())


def _filters(status: str) -> int:
    """The number of seccomp filters, from /proc/PID/status; a kernel without that count reports only the mode."""
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}
    text = fields.get("Seccomp_filters", fields.get("Seccomp", "0"))
    return int(text) if text.isdecimal() else 0
