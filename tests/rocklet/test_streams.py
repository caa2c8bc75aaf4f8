"""The cap on output: head and tail are kept exactly, and what is missing is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rock.rocklet.commands.output import Capped, as_text


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(0, 200))
def test_head_and_tail_are_kept(parts: list[bytes], limit: int) -> None:
    capped = Capped(limit)
    for part in parts:
        capped.add(part)
    whole = b"".join(parts)
    data, dropped = capped.take()
    if len(whole) <= limit:
        assert (data, dropped) == (whole, 0)
        return
    head, tail = limit - limit // 2, limit // 2
    assert dropped == len(whole) - limit
    assert data.startswith(whole[:head])
    assert data.endswith(whole[len(whole) - tail :] if tail else b"]\n")
    assert b"%d bytes dropped" % dropped in data


@given(st.binary(max_size=100))
def test_text_or_exact_bytes(data: bytes) -> None:
    text, exact = as_text(data)
    if exact is None:
        assert text.encode() == data
    else:
        assert "\ufffd" in text
