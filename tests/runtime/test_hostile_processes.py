"""Guests that attack the copy of their processes: by memory, registers, descriptors, names and /proc.

Whatever a guest prepares, the result is a copy of the same guest in its own sandbox, or a refusal.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from pathlib import Path

import pytest

from rock.runtime.base import Process
from rock.runtime.namespace.processes import address_space, capture
from rock.runtime.namespace.processes.address_space import Range
from tests.runtime.boxes import Box, run
from tests.runtime.test_copied_processes import A, ask, attached, child, end, program, template
from tests.runtime.test_frozen_files import LIVE, forking
from tests.runtime.test_refused_processes import gone, refusals

copying = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")

MAPPED = r"""
def place(address, size, content, protection=3, flags=0x100022):
    import ctypes as C
    libc = C.CDLL(None, use_errno=True); libc.mmap.restype = C.c_void_p
    got = libc.mmap(C.c_void_p(address), C.c_size_t(size), 3, flags, -1, C.c_long(0))
    assert got == address, (hex(got), C.get_errno())
    C.memmove(address, content, len(content))
    libc.mprotect(C.c_void_p(address), C.c_size_t(size), protection)
def read(address, size):
    import os
    with open("/proc/self/mem", "rb", 0) as memory: return os.pread(memory.fileno(), size, address)
def maps():
    # The kernel may merge neighbors that were mapped separately.
    found = []
    for line in open("/proc/self/maps"):
        fields = line.split(None, 5); start, end = fields[0].split("-"); rest = fields[1], fields[5:]
        if found and (found[-1][1], found[-1][2]) == (start, rest): found[-1][1] = end
        else: found.append([start, end, rest])
    return found
"""


async def prepared(box: Box, code: str) -> Process:
    """The Python program with some functions."""
    made = await program(box)
    assert await ask(made, f"!exec({code!r}, globals())") == "None"
    return made


async def copied(box: Box, process: Process, questions: list[str], name: str = A) -> list[str]:
    """The answers of a copy, which are those of the original."""
    runtime = box.runtime
    await runtime.checkpoint(box.handle, name, "auto", processes=True)
    expected = [await ask(process, question) for question in questions]
    one = await child(runtime, "copy", name)
    try:
        copy = await attached(one, "process:python")
        found = [await ask(copy, question) for question in questions]
        assert found == expected
        return found
    finally:
        await end(one)


@copying
def test_memory_where_the_copy_would_be_prepared(tmp_path: Path) -> None:
    """The range of the template and the room avoid all mappings of the guest."""
    lowest = 1 << 44
    spots = [0x10000, 1 << 32, lowest - 4096, lowest, lowest + (64 << 20), lowest + (1 << 30), 0x300000000000,
             0x7FFFFFFFE000]  # fmt: skip

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            process = await prepared(box, MAPPED)
            for spot in spots:
                assert await ask(process, f"!place({spot}, 4096, b'guest %d' % {spot})") == "None"
            assert await ask(process, "!place(1 << 33, 1 << 40, b'sparse', flags=0x104022)") == "None"
            assert await ask(process, "!place(1 << 45, 8192, b'hidden', protection=0)") == "None"
            questions = [f"read({spot}, 24)" for spot in (*spots, 1 << 33, 1 << 45)]
            found = await copied(box, process, questions)
            assert all("guest" in text for text in found[: len(spots)]) and "sparse" in found[len(spots)]
            folder = Path(box.runtime._snapshots.folder(A))
            assert (folder / "pages").stat().st_blocks * 512 < 100 << 20, "the file is sparse"

    run(main())


@copying
def test_a_copy_has_nothing_of_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            process = await prepared(box, MAPPED)
            questions = [
                "maps()", "sorted(os.listdir('/proc/self/fd'))[:-1]", "open('/proc/self/cmdline').read()",
                "open('/proc/self/environ').read()", "open('/proc/self/comm').read()", "os.readlink('/proc/self/exe')",
                "open('/proc/self/stat').read().split()[25:29]", "open('/proc/self/auxv', 'rb').read()",
                "[os.readlink(f'/proc/self/{n}') for n in ('cwd', 'root')]", "sorted(os.listdir('/'))",
            ]  # fmt: skip
            found = await copied(box, process, questions)
            assert str(tmp_path) not in "".join(found) and "rock" not in found[2] + found[3] + found[4]
            one = await child(runtime, "other")
            script = "import os; print(os.kill(2, 0), open('/proc/2/mem', 'rb').seek(0), len(os.listdir('/proc/2/fd')))"
            assert (await one.python(script)).startswith("None 0 "), "it has the rights of the guest, and no others"
            await end(one)

    run(main())


@copying
def test_names_that_look_like_something_else(tmp_path: Path) -> None:
    code = r"""
import ctypes, mmap, os
os.makedirs("/work/a\nb\\012 (deleted)/[vdso]"); os.chdir("/work/a\nb\\012 (deleted)/[vdso]")
named = [open(name, "w+") for name in ("x\n", "y (deleted)", "pipe:[1]", "socket:[2]", "[stack]", "\\134", "\udcff")]
for number, one in enumerate(named): one.write(f"file {number}"); one.flush()
image = open("/work/7f00-7fff rwxs 00000000 00:00 0 [vdso]", "wb+"); image.write(b"mapped" * 1000); image.flush()
view = mmap.mmap(image.fileno(), 4096, mmap.MAP_PRIVATE); view[4000:4007] = b"changed"
ctypes.CDLL(None).prctl(15, b") R 1 1 1\n1", 0, 0, 0)
"""

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            process = await prepared(box, code)
            found = await copied(box, process, [
                "[(one.tell(), one.seek(0), one.read()) for one in named]", "os.getcwd()", "view[3990:4010]",
                "open('/proc/self/comm').read()", "[os.readlink(f'/proc/self/fd/{one.fileno()}') for one in named]",
            ])  # fmt: skip
            assert ("(6, 0, 'file 6')" in found[0] and "b'dmappedmapchangedppe'" in found[2]) or "changed" in found[2]

    run(main())


@copying
def test_paths_that_lead_to_another_file(tmp_path: Path) -> None:
    """Between an open and the copy, a guest replaces a folder by a link, also one to a file of the host."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    tricks = {
        "file": "import os\nos.mkdir('d'); f = open('d/secret', 'w'); os.rename('d', 'e')\n"
                f"os.symlink('{tmp_path}', 'd')",
        "link": f"import os\nf = open('l', 'w'); os.rename('l', 'm'); os.symlink('{secret}', 'l')",
        "folder": "import os\nos.mkdir('k'); os.chdir('k'); os.rename('/work/k', '/work/n')\n"
                  "os.symlink('/etc', '/work/k')",
        "program": "import os, shutil\nshutil.copy('/usr/bin/sleep', '/work/s')\n"
                   "p = os.posix_spawn('/work/s', ['s', '1000'], {})\nimport time; time.sleep(0.2)\n"
                   f"os.rename('/work/s', '/work/t'); os.symlink('{secret}', '/work/s')",
        "mapping": "import mmap, os\nf = open('map', 'wb+'); f.write(bytes(4096)); f.flush()\n"
                   "m = mmap.mmap(f.fileno(), 4096, mmap.MAP_PRIVATE); f.close(); os.rename('map', 'pam')\n"
                   f"os.symlink('{secret}', 'map')",
    }  # fmt: skip

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            for number, code in enumerate(tricks.values()):
                process = await prepared(box, code)
                # The kernel names the files anew after a rename, so either that name leads to it, or it is refused.
                reasons = await refusals(box)
                if not reasons:
                    questions = ["os.getcwd()", "os.listdir('/work')", "'f' in globals()"]
                    found = await copied(box, process, questions, f"{number:032x}")
                    assert "of the host" not in str(found)
                await gone(process)
                await box.sh("cd /work; rm -rf d e l m k n s t map pam")
                assert secret.read_text() == "of the host"

    run(main())


@copying
def test_registers_and_addresses_without_sense(tmp_path: Path) -> None:
    """A program in a loop, without a stack, and one that gave the kernel addresses that are not mapped."""
    loop = r"""
import ctypes as C, mmap, os
code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
# mov rsp, 0x1234; mov rbp, -1; mov r12, -1; std; jmp to itself
code.write(bytes.fromhex("48c7c434120000 48c7c5ffffffff 49c7c4ffffffff fd ebfe"))
start = C.addressof(C.c_char.from_buffer(code))
spinner = os.fork() or C.CFUNCTYPE(None)(start)()
"""
    strange = r"""
import ctypes as C, signal
libc = C.CDLL(None)
assert libc.syscall(273, C.c_void_p(0xdeadbeef000), C.c_size_t(24)) == 0
libc.syscall(218, C.c_void_p(0x7ffffffff000 - 1))
stack = C.create_string_buffer(struct_size := 65536)
import struct
assert libc.sigaltstack(struct.pack("QiiQ", C.addressof(stack), 0, 0, 65536), None) == 0
signal.setitimer(signal.ITIMER_VIRTUAL, 1e6, 3)
signal.signal(signal.SIGVTALRM, lambda *_: None)
"""

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            process = await prepared(box, loop + strange)
            find = "open(f'/proc/{spinner}/syscall').read().split()[0], open(f'/proc/{spinner}/comm').read()"
            found = await copied(box, process, [find, "round(signal.getitimer(1)[0], -3)"])
            assert found == ["('running', 'python3\\n')", "1000000.0"]
            assert await ask(process, "os.kill(spinner, 9), os.waitpid(spinner, 0)[1]") == "(None, 9)"
            await until_no_process(box)

    run(main())


async def until_no_process(box: Box) -> None:
    """The host has no process of a sandbox but those of the original."""
    assert len(template(box.runtime)) == 1


@copying
def test_many_mappings_and_high_descriptors(tmp_path: Path) -> None:
    code = r"""
import mmap, os, resource
parts = []
def split(count):
    while len(parts) < count:
        parts.append(mmap.mmap(-1, 8192, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 3 if len(parts) % 2 else 1))
split(9000)
for one in parts[1::2]: one[:4] = b"mine"
top = resource.getrlimit(7)[1]; resource.setrlimit(7, (top, top))
high = os.open("/work/high", os.O_RDWR | os.O_CREAT | os.O_APPEND); os.dup2(high, top - 200, True); os.dup2(0, top // 2)
"""

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            process = await prepared(box, code)
            found = await copied(box, process, ["sum(one[:4] == b'mine' for one in parts)", "os.write(top - 200, b'x')",
                                                "os.fstat(top - 200).st_size", "resource.getrlimit(7)[0] == top",
                                                "os.fstat(0) == os.fstat(top // 2)"])  # fmt: skip
            assert found == ["4500", "1", "1", "True", "True"]
            await ask(process, "!split(40000)")
            assert "has more than 30000 mappings" in await refusals(box)

    run(main(), 100)


@copying
def test_a_process_that_unmaps_what_the_copy_needs(tmp_path: Path) -> None:
    code = r"""
import ctypes as C
def drop(name):
    if os.fork(): return
    for line in open("/proc/self/maps"):
        if name in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            C.CDLL(None).munmap(C.c_void_p(start), C.c_size_t(end - start))
    C.CDLL(None).pause()
"""

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            process = await prepared(box, code)
            for name in ("[vdso]", "[vvar", "[stack]"):
                await ask(process, f"!drop({name!r})")
                reasons = await refusals(box)
                assert reasons if name == "[vdso]" else True
                await box.sh("pkill -9 -P 2; true")
            assert await ask(process, "1 + 1") == "2"

    run(main())


@copying
def test_a_guest_that_changes_while_it_is_looked_at(tmp_path: Path) -> None:
    """Processes that start, end, open, close, map and unmap all the time: each attempt gives a copy or a refusal."""
    code = r"""
import os, mmap, random
if not os.fork():
    while True:
        if not os.fork():
            m = [mmap.mmap(-1, 4096 * random.randrange(1, 50), mmap.MAP_PRIVATE) for _ in range(20)]
            f = [os.open("/work/churn", os.O_RDWR | os.O_CREAT | os.O_APPEND) for _ in range(20)]
            os.mkdir("/work/t") if random.random() < 0.5 and not os.path.exists("/work/t") else None
            os._exit(0)
        os.wait()
"""

    async def main() -> None:
        from rock import errors

        async with forking(tmp_path) as (runtime, box):
            process = await prepared(box, code)
            made = 0
            for number in range(6):
                name = f"{number:032x}"
                try:
                    await runtime.checkpoint(box.handle, name, "auto", processes=True)
                except errors.Unsupported:
                    continue
                one = await child(runtime, f"child{number}", name)
                copy = await attached(one, "process:python")
                assert await ask(copy, "len(objects)") == "20000"
                made += 1
                await end(one)
            assert await ask(process, "len(objects)") == "20000" and made

    run(main(), 50)


def test_lines_of_maps_are_parsed_as_the_kernel_writes_them() -> None:
    line = "7f00-8000 rw-s 0000a000 00:2f 123     /work/a\\012b\\134c d (deleted)\n"
    assert address_space.parse(line) == (0x7F00, 0x8000, 3, True, 0xA000, 123, "/work/a\nb\\c d (deleted)")
    assert address_space.parse("1000-2000 ---p 00000000 00:00 0\n").name == ""
    for wrong in ("", "x", "1-2 rw-p", "zz-1 rw-p 0 0 0"):
        with pytest.raises((ValueError, IndexError)):
            address_space.parse(wrong)


def test_a_free_range_touches_no_other() -> None:
    taken = [(1 << 44, (1 << 44) + 4096), ((1 << 44) + (1 << 20), 1 << 45), (0, 1 << 40)]
    found = address_space.free_range(1 << 20, taken)
    assert all(found + (1 << 20) <= start or end <= found for start, end in taken) and found % 4096 == 0
    with pytest.raises(address_space.TooMany):
        address_space.free_range(1 << 20, [(0, address_space.HIGHEST - 4096)])


def test_ranges_within_a_mapping() -> None:
    one = address_space.Mapping(0x3000, 0x6000, 3, False, 0, 0, "")
    pages = [(0x1000, 0x2000), (0x2000, 0x4000), (0x5000, 0x9000), (0xA000, 0xB000)]
    assert address_space.within(pages, one) == [(0x3000, 0x4000), (0x5000, 0x6000)]
    assert address_space.within([], one) == [] and address_space.within([(0x7000, 0x8000)], one) == []
    assert os.getpid() and asyncio.iscoroutinefunction(copied)


# ---- memory that is prepared before the processes stop ----


@pytest.mark.parametrize(
    ("ranges", "others", "left"),
    [
        ([(0, 4)], [], [(0, 4)]),
        ([(0, 4)], [(0, 4)], []),
        ([(0, 9)], [(2, 3), (5, 7)], [(0, 2), (3, 5), (7, 9)]),
        ([(0, 2), (4, 6), (8, 9)], [(1, 5)], [(0, 1), (5, 6), (8, 9)]),
        ([(2, 4)], [(0, 1), (3, 8)], [(2, 3)]),
    ],
)
def test_a_difference_of_ranges(ranges: list[Range], others: list[Range], left: list[Range]) -> None:
    assert address_space.without(ranges, others) == left


def resident(memory: capture.Reserved) -> int:
    """Bytes of memory that this process has there."""
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start < memory.address + memory.size and memory.address < end
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


WRITES = """import ctypes, mmap, sys
area = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
libc = ctypes.CDLL(None)
where = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area)))
def write(step, count):
    for place in range(0, count * step, step): area[place] = 1
write(2 << 20, 32)
for line in sys.stdin.buffer:
    print(exec(line), flush=True)
"""


@copying
def test_scattered_pages_do_not_take_whole_huge_pages() -> None:
    with subprocess.Popen(["python3", "-c", WRITES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None and guest.stdout is not None
        guest.stdin.write(b"pass\n")
        guest.stdin.flush()
        guest.stdout.readline()
        made = capture.Prepared([guest.pid], 1 << 30, 1, 0)
        assert made.memory is not None
        assert resident(made.memory) < 40 << 20  # 32 of its pages are 2 MiB apart
        made.close()
        made.close()
        guest.stdin.close()


@copying
def test_prepared_memory_fits_what_the_process_has_when_it_stops() -> None:
    with subprocess.Popen(["python3", "-c", WRITES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None and guest.stdout is not None

        def do(code: bytes) -> None:
            assert guest.stdin is not None and guest.stdout is not None
            guest.stdin.write(code + b"\n")
            guest.stdin.flush()
            guest.stdout.readline()

        def now(prepared: capture.Prepared | None) -> capture.Pages:
            return capture.Pages({guest.pid: address_space.mappings(guest.pid)}, 1 << 30, prepared)

        do(b"write(4096, 16384)")
        same = capture.Prepared([guest.pid], 1 << 30, 1, 0)
        memory = same.memory
        pages = now(same)
        assert pages.memory is memory and same.memory is None
        assert pages.bytes >= 64 << 20
        pages.close()

        less = capture.Prepared([guest.pid], 1 << 30, 1, 0)
        do(b"libc.madvise(where, 32 << 20, 4)")
        pages = now(less)
        assert pages.bytes - (1 << 20) < resident(pages.memory) < pages.bytes + (1 << 20)  # the rest is released
        pages.close()
        less.close()

        more = capture.Prepared([guest.pid], 1 << 30, 1, 0)
        do(b"other = mmap.mmap(-1, 128 << 20, 34); other[0] = 1")
        pages = now(more)
        assert more.memory is not None and pages.memory is not more.memory  # too small
        pages.close()
        more.close()
        guest.stdin.close()
