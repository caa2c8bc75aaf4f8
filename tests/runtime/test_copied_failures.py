"""Copies in cases that fail easily: signal stacks, robust locks, vfork, installs in progress, full disks."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import resource
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import process_tree
from rock.images.records import Bind
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Process
from tests.runtime.boxes import Box, HandMade, put, run, until_line
from tests.runtime.test_copied_processes import TAIL, A, B, ask, attached, child, end, program
from tests.runtime.test_frozen_files import LIVE, forking, say
from tests.runtime.test_refused_processes import gone, refusals

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")
compiled = pytest.mark.skipif(shutil.which("gcc", path="/usr/bin") is None, reason="there is no gcc: apt install gcc")
COUNT = pytest.mark.parametrize("count", [3, pytest.param(64, marks=pytest.mark.long)])

NATIVE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void ready(void) { puts("ready"); fflush(stdout); }
static void wait_line(void) { char c; while (read(0, &c, 1) == 1 && c != '\n'); }
static char area[1 << 17];
static void on_stack(int number) {
    volatile long local = 4711;
    ready(); wait_line();
    int inside = (char *) &local >= area && (char *) &local < area + sizeof area;
    printf("%d %d %ld\n", number, inside, local); fflush(stdout);
}
static int stack(void) {
    stack_t own = {.ss_sp = area, .ss_size = sizeof area};
    struct sigaction action = {.sa_handler = on_stack, .sa_flags = SA_ONSTACK};
    sigaltstack(&own, 0); sigaction(SIGUSR1, &action, 0); raise(SIGUSR1);
    puts("returned"); fflush(stdout); wait_line(); return 0;
}
static pthread_mutex_t mutex; static volatile int leave;
static void *holder(void *unused) { pthread_mutex_lock(&mutex); ready(); while (!leave) usleep(1000); return unused; }
static int robust(void) {
    pthread_mutexattr_t kind; pthread_t thread;
    pthread_mutexattr_init(&kind); pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&mutex, &kind); pthread_create(&thread, 0, holder, 0);
    wait_line();
    int busy = pthread_mutex_trylock(&mutex) == EBUSY; leave = 1;
    printf("%d %d\n", busy, pthread_mutex_lock(&mutex) == EOWNERDEAD); fflush(stdout); wait_line(); return 0;
}
static int wide(void) {
#ifdef __AVX512F__
    unsigned char in[64], out[64] = {0}; volatile int go = 0; pthread_t thread;
    void *later(void *flag) { wait_line(); *(volatile int *) flag = 1; return 0; }
    for (int i = 0; i < 64; i++) in[i] = i + 1;
    pthread_create(&thread, 0, later, (void *) &go); ready();
    __asm__ volatile("vmovdqu64 (%0), %%zmm17\n kxnorw %%k1, %%k1, %%k1\n 1: cmpl $0, (%2)\n je 1b\n"
                     "vmovdqu64 %%zmm17, (%1)" :: "r"(in), "r"(out), "r"(&go) : "memory", "xmm17", "k1");
    printf("%d\n", memcmp(in, out, 64)); fflush(stdout); wait_line();
#endif
    return 0;
}
static int vforked(void) { if (!vfork()) { ready(); for (;;) pause(); } return 0; }
static int many(int count) {
    for (int i = 0; i < count; i++) if (!fork()) for (;;) pause();
    ready(); wait_line(); return 0;
}
int main(int argc, char **argv) {
    (void) argc;
    switch (argv[1][0]) {
        case 's': return stack(); case 'r': return robust(); case 'w': return wide(); case 'v': return vforked();
        default: return many(atoi(argv[2]));
    }
}
"""
STATES = {  # Python programs: their state, and what a copy prints at the end
    "closed stdin": ("os.close(0)", "not os.path.lexists('/proc/self/fd/0')"),
    "path only": ("open('/work/p', 'w').write('x'); f = os.open('/work', os.O_PATH)",
                  "os.stat('p', dir_fd=f).st_size == 1"),
    "appended": ("f = open('/work/appended', 'ab', 0); f.write(b'1')", "f.write(b'2') and f.tell() == 2"),
    "pipe closed": ("a, b = os.pipe(); os.write(b, b'rest'); os.close(b)", "os.read(a, 9) + os.read(a, 9) == b'rest'"),
}
FRAME = ("import os, sys, time\n%s\nprint('ready', flush=True)\n"
         "while not os.path.exists('/work/go'): time.sleep(0.01)\nprint(%s, flush=True)\n")  # fmt: skip


async def line(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return (await until_line(process.stdout)).decode().strip()


async def native(box: Box) -> None:
    """Compile the program in the sandbox."""
    await put(box, "/work/native.c", NATIVE.encode())
    wide = "-mavx512f" if "avx512f" in Path("/proc/cpuinfo").read_text().split() else ""
    await box.sh(f"TMPDIR=/work gcc -O1 -w {wide} -pthread -o /work/native /work/native.c")


@compiled
def test_signal_stacks_robust_locks_and_wide_registers(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await native(box)
            expected = {"stack": ["10 1 4711", "returned"], "robust": ["1 1"]}
            if "avx512f" in Path("/proc/cpuinfo").read_text().split():
                expected["wide"] = ["0"]
            originals = {}
            for name in expected:
                originals[name] = await box.spawn("/work/native", name, stdin="pipe", key=f"process:{name}", keep=True)
                assert await line(originals[name]) == "ready"
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            for name, answers in expected.items():
                copy = await attached(one, f"process:{name}")
                for process in (copy, originals[name]):
                    assert await ask(process, "") == answers[0], name
                    assert [await line(process) for _ in answers[1:]] == answers[1:]
            await end(one)

    run(main())


@compiled
def test_a_vfork_in_flight_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            await native(box)
            one = await box.spawn("/work/native", "v", stdin="pipe", key="process:vfork", keep=True)
            assert await line(one) == "ready"
            found = await refusals(box)
            assert ("memory" in found and "shares" in found) or "does not stop" in found, found
            await gone(one)

    run(main())


def test_descriptors_of_unusual_kinds(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            for name, (state, question) in STATES.items():
                one = await box.spawn("python3", "-c", FRAME % (state, question), stdin="pipe", key=f"process:{name}",
                                      keep=True)  # fmt: skip
                assert await line(one) == "ready"
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            await one.sh("touch /work/go")
            for name in STATES:
                assert await line(await attached(one, f"process:{name}")) == "True", name
            await end(one)

    run(main())


def test_a_mapped_file_that_was_replaced_is_refused(tmp_path: Path) -> None:
    code = ("import mmap, os; f = open('/work/m', 'wb+'); f.write(bytes(4096)); f.flush()\n"
            "m = mmap.mmap(f.fileno(), 4096, access=mmap.ACCESS_READ); f.close()\n"
            "open('/work/n', 'wb').write(bytes(4096)); os.replace('/work/n', '/work/m')")

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            one = await box.spawn("python3", "-c", FRAME % (code, "m[0]"), stdin="pipe", key="process:m", keep=True)
            assert await line(one) == "ready"
            assert "deleted" in await refusals(box)
            await gone(one)

    run(main())


def test_an_install_and_a_test_run_in_progress_end_in_each_copy(tmp_path: Path) -> None:
    """`pip install` of 400 files, and a run of unittest whose tests start processes."""
    wheel = tmp_path / "many-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        names = [f"many/part{number}.py" for number in range(400)]
        for name in names:
            file.writestr(name, f"value = {name!r}\n")
        file.writestr("many-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: many\nVersion: 1.0\n")
        file.writestr("many-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        rows = [*names, "many-1.0.dist-info/METADATA", "many-1.0.dist-info/WHEEL", "many-1.0.dist-info/RECORD"]
        file.writestr("many-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in rows))
    tests = ("import subprocess, unittest\nclass T(unittest.TestCase): pass\n"
             "def case(n):\n def test(self): self.assertEqual(subprocess.run(['sh', '-c', f'sleep 0.02; echo {n}'], "
             "capture_output=True).stdout, b'%d\\n' % n)\n return test\n"
             "for n in range(40): setattr(T, f'test_{n}', case(n))\n")  # fmt: skip

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await put(box, f"/work/{wheel.name}", wheel.read_bytes())
            await put(box, "/work/test_all.py", tests.encode())
            pip = f"python3 -m pip install -q --no-index --no-cache-dir --target /work/t /work/{wheel.name}"
            scripts = {
                "install": f"{pip} 2>&1 | grep -v WARN; find /work/t -name 'part*.py' | wc -l",
                "tests": "python3 -m unittest -q test_all > out 2>&1; tail -1 out",
            }
            running = {name: await box.spawn("bash", "-c", script, stdin="null", key=f"process:{name}", keep=True)
                       for name, script in scripts.items()}  # fmt: skip
            boxes = []
            for number in range(3):
                await asyncio.sleep(0.25)
                with contextlib.suppress(errors.Unsupported):  # a process was just ending, in all attempts
                    await runtime.checkpoint(box.handle, f"{number:032x}", "auto", processes=True)
                    boxes.append(await child(runtime, f"child{number}", f"{number:032x}"))
            assert boxes
            expected = {"install": "400", "tests": "OK"}
            for name, process in running.items():
                assert await line(process) == expected[name]
            for one in boxes:
                for name in await one.runtime.processes(one.handle):
                    assert await line(await attached(one, name)) == expected[name.removeprefix("process:")], name
                await end(one)

    run(main(), 100)


@compiled
def test_a_thousand_processes(tmp_path: Path) -> None:
    """Files are taken of any number of processes; copies of them are refused. None of them ends."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await native(box)
            big = SandboxConfig(image="hand", memory="1g", cpus=1, pids=1200)
            await runtime.checkpoint(box.handle, A, "auto")
            one = await child_of(box, big)
            process = await one.spawn("/work/native", "many", "1000", stdin="pipe", key="process:many", keep=True)
            assert await line(process) == "ready"
            assert re.search("more than 64|too many open files|does not stop|faster than", await refusals(one))
            taken = await runtime.checkpoint(one.handle, B, "auto")
            assert taken.paused_ms < 5000 and taken.files in ("switch", "copy")
            tree = process_tree.scan()
            assert len([each for each in process_tree.descendants(tree, one.handle.data["pid"]) if each.alive]) == 1001
            await gone(process)
            await end(one)

    run(main())


async def child_of(box: Box, config: SandboxConfig) -> Box:
    handle = await box.runtime.create("big", config.model_copy(update={"snapshot": A}))
    return Box(box.runtime, handle, Path("/work"))


def test_children_outlive_their_original(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            handle = await runtime.create("source", SandboxConfig(image="hand", memory="256m", cpus=1, pids=128))
            source = Box(runtime, handle, Path("/work"))
            python = await program(source)
            await runtime.checkpoint(source.handle, A, "auto", processes=True)
            expected = await ask(python, TAIL)
            first = await child(runtime, "first")
            await end(source)
            second = await child(runtime, "second")
            for one in (first, second):
                assert await ask(await attached(one, "process:python"), TAIL) == expected
                await end(one)
            assert await box.sh("echo lives") == "lives\n"

    run(main())


def test_the_end_of_pid_1_while_processes_are_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            config = SandboxConfig(image="hand", memory="256m", cpus=1, pids=128)
            for number in range(5):
                source = Box(runtime, await runtime.create(f"source{number}", config), Path("/work"))
                await program(source, 8)
                name = f"{number:032x}"
                taking = asyncio.create_task(runtime.checkpoint(source.handle, name, "auto", processes=True))
                await asyncio.sleep(0.004 * number)
                os.kill(source.handle.data["pid"], 9)
                result = (await asyncio.gather(taking, return_exceptions=True))[0]
                assert not isinstance(result, BaseException) or isinstance(result, errors.RockError), result
                await end(source)
                await runtime.drop_snapshot(name)
            assert await box.sh("echo lives") == "lives\n"
            assert (await runtime.checkpoint(box.handle, A, "auto", processes=True)).copied == []

    run(main())


def test_memory_that_cannot_be_stored_is_an_error(tmp_path: Path) -> None:
    """The files are switched by then, so the sandbox continues on them, and no snapshot exists."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            python = await program(box, 4)
            await box.sh("echo kept0 > file")
            launcher = runtime._slots.launcher.pid
            assert launcher is not None
            for number, limit in enumerate((0, 1, 4096, 1 << 20)):  # bytes; the state, and the pages, have more
                before = resource.prlimit(launcher, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    with pytest.raises(errors.Unsupported if limit == 0 else errors.StorageFull):
                        await runtime.checkpoint(box.handle, f"{number:032x}", "auto", processes=True)
                finally:
                    resource.prlimit(launcher, resource.RLIMIT_FSIZE, before)
                assert not runtime.snapshots() and await box.sh("cat file") == f"kept{number}\n"
                if limit:
                    with pytest.raises(errors.Unavailable, match="an earlier attempt"):  # its layer is in use
                        await runtime.checkpoint(box.handle, f"{number:032x}", "auto", processes=True)
                await box.sh(f"rm file; echo kept{number + 1} > file")
            taken = await runtime.checkpoint(box.handle, A, "auto", processes=True)
            assert taken.copied == ["process:python"]
            expected = await ask(python, TAIL)
            one = await child(runtime)
            assert await ask(await attached(one, "process:python"), TAIL) == expected
            await end(one)

    run(main())


@pytest.mark.skipif(shutil.which("git", path="/usr/bin") is None, reason="there is no git: apt install git")
@pytest.mark.timeout(400)
@COUNT
def test_children_of_a_repository_run_its_tests(tmp_path: Path, count: int) -> None:
    """The same continuation in parent and children: equal output and equal files."""
    tail = ("python3 -m unittest -q test_one 2>&1 | tail -1; echo $((RANDOM + n)) > made; git status --short; "
            "git log --format=%s; find . -type f ! -path '*/__pycache__/*' | sort | xargs md5sum | md5sum")

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            shell = await box.spawn("bash", "--norc", stdin="pipe", stderr="stdout", key="session:one", keep=True,
                                    cwd="/work")  # fmt: skip
            await say(shell, "mkdir repo; cd repo; git init -q . 2>&1; git config user.email a@b; "
                             "git config user.name a; "
                             "printf 'import unittest\\nclass T(unittest.TestCase):\\n def test(self): pass\\n' > "
                             "test_one.py; git add . ; git commit -qm first; n=5; RANDOM=7")  # fmt: skip
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await say(shell, tail)
            assert "OK" in expected and "first" in expected, expected
            for number in range(count):
                one = await child(runtime, f"child{number}")
                assert await say(await attached(one, "session:one"), tail) == expected
                await end(one)

    run(main(), 390)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="numpy is not installed")
@COUNT
def test_arrays_of_numpy_continue(tmp_path: Path, count: int) -> None:
    """100 MB of numpy state, with the random generator and the threads of its linear algebra."""
    spec = importlib.util.find_spec("numpy")
    assert spec is not None and spec.origin is not None
    packages = Path(spec.origin).parents[1]
    start = ("!import sys; sys.path.append('/packages'); import numpy; state = numpy.random.default_rng(5); "
             "data = state.random((3600, 3600)); globals().update(locals())")
    tail = "float(data.sum()), float((data[:300] @ data[:, :300]).sum()), state.random(3).tolist(), data.nbytes >> 20"

    async def main() -> None:
        images = HandMade(tmp_path / "image")
        (images.layer / "packages").mkdir()
        images.binds = (*images.binds, Bind(str(packages), "/packages"))
        async with forking(tmp_path, images) as (runtime, box):
            version = (await box.sh("python3 -c 'import sys; print(*sys.version_info[:2])'")).split()
            if version != [str(part) for part in sys.version_info[:2]]:
                pytest.skip("numpy is of another version of Python")
            python = await program(box)
            await ask(python, start)
            await ask(python, "(data[:300] @ data[:, :300]).sum()")
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await ask(python, tail)
            assert expected.endswith("98)"), expected
            for number in range(count):
                one = await child(runtime, f"child{number}")
                assert await ask(await attached(one, "process:python"), tail) == expected
                await end(one)

    run(main(), 290)
