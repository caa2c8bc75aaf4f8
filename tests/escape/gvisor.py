"""Level "gvisor": what its own kernel does for a program that the host's would not, and what it does not have.

There an attempt speaks to gVisor's kernel, a process of the host without rights. One that it answers is told as
"inside", where it is listed here: it reached nothing of the host, which each attempt's look from outside still checks.
"""

from __future__ import annotations

from collections.abc import Mapping

_ITS_KERNEL = "gVisor's own kernel answers the call; the host's never sees it"
_ITSELF = "it ends this sandbox alone, of which nothing is left on the host"
_KILLED = "its limit is held, and ends the sandbox as a whole: its kernel is one process of the host"
_MEMORY = (
    "of a program's own", "in files in memory (memfd)", "in shared mappings that are unmapped", "in System V segments",
    "in pipes", "in socket buffers", "by children without end", "that hides from the killer",
)  # fmt: skip
_ANSWERED = (
    "kernel: open /dev/net/tun", "kernel: open /dev/fuse", "identity: a realtime class for itself",
    "identity: an id beyond its range", "identity: be spared by the out-of-memory killer",
    "identity: limits, CPUs and priority of pid 1",
)  # fmt: skip
_ENDED = (
    "identity: pid 1: kill, stop, debug", "resources: daemons that ignore every signal, killed",
    "protocol: more programs than processes",
)  # fmt: skip
INSIDE: Mapping[str, str] = {
    **dict.fromkeys(_ANSWERED, _ITS_KERNEL),
    **dict.fromkeys(_ENDED, _ITSELF),
    **dict.fromkeys((f"resources: memory {what}" for what in _MEMORY), _KILLED),
    "identity: pid 1: memory, descriptors, root, environment": "pid 1 can be read by root inside: it holds no secret",
    "files: overwrite the running program (/proc/self/exe)": "the sandbox's own copy of the program is written",
    "resources: thread bomb": "threads inside are not the host's, whose processes the cgroup holds; `pids` does not "
                              "count them",
}  # fmt: skip
_TERMINALS = "it has no terminals"
ABSENT: Mapping[str, str] = {
    "kernel: TIOCSTI: type into a terminal": _TERMINALS,
    "kernel: TIOCSTI with high bits set": _TERMINALS,
    "kernel: TIOCLINUX: paste into a console": _TERMINALS,
    "kernel: TIOCSETD: load a line discipline": _TERMINALS,
    "identity: capabilities over the host": "its /proc tells no ambient capabilities, by which the attempt looks",
    "resources: fill the disk and its inodes": "disk= is refused before the start",
}
