"""Forms are read the same however their bytes are cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.errors import InvalidConfig
from rock.http.multipart import Form, boundary_of

BOUNDARY = b"b0"
# Bytes that look like what separates parts, more often than chance has them.
DATA = st.lists(st.sampled_from([b"\r\n--b", b"\r\n", b"--", b"\r", b"-", b"0", b"x", b"\0\xff"])).map(b"".join)


def encode(parts: list[tuple[str, bytes]]) -> bytes:
    body = b"a preamble"
    for name, data in parts:
        body += b"\r\n--b0 \r\nContent-Disposition: form-data; name=" + name.encode() + b"\r\n\r\n" + data
    return body + b"\r\n--b0--\r\nan epilogue"


async def read(body: bytes, size: int, *, skip: bool = False) -> list[tuple[str, bytes]]:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), size):
            yield body[at : at + size]

    found = []
    async for part in Form(chunks(), BOUNDARY).parts():
        found.append((part.name, b"" if skip else b"".join([piece async for piece in part.data])))
    return found


@given(st.lists(st.tuples(st.sampled_from(["a", "file"]), DATA), min_size=1, max_size=4), st.integers(1, 40))
def test_parts_come_back(parts: list[tuple[str, bytes]], size: int) -> None:
    parts = [(name, data) for name, data in parts if b"\r\n--b0" not in b"\r\n" + data]
    body = encode(parts)
    assert asyncio.run(read(body, size)) == parts
    assert [name for name, _ in asyncio.run(read(body, size, skip=True))] == [name for name, _ in parts]


@given(st.integers(0, 60))
def test_a_body_that_is_cut_off(length: int) -> None:
    body = b"--b0\r\nContent-Disposition: form-data; name=a\r\n\r\nsome data, and more of it\r\n--b0--"
    with pytest.raises(InvalidConfig):
        asyncio.run(read(body[:length], 7))


def test_what_separates_parts() -> None:
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    for wrong in (None, "", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"):
        with pytest.raises(InvalidConfig):
            boundary_of(wrong)
