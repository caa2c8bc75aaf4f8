"""Programs: streams, exit statuses, signals, trees, terminals, what is kept, ports."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import fcntl
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rock import errors
from rock.guest.init.link import CHANNEL_MEMORY
from rock.runtime.base import (
    CLOCK,
    ExitStatus,
    Files,
    Handle,
    Limits,
    Listens,
    Liveness,
    Ports,
    Process,
    Runtime,
    Trait,
)
from tests.runtime.boxes import Box, read_all, run, until_line
from tests.runtime.conformance.conftest import Bench
from tests.runtime.conformance.subject import needs


def test_streams_carry_exact_bytes(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            blob = bytes(range(256)) * 4000
            process = await b.spawn("sh", "-c", "cat; echo err >&2", stdin="pipe")

            async def feed() -> None:
                rest = memoryview(blob)
                while rest:
                    try:
                        rest = rest[os.write(process.stdin, rest):]
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
                await process.close_stdin()

            _, out, err = await asyncio.gather(feed(), read_all(process.stdout), read_all(process.stderr))
            assert out == blob
            assert err == b"err\n"
            assert await process.wait() == ExitStatus(code=0)

    run(main())


def test_it_is_what_it_says(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            assert isinstance(b.runtime, Runtime)
            assert b.handle.id == "box" and b.handle.runtime == b.runtime.name
            assert b.handle.isolation in b.runtime.traits
            assert set(b.handle.enforced) - {"disk"} == {"memory", "cpus", "pids"}
            stored = json.loads(json.dumps(dataclasses.asdict(b.handle)))
            assert await b.runtime.recover(Handle(**stored)) is Liveness.RUNNING

    run(main())


@pytest.mark.parametrize(("script", "status"), [
    ("exit 0", ExitStatus(code=0)), ("exit 7", ExitStatus(code=7)), ("exit 255", ExitStatus(code=255)),
    ("kill -9 $$", ExitStatus(signal=9)), ("kill -TERM $$", ExitStatus(signal=15)),
])
def test_exit_status_is_the_real_one(box: Bench, script: str, status: ExitStatus) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("sh", "-c", script)
            assert await process.wait() == status
            assert await process.wait() == status
            assert await process.signal(9) == 0
            assert await process.kill_tree() == 0

    run(main())


def test_defaults_are_null_and_joined_streams(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("sh", "-c", "cat; echo out; echo err >&2", stderr="stdout")
            assert process.stdin is None
            assert process.stderr is None
            assert await read_all(process.stdout) == b"out\nerr\n"
            quiet = await b.spawn("sh", "-c", "echo out; echo err >&2; exit 3", stdout="null", stderr="null")
            assert quiet.stdout is None
            assert (await quiet.wait()).code == 3

    run(main())


def _set_action(signum: int, handler: int) -> None:
    """Ignore a signal (handler 1), or not (0). Python's own module has no access to the C library's signals."""
    number = {"x86_64": 13, "aarch64": 134}[os.uname().machine]
    action = ctypes.create_string_buffer(struct.pack("Q", handler), 64)
    assert ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(signum), action, None, ctypes.c_long(8)) == 0


@pytest.fixture
def ignored_signals() -> Iterator[None]:
    """What a server inherits that was started as a shell's background job, or by a program that ignores signal 32."""
    for signum in (signal.SIGQUIT, signal.SIGUSR1, 32):
        _set_action(signum, 1)
    yield
    for signum in (signal.SIGQUIT, signal.SIGUSR1, 32):
        _set_action(signum, 0)


@pytest.mark.usefixtures("ignored_signals")
@needs(Trait.PROGRAMS)
def test_programs_start_with_clean_signals_and_descriptors(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            script = ("import os,signal;print(sorted(int(f) for f in os.listdir('/proc/self/fd'))[:-1],"
                      "open('/proc/self/status').read().split('SigIgn:')[1].split()[0],"
                      "open('/proc/self/status').read().split('SigBlk:')[1].split()[0], os.getpid()==os.getsid(0))")
            out = await b.python(script)
            if not box.subject.resets_reserved:
                out = out.replace(" 0000000081001000 ", " 0000000001001000 ")
            # Python itself ignores SIGPIPE and SIGXFSZ
            assert out == "[0, 1, 2] 0000000001001000 0000000000000000 True\n"

    run(main())


def test_channels_have_the_numbers_that_the_program_expects(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("bash", "-c", "read -r line <&7; echo got $line >&30", channels={30: "w", 7: "r"})
            os.write(process.channels[7], b"hello\n")
            assert await read_all(process.channels[30]) == b"got hello\n"
            with pytest.raises(errors.InvalidConfig, match="channel 2"):
                await b.spawn("true", channels={2: "w"})
            many = dict.fromkeys(range(100, 156), "r")  # numbers that descriptors of pid 1 have, too
            with pytest.raises(errors.NotFound):
                await b.spawn("no-such-program", channels=many)

    run(main())


def test_memory_is_shared_with_a_size_that_stays_or_there_is_none(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("bash", "-c", "read -r line <&7; echo it >&30", channels={7: "r", 30: "m"})
            memory = process.channels.get(30)
            try:
                seals = 0 if memory is None else fcntl.fcntl(memory, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0  # a file that stands for it, from another kernel
            os.write(process.channels[7], b"on\n")
            if memory is None or not seals & fcntl.F_SEAL_SHRINK:
                return  # and nobody takes it for memory: rocklet/environments/pipes.py
            await process.wait()
            assert os.pread(memory, 4, 0) == b"it\n\0" and os.fstat(memory).st_size == CHANNEL_MEMORY
            for size in (0, CHANNEL_MEMORY + 1):
                with pytest.raises(PermissionError):
                    os.ftruncate(memory, size)

    run(main())


@needs(Trait.TERMINALS)
def test_terminal(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("sh", "-c", "tty; stty size; read x; stty size; echo got $x", pty=(33, 99))
            await asyncio.sleep(0.2)
            await process.resize(40, 120)
            os.write(process.stdin, b"hey\n")
            out = await read_all(process.stdout)
            assert b"/dev/pts/" in out
            assert b"33 99" in out
            assert b"40 120" in out
            assert b"got hey" in out
            with pytest.raises(errors.InvalidConfig):
                await (await b.spawn("true")).resize(1, 1)
            with pytest.raises(errors.InvalidConfig):
                await process.resize(0, 100_000)

    run(main())


@needs(Trait.TERMINALS)
def test_terminal_sends_an_interrupt(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("sleep", "60", pty=(24, 80))
            await asyncio.sleep(0.2)
            os.write(process.stdin, b"\x03")
            assert await process.wait() == ExitStatus(signal=2)

    run(main())


@needs(Trait.TREES)
def test_kill_tree_reaches_daemons_and_orphans(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            script = "(setsid sh -c 'sleep 1000 & sleep 1000' &) ; (sleep 1000 &) ; sleep 1000"
            process = await b.spawn("sh", "-c", script)
            await until_count(process, 5)
            assert await process.kill_tree() >= 5
            assert await process.wait() == ExitStatus(signal=9)
            if Trait.PROCESSES in b.runtime.traits[b.handle.isolation]:
                assert "sleep 1000" not in await b.sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")

    run(main())


@needs(Trait.TREES)
def test_kill_tree_since_spares_what_was_there_before(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("bash", stdin="pipe")
            os.write(process.stdin, b"sleep 501 & sleep 502 & echo ready\n")
            await asyncio.sleep(0.3)
            since = time.clock_gettime(CLOCK)
            os.write(process.stdin, b"sleep 503 & (setsid sleep 504 &); sleep 505\n")
            await until_count(process, 3, since=since, root=False)
            assert await process.kill_tree(since=since, root=False) == 3
            os.write(process.stdin, b"jobs -r | wc -l; exit 4\n")
            said = b""
            async with asyncio.timeout(20):
                while b"2" not in said:  # alone, or with what was said before
                    said += await read_some(process.stdout)
            assert (await process.wait()).code == 4

    run(main())


async def until_count(process: Process, count: int, **which: Any) -> None:
    """Wait until a tree has so many processes, asked by a signal that does nothing."""
    end = asyncio.get_running_loop().time() + 20
    while await process.signal(signal.SIGCONT, tree=True, **which) < count:
        assert asyncio.get_running_loop().time() < end, f"there never were {count} processes"
        await asyncio.sleep(0.02)


async def read_some(fd: int, wait: float = 0.5) -> bytes:
    await asyncio.sleep(wait)
    return os.read(fd, 1 << 16)


@needs(Trait.PROGRAMS, Files)
def test_missing_things_are_named(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            with pytest.raises(errors.NotFound, match="no-such-program"):
                await b.spawn("no-such-program")
            with pytest.raises(errors.NotFound, match="/no/such"):
                await b.spawn("/no/such")
            with pytest.raises(errors.NotFound, match="/no/cwd"):
                await b.spawn("true", cwd="/no/cwd")
            with pytest.raises(errors.NotFound, match="no-such-user"):
                await b.spawn("true", user="no-such-user")
            with pytest.raises(errors.NotFound, match="no-such-group"):
                await b.spawn("true", user="root:no-such-group")
            with pytest.raises(errors.PermissionDenied, match="/etc/passwd"):
                await b.spawn("/etc/passwd")
            with pytest.raises(errors.InvalidConfig):
                await b.spawn()
            with pytest.raises(errors.InvalidConfig):
                await b.spawn("a\0b")
            fd, token = await b.runtime.open_write(b.handle, str(b.root / "garbage"), mode=0o755)
            os.write(fd, b"\x01\x02\x03")
            os.close(fd)
            await b.runtime.commit_write(b.handle, token)
            with pytest.raises(errors.InvalidConfig, match="format"):
                await b.spawn(str(b.root / "garbage"))
            assert await b.sh("echo fine") == "fine\n"

    run(main())


def test_environment_is_exact_and_has_path_and_home(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            out = await b.sh("env", env={"A": "1 2\n3", "PATH": "/usr/bin:/bin", "HOME": "/h"})
            seen = {line for line in out.splitlines() if not line.startswith(("PWD=", "_=", "SHLVL=", "OLDPWD="))}
            assert seen - {"FROM_IMAGE=yes"} == {"A=1 2", "3", "PATH=/usr/bin:/bin", "HOME=/h"}
            big = "x" * 100_000
            assert await b.sh('printf %s "$BIG" | wc -c', env={"BIG": big, "B2": big}) == "100000\n"

    run(main())


def test_kept_programs_are_attached_again(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            script = "read a; echo $a; read b; echo $b; exit 5"
            process = await b.spawn("sh", "-c", script, stdin="pipe", keep=True, key="session")
            with pytest.raises(errors.Conflict, match="session"):
                await b.spawn("true", keep=True, key="session")
            os.write(process.stdin, b"one\n")
            assert await b.runtime.processes(b.handle) == ["session"]
            again = await b.runtime.attach(b.handle, "session")
            assert again.pid == process.pid
            process.close()
            os.write(again.stdin, b"two\n")
            await again.close_stdin()
            assert await again.wait() == ExitStatus(code=5)
            assert await read_all(again.stdout) == b"one\ntwo\n"
            third = await b.runtime.attach(b.handle, "session")
            assert await third.wait() == ExitStatus(code=5)
            third.close()
            again.close()
            await until_forgotten(b)
            with pytest.raises(errors.NotFound, match="session"):
                await b.runtime.attach(b.handle, "session")

    run(main())


async def until_forgotten(b: Box) -> None:
    end = asyncio.get_running_loop().time() + 20
    while await b.runtime.processes(b.handle):
        assert asyncio.get_running_loop().time() < end, "a kept program that has ended and was closed is still known"
        await asyncio.sleep(0.01)


def test_closing_a_kept_input_is_seen_inside(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            process = await b.spawn("cat", stdin="pipe", keep=True, key="cat")
            os.write(process.stdin, b"data")
            await process.close_stdin()
            assert (await process.wait()).code == 0

    run(main())


def test_cancelled_spawn_leaves_no_program(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            for delay in (0.0, 0.0005, 0.001, 0.003):
                task = asyncio.create_task(b.spawn("sleep", "777"))
                await asyncio.sleep(delay)
                task.cancel()
                result = (await asyncio.gather(task, return_exceptions=True))[0]
                if not isinstance(result, BaseException):
                    await result.kill_tree()
            await asyncio.sleep(0.3)
            for number in (1, 2):  # each told of its end: what is left would be seen by the leak check
                assert (await b.run("sh", "-c", f"exit {number}"))[0].code == number
            if Trait.PROCESSES in b.runtime.traits[b.handle.isolation]:
                assert "777" not in await b.sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")

    run(main())


def test_many_programs_at_once(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            results = await asyncio.gather(*(b.run("sh", "-c", f"echo {i}; exit {i}") for i in range(60)))
            assert [status.code for status, _, _ in results] == list(range(60))
            assert [out for _, out, _ in results] == [f"{i}\n".encode() for i in range(60)]

    run(main())


def test_stop_gives_programs_a_chance(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            path = b.root / "said"
            script = f"trap 'echo bye > {path}; exit 0' TERM; echo up; while :; do sleep 0.05; done"
            polite = await b.spawn("sh", "-c", script)
            await b.spawn("sh", "-c", "trap '' TERM; while :; do sleep 1; done")
            await read_some(polite.stdout, 0.2)
            waiting = asyncio.create_task(b.runtime.wait(b.handle))
            await b.runtime.stop(b.handle, 0.5)
            assert await waiting in ("gone", "exited")
            with pytest.raises(errors.Lost):
                await b.spawn("true")
            assert str(await b.runtime.recover(b.handle)) == "gone"
            await b.runtime.stop(b.handle, 0.1)

    run(main())


@needs(Trait.PROGRAMS, Ports)
def test_dial(box: Bench) -> None:
    server = ("import socket;s=socket.create_server(('127.0.0.1',0));print(s.getsockname()[1],flush=True);"
              "c,_=s.accept();c.sendall(c.recv(100).upper())")

    async def main() -> None:
        async with box() as b:
            process = await b.spawn(b.interpreter, "-I", "-S", "-c", server)
            port = int(await until_line(process.stdout))
            fd = await b.runtime.dial(b.handle, port)
            os.set_blocking(fd, True)
            os.write(fd, b"hello")
            assert await asyncio.to_thread(os.read, fd, 100) == b"HELLO"
            os.close(fd)
            with pytest.raises(errors.NotFound):
                await b.runtime.dial(b.handle, 1)
            for host, number in (("no name", 80), ("127.0.0.1", 0), ("127.0.0.1", 70000)):
                with pytest.raises(errors.InvalidConfig):
                    await b.runtime.dial(b.handle, number, host=host)

    run(main())


@needs(Trait.PROGRAMS, Listens)
def test_listen(box: Bench) -> None:
    client = ("import socket,sys;s=socket.create_connection(('127.0.0.1',int(sys.argv[1])));s.sendall(b'hello');"
              "print(s.recv(100).decode(),flush=True)")

    async def main() -> None:
        async with box() as b:
            try:
                port = await b.runtime.listen(b.handle, 0)
            except errors.Unsupported:
                return  # a level without sockets
            assert await b.runtime.listen(b.handle, port) == port
            for _ in range(3):
                waiting = asyncio.create_task(b.runtime.accept(b.handle, port))
                process = await b.spawn(b.interpreter, "-I", "-S", "-c", client, str(port))
                fd = await waiting
                os.set_blocking(fd, True)
                assert await asyncio.to_thread(os.read, fd, 100) == b"hello"
                os.write(fd, b"HELLO\n")
                assert await until_line(process.stdout) == b"HELLO\n"
                os.close(fd)
            early = await b.spawn(b.interpreter, "-I", "-S", "-c", client, str(port))  # waits in the backlog
            await asyncio.sleep(0.2)
            fd = await b.runtime.accept(b.handle, port)
            os.write(fd, b"late\n")
            assert await until_line(early.stdout) == b"late\n"
            os.close(fd)
            pending = asyncio.create_task(b.runtime.accept(b.handle, port))
            await asyncio.sleep(0.05)
            await b.runtime.unlisten(b.handle, port)
            with pytest.raises(errors.NotFound):
                await pending
            with pytest.raises(errors.NotFound):
                await b.runtime.accept(b.handle, port)
            with pytest.raises(errors.InvalidConfig):
                await b.runtime.listen(b.handle, 70000)
            refused = await b.spawn(b.interpreter, "-I", "-S", "-c", client, str(port))
            assert (await refused.wait()).code == 1

    run(main())


@needs(Limits)
def test_usage(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            await b.spawn("sleep", "60")
            used = await b.runtime.usage(b.handle)
            assert 0 < (used.memory_bytes or 0) < 1 << 30
            assert (used.pids or 0) >= 1
            assert used.cpu_seconds is not None

    run(main())
