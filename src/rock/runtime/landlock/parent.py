"""The parent process of a Landlock sandbox: `python -I -S parent.py OPTIONS`. Standard library only.

    server ── parent ── pid 1 (guest/init/pid1.py), restricted by Landlock, a filter and limits ── programs
                └── subreaper: adopts orphans, so that no process of the sandbox escapes it

The parent runs as root and the sandbox as a user of its own, so the sandbox cannot signal it. When pid 1 ends, the
parent kills the remaining processes and exits.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import contextlib
import ctypes
import gc
import json
import resource
import signal
import socket
import struct
from typing import Any

from rock.guest.init import pid1, process_tree, syscalls
from rock.runtime.landlock import ruleset
from rock.runtime.namespace.launcher import kernel, seccomp

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_TERMINALS = ("/dev/ptmx", "/dev/pts")
_PROC = ("/proc",)


def _restrict(options: dict[str, Any]) -> None:
    """Drop all rights that a sandbox does not have. OSError names the step."""
    own = int(options["own_uid"])
    os.setgroups([])
    os.setresgid(own, own, own)
    os.setresuid(own, own, own)
    for name, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, int(options["processes"])),
                        (resource.RLIMIT_MEMLOCK, 64 << 10), (resource.RLIMIT_MSGQUEUE, 0),
                        (resource.RLIMIT_NOFILE, int(options["nofile"]))):
        soft, hard = resource.getrlimit(name)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        if (soft, hard) != (most, most):
            resource.setrlimit(name, (most, most))
    if options["cpus"]:
        os.sched_setaffinity(0, options["cpus"])
    rules = ruleset.Ruleset(tcp=options["network"] != "host")
    rules.allow(ruleset.READ, options["readable"])
    rules.allow(ruleset.READ_FILE | ruleset.READ_DIR | ruleset.WRITE_FILE, _PROC)
    rules.allow(ruleset.DEVICE, (*_DEVICES, *_TERMINALS))
    rules.allow(ruleset.everything(rules.abi), [options["home"]])
    rules.enforce()
    _filter(seccomp.build(shared=True, sockets=options["network"] == "host"))


def _filter(program: bytes) -> None:
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code)), 16)
    result = kernel.call(kernel.NUMBERS["seccomp"], 1, 0, ctypes.addressof(header))
    if result < 0:
        raise OSError(-result, f"seccomp: {os.strerror(-result)}")


def _hold(child: int) -> None:
    """Reap children until pid 1 ends, then kill the remaining processes."""
    while True:
        try:
            pid, _ = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        except InterruptedError:
            continue
        if pid == child:
            break
    me = os.getpid()
    while left := [entry for entry in process_tree.descendants(process_tree.scan(), me) if entry.alive]:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for entry in left:
                process_tree.send(entry, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def main() -> None:
    """Entry point; the options are those of `LandlockRuntime`."""
    options = json.loads(sys.argv[1])
    listener = socket.socket(fileno=int(options["listen"]))
    os.set_inheritable(listener.fileno(), False)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    syscalls.become_subreaper()
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    kernel.set_title(b"rock-warden")
    child = os.fork()
    if child:
        listener.close()
        _hold(child)
        return
    os.chdir(options["home"])
    os.setsid()
    os.close(2)
    os.open("/dev/null", os.O_RDWR)  # discards the output: a guest must not fill the host's disk with it
    os.dup2(2, 1)
    _restrict(options)
    kernel.set_title(b"rock-init")
    made = pid1.prepare(listener, int(options["uid"]), False)
    gc.freeze()
    made.run()


if __name__ == "__main__":
    main()
