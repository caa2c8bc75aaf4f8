"""When recordings are on the disk: synced in threads, at intervals and before the response to the end of a run."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rock.errors import StorageFull
from rock.gateway.dialects import DIALECTS
from rock.gateway.runs import Run
from rock.gateway.service import Gateway, Limits
from rock.protocol.keys import OPERATOR
from rock.protocol.runs import EndRun, RunSpec
from tests.gateway.conftest import chat_body


class Disk:
    """Records the syncs of this process: (path, size, thread) in order. delay: seconds that each takes; broken: they
    fail with EIO."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[tuple[str, int, int]] = []
        self.delay, self.broken = 0.0, False
        real = os.fsync

        def fsync(fd: int) -> None:
            time.sleep(self.delay)
            if self.broken:
                raise OSError(errno.EIO, "as planned")
            real(fd)
            self.synced.append((os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size, threading.get_ident()))

        monkeypatch.setattr(os, "fsync", fsync)

    def of(self, name: str) -> list[int]:
        """The sizes at which the files of this name were synced."""
        return [size for path, size, _ in self.synced if Path(path).name == name]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def _no_port(sandbox: str, port: int | None = None) -> int:
    raise AssertionError("there is no sandbox")


async def _no_close(sandbox: str) -> None:
    raise AssertionError("there is no sandbox")


@asynccontextmanager
async def gateway_in(folder: Path, every: float) -> AsyncIterator[Gateway]:
    gateway = Gateway(folder, Limits(sync=every), _no_port, _no_close)
    await gateway.open()
    try:
        yield gateway
    finally:
        gateway.let_go()
        await gateway.close()


async def started(gateway: Gateway) -> Run:
    info = await gateway.create(OPERATOR, RunSpec(pull=True), None, "http://127.0.0.1:1")
    return gateway.runs[info.id]


def call(run: Run, text: str) -> None:
    body = chat_body(text)
    run.begin(DIALECTS["openai-chat"].parse_request(body, None, None), body, text, state="waiting")


def at_once(work: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(work())


def test_the_end_of_a_run_is_on_the_disk(tmp_path: Path, disk: Disk) -> None:
    """The calls at their full size, and the state before its rename, are synced when `end` returns; no sync runs in the
    thread of the event loop."""

    async def work() -> None:
        async with gateway_in(tmp_path / "gateway", 3600.0) as gateway:
            run = await started(gateway)
            for text in "abc":
                call(run, text)
            disk.synced.clear()
            info = await gateway.end(run, EndRun(reward=1.0))
            assert info.state == "ended" and info.counts.cancelled == 3
            assert disk.of("calls")[-1] == (run.folder / "calls").stat().st_size
            assert disk.of(".new-run.json")[-1] == (run.folder / "run.json").stat().st_size
            assert disk.of(run.id)  # the folder, for the rename
            assert threading.get_ident() not in {thread for *_, thread in disk.synced}

    at_once(work)


def test_records_are_synced_at_intervals(tmp_path: Path, disk: Disk) -> None:
    """Many runs in one batch, and a slow disk does not stop the event loop."""

    async def work() -> None:
        async with gateway_in(tmp_path / "gateway", 0.05) as gateway:
            runs = [await started(gateway) for _ in range(5)]
            disk.delay = 0.03
            for run in runs:
                for text in "abcdefgh":
                    call(run, text)
            sizes = sorted((run.folder / "calls").stat().st_size for run in runs)
            slowest, end = 0.0, time.monotonic() + 10
            while sorted(disk.of("calls")[-5:]) != sizes and time.monotonic() < end:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                slowest = max(slowest, time.monotonic() - before)
            assert sorted(disk.of("calls")[-5:]) == sizes and slowest < 0.1
            assert set(disk.of("run.json")) and len(disk.of("calls")) <= 10  # not once for each record
            disk.delay = 0.0
            await asyncio.sleep(0.2)
            disk.synced.clear()
            await asyncio.sleep(0.2)
            assert not disk.synced  # nothing has changed

    at_once(work)


def test_the_last_records_are_synced_by_the_stop(tmp_path: Path, disk: Disk) -> None:
    async def work() -> None:
        async with gateway_in(tmp_path / "gateway", 3600.0) as gateway:
            run = await started(gateway)
            call(run, "a")
            size = (run.folder / "calls").stat().st_size
            assert disk.of("calls") == []
        assert disk.of("calls") == [size]

    at_once(work)


def test_a_disk_that_fails(tmp_path: Path, disk: Disk) -> None:
    """A run whose end cannot be synced is still active, and its end can be repeated. A failed sync of calls shows."""

    async def work() -> None:
        async with gateway_in(tmp_path / "gateway", 0.02) as gateway:
            run = await started(gateway)
            disk.broken = True
            call(run, "a")
            for _ in range(500):
                if run.incomplete:
                    break
                await asyncio.sleep(0.01)
            assert run.incomplete
            with pytest.raises(StorageFull):
                await gateway.end(run, EndRun(reward=0.5))
            assert run.info.state == "active" and run.info.reward is None
            disk.broken = False
            ends = [gateway.end(run, EndRun(reward=1.0)) for _ in range(3)]
            assert {info.reward for info in await asyncio.gather(*ends)} == {1.0}
        async with gateway_in(tmp_path / "gateway", 0.02) as gateway:
            found = gateway.runs[run.id].info
            assert (found.state, found.reward, found.incomplete) == ("ended", 1.0, True)

    at_once(work)
