"""What makes a copy of processes impossible: each is refused with the process and the reason, before any change."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from rock import errors
from rock.runtime.base import Process
from tests.runtime.boxes import Box, run, until_line
from tests.runtime.test_copied_processes import A, ask, program
from tests.runtime.test_frozen_files import LIVE, forking

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")

# Python that brings itself into a state, and the reason that is expected.
STATES = {
    "rights of a thread": ("import threading\ndef go(): C.CDLL(None).syscall(117, 1000, 1000, 1000); sys.stdin.read()\n"
                           "threading.Thread(target=go, daemon=True).start(); time.sleep(0.3)", "different rights"),
    "listener": ("s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()",
                 r"a socket open \(descriptor 3\), which is not one end of a pair"),
    "abstract socket": ("s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + 'x')", "not one end of a pair"),
    "half a pair": ("a, b = socket.socketpair(); b.close()", "not one end of a pair"),
    "closed half": ("a, b = socket.socketpair(); b.shutdown(1)", "not one end of a pair"),
    "unread socket": ("a, b = socket.socketpair(); a.send(b'x')", "which has unread data"),
    "watched and closed": ("e = select.epoll(); a, b = os.pipe(); c = os.dup(a); e.register(a); os.close(a)",
                           "watches a file that has no descriptor"),
    "shared epoll": ("e = select.epoll()\nif not os.fork(): time.sleep(1000)", "shares the open file"),
    "connection": ("a = socket.create_server(('127.0.0.1', 0)); b = socket.create_connection(a.getsockname())",
                   r"a socket open \(descriptor 3\)"),
    "udp": ("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('127.0.0.1', 9))", "a socket open"),
    "netlink": ("s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", "a socket open"),
    "memory file": ("f = os.memfd_create('x')", "memfd:x"),
    "timer": ("f = C.CDLL(None).timerfd_create(1, 0)", r"timerfd"),
    "signals as a file": ("m = C.create_string_buffer(128); f = C.CDLL(None).signalfd(-1, m, 0)", "signalfd"),
    "inotify": ("f = C.CDLL(None).inotify_init()", "inotify"),
    "terminal": ("a, b = os.openpty()", r"the device '/dev/(pts/)?ptmx'"),
    "deleted file": ("f = open('x', 'w'); os.unlink('x')", "deleted file"),
    "deleted folder": ("os.mkdir('d'); os.chdir('d'); os.rmdir('../d')", "deleted working directory"),
    "lock": ("f = open('/work/l', 'w'); fcntl.flock(f, 2)", "lock"),
    "lock of a range": ("f = open('/work/l', 'w'); fcntl.lockf(f, 2)", "lock"),
    "read directory": ("f = os.open('/usr/bin', 0); C.CDLL(None).syscall(217, f, C.create_string_buffer(600), 600)",
                       "partly read directory"),
    "shared memory": ("m = mmap.mmap(-1, 4096)", "shared writable memory"),
    "shared file": ("f = open('/work/s', 'wb+'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)", "shared writable"),
    "shm file": ("f = open('/dev/shm/x', 'w')", "a file of the kernel or in memory"),
    "System V memory": ("i = C.CDLL(None).shmget(0, 4096, 0o1600); C.CDLL(None).shmat(i, None, 0)",
                        "shared writable memory"),
    "POSIX timer": ("t = C.c_void_p(); C.CDLL(None).timer_create(0, 0, C.byref(t))", "timers of timer_create"),
    "pending signal": ("signal.pthread_sigmask(0, [10]); os.kill(os.getpid(), 10)", "a pending signal"),
    "filter": ("C.CDLL(None).prctl(38, 1, 0, 0, 0)\n"
               "p = C.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n"
               "C.CDLL(None).prctl(22, 2, C.create_string_buffer(struct.pack('HxxxxxxQ', 1, C.addressof(p))))",
               "a system call filter of its own"),
    "process file": ("f = open('/proc/self/status')", "a file of the kernel or in memory"),
    "named pipe": ("os.mkfifo('p'); f = os.open('p', os.O_RDWR)", "special file '/work/p'"),
    "pipe of packets": ("a, b = os.pipe2(os.O_DIRECT)", "a pipe of packets"),
    "signals for a file": ("a, b = os.pipe(); fcntl.fcntl(a, 4, 0o20000)", "with signals"),
    "ended child": ("p = os.fork() or os._exit(3)\nwhile open(f'/proc/{p}/stat').read().split()[2] != 'Z': pass",
                    "has a child that has ended, and has not taken"),
    "other session": ("p = os.fork()\nif not p:\n os.setsid()\n if os.fork(): os._exit(0)\n time.sleep(1000)\n"
                      "os.waitpid(p, 0)", "in a session that its parent is not in"),
    "shared position": ("f = open('/work/f', 'w')\nif not os.fork(): time.sleep(1000)",
                        "shares the open file '/work/f'"),
    "ignored trap": ("signal.signal(5, signal.SIG_IGN)", "ignores SIGTRAP"),
    "scheduling": ("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))", "a scheduling policy of its own"),
    "root directory": ("os.chroot('/work')", "another root directory"),
    "deleted program": ("import shutil; shutil.copy('/usr/bin/sleep', '/work/sleeper'); "
                        "p = os.posix_spawn('/work/sleeper', ['sleeper', '1000'], {}); time.sleep(0.2); "
                        "os.unlink('/work/sleeper')", "deleted or hidden program|deleted file"),
    "many descriptors": ("import resource; resource.setrlimit(7, (2500, 2500))\n"
                         "for n in range(2100): os.dup(0)", "more than 2000"),
}
FRAME = ("import ctypes as C, fcntl, mmap, os, select, signal, socket, struct, sys, time\n%s\n"
         "print('ready', flush=True)\ntime.sleep(1000)\n")  # fmt: skip


async def refusals(box: Box) -> str:
    return "; ".join(await box.runtime.refusals(box.handle))


async def in_state(box: Box, code: str) -> Process:
    made = await box.spawn("python3", "-c", FRAME % code, stdin="pipe", stderr="stdout", cwd="/work",
                           key="process:state", keep=True)  # fmt: skip
    assert made.stdout is not None
    async with asyncio.timeout(10):
        assert (line := await until_line(made.stdout)) == b"ready\n", line
    return made


async def gone(process: Process) -> None:
    await process.kill_tree()
    await process.wait()
    process.close()


def _check(tmp_path: Path, names: list[str]) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            python = await program(box)
            assert await refusals(box) == ""
            for name in names:
                code, reason = STATES[name]
                one = await in_state(box, code)
                found = await refusals(box)
                assert re.search(reason, found), (name, found)
                assert found.startswith(("process ", "more than", "a unix")), found
                await gone(one)
                await box.sh("rm -rf /work/d /work/p /work/x /dev/shm/x")
            assert await refusals(box) == ""
            assert await ask(python, "1 + 1") == "2"

    run(main(), 100)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(3))
def test_states_are_refused_with_process_and_reason(tmp_path: Path, part: int) -> None:
    _check(tmp_path, list(STATES)[part::3])


def test_a_refused_checkpoint_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            python = await program(box)
            device = await ask(python, "os.stat('/').st_dev")
            one = await in_state(box, STATES["listener"][0])
            with pytest.raises(errors.Unsupported, match=r"process \d+ \(python3 -c (.|\n)*\) has a socket") as caught:
                await runtime.checkpoint(box.handle, A, "auto", processes=True)
            assert 'memory="session"' in str(caught.value)
            await gone(one)
            with pytest.raises(errors.Unsupported, match='files="copy" takes files alone'):
                await runtime.checkpoint(box.handle, A, "copy", processes=True)
            assert await ask(python, "os.stat('/').st_dev") == device
            assert runtime.parent(box.handle) is None and not runtime.snapshots()
            taken = await runtime.checkpoint(box.handle, A, "auto", processes=True)
            assert taken.copied == ["process:python"]

    run(main())


def test_programs_of_requests_and_stopped_processes_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            request = await box.spawn("sleep", "1000")
            assert "(sleep 1000) belongs to a request that is in progress" in await refusals(box)
            await gone(request)
            terminal = await box.spawn("bash", "--norc", pty=(24, 80), key="session:terminal", keep=True)
            assert "has a stream that is no pipe" in await refusals(box)
            await gone(terminal)
            stopped = await box.spawn("sleep", "1000", key="process:stopped", keep=True)
            os.kill(_outside(box, stopped), 19)
            await box.sh(f"until grep -q 'T (stopped)' /proc/{stopped.pid}/status; do sleep 0.01; done")
            assert "is stopped by a signal" in await refusals(box)
            await gone(stopped)

    run(main())


def _outside(box: Box, process: Process) -> int:
    from rock.guest.init import process_tree

    return next(entry.pid for entry in process_tree.descendants(process_tree.scan(), box.handle.data["pid"])
                if Path(f"/proc/{entry.pid}/status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1]
                == str(process.pid))  # fmt: skip


def test_too_many_processes_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            many = "for n in range(70):\n if not os.fork(): time.sleep(1000)"
            one = await in_state(box, many)
            assert "there are 71 processes, more than 64" in await refusals(box)
            await gone(one)
            fresh = "def go():\n while True:\n  if not os.fork(): os._exit(0)\n  os.waitpid(-1, 0)\n" \
                "if not os.fork(): go()"
            one = await in_state(box, fresh)
            for _ in range(5):  # it is copied, or refused, and continues
                await refusals(box)
            await gone(one)
            assert await refusals(box) == ""

    run(main())
