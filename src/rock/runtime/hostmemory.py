"""How much memory this machine has, how much of it is free, and whether programs wait for it."""

from __future__ import annotations

import time

_FRESH = 0.02  # seconds for which an answer holds: reading it takes the kernel 40 us, and creates come in bursts
_known = (float("-inf"), 0, 0)


def read() -> tuple[int, int]:
    """Bytes of memory that the machine has, and those that are available now; zeros where it does not tell."""
    global _known
    now = time.monotonic()
    if now - _known[0] > _FRESH:
        values = {"MemTotal": 0}
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                for line in lines:
                    key, _, rest = line.partition(":")
                    if key in ("MemTotal", "MemAvailable"):
                        values[key] = int(rest.split()[0]) << 10
                    if key == "MemAvailable":
                        break
        except OSError:
            pass
        _known = now, values["MemTotal"], values.get("MemAvailable", values["MemTotal"])
    return _known[1], _known[2]


def pressure() -> float | None:
    """Percent of the last ten seconds in which some program here waited for memory; None where the kernel does not
    tell. Of the control group that this process is held to, if it says so itself: a container is short before its
    machine is."""
    for path in ("/sys/fs/cgroup/memory.pressure", "/proc/pressure/memory"):
        try:
            with open(path, encoding="ascii") as lines:
                for line in lines:
                    kind, _, rest = line.partition(" ")
                    if kind == "some":
                        return float(rest.partition("avg10=")[2].partition(" ")[0])
        except (OSError, ValueError):
            continue
    return None
