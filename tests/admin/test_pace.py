"""Whose start begins when."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from rock.admin.workers.start_queue import Pace, Ticket

MOST = 1000


def run(work: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def full(pace: Pace) -> list[Ticket]:
    """Starts under way, as many as there may be."""
    tickets = [pace.ask("", True) for _ in range(MOST)]
    assert all(ticket.turn is None for ticket in tickets)
    return tickets


def begun(*lines: list[Ticket]) -> list[int]:
    """How many of each line have begun."""
    return [sum(one.turn is None or (one.turn.done() and one.turn.result()) for one in line) for line in lines]


def test_one_of_each_line_in_turn() -> None:
    async def main() -> None:
        pace = Pace(lambda: 1)
        under_way = full(pace)
        group = [pace.ask("", True) for _ in range(10)]
        singles = [pace.ask("", False) for _ in range(3)]
        other = [pace.ask("other", True) for _ in range(10)]
        assert begun(group, singles, other) == [0, 0, 0] and pace.waiting == 23
        for ticket in under_way[:9]:
            pace.leave(ticket)
        assert begun(group, singles, other) == [3, 3, 3]
        assert [one.turn is not None and one.turn.done() for one in group[:4]] == [True, True, True, False]
        for ticket in under_way[9:]:
            pace.leave(ticket)
        assert begun(group, singles, other) == [10, 3, 10] and pace.waiting == 0
        pace.close()

    run(main())


def test_what_takes_long_holds_up_nobody() -> None:
    async def main() -> None:
        pace = Pace(lambda: 1, young=0.5)
        under_way = full(pace)
        late = pace.ask("", False)
        assert late.turn is not None and not late.turn.done()
        assert await late.turn  # although none of them has left
        for ticket in (*under_way, late):
            pace.leave(ticket)
        assert all(ticket.turn is None for ticket in full(pace))  # each was counted out once
        assert pace.ask("", False).turn is not None
        pace.close()

    run(main())


def test_a_large_fleet_takes_more() -> None:
    async def main() -> None:
        pace = Pace(lambda: MOST // 10 + 1)
        tickets = [pace.ask("", False) for _ in range(MOST + 11)]
        assert begun(tickets) == [MOST + 10]
        pace.close()

    run(main())


def test_who_is_withdrawn_or_leaves_does_not_begin() -> None:
    async def main() -> None:
        pace = Pace(lambda: 1)
        under_way = full(pace)
        gone, left, stays = (pace.ask("", True) for _ in range(3))
        assert gone.turn is not None and left.turn is not None and stays.turn is not None
        pace.withdraw(gone)
        left.turn.cancel()
        pace.leave(left)
        assert gone.turn.result() is False
        pace.leave(under_way[0])
        assert await stays.turn
        assert pace.ask("", True).turn is not None  # it took the one place that there was
        pace.close()

    run(main())


def test_a_group_is_written_down_when_those_before_it_have_begun() -> None:
    async def main() -> None:
        pace, order = Pace(lambda: 1), list[str]()

        async def group(name: str, tenant: str, size: int, wait: float = 9.0) -> list[Ticket]:
            async with pace.group(tenant, wait):
                order.append(name)
                return [pace.ask(tenant, True) for _ in range(size)]

        first = await group("first", "", MOST + 10)
        waits = asyncio.create_task(group("waits", "", 1))
        gives_up = asyncio.create_task(group("gives up", "", 1))
        assert len(await group("other", "other", 1)) == 1  # another tenant's is not behind it
        gives_up.cancel()
        await asyncio.wait({gives_up})
        hasty = await group("hasty", "", 1, wait=0.0)  # its client wants an answer now; it is started in its turn
        assert order == ["first", "other", "hasty"] and not waits.done() and begun(hasty) == [0]
        for ticket in first:
            pace.leave(ticket)
        await waits
        assert order == ["first", "other", "hasty", "waits"] and begun(hasty) == [1]
        pace.close()

    run(main())
