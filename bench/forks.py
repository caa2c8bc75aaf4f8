"""Forks of running sandboxes beside their floors: `python bench/forks.py`.

The rows of `rock bench` about snapshots, and children of a warm pool of the snapshot; then 64 children of a Python with
108 MB: time until all have started, memory of each after it has written 1 MB, and the latency of commands in the
original meanwhile; CRIU, if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import anyio
from hosted import available, server, tree

from rock.cli.bench import forks
from rock.sync import Client, Sandbox

_PROGRAM = """import sys
state = bytearray(int(sys.argv[1]) << 20)
for place in range(0, len(state), 4096): state[place] = 1
print("ready", flush=True)
for line in sys.stdin:
    for place in range(0, 1 << 20, 4096): state[place] = 2
    print("wrote", flush=True)"""

_IDLE = """import signal, sys
state = bytearray(int(sys.argv[1]) << 20)
for place in range(0, len(state), 4096): state[place] = 1
open(sys.argv[2], "w").close()
while True: signal.pause()"""


def show(name: str, values: Sequence[float], floor: str = "", least: Sequence[float] = ()) -> None:
    beside = f"{floor} {median(least):.2f}" if least else ""
    print(f"| {name} | {median(values):.2f} | {max(values):.2f} | {beside} |" if values else f"| {name} | - | - | |")


def private(pids: Sequence[int]) -> int:
    """Bytes of memory that these processes have for themselves, with their page tables."""
    found = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            lines += [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmPTE")]
            found += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private", "VmPTE")))
    return found


def children(url: str, pid: int, count: int, megabytes: int) -> None:
    """Fork one sandbox into many, and print the figures."""
    with Client(url) as client, Sandbox("host", memory="1g", cpus=2.0, base_url=url) as box:
        program = box.processes.start(["python3", "-u", "-c", _PROGRAM, str(megabytes)])
        line(program)
        alone = [timed(box) for _ in range(50)]
        taken = box.checkpoint(memory="processes")
        before, known = available(), set(tree(pid))
        meanwhile: list[float] = []
        ended = threading.Event()

        def commands() -> None:
            while not ended.is_set():
                meanwhile.append(timed(box))
                time.sleep(0.005)

        thread = threading.Thread(target=commands)
        thread.start()
        began = time.perf_counter()
        try:
            made = box.fork(count)
        finally:
            ended.set()
            thread.join()
        seconds = time.perf_counter() - began
        for one in made:
            [copy] = one.processes.list()
            copy.write_stdin("\n")
            line(copy)
        own = private([one for one in tree(pid) if one not in known])
        print(f"| {count} children, s | {seconds:.2f} | | {1000 * seconds / count:.1f} ms each |")
        print(f"| memory of one that wrote 1 MB, MB: its processes; of the machine | {own / count / (1 << 20):.2f} | | "
              f"{(before - available()) / count / (1 << 20):.2f} |")  # fmt: skip
        show("a command of the original meanwhile, ms", meanwhile, "alone", alone)
        show("pause of the original, ms", [taken.paused_ms])
        for one in made:
            one.stop()
        for snapshot in client.list_snapshots():
            client.delete_snapshot(snapshot.snapshot_id)


def pooled(url: str, count: int, megabytes: int) -> list[float]:
    """Milliseconds of a child from a warm pool of its snapshot: with a command, or, of a Python program with that much
    memory, until the program answers."""
    found = []
    with Client(url) as client, Sandbox("host", memory="1g", cpus=1.0, base_url=url) as box:
        box.run("x=5")
        if megabytes:
            line(box.processes.start(["python3", "-u", "-c", _PROGRAM, str(megabytes)]))
        taken = box.checkpoint(memory="processes" if megabytes else "session")
        client.set_pool("bench", snapshot=taken.snapshot_id, memory="1g", minimum=4, maximum=4)
        for _ in range(count):
            while not any(pool.ready == 4 for pool in client.list_pools()):
                time.sleep(0.05)
            child = Sandbox(snapshot=taken.snapshot_id, memory="1g", cpus=1.0, base_url=url)
            began = time.perf_counter()
            child.start()
            if megabytes:
                [copy] = child.processes.list()
                copy.write_stdin("\n")
                line(copy)
            else:
                child.run("true")
            found.append((time.perf_counter() - began) * 1000)
            child.stop()
        client.delete_pool("bench")
        client.delete_snapshot(taken.snapshot_id)
    return found


def line(process: object) -> None:
    """Wait for a line of a background process."""
    while not process.logs(wait=10).data.endswith(b"\n"):  # type: ignore[attr-defined]
        pass


def timed(box: Sandbox) -> float:
    began = time.perf_counter()
    box.run("true")
    return (time.perf_counter() - began) * 1000


def criu_time(folder: str, action: str, *options: str) -> float:
    """Milliseconds of an action of CRIU on the images in a folder. ChildProcessError."""
    began = time.perf_counter()
    done = subprocess.run(["criu", action, *options, "-D", folder, "-v1", "-o", f"{folder}/log"], capture_output=True,
                          timeout=60, check=False)  # fmt: skip
    if done.returncode:
        text = Path(folder, "log").read_text(errors="replace").strip()[-300:]
        raise ChildProcessError(f"criu {action} fails: {text}")
    return (time.perf_counter() - began) * 1000


def criu(count: int, megabytes: int) -> str:
    """Print the rows of CRIU, a dump that leaves the program running and a restore of it; returns its version.
    ChildProcessError."""
    dumps, restores = list[float](), list[float]()
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            program = subprocess.Popen(
                [sys.executable, "-c", _IDLE, str(megabytes), f"{folder}/ready"], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, close_fds=True, cwd="/")
            try:
                while not os.path.exists(f"{folder}/ready"):
                    time.sleep(0.01)
                dumps.append(criu_time(folder, "dump", "-t", str(program.pid), "--leave-running"))
            finally:
                program.kill()
                program.wait()
            restores.append(criu_time(folder, "restore", "-d"))
            os.kill(program.pid, signal.SIGKILL)
    show(f"CRIU: dump of a Python with {megabytes} MB that continues, ms", dumps)
    show(f"CRIU: restore of a Python with {megabytes} MB, ms", restores)
    return subprocess.run(["criu", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="operations of each row")
    parser.add_argument("--children", type=int, default=64)
    parser.add_argument("--megabytes", type=int, default=108)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    print("| row | p50 | most | beside |\n|---|---|---|---|")
    with server(ROCK_SANDBOX_LIMIT="2000") as (url, pid, _):
        times = anyio.run(forks.snapshots, url, given.count)
        commits = forks.overlay_commits(given.count)
        for name in ("checkpoint", "pause", "rollback", "child"):
            show(f"files and shell: {name}, ms", times[name], "overlay commit", commits)
        show("files and shell: child from a pool, ms", pooled(url, given.count // 2, 0), "overlay commit", commits)
        copies = anyio.run(forks.copies, url, given.count // 2, given.megabytes)
        if not copies:
            print("processes cannot be copied here: `rock doctor`")
            return
        bare = forks.bare_forks(given.count, given.megabytes)
        for name in ("checkpoint", "pause", "child", "meanwhile"):
            show(f"a Python with {given.megabytes} MB: {name}, ms", copies[name], "os.fork", bare)
        show(f"a Python with {given.megabytes} MB: child from a pool, ms",
             pooled(url, given.count // 2, given.megabytes), "os.fork", bare)
        children(url, pid, given.children, given.megabytes)
    try:
        found = criu(given.count // 2, given.megabytes) if shutil.which("criu") else "not installed: apt install criu"
    except ChildProcessError as error:
        found = str(error)
    print(f"CRIU: {found}")
    print(f"load average: {load:.1f} before, {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
