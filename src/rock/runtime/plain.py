"""Runtime "process" where guest/init.py cannot run, as on macOS: programs are children of the server itself.

It uses what every Unix has and nothing of Linux: no /proc, no pidfd, no packet sockets. So sandboxes end with the
server, and a daemon that left its process group is not found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import json
import os
import pwd
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rock import errors
from rock.guest import begin, remove
from rock.protocol.sandbox import Isolation, SandboxConfig, Usage
from rock.runtime import plainfiles, plaintree
from rock.runtime.base import CLOCK, Enforced, ExitStatus, FileStat, Handle, Liveness, Program, Trait
from rock.runtime.process import refuse_unsupported

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENFORCED: dict[str, Enforced] = {"memory": "none", "cpus": "none", "pids": "none"}
_LOOK = 0.02  # seconds between two looks at whether a child has ended


class PlainProcess:
    """A child of the server: implements `Process`. A kept one holds copies of our ends, for `attach`."""

    def __init__(
        self, sandbox: _Sandbox, child: subprocess.Popen[bytes], program: Program, ours: dict[str, int]
    ) -> None:
        self.pid = child.pid
        self.key = program.key
        self.child = child
        self._sandbox = sandbox
        self._pty = program.pty is not None
        self.keep = program.keep
        self.held = {name: os.dup(fd) for name, fd in ours.items()} if program.keep else {}
        self._closed = False
        self._hand_out(ours)

    def _hand_out(self, ours: dict[str, int]) -> None:
        self.stdin: int | None = ours.pop("stdin", None)
        self.stdout: int | None = ours.pop("stdout", None)
        self.stderr: int | None = ours.pop("stderr", None)
        self.channels: Mapping[int, int] = {int(name): fd for name, fd in ours.items()}

    def again(self) -> PlainProcess:
        """The same program for somebody else, with descriptors of its own."""
        copy = PlainProcess.__new__(PlainProcess)
        copy.__dict__.update(self.__dict__)
        copy._closed = False
        copy._hand_out({name: os.dup(fd) for name, fd in self.held.items()})
        return copy

    def _ended(self) -> bool:
        return self.child.poll() is not None

    async def wait(self) -> ExitStatus:
        while not self._ended():  # noqa: ASYNC110  what tells of a child's end is not the same on every Unix
            await asyncio.sleep(_LOOK)
        code = self.child.returncode
        return ExitStatus(code=code) if code >= 0 else ExitStatus(signal=-code)

    async def signal(self, number: int, *, tree: bool = False, since: float | None = None, root: bool = True) -> int:
        if self._ended():
            return 0
        found = plaintree.under(await plaintree.scan(), self.pid, _epoch(since)) if tree else []
        count = sum(plaintree.send(entry.pid, int(number)) for entry in found)
        return count + (plaintree.send(self.pid, int(number)) if root and not self._ended() else 0)

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        if self._ended():
            return 0
        if tell is not None and not root:
            plaintree.send(self.pid, tell)
        count = await plaintree.kill_tree(self.pid, _epoch(since), include=root)
        if root:
            await self.wait()
        return count

    async def resize(self, rows: int, columns: int) -> None:
        if not self._pty:
            raise errors.InvalidConfig("this program has no terminal", sandbox_id=self._sandbox.id,
                                       hint="start it with pty=(rows, columns)")
        if not (0 < rows < 65536 and 0 < columns < 65536):
            raise errors.InvalidConfig(f"{rows} x {columns} is no terminal size", sandbox_id=self._sandbox.id)
        if self.stdin is not None:
            fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def close_stdin(self) -> None:
        if self.stdin is None or self._pty:
            return
        os.close(self.stdin)
        self.stdin = None
        held = self.held.pop("stdin", None)
        if held is not None:
            os.close(held)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for fd in (self.stdin, self.stdout, self.stderr, *self.channels.values()):
            if fd is not None:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = None
        self.channels = {}
        if self._ended():
            self._sandbox.forget(self)

    def release(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


class _Sandbox:
    """What this server knows of one."""

    def __init__(self, id: str, folder: Path, env: dict[str, str]) -> None:
        self.id = id
        self.folder = folder
        self.env = env
        self.ended = asyncio.Event()
        self.children: dict[int, PlainProcess] = {}  # by pid: all that were not reaped
        self.kept: dict[str, PlainProcess] = {}
        self.writing: set[str] = set()

    def forget(self, process: PlainProcess) -> None:
        self.children.pop(process.pid, None)
        if process.keep and process.key in self.kept:
            self.kept.pop(process.key).release()

    async def stop(self, grace: float) -> None:
        self.ended.set()
        if grace > 0:
            for process in list(self.children.values()):
                await process.signal(15, tree=True)
        end = time.monotonic() + grace
        while time.monotonic() < end and any(p.child.poll() is None for p in self.children.values()):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)
        await asyncio.gather(*(process.kill_tree() for process in self.children.values()))


def _epoch(since: float | None) -> float | None:
    """A time of our clock, in seconds since the epoch."""
    return None if since is None else time.time() - (time.clock_gettime(CLOCK) - since)


class PlainRuntime:
    """Plain processes of the server. `run_dir` holds one folder a sandbox; it is made when missing."""

    name = "process"
    traits: Mapping[Isolation, frozenset[Trait]] = {Isolation.NONE: frozenset({Trait.PROGRAMS, Trait.TERMINALS})}

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._sandboxes: dict[str, _Sandbox] = {}

    async def open(self) -> None:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def close(self) -> None:
        """Ends all sandboxes: nobody could find their programs again."""
        for slot in list(self._sandboxes):
            await self._remove(slot)

    async def check(self, config: SandboxConfig) -> None:
        refuse_unsupported(config)

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        await self.check(config)
        slot = f"p-{secrets.token_hex(5)}"
        home = self._run_dir / slot / "root"
        home.mkdir(mode=0o700, parents=True)
        self._sandboxes[slot] = _Sandbox(id, self._run_dir / slot, dict(config.env))
        return Handle(self.name, id, Isolation.NONE, _ENFORCED, {"slot": slot, "home": str(home)})

    def _find(self, handle: Handle) -> _Sandbox:
        found = self._sandboxes.get(handle.data["slot"])
        if found is None or found.ended.is_set():
            raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
        return found

    async def recover(self, handle: Handle) -> Liveness:
        try:
            self._find(handle)
        except errors.Lost:
            return Liveness.GONE
        return Liveness.RUNNING

    async def wait(self, handle: Handle) -> str:
        found = self._sandboxes.get(handle.data["slot"])
        if found is not None:
            await found.ended.wait()
        return "gone"

    async def stop(self, handle: Handle, grace: float) -> None:
        found = self._sandboxes.get(handle.data["slot"])
        if found is not None:
            await found.stop(grace)

    async def destroy(self, handle: Handle) -> None:
        await self._remove(handle.data["slot"])

    async def _remove(self, slot: str) -> None:
        found = self._sandboxes.get(slot)
        if found is not None:
            await found.stop(0.0)
            for process in found.kept.values():
                process.release()
            found.kept.clear()
            found.children.clear()
            self._sandboxes.pop(slot, None)
        await asyncio.to_thread(remove.remove_tree, str(self._run_dir / slot))

    async def sweep(self, known: Sequence[str]) -> list[str]:
        """Folders that no sandbox of this server has: the others ended with their server."""
        gone = []
        for folder in self._run_dir.glob("p-*"):
            found = self._sandboxes.get(folder.name)
            if found is None or found.id not in known:
                gone.append(found.id if found is not None else folder.name)
                await self._remove(folder.name)
        return gone

    async def usage(self, handle: Handle) -> Usage:
        return await plaintree.usage(list(self._find(handle).children))

    # ---- programs ----

    async def spawn(self, handle: Handle, program: Program) -> PlainProcess:
        sandbox = self._find(handle)
        if not program.argv or not program.argv[0] or any("\0" in word for word in program.argv):
            raise errors.InvalidConfig("argv must have a program and no NUL characters", sandbox_id=handle.id)
        if program.key and program.key in sandbox.kept:
            raise errors.Conflict(f"a program with the key {program.key!r} exists already", sandbox_id=handle.id)
        _refuse_other_users(program.user)
        start = asyncio.create_task(self._start(handle, sandbox, program))
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:
            with contextlib.suppress(errors.RockError):
                process = await start
                await process.kill_tree()
                process.close()
            raise

    async def _start(self, handle: Handle, sandbox: _Sandbox, program: Program) -> PlainProcess:
        env = {"PATH": _PATH, "HOME": handle.data["home"], **sandbox.env, **program.env}
        ours, theirs = _streams(program)
        told, telling = os.pipe()
        try:
            wish = {"fds": theirs, "argv": list(program.argv), "env": env, "cwd": program.cwd or handle.data["home"],
                    "terminal": program.pty is not None, "nofile": program.nofile, "told": telling}
            child = _child(wish, {telling, *theirs.values()})
        except BaseException as error:
            _close(ours.values(), theirs.values(), (told, telling))
            if isinstance(error, OSError):
                raise errors.InvalidConfig(f"the program could not be started: {error.strerror}") from None
            raise
        _close(theirs.values(), (telling,))
        try:
            verdict = await _all(told)
        finally:
            os.close(told)
        if verdict:
            _close(ours.values())
            await asyncio.to_thread(child.wait)
            code, message = json.loads(verdict)
            raise errors.from_wire({"error": {"code": code, "message": message, "sandbox_id": handle.id}})
        process = PlainProcess(sandbox, child, program, ours)
        if sandbox.ended.is_set():
            await process.kill_tree()
            process.close()
            process.release()
            raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
        sandbox.children[process.pid] = process
        if program.keep:
            sandbox.kept[program.key] = process
        return process

    async def attach(self, handle: Handle, key: str) -> PlainProcess:
        kept = self._find(handle).kept.get(key)
        if kept is None:
            raise errors.NotFound(f"no kept program has the key {key!r}", sandbox_id=handle.id)
        return kept.again()

    async def processes(self, handle: Handle) -> list[str]:
        return list(self._find(handle).kept)

    # ---- files and ports ----

    async def open_read(self, handle: Handle, path: str, *, user: str | None = None) -> int:
        _refuse_other_users(user)
        return plainfiles.open_read(path)

    async def open_write(
        self, handle: Handle, path: str, *, append: bool = False, mode: int | None = None, parents: bool = True,
        user: str | None = None,
    ) -> tuple[int, str]:
        _refuse_other_users(user)
        fd, token = plainfiles.open_write(path, append=append, mode=mode, parents=parents)
        if token:
            self._find(handle).writing.add(token)
        return fd, token

    async def commit_write(self, handle: Handle, token: str) -> None:
        if token:
            self._written(handle, token)
            plainfiles.commit(token)

    async def abort_write(self, handle: Handle, token: str) -> None:
        if token in self._find(handle).writing:
            self._written(handle, token)
            plainfiles.abort(token)

    def _written(self, handle: Handle, token: str) -> None:
        if token not in self._find(handle).writing:
            raise errors.InvalidConfig("there is no such file being written", sandbox_id=handle.id)
        self._find(handle).writing.discard(token)

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat:
        return plainfiles.stat(path, follow=follow)

    async def list(self, handle: Handle, path: str, *, offset: int = 0, limit: int = 10_000) -> list[FileStat]:
        return await asyncio.to_thread(plainfiles.list_folder, path, offset, limit)

    async def remove(self, handle: Handle, path: str, *, recursive: bool = False) -> None:
        await asyncio.to_thread(plainfiles.remove, path, recursive=recursive)

    async def make_dir(
        self, handle: Handle, path: str, *, parents: bool = True, mode: int = 0o755, user: str | None = None
    ) -> None:
        _refuse_other_users(user)
        plainfiles.make_dir(path, parents=parents, mode=mode)

    async def symlink(self, handle: Handle, target: str, path: str) -> None:
        plainfiles.symlink(target, path)

    async def move(self, handle: Handle, source: str, target: str) -> None:
        plainfiles.move(source, target)

    async def chmod(self, handle: Handle, path: str, mode: int, *, recursive: bool = False) -> None:
        await asyncio.to_thread(plainfiles.each, path, recursive, lambda entry: os.chmod(entry, mode))

    async def chown(self, handle: Handle, path: str, user: str, *, recursive: bool = False) -> None:
        uid, gid = _ids(user)
        await asyncio.to_thread(plainfiles.each, path, recursive, lambda entry: os.chown(entry, uid, gid))

    async def dial(self, handle: Handle, port: int, *, host: str = "127.0.0.1", timeout: float = 10.0) -> int:
        self._find(handle)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.inet_pton(family, host)
        except OSError:
            raise errors.InvalidConfig(f"{host!r} is no address") from None
        if not 0 < port < 65536:
            raise errors.InvalidConfig(f"{port} is no port")
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.get_running_loop().sock_connect(connection, (host, port))
            except TimeoutError:
                raise errors.PortTimeout(f"port {port} does not answer", sandbox_id=handle.id) from None
            except OSError:
                raise errors.NotFound(f"nothing listens on port {port}", sandbox_id=handle.id) from None
            return connection.detach()


def _refuse_other_users(user: str | None) -> None:
    if user is not None and _ids(user)[0] != os.geteuid():
        raise errors.Unsupported(f"user {user}: the process runtime has the server's user alone")


def _ids(user: str) -> tuple[int, int]:
    """(user id, group id) of "name", "uid", "name:group", "uid:gid". NotFound with the name."""
    name, _, group = user.partition(":")
    try:
        known = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid = known.pw_uid, known.pw_gid
    except KeyError:
        if not name.isdigit():
            raise errors.NotFound(f"no such user: {name!r}") from None
        uid = gid = int(name)
    try:
        return uid, gid if not group else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise errors.NotFound(f"no such group: {group!r}") from None


def _streams(program: Program) -> tuple[dict[str, int], dict[int, int]]:
    """(our ends by name, theirs by number); ours are non-blocking."""
    ours: dict[str, int] = {}
    theirs: dict[int, int] = {}
    try:
        if program.pty is not None:
            master, slave = os.openpty()
            rows, columns = (max(1, min(int(value), 65535)) for value in program.pty)
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            ours.update(stdin=master, stdout=os.dup(master))
            theirs.update({0: slave, 1: slave, 2: slave})
        else:
            for number, name, wish in ((0, "stdin", program.stdin), (1, "stdout", program.stdout),
                                       (2, "stderr", program.stderr)):  # fmt: skip
                if wish == "stdout":
                    theirs[2] = theirs[1]
                elif wish == "null":
                    theirs[number] = os.open(os.devnull, os.O_RDWR)
                else:
                    _pipe(ours, theirs, name, number, reads=number == 0)
        for number, way in program.channels.items():
            if not 3 <= number <= 255 or way not in ("r", "w"):
                raise errors.InvalidConfig(f"channel {number} must be 3 to 255, and r or w")
            _pipe(ours, theirs, str(number), number, reads=way == "r")
        for fd in ours.values():
            os.set_blocking(fd, False)
    except BaseException:
        _close(ours.values(), theirs.values())
        raise
    return ours, theirs


def _pipe(ours: dict[str, int], theirs: dict[int, int], name: str, number: int, *, reads: bool) -> None:
    reading, writing = os.pipe()
    ours[name], theirs[number] = (writing, reading) if reads else (reading, writing)


def _child(wish: Mapping[str, object], fds: set[int]) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(wish).encode())
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", begin.__file__, str(file.fileno())], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env={}, pass_fds=[file.fileno(), *fds])


async def _all(fd: int) -> bytes:
    """What comes out of a pipe until its end."""
    os.set_blocking(fd, False)
    loop, out = asyncio.get_running_loop(), bytearray()
    done: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        piece = os.read(fd, 65536)
        out.extend(piece)
        if not piece and not done.done():
            done.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await done
    finally:
        loop.remove_reader(fd)
    return bytes(out)


def _close(*groups: Iterable[int]) -> None:
    for fd in {fd for group in groups for fd in group}:
        os.close(fd)
