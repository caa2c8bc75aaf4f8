"""The parsers that read what a sandbox or the network sends: whatever comes, a name to believe or a refusal."""

from __future__ import annotations

import ipaddress
import os
import ssl
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rock.egress import dns, log
from rock.egress.policy import ClientGreeting, Policy, Refused, Verdict, look
from rock.protocol import egress

bounded = settings(deadline=None, max_examples=60)


def hello(name: str | None) -> bytes:
    """A real client's first bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


HELLO = hello("allowed.test")


def fragmented(data: bytes, size: int) -> bytes:
    """The same handshake message in records of that size."""
    body = data[5:]
    return b"".join(data[:3] + struct.pack(">H", len(body[at : at + size])) + body[at : at + size]
                    for at in range(0, len(body), size))  # fmt: skip


def with_extension(data: bytes, kind: int, body: bytes) -> bytes:
    """A hello with one extension more."""
    extra = struct.pack(">HH", kind, len(body)) + body
    at = 5 + 4 + 2 + 32
    at += 1 + data[at]
    at += 2 + struct.unpack_from(">H", data, at)[0]
    at += 1 + data[at]
    size = struct.unpack_from(">H", data, at)[0] + len(extra)
    whole = data[5:at] + struct.pack(">H", size) + data[at + 2 :] + extra
    whole = whole[:1] + (len(whole) - 4).to_bytes(3, "big") + whole[4:]
    return data[:3] + struct.pack(">H", len(whole)) + whole


@bounded
@given(st.integers(8, 300))
def test_hello_in_any_pieces(size: int) -> None:
    assert look(HELLO) == ClientGreeting("tls", "allowed.test", HELLO)
    split = fragmented(HELLO, size)
    assert look(split) == ClientGreeting("tls", "allowed.test", split)
    for end in range(1, len(split), 7):
        assert look(split[:end]) is None or end > 4 + len(HELLO)


@bounded
@given(st.data())
def test_a_damaged_hello_never_tells_another_name(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(HELLO) - 1))
    damaged = HELLO[:at] + bytes([data.draw(st.integers(0, 255))]) + HELLO[at + 1 :]
    try:
        told = look(damaged)
    except Refused:
        return
    assert told is None or told.first == damaged
    if told is not None and told.protocol == "tls":
        egress.name_of(told.name)


@pytest.mark.parametrize(("data", "reason"), [
    (hello(None), "without a server name"),
    (with_extension(HELLO, 0xFE0D, b"x"), "encrypted hello"),
    (with_extension(HELLO, 0, b"\0\x0d\0\0\x0aother.test"), "malformed"),
    (b"\x16\x03\x01\0\x04\x02\0\0\0", "does not begin"),
    (b"\x16\x03\x01\0\0", "malformed"),
    (b"\x16\x03\x01\0\x04\x01\xff\xff\xff", "too long"),
    (b"\x16\x02\x01\0\x04\x01", "malformed"),
    (fragmented(HELLO, 1), "too many pieces"),
    (HELLO.replace(b"allowed.test", b"al\0owed.test"), "no host name"),
    (HELLO.replace(b"allowed.test", b"allowed\xfftest"), "no host name"),
    (HELLO.replace(b"allowed.test", b"127.0.00.001"), "no host name"),
])  # fmt: skip
def test_hellos_that_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        look(data)


@bounded
@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    for start in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\nHost: a.test\r\n", HELLO[:60]):
        try:
            told = look(start + data)
        except Refused:
            continue
        assert told is None or egress.name_of(told.name) == told.name


def test_http_heads() -> None:
    told = look(b"POST /x HTTP/1.1\r\nhost:\tA.Test:80 \r\nConnection: keep-alive, X\r\nX: 1\r\n\r\nbody")
    assert told is not None and (told.protocol, told.name) == ("http", "a.test")
    assert told.first == b"POST /x HTTP/1.1\r\nhost:\tA.Test:80 \r\nX: 1\r\nConnection: close\r\n\r\nbody"
    upgrade = look(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert upgrade is not None and upgrade.first.endswith(b"\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
    other = look(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n")
    assert other is not None and other.first == b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"


# ---- DNS ----

NAMES = st.lists(st.from_regex(r"[a-z0-9_-]{1,20}", fullmatch=True), min_size=1, max_size=6).map(".".join)


@bounded
@given(NAMES, st.integers(0, 65535), st.sampled_from([dns.A, dns.AAAA, dns.TXT]))
def test_questions_come_back(name: str, number: int, kind: int) -> None:
    question = dns.parse_question(dns.encode_query(number, name, kind))
    assert (question.number, question.name, question.kind, question.size) == (number, name, kind, 1232)


@bounded
@given(NAMES, st.lists(st.ip_addresses(v=4), max_size=60), st.booleans())
def test_answers_come_back(name: str, found: list[ipaddress.IPv4Address], datagram: bool) -> None:
    question = dns.parse_question(dns.encode_query(5, name, dns.A))
    data = dns.answer(question, dns.OK, tuple(found), 60, datagram=datagram)
    reply = dns.parse_reply(data, 5, name, dns.A)
    if reply.truncated:
        assert datagram and not reply.addresses
    else:
        assert reply.addresses == tuple(dict.fromkeys(found))
    for number, asked, kind in ((6, name, dns.A), (5, name + "x", dns.A), (5, name, dns.AAAA)):
        with pytest.raises(ValueError):
            dns.parse_reply(data, number, asked, kind)


@bounded
@given(st.binary(max_size=300), st.data())
def test_any_message(data: bytes, draw: st.DataObject) -> None:
    question = dns.parse_question(dns.encode_query(5, "a.test", dns.A))
    good = dns.answer(question, 0, (ipaddress.ip_address("1.2.3.4"),), 1,
                      datagram=True)  # fmt: skip
    at = draw.draw(st.integers(0, len(good)))
    for message in (data, good[:at] + data, dns.encode_query(1, "a.test", 1)[:at] + data):
        for parse in (dns.parse_question, lambda m: dns.parse_reply(m, 5, "a.test", dns.A)):
            try:
                parse(message)  # type: ignore[operator]
            except ValueError:
                pass


def test_an_answer_counts_only_for_the_name_that_was_asked() -> None:
    """Records of other names, which a server or a forger adds, are not taken."""
    def record(name: bytes, kind: int, data: bytes) -> bytes:
        return name + struct.pack(">HHIH", kind, 1, 60, len(data)) + data

    other, alias = b"\x05other\x04test\0", b"\x05alias\x04test\0"
    body = (record(other, dns.A, bytes([6, 6, 6, 6])) + record(b"\xc0\x0c", dns.CNAME, alias)
            + record(alias, dns.A, bytes([1, 2, 3, 4])) + record(other, dns.CNAME, alias))
    asked = dns.encode_query(5, "a.test", dns.A)[12:-11]
    message = struct.pack(">6H", 5, 0x8180, 1, 4, 0, 0) + asked + body
    assert [str(a) for a in dns.parse_reply(message, 5, "a.test", dns.A).addresses] == ["1.2.3.4"]
    loop = struct.pack(">6H", 5, 0x8180, 1, 1, 0, 0) + asked + b"\xc0" + bytes([12 + len(asked)])
    with pytest.raises(ValueError):
        dns.parse_reply(loop, 5, "a.test", dns.A)


# ---- addresses and policies ----


@bounded
@given(st.ip_addresses())
def test_what_is_not_global_is_never_public(address: egress.Address) -> None:
    """Whatever the standard library does not call global is refused; of the rest a few are."""
    documentation = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20")
    if any(address in ipaddress.ip_network(text) for text in documentation):
        return  # nobody's
    verdict, _ = Policy(None).judge(address, 80)
    if verdict is Verdict.ALLOW:
        # ranges inside of others that newer versions of the library know to be special
        special = ("5f00::/16", "2620:4f:8000::/48", "192.31.196.0/24")
        assert address.is_global or any(address in ipaddress.ip_network(text) for text in special)
        assert not address.is_multicast and not address.is_loopback and not address.is_private


@bounded
@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_another_spelling_is_the_same_address(address: ipaddress.IPv4Address, port: int) -> None:
    policy = Policy(None)
    plain = policy.judge(address, port)
    assert policy.judge(ipaddress.ip_address(f"::ffff:{address}"), port) == plain
    assert policy.judge(ipaddress.ip_address(f"64:ff9b::{address}"), port)[0] is plain[0]


@pytest.mark.parametrize(("entries", "address", "port", "own", "verdict"), [
    (["10.0.0.0/8:80"], "10.1.2.3", 80, False, Verdict.ALLOW),
    (["10.0.0.0/8:80"], "10.1.2.3", 81, False, Verdict.REFUSE),
    (["10.0.0.0/8"], "10.1.2.3", 80, False, Verdict.REFUSE),
    (["10.0.0.0/8:80"], "10.1.2.3", 80, True, Verdict.REFUSE),
    (["10.1.2.3:80"], "10.1.2.3", 80, True, Verdict.ALLOW),
    (["8.0.0.0/5:80"], "10.1.2.3", 80, False, Verdict.REFUSE),
    (["*:80"], "10.1.2.3", 80, False, Verdict.REFUSE),
    (["*:80"], "1.1.1.1", 80, False, Verdict.ALLOW),
    (["*:80"], "1.1.1.1", 443, False, Verdict.REFUSE),
    (["127.0.0.1:80"], "127.0.0.1", 80, False, Verdict.REFUSE),
    (["127.0.0.1:80"], "127.0.0.1", 80, True, Verdict.REFUSE),
    (["1.1.1.1"], "1.1.1.1", 80, False, Verdict.ALLOW),
    (["1.1.1.1"], "1.1.1.1", 80, True, Verdict.REFUSE),
    (["a.test:80"], "1.1.1.1", 80, False, Verdict.ASK),
    (["a.test:80"], "1.1.1.1", 81, False, Verdict.REFUSE),
    (["a.test"], "10.1.2.3", 80, False, Verdict.REFUSE),
    ([], "1.1.1.1", 80, False, Verdict.REFUSE),
])  # fmt: skip
def test_verdicts(entries: list[str], address: str, port: int, own: bool, verdict: Verdict) -> None:
    assert Policy(entries).judge(ipaddress.ip_address(address), port, own=own)[0] is verdict


def test_embedded_addresses() -> None:
    for text in ("::ffff:169.254.169.254", "64:ff9b::169.254.169.254"):
        assert egress.closed(ipaddress.ip_address(text)) == "metadata"
    assert egress.never(ipaddress.ip_address("2002:a9fe:a9fe::1")) == "reserved"


# ---- the journal ----


def test_the_journal_is_bounded_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "journal"

    def opened() -> log.Journal:
        return log.Journal(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))

    first = opened()
    for number in range(6000):
        entry = first.begin("203.0.113.10", 80)
        entry.host = "x" * 200
        first.end(entry)
        first.end(entry)
        assert entry.number == number + 1
    still = first.begin("203.0.113.11", 80)
    listed = first.listed()
    assert (listed["total"], listed["dropped"], len(listed["items"])) == (6001, 5000, 1001)
    assert listed["items"][-1]["ended_at"] is None and path.stat().st_size < 1 << 20
    first.close()
    assert log.read(str(path))["items"][-1]["number"] == still.number
    with open(path, "ab") as file:
        file.write(b'{"number": 70')  # a crash
    again = opened()
    assert again.total == 6001 and again.begin("203.0.113.12", 80).number == 6002
    again.close()
    assert log.read(str(path))["total"] == 6002
    assert log.read(str(tmp_path / "none")) == {"items": [], "total": 0, "dropped": 0}
