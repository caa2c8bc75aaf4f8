"""Network nat: what is reached, what never is, and what is known of it afterwards."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.network.conftest import Opener, World

from rock.sync import Sandbox

_TRY = """
import json, socket, sys
found = {}
for address, port in json.loads(sys.argv[1]):
    try:
        with socket.create_connection((address, port), 15) as sock:
            sock.settimeout(15)
            sock.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            data = b""
            while piece := sock.recv(65536):
                data += piece
            found[f"{address} {port}"] = data.decode("latin-1")
    except OSError as error:
        found[f"{address} {port}"] = type(error).__name__
print(json.dumps(found))
"""


def attempt(sandbox: Sandbox, *places: tuple[str, int]) -> dict[str, str]:
    """What came of HTTP requests from inside, by "ADDRESS PORT"."""
    done = sandbox.execute(["python3", "-c", _TRY, json.dumps(places)], timeout=100)
    assert done.exit_code == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def python(sandbox: Sandbox, code: str, *arguments: str) -> Any:
    """What a program inside prints, as JSON."""
    done = sandbox.execute(["python3", "-c", code, *arguments], timeout=100)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_public_addresses_and_names(opened: Opener, world: World) -> None:
    sandbox = opened()
    found = attempt(sandbox, ("203.0.113.10", 80), ("allowed.test", 80), ("2001:db8:1::10", 80))
    assert all(text.startswith("HTTP/1.1 200") for text in found.values()), found
    seen = sandbox.egress_log()
    reached = [(item.address, item.port, item.host, item.allowed) for item in seen.items if item.protocol == "tcp"]
    assert ("203.0.113.10", 80, None, True) in reached and ("2001:db8:1::10", 80, None, True) not in reached[:1]
    assert any(host == "allowed.test" for _, _, host, _ in reached)
    assert all(item.sent > 30 and item.received > 100 for item in seen.items if item.protocol == "tcp")
    assert all(item.ended_at is not None and item.ended_at >= item.at for item in seen.items)


# The list of section 6 of what has to be tried, and what the world would answer, so that a hole is seen.
_NEVER = [
    ("10.9.9.9", 80), ("172.16.5.5", 80), ("192.168.77.1", 80), ("100.64.0.9", 80), ("198.18.0.1", 80),
    ("169.254.169.254", 80), ("169.254.1.1", 80), ("168.63.129.16", 80), ("fd00::9", 80),
    ("10.77.0.1", 9999), ("203.0.113.77", 9999), ("2001:db8:77::1", 9999), ("10.77.0.2", 80),
    ("::ffff:10.9.9.9", 80), ("::ffff:169.254.169.254", 80), ("64:ff9b::a09:909", 80), ("2002:a09:909::1", 80),
    ("0.0.0.0", 9999), ("::ffff:127.0.0.1", 9999), ("::", 9999), ("127.0.0.1", 9999), ("::1", 9999),
    ("127.9.9.9", 9999), ("224.0.0.251", 80), ("240.0.0.1", 80), ("255.255.255.255", 80), ("ff02::1%lo", 80),
    ("fe80::1%lo", 80), ("0x0a090909", 80), ("167840009", 80), ("10.9.2313", 80), ("012.011.011.011", 80),
    ("192.0.0.1", 80), ("192.0.0.1", 1), ("127.0.0.1", 1), ("private.test", 80), ("loop.test", 9999),
    ("meta.test", 80), ("own.test", 9999),
]  # fmt: skip


@pytest.mark.parametrize("egress", [None, ["*"], ["0.0.0.0/0", "::/0"], ["allowed.test", "private.test", "own.test"],
                                    ["10.0.0.0/8", "127.0.0.1:9999", "[::1]:9999", "203.0.113.0/24:9999"]])
def test_what_is_never_reached(opened: Opener, world: World, egress: list[str] | None) -> None:
    sandbox = opened(egress=egress)
    found = attempt(sandbox, *_NEVER)
    assert {place: text for place, text in found.items() if text.startswith("HTTP")} == {}
    assert [item for item in world.seen() if item["place"] != "dns"] == []
    refused = sandbox.egress_log().items
    assert {item.allowed for item in refused if item.protocol == "tcp"} == {False}
    metadata = next(item for item in refused if item.address == "169.254.169.254")
    assert metadata.reason == "metadata address"
    if egress is None:
        assert next(item for item in refused if item.address == "203.0.113.77").reason == "host's own address"


def test_no_other_way_out(opened: Opener, world: World) -> None:
    """Datagrams, pings, raw and packet sockets, other protocols, other routes."""
    sandbox = opened()
    told = python(sandbox, """
import json, os, socket
def attempt(work):
    try: return repr(work())
    except OSError as error: return "refused"
def kind(how, protocol): return socket.socket(socket.AF_INET, how, protocol)
def datagram(address, port=9003):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (address, port))
def netlink():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        head = bytes([2, 0, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0, 8, 0, 4, 0, 1, 0, 0, 0])
        sock.send((16 + len(head)).to_bytes(4, "little") + bytes([24, 0, 5, 4]) + bytes(8) + head)
        data = sock.recv(4096)
        if int.from_bytes(data[16:20], "little", signed=True): raise OSError
def bound():
    with socket.socket() as sock:
        sock.bind(("203.0.113.99", 5555)); sock.settimeout(3); sock.connect(("10.9.9.9", 80))
        sock.sendall(b"x"); return sock.recv(1)
def option(level, name, value):
    with socket.socket() as sock: sock.setsockopt(level, name, value)
print(json.dumps({
    "datagram": attempt(lambda: datagram("203.0.113.10")), "datagram6": attempt(lambda: datagram("2001:db8:1::10")),
    "dns elsewhere by 6": attempt(lambda: datagram("2001:db8:1::10", 53)),
    "ping": attempt(lambda: kind(socket.SOCK_DGRAM, 1).sendto(b"\\x08" + bytes(7), ("203.0.113.10", 0))),
    "raw": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
    "packet": attempt(lambda: socket.socket(17, socket.SOCK_RAW, 3)),
    "sctp": attempt(lambda: kind(socket.SOCK_STREAM, 132).connect(("203.0.113.10", 80))),
    "udplite": attempt(lambda: kind(socket.SOCK_DGRAM, 136).sendto(b"x", ("203.0.113.10", 9003))),
    "route": attempt(netlink), "source": attempt(bound),
    "transparent": attempt(lambda: option(0, 19, 1)), "mark": attempt(lambda: option(1, 36, 1)),
    "nftables": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)),
    "tun": attempt(lambda: os.open("/dev/net/tun", os.O_RDWR)),
}))
""")
    assert {name: text for name, text in told.items() if text != "refused"} == {}
    assert world.seen() == []


def test_its_own_loopback_is_its_own(opened: Opener, world: World) -> None:
    one, other = opened(), opened()
    one.processes.start(["python3", "-m", "http.server", "--bind", "0.0.0.0", "9999"])
    one.arun("until (: < /dev/tcp/127.0.0.1/9999) 2> /dev/null; do sleep 0.05; done", timeout=30)
    assert attempt(one, ("127.0.0.1", 9999))["127.0.0.1 9999"].startswith("HTTP")
    assert attempt(one, ("192.0.0.2", 9999))["192.0.0.2 9999"].startswith("HTTP")
    found = attempt(other, ("127.0.0.1", 9999), ("192.0.0.2", 9999), ("192.0.0.1", 9999))
    assert not any(text.startswith("HTTP") for text in found.values())


def test_names(opened: Opener, world: World) -> None:
    sandbox = opened()
    found = python(sandbox, """
import json, socket
def look(name, family=0):
    try: return sorted({item[4][0] for item in socket.getaddrinfo(name, 80, family, socket.SOCK_STREAM)})
    except socket.gaierror as error: return error.errno
names = "allowed.test ALLOWED.test. nothing.test private.test loop.test mixed.test localhost sandbox".split()
print(json.dumps({name: look(name) for name in names}
    | {"many": len(look("many.test"))}))
""")
    assert found["allowed.test"] == found["ALLOWED.test."] == ["2001:db8:1::10", "203.0.113.10"]
    assert found["mixed.test"] == ["203.0.113.10"]
    assert found["many"] == 190  # by TCP, as a datagram is too small
    assert all(isinstance(found[name], int) for name in ("nothing.test", "private.test", "loop.test"))
    assert "127.0.0.1" in found["localhost"] or "::1" in found["localhost"]
    assert found["sandbox"] == ["127.0.1.1"]
    refused = [item for item in sandbox.egress_log().items if not item.allowed]
    assert {(item.host, item.reason) for item in refused} == {("private.test", "private address"),
                                                             ("loop.test", "loopback address")}


def test_any_name_server_is_ours(opened: Opener, world: World) -> None:
    """Programs that bring the address of a name server of their own get our answer, by datagram and by stream."""
    told = python(opened(), """
import json, socket, struct
question = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + b"\\x07allowed\\x04test\\0" + struct.pack(">2H", 1, 1)
text = struct.pack(">6H", 8, 0x100, 1, 0, 0, 0) + b"\\x04text\\x04test\\0" + struct.pack(">2H", 16, 1)
def datagram(question, server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20); sock.connect((server, 53)); sock.send(question); return sock.recv(2000).hex()
def stream(question, server):
    with socket.create_connection((server, 53), 20) as sock:
        sock.sendall(struct.pack(">H", len(question)) + question); return sock.recv(2000)[2:].hex()
print(json.dumps([datagram(question, "8.8.8.8"), stream(question, "9.9.9.9"), datagram(text, "192.0.0.1")]))
""")
    assert told[0] == told[1] and told[0].endswith("cb00710a")  # 203.0.113.10
    assert bytes.fromhex(told[2]).endswith(b"\x05hello")


def test_large_streams_and_half_closed_ones(opened: Opener, world: World) -> None:
    sandbox = opened()
    told = python(sandbox, """
import json, socket
size = 60_000_000
with socket.create_connection(("203.0.113.10", 9001), 60) as sock:
    sock.sendall(b"%d\\n" % size)
    got = 0
    while piece := sock.recv(1 << 18): got += len(piece)
with socket.create_connection(("203.0.113.10", 9002), 60) as sock:
    block = bytes(1 << 18)
    for _ in range(200): sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)
    taken = int(sock.makefile().readline())
with socket.create_connection(("203.0.113.10", 22), 60) as sock:
    greeting = sock.recv(100).decode()
try: socket.create_connection(("203.0.113.10", 4), 60).recv(1); closed = "answered"
except ConnectionError as error: closed = type(error).__name__
print(json.dumps([got, taken, greeting, closed]))
""")
    assert told == [60_000_000, 200 << 18, "SSH-2.0-world\r\n", "ConnectionResetError"]
    by_port = {item.port: item for item in sandbox.egress_log().items}
    assert by_port[9001].received == 60_000_000 and by_port[9002].sent == 200 << 18
    assert by_port[4].allowed and by_port[4].reason == "not reached: Connection refused"


def test_network_none_and_host_are_as_they_were(opened: Opener, world: World) -> None:
    none = opened(network="none")
    found = attempt(none, ("203.0.113.10", 80), ("allowed.test", 80), ("127.0.0.1", 9999))
    assert not any(text.startswith("HTTP") for text in found.values())
    assert none.egress_log().items == [] and world.seen() == []
    host = opened(network="host")
    assert attempt(host, ("127.0.0.1", 9999))["127.0.0.1 9999"].startswith("HTTP")
