"""Rows of `rock bench` about snapshots: checkpoint, rollback, fork. `python forks.py N` is a floor of them: the commit
of an overlay by bare system calls."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time

from rock.sdk import Client, Sandbox

_NEWNS, _PRIVATE, _DETACH = 0x20000, 1 << 18 | 16384, 2


async def snapshots(url: str, count: int) -> dict[str, list[float]]:
    """Milliseconds of a checkpoint, of the pause in it, of a rollback with a command, and of a child with a command. A
    bash with some state and an open file runs in a working directory below /."""
    found: dict[str, list[float]] = {"checkpoint": [], "pause": [], "rollback": [], "child": []}
    async with Client(url) as client, Sandbox("host", memory="256m", cpus=1.0, base_url=url) as sandbox:
        await sandbox.run("mkdir -p /tmp/w && cd /tmp/w && exec 7>>log; for i in $(seq 100); do echo $i > f$i; done")
        for number in range(count + 1):
            await sandbox.run(f"echo {number} >&7")
            began = time.perf_counter()
            taken = await sandbox.checkpoint()
            found["checkpoint"].append((time.perf_counter() - began) * 1000)
            found["pause"].append(taken.paused_ms)
            if number % 20 == 19 or number == count:  # the layers of one sandbox are limited
                began = time.perf_counter()
                await sandbox.rollback(taken)
                await sandbox.run("true")
                found["rollback"].append((time.perf_counter() - began) * 1000)
        children = []
        for _ in range(max(2, count // 2)):
            child = Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0, base_url=url)
            began = time.perf_counter()
            await child.start()
            await child.run("true")
            found["child"].append((time.perf_counter() - began) * 1000)
            children.append(child)
        for child in children:
            await child.stop()
        for one in await client.list_snapshots():
            await client.delete_snapshot(one.snapshot_id)
    return {name: values[1:] or values for name, values in found.items()}


def overlay_commits(count: int) -> list[float]:
    """Milliseconds of the commit of an overlay by bare system calls; empty where that is not allowed."""
    done = subprocess.run([sys.executable, "-I", os.path.abspath(__file__), str(count)], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    found: list[float] = json.loads(done.stdout) if done.returncode == 0 else []
    return found


def _commit(count: int) -> list[float]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS) or libc.mount(b"none", b"/", None, _PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    values = []
    with tempfile.TemporaryDirectory(prefix="rock-floor-") as folder:
        os.mkdir(f"{folder}/base")
        os.mkdir(f"{folder}/root")
        layers = [f"{folder}/base"]
        for number in range(count):
            began = time.perf_counter()
            upper, work = f"{folder}/u{number}", f"{folder}/w{number}"
            os.mkdir(upper)
            os.mkdir(work)
            options = f"lowerdir={':'.join(layers[:8])},upperdir={upper},workdir={work},volatile"
            if libc.mount(b"overlay", os.fsencode(f"{folder}/root"), b"overlay", 0, options.encode()):
                raise OSError(ctypes.get_errno(), "mount")
            values.append((time.perf_counter() - began) * 1000)
            with open(f"{folder}/root/file", "w") as file:
                file.write(str(number))
            layers.insert(0, upper)
        for _ in range(count):
            with contextlib.suppress(OSError):
                libc.umount2(os.fsencode(f"{folder}/root"), _DETACH)
    return values


if __name__ == "__main__":
    print(json.dumps(_commit(int(sys.argv[1]))))
