"""Copies at awkward moments: in the middle of writes, sleeps, waits, and computations with vector registers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.runtime.boxes import put, run, until_line
from tests.runtime.test_copied_processes import A, ask, attached, child, end, program, template
from tests.runtime.test_frozen_files import LIVE, forking, say
from tests.runtime.test_refused_processes import gone

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")

WRITER = r"""
import os
log = os.open("/work/numbers", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
plain = open("/work/plain", "w")
number = 0
while not os.path.exists("/work/stop"):
    number += 1
    os.write(log, b"%d\n" % number); plain.write(f"{number}\n"); plain.flush()
print("wrote", number, flush=True)
"""
VECTOR = r"""
import ctypes as C, mmap, sys, threading
code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
# load ymm0 from rdi; spin until [rsi]; store ymm0 to rdx
code.write(bytes.fromhex("c5fe6f07 833e00 74fb c5fe7f02 c5f877 c3"))
pattern, flag, found = C.create_string_buffer(bytes(range(1, 33)), 32), C.c_int(0), C.create_string_buffer(32)
function = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_void_p)(C.addressof(C.c_char.from_buffer(code)))
spin = threading.Thread(target=function, args=(C.addressof(pattern), C.addressof(flag), C.addressof(found)))
spin.start(); print("spins", flush=True)
sys.stdin.readline(); C.memset(C.addressof(pattern), 0, 32); flag.value = 1; spin.join()
print(found.raw == bytes(range(1, 33)), flush=True)
"""


def test_a_program_that_writes_files_continues_without_a_gap(tmp_path: Path) -> None:
    """The file of each child has all that was written before the copy, and what the child writes follows it."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await put(box, "/work/writer.py", WRITER.encode())
            writer = await box.spawn("python3", "/work/writer.py", key="process:writer", keep=True)
            await box.sh("until [ $(wc -l < /work/plain) -gt 100 ]; do sleep 0.01; done")
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            boxes = [await child(runtime, f"child{number}") for number in range(3)]
            writers = [(box, writer)]
            for one in boxes:
                writers.append((one, await attached(one, "process:writer")))
            for one, process in writers:
                assert process.stdout is not None
                await one.sh("touch /work/stop")
                async with asyncio.timeout(20):
                    count = int((await until_line(process.stdout)).split()[1])
                expected = "".join(f"{number}\n" for number in range(1, count + 1))
                assert await one.sh("cat /work/numbers") == expected == await one.sh("cat /work/plain")
            for one in boxes:
                await end(one)

    run(main())


def test_waiting_calls_are_made_again(tmp_path: Path) -> None:
    """A sleep, a wait for a child, a read, and a wait with a timeout return as if nothing had happened."""
    waits = {
        "sleep": "sleep 1.5; echo slept $?",
        "wait": "sleep 1.5 & wait $!; echo waited $?",
        "timeout": "python3 -c 'import select; print(select.select([0], [], [], 1.5))' 0< <(sleep 1000); echo selected",
        "nanosleep": "python3 -c 'import ctypes, struct; "
                     "print(ctypes.CDLL(None).nanosleep(struct.pack(\"qq\", 1, 500000000), None))'",
    }  # fmt: skip

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            for name, script in waits.items():
                await box.spawn("bash", "-c", script, key=f"process:{name}", keep=True, stderr="stdout")
            await asyncio.sleep(0.5)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            outputs = {}
            for name in waits:
                copy = await attached(one, f"process:{name}")
                assert copy.stdout is not None
                async with asyncio.timeout(20):
                    outputs[name] = (await until_line(copy.stdout)).decode()
            assert outputs == {"sleep": "slept 0\n", "wait": "waited 0\n", "timeout": "([], [], [])\n",
                               "nanosleep": "0\n"}  # fmt: skip
            await end(one)

    run(main())


@pytest.mark.skipif("avx" not in Path("/proc/cpuinfo").read_text().split(), reason="the processor has no AVX")
def test_vector_registers_continue(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            spins = await box.spawn("python3", "-c", VECTOR, stdin="pipe", key="process:vector", keep=True)
            assert spins.stdout is not None and await until_line(spins.stdout) == b"spins\n"
            await asyncio.sleep(0.1)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            assert await ask(await attached(one, "process:vector"), "") == "True"
            assert await ask(spins, "") == "True"
            await end(one)

    run(main())


def test_sandboxes_of_copies_end_in_any_order(tmp_path: Path) -> None:
    """A pid namespace ends when all of its processes are reaped: copies must not wait for their template."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await program(box)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            boxes = [await child(runtime, f"child{number}") for number in range(4)]
            os.kill(boxes[0].handle.data["pid"], 9)  # its pid 1
            assert await runtime.wait(boxes[0].handle) == "exited"
            [holder] = template(runtime)
            os.kill(holder, 19)  # stopped
            try:
                async with asyncio.timeout(10):
                    await end(boxes[1])
            finally:
                os.kill(holder, 18)
            os.kill(holder, 9)
            await end(boxes[2])
            await end(boxes[0])
            copy = await attached(boxes[3], "process:python")
            assert await ask(copy, "len(objects)") == "20000"
            await end(boxes[3])

    run(main())


def test_a_program_that_is_starting_is_waited_for(tmp_path: Path) -> None:
    """pid 1 has no streams of it yet: its copy would have none."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            for number in range(4):
                key = f"session:{number}"
                starting = asyncio.create_task(box.spawn("bash", "--norc", stdin="pipe", stderr="stdout", key=key,
                                                         keep=True))  # fmt: skip
                await asyncio.sleep(0)
                taken = await runtime.checkpoint(box.handle, f"{number:032x}", "auto", processes=True)
                shell = await starting
                if key in (taken.copied or ()):
                    one = await child(runtime, f"child{number}", f"{number:032x}")
                    assert await say(await attached(one, key), "echo $BASHPID") == str(shell.pid)
                    await end(one)
                await gone(shell)

    run(main())
