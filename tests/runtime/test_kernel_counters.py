"""What the kernel counts for a user: a sandbox that uses up its own takes nothing from the host and its neighbours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rock.protocol.sandbox import SandboxConfig
from tests.runtime.boxes import ROOT, Box, namespace_runtime, run, until_line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts of Linux")

# Takes as much of each as there is, at most so many, and tells how many; `hold` keeps them.
_TAKE = """
import ctypes, json, sys, time
libc = ctypes.CDLL(None, use_errno=True)
try:
    rt = ctypes.CDLL("librt.so.1", use_errno=True)
except OSError:
    rt = libc
names = []
most, what, then = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def inotify(n):
    return libc.inotify_init() >= 0

def timer(n):
    event = (ctypes.c_int * 16)(0, 0, 10, 0)  # SIGUSR1 by SIGEV_SIGNAL
    made = ctypes.c_void_p()
    return rt.timer_create(1, event, ctypes.byref(made)) == 0

def queue(n):
    rt.mq_open.restype = ctypes.c_int
    names.append(b"/rock-test-%d-%d" % (int(time.time() * 1e6), n))
    return rt.mq_open(names[-1], 0o102, 0o600, None) >= 0

take = {"inotify": inotify, "timer": timer, "queue": queue}[what]
taken = 0
while taken < most and take(taken):
    taken += 1
print(json.dumps(taken), flush=True)
if then == "hold":
    time.sleep(600)
for name in names:
    rt.mq_unlink(name)
"""
_ENOUGH = {"inotify": 60, "timer": 20_000, "queue": 5}  # far less than a host has, more than a used up account has
_ALL = {"inotify": 100_000, "timer": 200_000, "queue": 10_000}


def _on_the_host(what: str) -> int:
    """How many this user of the host can have now, at most `_ENOUGH`, in an IPC namespace whose queues go with it."""
    prefix = ["unshare", "-i"] if what == "queue" and ROOT else []
    done = subprocess.run([*prefix, sys.executable, "-I", "-S", "-c", _TAKE, str(_ENOUGH[what]), what, "end"],
                          capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


async def _inside(box: Box, what: str) -> int:
    _, out, err = await box.run(box.interpreter, "-I", "-S", "-c", _TAKE, str(_ENOUGH[what]), what, "end")
    assert out, err
    return int(json.loads(out))


@pytest.mark.parametrize("what", ["inotify", "timer", "queue"])
def test_an_exhausted_counter_is_the_sandboxs_own(tmp_path: Path, what: str) -> None:
    least = min(_ENOUGH[what], _on_the_host(what)) if ROOT else 1

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            config = SandboxConfig(image="hand", memory="512m", cpus=1)
            boxes = []
            for name in ("hostile", "neighbour"):
                boxes.append(Box(runtime, await runtime.create(name, config), Path("/")))
            hostile, neighbour = boxes
            before = await _inside(neighbour, what)
            program = await hostile.spawn(hostile.interpreter, "-I", "-S", "-c", _TAKE, str(_ALL[what]), what, "hold")
            assert program.stdout is not None
            assert int(await until_line(program.stdout)) > 0
            assert await _inside(neighbour, what) == before >= (least if ROOT else 1)
            assert _on_the_host(what) >= least
            program.close()
            await hostile.sh("kill -9 -1 2>/dev/null || true")
            assert await _inside(neighbour, what) == before
            assert _on_the_host(what) >= least, "what outlives its program is charged to the host"
            for box in boxes:
                box.close()
                await runtime.destroy(box.handle)

    run(main(), timeout=120)


@pytest.mark.skipif(not ROOT, reason="a creator of its own takes a range of ids")
def test_each_sandbox_has_an_account_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            handles = [await runtime.create(f"s{n}", SandboxConfig(image="hand", memory="64m", cpus=1)) for n in (1, 2)]
            owners = [_creator(handle.data["pid"]) for handle in handles]
            assert owners == [handle.data["base"] for handle in handles]
            assert len(set(owners)) == 2
            for handle in handles:
                await runtime.destroy(handle)

    run(main())


def _creator(pid: int) -> int:
    """The user who created the user namespace of a process."""
    import fcntl
    import struct

    with open(f"/proc/{pid}/ns/user", "rb") as file:
        return int(struct.unpack("I", fcntl.ioctl(file, 0xB704, bytes(4)))[0])  # NS_GET_OWNER_UID


def test_limits_are_inherited_by_programs(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            box = Box(runtime, await runtime.create("s", SandboxConfig(image="hand", memory="64m", cpus=1)), Path("/"))
            told = await box.python("import resource as r; print(*(r.getrlimit(n)[1] for n in "
                                    "(r.RLIMIT_SIGPENDING, r.RLIMIT_MSGQUEUE, r.RLIMIT_MEMLOCK)))")
            signals, queues, locked = (int(word) for word in told.split())
            assert 0 < signals <= 32_768
            assert 0 < queues <= 819_200
            assert 0 < locked <= 8 << 20
            box.close()
            await runtime.destroy(box.handle)

    run(main())
    assert os.path.exists("/proc/sys/user/max_inotify_instances")
