"""Values and frames as bytes, and what a hostile other side may send instead."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.guest.environments import frames, values

np = pytest.importorskip("numpy", reason="install the development extra: pip install -e .[dev]")

ARRAYS = [
    np.zeros((), np.float32), np.array([np.nan, -0.0, np.inf]), np.arange(6, dtype=">i4").reshape(2, 3),
    np.arange(24).reshape(2, 3, 4)[:, ::2, ::-1], np.zeros((0, 3), np.uint8), np.array(["a", "bé"]), np.array([b"x"]),
    np.array([True, False]), np.array([1 + 2j]), np.array(["2020-01-01"], "M8[D]"), np.random.bytes(3) and
    np.random.default_rng(1).integers(0, 255, (210, 160, 3), np.uint8), np.array([""]), np.float16([1.5]),
]  # fmt: skip
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.sampled_from(["$a", "$d", "$t"]) | st.integers(), inner)
        | st.sets(st.integers())
    ),
    max_leaves=20,
)


def there(value: object, **more: bool) -> Any:
    return values.decode(b"".join(bytes(part) for part in values.encode(value, **more)))


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and math.isnan(left):
        return type(right) is float and math.isnan(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(plain)
def test_plain_values_arrive_as_they_were(value: object) -> None:
    assert same(value, there(value))


results = st.lists(
    st.sampled_from([0, 1, True, False, 0.0, -0.0, 1.0, None, math.inf, 1 << 80, "1"])
    | st.builds(
        lambda shape, dtype, fill: np.full(shape, fill, dtype),
        st.sampled_from([(), (1,), (2,), (2, 1), (600,), (3, 9000)]),
        st.sampled_from(["<f4", ">f4", "?", "<i8", "<f8", "<U1"]),
        st.integers(0, 3),
    ),
    max_size=3,
)


@given(results, st.sampled_from([{}, {"a": 1}, {"$a": 1}, None, 0, ()]))
def test_a_form_that_is_known_holds_only_what_is_of_it(strict: list[Any], info: object) -> None:
    """Forms are remembered from one example to the next: what is equal in Python is not the same thing."""
    for kept in (bytes, bytearray):  # large arrays are not copied out of what may be written to
        found = values.decode(memoryview(kept(b"".join(bytes(p) for p in values.encode_result(list(strict), info)))))
        assert len(found) == len(strict) + 1 and type(found[-1]) is type(info) and found[-1] == info
        for sent, came in zip(strict, found, strict=False):
            if isinstance(sent, np.ndarray):
                kind = sent.dtype.newbyteorder("<")
                assert (came.dtype, came.shape, came.tobytes()) == (kind, sent.shape, sent.astype(kind).tobytes())
                came += came[()].dtype.type(0)  # it is its own, and may be written to
            else:
                assert type(came) is type(sent) and repr(came) == repr(sent)


def test_a_form_that_is_known_is_refused_without_its_bytes() -> None:
    whole = b"".join(values.encode_result([np.zeros((8, 4), np.float32), 1.0], {}))
    first, second = values.decode(whole), values.decode(whole)
    assert first[2] is not second[2] and not np.shares_memory(first[0], second[0])
    with pytest.raises(values.Malformed):
        values.decode(whole[:-1])


def test_large_arrays_are_over_the_bytes_that_came() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (210, 160, 3), np.uint8)
    for sent in (picture, np.arange(60_000, dtype=np.float64)):
        for _ in range(2):  # of a form that is not known, and of one that is
            whole = bytearray(b"".join(bytes(part) for part in values.encode_result([sent, 0.5], {})))
            found = values.decode(memoryview(whole))[0]
            assert np.shares_memory(found, np.frombuffer(whole, np.uint8)) and (found == sent).all()
        found = values.decode(bytes(whole))[0]
        assert found.flags.writeable and (found == sent).all()
        with pytest.raises(values.Malformed):
            values.decode(memoryview(whole)[:-1])


def test_a_known_form_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    there(np.zeros(5001, np.uint8))
    monkeypatch.setattr(values, "LIMIT", 5000)
    with pytest.raises(values.Unsendable, match="over the limit"):
        values.encode(np.zeros(5001, np.uint8))


def test_only_so_many_forms_are_known() -> None:
    for size in range(1000):
        there(np.zeros(size, np.uint8))
        values.decode(b"".join(values.encode_result([float(size)], {})))
    assert len(values._PLANS) <= 64 and len(values._HEADS) <= 64


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_arrive_bit_by_bit(array: np.ndarray[Any, Any]) -> None:
    found = there({"it": [array]})["it"][0]
    assert found.shape == array.shape and found.dtype == array.dtype.newbyteorder("<")
    assert found.tobytes() == array.astype(found.dtype).tobytes() and found.flags.writeable


def test_numpy_s_other_values() -> None:
    for scalar in (np.float32(0.1), np.int64(-3), np.bool_(True), np.float64("nan"), np.str_("é")):
        found = there(scalar)
        assert type(found) is type(scalar) and found.tobytes() == scalar.tobytes()
    objects = np.empty((2, 1), dtype=object)
    objects[0, 0], objects[1, 0] = {"x": np.arange(2)}, None
    found = there(objects)
    assert found.dtype == object and found.shape == (2, 1) and found[1, 0] is None
    assert (found[0, 0]["x"] == [0, 1]).all()
    assert there(OrderedDict(a=1)) == {"a": 1}


def test_what_cannot_travel() -> None:
    with pytest.raises(values.Unsendable, match="type object"):
        values.encode([object()])
    told = there({"it": object(), "fine": 1}, describe=True)
    assert told["fine"] == 1 and told["it"]["$type"] == "builtins.object" and "object at" in told["it"]["$repr"]
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(values.Unsendable, match="nested deeper"):
        values.encode(endless, describe=True)


def message(tree: object, data: bytes = b"") -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack(">I", len(text)) + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0\0", b"\xff\xff\xff\xff{}", message(1)[:-1] + b"{", message({"$a": ["<f4", [4], 0]}, b"1234"),
        message({"$a": ["<f4", [-1], 0]}), message({"$a": ["|O8", [1], 0]}, bytes(8)), message({"$a": [["O"], [1], 0]}),
        message({"$a": ["<f4", [1 << 62, 1 << 62], 0]}, b"1234"), message({"$a": ["<f4", [1] * 99, 0]}, b"1234"),
        message({"$a": ["<f4", 1, 0]}, b"1234"), message({"$a": ["<f4", [1], -4]}, b"1234"), message({"$a": 1}),
        message({"$o": [[1 << 40], []]}), message({"$n": ["<U99999999", 0]}), message({"$b": [0, 1]}),
        message({"$d": [1]}), message({"$s": [[]]}), message({"$t": 5}), message({"$a": ["<U0", [1 << 40], 0]}),
        struct.pack(">I", 200_000) + b"[" * 200_000,
    ],
)  # fmt: skip
def test_malformed_values_are_refused(data: bytes) -> None:
    with pytest.raises(values.Malformed):
        values.decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    for attempt in (data, struct.pack(">I", len(data)) + data):
        try:
            values.decode(attempt)
        except values.Malformed:
            pass


ASKED = st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(-1, 2**62), st.binary())


@given(st.lists(ASKED, max_size=5))
def test_frames_are_split_as_they_were_joined(asked: list[tuple[int, int, int, bytes]]) -> None:
    heads = [frames.HEAD.pack(len(p), op, 0, env, 3, index) + p for op, env, index, p in asked]
    assert [(f[0], f[2], f[4], bytes(f[5])) for f in frames.split(b"".join(heads))] == asked
    if heads:
        with pytest.raises(ValueError):
            list(frames.split(b"".join(heads)[:-1]))


def test_without_numpy_arrays_are_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    (sent,) = values.encode([np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(0.5)])
    monkeypatch.setattr(values, "_NUMPY", [None])
    assert values.decode(sent) == [[[0, 1, 2], [3, 4, 5]], 0.5]
