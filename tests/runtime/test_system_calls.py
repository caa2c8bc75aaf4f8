"""The system call filter: each number's verdict, computed from the filter and tried on the kernel."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rock.runtime.namespace.launcher import seccomp, syscall_list
from tests.escape import syscall_table
from tests.runtime.boxes import namespace_box, run

ROOT = Path(__file__).parent.parent.parent
_HERE = platform.machine()
_MACHINES = sorted(syscall_list.NUMBERS)
_PERMISSION, _NOT_THERE = "EPERM", "ENOSYS"
here_only = pytest.mark.skipif(not seccomp.supported(), reason="there is no table for this machine")


@pytest.mark.parametrize("machine", _MACHINES)
@pytest.mark.parametrize("options", [{}, {"shared": True}, {"shared": True, "sockets": False}], ids=str)
def test_every_number_has_the_verdict_of_its_list(machine: str, options: dict[str, bool]) -> None:
    names = {number: name for name, number in syscall_list.NUMBERS[machine].items()}
    verdicts = syscall_table.verdicts(machine, **options)
    assert len(verdicts) == 480
    for number, verdict in verdicts.items():
        name = names.get(number, "")
        if options and name in syscall_list.IPC | syscall_list.INOTIFY:
            assert verdict == _PERMISSION
        elif name == "socket":
            assert verdict in ("EAFNOSUPPORT", "EACCES")  # of family 0
        elif name in syscall_list.ALLOWED:
            assert verdict in ("allowed", _PERMISSION) if name == "ioprio_set" else verdict == "allowed", name
        else:
            assert verdict == (_PERMISSION if name in syscall_list.REFUSED else _NOT_THERE), name
    assert syscall_table.run(seccomp.build(machine, **options), 1, arch=0x40000003) == "killed"
    if machine == "x86_64":
        assert syscall_table.run(seccomp.build(machine, **options), 0x40000001) == _NOT_THERE


@pytest.mark.parametrize("machine", _MACHINES)
def test_arguments(machine: str) -> None:
    code, numbers = seccomp.build(machine), syscall_list.NUMBERS[machine]

    def verdict(name: str, *arguments: int) -> str:
        return syscall_table.run(code, numbers[name], arguments)

    assert verdict("clone", 0x11) == "allowed"
    assert verdict("clone", 0x10000011) == _PERMISSION
    assert verdict("unshare", 0x80) == _PERMISSION
    assert verdict("mknodat", 0, 0, 0o010600) == "allowed"
    assert verdict("mknodat", 0, 0, 0o020600) == _PERMISSION
    assert verdict("ioctl", 0, 0x5401) == "allowed"
    assert verdict("ioctl", 0, 0x5412) == _PERMISSION
    assert verdict("ioctl", 0, (1 << 32) + 0x5412) == _PERMISSION
    assert verdict("personality", 0x0040000) == _PERMISSION
    for protocol, expected in ((0, "allowed"), (6, "allowed"), (17, "allowed"), (1, "allowed"), (58, "allowed"),
                               (262, "EPROTONOSUPPORT"), (136, "EPROTONOSUPPORT"), (132, "EPROTONOSUPPORT")):
        for family in (2, 10):
            assert verdict("socket", family, 1, protocol) == expected
    assert verdict("socket", 1, 1, 0) == verdict("socket", 16, 3, 0) == "allowed"
    assert verdict("socket", 16, 3, 9) == "EPROTONOSUPPORT"
    assert verdict("socket", 17, 3, 0) == verdict("socket", 40, 1, 0) == "EAFNOSUPPORT"


@pytest.mark.parametrize("machine", _MACHINES)
def test_pid_1_keeps_its_limits_and_priorities(machine: str) -> None:
    code, numbers = seccomp.build(machine), syscall_list.NUMBERS[machine]
    somewhere = 0x7F00_0000_0000  # whose low half is 0

    def verdict(name: str, *arguments: int) -> str:
        return syscall_table.run(code, numbers[name], arguments)

    assert verdict("prlimit64", 1, 7, 0, 4096) == "allowed"
    assert verdict("prlimit64", 0, 7, 4096) == verdict("prlimit64", 57, 7, 4096) == "allowed"
    for pointer in (4096, somewhere):
        assert verdict("prlimit64", 1, 7, pointer, 0) == _PERMISSION
        assert verdict("prlimit64", (1 << 32) + 1, 7, pointer, 0) == _PERMISSION
    for name in ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        assert verdict(name, 1) == _PERMISSION
        assert verdict(name, 0) == verdict(name, 99) == "allowed"
    for name, process, others in (("setpriority", 0, (1, 2)), ("ioprio_set", 1, (2, 3))):
        assert verdict(name, process, 0) == verdict(name, process, 12) == "allowed"
        assert verdict(name, process, 1) == _PERMISSION
        for which in others:
            assert verdict(name, which, 0) == verdict(name, which, 1000) == _PERMISSION


_TRY = """
import ctypes, errno, json, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
found = {}
for number in json.loads(sys.argv[1]):
    ctypes.set_errno(0)
    result = libc.syscall(*(ctypes.c_long(word) for word in (number, -1, -1, -1, -1, -1, -1)))
    found[number] = errno.errorcode.get(ctypes.get_errno(), "") if result == -1 else "allowed"
print(json.dumps(found))
"""


@here_only
def test_the_kernel_refuses_each_that_is_not_allowed(tmp_path: Path) -> None:
    """Every number that the filter refuses whatever its arguments, called inside a sandbox."""
    names = {number: name for name, number in syscall_list.NUMBERS[_HERE].items()}
    expected = {number: verdict for number, verdict in syscall_table.verdicts(_HERE).items()
                if verdict != "allowed" and names.get(number) not in syscall_list.ALLOWED | {"uretprobe", "uprobe"}}
    assert len(expected) > 100

    async def main() -> None:
        async with namespace_box(tmp_path) as box:
            _, out, err = await box.run(box.interpreter, "-I", "-S", "-c", _TRY, json.dumps(list(expected)))
            assert {int(number): told for number, told in json.loads(out or b"{}").items()} == expected, err

    run(main())


@here_only
def test_root_inside_cannot_take_away_the_limits_of_pid_1(tmp_path: Path) -> None:
    """Neither its files nor its time: the sandbox goes on to work, and reading limits works too."""
    script = """
import os, resource
print(resource.prlimit(1, resource.RLIMIT_NOFILE)[0] > 0)
for what in (
    lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3)),
    lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)),
    lambda: os.sched_setaffinity(1, {0}),
    lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    lambda: os.setpriority(os.PRIO_USER, 0, 19),
    lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
):
    try:
        what()
    except PermissionError:
        print("refused")
    else:
        print("done")
resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (64, 64))
os.nice(1)
print("itself")
"""

    async def main() -> None:
        async with namespace_box(tmp_path) as box:
            assert (await box.python(script)).split() == ["True", *["refused"] * 6, "itself"]
            assert await box.sh("echo still here") == "still here\n"

    run(main())


@here_only
def test_the_kernel_never_runs_the_filter_for_ordinary_calls() -> None:
    """What a call costs beside a process without a filter. The kernel remembers what is always allowed."""
    script = """
import ctypes, struct, sys, time
sys.path.insert(0, sys.argv[1])
from rock.runtime.namespace.launcher import kernel, seccomp
if sys.argv[2] == "filtered":
    code = seccomp.build()
    kept = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(kept)), 16)
    kernel.prctl(38, 1)
    assert kernel.call(kernel.NUMBERS["seccomp"], 1, 0, ctypes.addressof(header)) == 0
call = ctypes.CDLL(None).getppid
best = 1e9
for _ in range(20):
    started = time.perf_counter()
    for _ in range(2000):
        call()
    best = min(best, (time.perf_counter() - started) / 2000)
print(best * 1e9)
"""
    took = {}
    for how in ("plain", "filtered"):
        done = subprocess.run([sys.executable, "-c", script, str(ROOT / "src"), how], capture_output=True, text=True,
                              timeout=60, check=True)
        took[how] = float(done.stdout)
    assert took["filtered"] - took["plain"] < 400, took  # nanoseconds


def test_the_page_has_the_table() -> None:
    if not syscall_table.PAGE.exists():
        pytest.skip("this checkout is without its pages")
    assert syscall_table.written() == syscall_table.table(), "run `python -m tests.escape.syscall_table`"


def test_the_filter_stays_short() -> None:
    for machine in _MACHINES:
        assert len(seccomp.build(machine)) // 8 < 400
