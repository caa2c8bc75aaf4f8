"""Starts programs: streams, users, terminals, limits, and typed errors of a failed start. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import struct
import termios
from typing import Any

from rock.guest.init import native, syscalls, users
from rock.guest.init.link import CHANNEL_MEMORY, Fault, of_os_error

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HIGHEST_CHANNEL = 255
OOM_SCORE = b"500"
FIRST_KEY = "session:default"  # of a program that was started together with pid 1
FIRST_STREAMS = ("stdin", "stdout", "197", "199")  # its streams
FIRST_NUMBERS = ((0,), (1, 2), (197,), (199,))  # their descriptors in the program
FIRST_DATA = 196  # the descriptor of its data, if it has some


class Program:
    """A started program that is not yet forgotten. `held` are copies of the server's ends, by stream name.

    Not a dataclass: the import of dataclasses takes a fifth of the start time of a container's pid 1.
    """

    def __init__(self, pid: int, key: str, keep: bool, has_pty: bool) -> None:
        self.pid = pid
        self.key = key
        self.keep = keep
        self.has_pty = has_pty
        self.held: dict[str, int] = {}
        self.ended: dict[str, int] | None = None  # {"code": n} or {"signal": n}

    def describe(self) -> dict[str, Any]:
        return {"pid": self.pid, "key": self.key, "keep": self.keep, "pty": self.has_pty, "ended": self.ended,
                "streams": list(self.held), "pipes": {name: _pipe(fd) for name, fd in self.held.items()}}

    def release(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


def _pipe(fd: int) -> list[Any]:
    """The number of a pipe, and whether the program at its other end reads ("r") or writes ("w"); else 0 and ""."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return [0, ""]
    return [os.fstat(fd).st_ino, "r" if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY else "w"]


class Streams:
    """Both ends of a program's descriptors: `ours` by stream name, `theirs` by the number in the program."""

    def __init__(self, request: dict[str, Any], user: users.User | None) -> None:
        self.ours: dict[str, int] = {}
        self.theirs: dict[int, int] = {}
        self.pty = False
        try:
            if request.get("pty"):
                self._open_pty(request["pty"], user)
            else:
                self._open_standard(request)
            for number, direction in (request.get("channels") or {}).items():
                if not 3 <= int(number) <= HIGHEST_CHANNEL or direction not in ("r", "w", "m"):
                    raise Fault("invalid_config", f"channel {number} must be 3 to {HIGHEST_CHANNEL}, and r, w or m")
                if direction == "m":
                    self._memory(str(int(number)), int(number))
                else:
                    self._pipe(str(int(number)), int(number), program_reads=direction == "r")
        except OSError as error:
            self.close()
            raise of_os_error(error, "the program's streams") from None
        except BaseException:
            self.close()
            raise

    def _open_pty(self, size: list[int], user: users.User | None) -> None:
        ours, theirs = os.openpty()
        self.pty = True
        self.ours["pty"] = ours
        self.theirs = {0: theirs, 1: theirs, 2: theirs}
        os.set_blocking(ours, False)
        rows, columns = (max(1, min(int(value), 65535)) for value in size)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if user is not None and user.uid != os.geteuid():
            os.fchown(theirs, user.uid, -1)

    def _open_standard(self, request: dict[str, Any]) -> None:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            kind = request.get(name, "null" if number == 0 else "pipe")
            if kind == "pipe":
                self._pipe(name, number, program_reads=number == 0)
            elif kind == "stdout" and number == 2:
                self.theirs[2] = self.theirs[1]
            elif kind == "null":
                self.theirs[number] = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            else:
                raise Fault("invalid_config", f"{name} cannot be {kind!r}")

    def _pipe(self, name: str, number: int, *, program_reads: bool) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        ours, theirs = (writing, reading) if program_reads else (reading, writing)
        self.ours[name] = ours
        self.theirs[number] = theirs
        os.set_blocking(ours, False)

    def _memory(self, name: str, number: int) -> None:
        self.theirs[number] = fd = os.memfd_create("rock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, CHANNEL_MEMORY)
        # Truncation by one side would be a SIGBUS for the other
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.ours[name] = os.dup(fd)

    def close_theirs(self) -> None:
        for fd in set(self.theirs.values()):
            os.close(fd)
        self.theirs.clear()

    def close(self) -> None:
        self.close_theirs()
        for fd in self.ours.values():
            os.close(fd)
        self.ours.clear()


class Plan:
    """All data that a child needs to become the program, computed before the fork.

    Each page that the child touches is copied, at about 3 us, so the child does as little as possible.
    """

    def __init__(self, request: dict[str, Any], streams: Streams, user: users.User | None,
                 limits: tuple[int, int]) -> None:
        self.streams = streams
        self.user = user
        self.cwd = str(request.get("cwd") or "/")
        self.argv = [str(word) for word in request["argv"]]
        self.env = {str(key): str(value) for key, value in (request.get("env") or {}).items()}
        self.env.setdefault("PATH", DEFAULT_PATH)
        if "HOME" not in self.env:
            self.env["HOME"] = (user or users.find(str(os.geteuid()))).home
        self.path = _guess(self.argv[0], self.env["PATH"])
        self.encoded_argv = [os.fsencode(word) for word in self.argv]
        self.encoded_env = {os.fsencode(key): os.fsencode(value) for key, value in self.env.items()}
        self.limits = _file_limits(request.get("nofile"), limits)


def _guess(name: str, path: str) -> str:
    """The likely path of the program; the full search, with its errors, runs when this guess fails."""
    if "/" not in name:
        for folder in path.split(":"):
            if folder.startswith("/") and os.access(f"{folder}/{name}", os.X_OK):
                return f"{folder}/{name}"
    return name


class Start:
    """A child before exec. `verdict` reaches end of file after exec or a failure; then call `settle`."""

    def __init__(self, plan: Plan, *, by_fork: bool = False) -> None:
        self.plan = plan
        self.by_fork = by_fork or native.library is None or not plan.path.startswith("/")
        self._table: native.Table | None = None
        self.verdict, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        if writing in plan.streams.theirs:
            # A channel of the program has this number. The child's end would close before exec, and its memory, which
            # it shares with this process until then, would be released too early.
            low, writing = writing, fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, HIGHEST_CHANNEL + 1)
            os.close(low)
        try:
            self.pid = _fork(plan, writing) if self.by_fork else self._clone()
        except OSError as error:
            os.close(self.verdict)
            raise of_os_error(error, "no further process can be started: the sandbox's limit is reached") from None
        finally:
            os.close(writing)

    def _clone(self) -> int:
        plan, table = self.plan, native.Table()
        table.session(plan.streams.theirs[0] if plan.streams.pty else None)
        high: list[int] = []
        theirs = plan.streams.theirs
        if min(theirs.values()) <= max(theirs):  # a descriptor has a number that another one needs
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGHEST_CHANNEL + 1) for fd in theirs.values()]
            theirs = dict(zip(theirs, high, strict=True))
        try:
            table.descriptors(theirs)
            if plan.limits is not None:
                table.files(*plan.limits)
            if plan.user is not None and not _is_already(plan.user):
                table.user(plan.user.uid, plan.user.gid, plan.user.groups)
            table.folder(plan.cwd)
            table.execute(plan.path, plan.encoded_argv, plan.encoded_env)
            self._table = table
            return table.run()
        finally:
            for fd in high:
                os.close(fd)

    def settle(self, data: bytes) -> Fault | None:
        """The error after reading `verdict`, or None. A cloned child reports no reason."""
        os.close(self.verdict)
        if data:
            return Fault(*json.loads(data))
        if self._table is not None and self._table.failed():
            return Fault("internal", "the program could not be started")
        _raise_score(self.pid)
        return None


def _fork(plan: Plan, writing: int) -> int:
    """Start by fork, with a message for each possible error."""
    pid = os.fork()
    if pid == 0:
        step = ["start"]
        try:
            _become(plan, step)
        except BaseException as error:
            os.write(writing, json.dumps(_verdict(error, step[0])).encode())
        finally:
            os._exit(127)
    return pid


def _raise_score(pid: int) -> None:
    """Raise the program's OOM score. After exec only: a child that shares our memory shares our score."""
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, OOM_SCORE)
    except OSError:
        pass
    finally:
        os.close(fd)


def _is_already(user: users.User) -> bool:
    return (user.uid, user.gid) == (os.geteuid(), os.getegid()) and os.geteuid() != 0


def _verdict(error: BaseException, step: str) -> list[str]:
    if isinstance(error, OSError):
        error = of_os_error(error, step)
    if isinstance(error, Fault):
        return [error.code, error.message[:500]]
    return ["internal", f"{step}: {error!r}"[:500]]


def _become(plan: Plan, step: list[str]) -> None:
    """Prepare the child and call exec. `step` names the current action, for the error's text."""
    os.setsid()
    syscalls.become_subreaper()
    if plan.streams.pty:
        fcntl.ioctl(plan.streams.theirs[0], termios.TIOCSCTTY, 0)
    _place(plan.streams.theirs)
    if plan.limits is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, plan.limits)
    if plan.user is not None:
        drop(plan.user)
    try:
        os.chdir(plan.cwd)
    except OSError as error:
        raise of_os_error(error, f"working folder {plan.cwd!r}") from None
    step[0] = f"program {plan.argv[0]!r}"
    if plan.path.startswith("/"):
        try:
            os.execve(plan.path, plan.encoded_argv, plan.encoded_env)
        except (OSError, ValueError):
            pass
    execute(plan.argv, plan.env)


def _place(theirs: dict[int, int]) -> None:
    """Move each descriptor to the number that the program expects."""
    if min(theirs.values()) > max(theirs):
        for number, fd in theirs.items():
            os.dup2(fd, number, inheritable=True)
        return
    high = {fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGHEST_CHANNEL + 1) for fd in set(theirs.values())}
    for number, fd in theirs.items():
        os.dup2(high[fd], number, inheritable=True)


def _file_limits(spec: int | None, limits: tuple[int, int]) -> tuple[int, int] | None:
    """The limits to set for a program, or None when they are already set: those of pid 1 are (hard, hard)."""
    soft, hard = limits
    if spec is None:
        return None if soft == hard else limits
    soft = max(16, int(spec))
    if hard != resource.RLIM_INFINITY and soft > hard:
        raise Fault("invalid_config", f"nofile {soft} is over this sandbox's hard limit of {hard}")
    return soft, soft


def drop(user: users.User) -> None:
    if _is_already(user):
        return
    try:
        try:
            os.setgroups(user.groups)
        except PermissionError:  # a user namespace with one user denies setgroups
            if user.uid != os.geteuid() or user.gid != os.getegid():
                raise
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise Fault("unsupported", f"user {user.uid}:{user.gid}: this sandbox cannot change to it "
                                   f"({(error.strerror or '').lower()}); it has no further users") from None


def execute(argv: list[str], environment: dict[str, str]) -> None:
    """execve with a search in PATH; never returns, and raises a Fault that names the missing part."""
    name = argv[0]
    if not name:
        raise Fault("invalid_config", "the program's name is empty")
    if "/" in name:
        candidates = [name]
    else:
        candidates = [os.path.join(folder or ".", name) for folder in environment["PATH"].split(":")]
    refused: tuple[str, str] | None = None
    for path in candidates:
        try:
            os.execve(path, argv, environment)
        except OSError as error:
            if error.errno == errno.ENOENT and os.path.lexists(path):
                missing = f"program {path!r} is there, but its interpreter or loader is missing"
                raise Fault("not_found", missing) from None
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                raise _exec_fault(error, path) from None
            if error.errno == errno.EACCES and (refused is None) and os.path.lexists(path):
                refused = path, (error.strerror or "").lower()
        except ValueError as error:
            raise Fault("invalid_config", f"program {name!r}: {error}") from None
    if refused is not None:
        raise Fault("permission_denied", f"program {refused[0]!r} must not be executed: {refused[1]}")
    where = "" if "/" in name else f" in PATH={environment['PATH']}"
    raise Fault("not_found", f"no such program: {name!r}{where}")


def _exec_fault(error: OSError, path: str) -> Fault:
    if error.errno == errno.ENOEXEC:
        return Fault("invalid_config", f"program {path!r} is not in a format that this machine can execute")
    if error.errno == errno.E2BIG:
        return Fault("invalid_config", f"program {path!r}: arguments and environment are too long together")
    return of_os_error(error, f"program {path!r}")


# ---- programs that pid 1 did not start: copies of those of another sandbox ----

_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}
_MOST_STREAMS = 64  # descriptors of one reply


def adopt(known: dict[int, Program], specs: list[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
    """Add programs to the known ones as kept ones, before they are there. Returns the reply with the keys and names of
    their streams, and the ends of these streams for the programs.

    specs: `pid`, `key`, and `streams`, whose values say whether the program reads ("r") or writes ("w").
    """
    made: list[tuple[Program, Streams]] = []
    try:
        for one in specs:
            made.append(_adopted(known, one))
        names = [[program.key, name] for program, streams in made for name in streams.ours]
        if len(names) > _MOST_STREAMS:
            raise Fault("quota_exceeded", f"the programs have {len(names)} streams, more than {_MOST_STREAMS}")
    except BaseException:
        for _, streams in made:
            streams.close()
        raise
    fds = []
    for program, streams in made:
        program.held = dict(streams.ours)
        known[program.pid] = program
        theirs = [streams.theirs[_NUMBERS[name] if name in _NUMBERS else int(name)] for name in streams.ours]
        for fd in set(streams.theirs.values()) - set(theirs):  # /dev/null
            os.close(fd)
        fds += theirs
    return {"streams": names}, fds


def _adopted(known: dict[int, Program], spec: dict[str, Any]) -> tuple[Program, Streams]:
    pid, key, wanted = int(spec["pid"]), str(spec["key"]), dict(spec["streams"])
    if pid in known or any(program.key == key for program in known.values()):
        raise Fault("conflict", f"a program with the key {key!r} exists already")
    standard = {name: "pipe" if name in wanted else "null" for name in _NUMBERS}
    channels = {name: way for name, way in wanted.items() if name not in _NUMBERS}
    return Program(pid, key, True, False), Streams({**standard, "channels": channels}, None)
