"""Forks in place: processes with much memory continue before it is copied. What a guest does meanwhile has no effect on
the snapshot, or is an error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import process_tree
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.namespace.launcher import ptrace
from rock.runtime.namespace.processes import injected
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, put, run, until, until_line
from tests.runtime.test_copied_processes import TAIL, A, ask, attached, child, end, program
from tests.runtime.test_frozen_files import LIVE, forking

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")
LARGE = 48  # MB
assert LARGE << 20 > 2 * injected.LEAST


def inside(box: Box) -> list[process_tree.Entry]:
    """The processes of a sandbox but pid 1."""
    return list(process_tree.descendants(process_tree.scan(), box.handle.data["pid"]))


def status(pid: int, name: str) -> str:
    """A field of /proc/PID/status."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split(":", 1)[1].strip()
    return ""


async def alone(box: Box, count: int) -> None:
    """Wait until the sandbox has exactly this number of processes, of which none is traced or stopped."""
    await until(lambda: len(found := inside(box)) == count
                and all(status(one.pid, "TracerPid") == "0" and status(one.pid, "State")[:1] != "T" for one in found))


@contextlib.asynccontextmanager
async def roomy(folder: Path, memory: str = "1g", pids: int = 256) -> AsyncIterator[tuple[NamespaceRuntime, Box]]:
    """A runtime and a sandbox with these limits."""
    async with forking(folder) as (runtime, _):
        config = SandboxConfig(image="hand", memory=memory, cpus=1, pids=pids)
        box = Box(runtime, await runtime.create("roomy", config), Path("/work"))
        try:
            yield runtime, box
        finally:
            await end(box)


async def number(box: Box) -> int:
    """The number of a new process. A duplicate takes one, too."""
    return int(await box.sh("echo $$"))


def duplicate(box: Box, first: int) -> int:
    """The number of the duplicate of a process, which continues already; 0 if there is none now."""
    if status(first, "TracerPid") != "0":
        return 0
    return next((one.pid for one in inside(box) if one.pid != first and status(one.pid, "TracerPid") != "0"), 0)


@pytest.mark.timeout(120)
def test_a_large_program_continues_in_each_child(tmp_path: Path) -> None:
    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            process = await program(box, LARGE)
            threads = ("!import threading; event = threading.Event(); "
                       "[threading.Thread(target=event.wait, daemon=True).start() for _ in range(3)]")  # fmt: skip
            assert await ask(process, threads) == "None"
            before = await number(box)
            taken = await runtime.checkpoint(box.handle, A, "auto", processes=True)
            assert taken.files == "switch"
            await alone(box, 1)
            assert await number(box) == before + 2
            expected = await ask(process, TAIL)
            assert await ask(process, "!state[:] = bytes(len(state))") == "None"
            for name in ("one", "two"):
                one = await child(runtime, name)
                copy = await attached(one, "process:python")
                assert await ask(copy, TAIL) == expected
                assert await ask(copy, "threading.active_count()") == "4"
                await end(one)

    run(main(), timeout=100)


GENERATIONS = r"""
import mmap, sys
pages = mmap.mmap(-1, int(sys.argv[1]) << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
count, generation, rest = len(pages) >> 12, 0, None
def turn():
    global generation
    generation += 1
    for place in range(count): pages[place << 12 : (place << 12) + 8] = generation.to_bytes(8, "little")
def seen():
    found = [int.from_bytes(pages[place << 12 : (place << 12) + 8], "little") for place in range(count)]
    return sum(a != b for a, b in zip(found, found[1:])), found[0] - found[-1], found[0] - generation
turn()
print("ready", flush=True)
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    turn()
    rest = seen() if rest is None else rest
line = sys.stdin.readline()
print(seen(), flush=True)
"""


@pytest.mark.timeout(120)
def test_the_memory_is_that_of_one_moment(tmp_path: Path) -> None:
    """The program writes to all pages in turn, again and again: a copy that finishes its turn has equal pages."""

    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            await put(box, "/work/generations.py", GENERATIONS.encode())
            process = await box.spawn("python3", "-u", "/work/generations.py", str(LARGE), stdin="pipe",
                                      key="process:python", keep=True)  # fmt: skip
            assert process.stdout is not None
            assert await until_line(process.stdout) == b"ready\n"
            for attempt in range(5):
                name = f"{attempt:032x}"
                await runtime.checkpoint(box.handle, name, "auto", processes=True)
                one = await child(runtime, f"child-{attempt}", name)
                copy = await attached(one, "process:python")
                assert await ask(copy, "end") == "(0, 0, 0)"
                await end(one)
            assert await ask(process, "end") == "(0, 0, 0)"

    run(main(), timeout=100)


ADVISED = ("!import mmap; areas = {}; "
           "[areas.setdefault(advice, mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)).write("
           "bytes([advice]) * (4 << 20)) for advice in (10, 18, 0)]; "
           "[area.madvise(advice) for advice, area in areas.items()]")  # fmt: skip


@pytest.mark.timeout(120)
def test_memory_that_a_fork_does_not_copy(tmp_path: Path) -> None:
    """MADV_DONTFORK and MADV_WIPEONFORK, and pages that the program itself cannot read."""

    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            process = await program(box, LARGE)
            assert await ask(process, ADVISED) == "None"
            hide = ("!import ctypes; hidden = mmap.mmap(-1, 1 << 20, 34); hidden.write(b'h' * (1 << 20)); "
                    "address = ctypes.addressof(ctypes.c_char.from_buffer(hidden)); libc = ctypes.CDLL(None); "
                    "libc.mprotect(ctypes.c_void_p(address), 1 << 20, 0)")  # fmt: skip
            assert await ask(process, hide) == "None"
            show = "libc.mprotect(ctypes.c_void_p(address), 1 << 20, 3), hidden[:] == b'h' * (1 << 20), " \
                   "[area[:] == bytes([advice]) * (4 << 20) for advice, area in areas.items()], sum(state)"
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await ask(process, show)
            assert expected.startswith("(0, True, [True, True, True], ")
            one = await child(runtime)
            assert await ask(await attached(one, "process:python"), show) == expected
            await end(one)

    run(main(), timeout=100)


WATCH = r"""
import os, signal, sys
own = os.getpid()
print("ready", flush=True)
while True:
    for number in range(2, 400):  # an open folder of /proc would be a reason against the copy
        if number in (own, int(sys.argv[1])): continue
        try: os.kill(number, signal.SIGKILL)
        except OSError: pass
"""


@pytest.mark.timeout(180)
def test_a_guest_that_kills_the_duplicate(tmp_path: Path) -> None:
    """The checkpoint is an error, or complete; the original continues in both cases."""

    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            process = await program(box, 128)
            await put(box, "/work/watch.py", WATCH.encode())
            own = await ask(process, "os.getpid()")
            killer = await box.spawn("python3", "-u", "/work/watch.py", own, key="process:killer", keep=True)
            assert killer.stdout is not None
            assert await until_line(killer.stdout) == b"ready\n"
            failed, complete = 0, list[str]()
            for attempt in range(12):
                name = f"{attempt:032x}"
                try:
                    await runtime.checkpoint(box.handle, name, "auto", processes=True)
                    complete.append(name)
                except errors.Unavailable as error:
                    assert "not copied" in error.message
                    failed += 1
                await alone(box, 2)
                if failed >= 2:
                    break
            assert failed
            await killer.kill_tree()
            await killer.wait()
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await ask(process, TAIL)
            for name in (A, *complete[:1]):
                one = await child(runtime, f"child-{name[-1]}", name)
                assert (await ask(await attached(one, "process:python"), TAIL)) == expected
                await end(one)

    run(main(), timeout=170)


WAITS = ("!import ctypes, errno, signal; libc = ctypes.CDLL(None, use_errno=True); ended = []; "
         "signal.signal(signal.SIGCHLD, lambda *_: ended.append(1)); "
         "wait = lambda: (libc.wait4(-1, None, 0x40000001, None), ctypes.get_errno() == errno.ECHILD)")  # fmt: skip


@pytest.mark.timeout(120)
def test_the_original_has_no_child(tmp_path: Path) -> None:
    """No signal, and nothing to wait for, also with __WALL, while its pages are copied and afterwards."""

    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            process = await program(box, 128)
            assert await ask(process, WAITS) == "None"
            assert await ask(process, "wait()") == "(-1, True)"
            taking = asyncio.create_task(runtime.checkpoint(box.handle, A, "auto", processes=True))
            while not taking.done():
                assert await ask(process, "wait(), ended") == "((-1, True), [])"
            await taking
            assert await ask(process, "wait(), ended") == "((-1, True), [])"
            await alone(box, 1)

    run(main(), timeout=100)


@pytest.mark.timeout(120)
def test_the_duplicate_cannot_be_read(tmp_path: Path) -> None:
    """It has no descriptors, and another process of the guest, which is root there too, cannot open its memory."""

    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            process = await program(box, 200)
            found, [first] = list[str](), inside(box)
            for attempt in range(5):
                taking = asyncio.create_task(runtime.checkpoint(box.handle, f"{attempt:032x}", "auto", processes=True))
                pid = 0
                while not taking.done() and not pid:
                    await asyncio.sleep(0)
                    pid = duplicate(box, first.pid)
                if pid and (inner := status(pid, "NSpid").split()[-1:]):
                    script = f"ls /proc/{inner[0]}/fd; head -c 1 /proc/{inner[0]}/mem; cat /proc/{inner[0]}/environ"
                    found.append(await box.sh(script))
                await taking
            await alone(box, 1)
            assert any("Permission denied" in text for text in found), found
            assert not any("PATH=" in text for text in found), found
            assert await ask(process, "len(objects)") == "20000"

    run(main(), timeout=100)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("limit", ["pids", "memory"])
def test_at_a_limit_of_the_sandbox(tmp_path: Path, limit: str) -> None:
    """Where there is no process or no memory left for a duplicate, the pages are copied while all is stopped."""

    async def main() -> None:
        memory = "96m" if limit == "memory" else "1g"
        async with roomy(tmp_path, memory, 16) as (runtime, box):
            process = await program(box, LARGE)
            if limit == "pids":
                more = r"!exec('while True:\n try:\n  if not os.fork(): signal.pause()\n except OSError: break')"
                assert await ask(process, more) == "None"
                assert "Resource temporarily" in await ask(process, "os.fork()")
            before = len(inside(box))
            known = await number(box) if limit == "memory" else 0
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            for value in range(3):  # all pages again
                write = f"[state.__setitem__(place, {value}) for place in range(0, len(state), 4096)][:0]"
                assert await ask(process, write) == "[]"
            await alone(box, before)
            assert limit == "pids" or await number(box) == known + 1
            config = SandboxConfig(image="hand", memory="1g", cpus=1, pids=64, snapshot=A)
            one = Box(runtime, await runtime.create("child", config), Path("/work"))
            assert await ask(await attached(one, "process:python"), "sum(state) > 0, len(objects)") == "(True, 20000)"
            assert await ask(process, "sum(state) > 0, len(objects)") == "(True, 20000)"
            await end(one)

    run(main(), timeout=100)


@pytest.mark.timeout(180)
def test_templates_that_are_killed_leave_nothing_inside(tmp_path: Path) -> None:
    """Killed while it copies pages of the duplicate: that ends with it, and the original continues."""

    async def main() -> None:
        async with roomy(tmp_path) as (runtime, box):
            process = await program(box, 200)
            killed = 0
            for attempt in range(12):
                name = f"{attempt:032x}"
                [first] = inside(box)
                taking = asyncio.create_task(runtime.checkpoint(box.handle, name, "auto", processes=True))
                while not taking.done():
                    await asyncio.sleep(0.001 * attempt)
                    if (pid := duplicate(box, first.pid)) and (tracer := int(status(pid, "TracerPid") or 0)):
                        os.kill(tracer, signal.SIGKILL)
                        break
                try:
                    await taking
                except errors.Unavailable:
                    killed += 1
                await alone(box, 1)
                assert await ask(process, "len(objects)") == "20000"
            assert killed
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await ask(process, TAIL)
            one = await child(runtime)
            assert await ask(await attached(one, "process:python"), TAIL) == expected
            await end(one)

    run(main(), timeout=170)


@pytest.mark.timeout(120)
def test_the_end_of_the_sandbox_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, _):
            for attempt in range(4):
                await _ended(runtime, attempt)

    run(main(), timeout=100)


async def _ended(runtime: NamespaceRuntime, attempt: int) -> None:
    """End a sandbox whose pages are copied."""
    config = SandboxConfig(image="hand", memory="512m", cpus=1, pids=64)
    box = Box(runtime, await runtime.create(f"other-{attempt}", config), Path("/work"))
    await program(box, 128)
    taking = asyncio.create_task(runtime.checkpoint(box.handle, A, "auto", processes=True))
    await until(lambda: len(inside(box)) > 1 or taking.done())
    await end(box)
    with contextlib.suppress(errors.RockError):
        await taking
    await runtime.drop_snapshot(A)
    assert not process_tree.lives(box.handle.data["pid"], box.handle.data["start"])


def test_a_duplicate_without_its_tracer_ends() -> None:
    """As when a template is killed before the kernel knows that a duplicate ends with it: it executes nothing."""
    code = ("import os, signal, sys; [signal.signal(one, lambda *_: os._exit(3)) for one in (10, 11, 4, 7, 12)]; "
            "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.read(1)")  # fmt: skip
    with subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None and guest.stdout is not None
        assert guest.stdout.readline() == b"ready\n"
        stopped = ptrace.Stopped()
        stopped.seize([guest.pid], time.monotonic() + 10)
        with ptrace.Injection(guest.pid) as process:
            pid = process.clone(0x8000)  # CLONE_PARENT: it is a child of this process
        found, status = os.waitpid(pid, 0x40000000)
        assert found == pid and os.WIFSTOPPED(status)
        ptrace.call(17, pid)  # PTRACE_DETACH
        found, status = os.waitpid(pid, 0x40000000)
        assert found == pid and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
        stopped.release()
        assert guest.poll() is None
        guest.stdin.close()
        assert guest.wait(10) == 0
