"""Rows of `rock bench` about snapshots: checkpoint, rollback, fork. `python forks.py N` is a floor of them: the commit
of an overlay by bare system calls."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from rock.sdk import Client, Sandbox
from rock.sdk.sandbox.processes import Process

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
            taken = await sandbox.checkpoint(memory="session")
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
        await _remove(client, children)
    return {name: values[1:] or values for name, values in found.items()}


_STATE = """import os, sys
state = bytearray(int(sys.argv[1]) << 20)
for place in range(0, len(state), 4096): state[place] = 1
print("ready", flush=True)
for line in sys.stdin: print(sum(state[::4096]), flush=True)"""
_FORK = """import json, os, sys, time
state = bytearray(int(sys.argv[1]) << 20)
for place in range(0, len(state), 4096): state[place] = 1
times = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    if not (pid := os.fork()): os._exit(0)
    times.append((time.perf_counter() - began) * 1000)
    os.waitpid(pid, 0)
print(json.dumps(times))"""


async def copies(url: str, count: int, megabytes: int) -> dict[str, list[float]]:
    """Of a Python program with that much memory: milliseconds of a checkpoint with processes, of the pause in it, of a
    child until the program in it answers, and of a command in the original while children start. Empty where processes
    cannot be copied."""
    found: dict[str, list[float]] = {"checkpoint": [], "pause": [], "child": [], "meanwhile": []}
    async with Client(url) as client, Sandbox("host", memory="1g", cpus=1.0, base_url=url) as sandbox:
        program = await sandbox.processes.start(["python3", "-u", "-c", _STATE, str(megabytes)])
        await _line(program, 0)
        await sandbox.run("true")
        if (await sandbox.forkable()).memory != "processes":
            return {}
        for _ in range(count + 1):
            began = time.perf_counter()
            taken = await sandbox.checkpoint(memory="processes")
            found["checkpoint"].append((time.perf_counter() - began) * 1000)
            found["pause"].append(taken.paused_ms)
        children: list[Sandbox] = []
        for _ in range(count + 1):
            child = Sandbox(snapshot=taken.snapshot_id, memory="1g", cpus=1.0, base_url=url)
            began = time.perf_counter()
            starting = asyncio.create_task(child.start())
            await sandbox.run("true")
            found["meanwhile"].append((time.perf_counter() - began) * 1000)
            await starting
            [copy] = await child.processes.list()
            await copy.write_stdin("\n")
            await _line(copy, 0)
            found["child"].append((time.perf_counter() - began) * 1000)
            children.append(child)
        await _remove(client, children)
    return {name: values[1:] or values for name, values in found.items()}


async def _remove(client: Client, children: Sequence[Sandbox]) -> None:
    """Stop the children, then delete all snapshots."""
    for child in children:
        await child.stop()
    for one in await client.list_snapshots():
        await client.delete_snapshot(one.snapshot_id)


async def _line(process: Process, offset: int) -> bytes:
    """A line of the output of a background process."""
    found = b""
    while not found.endswith(b"\n"):
        found += (await process.logs(offset=offset + len(found), wait=10)).data
    return found


def bare_forks(count: int, megabytes: int) -> list[float]:
    """Milliseconds of os.fork in a Python program with that much memory."""
    command = [sys.executable, "-I", "-c", _FORK, str(megabytes), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


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
