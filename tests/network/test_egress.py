"""egress: default deny, by name and by address, and the ways around it that are tried."""

from __future__ import annotations

import pytest
from tests.network.conftest import Opener, World
from tests.network.test_nat import attempt, python

from rock.errors import InvalidConfig
from rock.sync import SandboxConfig

_REQUEST = """
import json, socket, sys
def say(address, port, *parts):
    import time
    try:
        with socket.create_connection((address, port), 30) as sock:
            sock.settimeout(30)
            for part in parts:
                sock.sendall(part.encode("latin-1"))
                time.sleep(0.05)
            data = b""
            while b"}" not in data and (piece := sock.recv(65536)): data += piece
            return data.decode("latin-1") or "ended"
    except OSError as error: return type(error).__name__
print(json.dumps([say(address, port, *parts) for address, port, parts in json.loads(sys.argv[1])]))
"""


def say(opened_sandbox: object, *tries: tuple[str, int, list[str]]) -> list[str]:
    """What came of connections on which these parts were sent."""
    import json

    found: list[str] = python(opened_sandbox, _REQUEST, json.dumps(tries))  # type: ignore[arg-type]
    return found


def ok(text: str) -> bool:
    return text.startswith("HTTP/1.1 200")


def test_http_by_name(opened: Opener, world: World) -> None:
    sandbox = opened(egress=["allowed.test", "*.wild.test:80"])
    assert sandbox.config.network == "nat"
    good = "GET / HTTP/1.1\r\nHost: {}\r\n\r\n"
    ten = "203.0.113.10"
    told = say(
        sandbox,
        ("allowed.test", 80, [good.format("allowed.test")]),
        ("allowed.test", 80, [*good.format("Allowed.Test.:80")]),  # byte by byte
        ("deep.wild.test", 80, [good.format("deep.wild.test")]),
        ("allowed.test", 8080, ["GET http://allowed.test/x HTTP/1.1\r\nHost: allowed.test\r\n\r\n"]),
    )
    assert all(ok(text) for text in told), told
    assert "Connection: close" in told[0]
    bad = [
        (ten, 80, [good.format("other.test")]),
        (ten, 80, [good.format("wild.test")]),  # the entry is for what is below it
        ("deep.wild.test", 8080, [good.format("deep.wild.test")]),  # another port
        ("203.0.113.11", 80, [good.format("allowed.test")]),  # its name at another address
        (ten, 80, ["GET / HTTP/1.1\r\nHost: allowed.test\r\nHost: other.test\r\n\r\n"]),
        (ten, 80, ["GET / HTTP/1.1\r\n\r\n"]),
        (ten, 80, ["GET http://other.test/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n"]),
        (ten, 80, ["CONNECT other.test:443 HTTP/1.1\r\nHost: allowed.test\r\n\r\n"]),
        (ten, 80, ["GET / HTTP/1.1\r\nHost: other.test\r\n Host: allowed.test\r\n\r\n"]),
        (ten, 80, ["GET / HTTP/1.1\nHost: allowed.test\n\n\r\n\r\n"]),
        (ten, 80, ["GET / HTTP/1.1\r\nX: y\nHost: allowed.test\r\nHost : other.test\r\n\r\n"]),
        (ten, 80, ["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),
        (ten, 80, ["hello, world\n"]),
        (ten, 80, ["GET / HTTP/1.1\r\n" + "X: y\r\n" * 5000]),
        (ten, 7, ["\x80\x01\x02"]),
        (ten, 80, ["GET / HTTP/1.1\r\nHost: 203.0.113.10\r\n\r\n"]),
    ]
    world.seen()
    told = say(sandbox, *bad)  # type: ignore[arg-type]
    assert [text for text in told if ok(text)] == []
    assert [item for item in world.seen() if item["place"] != "dns"] == []
    reasons = [item.reason for item in sandbox.egress_log().items if item.protocol != "dns"][4:]
    assert "not in egress" in reasons and "HTTP with several Hosts" in reasons
    assert "an address that DNS does not give for this name" in reasons and "neither TLS nor HTTP" in reasons


def test_a_second_request_cannot_name_another_host(opened: Opener, world: World) -> None:
    sandbox = opened(egress=["allowed.test"])
    told = say(sandbox, ("allowed.test", 80, [
        "GET /1 HTTP/1.1\r\nHost: allowed.test\r\nConnection: keep-alive\r\nKeep-Alive: 100\r\n\r\n",
        "GET /2 HTTP/1.1\r\nHost: other.test\r\n\r\n"]))  # fmt: skip
    assert ok(told[0]) and "keep-alive" not in told[0].lower() and "/2" not in told[0]


def test_a_silent_client_is_refused(opened: Opener) -> None:
    """Where a server would speak first there is no name: an entry for its address lets it through."""
    sandbox = opened(egress=["allowed.test:22", "203.0.113.11:22"])
    told = python(sandbox, """
import json, socket
def listen(address):
    try:
        with socket.create_connection((address, 22), 60) as sock: return sock.recv(100).decode()
    except OSError as error: return type(error).__name__
print(json.dumps([listen("203.0.113.11"), listen("allowed.test")]))
""")
    assert told == ["SSH-2.0-world\r\n", "ConnectionResetError"]
    assert sandbox.egress_log().items[-1].reason == "no name was said"


def test_tls_by_name(opened: Opener, world: World) -> None:
    if world.certificate is None:
        pytest.skip("openssl is not installed: it makes the certificate")
    sandbox = opened(egress=["allowed.test:443", "*.wild.test"])
    sandbox.fs.write("/tmp/ca.pem", world.certificate.read_bytes())
    told = python(sandbox, """
import json, socket, ssl
def look(address, name, check=True, port=443):
    context = ssl.create_default_context(cafile="/tmp/ca.pem")
    context.check_hostname = check
    try:
        with socket.create_connection((address, port), 30) as sock:
            with context.wrap_socket(sock, server_hostname=name) as secure:
                secure.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                return secure.recv(20).decode()
    except OSError as error: return type(error).__name__
print(json.dumps([look("allowed.test", "allowed.test"), look("deep.wild.test", "deep.wild.test"),
    look("203.0.113.10", "allowed.test"),
    look("203.0.113.10", "other.test"), look("203.0.113.10", None, False), look("203.0.113.11", "allowed.test"),
    look("203.0.113.10", "203.0.113.10", False), look("allowed.test", "wild.test"),
    look("allowed.test", "allowed.test", port=8080)]))
""")
    assert told[:3] == ["HTTP/1.1 200 OK\r\nCon"] * 3
    assert not any(text.startswith("HTTP") for text in told[3:])
    noted = [(item.protocol, item.host, item.allowed) for item in sandbox.egress_log().items]
    assert noted[0] == ("tls", "allowed.test", True) and ("tls", "other.test", False) in noted


def test_dns_answers_only_what_is_allowed(opened: Opener, world: World) -> None:
    """Else every question could carry something out."""
    sandbox = opened(egress=["allowed.test", "203.0.113.11"])
    found = python(sandbox, """
import json, socket, struct
def look(name):
    try: return len(socket.getaddrinfo(name, 80, 0, socket.SOCK_STREAM))
    except socket.gaierror as error: return "refused"
def text(name):
    question = struct.pack(">6H", 8, 0x100, 1, 0, 0, 0) + name + struct.pack(">2H", 16, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20); sock.connect(("192.0.0.1", 53)); sock.send(question)
        return sock.recv(2000)[3] & 15
print(json.dumps([look("allowed.test"), look("other.test"), look("secret-4711.other.test"), look("x.allowed.test"),
    text(b"\\x04te\\x1b[\\x04test\\0"), text(b"\\x07allowed\\x04test\\0")]))
""")
    assert found == [2, "refused", "refused", "refused", 5, 0]
    asked = {item["name"] for item in world.seen() if item["place"] == "dns" and "name" in item}
    assert asked == {"allowed.test"}
    assert ok(attempt(sandbox, ("203.0.113.11", 80))["203.0.113.11 80"])
    refused = [item for item in sandbox.egress_log().items if item.protocol == "dns" and not item.allowed]
    assert {"secret-4711.other.test", "te?[.test"} <= {item.host for item in refused}


def test_named_private_addresses(opened: Opener, world: World) -> None:
    """An entry opens what is closed only where it names it, with a port; never the machine's loopback."""
    sandbox = opened(egress=["10.9.9.9:80", "192.168.0.0/16:80", "172.16.0.0/12", "169.254.169.254:80",
                             "203.0.113.77:9999", "10.77.0.0/24:9999", "[fd00::9]:80", "private.test",
                             "127.0.0.1:9999", "[::1]:9999", "0.0.0.0/0:80"])  # fmt: skip
    found = attempt(sandbox, ("10.9.9.9", 80), ("192.168.77.1", 80), ("169.254.169.254", 80), ("203.0.113.77", 9999),
                    ("fd00::9", 80), ("private.test", 80),
                    ("10.9.9.9", 8080), ("172.16.5.5", 80), ("10.77.0.1", 9999), ("127.0.0.1", 9999), ("::1", 9999),
                    ("100.64.0.9", 80))  # fmt: skip
    told = list(found.values())
    assert all(ok(text) for text in told[:6]), found
    assert not any(ok(text) for text in told[6:]), found


def test_names_that_lead_elsewhere_later(opened: Opener, world: World) -> None:
    """What counts is the address at the moment of the connection, whatever a name led to before."""
    world.ask({"zone": {"turn.test": ["203.0.113.10"]}})
    sandbox = opened(egress=["turn.test"])
    request = ["GET / HTTP/1.1\r\nHost: turn.test\r\n\r\n"]
    assert ok(say(sandbox, ("turn.test", 80, request))[0])
    world.ask({"zone": {"turn.test": ["169.254.169.254", "10.9.9.9", "127.0.0.1"]}})
    world.seen()
    told = say(sandbox, ("turn.test", 80, request), ("169.254.169.254", 80, request), ("10.9.9.9", 80, request))
    assert not any(ok(text) for text in told)
    assert [item for item in world.seen() if item["place"] != "dns"] == []


def test_hosts_file_leads_nowhere(opened: Opener, world: World) -> None:
    sandbox = opened(egress=["allowed.test"])
    sandbox.execute(["sh", "-c", "echo 203.0.113.11 allowed.test > /etc/hosts"], check=True)
    told = say(sandbox, ("allowed.test", 80, ["GET / HTTP/1.1\r\nHost: allowed.test\r\n\r\n"]))
    assert not ok(told[0]) and not any(item.get("address") == "203.0.113.11" for item in world.seen())


def test_nothing_at_all(opened: Opener, world: World) -> None:
    sandbox = opened(egress=[])
    assert not ok(attempt(sandbox, ("allowed.test", 80), ("203.0.113.10", 80))["203.0.113.10 80"])
    assert {item.allowed for item in sandbox.egress_log().items} == {False}
    assert world.seen() == []
    assert sandbox.info().egress == []


@pytest.mark.parametrize("entry", [
    "", "*.", "*.*.test", "a b", "http://a.test", "a.test/x", "a.test:0", "a.test:70000", "a.test:x", "a.test:",
    "1.2.3", "0x7f.1", "2130706433", "10.0.0.1/8", "10.0.0.0/33", "[::1", "[::1]x", "fe80::1%eth0", "::ffff:10.0.0.1",
    "-a.test", "a..test", "x" * 64 + ".test", "x" * 301, "a.test\n", "a.test:٤٤٣", "[a.test]:80",
])  # fmt: skip
def test_entries_that_mean_nothing(entry: str) -> None:
    with pytest.raises(InvalidConfig, match="egress"):
        SandboxConfig(egress=[entry])


def test_what_egress_goes_with() -> None:
    assert SandboxConfig(egress=["a.test"]).network == "nat"
    assert SandboxConfig(egress=["a.test"], network="nat").network == "nat"
    for network in ("none", "host"):
        with pytest.raises(InvalidConfig, match="cannot be enforced"):
            SandboxConfig(egress=["a.test"], network=network)
    with pytest.raises(InvalidConfig, match="1000"):
        SandboxConfig(egress=["a.test"] * 1001)
    config = SandboxConfig()
    config.egress = ["a.test"]
    assert config.network == "nat" and SandboxConfig.model_validate(config.model_dump()) == config
