"""Control groups, version 1, version 2 and hybrid: detected by trial, one folder per controller and sandbox.

    <controller's tree>/<our own cgroup, or the root>/rock-<hash of run_dir>/<slot>

The parent belongs to one server, so remains of a crash are found by its name. Standard library only: the launcher uses
it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_WANTED = ("memory", "cpu", "pids", "cpuacct")
_PERIOD = 100_000  # microseconds
_CPUS = os.cpu_count() or math.inf
_CAPS = ("cpu.cfs_quota_us", "cpu.max")  # slow to write: the kernel visits all groups


@dataclass(frozen=True)
class Controller:
    """The location of one controller's groups: `parent` is the server's folder in its tree."""

    controller: str
    version: int
    parent: str


@dataclass(frozen=True)
class Cgroups:
    """The usable controllers, and the reasons for which others are unusable."""

    places: Mapping[str, Controller] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def folders(self, slot: str) -> dict[str, str]:
        """The folder of a sandbox per controller; with version 2 they are the same."""
        return {name: f"{place.parent}/{slot}" for name, place in self.places.items()}

    def version(self, controller: str) -> int | None:
        place = self.places.get(controller)
        return place.version if place else None

    def limits(self, slot: str, memory: int, cpus: float, weight: float, pids: int) -> list[tuple[str, str]]:
        """Files to write and their values, in order. memory in bytes, cpus a hard cap, weight the default share.

        A cap of all CPUs of the machine is none: for each change of a cap, the kernel visits the groups of all
        sandboxes.
        """
        files: list[tuple[str, str]] = []
        folders = self.folders(slot)
        if "memory" in folders:
            folder = folders["memory"]
            if self.version("memory") == 1:
                files += [(f"{folder}/memory.limit_in_bytes", str(memory)),
                          (f"{folder}/memory.memsw.limit_in_bytes", str(memory))]
            else:
                files += [(f"{folder}/memory.max", str(memory)), (f"{folder}/memory.swap.max", "0"),
                          (f"{folder}/memory.oom.group", "0")]
        if "cpu" in folders:
            folder, quota = folders["cpu"], max(1000, int(cpus * _PERIOD))
            unlimited = cpus >= _CPUS
            if self.version("cpu") == 1:
                files += [(f"{folder}/cpu.cfs_quota_us", "-1" if unlimited else str(quota)),
                          (f"{folder}/cpu.shares", str(max(2, int(weight * 1024))))]
            else:
                files += [(f"{folder}/cpu.max", f"{'max' if unlimited else quota} {_PERIOD}"),
                          (f"{folder}/cpu.weight", str(min(10_000, max(1, int(weight * 100)))))]
        if "pids" in folders:
            files.append((f"{folders['pids']}/pids.max", str(pids)))
        return files


def join(folders: list[str], pid: int) -> None:
    """Create these groups and move a process into them; its future children are counted as well."""
    for folder in dict.fromkeys(folders):
        try:
            os.mkdir(folder)
        except (FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
        write(f"{folder}/cgroup.procs", str(pid))


def write(path: str, value: str) -> None:
    """Write one value into a control file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def write_limits(files: list[tuple[str, str]]) -> None:
    """Write limits. memsw is missing without swap accounting, and must never be below the memory limit."""
    for path, value in files:
        optional = path.endswith(("memory.memsw.limit_in_bytes", "memory.swap.max", "memory.oom.group"))
        if path.endswith(_CAPS) and read_text(path).strip() == value:
            continue
        try:
            write(path, value)
        except OSError:
            if optional:
                continue
            if path.endswith("memory.limit_in_bytes"):  # raising it: memory plus swap goes first
                write(path.replace("memory.limit", "memory.memsw.limit"), value)
                write(path, value)
                continue
            raise


def read_text(path: str) -> str:
    """A control file's text; empty when the file is missing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 65536).decode()
    except OSError:
        return ""
    finally:
        os.close(fd)


def read_value(path: str) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def read_field(path: str, name: str) -> int | None:
    """The number of a line "name number" of a control file."""
    for line in read_text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None


def oom_kills(memory_folder: str) -> int:
    """How many processes the kernel killed for memory in a group; 0 when unreadable."""
    return (read_field(f"{memory_folder}/memory.oom_control", "oom_kill")
            or read_field(f"{memory_folder}/memory.events", "oom_kill") or 0)


def lift_cpus(folders: list[str]) -> None:
    """Remove a CPU limit of less than one CPU from these groups: a hundred killed processes that share a twentieth of a
    CPU take seconds to exit."""
    for folder in dict.fromkeys(folders):
        for name, value in zip(_CAPS, ("-1", "max"), strict=True):
            quota = read_text(f"{folder}/{name}").split()  # empty: of the other version, or of another controller
            if quota and quota[0].isdecimal() and int(quota[0]) < _PERIOD:
                with contextlib.suppress(OSError):
                    write(f"{folder}/{name}", value)


def remove_empty(folders: list[str]) -> bool:
    """Remove empty groups; False when one remains."""
    left = [folder for folder in dict.fromkeys(folders) if not _rmdir(folder)]
    return not left


def remove(folders: list[str], patience: float = 5.0) -> list[str]:
    """Kill the processes in these groups and remove them; returns the groups that could not be removed."""
    end = time.monotonic() + patience
    left = list(dict.fromkeys(folders))
    pause = 0.001
    while left:
        left = [folder for folder in left if not _rmdir(folder)]
        if not left or time.monotonic() > end:
            break
        for folder in left:
            _kill_members(folder)
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return left


def remove_parents(groups: Cgroups) -> None:
    """Remove the server's folders without sandboxes; `discover` creates them again."""
    for place in groups.places.values():
        _rmdir(place.parent)


def _rmdir(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _kill_members(folder: str) -> None:
    with contextlib.suppress(OSError):
        write(f"{folder}/cgroup.kill", "1")
        return
    for line in read_text(f"{folder}/cgroup.procs").split():
        with contextlib.suppress(OSError):
            os.kill(int(line), 9)


# ---- detection ----


def discover(run_dir: str) -> Cgroups:
    """Find a location for each controller by creating a group; the parents exist afterwards."""
    name = _name(run_dir)
    own = _own_groups()
    places: dict[str, Controller] = {}
    reasons: dict[str, str] = {}
    trees = _trees(_WANTED)
    for controller in _WANTED:
        if controller not in trees:
            continue
        version = trees[controller][2]
        for candidate in _candidates(trees[controller], controller, own):
            reason = _try_place(candidate, name, controller, version)
            if reason is None:
                places[controller] = Controller(controller, version, f"{candidate}/{name}")
                break
            reasons[controller] = reason
    for controller in ("memory", "cpu", "pids"):
        if controller not in places:
            reasons.setdefault(controller, "the kernel offers no such controller here")
    if "cpu" in places and places["cpu"].version == 2:
        places.pop("cpuacct", None)  # version 2 counts in cpu.stat
    return Cgroups(places, reasons)


def shared_folder(run_dir: str, controller: str) -> str | None:
    """The location of a version 1 group for all sandboxes together; None without the controller."""
    tree = _trees((controller,)).get(controller)
    if tree is None or tree[2] != 1:
        return None
    return f"{_candidates(tree, controller, _own_groups())[0]}/{_name(run_dir)}"


def _name(run_dir: str) -> str:
    return "rock-" + hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:12]


def _candidates(tree: tuple[str, str, int], controller: str, own: Mapping[str, str]) -> list[str]:
    """Candidate parents: the server's own group, and the root of the mounted hierarchy."""
    mount_point, root, version = tree
    path = own.get(controller if version == 1 else "", "/")
    inside = os.path.relpath(path, root) if path.startswith(root) else "."
    return list(dict.fromkeys(os.path.normpath(os.path.join(mount_point, part)) for part in (inside, ".")))


def _own_groups() -> dict[str, str]:
    """The server's own cgroup per version 1 controller; "" is that of version 2."""
    found = {}
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _trees(wanted: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """Mount point, its root within the hierarchy, and version, per controller."""
    found: dict[str, tuple[str, str, int]] = {}
    for line in _mountinfo():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if kind[0] == "cgroup":
            for option in kind[2].split(","):
                if option in wanted:
                    found.setdefault(option, (fields[4], fields[3], 1))
        elif kind[0] == "cgroup2":
            offered = read_text(f"{fields[4]}/cgroup.controllers").split()
            for controller in wanted:
                if controller in offered:
                    found.setdefault(controller, (fields[4], fields[3], 2))
    return found


def _mountinfo() -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return [line for line in lines if " - cgroup" in line]


def _try_place(candidate: str, name: str, controller: str, version: int) -> str | None:
    """None when a group with this controller can be created under `candidate`, else the reason."""
    parent = f"{candidate}/{name}"
    probe = f"{parent}/probe-{os.getpid()}"
    try:
        if version == 2 and controller not in read_text(f"{candidate}/cgroup.subtree_control").split():
            write(f"{candidate}/cgroup.subtree_control", f"+{controller}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent)
        if version == 2:
            write(f"{parent}/cgroup.subtree_control", f"+{controller}")
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as error:
        return f"{candidate}: {(error.strerror or str(error)).lower()}"
    return None
