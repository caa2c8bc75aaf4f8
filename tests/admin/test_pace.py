"""Whose start begins when."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from rock.admin.workers.start_queue import StartQueue, Ticket

MOST = 1000


def run(work: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def full(queue: StartQueue) -> list[Ticket]:
    """Starts under way, as many as there may be."""
    tickets = [queue.ask("", True) for _ in range(MOST)]
    assert all(ticket.turn is None for ticket in tickets)
    return tickets


def begun(*lines: list[Ticket]) -> list[int]:
    """How many of each line have begun."""
    return [sum(one.turn is None or (one.turn.done() and one.turn.result()) for one in line) for line in lines]


def test_one_of_each_line_in_turn() -> None:
    async def main() -> None:
        queue = StartQueue(lambda: 1)
        under_way = full(queue)
        group = [queue.ask("", True) for _ in range(10)]
        singles = [queue.ask("", False) for _ in range(3)]
        other = [queue.ask("other", True) for _ in range(10)]
        assert begun(group, singles, other) == [0, 0, 0] and queue.waiting == 23
        for ticket in under_way[:9]:
            queue.leave(ticket)
        assert begun(group, singles, other) == [3, 3, 3]
        assert [one.turn is not None and one.turn.done() for one in group[:4]] == [True, True, True, False]
        for ticket in under_way[9:]:
            queue.leave(ticket)
        assert begun(group, singles, other) == [10, 3, 10] and queue.waiting == 0
        queue.close()

    run(main())


def test_what_takes_long_holds_up_nobody() -> None:
    async def main() -> None:
        queue = StartQueue(lambda: 1, young=0.5)
        under_way = full(queue)
        late = queue.ask("", False)
        assert late.turn is not None and not late.turn.done()
        assert await late.turn  # although none of them has left
        for ticket in (*under_way, late):
            queue.leave(ticket)
        assert all(ticket.turn is None for ticket in full(queue))  # each was counted out once
        assert queue.ask("", False).turn is not None
        queue.close()

    run(main())


def test_a_large_fleet_takes_more() -> None:
    async def main() -> None:
        queue = StartQueue(lambda: MOST // 10 + 1)
        tickets = [queue.ask("", False) for _ in range(MOST + 11)]
        assert begun(tickets) == [MOST + 10]
        queue.close()

    run(main())


def test_who_is_withdrawn_or_leaves_does_not_begin() -> None:
    async def main() -> None:
        queue = StartQueue(lambda: 1)
        under_way = full(queue)
        gone, left, stays = (queue.ask("", True) for _ in range(3))
        assert gone.turn is not None and left.turn is not None and stays.turn is not None
        queue.withdraw(gone)
        left.turn.cancel()
        queue.leave(left)
        assert gone.turn.result() is False
        queue.leave(under_way[0])
        assert await stays.turn
        assert queue.ask("", True).turn is not None  # it took the one place that there was
        queue.close()

    run(main())


def test_a_group_is_written_down_when_those_before_it_have_begun() -> None:
    async def main() -> None:
        queue, order = StartQueue(lambda: 1), list[str]()

        async def group(name: str, tenant: str, size: int, wait: float = 9.0) -> list[Ticket]:
            async with queue.group(tenant, wait):
                order.append(name)
                return [queue.ask(tenant, True) for _ in range(size)]

        first = await group("first", "", MOST + 10)
        waits = asyncio.create_task(group("waits", "", 1))
        gives_up = asyncio.create_task(group("gives up", "", 1))
        assert len(await group("other", "other", 1)) == 1  # another tenant's is not behind it
        gives_up.cancel()
        await asyncio.wait({gives_up})
        hasty = await group("hasty", "", 1, wait=0.0)  # its client wants an answer now; it is started in its turn
        assert order == ["first", "other", "hasty"] and not waits.done() and begun(hasty) == [0]
        for ticket in first:
            queue.leave(ticket)
        await waits
        assert order == ["first", "other", "hasty", "waits"] and begun(hasty) == [1]
        queue.close()

    run(main())
