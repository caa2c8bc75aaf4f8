"""The cgroups that an engine made for a container, as this machine sees them."""

from __future__ import annotations

from pathlib import Path

from rock.runtime.namespace import cgroups


def folders(pid: int) -> dict[str, str]:
    """Folder by controller ("memory", "cpu", "cpuacct", "pids") of a process; empty when it is gone."""
    mounts: dict[str, str] = {}
    unified = ""
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3 or fields[3] != "/":
            continue
        if kind[0] == "cgroup2":
            unified = unified or fields[4]
        elif kind[0] == "cgroup":
            mounts.update(dict.fromkeys(kind[2].split(","), fields[4]))
    found: dict[str, str] = {}
    for line in cgroups.read_text(f"/proc/{pid}/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers and unified:
            for name in cgroups.read_text(f"{unified}{path}/cgroup.controllers").split():
                found.setdefault(name, f"{unified}{path}")
        for name in controllers.split(","):
            if name in mounts:
                found[name] = f"{mounts[name]}{path}"
    return {name: folder for name, folder in found.items() if name in ("memory", "cpu", "cpuacct", "pids")}
