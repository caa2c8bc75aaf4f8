"""Runtime "gvisor": what the conformance suite does not ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rock import errors
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Liveness
from rock.runtime.gvisor.runtime import GvisorRuntime
from tests.runtime.boxes import Box, HandMade, leftovers, run, until
from tests.runtime.conformance.gvisor import GUESTS, OfGvisor

CONFIG = SandboxConfig(image="hand", runtime="gvisor", memory="256m", cpus=1, pids=256)


@pytest.fixture(scope="module", autouse=True)
def _there() -> None:
    if reason := OfGvisor().cannot():
        pytest.skip(f"no gVisor here: {reason}")


@asynccontextmanager
async def runtime_in(folder: Path, images: HandMade | None = None) -> AsyncIterator[GvisorRuntime]:
    runtime = OfGvisor().make(folder)
    if images is not None:
        runtime._images = images
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


def test_runsc_that_is_not_there_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        runtime = GvisorRuntime(tmp_path / "run", GUESTS, HandMade(tmp_path / "image"), "no-such-runsc")
        await runtime.open()
        with pytest.raises(errors.Unsupported, match="no-such-runsc") as refused:
            await runtime.create("box", CONFIG)
        assert "apt install runsc" in str(refused.value.hint)
        await runtime.close()

    run(main())


def test_memory_beyond_its_limit_ends_it_and_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with runtime_in(tmp_path) as runtime:
            handle = await runtime.create("box", CONFIG)
            assert handle.enforced["memory"].startswith("cgroup")
            box = Box(runtime, handle, Path("/work"))
            waiting = asyncio.create_task(runtime.wait(handle))
            await asyncio.sleep(0)
            with contextlib.suppress(errors.RockError):
                await box.python("x = b'x' * (1 << 30)")
            assert await waiting == "oom" and runtime.oom_kills(handle) > 0
            assert await runtime.recover(handle) is Liveness.GONE
            box.close()
            await runtime.destroy(handle)

    before = leftovers(tmp_path)
    run(main())
    assert leftovers(tmp_path) == before


def test_limits_inside(tmp_path: Path) -> None:
    """What its own kernel holds: the size of /dev/shm, and open files."""

    async def main() -> None:
        async with runtime_in(tmp_path) as runtime:
            config = CONFIG.model_copy(update={"shm_size": "8m", "nofile": 64})
            handle = await runtime.create("box", config)
            assert handle.enforced["shm_size"] == "tmpfs" and handle.enforced["nofile"] == "rlimit"
            box = Box(runtime, handle, Path("/work"))
            told = await box.sh("head -c 32m /dev/zero > /dev/shm/x 2>/dev/null; wc -c < /dev/shm/x; ulimit -n")
            assert told.split() == [str(8 << 20), "64"]
            await runtime.destroy(handle)

    run(main())


def test_what_nobody_knows_is_ended(tmp_path: Path) -> None:
    """Of a server that crashed, found by its folders and by its cgroups, and by nothing that the sandbox says."""

    async def main() -> None:
        async with runtime_in(tmp_path) as first:
            handles = [await first.create(f"box{number}", CONFIG) for number in range(3)]
        async with runtime_in(tmp_path) as second:
            (tmp_path / "run" / handles[2].data["slot"] / "record.json").unlink()  # as of one that was half made
            assert sorted(await second.sweep(["box0"])) == sorted(["box1", handles[2].data["slot"]])
            assert await second.recover(handles[1]) is Liveness.GONE
            assert await second.recover(handles[0]) is Liveness.RUNNING
            assert await Box(second, handles[0], Path("/work")).sh("echo alive") == "alive\n"
            await second.destroy(handles[0])

    before = leftovers(tmp_path)
    run(main(), 120)
    assert leftovers(tmp_path) == before


def test_a_killed_runsc_takes_all_along(tmp_path: Path) -> None:
    async def main() -> None:
        async with runtime_in(tmp_path) as runtime:
            handle = await runtime.create("box", CONFIG)
            group = Path(handle.data["cgroups"]["pids"]) / "cgroup.procs"
            assert len(group.read_text().split()) > 2  # runsc, the kernel, the file server
            os.kill(handle.data["pid"], signal.SIGKILL)
            assert await runtime.wait(handle) == "exited"
            await until(lambda: not group.read_text().split())
            await runtime.destroy(handle)

    before = leftovers(tmp_path)
    run(main())
    assert leftovers(tmp_path) == before


def test_an_image_cannot_lead_mounts_elsewhere(tmp_path: Path) -> None:
    """Links of an image in the places where things are mounted: they are followed inside, or not at all."""

    async def main() -> None:
        images = HandMade(tmp_path / "image")
        hostile = tmp_path / "hostile"
        outside = tmp_path / "outside"
        hostile.mkdir()
        outside.mkdir()
        for name in (".rock", "proc", "dev", "sys"):
            (hostile / name).symlink_to(outside)
        images.extra = (str(hostile),)
        async with runtime_in(tmp_path, images) as runtime:
            try:
                handle = await runtime.create("box", CONFIG)
            except errors.StartFailed:
                handle = None  # it may be refused; nothing may have been made outside
            if handle is not None:
                await Box(runtime, handle, Path("/work")).sh("true")
                await runtime.destroy(handle)
        assert list(outside.iterdir()) == []
        assert str(outside) not in Path("/proc/self/mounts").read_text()

    before = leftovers(tmp_path)
    run(main())
    assert leftovers(tmp_path) == before


def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with runtime_in(tmp_path) as runtime:
            await runtime.probe()
            for delay in (0.0, 0.05, 0.2):
                task = asyncio.create_task(runtime.create("box", CONFIG))
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await runtime.sweep([]) == []

    before = leftovers(tmp_path)
    run(main())
    assert leftovers(tmp_path) == before
