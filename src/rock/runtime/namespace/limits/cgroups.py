"""Control groups, version 1, version 2 and both at once: found by trying, one folder a controller and sandbox.

    <controller's tree>/<our own cgroup, or the root>/rock-<hash of run_dir>/<slot>

The parent is ours alone, so what a crash left behind is found by its name. Standard library only: the
launcher uses it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_WANTED = ("memory", "cpu", "pids", "cpuacct")
_PERIOD = 100_000  # microseconds


@dataclass(frozen=True)
class Controller:
    """Where one controller's groups are made: `parent` is our folder in its tree."""

    controller: str
    version: int
    parent: str


@dataclass(frozen=True)
class Cgroups:
    """The controllers that can be used here, and why the others cannot."""

    places: Mapping[str, Controller] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def folders(self, slot: str) -> dict[str, str]:
        """The folder of a sandbox by controller; with version 2 they are one."""
        return {name: f"{place.parent}/{slot}" for name, place in self.places.items()}

    def version(self, controller: str) -> int | None:
        place = self.places.get(controller)
        return place.version if place else None

    def limits(self, slot: str, memory: int, cpus: float, weight: float, pids: int) -> list[tuple[str, str]]:
        """Files to write and their values, in order. memory in bytes, cpus a hard cap, weight its usual share."""
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
            if self.version("cpu") == 1:
                files += [(f"{folder}/cpu.cfs_quota_us", str(quota)),
                          (f"{folder}/cpu.shares", str(max(2, int(weight * 1024))))]
            else:
                files += [(f"{folder}/cpu.max", f"{quota} {_PERIOD}"),
                          (f"{folder}/cpu.weight", str(min(10_000, max(1, int(weight * 100)))))]
        if "pids" in folders:
            files.append((f"{folders['pids']}/pids.max", str(pids)))
        return files


def join(folders: list[str], pid: int) -> None:
    """Make these groups and put a process into them; the kernel counts what it starts as well."""
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
    """Write limits. memsw is missing without swap accounting, and cannot be under the memory limit meanwhile."""
    for path, value in files:
        optional = path.endswith(("memory.memsw.limit_in_bytes", "memory.swap.max", "memory.oom.group"))
        try:
            write(path, value)
        except OSError:
            if optional:
                continue
            if path.endswith("memory.limit_in_bytes"):  # raising it: the sum with swap goes first
                write(path.replace("memory.limit", "memory.memsw.limit"), value)
                write(path, value)
                continue
            raise


def read_text(path: str) -> str:
    """A control file's text; empty when it is not there."""
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
    """A line "name number" of a control file."""
    for line in read_text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None


def oom_kills(memory_folder: str) -> int:
    """How many processes the kernel killed for memory in a group; 0 when it cannot be read."""
    return (read_field(f"{memory_folder}/memory.oom_control", "oom_kill")
            or read_field(f"{memory_folder}/memory.events", "oom_kill") or 0)


def lift_cpus(folders: list[str]) -> None:
    """Let what is left in these groups have all the time it wants: a hundred killed processes that share a twentieth
    of a CPU take seconds to end."""
    for folder in dict.fromkeys(folders):
        for name, value in (("cpu.cfs_quota_us", b"-1"), ("cpu.max", b"max")):
            try:
                fd = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            except OSError:  # of the other version, or of another controller
                continue
            with contextlib.suppress(OSError):
                os.write(fd, value)
            os.close(fd)


def remove_empty(folders: list[str]) -> bool:
    """Remove groups in which nothing is left; False when one stays."""
    left = [folder for folder in dict.fromkeys(folders) if not _rmdir(folder)]
    return not left


def remove(folders: list[str], patience: float = 5.0) -> list[str]:
    """Kill what is left in these groups and remove them; answers those that could not be removed."""
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
    """Remove our own folders where no sandbox is left in them; `discover` makes them again."""
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


# ---- finding out what can be used ----


def discover(run_dir: str) -> Cgroups:
    """Find for each controller a place where groups can be made, by making one; the parents exist afterwards."""
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
    """Where a version 1 group for all sandboxes together is to be; None where the controller is not there."""
    tree = _trees((controller,)).get(controller)
    if tree is None or tree[2] != 1:
        return None
    return f"{_candidates(tree, controller, _own_groups())[0]}/{_name(run_dir)}"


def _name(run_dir: str) -> str:
    return "rock-" + hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:12]


def _candidates(tree: tuple[str, str, int], controller: str, own: Mapping[str, str]) -> list[str]:
    """Folders in which ours may be made: our own group's, and the root of what is mounted."""
    mount_point, root, version = tree
    path = own.get(controller if version == 1 else "", "/")
    inside = os.path.relpath(path, root) if path.startswith(root) else "."
    return list(dict.fromkeys(os.path.normpath(os.path.join(mount_point, part)) for part in (inside, ".")))


def _own_groups() -> dict[str, str]:
    """Our own cgroup by version 1 controller; "" is that of version 2."""
    found = {}
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _trees(wanted: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """Mount point, its root within the hierarchy, and version, by controller."""
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
    """None when a group with this controller can be made under `candidate`, else why not."""
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
