"""The host of environments with environments that misbehave."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rock.errors import ActionError, CommandTimeout, Conflict, ImageError, InvalidConfig, NotFound, SandboxError
from rock.guest.environments import frames
from rock.guest.environments.frames import FIRST, HEAD, HEADER, LAST, MOST_STREAMS, OK, PIECE, Joiner, pieces
from rock.guest.environments.host import PIPES
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.environments.host import EnvHost
from rock.rocklet.environments.pipes import FrameReader
from rock.runtime.base import Handle
from rock.runtime.process.runtime import ProcessRuntime

ECHO = "small:Echo-v0"
Run = Callable[..., Any]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid: int) -> None:
    for _ in range(500):
        if not alive(pid):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"process {pid} is still there")


def test_an_episode(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO, {"start": 5, "level": "hard"})
        first = await host.reset(number, 1)
        assert first[1]["kwargs"] == {"level": "hard"}
        assert (await host.reset(number, 1))[0] == first[0] != (await host.reset(number, 2))[0]
        assert await host.step(number, "hello") == ("hello", 1.0, False, False, {"count": 6})
        assert host.environments() == {number: ECHO}
        await host.close_env(number)
        await host.close_env(number)
        await gone(first[1]["pid"])
        assert host.environments() == {}
        with pytest.raises(NotFound, match="no environment"):
            await host.step(number, "hello")

    hosted(small, body)


def test_unseeded_environments_differ(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        numbers = await asyncio.gather(*(host.make(ECHO) for _ in range(6)))
        assert len({(await host.reset(n))[0] for n in numbers}) == 6
        results = await asyncio.gather(*(host.reset(n, n) for n in numbers))
        assert [(await host.reset(n, n))[0] for n in numbers] == [r[0] for r in results]

    hosted(small, body)


def test_an_exception_is_told_and_survived(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        with pytest.raises(ActionError, match="KeyError: 'deep inside'") as caught:
            await host.step(number, {"do": "fail"})
        assert "in fail" in caught.value.details["traceback"]
        with pytest.raises(ActionError, match="SystemExit"):
            await host.step(number, {"do": "leave"})
        assert (await host.step(number, "still here"))[4] == {"count": 3}
        with pytest.raises(ActionError, match="RuntimeError: cannot be made"):
            await host.make(ECHO, {"fail": True})
        with pytest.raises(ActionError, match="status 4"):
            await host.make(ECHO, {"fail": None})
        with pytest.raises(InvalidConfig, match="JSON"):
            await host.step(number, object())
        assert host.environments() == {number: ECHO}

    hosted(small, body)


def test_an_unknown_environment(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        with pytest.raises(NotFound, match=r"^Environment small:Ekko-v0 not found in registry\.") as caught:
            await host.make("small:Ekko-v0")
        assert ECHO in (caught.value.hint or "")
        assert host.environments() == {}

    hosted(small, body)


def test_what_is_printed_does_not_disturb(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        for text in ("\0\0\0\5", '{"id": 1, "ok": 2}', "x" * 100_000):
            assert (await host.step(number, {"do": "say", "text": text, "times": 20}))[0] == "said"

    hosted(small, body)


@pytest.mark.parametrize(("action", "how"), [
    ({"do": "exit", "status": 3}, "status 3"), ({"do": "kill"}, "SIGKILL"), ({"do": "crash"}, "SIGSEGV"),
])  # fmt: skip
def test_one_that_dies_is_told_and_leaves_the_others(
    small: Path, hosted: Run, action: dict[str, Any], how: str
) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        other, number = await host.make(ECHO), await host.make(ECHO)
        with pytest.raises(ActionError, match=how) as caught:
            await host.step(number, dict(action))
        if action["do"] == "exit":
            assert "last words" in caught.value.details["stderr"]
        with pytest.raises(ActionError, match=how):
            await host.reset(number)
        assert (await host.step(other, "fine"))[0] == "fine"
        await host.close_env(number)
        assert (await host.step(await host.make(ECHO), "again"))[0] == "again"

    hosted(small, body)


def test_too_slow_is_killed(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number, other = await host.make(ECHO), await host.make(ECHO)
        _, info = await host.reset(number)
        begin = time.monotonic()
        slow = asyncio.ensure_future(host.step(number, {"do": "sleep", "seconds": 1000}))
        assert (await host.step(other, "meanwhile"))[0] == "meanwhile"
        with pytest.raises(CommandTimeout, match=r"longer than 0\.5 s"):
            await slow
        assert time.monotonic() - begin < 5
        await gone(info["pid"])
        with pytest.raises(CommandTimeout):
            await host.step(number, "x")
        with pytest.raises(CommandTimeout):
            await host.make(ECHO, {"pause": 1000})
        assert host.environments() == {other: ECHO}

    hosted(small, body, timeout=0.5)


def test_a_caller_that_goes_away(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        slow = asyncio.ensure_future(host.step(number, {"do": "sleep", "seconds": 0.3}))
        making = asyncio.ensure_future(host.make(ECHO, {"pause": 1000}))
        await asyncio.sleep(0.1)
        slow.cancel()
        making.cancel()
        await asyncio.gather(slow, making, return_exceptions=True)
        assert await host.step(number, "next") == ("next", 1.0, False, False, {"count": 2})
        assert host.environments() == {number: ECHO}

    hosted(small, body)


def test_its_own_processes_go_with_it(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        pid = (await host.step(number, {"do": "start"}))[0]
        assert alive(pid)
        await host.close_env(number)
        await gone(pid)

    hosted(small, body)


def test_more_environments_than_pipes_and_big_values(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        numbers = await asyncio.gather(*(host.make(ECHO) for _ in range(len(PIPES) + 4)))
        text = "a\u0000é" * 300_000
        for number in (numbers[0], numbers[-1]):
            assert (await host.step(number, text))[0] == text
        answers = await asyncio.gather(
            *(host.step(n, {"do": "grow", "size": 50_000}) for n in numbers for _ in range(3))
        )
        assert all(a[0] == "é" * 50_000 for a in answers)
        for number in numbers[:8]:
            await host.close_env(number)
        again = await asyncio.gather(*(host.make(ECHO) for _ in range(8)))
        assert [(await host.step(n, n))[0] for n in (*numbers[8:], *again)] == [*numbers[8:], *again]

    hosted(small, body)


def test_values(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        nan, inf, *rest = (await host.step(number, {"do": "odd"}))[0]
        assert math.isnan(nan) and inf == math.inf
        assert rest == [["\ud800"], [1, 2], {"3": 4}]
        for action in ("unsendable", "nested"):
            with pytest.raises(ActionError):
                await host.step(number, {"do": action})
        info = await host.make("small:Info-v0")
        observation, reward, terminated, truncated, told = await host.step(info, "x")
        assert (observation, reward, terminated, truncated) == ("ok", 0.5, True, True)
        assert told["set"] == [1, 2]
        assert told["(1, 2)"] == "key"
        assert told["what"]["$type"] == "gem.envs.Echo"
        assert told["bytes"] == {"$type": "builtins.bytes", "$repr": "b'x'"}

    hosted(small, body)


def test_found_again_after_a_restart(small: Path, hosted: Run) -> None:
    """A rocklet that goes in the middle of things, and one that comes after it."""

    async def body(host: EnvHost, runtime: ProcessRuntime, handle: Handle) -> None:
        numbers = [await host.make(ECHO, {"start": n * 100}) for n in range(len(PIPES) + 2)]
        await asyncio.gather(*(host.step(n, "x") for n in numbers))
        calls = [asyncio.ensure_future(host.step(n, {"do": "sleep", "seconds": 0.2, "size": 300_000})) for n in numbers]
        await asyncio.sleep(0.35)  # answers are half written and half read
        await host.detach()
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, SandboxError | tuple)
        later = EnvHost(runtime, handle)
        await later.attach()
        try:
            assert later.environments() == dict.fromkeys(numbers, ECHO)
            for place, number in enumerate(numbers):
                assert await later.step(number, number) == (number, 1.0, False, False, {"count": place * 100 + 3})
            new = await later.make(ECHO)
            assert new == max(numbers) + 1
            assert (await later.step(new, "new"))[0] == "new"
        finally:
            await later.close()

    hosted(small, body)


def test_the_rest_of_an_answer_that_a_former_rocklet_began_to_read() -> None:
    """It makes no sense, and may be read before the environment is greeted."""

    async def main() -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK)
        answered: list[bytes] = []
        nonsense: list[str] = []
        came = asyncio.Event()
        inlet = FrameReader(reading, lambda frame: (answered.append(bytes(frame)), came.set())[1],
                         lambda why: (nonsense.append(why), came.set())[1])  # fmt: skip
        try:
            os.write(writing, b"x" * 1000)
            await asyncio.wait_for(came.wait(), 30)
            came.clear()
            assert nonsense and not answered
            inlet.seek(b"token")
            whole = HEAD.pack(2, OK, 0, 1, 7, 0) + b"it"
            os.write(writing, b"x" * 1000 + b"token" + whole)
            await asyncio.wait_for(came.wait(), 30)
            assert answered == [whole] and len(nonsense) == 1
        finally:
            inlet.stop()
            os.close(reading)
            os.close(writing)

    asyncio.run(main())


def test_a_step_is_done_once_even_across_a_restart(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, runtime: ProcessRuntime, handle: Handle) -> None:
        number = await host.make(ECHO)
        await host.reset(number, 1)
        first = await host.step(number, "a", 0)
        assert await host.step(number, "ignored", 0) == first
        await host.detach()
        later = EnvHost(runtime, handle)
        await later.attach()
        try:
            assert await later.step(number, "ignored", 0) == first
            with pytest.raises(Conflict, match="step 5 was asked for, and step 1 is the next one") as caught:
                await later.step(number, "b", 5)
            assert caught.value.details["next"] == 1
            assert (await later.step(number, "b", 1))[4] == {"count": 2}
            assert (await later.step(number, "without a number"))[4] == {"count": 3}
            await later.reset(number, 1)
            assert (await later.step(number, "b", 0))[4] == {"count": 4}
        finally:
            await later.close()

    hosted(small, body)


def test_the_host_itself_dies(small: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        number = await host.make(ECHO)
        _, info = await host.reset(number)
        parent = int(Path(f"/proc/{info['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        call = asyncio.ensure_future(host.step(number, {"do": "sleep", "seconds": 1000}))
        await asyncio.sleep(0.05)
        os.kill(parent, signal.SIGKILL)
        with pytest.raises(SandboxError, match="host of environments ended: killed by signal 9"):
            await call
        assert host.failed is not None
        with pytest.raises(SandboxError):
            await host.make(ECHO)
        await gone(info["pid"])

    hosted(small, body)


def test_broken_packages(tmp_path: Path, hosted: Run) -> None:
    (tmp_path / "packages/site/gem").mkdir(parents=True)
    (tmp_path / "packages/site/gem/__init__.py").write_text("import not_installed_anywhere\n")

    async def body(host: EnvHost, *_: Any) -> None:
        with pytest.raises(ActionError, match="not_installed_anywhere"):
            await host.make(ECHO)

    hosted(tmp_path / "packages", body)


def test_no_packages(tmp_path: Path) -> None:
    async def work() -> None:
        runtime = ProcessRuntime(tmp_path / "run")
        await runtime.open()
        handle = await runtime.create("envs", SandboxConfig(image="host"))
        try:
            with pytest.raises(ImageError, match="no environment packages"):
                await EnvHost(runtime, handle).open()
        finally:
            await runtime.destroy(handle)
            await runtime.close()

    asyncio.run(work())


def test_a_host_that_cannot_start(tmp_path: Path, hosted: Run) -> None:
    (tmp_path / "packages/site/gem").mkdir(parents=True)
    (tmp_path / "packages/site/gem/__init__.py").write_text("import os; os.write(2, b'broken'); os._exit(5)\n")
    with pytest.raises(SandboxError, match="exit status 5: broken"):
        hosted(tmp_path / "packages", None)


@settings(database=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=3 * PIECE)), max_size=8), st.integers(1, 9000))
def test_pieces_make_messages(messages: list[tuple[int, bytes]], step: int) -> None:
    data = b"".join(piece for stream, payload in messages for piece in pieces(stream, payload))
    joiner = Joiner()
    found = [m for start in range(0, len(data), step) for m in joiner.feed(data[start : start + step])]
    assert found == messages
    assert all(len(piece) <= 4096 for stream, payload in messages for piece in pieces(stream, payload))


def _piece(stream: int, flags: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), flags, stream) + payload


def test_messages_that_begin_and_do_not_end_are_bounded() -> None:
    joiner = Joiner()
    assert list(joiner.feed(b"".join(_piece(stream, FIRST, b"x") for stream in range(MOST_STREAMS)))) == []
    assert list(joiner.feed(_piece(7, 0, b"y"))) == []
    with pytest.raises(ValueError, match="begun"):
        list(joiner.feed(_piece(MOST_STREAMS, FIRST)))
    joiner.forget(MOST_STREAMS)  # there is room again
    assert list(joiner.feed(_piece(7, LAST, b"z"))) == [(7, b"xyz")]
    assert list(joiner.feed(_piece(MOST_STREAMS, FIRST))) == []


def test_pieces_without_content_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of nothing but empty pieces has no size, and would be held all the same."""
    monkeypatch.setattr(frames, "MOST_JOINING", 1 << 20)
    joiner, many = Joiner(), _piece(1, 0) * 1000
    assert list(joiner.feed(_piece(1, FIRST))) == []
    with pytest.raises(ValueError, match="have not ended"):
        for _ in range((1 << 20) // 64 // 1000 + 1):
            assert list(joiner.feed(many)) == []


def test_a_bound_counts_what_is_held_now() -> None:
    joiner, half = Joiner(), bytes(PIECE)
    for _ in range(3):  # the same stream begins again and again, and what it had is forgotten
        for stream in range(100):
            assert list(joiner.feed(_piece(stream, FIRST, half) + _piece(stream, 0, half))) == []
    for stream in range(100):
        assert list(joiner.feed(_piece(stream, LAST, b"."))) == [(stream, half + half + b".")]
    assert joiner._held == 0 and not joiner._parts and not joiner._sizes
