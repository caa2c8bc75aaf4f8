"""Who begins when: a flood waits behind itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from rock.http.fair_queue import FairQueue


async def passes(number: int) -> None:
    """So many passes of the loop."""
    for _ in range(number):
        await asyncio.sleep(0)


class House:
    """Requests that keep the loop busy for a while, in the order that they began in."""

    def __init__(self) -> None:
        self.turns = FairQueue()
        self.begun: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def ask(self, who: str, steps: int = 1) -> asyncio.Task[None]:
        task = asyncio.create_task(self._serve(who, steps))
        self.tasks.add(task)
        return task

    async def _serve(self, who: str, steps: int) -> None:
        turn = await self.turns.take(who)
        self.begun.append(who)
        try:
            for _ in range(steps):
                end = time.perf_counter() + 0.0002
                while time.perf_counter() < end:
                    pass
                await asyncio.sleep(0)
        finally:
            self.turns.leave(turn)


def test_somebody_who_comes_during_a_flood_begins_before_it() -> None:
    async def play() -> None:
        house = House()
        flood = [house.ask("flood") for _ in range(200)]
        await passes(3)
        assert house.turns.waiting > 150
        for _ in range(5):
            before = len(house.begun)
            await house.ask("other", steps=4)
            ahead = house.begun.index("other", before) - before
            assert ahead <= 5, house.begun[before:]  # what had its turn when it came, in one pass of the loop
            await passes(2)
        assert any(not task.done() for task in flood)
        await asyncio.gather(*flood)  # it is served all the same
        assert house.begun.count("flood") == 200 and house.turns.waiting == 0

    asyncio.run(play())


def test_floods_take_turns() -> None:
    async def play() -> None:
        house = House()
        tasks = [house.ask(f"flood {n % 3}") for n in range(300)]
        await asyncio.gather(*tasks)
        middle = house.begun[60:150]
        assert {middle.count(f"flood {n}") for n in range(3)} <= {29, 30, 31}

    asyncio.run(play())


def test_a_flood_goes_on_beside_requests_that_never_pause() -> None:
    async def play() -> None:
        house = House()
        flood = [house.ask("flood") for _ in range(50)]

        async def busy(who: str) -> None:
            while not all(task.done() for task in flood):
                await house.ask(who, steps=3)

        await asyncio.wait_for(asyncio.gather(*flood, busy("a"), busy("b")), 60)

    asyncio.run(play())


def test_who_leaves_a_line_leaves_nothing_behind() -> None:
    async def play() -> None:
        house = House()
        flood = [house.ask("flood", steps=50) for _ in range(40)]
        await passes(2)
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert house.turns.waiting == 0
        await asyncio.wait_for(house.ask("flood"), 60)
        with pytest.raises(asyncio.CancelledError):
            await flood[-1]

    asyncio.run(play())
