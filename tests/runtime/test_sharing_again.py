"""A pid 1 gives back memory that is what it was, and nobody sees a difference but in how much it has."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rock.guest.init import native
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.init.link import InitLink
from tests.runtime.boxes import ROOT, Box, get, namespace_box, namespace_runtime, put, run, until

pytestmark = pytest.mark.skipif(native.library is None, reason=f"no extension: {native.missing}")
look_into = pytest.mark.skipif(not ROOT, reason="only root may look into a pid 1")
HERE = Path(__file__).parents[2]

# A zygote and a child of it, with some data of its own that it changes and changes back, at random.
CHILD = """
import ctypes, json, os, random, sys, threading
from rock.runtime.namespace.launcher.snapshot import rehearse
from rock.runtime.namespace.launcher.zygote import OPTIONAL, Zygote

PAGE, ROUNDS = 4096, int(sys.argv[2])
dice = random.Random(int(sys.argv[1]))
data = [bytearray(dice.randbytes(64 << 10)) for _ in range(48)]
addresses = [ctypes.addressof((ctypes.c_char * len(part)).from_buffer(part)) for part in data]
libc = ctypes.PyDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

def play(sweep, pages):
    expected = [bytes(part) for part in data]
    changed, given = {}, 0
    for _ in range(ROUNDS):
        for _ in range(dice.randrange(12)):
            part, place = dice.randrange(len(data)), dice.randrange(64 << 10)
            changed.setdefault((part, place), expected[part][place])
            data[part][place] = dice.randrange(256)
        for part, place in dice.sample(sorted(changed), len(changed) // 2):
            data[part][place] = changed.pop((part, place))
        before = [bytes(part) for part in data]
        given += sweep.run(pages)
        assert [bytes(part) for part in data] == before
    for (part, place), value in changed.items():
        data[part][place] = value
    assert [bytes(part) for part in data] == expected
    return given

def page_of(part):
    return (addresses[part] + PAGE - 1) & -PAGE

def gone_and_back(sweep, pages):
    # Memory that was given back and got anew: not the file's any more, even where it has the same bytes.
    for part in range(8):
        kept, page = bytes(data[part]), page_of(part)
        same = ctypes.string_at(page, PAGE)
        assert libc.mmap(page, PAGE, 3, 0x32, -1, 0) == page
        ctypes.memmove(page, same, PAGE)
        sweep.run(pages)
        assert bytes(data[part]) == kept, "it is written again"
    for part in range(8, 16):
        page = page_of(part)
        same = ctypes.string_at(page, PAGE)
        libc.munmap(ctypes.c_void_p(page), ctypes.c_size_t(PAGE))
        sweep.run(pages)
        assert libc.mmap(page, PAGE, 3, 0x32, -1, 0) == page
        ctypes.memmove(page, same, PAGE)

def live(note, failed, sweep, first):
    told = {"failed": failed, "swept": sweep is not None}
    try:
        if sweep is not None and failed < 0:
            pages = os.open("/proc/self/pagemap", os.O_RDONLY)
            told["given"] = play(sweep, pages)
            gone_and_back(sweep, pages)
            again = play(sweep, pages)
            assert again > 0
            assert sweep.run(-1) == 0, "without a page table nothing is given back"
            told["mapped"] = sum("memfd:rock" in line for line in open("/proc/self/maps"))
            links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            told["held"] = [link for link in links if os.path.lexists(link) and "memfd" in os.readlink(link)]
    except BaseException as error:
        told["error"] = repr(error)
    os.write(writing, json.dumps(told).encode())

assert threading.active_count() == 1
reading, writing = os.pipe()
zygote = Zygote(live, rehearse)
CLOSE, GETPID, NO_DESCRIPTOR = 3, 39, 1 << 20
told = []
for call in ((GETPID,), (CLOSE, NO_DESCRIPTOR)):
    area = zygote.area()
    area.rows += [(OPTIONAL, (CLOSE, NO_DESCRIPTOR)), ("something", call)]
    zygote.clone(area, 0, b"")
    told.append(json.loads(os.read(reading, 65536)))
assert told.pop()["failed"] == 1
print(json.dumps(told[0]))
zygote.close()
"""
# The same under a filter: (number of the call, second argument or none) gets EPERM.
REFUSED = """
import struct
from rock.guest.init import syscalls
number, argument = {refused}
code = [(0x20, 0, 0, 0), (0x15, 0, 3 if argument is not None else 1, number)]
code += [(0x20, 0, 0, 24), (0x15, 0, 1, argument)] if argument is not None else []
code += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
syscalls.filter_calls(b"".join(struct.pack("HBBI", *one) for one in code))
"""
BOX = """
import asyncio, json, os, re, sys
from pathlib import Path
from tests.runtime.boxes import namespace_box

async def main():
    async with namespace_box(Path(sys.argv[1])) as b:
        out = [await b.sh(f"echo {n}") for n in range(3)]
        try:
            lines = Path(f"/proc/{b.handle.data['pid']}/maps").read_text().splitlines()
        except PermissionError:
            lines = []
        print(json.dumps([out, [line for line in lines if "memfd:rock" in line and "rw-p" in line]]))

asyncio.run(main())
"""

REHEARSED = """
import json, os, resource, signal
from rock.guest.init import users
from rock.runtime.namespace.launcher.snapshot import rehearse

def state():
    mask = os.umask(0o27)
    os.umask(mask)
    return [sorted(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE), mask,
            signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM)]

before = state()
rehearse()
try:
    children = os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    children = None
print(json.dumps([before == state(), children, users._cache]))
"""


def script(text: str, *words: str) -> Any:
    """What a Python says that runs a script: one line of JSON."""
    done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, timeout=100, cwd=HERE)
    if "Skipped" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr[-300:]}")
    assert done.returncode == 0 and done.stdout, done.stderr
    return json.loads(done.stdout)


def held(pid: int) -> int:
    """Kilobytes of memory that a process has to itself."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process are, but for those that it closes meanwhile."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return found


def parent(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("PPid:"))


def test_no_byte_changes() -> None:
    """By the instructions alone, hundreds of times, and where memory is not the file's any more."""
    told = script(CHILD, "1", "120")
    assert "error" not in told, told
    assert told["failed"] == -1 and told["swept"]
    assert told["given"] > 0 and told["mapped"] > 1
    assert told["held"] == [], "the file itself is in nobody's hands"


@pytest.mark.parametrize("refused", ["(319, None)", "(72, 1033)", "(28, None)"], ids=["memfd", "seal", "madvise"])
def test_where_it_is_refused(refused: str, tmp_path: Path) -> None:
    """More memory, and nothing else: of the zygote alone, and of a sandbox."""
    filtered = REFUSED.format(refused=refused)
    told = script(filtered + CHILD, "3", "20")
    assert "error" not in told, told
    assert told["failed"] == -1 and told["swept"] == (refused == "(28, None)")
    if refused != "(28, None)":
        assert script(filtered + BOX, str(tmp_path)) == [["0\n", "1\n", "2\n"], []]


def test_a_rehearsal_leaves_nothing() -> None:
    assert script(REHEARSED) == [True, None, {}], "descriptors, limits, children, or what was read"


@look_into
def test_less_when_idle(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            pid = b.handle.data["pid"]
            for _ in range(2):
                most = 0
                for n in range(8):
                    assert await b.sh(f"echo {n}") == f"{n}\n"
                    await put(b, f"/work/{n}", b"x" * 10_000)
                    most = max(most, held(pid))
                await until(lambda most=most: held(pid) < most - 300)  # type: ignore[misc]
            assert "Threads:\t1\n" in Path(f"/proc/{pid}/status").read_text()

    run(main())


@look_into
def test_the_file_is_sealed_and_in_nobody_s_hands(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            pid = b.handle.data["pid"]
            zygote = parent(pid)
            for one in (pid, zygote, parent(zygote)):
                assert not [link for link in descriptors(one) if "memfd:rock" in link]
            spans = [line.split()[0] for line in Path(f"/proc/{zygote}/maps").read_text().splitlines()
                     if "memfd:rock" in line]
            assert len(spans) > 2
            low, high = (f"{int(part, 16):x}" for part in spans[0].split("-"))
            fd = os.open(f"/proc/{zygote}/map_files/{low}-{high}", os.O_RDWR)
            try:
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 15
                with pytest.raises(PermissionError):
                    os.write(fd, b"x")
            finally:
                os.close(fd)
            inside = await b.sh("ls /proc/1/map_files /proc/1/fd; cat /proc/1/maps /proc/1/pagemap; exit 0")
            assert inside.count("Permission denied") == 4 and "memfd" not in inside
            own = await b.sh("cat /proc/self/maps; ls -l /proc/self/fd")
            assert "memfd" not in own and "pagemap" not in own

    run(main())


async def one_thing(b: Box, dice: random.Random, number: int) -> None:
    """Something that a pid 1 does, and whether it did it."""
    what = dice.choice(("command", "file", "kill", "pause", "user", "fail", "folder"))
    path = f"/work/{number}"
    if what == "command":
        assert await b.sh(f"echo {number}; seq 3") == f"{number}\n1\n2\n3\n"
    elif what == "file":
        data = dice.randbytes(dice.randrange(1, 200_000))
        await put(b, path, data)
        assert await get(b, path) == data
        assert (await b.runtime.stat(b.handle, path)).size == len(data)
    elif what == "kill":
        process = await b.spawn("sh", "-c", "sleep 300 & sleep 301")
        assert await process.kill_tree() >= 1
        assert (await process.wait()).signal == 9
        process.close()
    elif what == "pause":
        link = InitLink.connect(b.runtime._run_dir / b.handle.data.get("slot", b.handle.id), b.handle.id)
        await link.request("pause")
        await asyncio.sleep(dice.choice((0.0, 0.7)))
        await link.request("resume")
        link.close()
    elif what == "user":
        assert (await b.sh("id -un", user="root")) == "root\n"
    elif what == "fail":
        status, out, _ = await b.run("sh", "-c", f"exit {number % 100}")
        assert (status.code, out) == (number % 100, b"")
    else:
        await b.runtime.make_dir(b.handle, path + "d")
        assert str(number) + "d" in [entry.name for entry in await b.runtime.list(b.handle, "/work")]


def test_two_hundred_times(tmp_path: Path) -> None:
    """Many sandboxes that work and rest in turns do what they are told."""
    boxes, rounds = 25, 8

    async def life(b: Box, seed: int) -> None:
        dice = random.Random(seed)
        for number in range(rounds):
            await one_thing(b, dice, number)
            await asyncio.sleep(0.6)
        b.close()

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            config = SandboxConfig(image="hand", memory="128m", cpus=1, pids=64)
            handles = [await runtime.create(f"box{n}", config) for n in range(boxes)]
            try:
                made = [Box(runtime, handle, Path("/work")) for handle in handles]
                await asyncio.gather(*(life(b, seed) for seed, b in enumerate(made)))
            finally:
                for handle in handles:
                    await runtime.destroy(handle)

    run(main(), timeout=120)
