"""What an idle sandbox with an open session costs: `python bench/idle.py 1000`.

It starts a server, creates the sandboxes, and runs one command in the default session of each. Then it prints what one
sandbox adds to the server (descriptors by kind, tasks and timers), to the memory of the machine, and to the mounts; and
the time of a list, of commands in random sandboxes next to the same with one sandbox, and of the stop of all. The exit
status is 1 when something is left after that, or when the memory did not suffice.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import probed
from hosted import IMAGE, Raw, at, available, connect, cpu_of, memory, raise_file_limit, request, server, tree

from rock.errors import RockError
from rock.images.store import ImageStore
from rock.sync import Client, Sandbox, SandboxConfig

RUN = json.dumps({"command": ":"}).encode()
RESERVE = 3 << 30  # bytes of available memory below which it stops
_KERNEL = ("SUnreclaim", "SReclaimable", "Percpu", "PageTables", "KernelStack", "VmallocUsed")


def kinds(pid: int) -> collections.Counter[str]:
    """The descriptors of a process by kind: sockets, pipes, the names of files, and the kernel's own kinds."""
    found: collections.Counter[str] = collections.Counter()
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue
        if target.startswith("/"):
            parent = os.path.basename(os.path.dirname(os.path.dirname(target)))
            found[f"file in {parent}" if parent in ("spools", "logs") else "file"] += 1
        else:
            found[target.removeprefix("anon_inode:").partition(":")[0].strip("[]")] += 1
    return found


def meminfo() -> dict[str, int]:
    """The kernel's memory in bytes, by kind."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[0][:-1] in _KERNEL}


def group_of(pid: int) -> Path | None:
    """The memory group that contains those of all sandboxes, found by a pid 1."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory" + path).parent
        if not controllers and (found := Path("/sys/fs/cgroup" + path).parent / "memory.current").exists():
            return found.parent
    return None


def charged(group: Path) -> int:
    """Bytes that the memory group has: pages of processes and of the kernel."""
    for name in ("memory.usage_in_bytes", "memory.current"):
        if (group / name).exists():
            return int((group / name).read_text())
    return 0


def file_systems(pid: int) -> set[str]:
    """Device numbers of the file systems that a process has mounted."""
    return {line.split()[2] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}


@dataclass
class State:
    """What the server and the machine hold at one moment."""

    sandboxes: int
    files: collections.Counter[str]
    tasks: int
    timers: int
    server: int  # bytes of memory of the server
    processes: int  # bytes of memory of all processes, shared pages divided among their users
    count: int  # processes
    free: int
    kernel: dict[str, int]
    names: collections.Counter[str] = field(default_factory=collections.Counter)

    @classmethod
    def of(cls, pid: int, sandboxes: int) -> State:
        pids = tree(pid)
        size = 0
        for one in pids:
            try:
                size += memory(one)
            except OSError:
                continue
        found = probed.counts(pid)
        return cls(sandboxes, kinds(pid), found["tasks"], found["timers"], memory(pid), size, len(pids), available(),
                   meminfo(), collections.Counter(found["names"]))  # fmt: skip

    def each(self, before: State) -> dict[str, Any]:
        """What one sandbox added since the earlier state."""
        number = max(1, self.sandboxes - before.sandboxes)

        def share(value: float, unit: float = 1) -> float:
            return round(value / number / unit, 3)

        files = {kind: share(count - before.files[kind]) for kind, count in self.files.items()}
        return {
            "descriptors": share(self.files.total() - before.files.total()),
            "descriptors by kind": {kind: count for kind, count in sorted(files.items()) if abs(count) >= 0.01},
            "tasks": share(self.tasks - before.tasks),
            "timers": share(self.timers - before.timers),
            "processes": share(self.count - before.count),
            "MB of the server": share(self.server - before.server, 1e6),
            "MB of processes (PSS)": share(self.processes - before.processes, 1e6),
            "MB of the machine": share(before.free - self.free, 1e6),
            "MB of the kernel": {kind: share(self.kernel[kind] - before.kernel[kind], 1e6) for kind in self.kernel},
        }


async def commands(url: str, ids: list[str], count: int) -> list[float]:
    """Seconds of commands, each in a random one of these sandboxes."""
    raw = await connect(url)
    times = [await command(raw, random.choice(ids)) for _ in range(count)]
    assert raw.transport is not None
    raw.transport.close()
    return times


async def command(raw: Raw, sandbox_id: str) -> float:
    """Seconds of one command in the default session."""
    began = time.perf_counter()
    status = await raw.ask(request("POST", f"/v1/sandboxes/{sandbox_id}/sessions/default/run", body=RUN))
    assert status == 200, raw.body
    return time.perf_counter() - began


def told(times: list[float]) -> str:
    ordered = sorted(times)
    return ", ".join(f"{name} {at(ordered, share) * 1e3:.2f}" for name, share in (("p50", 0.5), ("p95", 0.95)))


def listed(client: Client) -> tuple[int, float]:
    """The number of running sandboxes, and the seconds of the list."""
    began = time.perf_counter()
    return len(client.list_sandboxes("running")), time.perf_counter() - began


def small_image(home: Path) -> str:
    """An image with one layer that has bash and its libraries only: its sandboxes mount no folder of this machine."""
    lines = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout.splitlines()
    paths = {"/bin/bash", *(word for line in lines for word in line.split() if word.startswith("/"))}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/small.tar", "w") as archive:
            for path in sorted(paths):
                archive.add(os.path.realpath(path), arcname=path.lstrip("/"))
        ImageStore(home / "images").import_tar(f"{folder}/small.tar", "small:1")
    return "small:1"


def stop_all(client: Client, pool: ThreadPoolExecutor) -> None:
    """Stop each sandbox of the server, including those whose create was interrupted."""
    list(pool.map(lambda one: client.stop_sandbox(one.sandbox_id), client.list_sandboxes("pending,running")))


def report(name: str, value: Any) -> None:
    print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}", flush=True)


def fill(url: str, config: SandboxConfig, ids: list[str], number: int, pool: ThreadPoolExecutor) -> bool:
    """Create sandboxes up to the number, and run one command in each; False when memory is short before that."""

    def create(_: int) -> str:
        sandbox = Sandbox(config)
        sandbox.start()
        sandbox.arun(":")
        return str(sandbox.sandbox_id)

    while len(ids) < number:
        began, before = time.monotonic(), len(ids)
        ids += pool.map(create, range(min(500, number - len(ids))))
        report(f"{len(ids)} sandboxes", f"{(len(ids) - before) / (time.monotonic() - began):.1f} creates per second, "
                                        f"{available() >> 20} MB of memory available")  # fmt: skip
        if available() < RESERVE:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sandboxes", type=int, nargs="?", default=1000)
    parser.add_argument("--count", type=int, default=300, help="commands of a measurement")
    parser.add_argument("--settle", type=float, default=8.0, help="seconds of rest before the counts")
    parser.add_argument("--small", action="store_true", help="an image of bash alone, instead of this machine's system")
    parser.add_argument("--at-once", type=int, default=8)
    given = parser.parse_args()
    report("open files at most", str(raise_file_limit()))
    with server(main=probed.__file__, ROCK_IDLE_AFTER="3",
                ROCK_SANDBOX_LIMIT=str(given.sandboxes + 100)) as (url, pid, home), \
            Client(url) as client, ThreadPoolExecutor(given.at_once) as pool, \
            contextlib.ExitStack() as stack:  # fmt: skip
        stack.callback(stop_all, client, pool)
        image = small_image(home) if given.small else IMAGE
        config = SandboxConfig(base_url=url, image=image, memory="64m", auto_clear_seconds=0)
        ids: list[str] = []
        enough = fill(url, config, ids, min(2, given.sandboxes), pool)
        asyncio.run(commands(url, ids[:1], 50))
        alone = asyncio.run(commands(url, ids[:1], given.count))
        time.sleep(given.settle)
        before = State.of(pid, len(ids))
        inits = [one for one in tree(pid)[1:] if _is_init(one)]
        group = group_of(inits[0])
        own = file_systems(inits[0]) - file_systems(inits[1]) if len(inits) > 1 else file_systems(inits[0])
        mounts = len(Path(f"/proc/{inits[0]}/mountinfo").read_text().splitlines())
        groups, memory_before = (0, 0) if group is None else (_folders(group), charged(group))
        try:
            enough = enough and fill(url, config, ids, given.sandboxes, pool)
        except RockError as error:
            enough = False
            report("stopped by", str(error))
        time.sleep(given.settle)
        after = State.of(pid, len(ids))
        for name, value in after.each(before).items():
            report(name, value)
        report("tasks that were added", dict((after.names - before.names).most_common(5)))
        if group is not None:
            report("MB in memory groups",
                   round((charged(group) - memory_before) / max(1, len(ids) - before.sandboxes) / 1e6, 3))
        report("mounts, and file systems of one sandbox alone", [mounts, len(own)])
        busy, began = cpu_of(pid), time.monotonic()
        time.sleep(10)
        report("CPU of the idle server", f"{(cpu_of(pid) - busy) / (time.monotonic() - began):.1%}")
        number, seconds = listed(client)
        report("list", f"{number} sandboxes in {seconds * 1e3:.0f} ms")
        report("commands in one sandbox alone, ms", told(alone))
        report("commands in random sandboxes, ms", told(used := asyncio.run(commands(url, ids, given.count))))
        report("the same again in one sandbox, ms", told(asyncio.run(commands(url, ids[:1], given.count))))
        report("ratio of the medians", round(at(sorted(used), 0.5) / at(sorted(alone), 0.5), 2))
        began = time.monotonic()
        stop_all(client, pool)
        report("stop of all", f"{time.monotonic() - began:.1f} s")
        time.sleep(2)
        left = {"sandboxes": listed(client)[0], "processes": sum(map(_is_init, tree(pid))),
                "groups": 0 if group is None or not group.exists() else _folders(group) - groups + before.sandboxes,
                "folders": len([name for name in os.listdir(home / "run" / "namespace") if name.startswith("n-")])
                if (home / "run" / "namespace").is_dir() else 0}  # fmt: skip
        report("left", left)
        report("MB of memory that did not return", round((before.free - available()) / 1e6))
        return int(not enough or any(value > 0 for value in left.values()))


def _is_init(pid: int) -> bool:
    """Whether it is a pid 1 of a sandbox: the innermost of its pids is 1."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    words = next((line for line in lines if line.startswith("NSpid:")), "").split()
    return len(words) > 2 and words[-1] == "1"


def _folders(group: Path) -> int:
    return sum(entry.is_dir() for entry in os.scandir(group))


if __name__ == "__main__":
    sys.exit(main())
