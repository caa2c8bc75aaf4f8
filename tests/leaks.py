"""What a server has on this machine beside itself: processes, folders, cgroups, mounts, open files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SPOOLS = 16


@dataclass(frozen=True)
class Inventory:
    items: frozenset[str] = field(default_factory=frozenset)

    def __sub__(self, other: Inventory) -> list[str]:
        return sorted(self.items - other.items)


def take_inventory(home: Path, pid: int) -> Inventory:
    """What is there now. `pid`: the server's; its launcher is no leak, but what the launcher made is."""
    found = [*_mounts(home)]
    for one in homes(home):
        found += [*_folders(one), *_cgroups(one)]
    members = members_of(pid)
    for server in (pid, *members):
        found += [*_processes(server, members), *_files(server)]
    return Inventory(frozenset(found))


def homes(home: Path) -> list[Path]:
    """Where the sandboxes of a server are: its home, and those of its further rocklet processes."""
    return [home, *sorted((home / "processes").glob("[1-9]*"))]


def home_of(home: Path, sandbox_id: str | None) -> Path:
    """That of the rocklet process which has a sandbox."""
    assert sandbox_id
    return next(one for one in homes(home) if (one / "run" / "records" / sandbox_id).exists())


def members_of(server: int) -> list[int]:
    """The rocklet processes of a server that has several."""
    found = []
    children = Path(f"/proc/{server}/task/{server}/children")
    for pid in children.read_text().split() if children.exists() else ():
        try:
            if b"rock.cli.serve.member" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            pass
    return found


def _stat(pid: str) -> tuple[int, str, str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return int(fields[1]), name, fields[19]


def _processes(server: int, members: list[int]) -> Iterator[str]:
    """Descendants of the server, its launcher and its rocklet processes excepted, by pid and start time."""
    found = {int(p): s for p in os.listdir("/proc") if p.isdigit() and (s := _stat(p))}
    for pid, (_, name, start) in found.items():
        chain, at = [], pid
        while at in found and at != server:
            chain.append(at)
            at = found[at][0]
        if chain and chain[-1] in members:
            continue
        if at == server and len(chain) > 1 and name != "rock-nets":  # the launcher's own, which makes networks ahead
            yield f"process {pid} {name} {start}"


def _folders(home: Path) -> Iterator[str]:
    for part in ("run/records", "run/logs", "run/namespace", "run/process", "run/docker"):
        folder = home / part
        if folder.is_dir():
            names = (entry.name for entry in folder.iterdir() if entry.is_dir() or part == "run/records")
            # These folders are the runtime's own, made once.
            own = ("staging", "probe", "base", "connections", "snapshots")
            yield from (f"{part}/{name}" for name in names if name not in own)
            kept = folder / "snapshots"
            yield from (f"{part}/snapshots/{entry.name}" for entry in (kept.iterdir() if kept.is_dir() else ()))
    yield from _spools(home / "run" / "spools")


def _spools(folder: Path) -> Iterator[str]:
    """Those with something in them; empty ones wait for the next sandbox, a few of them."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    empty = [name for name in names if not any(map(_size, (folder / name).glob("*")))]
    yield from (f"spools {name}" for name in names if name not in empty)
    yield from (f"more than {_SPOOLS} empty spools: {name}" for name in empty[_SPOOLS:])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _cgroups(home: Path) -> Iterator[str]:
    run_dir = os.path.realpath(home / "run" / "namespace")
    parent = "rock-" + hashlib.sha256(run_dir.encode()).hexdigest()[:12]
    for root, folders, _ in os.walk("/sys/fs/cgroup"):
        if os.path.basename(root) == parent:
            yield from (f"cgroup {root}/{name}" for name in folders)
            folders[:] = []


def _mounts(home: Path) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if f"{home}/" in line:
            yield f"mount {line.split()[4]}"


def _is_empty_spool(path: Path) -> bool:
    return path.parent.parent.name == "spools" and _size(path) == 0


def _files(server: int) -> Iterator[str]:
    """Open files of the server that lie in a sandbox or are pipes; sockets belong to its clients."""
    try:
        for fd in os.listdir(f"/proc/{server}/fd"):
            target = os.readlink(f"/proc/{server}/fd/{fd}")
            if target.startswith("pipe:") or ("/run/" in target and not _is_empty_spool(Path(target))):
                yield f"open {target}"
    except OSError:
        return


def rocklet_process(parent: int, home: Path, number: int) -> int:
    """The pid of one of several rocklet processes: the one below `parent` that holds its lock."""
    name = str(home / "processes" / str(number) / "server.lock")
    for pid in members_of(parent):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == name:
                    return pid
            except FileNotFoundError:
                pass
    raise AssertionError(f"process {number} does not run")
