"""Copies of running processes: trees with pipes, memory, registers and files continue in each child; the parent too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import process_tree
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Process
from rock.runtime.namespace.processes import state
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, put, run, until, until_line
from tests.runtime.test_frozen_files import LIVE, forking, say

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")
CONFIG = SandboxConfig(image="hand", memory="512m", cpus=1, pids=256)
A, B = "a" * 32, "b" * 32
PYTHON = r"""
import os, random, signal, sys
random.seed(7)
state = bytearray(int(sys.argv[1]) << 20)
for place in range(0, len(state), 4096): state[place] = place >> 12 & 255
objects = [{"number": number, "text": str(number)} for number in range(20000)]
log = open("/work/log", "a", buffering=1)
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append("usr1"))
for line in sys.stdin:
    try: print(repr(eval(line)) if not line.startswith("!") else exec(line[1:]), flush=True)
    except Exception as error: print(repr(error), flush=True)
"""
TAIL = "[random.random() for _ in range(3)], sum(state), objects[77], os.getpid(), os.getcwd(), hash('x'), seen"


async def ask(process: Process, line: str) -> str:
    """The answer of the Python program."""
    assert process.stdin is not None and process.stdout is not None
    os.write(process.stdin, line.encode() + b"\n")
    async with asyncio.timeout(20):
        return (await until_line(process.stdout)).decode().strip()


async def program(box: Box, megabytes: int = 1) -> Process:
    """The Python program, once it has its state."""
    await put(box, "/work/program.py", PYTHON.encode())
    made = await box.spawn("python3", "-u", "/work/program.py", str(megabytes), stdin="pipe", cwd="/work",
                           key="process:python", keep=True)
    assert await ask(made, "len(objects)") == "20000"
    return made


async def bash(box: Box, script: str = ":", key: str = "session:one") -> Process:
    made = await box.spawn("bash", "--norc", stdin="pipe", stderr="stdout", key=key, keep=True, cwd="/work")
    await say(made, script)
    return made


async def child(runtime: NamespaceRuntime, name: str = "child", snapshot: str = A) -> Box:
    handle = await runtime.create(name, CONFIG.model_copy(update={"snapshot": snapshot}))
    return Box(runtime, handle, Path("/work"))


async def attached(box: Box, key: str) -> Process:
    found: Process = await box.runtime.attach(box.handle, key)
    box.started.append(found)
    return found


async def end(box: Box) -> None:
    box.close()
    await box.runtime.destroy(box.handle)


def template(runtime: NamespaceRuntime) -> list[int]:
    """The templates of a runtime."""
    found = []
    launcher = runtime._slots.launcher.pid
    for entry in process_tree.scan().values():
        with contextlib.suppress(OSError):
            if entry.parent == launcher and Path(f"/proc/{entry.pid}/comm").read_text() == "rock-template\n":
                found.append(entry.pid)
    return found


@pytest.mark.timeout(120)
def test_a_python_program_continues_in_several_children(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            python = await program(box, 100)
            await ask(python, "!log.write('before\\n')")
            taken = await runtime.checkpoint(box.handle, A, "auto", processes=True)
            assert (taken.files, list(taken.copied or ())) == ("switch", ["process:python"])
            assert taken.paused_ms < 5000
            expected = await ask(python, TAIL)
            await ask(python, "!state[0] = 99; log.write('parent\\n')")
            children = [await child(runtime, f"child{number}") for number in range(4)]
            for number, one in enumerate(children):
                copy = await attached(one, "process:python")
                assert await ask(copy, TAIL) == expected
                assert await ask(copy, f"!state[0] = {number}; log.write('child {number}\\n')") == "None"
            for number, one in enumerate(children):
                copy = await attached(one, "process:python")
                assert await ask(copy, "state[0], log.tell() > 7") == f"({number}, True)"
                assert await one.sh("cat /work/log") == f"before\nchild {number}\n"
                await copy.signal(signal.SIGUSR1)
                assert await ask(copy, "seen") == "['usr1']"
                assert await _private(one) < 40 << 20, "memory is shared with the template"
            assert await ask(python, "state[0], seen") == "(99, [])"
            assert await box.sh("cat /work/log") == "before\nparent\n"
            held = Path(f"/proc/{template(runtime)[0]}/status").read_text().partition("VmRSS:")[2].split()[0]
            assert int(held) > 90_000, "kB"
            for one in children:
                await end(one)

    run(main(), 110)


async def _private(box: Box) -> int:
    """Bytes of memory that the copied program has for itself."""
    outside = next(entry.pid for entry in process_tree.descendants(process_tree.scan(), box.handle.data["pid"]))
    text = Path(f"/proc/{outside}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private")) << 10


def test_a_shell_with_jobs_pipes_and_open_files(tmp_path: Path) -> None:
    script = r"""
        x=5; f() { echo "f $1"; }; declare -A map=([k]="v 1"); alias ll='echo aliased'; shopt -s expand_aliases
        umask 027; ulimit -Sn 300; cd /tmp; echo one > log; trap 'echo usr' USR1; set -o noclobber; exec 8>>log
        (trap 'echo job > jobbed' USR1; while :; do sleep 0.02; done) & job=$!
        mkdir sub; (cd sub; exec sleep 1000) & sleeper=$!
        exec 9> >(while read text; do echo "got $text"; done >> piped); reader=$!
        exec 7</etc/passwd 150<>both; read -u 7 line; printf 1234 >&150
    """
    show = r"""
        echo "$x ${map[k]} $PWD $(umask) $(ulimit -Sn) $$ $BASHPID"; f 2; ll; read -u 7 line; echo "$line"
        printf 56 >&150; cat both; echo; echo two >&8; cat log; kill -USR1 $$; jobs -p | wc -l
        readlink /proc/$sleeper/cwd; ls /proc/$$/fd > fds; echo $(<fds); echo "$job $sleeper $reader"; echo hi >&9
        until [ -s piped ]; do sleep 0.01; done; cat piped; kill -USR1 $job
        until [ -s jobbed ]; do sleep 0.01; done; cat jobbed; kill $job $sleeper
        wait $job; echo "ended $?"; set -o | grep noclobber; stat -c '%a %u' log; tr '\0' ' ' </proc/$$/cmdline
        cat /proc/$$/comm; trap -p; grep -E 'SigIgn|Cap|Seccomp|NoNew|Uid' /proc/$$/status
    """

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            shell = await bash(box, script)
            assert await runtime.refusals(box.handle) == []
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            children = [await child(runtime, f"child{number}") for number in range(3)]
            found = [await say(await attached(one, "session:one"), show) for one in children]
            expected = await say(shell, show)
            assert "5 v 1 /tmp 0027 300" in expected and "f 2\naliased\nbroken line\n123456\none\ntwo\nusr" in expected
            assert "got hi" in expected and "ended 143" in expected and "job" in expected, expected
            assert found == [expected] * 3
            for one in children:
                assert await _is_as_a_program(one)
                await end(one)

    run(main(), 50)


async def _is_as_a_program(box: Box) -> bool:
    """Whether copies are confined as a program that was started in the same sandbox is."""
    sleeper = await box.spawn("sleep", "1000")
    pids = [entry.pid for entry in process_tree.descendants(process_tree.scan(), box.handle.data["pid"])]
    of: list[tuple[object, ...]] = []
    for pid in pids:
        inside = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1]
        kinds = ("mnt", "pid", "ipc", "uts", "user", "net", "cgroup")
        names = tuple(os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds)
        keys = ["Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
                "Seccomp_filters"]  # fmt: skip
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        groups = sorted(Path(f"/proc/{pid}/cgroup").read_text().splitlines())
        score = Path(f"/proc/{pid}/oom_score_adj").read_text()
        assert Path(f"/proc/{pid}/root").readlink() == Path("/")
        of.append((names, tuple(lines[key].strip() for key in keys), tuple(groups), score, int(inside) == sleeper.pid))
    plain = next(one for one in of if one[-1])
    await sleeper.kill_tree()
    return all(one[:-1] == plain[:-1] for one in of)


def test_programs_of_another_user_and_with_fewer_rights(tmp_path: Path) -> None:
    script = ("import os, sys\nos.setgroups([50]); os.setgid(1000); os.setuid(1000); os.umask(0o77)\n"
              "os.nice(5)\n"
              "for line in sys.stdin: print(os.getresuid(), os.getresgid(), os.getgroups(), os.nice(0), flush=True)\n")

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            dropped = await box.spawn("python3", "-c", script, stdin="pipe", key="process:dropped", keep=True)
            alice = await box.spawn("bash", "--norc", stdin="pipe", stderr="stdout", user="alice", key="session:alice",
                                    keep=True)  # fmt: skip
            await say(alice, "cd /tmp; echo hers > file; exec 5<>file")
            expected = await ask(dropped, "x")
            who = await say(alice, "id; cat /proc/$$/status | grep Cap; cat <&5; echo more >&5; stat -c %U file")
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            assert await ask(await attached(one, "process:dropped"), "x") == expected
            again = "id; cat /proc/$$/status | grep Cap; cat file; stat -c %U file"
            shell = await attached(one, "session:alice")
            assert await say(shell, again) == who.replace("hers", "hers\nmore")
            await end(one)

    run(main())


def test_unread_input_and_the_end_of_streams(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            slow = await box.spawn("bash", "-c", "while [ ! -e /work/go ]; do sleep 0.02; done; cat; echo end; exit 7",
                                   stdin="pipe", key="process:slow", keep=True)
            assert slow.stdin is not None
            os.write(slow.stdin, b"unread input\n")
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            copy = await attached(one, "process:slow")
            await one.sh("touch /work/go")
            assert copy.stdin is not None and copy.stdout is not None
            os.write(copy.stdin, b"more\n")
            assert [await until_line(copy.stdout) for _ in range(2)] == [b"unread input\n", b"more\n"]
            await copy.close_stdin()
            assert await until_line(copy.stdout) == b"end\n"
            assert (await copy.wait()).code == 7, "pid 1 reports the end of a copy"
            assert slow.status is None, "the original still waits"
            await end(one)

    run(main())


ASYNC = r"""
import asyncio, os, signal, subprocess, sys
log = []
async def ticker():
    while True:
        await asyncio.sleep(0.01); log.append(1)
async def main():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    loop.add_signal_handler(signal.SIGUSR1, lambda: log.append("signal"))
    event = os.eventfd(5, os.EFD_NONBLOCK)
    task = loop.create_task(ticker())
    child = subprocess.Popen(["cat"], stdin=-1, stdout=-1, bufsize=0)
    while line := await reader.readline():
        child.stdin.write(line)
        answer = child.stdout.readline().decode().strip()
        count = len(log)
        while len(log) == count: await asyncio.sleep(0.001)
        print(answer, "signal" in log, os.eventfd_read(event), flush=True); os.eventfd_write(event, 3)
asyncio.run(main())
"""


def test_an_event_loop_continues(tmp_path: Path) -> None:
    """asyncio: epoll, a socket pair, an eventfd, pipes to a child process."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await put(box, "/work/loop.py", ASYNC.encode())
            loop = await box.spawn("python3", "-u", "/work/loop.py", stdin="pipe", key="process:loop", keep=True)
            assert await ask(loop, "one") == "one False 5"
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            for number in range(2):
                one = await child(runtime, f"child{number}")
                copy = await attached(one, "process:loop")
                assert await ask(copy, "two") == "two False 3"
                await copy.signal(signal.SIGUSR1)
                assert await ask(copy, "three") == "three True 3"
                await end(one)
            assert await ask(loop, "two") == "two False 3"

    run(main())


THREADS = r"""
import os, queue, sys, threading, time
work, done, lock, gate = queue.Queue(), queue.Queue(), threading.Lock(), threading.Event()
ticks = [0]
local = threading.local()
def worker(number):
    local.number = number
    while True:
        item = work.get()
        with lock: done.put((local.number, threading.get_native_id(), item * 2))
def ticker():
    while True: time.sleep(0.01); ticks[0] += 1
def counter():
    total = 0.5
    while not gate.is_set(): total = total * 1.0000001
    done.put(("spun", total > 0.5))
threads = [threading.Thread(target=worker, args=(number,), daemon=True) for number in range(4)]
threads += [threading.Thread(target=ticker, daemon=True), threading.Thread(target=counter)]
for one in threads: one.start()
def ask(count):
    for number in range(count): work.put(number)
    return sorted(item for _, _, item in (done.get() for _ in range(count)))
def ids(): return sorted(int(name) for name in os.listdir("/proc/self/task"))
def moving():
    before = ticks[0]
    while ticks[0] == before: time.sleep(0.001)
    return True
for line in sys.stdin: print(repr(eval(line)), flush=True)
gate.set()
threads[-1].join(); print(done.get(), flush=True)
"""


def test_threads_continue(tmp_path: Path) -> None:
    """Waiting for a lock, asleep, and computing; with thread-local variables, the same numbers, and joins."""

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await put(box, "/work/threads.py", THREADS.encode())
            process = await box.spawn("python3", "-u", "/work/threads.py", stdin="pipe", key="process:threads",
                                      keep=True)  # fmt: skip
            questions = ["ask(20)", "ids()", "moving()", "[one.native_id for one in threads]"]
            assert await ask(process, "ask(8)") == "[0, 2, 4, 6, 8, 10, 12, 14]"
            assert await runtime.refusals(box.handle) == []
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = [await ask(process, question) for question in questions]
            assert expected[1].count(",") == 6
            for number in range(3):
                one = await child(runtime, f"child{number}")
                copy = await attached(one, "process:threads")
                assert [await ask(copy, question) for question in questions] == expected
                await copy.close_stdin()
                assert copy.stdout is not None and await until_line(copy.stdout) == b"('spun', True)\n"
                assert (await copy.wait()).code == 0
                await end(one)
            assert await ask(process, "ask(2)") == "[0, 2]"

    run(main())


def test_children_are_copied_again_and_return(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            python = await program(box)
            await ask(python, "!generation = 0")
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            await ask(await attached(one, "process:python"), "!generation = 1")
            await runtime.checkpoint(one.handle, B, "auto", processes=True)
            assert runtime.parent(one.handle) == B
            await end(box)
            two = await child(runtime, "two", B)
            copy = await attached(two, "process:python")
            assert await ask(copy, "generation, random.random()") == "(1, 0.32383276483316237)"
            back = await runtime.replace(two.handle, CONFIG, A)
            again = Box(runtime, back, Path("/work"))
            assert await ask(await attached(again, "process:python"), "generation") == "0"
            for each in (one, two, again):
                await end(each)
            box.handle = await runtime.create("box", CONFIG)

    run(main())


def test_memory_that_is_discarded_reads_as_zeros(tmp_path: Path) -> None:
    """Allocators rely on it. A private mapping of a file would return the old content."""
    change = "!import ctypes, mmap as M; m = M.mmap(-1, 1 << 20, M.MAP_PRIVATE | M.MAP_ANONYMOUS); m[:] = b'7' * len(m)"
    check = "(m.madvise(4), set(m[:]))[1], ctypes.CDLL(None).getppid()"

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            python = await program(box)
            await ask(python, change)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            one = await child(runtime)
            copy = await attached(one, "process:python")
            assert await ask(copy, "set(m[:])") == "{55}"
            assert await ask(copy, check) == "({0}, 1)"
            assert await ask(python, "set(m[:])") == "{55}"
            await end(one)

    run(main())


def test_templates_end_and_are_made_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            python = await program(box, 3)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            expected = await ask(python, TAIL)
            one = await child(runtime)
            os.kill(template(runtime)[0], signal.SIGKILL)
            await until(lambda: not template(runtime))
            assert await ask(await attached(one, "process:python"), TAIL) == expected, "children live on"
            two = await child(runtime, "two")
            assert await ask(await attached(two, "process:python"), TAIL) == expected, "the pages come from the disk"
            await end(two)
            launcher = runtime._slots.launcher.pid
            assert launcher is not None
            os.kill(launcher, signal.SIGKILL)
            await until(lambda: not template(runtime))
            three = await child(runtime, "three")
            assert await ask(await attached(three, "process:python"), TAIL) == expected
            await end(three)
            await end(one)
            await runtime.drop_snapshot(A)
            await until(lambda: not template(runtime))

    run(main())


def test_a_limit_of_memory_ends_templates(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            runtime._snapshots.copies.memory = 50 << 20
            python = await program(box, 24)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            await runtime.checkpoint(box.handle, B, "auto", processes=True)
            await until(lambda: len(template(runtime)) == 1)
            for snapshot in (A, B, A):
                one = await child(runtime, "one", snapshot)
                assert await ask(await attached(one, "process:python"), "len(state) >> 20") == "24"
                await end(one)
            await until(lambda: len(template(runtime)) == 1)
            runtime._snapshots.copies.memory = 16 << 20
            with pytest.raises(errors.Unsupported, match="more than 16 MiB of memory of their own"):
                await runtime.checkpoint(box.handle, "c" * 32, "auto", processes=True)
            assert await ask(python, "1 + 1") == "2"

    run(main())


def test_damaged_files_of_a_snapshot_are_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await program(box)
            await runtime.checkpoint(box.handle, A, "auto", processes=True)
            folder = Path(runtime._snapshots.folder(A))
            runtime._snapshots.copies.forget(A)
            await until(lambda: not template(runtime))
            pages, text = folder / state.PAGES, (folder / state.STATE).read_text()
            for damage in (lambda: os.truncate(pages, 4096),
                           lambda: (folder / state.STATE).write_text(text.replace('"version": 1', '"version": 9')),
                           lambda: (folder / state.STATE).write_text(text[: len(text) // 2]),
                           lambda: (folder / state.STATE).write_text(text.replace("process:python", "process:pythom"))):
                damage()
                with pytest.raises(errors.StartFailed, match="snapshot"):
                    await child(runtime)
                (folder / state.STATE).write_text(text)

    run(main())
