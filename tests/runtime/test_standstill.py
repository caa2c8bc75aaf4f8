"""Processes stand still for as long as a connection wants it, and not a moment longer."""

from __future__ import annotations

import asyncio

import pytest

from rock import errors
from rock.runtime.init.link import SOCKET_NAME, InitLink
from tests.runtime.boxes import Box, Maker, run

STATE = "print(open('/proc/%d/stat').read().rpartition(')')[2].split()[0])"
FAMILY = "sleep 500 & sh -c 'sleep 501 & wait' & setsid sleep 502 & wait"


def another(b: Box) -> InitLink:
    """A connection of one's own."""
    folder = b.runtime._run_dir / b.handle.data.get("slot", b.handle.id)
    assert (folder / SOCKET_NAME).exists()
    return InitLink.connect(folder, b.handle.id)


async def states(b: Box, *pids: int) -> set[str]:
    return {(await b.python(STATE % pid)).strip() for pid in pids}


def test_all_stop_and_go_on(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            family = await b.spawn("sh", "-c", FAMILY)
            stopped = await b.spawn("sh", "-c", "kill -STOP $$")
            await asyncio.sleep(0.3)
            link = another(b)
            reply, _ = await link.request("pause")
            assert reply["count"] == 5, "two shells, and three that sleep"
            other = another(b)
            with pytest.raises(errors.Conflict):
                await other.request("pause")
            await other.request("resume")  # which is not its business
            waiting = asyncio.create_task(b.sh("echo went on"))
            await asyncio.sleep(0.3)
            assert not waiting.done(), "a program that would start now waits"
            await other.request("stat", {"path": "/", "follow": True})
            await link.request("resume")
            assert await asyncio.wait_for(waiting, 30) == "went on\n"
            assert await states(b, family.pid) == {"S"} and await states(b, stopped.pid) == {"T"}
            await other.request("pause")
            link.close()
            other.close()  # without a word, as a server does that is killed
            assert await asyncio.wait_for(b.sh("echo went on"), 30) == "went on\n"
            assert await states(b, family.pid) == {"S"} and await states(b, stopped.pid) == {"T"}
            await family.kill_tree()
            await stopped.kill_tree()

    run(main())


def test_who_breeds_is_stopped_too(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            path = str(b.root / "count")
            script = f"f() {{ while :; do (echo x >> {path}; :) & wait; done; }}; f & f & f & wait"
            breeder = await b.spawn("sh", "-c", script)
            for _ in range(3):
                await asyncio.sleep(0.2)
                link = another(b)
                await link.request("pause")
                before = (await b.runtime.stat(b.handle, path)).size
                await asyncio.sleep(0.3)
                assert (await b.runtime.stat(b.handle, path)).size == before > 0
                link.close()
                await until_grown(b, path, before)
            assert await breeder.kill_tree() > 0

    run(main())


HEADLESS = """
import ctypes, platform, threading, sys
def write():
    with open(sys.argv[1], "a") as file:
        while True:
            file.write("x")
            file.flush()
threading.Thread(target=write).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # exit(2): of this thread alone
"""


def test_who_has_lost_its_main_thread_is_stopped_too(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            path = str(b.root / "count")
            process = await b.spawn("/usr/bin/python3", "-I", "-S", "-c", HEADLESS, path)
            await asyncio.sleep(0.5)
            assert await states(b, process.pid) == {"Z"}
            link = another(b)
            await link.request("pause")
            before = (await b.runtime.stat(b.handle, path)).size
            await asyncio.sleep(0.3)
            assert (await b.runtime.stat(b.handle, path)).size == before > 0
            link.close()
            await until_grown(b, path, before)
            await process.signal(9)

    run(main())


async def until_grown(b: Box, path: str, before: int) -> None:
    end = asyncio.get_running_loop().time() + 20
    while (await b.runtime.stat(b.handle, path)).size == before:
        assert asyncio.get_running_loop().time() < end, "it does not go on"
        await asyncio.sleep(0.01)


def test_a_stop_ends_it(box: Maker) -> None:
    """Those who stand still get their SIGTERM, and act on it."""

    async def main() -> None:
        async with box() as b:
            polite = await b.spawn("sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done")
            await asyncio.sleep(0.3)
            link = another(b)
            await link.request("pause")
            waiting = asyncio.create_task(polite.wait())
            await b.runtime.stop(b.handle, 20)
            assert (await asyncio.wait_for(waiting, 30)).code == 7
            link.close()

    run(main())
