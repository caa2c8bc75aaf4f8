"""A streamed standard input: a file or an iterator, read by a thread while the program runs. Both SDKs share it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from rock.errors import InvalidConfig

PIECE = 256 << 10  # bytes of one request
SMALL = 1 << 20  # bytes up to which an input is sent with its command


def piece_of(value: object) -> bytes:
    """A piece of an input as bytes. InvalidConfig."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise InvalidConfig(
        f"the standard input yielded a {type(value).__name__}", hint="use bytes, str, a binary file or an iterator"
    )


class Pump:
    """Reads a source in a daemon thread, at most `PIECE` bytes ahead.

    The thread may stay blocked in the source after `close`; it then ends with the source's next piece.
    """

    def __init__(self, source: bytes | str | BinaryIO | Iterable[bytes | str]) -> None:
        self._source = source
        self._data = bytearray()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._read, name="rock-stdin", daemon=True).start()

    def take(self) -> bytes:
        """The next bytes, at most `PIECE`; b"" at the end. Raises what the source raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._data or self._ended or self._closed)
            if self._closed:
                return b""
            data = bytes(self._data[:PIECE])
            del self._data[:PIECE]
            self._changed.notify_all()
            if not data and self._error is not None:
                raise self._error
            return data

    def close(self) -> None:
        """Read no further."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read(self) -> None:
        try:
            for piece in self._pieces():
                data = piece_of(piece)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._data) < PIECE or self._closed)
                    if self._closed:
                        return
                    self._data += data
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _pieces(self) -> Iterator[object]:
        if isinstance(self._source, bytes | str):
            return iter([self._source])
        read = getattr(self._source, "read1", None) or getattr(self._source, "read", None)
        if read is None:
            return iter(self._source)
        return iter(lambda: read(64 << 10), b"") if not _is_text(self._source) else iter(lambda: read(64 << 10), "")


def _is_text(source: object) -> bool:
    return hasattr(source, "encoding") and not hasattr(source, "read1")
