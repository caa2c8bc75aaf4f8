"""A machine of its own with an internet behind it, in two network namespaces: run as `python world.py FDS [CERT KEY]`.

    host namespace H: 10.77.0.1, 2001:db8:77::1 ── veth ── outside O: 10.77.0.2 and all addresses of OUTSIDE
      services on 127.0.0.1 and on its own                   name server, HTTP, TLS, echo, greeting, source and sink

As an ordinary user both are in a user namespace with that one user. On the first of FDS it is told what to do, a JSON
object a line: {"seen": 1} who was reached, {"zone": {name: [addresses]}}, {"relay": [index, port]}: connections of that
one of the other FDS, listening sockets of another network namespace, are carried to that port of H.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from typing import Any

from rock.egress import dns
from rock.egress.netlink import ACK, CREATE, EXCLUSIVE, Netlink, attribute, nested, routing
from rock.runtime.namespace.launcher import kernel

HOST, HOST6, GATE, GATE6 = "10.77.0.1", "2001:db8:77::1", "10.77.0.2", "2001:db8:77::2"
HOST_PUBLIC = "203.0.113.77"  # the machine's own, public one
OUTSIDE = ["203.0.113.10", "203.0.113.11", "2001:db8:1::10", "10.9.9.9", "172.16.5.5", "192.168.77.1", "100.64.0.9",
           "169.254.169.254", "169.254.1.1", "168.63.129.16", "198.18.0.1", "fd00::9", "64:ff9b::a09:909",
           "2002:a09:909::1", "224.0.0.251", "240.0.0.1"]
ZONE: dict[str, list[str]] = {}
HTTP, TLS, ECHO, GREET, SOURCE, SINK, UDP = 80, 443, 7, 22, 9001, 9002, 9003
_seen: list[dict[str, Any]] = []


# ---- the machine ----


def enter() -> None:
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWNET | (0 if uid == 0 else kernel.CLONE_NEWUSER))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # others of this user may look at our namespaces
    kernel.loopback_up()


def index(name: str) -> int:
    return socket.if_nametoindex(name)


def address(link: Netlink, device: int, text: str, bits: int) -> None:
    packed = ipaddress.ip_address(text).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = struct.pack("=BBBBI", family, bits, 2, 0, device) + attribute(1, packed) + attribute(2, packed)
    link.ask(link.message(20, ACK | CREATE | EXCLUSIVE, body))


def route(link: Netlink, device: int, gate: str) -> None:
    packed = ipaddress.ip_address(gate).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 254, 4, 0, 1, 0)
    link.ask(link.message(24, ACK | CREATE | EXCLUSIVE, body + attribute(4, struct.pack("=I", device))
                          + attribute(5, packed)))


def up(link: Netlink, device: int) -> None:
    link.ask(link.message(16, ACK, struct.pack("=BxHiII", 0, 0, device, 1, 1)))


def cable(pid: int) -> None:
    """A veth pair with one end here and one in the network namespace of a process."""
    with routing() as link:
        head = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        peer = head + attribute(3, b"out\0") + attribute(19, struct.pack("=I", pid))
        kind = nested(18, attribute(1, b"veth\0"), nested(2, nested(1, peer)))
        link.ask(link.message(16, ACK | CREATE | EXCLUSIVE, head + attribute(3, b"world\0") + kind))
        device = index("world")
        up(link, device)
        for text, bits in ((HOST, 24), (HOST6, 64), (HOST_PUBLIC, 32)):
            address(link, device, text, bits)
        route(link, device, GATE)
        route(link, device, GATE6)


def outside() -> None:
    with routing() as link:
        device = index("out")
        up(link, device)
        address(link, device, GATE, 24)
        address(link, device, GATE6, 64)
        route(link, device, HOST)  # answers to any address that was let out
        route(link, device, HOST6)
        for text in OUTSIDE:
            if not ipaddress.ip_address(text).is_multicast and text != "240.0.0.1":
                address(link, 1, text, 128 if ":" in text else 32)


# ---- services ----


def serve(host: str, port: int, handle: Any, place: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, port))
    listener.listen(256)

    def one(client: socket.socket) -> None:
        with client:
            try:
                handle(client)
            except (OSError, ValueError):
                pass

    def loop() -> None:
        while True:
            client, _ = listener.accept()
            where = client.getsockname()
            _seen.append({"place": place, "address": where[0].removeprefix("::ffff:"), "port": where[1]})
            threading.Thread(target=one, args=(client,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


def http(client: socket.socket) -> None:
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            piece = client.recv(65536)
            if not piece:
                return
            data += piece
        head, _, data = data.partition(b"\r\n\r\n")
        body = json.dumps({"head": head.decode("latin-1"), "at": client.getsockname()[0]}).encode()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        if b"connection: close" in head.lower():
            return


def tls(context: ssl.SSLContext) -> Any:
    def handle(client: socket.socket) -> None:
        client.settimeout(20)
        with context.wrap_socket(client, server_side=True) as wrapped:
            http(wrapped)

    return handle


def echo(client: socket.socket) -> None:
    while piece := client.recv(65536):
        client.sendall(piece)


def greet(client: socket.socket) -> None:
    client.sendall(b"SSH-2.0-world\r\n")
    client.recv(100)


def source(client: socket.socket) -> None:
    """Sends as many bytes as it is told in a line."""
    left, block = int(client.makefile("rb").readline()), bytes(1 << 18)
    while left > 0:
        left -= client.send(block[: min(left, len(block))])


def sink(client: socket.socket) -> None:
    count, block = 0, bytearray(1 << 18)
    while size := client.recv_into(block):
        count += size
    client.sendall(b"%d\n" % count)


def _answer(data: bytes, datagram: bool) -> bytes:
    question = dns.parse_question(data)
    _seen.append({"place": "dns", "name": question.name, "kind": question.kind})
    if question.kind == dns.TXT and question.name == "text.test":
        text = b"hello"
        record = struct.pack(">HHHIHB", 0xC00C, dns.TXT, 1, 60, len(text) + 1, len(text)) + text
        return struct.pack(">6H", question.number, 0x8180, 1, 1, 0, 0) + question.raw + record
    if question.name not in ZONE:
        return dns.answer(question, dns.NO_NAME, datagram=datagram)
    found = tuple(a for text in ZONE[question.name] if (a := ipaddress.ip_address(text)).version
                  == (4 if question.kind == dns.A else 6 if question.kind == dns.AAAA else 0))
    return dns.answer(question, dns.OK, found, 30, datagram=datagram)


def name_server() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((GATE, 53))

    def loop() -> None:
        while True:
            data, sender = sock.recvfrom(4096)
            try:
                sock.sendto(_answer(data, True), sender)
            except ValueError:
                pass

    def stream(client: socket.socket) -> None:
        file = client.makefile("rb")
        reply = _answer(file.read(struct.unpack(">H", file.read(2))[0]), False)
        client.sendall(struct.pack(">H", len(reply)) + reply)

    threading.Thread(target=loop, daemon=True).start()
    serve(GATE, 53, stream, "dns")


def datagrams() -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("::", UDP))

    def loop() -> None:
        while True:
            sock.recvfrom(4096)
            _seen.append({"place": "udp"})

    threading.Thread(target=loop, daemon=True).start()


# ---- orders ----


def relay(listener: socket.socket, targets: list[int], own: int) -> None:
    def carry(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            other.close()

    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", targets[own]), timeout=20)
            server.settimeout(None)
        except OSError:
            client.close()
            continue
        for pair in ((client, server), (server, client)):
            threading.Thread(target=carry, args=pair, daemon=True).start()


def obey(orders: Any, replies: Any, targets: list[int], lower: Any) -> None:
    for line in orders:
        spec = json.loads(line)
        if "relay" in spec:
            if targets:
                targets[spec["relay"][0]] = spec["relay"][1]
            reply: Any = {}
        elif "zone" in spec:
            ZONE.update(spec["zone"])
            reply = {}
        else:
            reply = list(_seen)
            if spec.get("clear"):
                _seen.clear()
        if lower is not None:  # the other half
            lower[0].write(line)
            lower[0].flush()
            more = json.loads(lower[1].readline())
            reply = [*reply, *more] if isinstance(reply, list) else reply
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    control, *listeners = [socket.socket(fileno=int(fd)) for fd in sys.argv[1].split(",")]
    enter()
    ours, theirs = socket.socketpair()
    ready, tell = os.pipe()
    go, permit = os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        kernel.unshare(kernel.CLONE_NEWNET)
        kernel.loopback_up()
        os.write(tell, b"1")
        os.read(go, 1)
        outside()
        name_server()
        datagrams()
        for port, handle in ((HTTP, http), (8080, http), (ECHO, echo), (GREET, greet), (SOURCE, source), (SINK, sink)):
            serve("::", port, handle, "outside")
        if len(sys.argv) > 2:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*sys.argv[2:4])
            serve("::", TLS, tls(context), "outside")
        os.write(tell, b"2")
        obey(theirs.makefile("r"), theirs.makefile("w"), [], None)
        os._exit(0)
    theirs.close()
    os.read(ready, 1)
    cable(pid)
    os.write(permit, b"1")
    os.read(ready, 1)
    for host in ("127.0.0.1", HOST, HOST_PUBLIC, "::1", HOST6):
        serve(host, 9999, http, "host")
    targets = [0] * len(listeners)
    for own, listener in enumerate(listeners):
        threading.Thread(target=relay, args=(listener, targets, own), daemon=True).start()
    _wait_for_ipv6()
    control.sendall(b"ready\n")
    obey(control.makefile("r"), control.makefile("w"), targets, (ours.makefile("w"), ours.makefile("r")))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _wait_for_ipv6() -> None:
    """The link's own addresses take a moment."""
    for _ in range(300):
        try:
            socket.create_connection(("2001:db8:1::10", HTTP), 1).close()
            _seen.clear()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the outside is not reached over IPv6")


if __name__ == "__main__":
    main()
