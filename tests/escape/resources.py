"""Attempts to take what belongs to others: memory, processes, descriptors, disk; and to be hard to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rock import errors
from rock.guest.init import process_tree
from rock.runtime.base import Process
from tests.escape.attempt import PRELUDE, Attempt, Host
from tests.runtime.boxes import Box

THEME = "resources"
MEMORY = 96 << 20

# Each takes far more than the sandbox's 96 MB, in a way of its own, tells how much it has, and then waits.
_TELL = """
total = 0
def held(count):
    global total
    total += count
    try: os.write(1, b'%d\\n' % total)
    except OSError: pass
def rest():
    while True: time.sleep(20)
def most_files():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8000),) * 2)
"""
_BOMBS = {
    "of a program's own": """
pieces = []
for _ in range(60): pieces.append(bytearray(15 << 20)); held(15 << 20)
""",
    "in files in memory (memfd)": """
most_files()
for n in range(60):
    fd = call(319, text(b'x'), 0)
    for _ in range(16): held(os.write(fd, bytes(1 << 20)))
""",
    "in shared mappings that are unmapped": """
import mmap
pieces = []
for _ in range(60):
    piece = mmap.mmap(-1, 16 << 20)
    for at in range(0, 16 << 20, 4096): piece[at] = 1
    piece.madvise(4)
    pieces.append(piece)
    held(16 << 20)
""",
    "in /dev/shm": """
try:
    with open('/dev/shm/escape', 'wb', buffering=0) as file:
        for _ in range(900): held(file.write(bytes(1 << 20)))
except OSError: pass
""",
    "in System V segments": """
libc.shmat.restype = ctypes.c_void_p
for n in range(30):
    segment = libc.shmget(0, 30 << 20, 0o1600)
    if segment < 0: break
    ctypes.memset(libc.shmat(segment, None, 0), 1, 30 << 20)
    held(30 << 20)
""",
    "in pipes": """
most_files()
pairs = []
try:
    for _ in range(3900):
        pair = os.pipe()
        try: fcntl.fcntl(pair[1], 1031, 1 << 20)
        except OSError: pass
        os.set_blocking(pair[1], False)
        pairs.append(pair)
        try:
            while True: held(os.write(pair[1], bytes(1 << 16)))
        except BlockingIOError: pass
except OSError: pass
""",
    "in socket buffers": """
most_files()
pairs = []
try:
    for _ in range(3900):
        pair = socket.socketpair()
        pair[0].setblocking(False)
        pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        pairs.append(pair)
        try:
            while True: held(pair[0].send(bytes(1 << 16)))
        except BlockingIOError: pass
except OSError: pass
""",
    "by children without end": """
for _ in range(200):
    try: pid = os.fork()
    except OSError: break
    if pid == 0:
        x = bytearray(30 << 20)
        rest()
""",
    "that hides from the killer": """
try: write('/proc/self/oom_score_adj', b'0')
except OSError: pass
pieces = []
for _ in range(60): pieces.append(bytearray(15 << 20)); held(15 << 20)
""",
}


async def _neighbour_lives(host: Host) -> str | None:
    if host.neighbour is None:
        return None
    try:
        async with asyncio.timeout(60):
            return None if await host.neighbour.sh("echo alive") == "alive\n" else "the neighbour answers wrongly"
    except (TimeoutError, errors.RockError) as error:
        return f"the neighbour does not answer: {error!r}"


async def _within(host: Host, box: Box, detail: str) -> str:
    """The verdict, when this sandbox lives on and the neighbour too."""
    told = await _neighbour_lives(host)
    if told is not None:
        return f"open: {told}"
    return f"blocked: {detail}"


async def _watch_bomb(box: Box, bomb: Process, patience: float) -> tuple[int, int, str]:
    """Most bytes by the API, bytes that the bomb tells to hold in the end, and how it ended.

    patience: seconds for one that holds too much to be ended: who watches looks when the machine lets him."""
    most, told, ended = 0, b"0", "still there"
    started = time.monotonic()
    while ended == "still there":
        if time.monotonic() - started > (patience if int(told.strip() or b"0") > MEMORY else 6.0):
            break
        try:
            async with asyncio.timeout(0.2):
                status = await bomb.wait()
            ended = f"ended by signal {status.signal}" if status.signal else f"refused, status {status.code}"
        except TimeoutError:
            pass
        with contextlib.suppress(BlockingIOError):
            told = (told + os.read(bomb.stdout or 0, 1 << 16)).rpartition(b"\n")[0].rpartition(b"\n")[2] + b"\n"
        used = await box.runtime.usage(box.handle)
        most = max(most, used.memory_peak_bytes or used.memory_bytes or 0)
    end = time.monotonic() + 20.0
    while True:  # who is watched has forked faster than he was killed
        now = (await box.runtime.usage(box.handle)).memory_bytes or 0
        if now <= MEMORY or time.monotonic() > end:
            break
        await asyncio.sleep(0.3)
    return most, max(now, int(told.strip() or b"0") if ended == "still there" else 0), ended


def _memory(name: str, program: str, **options: Any) -> Attempt:
    async def act(host: Host, box: Box) -> str:
        script = PRELUDE + _TELL + program + "\nrest()\n"
        bomb = await box.spawn("/usr/bin/python3", "-I", "-S", "-c", script, "{}", stderr="null")
        try:
            most, kept, ended = await _watch_bomb(box, bomb, 6.0 if host.level in options.get("open_at", {}) else 60.0)
            async with asyncio.timeout(60):
                await bomb.kill_tree()
                alive = await box.sh("rm -f /dev/shm/escape; echo alive")
        except errors.RockError as error:
            return f"open: the sandbox itself died ({error.message})"
        if alive != "alive\n":
            return f"open: the sandbox is of no use any more: {alive!r}"
        if kept > MEMORY * 1.25:
            return f"open: {kept >> 20} MB of {MEMORY >> 20} are held"
        # Watched memory may be over its limit for the moment between two looks.
        if box.handle.enforced["memory"].startswith("cgroup") and most > MEMORY + (4 << 20):
            return f"open: {most >> 20} MB of {MEMORY >> 20}"
        return await _within(host, box, f"at most {most >> 20} MB, {ended}; pid 1 lives")

    return Attempt(THEME, f"memory {name}", act=act, config={"memory": str(MEMORY)}, **options)


def _act(name: str, work: Callable[[Host, Box], Awaitable[str]], program: str = "", **options: Any) -> Attempt:
    return Attempt(THEME, name, program, act=work, **options)


async def _fork_bomb(host: Host, box: Box) -> str:
    await box.spawn("sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 100", stdout="null", stderr="null")
    await asyncio.sleep(1.0)
    more = len(list(process_tree.descendants(process_tree.scan(), int(box.handle.data["pid"]))))
    if more > 260:
        return f"open: {more} processes of 256"
    told = await _neighbour_lives(host)
    if told:
        return f"open: {told}"
    started = time.monotonic()
    async with asyncio.timeout(60):
        await box.runtime.destroy(box.handle)
    return f"blocked: {more} processes of 256, gone in {(time.monotonic() - started) * 1000:.0f} ms"


async def _thread_bomb(host: Host, box: Box) -> str:
    program = ("import threading, time\nn = 0\n"
               "try:\n  while n < 5000: threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); n += 1\n"
               "except RuntimeError: pass\nprint(n, flush=True)\nimport os; os._exit(0)")
    async with asyncio.timeout(60):
        said = (await box.python(program)).strip().splitlines()[-1]
    if not said.isdigit() or int(said) >= 256:
        return f"open: {said} threads"
    return await _within(host, box, f"{said} threads")


async def _unkillable(host: Host, box: Box) -> str:
    """Daemons of daemons that ignore every signal; the process tree is killed, nothing may be left."""
    program = ("import os, signal, time\n"
               "for n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
               "for _ in range(6):\n"
               "  if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
               "while True: time.sleep(1)")
    process = await box.spawn("/usr/bin/python3", "-I", "-S", "-c", program, stdout="null", stderr="null")
    await asyncio.sleep(0.7)
    async with asyncio.timeout(60):
        await process.kill_tree()
        left = await box.sh("for f in /proc/[0-9]*; do grep -aq 'SIG_IGN' $f/cmdline 2>/dev/null && "
                            "[ $f != /proc/$$ ] && echo $f; done")
    mine = [line for line in left.split() if line and line != "/proc/self"]
    if host.level in ("namespaces", "userns") and len(mine) > 0:
        return f"open: left {mine}"
    return await _within(host, box, "all are gone")


async def _descriptors(host: Host, box: Box) -> str:
    program = ("import os\nn = 0\nhold = []\n"
               "try:\n  while True: hold.append(os.open('/dev/null', os.O_RDONLY)); n += 1\n"
               "except OSError as error: print(n, error.errno)")
    said = (await box.python(program)).split()
    if said[-1] != "24" or int(said[0]) > 64:
        return f"open: {said}"
    return await _within(host, box, f"{said[0]} open files of 64")


async def _flood(host: Host, box: Box) -> str:
    """Output that nobody reads: the writer waits, nothing grows."""
    before = _rss()
    process = await box.spawn("sh", "-c", "while :; do echo yes yes yes yes yes yes yes yes yes yes; done")
    line = await box.spawn("sh", "-c", "exec cat /dev/zero")
    await asyncio.sleep(1.0)
    grown = _rss() - before
    told = await _neighbour_lives(host)
    for one in (process, line):
        await one.kill_tree()
    if grown > 32 << 20:
        return f"open: {grown >> 20} MB more in the server"
    return f"open: {told}" if told else "blocked: the writers wait"


def _rss() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def _shared_folder(host: Host, box: Box) -> str:
    said = await box.sh("head -c 900m /dev/zero > /dev/shm/x 2>/dev/null; wc -c < /dev/shm/x; rm -f /dev/shm/x")
    size = int(said.split()[-1])
    return await _within(host, box, f"{size >> 20} MB") if size <= MEMORY else f"open: {size >> 20} MB"


async def _disk(host: Host, box: Box) -> str:
    """Fill the disk and its inodes, with holes and without."""
    program = """
import os
def full(name, step):
    n = 0
    try:
        while n < 400: n += step(n)
    except OSError as error: return n, error.errno
    return n, 0
with open('sparse', 'wb') as file:
    try: file.truncate(1 << 34)
    except OSError: pass
data = os.urandom(1 << 20)
big = open('big', 'wb', buffering=0)
print(*full('big', lambda n: (big.write(data), 1)[1]))
big.close()
os.unlink('big')
count = 0
try:
    os.mkdir('many')
    while count < 200000:
        open('many/%d' % count, 'w').close()
        count += 1
except OSError as error: print(count, error.errno)
else: print(count, 0)
"""
    async with asyncio.timeout(100):
        said = [line.split() for line in (await box.python(program)).strip().splitlines()]
    (size, first), (files, second) = said
    if int(first) not in (28, 122) or int(size) > 33 or int(second) not in (28, 122) or int(files) > 20_000:
        return f"open: {size} MB ({first}), {files} files ({second})"
    return await _within(host, box, f"{size} MB of 32, {files} files")


_NO_DISK = {"landlock": "disk= is refused before the start"}
_WATCHED = {"landlock": "/dev/shm is the host's, and not to be written"}
_UNCOUNTED = "without a memory cgroup only what programs have mapped, and files in memory, are counted and watched"
_OPEN = {name: {"userns": _UNCOUNTED, "landlock": _UNCOUNTED}
         for name in ("in shared mappings that are unmapped", "in socket buffers", "in pipes")}
ATTEMPTS = [
    *(_memory(name, program, open_at=_OPEN.get(name, {})) for name, program in _BOMBS.items()),
    _act("fork bomb, destroyed", _fork_bomb),
    _act("thread bomb", _thread_bomb),
    _act("daemons that ignore every signal, killed", _unkillable),
    _act("open files without end", _descriptors, config={"nofile": 64}),
    _act("output that nobody reads, and a line without end", _flood),
    _act("fill /dev/shm", _shared_folder, config={"memory": str(MEMORY)}, absent=_WATCHED),
    _act("fill the disk and its inodes", _disk, config={"disk": "32m", "memory": "256m"}, absent=_NO_DISK),
]
