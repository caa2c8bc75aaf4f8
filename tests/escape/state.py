"""The state of each wall, read from inside and from outside: what a sandbox has, apart from what an attack can do.

An attack can be stopped by a second wall after the first one is gone. These checks look at each wall by itself, so
that `make walls` notices when one is missing. The expected values are written out here, and are not imported from the
product.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rock.guest.init import process_tree
from tests.escape.attempt import Attempt, Host
from tests.runtime.boxes import Box, until_line

THEME = "state"
KEPT = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10, 18))
NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
_NS_GET_OWNER_UID = 0xB704
_NO_NAMESPACES = "it has no namespaces, mounts and cgroups of its own"
_OWN_KERNEL = "its programs see gVisor's own kernel, not the host's"
_ABSENT = {"landlock": _NO_NAMESPACES, "gvisor": _OWN_KERNEL}


def _pid(box: Box) -> int:
    """pid 1's number on the host."""
    return int(box.handle.data.get("init", box.handle.data["pid"]))


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _told(wrong: list[str]) -> str:
    return f"open: {'; '.join(wrong)}" if wrong else "blocked: as it should be"


def _look(name: str, look: Callable[[Host, Box], Awaitable[list[str]]], **options: Any) -> Attempt:
    """A look from outside; `look` answers what is wrong."""

    async def act(host: Host, box: Box) -> str:
        return _told(await look(host, box))

    return Attempt(THEME, name, act=act, shared=True, **options)


def _inside(name: str, program: str, **options: Any) -> Attempt:
    """A look from inside; `program` fills the list `wrong`."""
    text = "wrong = []\n" + program.strip("\n") + "\nopened(*wrong) if wrong else blocked('as it should be')\n"
    return Attempt(THEME, name, text, shared=True, **options)


# ---- rights of processes


async def _rights_of_init(host: Host, box: Box) -> list[str]:
    status = _status(_pid(box))
    wrong = [f"{name} {status[name]}" for name in ("CapPrm", "CapEff") if int(status[name], 16) & ~KEPT]
    wrong += [f"{name} {status[name]}" for name in ("CapInh", "CapAmb") if int(status[name], 16)]
    return wrong


async def _bounding_set_of_init(host: Host, box: Box) -> list[str]:
    status = _status(_pid(box))
    return [f"CapBnd {status['CapBnd']}"] if int(status["CapBnd"], 16) & ~KEPT else []


async def _no_new_privs_of_init(host: Host, box: Box) -> list[str]:
    return [] if _status(_pid(box)).get("NoNewPrivs") == "1" else ["pid 1 may gain privileges"]


async def _filter_of_init(host: Host, box: Box) -> list[str]:
    status = _status(_pid(box))
    if status.get("Seccomp") != "2" or int(status.get("Seccomp_filters", "1")) < 1:
        return [f"mode {status.get('Seccomp')}, {status.get('Seccomp_filters')} filters"]
    return []


async def _dumpable(host: Host, box: Box) -> list[str]:
    """The kernel gives the files of /proc/PID to root of the user namespace that a process began in, once it may not be
    dumped."""
    own, found = os.geteuid(), os.stat(f"/proc/{_pid(box)}/environ").st_uid
    return [] if found == 0 and (own != 0 or found != _owner_of(box)) else [f"its files in /proc belong to {found}"]


def _owner_of(box: Box) -> int:
    return int(_status(_pid(box))["Uid"].split()[0])


_STATUS = "status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)"

RIGHTS = [
    _look("capabilities of pid 1", _rights_of_init, absent={"gvisor": _OWN_KERNEL}),
    _look("bounding set of pid 1", _bounding_set_of_init,
          absent={"gvisor": _OWN_KERNEL, "landlock": "no_new_privs holds it"}),
    _inside("capabilities of programs", f"""
{_STATUS}
wrong += [name + ' ' + status[name].strip() for name in ('CapPrm', 'CapEff') if int(status[name], 16) & ~{KEPT:#x}]
wrong += [name for name in ('CapInh', 'CapAmb') if int(status[name], 16)]
""", absent={"gvisor": _OWN_KERNEL}),
    _inside("bounding set of programs", f"""
{_STATUS}
if int(status['CapBnd'], 16) & ~{KEPT:#x}: wrong.append(status['CapBnd'].strip())
""", absent={"gvisor": _OWN_KERNEL, "landlock": "no_new_privs holds it"}),
    _look("no_new_privs of pid 1", _no_new_privs_of_init, absent={"gvisor": _OWN_KERNEL}),
    _inside("no_new_privs of programs", f"{_STATUS}\nif status['NoNewPrivs'].strip() != '1': wrong.append('off')",
            absent={"gvisor": _OWN_KERNEL}),
    _look("pid 1 cannot be dumped", _dumpable, absent={"gvisor": _OWN_KERNEL}),
    _look("system call filter of pid 1", _filter_of_init, absent={"gvisor": _OWN_KERNEL}),
    _inside("system call filter of programs", f"""
{_STATUS}
if status['Seccomp'].strip() != '2': wrong.append('mode ' + status['Seccomp'].strip())
""", absent={"gvisor": _OWN_KERNEL}),
    _inside("refusals come from the filter", """
# Arguments for which the kernel itself would answer otherwise.
def expect(what, number, action):
    try: action()
    except OSError as error:
        if error.errno != number: wrong.append(what + ' ' + name_of(error))
    else: wrong.append(what)
expect('families', errno.EAFNOSUPPORT, lambda: socket.socket(17, 3, 0x300))
expect('protocols', errno.EPROTONOSUPPORT, lambda: socket.socket(2, 3, 255))
expect('netlink', errno.EPROTONOSUPPORT, lambda: socket.socket(16, 3, 9))
expect('devices', errno.EPERM, lambda: os.mknod('/no-such-folder/x', 0o20600, os.makedev(1, 3)))
""", absent={"gvisor": _OWN_KERNEL, "landlock": "it refuses all sockets but pairs"}),
]


# ---- mounts

_TABLE = r"""
mounts = []
for line in open('/proc/self/mountinfo'):
    left, _, right = line.partition(' - ')
    fields = left.split()
    # where, root within its file system, flags, type, options
    mounts.append((fields[4], fields[3], set(fields[5].split(',')), right.split()[0], right.split()[2]))
DEVICES = {'/dev/' + name for name in ('null', 'zero', 'full', 'random', 'urandom', 'tty', 'pts')}
MASKED = ('/proc/kcore', '/proc/keys', '/proc/timer_list', '/proc/sched_debug', '/proc/latency_stats', '/proc/acpi',
          '/proc/scsi', '/sys/firmware', '/sys/fs/selinux')
FIXED = ('/proc/sys', '/proc/sysrq-trigger', '/proc/irq', '/proc/bus', '/proc/fs', '/sys', '/dev')
QUIET = ('/proc', '/proc/sys', '/proc/irq', '/proc/bus', '/proc/fs', '/sys', '/dev/pts')
WRITABLE = {'/', '/usr', '/proc', '/dev/pts', '/dev/shm'}
by_path = {mount[0]: mount for mount in mounts}
def covered(path):  # the mask of a file is a device, so its mount has devices
    return path in MASKED
"""
_BENEATH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def do(result):
    if result: sys.exit(os.strerror(ctypes.get_errno()))
NEWNS, DETACH = 0x20000, 2
do(libc.setns(os.pidfd_open(int(sys.argv[1])), NEWNS))
do(libc.unshare(NEWNS))  # a copy, in which the root of the sandbox is removed
do(libc.umount2(b"/", DETACH))
do(libc.setns(os.pidfd_open(os.getpid()), NEWNS))
print(*[os.path.join(folder, name) for folder, names, files in os.walk("/") for name in names + files][:10])
"""


async def _beneath(host: Host, box: Box) -> list[str]:
    """What the root of the sandbox covers in its mount namespace: one empty folder."""
    command = [sys.executable, "-I", "-c", _BENEATH, str(_pid(box))]
    found = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    return [] if found.stdout == "/host\n" else [f"below its root: {found.stdout} {found.stderr}"]


MOUNTS = [
    _look("nothing is below the root", _beneath, root=True,
          absent={**_ABSENT, "userns": "only root can look below it"}),
    _inside("every mount is nosuid", _TABLE + "wrong += [m[0] for m in mounts if 'nosuid' not in m[2]]",
            absent=_ABSENT),
    _inside("every mount is nodev, but the six devices and the terminals", _TABLE + """
wrong += [m[0] for m in mounts if 'nodev' not in m[2] and m[0] not in DEVICES
          and not (covered(m[0]) and m[1] == '/null')]
""", absent=_ABSENT),
    _inside("the devices are single files and terminals of its own", _TABLE + """
wrong += [m[0] for m in mounts if m[0] in DEVICES and m[0] != '/dev/pts' and m[1] != '/' + m[0][5:]]
if by_path.get('/dev/pts', ('',) * 4)[3] != 'devpts': wrong.append('/dev/pts')
names = set(os.listdir('/dev')) - {'core', 'fd', 'stdin', 'stdout', 'stderr', 'ptmx', 'shm', 'mqueue'}
wrong += sorted(names - {path[5:] for path in DEVICES})
""", absent=_ABSENT),
    _inside("/proc, /sys and the terminals are noexec", _TABLE + """
wrong += [path for path in QUIET if path in by_path and 'noexec' not in by_path[path][2]]
""", absent=_ABSENT),
    _inside("/dev, /sys and settings of the kernel are read-only", _TABLE + """
wrong += [path for path in FIXED if os.path.exists(path) and (path not in by_path or 'ro' not in by_path[path][2])]
""", absent=_ABSENT),
    _inside("nothing else can be written", _TABLE + """
wrong += [m[0] for m in mounts if 'ro' not in m[2] and m[0] not in WRITABLE | DEVICES and not covered(m[0])]
""", absent=_ABSENT),
    _inside("secrets of /proc and /sys are masked", _TABLE + """
for path in MASKED:
    if not os.path.lexists(path): continue
    if path not in by_path: wrong.append(path + ' has no mask')
    elif os.path.isdir(path) and os.listdir(path): wrong.append(path + ' has files')
    elif not os.path.isdir(path) and os.stat(path).st_rdev != os.makedev(1, 3): wrong.append(path + ' can be read')
""", absent=_ABSENT),
    _inside("no host path in the mount table", """
text = open('/proc/self/mountinfo').read()
wrong += [path for path in HOST['paths'] if path in text]
""", absent=_ABSENT),
    _inside("the old root is not there", _TABLE + """
roots = [m for m in mounts if m[0] == '/']
if len(roots) != 1 or roots[0][3] != 'overlay': wrong.append(str([m[3] for m in roots]))
shown = [m[0] for m in mounts if m[0] in ('/home', '/root', '/tmp', '/var', '/boot', '/etc')]
if shown: wrong.append('folders of the host: %s' % shown)
""", absent=_ABSENT),
]


# ---- ids and namespaces


async def _id_maps(host: Host, box: Box) -> list[str]:
    """Both maps have one line of the right size, away from ids of the host and of the neighbour."""
    wrong = []
    assert host.neighbour is not None
    for kind in ("uid", "gid"):
        maps = [Path(f"/proc/{_pid(one)}/{kind}_map").read_text().splitlines() for one in (box, host.neighbour)]
        (inside, first, count), (_, other, _) = ([int(word) for word in lines[0].split()] for lines in maps)
        if len(maps[0]) != 1 or inside != 0:
            wrong.append(f"{kind}: {maps[0]}")
        elif host.level == "userns":
            if count != 1 or first != os.geteuid():
                wrong.append(f"{kind}: {maps[0]}")
        elif count != 65_536 or first < 100_000 or abs(first - other) < count:
            wrong.append(f"{kind}: {maps}")
    return wrong


async def _ids(host: Host, box: Box) -> list[str]:
    status = _status(_pid(box))
    seen = {int(word) for name in ("Uid", "Gid") for word in status[name].split()}
    return [f"{name} {status[name]}" for name in ("Uid", "Gid", "Groups") if min(seen) < 100_000]


async def _account(host: Host, box: Box) -> list[str]:
    """To whom the kernel charges what it counts for the user namespace: its owner."""
    with open(f"/proc/{_pid(box)}/ns/user", "rb") as namespace:
        owner = struct.unpack("I", fcntl.ioctl(namespace, _NS_GET_OWNER_UID, bytes(4)))[0]
    return [f"it belongs to user {owner}"] if owner < 100_000 else []


def _namespace(kind: str) -> Attempt:
    async def look(host: Host, box: Box) -> list[str]:
        assert host.neighbour is not None
        command = f"readlink /proc/self/ns/{kind}"
        mine, other = (await box.sh(command)).strip(), (await host.neighbour.sh(command)).strip()
        wrong = []
        if not re.fullmatch(rf"{kind}:\[\d+\]", mine):
            wrong.append(mine)
        if mine == os.readlink(f"/proc/self/ns/{kind}"):
            wrong.append("the host's")
        if mine == other:
            wrong.append("the neighbour's")
        return wrong

    return _look(f"{kind} namespace of its own", look, absent=_ABSENT)


IDS = [
    _look("id maps", _id_maps, absent=_ABSENT),
    _look("ids of pid 1 on the host", _ids, absent={
        "gvisor": _OWN_KERNEL, "userns": "an ordinary user has no other ids",
        "landlock": "ids of its own below 100,000"}),
    _look("account of the user namespace", _account, root=True, absent={
        **_ABSENT, "userns": "an ordinary user has one account for all"}),
    *(_namespace(kind) for kind in NAMESPACES),
    _inside("host name", "if socket.gethostname() == HOST['hostname']: wrong.append(HOST['hostname'])",
            absent=_ABSENT, control=True),
    _inside("paths of the host's control groups", """
wrong += [line.strip() for line in open('/proc/self/cgroup') if line.strip().split(':', 2)[2] != '/']
""", absent=_ABSENT),
]


# ---- descriptors

_HARMLESS = (r"/dev/null", r"anon_inode:\[eventpoll\]", r"socket:\[\d+\]", r"/proc/1/pagemap",
             r".*/images/use/[0-9a-f]+\.json")
_OF_PROGRAMS = (r"/dev/null", r"pipe:\[\d+\]")


async def _descriptors_of_init(host: Host, box: Box) -> list[str]:
    folder = Path(f"/proc/{_pid(box)}/fd")
    targets = {fd.name: os.readlink(fd) for fd in folder.iterdir()}
    wrong = [f"{fd}: {target}" for fd, target in targets.items()
             if not any(re.fullmatch(pattern, target) for pattern in _HARMLESS)]
    sockets = [target for target in targets.values() if target.startswith("socket:")]
    if len(sockets) > 8:
        wrong.append(f"{len(sockets)} sockets")
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
           if os.path.lexists(f"/proc/self/fd/{fd}")}
    return wrong + [f"{target} is the server's too" for target in sockets if target in own]


def _program_of(box: Box, name: str) -> int | None:
    """The number on the host of a program inside."""
    for entry in process_tree.descendants(process_tree.scan(), _pid(box)):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{entry.pid}/comm").read_text().strip() == name:
                return entry.pid
    return None


async def _descriptors_of_programs(host: Host, box: Box) -> list[str]:
    process = await box.spawn("sh", "-c", "echo ready; read word", stdin="pipe", stderr="stdout")
    try:
        assert process.stdout is not None
        await until_line(process.stdout)
        pid = _program_of(box, "sh")
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    finally:
        await process.kill_tree()
    wrong = [target for target in links if not any(re.fullmatch(pattern, target) for pattern in _OF_PROGRAMS)]
    return wrong + ([] if len(links) == 3 else [f"{len(links)} descriptors"])


DESCRIPTORS = [
    _look("descriptors of pid 1", _descriptors_of_init, absent=_ABSENT, root=True),
    _look("descriptors of programs, from outside", _descriptors_of_programs, absent=_ABSENT, root=True),
    _inside("descriptors of programs, from inside", """
listing = os.open('/proc/self/fd', os.O_RDONLY)
for name in os.listdir(listing):
    try: target = os.readlink('/proc/self/fd/' + name)
    except FileNotFoundError: continue  # that of listdir itself
    if int(name) > 2 and int(name) != listing: wrong.append(name + ' ' + target)
""", absent={"gvisor": _OWN_KERNEL}),
]


# ---- limits


def _groups_of(pid: int) -> dict[str, str]:
    lines = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    return {name: path for _, names, path in lines for name in names.split(",")}


async def _membership(host: Host, box: Box) -> list[str]:
    """pid 1 is in the group of each controller that this host offers."""
    folders = {name: str(path) for name, path in box.handle.data["cgroups"].items()}
    wrong = []
    for name, folder in folders.items():
        members = Path(f"{folder}/cgroup.procs").read_text().split()
        if str(_pid(box)) not in members:
            wrong.append(f"not in the group of {name}")
    groups = _groups_of(_pid(box))
    slot = str(box.handle.data["slot"])
    wrong += [f"{name}: {groups[name]}" for name in folders if name in groups and slot not in groups[name]]
    return wrong if folders else ["it has no groups"]


def _value(folder: str, *names: str) -> str:
    found = [Path(f"{folder}/{name}") for name in names if os.path.exists(f"{folder}/{name}")]
    return found[0].read_text().strip() if found else ""


async def _limits(host: Host, box: Box) -> list[str]:
    folders = box.handle.data["cgroups"]
    memory = _value(folders["memory"], "memory.limit_in_bytes", "memory.max") if "memory" in folders else "none"
    pids = _value(folders["pids"], "pids.max") if "pids" in folders else "none"
    cpu = _value(folders["cpu"], "cpu.cfs_quota_us", "cpu.max").split()[0] if "cpu" in folders else "none"
    wanted = {"memory": (memory, str(512 << 20)), "pids": (pids, "256"), "cpu": (cpu, "100000")}
    return [f"{name}: {seen}, not {limit}" for name, (seen, limit) in wanted.items() if seen != limit]


async def _devices(host: Host, box: Box) -> list[str]:
    """Version 1 shows its rules; with version 2 they are a program, which tests/runtime/test_devices.py runs."""
    group = _groups_of(_pid(box)).get("devices")
    if group is None:
        return []
    rules = Path(f"/sys/fs/cgroup/devices{group}/devices.list").read_text().splitlines()
    allowed = {"c 1:3 rw", "c 1:5 rw", "c 1:7 rw", "c 1:8 rw", "c 1:9 rw", "c 5:0 rw", "c 5:2 rw", "c 136:* rw"}
    return sorted(set(rules) - allowed)


_GROUPS_OF_ROOT = {**_ABSENT, "userns": "an ordinary user has no groups unless the host gives them"}
LIMITS = [
    _look("membership of control groups", _membership, absent=_GROUPS_OF_ROOT, root=True),
    _look("limits of control groups", _limits, absent=_GROUPS_OF_ROOT, root=True),
    _look("devices of the control group", _devices, absent=_GROUPS_OF_ROOT, root=True),
    _inside("resource limits", """
MOST = {'RLIMIT_CORE': 0, 'RLIMIT_SIGPENDING': 32768, 'RLIMIT_MSGQUEUE': 819200, 'RLIMIT_MEMLOCK': 8 << 20}
for name, most in MOST.items():
    for value in resource.getrlimit(getattr(resource, name)):
        if value < 0 or value > most: wrong.append('%s %d' % (name, value))
""", absent={"gvisor": _OWN_KERNEL, "landlock": "pending signals are counted for its own user id"}),
    _inside("counters of the user namespace", """
# Of an ordinary user all sandboxes share one account, so each namespace has limits of its own.
if HOST['level'] == 'userns':
    for name, most in HOST['counters'].items():
        if int(open('/proc/sys/user/' + name).read()) > most // 4: wrong.append(name)
""", absent=_ABSENT),
]

ATTEMPTS = [*RIGHTS, *MOUNTS, *IDS, *DESCRIPTORS, *LIMITS]
