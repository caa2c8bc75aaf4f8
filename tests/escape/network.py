"""Attempts over the network: the host's loopback and services, packets by hand, other doors that are sockets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.escape.attempt import Attempt, Host
from tests.runtime.boxes import Box

THEME = "network"


def _reached(host: Host, box: Box) -> str | None:
    return "the host was reached" if host.facts["calls"]() else None


def _connect(name: str, body: str, control: bool = True, **options: Any) -> Attempt:
    return Attempt(THEME, name, body, control=control, look=_reached, **options)


_FAMILIES = {"AF_PACKET": (17, 3, 0x300), "AF_VSOCK": (40, 1, 0), "AF_ALG": (38, 5, 0), "AF_XDP": (44, 3, 0),
             "AF_BLUETOOTH": (31, 3, 0), "AF_TIPC": (30, 2, 0), "AF_CAN": (29, 3, 1), "AF_KCM": (41, 2, 0),
             "AF_RDS": (21, 5, 0), "AF_QIPCRTR": (42, 2, 0), "AF_SMC": (43, 1, 0), "AF_NFC": (39, 5, 0)}

ATTEMPTS = [
    _connect("the host's loopback, IPv4", "tried(lambda: socket.create_connection(('127.0.0.1', HOST['port']), 3))"),
    _connect("the host's loopback, IPv6", "tried(lambda: socket.create_connection(('::1', HOST['port6']), 3))",
             control=False),
    _connect("the host's loopback by 0.0.0.0 and a mapped address", """
tried(lambda: socket.create_connection(('0.0.0.0', HOST['port']), 3),
      lambda: socket.create_connection(('::ffff:127.0.0.1', HOST['port']), 3),
      lambda: socket.create_connection(('127.1.2.3', HOST['port']), 3))
"""),
    _connect("the host's loopback, UDP", """
try:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(2)
    sock.connect(('127.0.0.1', HOST['udp']))
    sock.send(b'escape')
    answer = sock.recv(10)
except OSError as error:
    blocked(name_of(error))
opened(answer)
"""),
    _connect("TCP fast open past a rule for connect()", """
try:
    sock = socket.socket()
    # The kernel's own time limit: with Python's it would not wait at all, and a slow machine looked like a rule.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('ll', 3, 0))
    sock.sendto(b'escape', 0x20000000, ('127.0.0.1', HOST['port']))
except OSError as error:
    blocked(name_of(error))
opened('sent')
"""),
    _connect("an abstract unix socket of the host", """
def go():
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(3)
    sock.connect('\\0' + HOST['abstract'])
    return 'connected'
tried(go)
"""),
    _connect("a unix socket of the host by its path", """
def go():
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(3)
    sock.connect(HOST['unix'])
    return 'connected'
tried(go)
"""),
    Attempt(THEME, "metadata services and link-local addresses", """
def go(family, address):
    def inner():
        sock = socket.socket(family)
        sock.settimeout(2)
        sock.connect(address)
        return address
    return inner
tried(go(socket.AF_INET, ('169.254.169.254', 80)), go(socket.AF_INET, ('169.254.170.2', 80)),
      go(socket.AF_INET6, ('fd00:ec2::254', 80)), go(socket.AF_INET6, ('fe80::1', 80, 0, 2)))
"""),
    Attempt(THEME, "private and public addresses", """
def go(address):
    def inner():
        sock = socket.socket()
        sock.settimeout(2)
        sock.connect((address, 80))
        return address
    return inner
tried(*(go(address) for address in ('10.0.0.1', '172.17.0.1', '192.168.0.1', '100.64.0.1', '8.8.8.8', HOST['address'])))
"""),
    Attempt(THEME, "raw sockets", """
tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 255), lambda: socket.socket(socket.AF_INET6, 3, 58))
""", control=True),
    *(Attempt(THEME, f"a socket of {name}", f"tried(lambda: socket.socket({family}, {kind}, {protocol}))",
              control=name == "AF_PACKET")
      for name, (family, kind, protocol) in _FAMILIES.items()),
    Attempt(THEME, "netlink: netfilter, audit, kernel events", """
tried(*(lambda number=number: (socket.socket(16, 3, number), number) for number in (12, 9, 15, 16, 6)))
""", control=True),
    Attempt(THEME, "netlink: give itself a device", """
NLM, RTM_NEWLINK = 0x605, 16
try:
    sock = socket.socket(16, 3, 0)
except OSError as error:
    blocked(name_of(error))
kind = struct.pack('HH', 9, 1) + b'dummy' + bytes(3)
data = struct.pack('HH', 4 + len(kind), 18) + kind
body = struct.pack('BxHiII', 0, 0, 0, 0, 0) + data
sock.send(struct.pack('IHHII', 16 + len(body), RTM_NEWLINK, NLM, 1, 0) + body)
reply = sock.recv(4096)
number = -struct.unpack_from('i', reply, 16)[0]
blocked(errno.errorcode.get(number, number)) if number else opened('made a device')
"""),
    Attempt(THEME, "its devices up, its routes and firewall changed", """
request = struct.pack('16sh22x', b'lo', 0)  # lo down
try:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
except OSError as error:
    blocked(name_of(error))
tried(lambda: fcntl.ioctl(sock, 0x8914, request), lambda: sock.setsockopt(0, 64, bytes(100)))
"""),
    Attempt(THEME, "descriptors over a unix socket from the host", """
# SCM_RIGHTS to pid 1's control socket: it has to be found first, in this mount namespace or as an abstract one.
try:
    names = open('/proc/net/unix').read().split()
except OSError:
    names = []
paths = [name for name in names if name.endswith('/s') or name.startswith('@')] + [HOST['control']]
def go(path):
    def inner():
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect('\\0' + path[1:] if path.startswith('@') else path)
        socket.send_fds(sock, [b'{"id": 1, "op": "hello"}'], [0])
        sock.settimeout(2)
        answer = sock.recv(1000)
        if not answer: raise OSError(errno.ECONNREFUSED, 'closed')
        return answer[:60]
    return inner
tried(*(go(path) for path in paths))
"""),
]


# ---- sandboxes with the networks "nat" and "host"


def _with(network: str, names: tuple[str, ...], **absent: str) -> list[Attempt]:
    """Attempts of this page once more, by a sandbox with another network."""
    by_name = {attempt.name: attempt for attempt in ATTEMPTS}
    return [replace(by_name[name], name=f'{name}, with network "{network}"', control=False,
                    config={"network": network}, absent={**by_name[name].absent, **absent}) for name in names]


_NO_NAT = {"landlock": 'it has no network "nat"', "gvisor": 'it has no network "nat"'}
_NO_HOST = {"gvisor": 'it has no network "host"'}
_LOCAL = (
    "the host's loopback, IPv4", "the host's loopback, IPv6", "the host's loopback by 0.0.0.0 and a mapped address",
    "the host's loopback, UDP", "an abstract unix socket of the host", "a unix socket of the host by its path",
    "raw sockets", "a socket of AF_PACKET", "netlink: netfilter, audit, kernel events",
    "netlink: give itself a device", "its devices up, its routes and firewall changed",
)
# The proxy takes each connection and closes those that are refused, so only the look from outside can tell.
_CALL = """
def call_one(family, address):
    try:
        sock = socket.socket(family)
        sock.settimeout(3)
        sock.connect(address)
        sock.sendall(b'escape')
        return sock.recv(100)
    except OSError: return b''
"""
ATTEMPTS += [
    *_with("nat", _LOCAL, **_NO_NAT),
    _connect('an address of the host, with network "nat"', _CALL + """
for address in (HOST['address'], '::ffff:' + HOST['address'], '64:ff9b::' + HOST['address']):
    call_one(socket.AF_INET6 if ':' in address else socket.AF_INET, (address, HOST['address_port']))
blocked('the look from outside tells')
""", control=False, config={"network": "nat"}, absent=_NO_NAT),
    Attempt(THEME, 'metadata services and private addresses, with network "nat"', _CALL + """
seen = [address for address in ('169.254.169.254', '169.254.170.2', '10.0.0.1', '172.17.0.1', '192.168.0.1',
                                '100.64.0.1') if call_one(socket.AF_INET, (address, 80))]
opened(*seen) if seen else blocked('no answer')
""", config={"network": "nat"}, absent=_NO_NAT),
    Attempt(THEME, 'packets past the proxy, with network "nat"', """
seen = []
for protocol, address in ((17, ('198.51.100.1', 9)), (17, ('198.51.100.1', 443)), (1, ('198.51.100.1', 0))):
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, protocol)
        packet = b'escape' if protocol == 17 else struct.pack('!BBHHH', 8, 0, 0, 0, 0)
        for _ in range(3): sock.sendto(packet, address)
        seen.append(protocol)
    except OSError: pass
opened(*seen) if seen else blocked('refused')
""", config={"network": "nat"}, absent=_NO_NAT),
    *_with("host", ("a unix socket of the host by its path", "raw sockets", "a socket of AF_PACKET",
                    "netlink: netfilter, audit, kernel events", "netlink: give itself a device"), **_NO_HOST),
    Attempt(THEME, 'devices and routes of the host changed, with network "host"', """
request = struct.pack('16sh22x', b'lo', 0x49)  # lo up, as it is
try:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
except OSError as error:
    blocked(name_of(error))
tried(lambda: fcntl.ioctl(sock, 0x8914, request), lambda: sock.setsockopt(0, 64, bytes(100)),
      lambda: write('/proc/sys/net/ipv4/ip_forward', read('/proc/sys/net/ipv4/ip_forward')))
""", config={"network": "host"}, absent=_NO_HOST),
]
