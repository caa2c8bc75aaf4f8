"""Writes that come in one turn of the event loop, or in a few in a row, go to the disk in one transaction: a commit of
its own costs each of them ten times what the write does."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")

_MOST_HELD = 8  # turns of the loop
_MOST = 200  # writes of one transaction, so that whoever reads has a turn


class Batch:
    """transaction: opens one, or raises; told: what SQLite raised, as an error of ours. Each write is one statement, or
    raises before its first: one that fails leaves nothing in the transaction of the others."""

    def __init__(
        self, transaction: Callable[[], AbstractContextManager[None]], told: Callable[[sqlite3.Error], Exception]
    ) -> None:
        self._transaction = transaction
        self._told = told
        self._seen = self._held = 0  # how many waited a turn ago, and for how many turns they do
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    async def do(self, write: Callable[[], T]) -> T:
        """What the write answers, once it is saved. What it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append((write, future))
        if len(self._waiting) == 1:
            self._seen, self._held = 1, 0
            loop.call_soon(self._turn)
        return await future

    def _turn(self) -> None:
        """Save what waits, or, as long as each turn of the loop brings more of it, a few turns later."""
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
                        if isinstance(outcomes[-1][1], sqlite3.Error):  # which may have ended the transaction
                            raise outcomes[-1][1]
        except Exception as error:  # of the transaction: nothing of it is saved
            outcomes = [(None, error)] * len(writes)
        for (_, future), (answer, failed) in zip(writes, outcomes, strict=True):
            if failed is None:
                future.set_result(answer)
            else:
                future.set_exception(self._told(failed) if isinstance(failed, sqlite3.Error) else failed)

    def flush(self) -> None:
        """Save what waits, now."""
        while self._waiting:
            self._flush()


def _outcome(write: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return write(), None
    except Exception as error:
        return None, error
