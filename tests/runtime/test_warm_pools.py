"""Warm pools: sizes by demand and budget, claims, and the end of members that are no longer wanted."""

from __future__ import annotations

import asyncio
import time

from hypothesis import given
from hypothesis import strategies as st

from rock import errors
from rock.runtime.namespace.pools import Demand, Pool, shares

WANTED = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)).map(lambda pair: (pair[0], max(pair))), max_size=6)


@given(WANTED, st.integers(0, 100))
def test_shares_use_the_budget_and_never_exceed_it(wanted: list[tuple[int, int]], budget: int) -> None:
    sizes = shares(wanted, budget)
    assert sum(sizes) == min(budget, sum(size for _, size in wanted))
    assert all(0 <= size <= want for size, (_, want) in zip(sizes, wanted, strict=True))
    if sum(minimum for minimum, _ in wanted) <= budget:
        assert all(size >= minimum for size, (minimum, _) in zip(sizes, wanted, strict=True))


def test_demand_is_the_largest_burst_and_decays() -> None:
    demand = Demand()
    for _ in range(8):
        demand.note(100.0)
    assert demand.level(100.0) == 8
    demand.note(120.0)
    assert 6 < demand.level(120.0) < 7  # one claim does not replace the memory of the burst
    assert 0.7 < demand.level(300.0) < 0.9


class Members:
    """Makes numbers, and keeps those that exist."""

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self.made = 0
        self.failing = ""

    async def make(self, key: str) -> int:
        await asyncio.sleep(0)
        if self.failing:
            raise errors.NoCapacity(self.failing, hint="wait")
        self.made += 1
        self.alive.add(self.made)
        return self.made

    async def drop(self, member: int) -> None:
        self.alive.discard(member)

    def pool(self, size: int = 0) -> Pool[str, int]:
        return Pool(size, self.make, self.drop, lambda member: member in self.alive)


async def until(pool: Pool[str, int], ready: int) -> None:
    end = time.monotonic() + 20
    while pool.ready != ready:
        assert time.monotonic() < end, (pool.ready, pool.states())
        await asyncio.sleep(0.01)


def test_a_defined_pool_grows_with_the_demand_and_ends() -> None:
    async def play() -> None:
        members = Members()
        pool = members.pool()
        assert pool.claim("a") is None and not members.made  # without a pool nothing is made
        pool.define({"a": ("web", 1, 6)}, 10)
        await until(pool, 1)
        claimed = [pool.claim("a") for _ in range(4)]
        assert claimed.count(None) == 3
        await until(pool, 4)
        state = pool.states()["web"]
        assert (state.ready, state.target, state.hits, state.misses) == (4, 4, 1, 3)
        pool.define({"a": ("web", 1, 6), "b": ("other", 3, 3)}, 5)  # the minimum of one is taken from the other's share
        await until(pool, 5)
        assert {name: one.ready for name, one in pool.states().items()} == {"web": 2, "other": 3}
        pool.define({}, 5)
        await until(pool, 0)
        await pool.close()
        assert members.alive == {one for one in claimed if one is not None}

    asyncio.run(play())


def test_a_dead_member_is_replaced_and_a_failure_is_reported() -> None:
    async def play() -> None:
        members = Members()
        pool = members.pool()
        pool.define({"a": ("web", 2, 2)}, 10)
        await until(pool, 2)
        members.alive.clear()
        members.failing = "no memory is left"
        assert pool.claim("a") is None
        end = time.monotonic() + 10
        while not pool.states()["web"].error:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        assert pool.states()["web"].error == "no memory is left"
        await pool.close()

    asyncio.run(play())


def test_recently_used_keys_keep_their_size_beside_defined_ones() -> None:
    async def play() -> None:
        members = Members()
        pool = members.pool(2)
        pool.define({"a": ("web", 1, 1)}, 1)
        for key in "bcdefg":
            assert pool.claim(key) is None
        await until(pool, 1 + 4 * 2)  # the four images that were used last
        pool.resize(1)
        await until(pool, 1 + 4)
        assert pool.claim("a") is not None and pool.claim("b") is None and pool.claim("g") is not None
        await pool.close()

    asyncio.run(play())
