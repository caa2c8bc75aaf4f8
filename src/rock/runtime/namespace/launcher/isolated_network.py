"""Network namespaces without a route out: every address is local, and all traffic ends at two sockets of the proxy.

    program ── connect 203.0.113.5:443 ──► lo ──► packet filter ──► the proxy's listening socket
               its own loopback ◄──────────┘ └──► everything but TCP and DNS is rejected

The only device is loopback. A route makes every address local to the namespace, and the packet filter redirects each
connection to one socket, on which the proxy outside reads the original destination. The host forwards no packets, so an
ordinary user can create such a namespace, and without a proxy no data leaves it. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket

from rock.egress import nftables
from rock.egress.netlink import add_address, route_all_here, routing
from rock.runtime.namespace.launcher import kernel

# From the range for local use by carriers (RFC 7335), which is never routed.
ADDRESS, RESOLVER = "192.0.0.2", "192.0.0.1"
ADDRESS6 = "fd72:6f63:6b00::2"
TCP_PORT = 1  # reserved; programs can listen on all other ports
_DNS = 53
_LOOPBACK = 1  # its number in every namespace
_BACKLOG = 128
_BUFFERS = "4096 131072 1048576"  # buffer size of a connection in bytes, in the kernel: minimum, default, maximum
RESOLV_CONF = f"nameserver {RESOLVER}\n"
_MANGLE, _FILTER = -150, 0


def furnish(ping_group: str) -> tuple[int, int]:
    """Set up the network namespace of this process; returns its listening TCP socket and its UDP socket for DNS.
    OSError when the kernel lacks a feature.

    ping_group: as net.ipv4.ping_group_range.
    """
    kernel.loopback_up()
    modern = _set({"ip_unprivileged_port_start": "0", "ping_group_range": ping_group, "tcp_rmem": _BUFFERS,
                   "tcp_wmem": _BUFFERS})  # fmt: skip
    with routing() as link:
        add_address(link, _LOOPBACK, ADDRESS)
        route_all_here(link, _LOOPBACK, ADDRESS)
        if modern:
            add_address(link, _LOOPBACK, ADDRESS6)
            route_all_here(link, _LOOPBACK, ADDRESS6)
    _filter(modern)
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(_transparent(socket.SOCK_STREAM, modern))
        tcp.bind(("::" if modern else "0.0.0.0", TCP_PORT))
        tcp.listen(_BACKLOG)
        udp = stack.enter_context(_transparent(socket.SOCK_DGRAM, False))
        udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO: the source of a reply is the destination of the query
        udp.bind((RESOLVER, _DNS))
        _leave_a_mark()
        return tcp.detach(), udp.detach()


def _set(settings: dict[str, str]) -> bool:
    """Write settings of net.ipv4 of this namespace; returns whether it has IPv6.

    It uses a /proc that disappears again: a lasting one retains an entry for each namespace that wrote a setting
    through it, in one list, which each later write searches.
    """
    try:
        proc = kernel.new_mount("proc", {}, kernel.ATTR_NOSUID | kernel.ATTR_NODEV | kernel.ATTR_NOEXEC)
    except OSError:  # an ordinary user may mount one only in a new pid namespace
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, text in settings.items():
            file = os.open(f"sys/net/ipv4/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            try:
                os.write(file, text.encode())
            finally:
                os.close(file)
        return os.access("sys/net/ipv6", os.F_OK, dir_fd=proc)
    finally:
        os.close(proc)


def _transparent(kind: socket.SocketKind, modern: bool) -> socket.socket:
    family = socket.AF_INET6 if modern else socket.AF_INET
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    if modern:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, 75, 1)  # IPV6_TRANSPARENT
    else:
        sock.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT
    return sock


def _filter(modern: bool) -> None:
    own = [nftables.destination("127.0.0.0", 8), nftables.destination(ADDRESS, 32)]
    if modern:
        own += [nftables.destination("::1", 128), nftables.destination(ADDRESS6, 128)]
    tcp, udp = nftables.protocol(socket.IPPROTO_TCP), nftables.protocol(socket.IPPROTO_UDP)
    table = nftables.Table("rock")
    table.chain("in", nftables.PREROUTING, _MANGLE, nftables.DROP)
    table.chain("out", nftables.OUTPUT, _FILTER, nftables.DROP)
    for network in own:
        table.rule("in", network, nftables.verdict(nftables.ACCEPT))
        table.rule("out", network, nftables.verdict(nftables.ACCEPT))
    everywhere = nftables.destination("0.0.0.0", 0)
    table.rule("in", tcp, nftables.to_socket(TCP_PORT))
    table.rule("in", everywhere, udp, nftables.port(_DNS), nftables.to_socket(_DNS, RESOLVER))
    table.rule("out", tcp, nftables.verdict(nftables.ACCEPT))
    table.rule("out", everywhere, udp, nftables.port(_DNS), nftables.verdict(nftables.ACCEPT))
    table.rule("out", nftables.refuse())
    table.commit()


def _leave_a_mark() -> None:
    """Send a packet. A namespace with counters above zero is never reused for a sandbox without a network
    (runtime/namespace/network.py)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.sendto(b"", sock.getsockname())
