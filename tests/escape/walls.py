"""Mutation testing of the isolation: remove each wall in turn, and require that an attempt to escape notices.

    python -m tests.escape.walls                  every wall; fails if one can go unnoticed
    python -m tests.escape.walls --only NAME      walls whose name has this in it
    python -m tests.escape.walls --write          write the table of docs/security.md too

A wall is removed by a change of the source in a temporary copy of the package, from which a runner starts the runtime
and its launcher. The product has no switch for it. Attempts that the wall concerns, and all looks at the state of the
walls (state.py), run in sandboxes of that copy; the same attempts must be blocked in an unchanged copy. A sandbox that
cannot be started without the wall counts as noticed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.escape.catalogue import BY_KEY
from tests.escape.levels import PAGE, RunnerFailed, run_level

BEGIN, END = "<!-- walls: made by `make walls` -->", "<!-- end of the walls -->"
SHORT = ("filter: all of it", "mounts: nosuid of the root", "host name: UTS namespace", "pid 1: bounding set")
_AT_ONCE = 2
_SPACE = "runtime/namespace"
_MAKE, _LIMIT = f"{_SPACE}/launcher", f"{_SPACE}/limits"


@dataclass(frozen=True)
class Wall:
    """One wall. file: of the package. old, new: what is there once, and what it becomes. attempts: parts of names of
    attempts that should notice, beside those of the state. needs: why this machine does not have the wall, or "".
    also: further files with their texts, where it is put up twice."""

    name: str
    file: str
    old: str
    new: str
    attempts: tuple[str, ...] = ()
    level: str = "namespaces"
    needs: Callable[[], str] = str
    also: tuple[tuple[str, str, str], ...] = ()

    def remove(self, package: Path) -> None:
        """Change the copy of the package. ValueError when the source has another form by now."""
        for name, old, new in ((self.file, self.old, self.new), *self.also):
            path = package / name
            text = path.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {name} has the text to replace {text.count(old)} times: {old!r}; "
                                 "adapt tests/escape/walls.py")
            changed = text.replace(old, new)
            compile(changed, name, "exec")  # a mistake here must not look like a wall that was noticed
            path.write_text(changed)


def _no_x32() -> str:
    if platform.machine() != "x86_64":
        return "x32 is an interface of x86_64"
    call = ctypes.CDLL(None, use_errno=True).syscall
    return "" if call(ctypes.c_long(0x40000000 | 39)) >= 0 else "this kernel has no x32"


def _version_1() -> str:
    folder = "/sys/fs/cgroup/devices"
    return "" if os.path.exists(f"{folder}/devices.list") or os.path.exists(f"{folder}/tasks") else \
        "no version 1 control group for devices"


def _filter(name: str, old: str, new: str, *attempts: str, **options: Any) -> Wall:
    return Wall(f"filter: {name}", f"{_MAKE}/seccomp.py", old, new, attempts, **options)


def _init(name: str, old: str, new: str, *attempts: str, **options: Any) -> Wall:
    return Wall(name, f"{_MAKE}/child_setup.py", old, new, attempts, **options)


def _mounts(name: str, old: str, new: str, *attempts: str, **options: Any) -> Wall:
    return Wall(f"mounts: {name}", f"{_MAKE}/mounts.py", old, new, attempts, **options)


def _space(name: str, flag: str, *attempts: str) -> Wall:
    old = f" | kernel.{flag}" if flag != "CLONE_NEWNS" else "kernel.CLONE_NEWNS | "
    line = ("_ALL = (kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS"
            " | kernel.CLONE_NEWNET)")
    return Wall(name, f"{_MAKE}/launcher.py", line, line.replace(old, ""), attempts)


_UNSHARE = '''"unshare": _refuse_flags(0, _NEW_NAMESPACES | _CLONE_NEWTIME),'''
_QUIET = "_QUIET = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC"
_OVERLAY = '"overlay", target, "overlay", kernel.MS_NOSUID | kernel.MS_NODEV, text)'
_PROC = "attributes = kernel.ATTR_NOSUID | kernel.ATTR_NODEV | kernel.ATTR_NOEXEC"
_REPEATED = "kernel.set_attributes(fd, _SAFE | kernel.ATTR_NOEXEC | kernel.ATTR_RDONLY)"
_SYS = 'kernel.mount("sysfs", target, "sysfs", _QUIET | kernel.MS_RDONLY)'
_CAPABILITY_WORDS = "low, high = CAPABILITIES & 0xFFFFFFFF, CAPABILITIES >> 32"
_PUBLIC = '"overlay", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, options)'
_IDS_OF_INIT = 'rows += [("user", (number["setresgid"], 0, 0, 0)), ("user", (number["setresuid"], 0, 0, 0))]'
_ENTERED = 'rows.append(("user namespace", (number["setns"], fds.userns, kernel.CLONE_NEWUSER)))'
_ROOT = ',\n             ("root folder", (number["setns"], 0, kernel.CLONE_NEWNS))'
_PEER = "if uid != self.uid or (self.outside and pid != 0) or"

WALLS: list[Wall] = [
    Wall("filter: all of it", f"{_MAKE}/launcher.py", 'seccomp.build() if seccomp.supported() else b""', 'b""',
         ("kernel: ptrace: be traced", "kernel: io_uring_setup")),
    _filter("programs for other machines", "_ret(_KILL), _load(_NR)]", "_ret(_ALLOW), _load(_NR)]", "int 0x80"),
    _filter("x32", "code += [(_JGE, 0, 1, _X32), _refuse(errno.ENOSYS)]", "code += []", "of x32", needs=_no_x32),
    _filter("calls that no list has, clone3", "unknown: Code = [_refuse(errno.ENOSYS)]",
            "unknown: Code = [_ret(_ALLOW)]", "kernel: clone3", "no list has"),
    _filter("calls of the list of refused ones", "verdicts[number] = [_refuse()]", "verdicts[number] = [_ret(_ALLOW)]",
            "kernel: userfaultfd", "kernel: add_key"),
    _filter("clone with new namespaces", '"clone": _refuse_flags(0, _NEW_NAMESPACES),', "", "clone: a new"),
    _filter("unshare with new namespaces", _UNSHARE, "", "unshare: a new", "unshare: a time"),
    _filter("devices made by mknod", "*_refuse_values((0o020000, 0o060000)), ", "", "mknod of a disk"),
    _filter("families of sockets", "*netlink, _refuse(errno.EAFNOSUPPORT)]", "*netlink, _ret(_ALLOW)]", "AF_ALG",
            "AF_VSOCK", "AF_PACKET"),
    _filter("protocols of netlink", "netlink = [_load(_argument(2)), *_allow_values((0,)), unknown]",
            "netlink = [_ret(_ALLOW)]", "netlink: netfilter"),
    _filter("protocols of internet sockets", "internet = [_load(_argument(2)), *_allow_values(_PROTOCOLS), unknown]",
            "internet = [_ret(_ALLOW)]"),
    _filter("ioctls of terminals", "*_refuse_values(_TERMINAL_IOCTLS), ", "", "TIOCSTI", "TIOCSETD"),
    _filter("personalities", "*_allow_values(_PERSONALITIES), _refuse()]", "_ret(_ALLOW)]", "personality:"),
    _filter("limits of pid 1", '"prlimit64": [_load(_argument(0)), (_JEQ, 1, 0, _PID_1),',
            '"prlimit64": [_ret(_ALLOW), (_JEQ, 1, 0, _PID_1),', "limits, CPUs and priority of pid 1"),
    _filter("CPUs of pid 1", 'mine: Code = [_load(_argument(0)), *_refuse_values((_PID_1,)), _ret(_ALLOW)]',
            "mine: Code = [_ret(_ALLOW)]", "limits, CPUs and priority of pid 1"),

    _init("pid 1: bounding set", "if not CAPABILITIES >> capability & 1]", "if capability < 0]"),
    _init("pid 1: capabilities", _CAPABILITY_WORDS, "low, high = 0xFFFFFFFF, (1 << LAST_CAPABILITY - 31) - 1",
          "identity: capabilities over the host"),
    _init("pid 1: no_new_privs", '("no new privileges", (number["prctl"], _PR_SET_NO_NEW_PRIVS, 1)),', "",
          "no_new_privs taken back"),
    _init("pid 1: not to be dumped", "_PR_SET_DUMPABLE, 0)),", "_PR_SET_DUMPABLE, 1)),", "identity: pid 1: memory",
          also=(("guest/init/pid1.py", "syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)",
                 "syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)"),)),
    _init("pid 1: descriptors of the launcher closed",
          "calls.append((_CLOSE_RANGE, lowest, _LAST_FD))\n    return calls", "return calls[:4]"),
    _init("pid 1: ids of its own", _IDS_OF_INIT, "", "identity: an id beyond"),
    Wall("pid 1: answers the server's user alone", "guest/init/pid1.py", _PEER, "if (self.outside and pid != 0) or",
         ("pid 1 called by",)),
    Wall("pid 1: answers nobody inside", "guest/init/pid1.py", _PEER, "if uid != self.uid or", ("pid 1 called by",)),
    Wall("pid 1: no core files", "guest/init/pid1.py", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "pass",
         ("kernel: a core file",)),

    _mounts("nosuid of the root", _OVERLAY, _OVERLAY.replace("kernel.MS_NOSUID | ", "")),
    _mounts("nodev of the root", _OVERLAY, _OVERLAY.replace(" | kernel.MS_NODEV", "")),
    _init("mounts: nosuid of /proc", _PROC, _PROC.replace("kernel.ATTR_NOSUID | ", "")),
    _init("mounts: nodev of /proc", _PROC, _PROC.replace(" | kernel.ATTR_NODEV", "")),
    _init("mounts: noexec of /proc", _PROC, _PROC.replace(" | kernel.ATTR_NOEXEC", "")),
    _mounts("nosuid of /sys and /dev/shm", _QUIET, _QUIET.replace("kernel.MS_NOSUID | ", "")),
    _mounts("nodev of /sys and /dev/shm", _QUIET, _QUIET.replace(" | kernel.MS_NODEV", "")),
    _mounts("noexec of /sys", _QUIET, _QUIET.replace(" | kernel.MS_NOEXEC", "")),
    _mounts("noexec of terminals", "kernel.MS_NOSUID | kernel.MS_NOEXEC, terminals)", "kernel.MS_NOSUID, terminals)"),
    _mounts("nosuid of devices", "kernel.set_attributes(device, kernel.ATTR_NOSUID)", "pass"),
    _mounts("/dev is read-only", "| kernel.MS_RDONLY | kernel.MS_NOSUID\n                 | kernel.MS_NODEV)",
            "| kernel.MS_NOSUID\n                 | kernel.MS_NODEV)"),
    _mounts("/sys is read-only", _SYS, _SYS.replace(" | kernel.MS_RDONLY", ""), "kernel: write to /sys"),
    _mounts("settings of the kernel are read-only", _REPEATED, _REPEATED.replace(" | kernel.ATTR_RDONLY", ""),
            "kernel: write settings"),
    _mounts("files of /proc are masked", '(("/dev/null", _MASKED_FILES), (_EMPTY', '(("/dev/null", ()), (_EMPTY',
            "open /proc/kcore"),
    _mounts("folders of /proc and /sys are masked", '_MASKED_FILES), (_EMPTY, _MASKED_FOLDERS))', "_MASKED_FILES),)"),
    _mounts("the server's Python is read-only", _PUBLIC, _PUBLIC.replace("kernel.MS_RDONLY | ", "")),
    _mounts("its path is not in the mount table", 'if bind.get("unnamed"):', "if False:"),
    _mounts("files for root alone in /usr", 'lower = f"p{index}"\n', 'lower = f"b{index}"\n', "root alone"),
    _mounts("the old root is let go", 'kernel.umount(".", kernel.MNT_DETACH)', "pass",
            "files: a file of the host by ..", "files: the working folder"),

    _init("mounts: the root is the sandbox's", _ROOT, "", "files: a file of the host by its path"),

    _init("user namespace", _ENTERED, "pass"),
    _space("mount namespace", "CLONE_NEWNS"),
    _space("pid namespace", "CLONE_NEWPID", "identity: signal a process"),
    _space("IPC namespace", "CLONE_NEWIPC", "System V segment of", "message queue of"),
    _space("host name: UTS namespace", "CLONE_NEWUTS"),
    _space("network namespace", "CLONE_NEWNET", "network: the host's loopback, IPv4"),
    _init("cgroup namespace", "if _HAS_CGROUPS:", "if False:"),
    Wall("a range of ids for each sandbox", f"{_SPACE}/records.py", "userns.IDS.size * (self._first + number)",
         "userns.IDS.size * self._first + number"),
    Wall("an account for each user namespace", f"{_MAKE}/userns.py", "os.seteuid(creator)", "os.seteuid(own)"),
    Wall("resource limits", f"{_MAKE}/furnish.py", 'for name, value in spec["rlimits"]:', "for name, value in []:"),

    Wall("control groups: membership", f"{_MAKE}/furnish.py", 'cgroups.join(spec["cgroups"], pid)',
         'for folder in spec["cgroups"]:\n        os.makedirs(folder, exist_ok=True)'),
    *(Wall(f"control groups: {name}", f"{_LIMIT}/cgroups.py", f'if "{controller}" in folders:', "if False:")
      for name, controller in (("memory", "memory"), ("CPU", "cpu"), ("processes", "pids"))),
    Wall("control groups: devices", f"{_LIMIT}/devices.py", 'cgroups.write(f"{folder}/devices.deny", "a")', "return",
         needs=_version_1),
    Wall("control groups: sandboxes are in the group of devices", f"{_LIMIT}/devices.py",
         'cgroups.write(f"{folder}/cgroup.procs", "0")', "pass", needs=_version_1),

    Wall("nat: the host's own addresses", "egress/policy.py",
         'egress.closed(address) or ("host\'s own" if own else None)', "egress.closed(address)",
         ("an address of the host, with",)),
    Wall("nat: nothing past the proxy", f"{_MAKE}/isolated_network.py", 'table.rule("out", nftables.refuse())',
         'table.rule("out", nftables.verdict(nftables.ACCEPT))', ("packets past the proxy",)),

    Wall("landlock: files", "runtime/landlock/parent.py", "rules.allow(ruleset.READ, options[\"readable\"])",
         "rules.allow(ruleset.READ, [\"/\"])", ("files: a file of the host by its path",), "landlock"),
    Wall("landlock: all rules", "runtime/landlock/parent.py", "rules.enforce()",
         "syscalls.prctl(38, 1)", ("files: a file of the host by its path", "identity: signal"), "landlock"),
    Wall("landlock: filter", "runtime/landlock/parent.py",
         '_filter(seccomp.build(shared=True, sockets=options["network"] == "host"))', "pass",
         ("network: an abstract unix", "kernel: ptrace: be traced"), "landlock"),
    Wall("landlock: a user of its own", "runtime/landlock/parent.py", "os.setresuid(own, own, own)", "pass",
         ("identity: read the environment",), "landlock"),
    Wall("landlock: no System V IPC", f"{_MAKE}/seccomp.py",
         "**{name: [_refuse()] for name in syscall_list.IPC | syscall_list.INOTIFY},", "",
         ("System V segment of the host", "message queue of the host"), "landlock"),

    Wall("userns: counters of each sandbox", f"{_LIMIT}/counters.py",
         "name: max(1, int(value * _ONE_SANDBOX)) for name, value in self._settings.items()}",
         "name: value for name, value in self._settings.items()}", (), "userns"),
    _init("userns: cgroup namespace", "if _HAS_CGROUPS:", "if False:", level="userns"),
    Wall("userns: filter", f"{_MAKE}/launcher.py", 'seccomp.build() if seccomp.supported() else b""', 'b""',
         ("kernel: io_uring_setup",), "userns"),
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of one wall. noticed: names of attempts. why: in place of them, or ""."""

    wall: Wall
    noticed: tuple[str, ...]
    why: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.noticed or self.why)


def _patterns(walls: Sequence[Wall]) -> list[str]:
    return ["state:", *dict.fromkeys(pattern for wall in walls for pattern in wall.attempts)]


def _let_through(told: Mapping[str, Any], level: str) -> dict[str, str]:
    """Attempts that were not blocked, and what they told."""
    return {key: f"{word}: {detail}" for key, (word, detail) in told["results"].items()
            if word in ("open", "broken") and level not in BY_KEY[key].open_at}


def baseline(level: str, walls: Sequence[Wall]) -> dict[str, str]:
    """Attempts that notice something in an unchanged copy; {"level": why} when the level is not to be had."""
    told = run_level(level, _patterns(walls), change=lambda package: None)
    return {"level": told["unsupported"]} if "unsupported" in told else _let_through(told, level)


def without(wall: Wall) -> Result:
    """Run the attempts without a wall."""
    if why := wall.needs():
        return Result(wall, (), f"not there: {why}")
    try:
        told = run_level(wall.level, _patterns([wall]), change=wall.remove)
    except RunnerFailed as error:
        if "rock.errors." not in str(error):
            raise
        return Result(wall, (), f"no sandbox starts ({str(error).strip().splitlines()[-1].partition(': ')[2][:80]})")
    if "unsupported" in told:
        reason = told["unsupported"].partition("namespaces: ")[2] or told["unsupported"]
        return Result(wall, (), f"no sandbox starts ({reason.partition(';')[0][:80]})")
    return Result(wall, tuple(_let_through(told, wall.level)))


def run(walls: Sequence[Wall], tell: Callable[[Result, float], None] = lambda result, seconds: None) -> list[Result]:
    """Every wall, a few at once. AssertionError when an attempt succeeds with all walls in place."""
    levels = dict.fromkeys(wall.level for wall in walls)
    missing = {}
    for level in levels:
        found = baseline(level, [wall for wall in walls if wall.level == level])
        if "level" in found:
            missing[level] = found["level"]
        elif found:
            raise AssertionError(f"with all walls in place, level {level}: {found}")

    def one(wall: Wall) -> Result:
        began = time.monotonic()
        result = Result(wall, (), f"not there: {missing[wall.level]}") if wall.level in missing else without(wall)
        tell(result, time.monotonic() - began)
        return result

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, walls))


def _words(result: Result) -> str:
    if not result.noticed:
        return result.why or "NOTHING"
    shown = [key.replace("|", "\\|") for key in result.noticed[:2]]
    return "; ".join(shown) + (f"; {len(result.noticed) - 2} more" if len(result.noticed) > 2 else "")


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = ["| wall that is removed | level | noticed by |", "|---|---|---|"]
    lines += [f"| {result.wall.name} | `{result.wall.level}` | {_words(result)} |" for result in results]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="walls whose name has this in it")
    parser.add_argument("--write", action="store_true", help="write the table into docs/security.md")
    given = parser.parse_args()
    walls = [wall for wall in WALLS if given.only in wall.name]
    began = time.monotonic()
    results = run(walls, lambda result, seconds: print(
        f"{'ok' if result.passed else 'UNNOTICED':9} {result.wall.level:10} {result.wall.name:52} {seconds:5.1f} s  "
        f"{_words(result)}", flush=True))
    bad = [result.wall.name for result in results if not result.passed]
    print(f"{len(results)} walls, {len(bad)} unnoticed{': ' + ', '.join(bad) if bad else ''}; "
          f"{time.monotonic() - began:.0f} s")
    if given.write and not bad and not given.only:
        page = PAGE.read_text()
        head, _, rest = page.partition(BEGIN)
        machine = f"Linux {os.uname().release.split('-')[0]}, {os.uname().machine}"
        PAGE.write_text(f"{head}{BEGIN}\n\nMade on {machine}; {len(results)} walls.\n\n{table(results)}\n\n"
                        f"{END}{rest.partition(END)[2]}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
