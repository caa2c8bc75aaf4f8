"""`upload_dir` and `download_dir` of many small files, beside `tar` between two folders of this machine.

    python bench/folders.py [FILES [ROUNDS]]

The rounds alternate: tar, upload, download. CPU seconds count the client, the server and pid 1 of the sandbox; those of
tar count both of its processes. A table of medians is printed; bounded by FILES and ROUNDS.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rock import Sandbox, SandboxConfig
from rock.cli.bench.measuring import running_server

SIZE = 1024  # bytes of a file
IN_A_FOLDER = 100


def make(folder: Path, count: int) -> None:
    """A tree of `count` files of SIZE bytes."""
    for number in range(count):
        place = folder / f"d{number // IN_A_FOLDER}"
        if number % IN_A_FOLDER == 0:
            place.mkdir(parents=True)
        (place / f"f{number}").write_bytes(os.urandom(SIZE))


def same(one: Path, other: Path) -> bool:
    """Whether two trees have the same files."""
    return subprocess.run(["diff", "-r", one, other], capture_output=True, check=False).returncode == 0


def by_tar(source: Path, target: Path) -> tuple[float, float]:
    """Copy a tree with two processes of tar; seconds of time and of CPU."""
    target.mkdir()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with subprocess.Popen(["tar", "-C", source, "-cf", "-", "."], stdout=subprocess.PIPE) as packing:
        subprocess.run(["tar", "-C", target, "-xf", "-"], stdin=packing.stdout, check=True)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_of(pid: int) -> float:
    """CPU seconds of a process with all of its descendants; of those that ended when their parent waited for them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(cpu_of(int(child)) for child in children)


async def measured(pid: int, work: object) -> tuple[float, float]:
    """Seconds of time, and of CPU of this process and of the server with its sandboxes."""
    before, began = cpu_of(pid) + time.process_time(), time.monotonic()
    await work  # type: ignore[misc]
    return time.monotonic() - began, cpu_of(pid) + time.process_time() - before


async def run(count: int, rounds: int, root: Path) -> None:
    source = root / "source"
    make(source, count)
    results: dict[str, list[tuple[float, float]]] = {"tar, once": [], "upload_dir": [], "download_dir": []}
    with running_server(0) as (url, pid):
        async with Sandbox(SandboxConfig(base_url=url, image="host", memory="1g", network="none")) as sandbox:
            for number in range(rounds):
                copy, fetched = root / f"copy{number}", root / f"fetched{number}"
                results["tar, once"].append(by_tar(source, copy))
                inside = f"/tmp/tree{number}"
                results["upload_dir"].append(await measured(pid, sandbox.fs.upload_dir(source, inside, check="raise")))
                results["download_dir"].append(await measured(pid, sandbox.fs.download_dir(inside, fetched)))
                assert same(source, copy) and same(source, fetched), "the copies differ"
                shutil.rmtree(copy)
                shutil.rmtree(fetched)
                await sandbox.fs.remove(inside, recursive=True)
    base = statistics.median(cpu for _, cpu in results["tar, once"])
    print(f"{count} files of {SIZE} bytes, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<16}{'seconds':>9}{'CPU s':>9}{'CPU / tar':>11}")
    for name, values in results.items():
        took, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:<16}{took:>9.2f}{cpu:>9.2f}{cpu / base:>11.2f}")


def main() -> None:
    words = [*sys.argv[1:], *("10000", "3")[len(sys.argv) - 1 :]]
    count, rounds = (int(word) for word in words[:2])
    with tempfile.TemporaryDirectory(prefix="rock-folders-") as folder:
        asyncio.run(run(count, rounds, Path(folder)))


if __name__ == "__main__":
    main()
