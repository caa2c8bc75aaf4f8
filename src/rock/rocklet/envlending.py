"""Pipes of environments that clients on this machine have: they play them without the server (envdoor.py)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from rock.errors import Conflict, NotFound, RockError
from rock.guest import envhost, frames
from rock.rocklet.envcalls import Lent
from rock.rocklet.envexchange import Exchange

_RETURN_TIMEOUT = 2.0


class Lending:
    """Who has the pipes of which environment of one host."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def token_of(self, number: int) -> str | None:
        """What its pipes are given for; None when it has none of its own."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.pipe is None:
            return None
        hosted.token = hosted.token or secrets.token_urlsafe(24)
        return hosted.token

    def is_token(self, number: int, token: str) -> bool:
        hosted = self._exchange.envs.get(number)
        if hosted is None or not hosted.token:
            return False
        return secrets.compare_digest(hosted.token.encode(), token.encode(errors="replace"))

    def lend(self, number: int, lost: Callable[[RockError], None]) -> Lent:
        """The pipes of an environment that is nobody's; `lost` is called when it ends or is taken back. Raises its end,
        Conflict."""
        hosted = self._exchange.envs[number]
        if hosted.ended is not None:
            raise hosted.ended
        if self._exchange.failed is not None or self._exchange.link is None or hosted.pipe is None or hosted.closed:
            raise self._exchange.failed or self._unknown(number)
        if hosted.lent is not None or hosted.asked:
            raise Conflict(f"environment {number} is being played", sandbox_id=self._exchange.sandbox_id)
        own = hosted.pipe + envhost.OWN
        self._exchange.link.own[own].stop()
        hosted.lent = lost
        hosted.returned.clear()
        channels = self._exchange.link.process.channels
        memory = self._exchange.link.memory
        part = None if memory is None else (memory, (hosted.pipe - envhost.PIPES.start) * frames.PART)
        return Lent(channels[hosted.pipe], channels[own], part, self._exchange.limit(hosted))

    def _unknown(self, number: int) -> NotFound:
        return NotFound(f"there is no environment {number}", sandbox_id=self._exchange.sandbox_id)

    def take_back(self, number: int) -> None:
        """The client has let go of the pipes, or has to. Idempotent."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.lent is None:
            return
        hosted.lent = None
        hosted.returned.set()
        if self._exchange.link is None or hosted.pipe is None:
            return
        own = self._exchange.link.own[hosted.pipe + envhost.OWN]
        own.start()
        if hosted.dead:
            own.drain()
            self._exchange.release(number, hosted)
        elif hosted.ended is None:
            self._exchange.greet(number, hosted.pipe)

    def overdue(self, number: int, what: str) -> None:
        """The client that has the pipes found that something took too long."""
        hosted = self._exchange.envs.get(number)
        if hosted is not None and hosted.lent is not None:
            self._exchange.took_too_long(number, hosted, what)

    def nonsense(self, number: int, why: str) -> None:
        """The client that has the pipes could not make sense of an answer."""
        hosted = self._exchange.envs.get(number)
        if hosted is not None and hosted.lent is not None and hosted.pipe is not None:
            self._exchange.nonsense(hosted.pipe, why)

    async def at_home(self, number: int) -> None:
        """Wait a little for pipes that their client is about to give back: it asks here next when it lost its way."""
        hosted = self._exchange.envs.get(number)
        if hosted is None or hosted.lent is None:
            return
        try:
            async with asyncio.timeout(_RETURN_TIMEOUT):
                await hosted.returned.wait()
        except TimeoutError:
            raise Conflict(f"environment {number} is being played by a client that has its pipes",
                           sandbox_id=self._exchange.sandbox_id) from None  # fmt: skip
