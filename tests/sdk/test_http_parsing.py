"""Reading answers, without a network: any cutting of the bytes gives the same answer, and nonsense is an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.errors import InvalidConfig, ServerError
from rock.sdk.http import Address, Answer, header_lines, query_string

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 11\r\n\r\nhello world"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\ntrailer: x\r\n\r\n"
)
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + PLAIN
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\nhello world"


def read(raw: bytes, cuts: list[int] | None = None) -> tuple[Answer, bytes]:
    answer, body, at = Answer(), b"", 0
    for cut in [*sorted(cuts or []), len(raw)]:
        if cut > at:
            answer.feed(raw[at:cut])
            body += answer.take()
            at = cut
    return answer, body


@given(st.sampled_from([PLAIN, CHUNKED, INTERIM, UNTIL_CLOSE]), st.lists(st.integers(1, 150), max_size=12))
def test_any_cutting_gives_the_same_answer(raw: bytes, cuts: list[int]) -> None:
    answer, body = read(raw, [cut for cut in cuts if cut < len(raw)])
    assert (answer.status, body) == (200, b"hello world")
    if raw is UNTIL_CLOSE:
        answer.end()
    assert answer.done
    assert answer.reusable is (raw is not UNTIL_CLOSE)


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nserver: x\n\n",
        b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * (70 << 10),
    ],
)
def test_nonsense_is_an_error(raw: bytes) -> None:
    with pytest.raises(ServerError, match="malformed"):
        read(raw)


@given(st.binary(max_size=300))
def test_random_bytes_never_pass_as_an_answer(raw: bytes) -> None:
    answer = Answer()
    try:
        answer.feed(b"HTTP/1.1 " + raw)
    except ServerError:
        return
    assert answer.status == 0 or 200 <= answer.status <= 999


def test_a_cut_off_answer_is_an_error() -> None:
    for stop in range(20, len(PLAIN)):
        answer, _ = read(PLAIN[:stop])
        with pytest.raises(ServerError, match="in the middle"):
            answer.end()


def test_bytes_after_the_answer_spoil_the_connection() -> None:
    answer, body = read(PLAIN + b"HTTP/1.1 200 OK\r\n")
    assert body == b"hello world" and answer.done and not answer.reusable
    answer, _ = read(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
    assert answer.done and not answer.reusable


def test_addresses() -> None:
    address = Address.parse("https://Example.org/rock/api/ ")
    assert (address.host, address.port, address.tls, address.path) == ("example.org", 443, True, "/rock/api")
    assert address.host_header == "example.org"
    assert Address.parse("http://[::1]:8080").host_header == "[::1]:8080"
    assert Address.parse("http://127.0.0.1:80").host_header == "127.0.0.1"


@pytest.mark.parametrize(
    "url", ["", "localhost:8080", "ftp://x", "http://", "http://x:99999", "http://u:p@x", "http://x/?a=1", "http://a b"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidConfig, match="base_url"):
        Address.parse(url)


def test_headers_cannot_smuggle() -> None:
    for name, value in (("x", "a\r\nb: c"), ("x y", "a"), ("", "a"), ("x", "\u20ac"), ("x:", "a")):
        with pytest.raises(InvalidConfig, match="header"):
            header_lines({name: value})


def test_queries() -> None:
    assert query_string({"a": None}) == ""
    assert query_string({"path": "/a b&c", "wait": 1.5, "flag": True}) == "?path=%2Fa%20b%26c&wait=1.5&flag=1"
