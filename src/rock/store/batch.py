"""Group commit: writes of one or of a few consecutive event-loop iterations share one transaction, because a separate
commit costs ten times the write."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")

_APART = 0.001  # seconds since the last write after which the next one is written at once
_MOST_HELD = 8  # event-loop iterations
_MOST = 200  # writes of one transaction, so that readers are not delayed


class Batch:
    """A group of writes. transaction: opens a transaction, or raises; convert: makes a ROCK error of an SQLite one.
    Each write is one statement, or raises before it, so a failed write leaves no change in the shared transaction."""

    def __init__(
        self, transaction: Callable[[], AbstractContextManager[None]], convert: Callable[[sqlite3.Error], Exception]
    ) -> None:
        self._transaction = transaction
        self._convert = convert
        # number of writes that waited in the last iteration, and of iterations that they have waited
        self._seen = self._held = 0
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._last = float("-inf")  # time of the last write

    async def do(self, write: Callable[[], T]) -> T:
        """Run a write; returns its result once it is saved, or raises its error."""
        loop = asyncio.get_running_loop()
        if not self._waiting and time.monotonic() - self._last > _APART:
            try:
                return write()
            except sqlite3.Error as error:
                raise self._convert(error) from error
            finally:
                self._last = time.monotonic()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append((write, future))
        if len(self._waiting) == 1:
            self._seen, self._held = 1, 0
            loop.call_soon(self._turn)
        return await future

    def _turn(self) -> None:
        """Commit the waiting writes. While each iteration of the loop adds more, the commit is delayed by a few
        iterations."""
        count = len(self._waiting)
        if self._seen < count < _MOST and self._held < _MOST_HELD:
            self._seen, self._held = count, self._held + 1
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        writes, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        writes = [(write, future) for write, future in writes if not future.cancelled()]
        outcomes: list[tuple[Any, BaseException | None]] = []
        try:
            if len(writes) == 1:
                outcomes.append(_outcome(writes[0][0]))
            else:
                with self._transaction():
                    for write, _ in writes:
                        outcomes.append(_outcome(write))
                        if isinstance(outcomes[-1][1], sqlite3.Error):  # the error may have ended the transaction
                            raise outcomes[-1][1]
        except Exception as error:  # the transaction failed, so none of the writes is saved
            outcomes = [(None, error)] * len(writes)
        self._last = time.monotonic()
        for (_, future), (answer, failed) in zip(writes, outcomes, strict=True):
            if failed is None:
                future.set_result(answer)
            else:
                future.set_exception(self._convert(failed) if isinstance(failed, sqlite3.Error) else failed)

    def flush(self) -> None:
        """Commit the waiting writes now."""
        while self._waiting:
            self._flush()


def _outcome(write: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return write(), None
    except Exception as error:
        return None, error
