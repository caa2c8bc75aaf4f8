"""The shell that is started together with pid 1, which waits in compiled code until it has work."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rock import errors
from rock.guest.init import native
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.commands.session import DEFAULT
from rock.rocklet.commands.shell_process import first_program
from rock.runtime.base import ExitStatus, Handle, Process
from rock.runtime.init.link import InitLink, InitProcess
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, HandMade, run
from tests.waiting import until

pytestmark = pytest.mark.skipif(native.library is None, reason=f"no extension: {native.missing}")
KEY = "session:default"
# Connects to a pid 1 as another user, by the folder of its socket, and prints whether it closes the connection.
STRANGER = """import os, socket, sys
os.setgroups([])
uid = int(sys.argv[2])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
one.settimeout(10)
one.connect(f"/proc/self/fd/{sys.argv[1]}/s")
try:
    one.send(b'{"id": 1, "op": "hello", "brief": true}')
    print("answered" if one.recv(999) else "closed")
except ConnectionError:
    print("closed")"""
# What a program has, beside its own pid: environment, user, limits, rights, signals and descriptors.
ABOUT = ("env | grep -v ^_= | sort; id; pwd; umask; ulimit -a; ulimit -Ha; cat /proc/self/oom_score_adj; "
         "grep -E '^(Cap|NoNew|Seccomp:|Sig|Groups)' /proc/$$/status; ls /proc/$$/fd; echo end")


@asynccontextmanager
async def opened(folder: Path, **options: Any) -> AsyncIterator[tuple[NamespaceRuntime, HandMade]]:
    images = HandMade(folder / "image")
    runtime = NamespaceRuntime(folder / "run", 0, images, **options)
    runtime.first = first_program(DEFAULT)
    await runtime.open()
    try:
        yield runtime, images
    finally:
        await runtime.close()


@asynccontextmanager
async def sandbox(runtime: NamespaceRuntime, **fields: Any) -> AsyncIterator[tuple[Handle, Process | None]]:
    config = SandboxConfig(image="hand", memory="128m", cpus=1, pids=64, **fields)
    handle = await runtime.create("x", config)
    found = runtime.started(handle)
    try:
        yield handle, None if found is None else found[1]
    finally:
        if found is not None:
            found[1].close()
        await runtime.destroy(handle)


_POLLS = {"x86_64": ("271", "232"), "aarch64": ("73", "22")}[os.uname().machine]


def at_rest(handle: Handle) -> str:
    """Where its pid 1 waits: "compiled" code (ppoll) or "Python" (epoll_wait); "" while it works."""
    number = Path(f"/proc/{handle.data['pid']}/syscall").read_text().split()[0]
    return dict(zip(_POLLS, ("compiled", "Python"), strict=True)).get(number, "")


async def waits(handle: Handle) -> bool:
    """Whether it waits in compiled code, once it waits."""
    await asyncio.to_thread(until, lambda: at_rest(handle) != "")
    return at_rest(handle) != "Python"


async def said(process: Process, script: str, last: str = "end") -> str:
    """What the shell prints for a script, up to a line."""
    assert process.stdin is not None and process.stdout is not None
    os.write(process.stdin, script.encode() + b"\n")
    out = ""
    async with asyncio.timeout(20):
        while not out.endswith(f"{last}\n"):
            with contextlib.suppress(BlockingIOError):
                out += os.read(process.stdout, 65536).decode()
            await asyncio.sleep(0.005)
    return out


@contextlib.contextmanager
def signals_ignored(numbers: Sequence[int]) -> Iterator[None]:
    """Ignored in this process. By system call, because the C library refuses signals 32 and 33."""
    number, before = native._NUMBER["rt_sigaction"], []
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    for one in numbers:
        old = ctypes.create_string_buffer(32)
        before.append((one, old))
        assert system_call(number, one, struct.pack("QQQQ", 1, 0, 0, 0), old, 8) == 0
    try:
        yield
    finally:
        for one, old in before:
            assert system_call(number, one, old, None, 8) == 0


def descriptors(handle: Handle) -> list[str]:
    folder = f"/proc/{handle.data['pid']}/fd"
    return [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]


def test_pid_1_waits_until_it_has_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (handle, process):
            assert process is not None
            assert await said(process, "echo $$ $PPID $SHELL; echo end") == "2 1 /bin/bash\nend\n"
            assert await waits(handle)
            assert (await runtime.stat(handle, "/etc/passwd")).kind == "file"
            assert not await waits(handle)
            assert await runtime.processes(handle) == [KEY]
            again = await runtime.attach(handle, KEY)
            assert again.pid == process.pid
            assert await said(again, "echo still; echo end") == "still\nend\n"
            again.close(forget=False)

    run(main())


def test_it_has_what_a_later_program_has(tmp_path: Path) -> None:
    """Environment, user, limits, rights, signals and descriptors are those of a shell that pid 1 starts."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime, env={"A": "b c"}) as (handle, process):
            assert process is not None
            first = await said(process, ABOUT)
            later = runtime.first
            assert later is not None
            spawned = await runtime.spawn(handle, replace(later.program, key="later"))
            assert await said(spawned, ABOUT) == first
            assert "A=b c" in first and "uid=0(root)" in first and "FROM_IMAGE=yes" in first
            assert re.search(r"Seccomp:\s+2", first) and re.search(r"NoNewPrivs:\s+1", first)
            spawned.close()

    run(main())


def test_it_inherits_no_ignored_signal(tmp_path: Path) -> None:
    """A server can be started with ignored signals: by nohup, or by posix_spawn of a parent that uses signal 32."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (_, process):
            assert process is not None
            found = await said(process, "grep SigIgn /proc/$$/status; echo end")
            assert int(found.split()[1], 16) & ignored == 0

    numbers = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTSTP, 32, 33)
    ignored = sum(1 << (number - 1) for number in numbers)
    with signals_ignored(numbers):
        run(main())


@pytest.mark.parametrize("connected", [True, False])
def test_its_end_is_reported(connected: bool, tmp_path: Path) -> None:
    """Also when it ends while the server has no connection, as between two servers."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (handle, process):
            assert process is not None and process.stdin is not None
            if not connected:
                runtime._slots.let_go_of_all()
            os.write(process.stdin, b"exit 3\n")
            if connected:
                assert await asyncio.wait_for(process.wait(), 20) == ExitStatus(code=3)
            else:
                await asyncio.to_thread(until, lambda: at_rest(handle) == "Python")
                again = await runtime.attach(handle, KEY)
                assert await asyncio.wait_for(again.wait(), 20) == ExitStatus(code=3)
                again.close()

    run(main())


def _sockets(handle: Handle) -> int:
    return sum(link.startswith("socket:") for link in descriptors(handle))


def test_the_next_server_finds_it(tmp_path: Path) -> None:
    """The end of a connection, the next one, and the requests of a server that starts do not wake pid 1."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (handle, process):
            assert process is not None
            await said(process, "kept=1; echo end")
            before = _sockets(handle)
            for number in range(3):
                runtime._slots.let_go_of_all()
                await asyncio.to_thread(until, lambda: _sockets(handle) == before - 1)
                assert await waits(handle)
                assert await runtime.processes(handle) == [KEY]
                again = await runtime.attach(handle, KEY)
                assert await waits(handle) and _sockets(handle) == before
                assert await said(again, f"echo $kept {number}; echo end") == f"1 {number}\nend\n"
                again.close(forget=False)
            assert (await runtime.stat(handle, "/tmp")).kind == "directory"
            assert not await waits(handle)
            assert await runtime.processes(handle) == [KEY]

    run(main())


def test_a_second_connection_wakes_pid_1(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (handle, process):
            assert process is not None
            second = InitLink.connect(runtime._run_dir / handle.data["slot"], handle.id)
            assert await second.kept() == [KEY] == await runtime.processes(handle)
            assert not await waits(handle)
            second.close()
            assert await said(process, "echo end") == "end\n"

    run(main())


def test_a_user_of_the_sandbox_is_not_served(tmp_path: Path) -> None:
    """Only the server can reach the socket. pid 1 checks the user of a connection all the same."""
    if os.geteuid():
        pytest.skip("needs root, to connect as another user")

    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (handle, process):
            assert process is not None
            folder, before = runtime._run_dir / handle.data["slot"], _sockets(handle)
            runtime._slots.let_go_of_all()
            await asyncio.to_thread(until, lambda: _sockets(handle) == before - 1)
            folder.chmod(0o777)
            (folder / "s").chmod(0o777)
            fd = os.open(folder, os.O_PATH)
            try:
                done = await asyncio.to_thread(
                    subprocess.run, [sys.executable, "-c", STRANGER, str(fd), str(handle.data["base"])],
                    pass_fds=[fd], capture_output=True, text=True, timeout=20, check=False)
            finally:
                os.close(fd)
                folder.chmod(0o700)
            assert done.stdout == "closed\n", done.stderr
            assert await waits(handle)
            again = await runtime.attach(handle, KEY)
            assert await said(again, "echo end") == "end\n"
            again.close(forget=False)

    run(main())


@pytest.mark.parametrize("awake", [False, True])
def test_streams_of_an_idle_session_are_watched(awake: bool, tmp_path: Path) -> None:
    """Without waking pid 1, and by pid 1 when something else wakes it meanwhile."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, _), sandbox(runtime) as (handle, process):
            assert isinstance(process, InitProcess) and process.reopens
            assert process.stdin is not None
            stdin = os.dup(process.stdin)
            changed = asyncio.Event()
            await process.close_streams(changed.set)
            assert await waits(handle) and not changed.is_set() and process.stdout is None
            if awake:
                assert (await runtime.stat(handle, "/tmp")).kind == "directory"
                assert not await waits(handle) and not changed.is_set()
            os.write(stdin, b"echo late\n")
            os.close(stdin)
            await asyncio.wait_for(changed.wait(), 20)
            assert await waits(handle) is not awake
            await process.reopen_streams()
            assert await waits(handle) is not awake
            assert await said(process, "echo end") == "late\nend\n"
            await process.close_streams(changed.set)  # and once more
            await process.reopen_streams()
            assert await waits(handle) is not awake
            assert await said(process, "echo again; echo end") == "again\nend\n"

    run(main())


@pytest.mark.parametrize("why", ["no bash", "no folder", "no user", "too long"])
def test_where_it_cannot_start_pid_1_reports_the_reason(why: str, tmp_path: Path) -> None:
    """The sandbox starts all the same, and pid 1 holds no descriptor of the program."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, images):
            found = images.resolve("hand")
            if why == "no bash":
                assert runtime.first is not None
                runtime.first = runtime.first._replace(paths=["/no/bash"])
            elif why == "no folder":
                found = replace(found, cwd="/missing")
            elif why == "no user":
                found = replace(found, user="missing")
            images.resolve = lambda name: found  # type: ignore[method-assign]
            env = {"LONG": "x" * 20_000} if why == "too long" else {}
            async with sandbox(runtime, env=env) as (handle, process):
                assert process is None
                box = Box(runtime, handle, Path("/work"))
                if why == "no folder":
                    with pytest.raises(errors.NotFound, match="missing"):
                        await box.sh("true")
                elif why == "no user":
                    with pytest.raises(errors.NotFound, match="no such user"):
                        await box.sh("true")
                else:
                    assert await box.sh("echo $((6 * 7)) ${#LONG}") == f"42 {len(env.get('LONG', ''))}\n"
                assert [link for link in descriptors(handle) if link.startswith("pipe:")] == []

    run(main())


def test_a_user_of_the_image(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as (runtime, images):
            found = replace(images.resolve("hand"), user="alice")
            images.resolve = lambda name: found  # type: ignore[method-assign]
            async with sandbox(runtime) as (_, process):
                assert process is not None
                out = await said(process, "id; echo $HOME; echo end")
                assert out == "uid=1000(alice) gid=1000(alice) groups=1000(alice),50(staff)\n/home/alice\nend\n"

    run(main())


def test_no_user_database_is_read_through_a_link_of_proc(tmp_path: Path) -> None:
    """The launcher reads the image's files as root. A link of /proc would lead to those of this machine."""

    async def main() -> None:
        async with opened(tmp_path) as (runtime, images):
            passwd = images.layer / "etc/passwd"
            passwd.unlink()
            passwd.symlink_to("/proc/1/root/etc/passwd")
            async with sandbox(runtime) as (_, process):
                assert process is not None
                assert await said(process, "echo $HOME; echo end") == "/root\nend\n"  # as without a database

    run(main())


def test_without_the_compiled_functions_pid_1_starts_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path, native=False) as (runtime, _), sandbox(runtime) as (handle, process):
            assert process is None
            assert await Box(runtime, handle, Path("/work")).sh("echo hi") == "hi\n"

    run(main())
