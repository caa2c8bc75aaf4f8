"""Turns a new Python process into a program: descriptors, user, limits and execve, on any Unix.

    python -I -S child_setup.py FD      of a file: {"fds": {"0": 7}, "argv", "env", "cwd", "terminal", "nofile",
    "told": FD}

It writes the error to `told` as [code, message], and nothing on success. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import sys
import termios
from typing import Any


class Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def become(spec: dict[str, Any]) -> None:
    """Execute the program; never returns. Refused with the reason."""
    os.umask(0o022)
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            pass
    if os.getsid(0) != os.getpid():
        os.setsid()
    wanted = {int(number): fd for number, fd in spec["fds"].items()}
    high = {fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 256) for fd in {*wanted.values()}}
    for number, fd in wanted.items():
        os.dup2(high[fd], number, inheritable=True)
    for fd in high.keys() - wanted.keys():
        os.close(fd)
    if spec["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = hard if spec.get("nofile") is None else int(spec["nofile"])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):
        if spec.get("nofile") is not None:
            raise Refused("invalid_config", f"nofile {soft} is over this machine's limit of {hard}") from None
    try:
        os.chdir(spec["cwd"])
    except OSError as error:
        raise Refused(_code(error), f"working folder {spec['cwd']!r}: {_why(error)}") from None
    _execute(spec["argv"], spec["env"])


def _execute(argv: list[str], env: dict[str, str]) -> None:
    name = argv[0]
    folders = env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    refused: Refused | None = None
    for path in [name] if "/" in name else [os.path.join(folder or ".", name) for folder in folders]:
        try:
            os.execve(path, argv, env)
        except OSError as error:
            if error.errno == errno.ENOENT and os.path.lexists(path):
                raise Refused("not_found", f"program {path!r} is there, but its interpreter is missing") from None
            if error.errno == errno.EACCES and os.path.lexists(path):
                told = f"program {path!r} must not be executed: permission denied"
                refused = refused or Refused("permission_denied", told)
            elif error.errno == errno.ENOEXEC:
                told = f"program {path!r} is not in a format that this machine can execute"
                raise Refused("invalid_config", told) from None
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                raise Refused(_code(error), f"program {path!r}: {_why(error)}") from None
    if refused is not None:
        raise refused
    raise Refused("not_found", f"no such program: {name!r}")


def _code(error: OSError) -> str:
    kinds = {errno.ENOENT: "not_found", errno.EACCES: "permission_denied", errno.EPERM: "permission_denied",
             errno.ENOTDIR: "conflict"}
    return kinds.get(error.errno or 0, "invalid_config")


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def main() -> None:
    with open(int(sys.argv[1]), "rb") as file:  # a file, because an argument has a length limit
        spec = json.loads(file.read())
    told = fcntl.fcntl(spec["told"], fcntl.F_DUPFD_CLOEXEC, 512)
    os.close(spec["told"])
    try:
        become(spec)
    except Refused as refusal:
        os.write(told, json.dumps([refusal.code, refusal.message[:2000]]).encode())
    except BaseException as error:
        os.write(told, json.dumps(["internal", repr(error)[:2000]]).encode())
    os._exit(127)


if __name__ == "__main__":
    main()
