"""Encoding of environment values: JSON for small values, raw bytes for arrays. Nothing is ever unpickled.

    length of the JSON (4 bytes, big-endian) | JSON | bytes of the arrays, one after another

Types that JSON lacks are objects with one key:

    {"$a": [dtype, shape, offset]}    a numpy array, C order, little-endian    {"$n": [dtype, offset]}   a numpy scalar
    {"$t": [..]}  a tuple             {"$s": [..]}  a set                      {"$b": [offset, length]}  bytes
    {"$d": [[key, value], ..]}        a dict with keys that are not strings, or that looks like one of these
    {"$o": [shape, [..]]}             an array of objects                      {"$g": [nodes, edges, links]}  a graph

NaN and infinities are encoded as Python's JSON writes them, those in arrays bit by bit. Without numpy, arrays are
decoded as nested lists. Both sides validate their input: the peer may be hostile.

Standard library only; numpy is optional.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

LIMIT = 256 << 20  # maximum bytes of one value
_ENCODER = json.JSONEncoder(check_circular=False)  # `pack` has bounded the depth
_LENGTH = struct.Struct(">I")
_DTYPE = re.compile(r"[<|]([biufcSU])(\d{1,8})|<[Mm]8(\[\d{0,6}[a-zA-Z]{1,7}\])?")
_FORMATS = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q",
            "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip
_PLAIN = (str, int, bool, type(None))
_BASES: tuple[Callable[[Any], Any], ...] = (int, float, str, dict, list, tuple)
_DIMENSIONS = 32  # the maximum of every numpy version
_SMALL = 4096  # bytes
_LARGE = 64 << 10
_ALIGNED = 16  # bytes
_SENT: dict[Any, str] = {}  # types of elements that are sent unchanged
_REPR_KEPT = 2000
_DEPTH = 100


class Unsendable(TypeError):
    """A value that cannot be encoded."""


class Malformed(ValueError):
    """Bytes that are not a valid value."""


def described(value: object) -> dict[str, str]:
    """The replacement of a value that cannot be encoded: its type and its repr."""
    try:
        text = repr(value)[:_REPR_KEPT]
    except Exception as error:
        text = f"<its repr raised {type(error).__name__}>"
    return {"$type": f"{type(value).__module__}.{type(value).__qualname__}", "$repr": text}


def _text_maker() -> Callable[[Any], str]:
    """An equivalent of `_ENCODER.encode` that reuses one encoder instead of creating one per call."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return _ENCODER.encode
    quote = json.encoder.encode_basestring_ascii
    chunks = make(None, _ENCODER.default, quote, None, ":", ",", False, False, True)
    return lambda tree: "".join(chunks(tree, 0))


_dumps = _text_maker()


def _raw_bytes(np: Any, value: Any) -> Any:
    """The bytes of an array; a copy instead of a view when it is small, which is faster. The array may change after the
    return."""
    return value.tobytes() if value.nbytes < _SMALL else np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _strict(value: object) -> Any:
    raise Unsendable(f"a value of type {type(value).__name__} cannot be sent")


class _Packer:
    def __init__(self, odd: Callable[[object], Any]) -> None:
        self.odd = odd
        self.parts: list[Any] = []
        self.size = 0

    def add(self, data: Any, size: int) -> int:
        offset = self.size
        self.parts.append(data)
        self.size += size
        return offset

    def pack(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in _PLAIN or kind is float:
            return value
        if depth > _DEPTH:
            raise Unsendable(f"a value is nested deeper than {_DEPTH}")
        if kind is dict:
            return self._dict(value, depth)
        if kind is list:
            return [self.pack(item, depth + 1) for item in value]
        if kind is tuple:
            return {"$t": [self.pack(item, depth + 1) for item in value]}
        if kind.__module__ == "numpy":
            return self._numpy(value, depth)
        return self._other(value, depth)

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        if all(type(key) is str for key in value) and not (len(value) == 1 and next(iter(value))[:1] == "$"):
            return {key: self.pack(item, depth + 1) for key, item in value.items()}
        return {"$d": [[self.pack(k, depth + 1), self.pack(v, depth + 1)] for k, v in value.items()]}

    def _numpy(self, value: Any, depth: int) -> Any:
        np = _numpy()
        if type(value) is np.ndarray and (dtype := _SENT.get(value.dtype)) is not None and value.nbytes < _SMALL:
            data = value.tobytes()
            return {"$a": [dtype, value.shape, self.add(data, len(data))]}
        if isinstance(value, np.ndarray):
            if type(value) is not np.ndarray and value.dtype.kind != "O":
                value = np.asarray(value)
            if value.dtype.kind == "O":
                return {"$o": [list(value.shape), [self.pack(item, depth + 1) for item in value.ravel().tolist()]]}
            dtype, data = self._raw(np, value)
            return {"$a": [dtype, list(value.shape), self.add(data, len(data))]}
        if isinstance(value, np.generic) and value.dtype.kind not in "OV":
            dtype, data = self._raw(np, np.asarray(value))
            return {"$n": [dtype, self.add(data, len(data))]}
        return self.odd(value)

    def _raw(self, np: Any, value: Any) -> tuple[str, Any]:
        dtype = value.dtype
        if dtype.itemsize == 0:  # strings of length zero
            value = value.astype(f"{dtype.kind}1")
            dtype = value.dtype
        if dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big"):
            dtype = dtype.newbyteorder("<")
            value = value.astype(dtype)
        if not _DTYPE.fullmatch(dtype.str):
            raise Unsendable(f"an array of {dtype} cannot be sent")
        if len(_SENT) < 256:
            _SENT[dtype] = dtype.str
        return dtype.str, _raw_bytes(np, value)

    def _other(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(value)
            return {"$b": [self.add(data, len(data)), len(data)]}
        if kind in (set, frozenset):
            return {"$s": [self.pack(item, depth + 1) for item in sorted(value, key=repr)]}
        if kind.__name__ == "GraphInstance" and isinstance(value, tuple) and len(value) == 3:
            return {"$g": [self.pack(item, depth + 1) for item in value]}
        if getattr(kind, "__module__", "").startswith("numpy") and "numpy" in sys.modules:
            return self._numpy(value, depth)
        for base in _BASES:
            if isinstance(value, base):  # type: ignore[arg-type]
                return self.pack(base(value), depth)
        return self.odd(value)


def encode(value: object, *, describe: bool = False) -> list[Any]:
    """The value as byte strings and contiguous arrays of bytes, to be written one after the other.

    describe: values that cannot be encoded become {"$type", "$repr"}; otherwise they raise Unsendable with the type.
    """
    if (known := _again([value], False)) is not None:
        return known
    packer = _Packer(described if describe else _strict)
    return _finish(packer, packer.pack(value))


def encode_result(strict: list[object], lenient: object) -> list[Any]:
    """[*strict, lenient], where only values in `lenient` may be described."""
    if type(lenient) is dict and not lenient and (known := _again(strict, True)) is not None:
        return known
    packer = _Packer(_strict)
    tree = [packer.pack(value) for value in strict]
    packer.odd = described
    return _finish(packer, [*tree, packer.pack(lenient)])


_HEADS: dict[Any, bytes] = {}  # encoded headers by types and shapes
_KNOWN = 64
_SCALARS = (float, bool, int, type(None))
_COUNTED = (bool, int)  # the types of repeated actions
_WORD = 1 << 63


def _again(values: list[Any], listed: bool) -> list[Any] | None:
    """Encode arrays and numbers with a cached header: only the bytes of the arrays differ. With `listed` they are the
    start of a list that ends with an empty dict; otherwise there is one value. None when the cache does not apply."""
    np = _imported_numpy()
    if np is None:
        return None
    key: list[Any] = [listed]
    arrays: list[Any] = []
    size = 0
    for value in values:
        kind = type(value)
        if kind is np.ndarray:
            size += value.nbytes
            key += (value.dtype, value.shape)
            arrays.append(value)
        elif kind in _SCALARS and (kind is not int or -_WORD < value < _WORD):
            key.append(repr(value))  # distinguishes 1, 1.0, True and 0.0, -0.0
        else:
            return None
    whole = tuple(key)
    head = _HEADS.get(whole)
    if head is None:
        head = _head(values, listed)
        if head is None:
            return None
        if len(_HEADS) >= _KNOWN:
            _HEADS.clear()
        _HEADS[whole] = head
    if size > LIMIT - len(head):
        return None
    found = [head, *(_raw_bytes(np, array) for array in arrays)]
    return [b"".join(found)] if size < _SMALL else found


def _head(values: list[Any], listed: bool) -> bytes | None:
    np = _numpy()
    if not all(type(value) is not np.ndarray or _SENT.get(value.dtype) == value.dtype.str for value in values):
        return None
    packer = _Packer(_strict)
    tree = [packer.pack(value) for value in values]
    return _headed(_dumps([*tree, {}] if listed else tree[0]).encode())


def _headed(text: bytes) -> bytes:
    """The JSON with padding, so that the following array is aligned."""
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNED)
    return _LENGTH.pack(len(text)) + text


def _finish(packer: _Packer, tree: Any) -> list[Any]:
    try:
        text = _dumps(tree).encode()
    except (ValueError, RecursionError) as error:
        raise Unsendable(str(error)) from None
    if len(text) + packer.size > LIMIT:
        raise Unsendable(f"a value of {len(text) + packer.size} bytes is over the limit of {LIMIT}")
    if packer.size < 4096:
        return [b"".join((_LENGTH.pack(len(text)), text, *packer.parts))]
    return [_headed(text), *packer.parts]


def decode(data: bytes | memoryview, graph: Callable[[Any, Any, Any], Any] | None = None) -> Any:
    """Decode a value; Malformed when the bytes are invalid. Arrays are copies, except large ones of a writable buffer,
    which they then own. `graph` constructs graphs from parts."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        start = _LENGTH.size + length
        if start > len(data):
            raise Malformed("it ends too early")
        text = bytes(data[_LENGTH.size : start])
        plan = _PLANS.get(text)
        if plan is not None:
            return plan.filled(memoryview(data)[start:])
        tree = json.loads(text)
        value = _Unpacker(memoryview(data)[start:], graph).resolve(tree) if b'"$' in text else tree
        if length < _PLANNED:
            _Plan.learn(text, tree)
        return value
    except Malformed:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError, struct.error) as error:
        raise Malformed(f"{type(error).__name__}: {str(error)[:200]}") from None


def _owned(found: Any) -> Any:
    """An array over received bytes for the caller. A writable buffer has no other owner."""
    if found.nbytes >= _LARGE and (flags := found.flags).writeable and flags.aligned:
        return found
    return found.copy()


_PLANNED = 512  # bytes of JSON
_PLANS: dict[bytes, _Plan] = {}


class _Plan:
    """A cached decoding plan for one JSON text: an environment's responses have the same form at each step."""

    def __init__(self, items: list[Any], listed: bool) -> None:
        self._items = items
        self._listed = listed

    @staticmethod
    def learn(text: bytes, tree: Any) -> None:
        """Cache the plan of a validated value: an array, an integer, or a list of arrays, JSON scalars and empty
        dicts."""
        np = _numpy()
        listed = type(tree) is list
        items: list[Any] = []
        for item in tree if listed else [tree]:
            if type(item) is dict and item:
                if np is None or list(item) != ["$a"]:
                    return
                dtype, shape, offset = item["$a"]
                items.append((tuple(shape), _taken(np, dtype), offset))
            elif type(item) is list or not (listed or type(item) in _COUNTED):
                return
            else:
                items.append(item)
        if len(_PLANS) >= _KNOWN:
            _PLANS.clear()
        _PLANS[text] = _Plan(items, listed)

    def filled(self, data: memoryview) -> Any:
        np = _imported_numpy()
        array = np.ndarray if np is not None else None
        found: list[Any] = []
        for item in self._items:
            kind = type(item)
            if kind is tuple:
                shape, dtype, offset = item
                found.append(_owned(array(shape, dtype, data, offset)))  # type: ignore[misc]
            else:
                found.append({} if kind is dict else item)
        return found if self._listed else found[0]


class _Unpacker:
    def __init__(self, data: memoryview, graph: Callable[[Any, Any, Any], Any] | None) -> None:
        self.data = data
        self.graph = graph

    def resolve(self, value: Any) -> Any:
        """Replace encoded types in the tree; the depth is that of the JSON."""
        kind = type(value)
        if kind is list:
            return [item if type(item) in _LEAVES else self.resolve(item) for item in value]
        if kind is not dict:
            return value
        if len(value) == 1:
            (key,) = value
            method = _KINDS.get(key)
            if method is not None:
                return method(self, value[key] if key in _FLAT else self.resolve(value[key]))
        return {key: item if type(item) in _LEAVES else self.resolve(item) for key, item in value.items()}

    def part(self, offset: Any, length: int) -> memoryview:
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= len(self.data):
            raise Malformed("bytes outside of the value")
        return self.data[offset : offset + length]

    def array(self, value: Any) -> Any:
        dtype, shape, offset = value
        np = _numpy()
        if np is None:
            shape = _shape(shape)
            return _nested(_items(dtype, self.part(offset, math.prod(shape) * _width(dtype))), shape)
        if type(offset) is not int or offset < 0 or type(shape) is not list or len(shape) > _DIMENSIONS:
            raise Malformed("no array")
        if shape and min(shape) < 0:  # numpy checks the rest, but accepts -1 as "infer"
            raise Malformed("no shape of an array")
        return _owned(np.ndarray(shape, _taken(np, dtype), self.data, offset))

    def scalar(self, value: Any) -> Any:
        dtype, offset = value
        data = self.part(offset, _width(dtype))
        np = _numpy()
        return _items(dtype, data)[0] if np is None else np.frombuffer(data, dtype)[0]

    def objects(self, value: Any) -> Any:
        shape, items = value
        shape = _shape(shape)
        if type(items) is not list or math.prod(shape) != len(items):
            raise Malformed("an array of another size than it says")
        np = _numpy()
        if np is None:
            return _nested(items, shape)
        flat = np.empty(len(items), dtype=object)
        for place, item in enumerate(items):
            flat[place] = item
        return flat.reshape(shape)

    def blob(self, value: Any) -> bytes:
        offset, length = value
        return bytes(self.part(offset, length))

    def instance(self, value: Any) -> Any:
        nodes, edges, links = value
        return (nodes, edges, links) if self.graph is None else self.graph(nodes, edges, links)


def _pairs(_: _Unpacker, value: Any) -> dict[Any, Any]:
    return {key: item for key, item in value}  # noqa: C416


_FLAT = {"$a", "$n", "$b"}
_LEAVES = {str, int, float, bool, type(None)}
_KINDS: dict[str, Callable[[_Unpacker, Any], Any]] = {
    "$a": _Unpacker.array, "$n": _Unpacker.scalar, "$o": _Unpacker.objects, "$b": _Unpacker.blob,
    "$g": _Unpacker.instance, "$d": _pairs, "$t": lambda _, v: tuple(v), "$s": lambda _, v: set(v),
}  # fmt: skip


def _shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not list or len(shape) > _DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed("no shape of an array")
    return tuple(shape)


_WIDTHS: dict[str, int] = {}
_TAKEN: dict[str, Any] = {}


def _taken(np: Any, dtype: Any) -> Any:
    """numpy's dtype of an element type."""
    if type(dtype) is str and (known := _TAKEN.get(dtype)) is not None:
        return known
    _width(dtype)
    found = np.dtype(dtype)
    if len(_TAKEN) < 256:  # the peer chooses the names
        _TAKEN[dtype] = found
    return found


def _width(dtype: Any) -> int:
    """Bytes of one element; Malformed for an unsupported type."""
    if type(dtype) is str and (known := _WIDTHS.get(dtype)) is not None:
        return known
    found = _DTYPE.fullmatch(dtype) if type(dtype) is str else None
    if found is None:
        raise Malformed(f"no type of an array: {str(dtype)[:40]!r}")
    width = int(found[2] or 8)
    if width == 0:
        raise Malformed("an array whose elements have no size")
    width = 4 * width if found[1] == "U" else width
    if len(_WIDTHS) < 256:  # the peer chooses the names
        _WIDTHS[dtype] = width
    return width


def _items(dtype: str, data: memoryview) -> list[Any]:
    kind = _FORMATS.get(dtype[1:])
    if kind is None:
        raise Malformed(f"an array of {dtype} needs numpy")
    return [item[0] for item in struct.iter_unpack("<" + kind, data)]


def _nested(items: list[Any], shape: tuple[int, ...]) -> Any:
    if not shape:
        return items[0]
    if len(shape) == 1:
        return items
    step = len(items) // shape[0] if shape[0] else 0
    return [_nested(items[n * step : (n + 1) * step], shape[1:]) for n in range(shape[0])]


_NUMPY: list[Any] = []


def _imported_numpy() -> Any:
    """numpy if this process has imported it, else None.

    During an import in another thread, sys.modules holds a module without members. `import` waits for that thread.
    """
    if _NUMPY:
        return _NUMPY[0]
    return _numpy() if "numpy" in sys.modules else None


def _numpy() -> Any:
    """numpy, or None where it is not installed."""
    if not _NUMPY:
        try:
            import numpy
        except ImportError:
            _NUMPY.append(None)
        else:
            _NUMPY.append(numpy)
    return _NUMPY[0]
