"""Forks of environments: children continue as their parent, and are independent of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import slowness

from rock.errors import (
    ActionError,
    CommandTimeout,
    Conflict,
    EnvironmentEnded,
    NotFound,
    QuotaExceeded,
    RockError,
    Unsupported,
)
from rock.guest.environments.host import PIPES
from rock.rocklet.environments.host import EnvHost
from rock.runtime.base import Handle
from rock.runtime.process.runtime import ProcessRuntime

ECHO, SEEDED = "small:Echo-v0", "small:Seeded-v0"
Run = Callable[..., Any]


async def played(host: EnvHost, number: int, count: int = 20) -> list[Any]:
    """Results of the same steps, each with a number of the random state."""
    return [await host.step(number, {"do": "draw"}) for _ in range(count)]


async def result_of(host: EnvHost, number: int, do: str, **more: Any) -> Any:
    return (await host.step(number, {"do": do, **more}))[0]


async def forked(host: EnvHost, number: int, count: int = 1, **more: Any) -> list[int]:
    found = await host.fork(number, count, **more)
    assert all(isinstance(child, int) for child in found), found
    return [child for child in found if isinstance(child, int)]


async def refused(host: EnvHost, number: int) -> Unsupported:
    found = (await host.fork(number))[0]
    assert isinstance(found, Unsupported), found
    return found


def test_children_continue_as_their_parent(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await host.reset(number, 1)
        before = await played(host, number, 3)
        children = await forked(host, number, 16)
        assert len({number, *children}) == 17 and set(host.environments()) == {number, *children}
        results = await asyncio.gather(*(played(host, which) for which in (number, *children)))
        assert all(found == results[0] for found in results)
        assert results[0][0] not in before and results[0][-1][4]["count"] == 23
        alone = await host.make(ECHO)
        await host.reset(alone, 1)
        assert before + results[0] == await played(host, alone, 23)

    hosted(small, body)


def test_steps_keep_their_numbers(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await host.reset(number)
        await host.step(number, "one", 0)
        (child,) = await forked(host, number)
        for which in (number, child):
            with pytest.raises(Conflict, match="step 1 is the next"):
                await host.step(which, "again", 2)
            assert (await host.step(which, "two", 1))[4] == {"count": 2}

    hosted(small, body)


def test_a_fork_of_a_fork_and_of_many(small: Path, hosted: Run) -> None:
    """More children than pipes; each one is a child of the host, and in a group of its own."""

    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        children = await forked(host, number, len(PIPES) + 4)
        last = children[-1]  # one without pipes of its own
        children += await forked(host, last, 3)
        children += await forked(host, children[-1])
        places = await asyncio.gather(*(result_of(host, which, "where") for which in (number, *children)))
        assert len({place["pid"] for place in places}) == len(places)
        assert {place["parent"] for place in places} == {places[0]["parent"]}
        assert all(place["group"] == place["pid"] for place in places)
        for child in children:
            await host.close_env(child)
        assert set(host.environments()) == {number}
        again = await forked(host, number, len(PIPES))
        assert (await result_of(host, again[-1], "where"))["parent"] == places[0]["parent"]

    hosted(small, body)


def test_children_that_end_at_once(small: Path, hosted: Run) -> None:
    """Their ends are noticed, whether the host is their parent yet or not."""

    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        for _ in range(5):
            children = await forked(host, number, 10)
            kills = (host.step(child, {"do": "kill"}) for child in children)
            ends = await asyncio.wait_for(asyncio.gather(*kills, return_exceptions=True), 20)
            assert all(isinstance(error, EnvironmentEnded) and "SIGKILL" in error.message for error in ends), ends
            for child in children:
                await host.close_env(child)
        assert set(host.environments()) == {number}
        (child,) = await forked(host, number)
        assert (await host.step(child, "fine"))[4] == {"count": 1}

    hosted(small, body)


def children_of(pid: int) -> set[int]:
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(status.parent.name))
    return found


def test_children_that_end_before_their_report_is_read(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        place = await result_of(host, number, "where")
        parent, zygote = place["pid"], place["parent"]
        os.kill(parent, signal.SIGSTOP)
        fork = asyncio.ensure_future(host.fork(number, 3))
        await asyncio.sleep(0.2)
        os.kill(zygote, signal.SIGSTOP)
        os.kill(parent, signal.SIGCONT)
        for _ in range(500):
            if len(new := children_of(zygote) - {parent}) == 3:
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)  # they have reported, and wait for nothing any more
        for pid in new:
            os.kill(pid, signal.SIGKILL)
        os.kill(zygote, signal.SIGCONT)
        children = await asyncio.wait_for(fork, 20)
        for child in children:
            assert isinstance(child, int), children
            with pytest.raises(EnvironmentEnded, match="SIGKILL"):
                await asyncio.wait_for(host.step(child, "fine"), 20)
        assert set(host.environments()) == {number}
        assert (await host.step(number, "fine"))[4] == {"count": 2}

    hosted(small, body)


def test_a_hundred_children(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await host.reset(number, 1)
        children = await forked(host, number, 100)
        results = await asyncio.gather(*(played(host, which, 3) for which in (number, *children)))
        assert all(found == results[0] for found in results)

    hosted(small, body)


def test_children_outlive_their_parent_and_each_other(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        one, two, three = await forked(host, number, 3)
        with pytest.raises(ActionError, match="SIGKILL"):
            await host.step(number, {"do": "kill"})
        with pytest.raises(ActionError, match="status 3") as caught:
            await host.step(one, {"do": "exit", "status": 3})
        assert "last words" in caught.value.details["stderr"]  # of this child
        assert (await host.step(two, "fine"))[0] == "fine"
        await host.close_env(two)
        (four,) = await forked(host, three)
        assert (await host.step(four, "fine"))[4] == {"count": 1}
        with pytest.raises(EnvironmentEnded):
            await host.fork(number)
        with pytest.raises(NotFound):
            await host.fork(two)

    hosted(small, body)


@pytest.mark.parametrize(("what", "cause"), [
    ("thread", r"2 threads.*python"), ("process", r"processes.*sleep"), ("connection", r"descriptors.*socket:"),
    ("memory", r"memory.*/dev/zero"), ("library", r"libraries.*torch"),
])  # fmt: skip
def test_refusals_come_before_any_change(small: Path, hosted: Run, what: str, cause: str) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await host.reset(number, 1)
        await result_of(host, number, "hold", what=what)
        error = await refused(host, number)
        assert re.search(cause, error.message), error
        assert "fork_safe" in (error.hint or "")
        assert set(host.environments()) == {number}
        other = await host.make(ECHO)  # the pipe of the refused child is free
        assert (await host.step(other, "fine"))[0] == "fine"
        assert (await host.step(number, "fine"))[4] == {"count": 2}
        await result_of(host, number, "declare")
        (child,) = await forked(host, number)
        assert (await host.step(child, "fine"))[4] == {"count": 4}

    hosted(small, body)


def test_what_is_released_no_longer_prevents_a_fork(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await result_of(host, number, "hold", what="connection")
        await refused(host, number)
        await result_of(host, number, "release")
        await forked(host, number)

    hosted(small, body)


def test_positions_of_files_are_their_own(small: Path, hosted: Run, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("".join(f"{i:099d}\n" for i in range(1000)))

    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await result_of(host, number, "hold", what="file", path=str(tmp_path / "lines"))
        await result_of(host, number, "line")
        children = await forked(host, number, 2)
        for which in (number, *children):
            assert [int(await result_of(host, which, "line")) for _ in range(300)] == list(range(1, 301))

    hosted(small, body)


def test_new_seeds(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(SEEDED)
        await host.reset(number, 1)
        children = await forked(host, number, 4, reseed=True)
        same = await forked(host, number, 2)
        drawn = [await result_of(host, which, "draw") for which in (number, *children)]
        for column in zip(*drawn, strict=True):
            assert len(set(column)) == 5, column
        assert [await result_of(host, which, "draw") for which in same] == [drawn[0]] * 2

    hosted(small, body)


def test_names_and_idle_timeouts(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO, name="first")
        with pytest.raises(Conflict, match="'first' exists"):
            await host.fork(number, 2, names=["second", "first"])
        children = await forked(host, number, 2, names=["second", "third"], idle=0.5)
        assert [host.number_of(name) for name in ("second", "third")] == children
        for _ in range(200):
            if set(host.environments()) == {number}:
                break
            await asyncio.sleep(0.05)
        assert set(host.environments()) == {number}
        with pytest.raises(NotFound, match="not found"):
            host.number_of("second")

    hosted(small, body)


def test_an_environment_does_not_see_its_forks(small: Path, hosted: Run) -> None:
    """One that waits for its children, or ignores their ends."""

    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await forked(host, number, 2)
        assert await result_of(host, number, "children") == "none"
        await result_of(host, number, "ignore")
        (child,) = await forked(host, number)
        assert await result_of(host, child, "children") == "none"

    hosted(small, body)


def test_a_fork_waits_for_the_running_step(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        step = asyncio.ensure_future(host.step(number, {"do": "sleep", "seconds": 0.3}))
        await asyncio.sleep(0.05)
        (child,) = await forked(host, number)
        assert (await step)[4] == {"count": 1}
        assert (await host.step(child, "fine"))[4] == {"count": 2}

    hosted(small, body)


def test_a_fork_that_takes_too_long(small: Path, hosted: Run) -> None:
    """Its children end, and their parent goes on."""

    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO, timeout=1.5 * slowness())
        _, info = await host.reset(number)
        os.kill(info["pid"], signal.SIGSTOP)
        found = await host.fork(number, 3)
        assert all(isinstance(child, CommandTimeout) for child in found), found
        os.kill(info["pid"], signal.SIGCONT)
        assert (await host.step(number, "fine"))[0] == "fine"
        assert set(host.environments()) == {number}
        children = await forked(host, number, len(PIPES) - 1)
        assert [(await host.step(child, "fine"))[4]["count"] for child in children] == [2] * len(children)

    hosted(small, body)


def test_a_parent_that_is_killed_before_it_forks(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        _, info = await host.reset(number)
        os.kill(info["pid"], signal.SIGSTOP)
        fork = asyncio.ensure_future(host.fork(number, 2))
        await asyncio.sleep(0.1)
        os.kill(info["pid"], signal.SIGKILL)
        assert all(isinstance(child, EnvironmentEnded) for child in await fork)
        with pytest.raises(EnvironmentEnded):
            await host.step(number, "its end may come after those of its children")
        assert host.environments() == {}
        other = await host.make(ECHO)
        assert await forked(host, other, len(PIPES) - 1)

    hosted(small, body)


@pytest.mark.skipif(os.geteuid() != 0, reason="the limit of processes counts those of a user, and applies to no root")
def test_too_many_processes(small: Path, hosted: Run) -> None:
    """Each child succeeds or fails by itself."""

    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        await result_of(host, number, "limit", processes=4)  # itself, the one that forks, and two children
        found = await host.fork(number, 5)
        started = [child for child in found if isinstance(child, int)]
        failed = [child for child in found if isinstance(child, RockError)]
        assert len(started) == 2 and len(failed) == 3
        assert all(isinstance(error, QuotaExceeded) for error in failed)
        for child in (number, *started):
            assert (await host.step(child, "fine"))[4] == {"count": 2}

    hosted(small, body)


@pytest.mark.parametrize(
    "how", ["parent", "junk", "list", "large", "flood", "deep", "kind", "unknown", "silence"]
)
def test_a_hostile_environment_has_no_forks_and_harms_no_other(small: Path, hosted: Run, how: str) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number, other = await host.make(ECHO), await host.make(ECHO)
        await result_of(host, number, "lie", how=how)
        for _ in range(3):  # together more than there are pipes
            found = await host.fork(number, 12)
            expected = EnvironmentEnded if how == "silence" else Unsupported
            assert all(isinstance(child, expected) for child in found), found
        assert set(host.environments()) == {number, other}
        assert (await host.step(number, "fine"))[0] == "fine"
        children = await forked(host, other, len(PIPES))
        assert [(await host.step(child, "fine"))[4]["count"] for child in children] == [1] * len(children)
        await host.close_env(number)
        assert set(host.environments()) == {other, *children}

    hosted(small, body)


def test_the_next_rocklet_finds_them(small: Path, hosted: Run) -> None:
    """Children that exist go on; a fork that was not complete leaves nothing."""

    async def body(host: EnvHost, runtime: ProcessRuntime, handle: Handle) -> None:
        number = await host.make(ECHO)
        stopped = await host.make(ECHO)
        await host.reset(number, 1)
        await host.step(number, "one")
        children = await forked(host, number, 3, names=["a", "b", "c"])
        _, info = await host.reset(stopped)
        os.kill(info["pid"], signal.SIGSTOP)
        fork = asyncio.ensure_future(host.fork(stopped, 4))
        await asyncio.sleep(0.1)
        await host.detach()
        with pytest.raises(RockError):
            for found in await fork:
                assert isinstance(found, RockError)
                raise found
        after = EnvHost(runtime, handle, folder=str(small))
        await after.attach()
        try:
            os.kill(info["pid"], signal.SIGCONT)
            assert set(after.environments()) == {number, stopped, *children}
            assert [after.number_of(name) for name in "abc"] == children
            results = [await played(after, which) for which in (number, *children)]
            assert all(found == results[0] for found in results)
            assert (await after.step(stopped, "fine"))[0] == "fine"
            more = await forked(after, stopped, len(PIPES) - 5)
            assert [(await after.step(child, "fine"))[4]["count"] for child in more] == [2] * len(more)
            places = {(await result_of(after, which, "where"))["pid"] for which in after.environments()}
            assert len(places) == 5 + len(more)
        finally:
            await after.close()

    hosted(small, body)


def test_the_end_of_the_host_ends_them(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        children = await forked(host, number, 3)
        places = [await result_of(host, which, "where") for which in (number, *children)]
        os.kill(places[0]["parent"], signal.SIGKILL)
        for _ in range(300):
            if not any(Path(f"/proc/{place['pid']}/status").exists() for place in places):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a forked environment is still there")

    hosted(small, body)
