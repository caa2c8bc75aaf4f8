"""Many sandboxes made, used and destroyed against one server: `python bench/cycles.py 10000`.

Prints what the server and its launcher hold before and afterwards: descriptors, threads, memory, processes, mounts,
cgroups, namespaces, folders. Exits with 1 when anything but memory has grown, or memory by more than `ALLOWED`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosted import memory, tree

from rock import settings
from rock.errors import RockError
from rock.images.store import ImageStore
from rock.sync import Sandbox, SandboxConfig

IMAGE = "cycles:1"
WARM_UP = 300  # cycles before the first look: caches, pools of connections and tombstones fill
ALLOWED = 16 << 20  # bytes that the server may grow by, for 10,000 tombstones in its memory and allocator slack
KINDS = ("mnt", "pid", "net", "ipc", "uts", "user", "cgroup")


@dataclass(frozen=True)
class Ledger:
    """What is held at a moment. Memory in bytes, shared pages split among those who share them."""

    server_files: int
    server_threads: int
    server_memory: int
    launcher_files: int
    launcher_memory: int
    processes: int
    mounts: int
    cgroups: int
    namespaces: int
    folders: int


def _files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _namespaces(pids: list[int]) -> int:
    """Different namespaces that these processes are in, or hold a descriptor of."""
    seen = set()
    for pid in pids:
        try:
            links = [f"/proc/{pid}/ns/{kind}" for kind in KINDS]
            links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        for link in links:
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.partition(":")[0] in KINDS:
                seen.add(target)
    return len(seen)


def _cgroups(home: Path) -> int:
    """Groups of this server's sandboxes: below its own, whose name is made of where it runs."""
    run_dir = os.path.realpath(home / "run" / "namespace")
    parent = "rock-" + hashlib.sha256(run_dir.encode()).hexdigest()[:12]
    return sum(len(folders) for root, folders, _ in os.walk("/sys/fs/cgroup") if f"/{parent}" in root)


def take(server: int, home: Path) -> Ledger:
    pids = tree(server)
    launcher = next(pid for pid in pids if pid != server)
    runs = home / "run"
    folders = sum(len(list((runs / part).iterdir())) for part in ("namespace", "records", "logs", "process", "landlock")
                  if (runs / part).is_dir())
    mounts = len(Path(f"/proc/{launcher}/mountinfo").read_text().splitlines())
    mounts += len([line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line])
    return Ledger(_files(server), len(os.listdir(f"/proc/{server}/task")), memory(server), _files(launcher),
                  memory(launcher), len(pids), mounts, _cgroups(home), _namespaces(pids), folders)


def settled(server: int, home: Path, seconds: float = 30.0) -> Ledger:
    """A look when nothing changes any more: ends are tidied up in the background."""
    before, end = take(server, home), time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1.0)
        now = take(server, home)
        if now == before:
            break
        before = now
    return before


@contextmanager
def serving(home: Path, pool: int) -> Iterator[tuple[int, str]]:
    """A server with a home of its own: its pid and its address."""
    ImageStore(home / "images").from_host(IMAGE)
    environment = settings.child_environment(ROCK_HOME=str(home), ROCK_POOL_SIZE=str(pool))
    with open(home / "output.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1", "--port", "0"],
                                   env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        note, end = home / "server.json", time.monotonic() + 30
        while not note.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit((home / "output.log").read_text())
            time.sleep(0.05)
        yield process.pid, f"http://127.0.0.1:{json.loads(note.read_text())['port']}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class Cycles:
    """`count` cycles by some threads; tells how long each part took, in seconds."""

    def __init__(self, url: str, at_once: int) -> None:
        self._config = SandboxConfig(base_url=url, image=IMAGE, memory="256m", cpus=1.0)
        self._at_once = at_once
        self._lock = threading.Lock()
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def run(self, count: int) -> float:
        left = iter(range(count))
        started = time.monotonic()
        threads = [threading.Thread(target=self._work, args=(left,)) for _ in range(self._at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - started

    def _work(self, left: Iterator[int]) -> None:
        while True:
            with self._lock:
                if next(left, None) is None:
                    return
            started = time.monotonic()
            try:
                with Sandbox(self._config) as sandbox:
                    done = sandbox.execute(["sh", "-c", "echo x > /tmp/file; cat /tmp/file"])
                    if done.stdout != "x\n":
                        raise RockError(f"it said {done.stdout!r}")
            except RockError as error:
                with self._lock:
                    self.failures.append(str(error))
            self.seconds.append(time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--pool", type=int, default=0)
    spec = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rock-cycles-") as folder, serving(Path(folder), spec.pool) as (pid, url):
        Cycles(url, spec.at_once).run(min(WARM_UP, spec.count))
        before = settled(pid, Path(folder))
        cycles = Cycles(url, spec.at_once)
        seconds = cycles.run(spec.count)
        after = settled(pid, Path(folder))
    ordered = sorted(cycles.seconds)
    p50, p95 = (ordered[int(len(ordered) * part)] * 1000 for part in (0.5, 0.95))
    print(f"{spec.count} cycles, {spec.at_once} at once: {seconds:.0f} s, {spec.count / seconds:.0f} a second, "
          f"min {ordered[0] * 1000:.0f} / p50 {p50:.0f} / p95 {p95:.0f} ms each, {len(cycles.failures)} failed")
    grown = []
    print("| held | before | after |\n|---|---|---|")
    for name, old in vars(before).items():
        new = getattr(after, name)
        memory = name.endswith("memory")
        print(f"| {name.replace('_', ' ')}{' (MB)' if memory else ''} | " + (
            f"{old / 2**20:.1f} | {new / 2**20:.1f} |" if memory else f"{old} | {new} |"))
        if new > old + (ALLOWED if memory else 0):
            grown.append(name)
    for failure in cycles.failures[:5]:
        print(f"failed: {failure}")
    if grown or cycles.failures:
        raise SystemExit(f"leaked: {', '.join(grown) or 'nothing'}; failed: {len(cycles.failures)}")


if __name__ == "__main__":
    main()
