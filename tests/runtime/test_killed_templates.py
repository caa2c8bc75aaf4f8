"""Templates and launchers that are killed at any moment: the original continues, a retry succeeds, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import process_tree
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, run, until
from tests.runtime.test_copied_processes import TAIL, A, ask, attached, child, end, program, template
from tests.runtime.test_frozen_files import LIVE, forking

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")


async def killed_after(runtime: NamespaceRuntime, seconds: float, of_launcher: bool) -> None:
    """Kill all templates, or the launcher, after some time."""
    await asyncio.sleep(seconds)
    launcher = runtime._slots.launcher.pid
    for pid in [launcher] if of_launcher and launcher is not None else template(runtime):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def inside(box: Box) -> list[int]:
    """The processes of a sandbox but pid 1, outside."""
    return [entry.pid for entry in process_tree.descendants(process_tree.scan(), box.handle.data["pid"]) if entry.alive]


ROUNDS = pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.long)])


@pytest.mark.timeout(120)
@ROUNDS
@pytest.mark.parametrize("of_launcher", [False, True])
def test_a_kill_while_copies_start(tmp_path: Path, of_launcher: bool, rounds: int) -> None:
    async def main() -> None:
        random.seed(3)
        async with forking(tmp_path) as (runtime, box):
            python = await program(box, 8)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await ask(python, TAIL)
            for number in range(rounds):
                killing = asyncio.create_task(killed_after(runtime, random.uniform(0, 0.06), of_launcher))
                try:
                    one = await child(runtime, f"child{number}")
                except errors.RockError as error:  # both attempts were killed
                    assert not of_launcher, f"one death of the launcher made a start fail: {error}"
                    assert error.retryable or isinstance(error, errors.StartFailed), error
                else:
                    assert await ask(await attached(one, "process:python"), TAIL) == expected
                    await end(one)
                await killing
            one = await child(runtime, "last")
            assert await ask(await attached(one, "process:python"), TAIL) == expected
            await end(one)
            assert await ask(python, "1 + 1") == "2" and len(inside(box)) == 1

    run(main(), 110)


@pytest.mark.timeout(120)
@ROUNDS
def test_a_kill_while_processes_are_taken(tmp_path: Path, rounds: int) -> None:
    """Of the launcher: its template completes or undoes what it does to the processes."""

    async def main() -> None:
        random.seed(4)
        async with forking(tmp_path) as (runtime, box):
            python = await program(box, 8)
            outcomes = set()
            for number in range(rounds):
                name = f"{number:032x}"
                await box.sh(f"echo {number} > /work/number")
                killing = asyncio.create_task(killed_after(runtime, random.uniform(0, 0.05), of_launcher=True))
                try:
                    await runtime.checkpoint(box.handle, name, "auto", processes=True)
                    outcomes.add("taken")
                except errors.RockError as error:
                    assert isinstance(error, errors.Unavailable | errors.Unsupported), error
                    outcomes.add("killed")
                await killing
                await until(lambda: not _is_traced(box))
                assert await ask(python, "open('/work/number').read()") == f"'{number}\\n'"
                assert await box.sh("cat /work/number") == f"{number}\n"
            taken = await runtime.checkpoint(box.handle, "f" * 32, "auto", processes=True)
            assert taken.copied == ["process:python"] and outcomes
            expected = await ask(python, TAIL)
            one = await child(runtime, "child", "f" * 32)
            assert await ask(await attached(one, "process:python"), TAIL) == expected
            await end(one)

    run(main(), 110)


def _is_traced(box: Box) -> bool:
    with contextlib.suppress(OSError):
        return any("TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
                   for pid in (box.handle.data["pid"], *inside(box)))  # fmt: skip
    return True
