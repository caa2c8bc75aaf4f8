"""Runtime "process" where guest/init/pid1.py cannot run, as on macOS: programs are children of the server itself.

It uses portable Unix features only: no /proc, no pidfd, no packet sockets. Sandboxes therefore end with the server, and
a daemon that left its process group is not found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import pwd
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from rock import errors
from rock.guest.init import remove
from rock.protocol.sandbox import Isolation, SandboxConfig, Usage
from rock.runtime.base import Enforced, FileStat, Handle, Liveness, Program, Trait
from rock.runtime.process import portable_files, portable_process
from rock.runtime.process.portable_process import PlainProcess, PlainSandbox, close_all, read_all, start, streams_of
from rock.runtime.process.runtime import refuse_unsupported
from rock.runtime.refusals import key_taken, no_kept_program, no_program, no_such_user, not_writing

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENFORCED: dict[str, Enforced] = {"memory": "none", "cpus": "none", "pids": "none"}


class PlainRuntime:
    """Plain processes of the server. `run_dir` holds one folder per sandbox; it is created when missing."""

    name = "process"
    traits: Mapping[Isolation, frozenset[Trait]] = {Isolation.NONE: frozenset({Trait.PROGRAMS, Trait.TERMINALS})}

    def __init__(self, run_dir: Path, container_image: str = "") -> None:
        self._run_dir = Path(run_dir)
        self._container_image = container_image
        self._sandboxes: dict[str, PlainSandbox] = {}

    async def open(self) -> None:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def close(self) -> None:
        """End all sandboxes: their programs cannot be found again."""
        for slot in list(self._sandboxes):
            await self._remove(slot)

    async def check(self, config: SandboxConfig) -> None:
        refuse_unsupported(config, self._container_image)

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        await self.check(config)
        slot = f"p-{secrets.token_hex(5)}"
        home = self._run_dir / slot / "root"
        home.mkdir(mode=0o700, parents=True)
        self._sandboxes[slot] = PlainSandbox(id, dict(config.env))
        return Handle(self.name, id, Isolation.NONE, _ENFORCED, {"slot": slot, "home": str(home)})

    def _find(self, handle: Handle) -> PlainSandbox:
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
        """Remove folders without a sandbox of this server: the other sandboxes ended with their server."""
        gone = []
        for folder in self._run_dir.glob("p-*"):
            found = self._sandboxes.get(folder.name)
            if found is None or found.id not in known:
                gone.append(found.id if found is not None else folder.name)
                await self._remove(folder.name)
        return gone

    async def usage(self, handle: Handle) -> Usage:
        return await portable_process.usage(list(self._find(handle).children))

    # ---- programs ----

    async def spawn(self, handle: Handle, program: Program) -> PlainProcess:
        sandbox = self._find(handle)
        if not program.argv or not program.argv[0] or any("\0" in word for word in program.argv):
            raise no_program(handle.id)
        if program.key and program.key in sandbox.kept:
            raise key_taken(program.key, handle.id)
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

    async def _start(self, handle: Handle, sandbox: PlainSandbox, program: Program) -> PlainProcess:
        env = {"PATH": _PATH, "HOME": handle.data["home"], **sandbox.env, **program.env}
        ours, theirs = streams_of(program)
        verdict_pipe, telling = os.pipe()
        try:
            spec = {"fds": theirs, "argv": list(program.argv), "env": env, "cwd": program.cwd or handle.data["home"],
                    "terminal": program.pty is not None, "nofile": program.nofile, "told": telling}
            child = start(spec, {telling, *theirs.values()})
        except BaseException as error:
            close_all(ours.values(), theirs.values(), (verdict_pipe, telling))
            if isinstance(error, OSError):
                raise errors.InvalidConfig(f"the program could not be started: {error.strerror}",
                                           hint="check the program's name, its cwd and its env") from None
            raise
        close_all(theirs.values(), (telling,))
        try:
            verdict = await read_all(verdict_pipe)
        finally:
            os.close(verdict_pipe)
        if verdict:
            close_all(ours.values())
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
            raise no_kept_program(key, handle.id)
        return kept.again()

    async def processes(self, handle: Handle) -> list[str]:
        return list(self._find(handle).kept)

    # ---- files and ports ----

    async def open_read(self, handle: Handle, path: str, *, user: str | None = None) -> int:
        _refuse_other_users(user)
        return portable_files.open_read(path)

    async def open_write(
        self, handle: Handle, path: str, *, append: bool = False, mode: int | None = None, parents: bool = True,
        user: str | None = None,
    ) -> tuple[int, str]:
        _refuse_other_users(user)
        fd, token = portable_files.open_write(path, append=append, mode=mode, parents=parents)
        if token:
            self._find(handle).writing.add(token)
        return fd, token

    async def commit_write(self, handle: Handle, token: str) -> None:
        if token:
            self._written(handle, token)
            portable_files.commit(token)

    async def abort_write(self, handle: Handle, token: str) -> None:
        if token in self._find(handle).writing:
            self._written(handle, token)
            portable_files.abort(token)

    def _written(self, handle: Handle, token: str) -> None:
        if token not in self._find(handle).writing:
            raise not_writing(handle.id)
        self._find(handle).writing.discard(token)

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat:
        return portable_files.stat(path, follow=follow)

    async def list(self, handle: Handle, path: str, *, offset: int = 0, limit: int = 10_000) -> list[FileStat]:
        return await asyncio.to_thread(portable_files.list_folder, path, offset, limit)

    async def remove(self, handle: Handle, path: str, *, recursive: bool = False) -> None:
        await asyncio.to_thread(portable_files.remove, path, recursive=recursive)

    async def make_dir(
        self, handle: Handle, path: str, *, parents: bool = True, mode: int = 0o755, user: str | None = None
    ) -> None:
        _refuse_other_users(user)
        portable_files.make_dir(path, parents=parents, mode=mode)

    async def symlink(self, handle: Handle, target: str, path: str) -> None:
        portable_files.symlink(target, path)

    async def move(self, handle: Handle, source: str, target: str) -> None:
        portable_files.move(source, target)

    async def chmod(self, handle: Handle, path: str, mode: int, *, recursive: bool = False) -> None:
        await asyncio.to_thread(portable_files.each, path, recursive, lambda entry: os.chmod(entry, mode))

    async def chown(self, handle: Handle, path: str, user: str, *, recursive: bool = False) -> None:
        uid, gid = _ids(user)
        await asyncio.to_thread(portable_files.each, path, recursive, lambda entry: os.chown(entry, uid, gid))

    async def dial(self, handle: Handle, port: int, *, host: str = "127.0.0.1", timeout: float = 10.0) -> int:
        self._find(handle)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.inet_pton(family, host)
        except OSError:
            raise errors.InvalidConfig(f"{host!r} is not an IP address",
                                       hint="give an address such as 127.0.0.1 or ::1") from None
        if not 0 < port < 65536:
            raise errors.InvalidConfig(f"{port} is not a port number", hint="give a port from 1 to 65535")
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.get_running_loop().sock_connect(connection, (host, port))
            except TimeoutError:
                raise errors.PortTimeout(f"port {port} does not answer", sandbox_id=handle.id) from None
            except OSError:
                raise errors.NotFound(f"nothing listens on port {port}", sandbox_id=handle.id,
                                      hint="start the server inside first, and let it listen on 127.0.0.1 or "
                                           "0.0.0.0") from None
            return connection.detach()


def _refuse_other_users(user: str | None) -> None:
    if user is not None and _ids(user)[0] != os.geteuid():
        raise errors.Unsupported(f"user {user!r} is not available: the process runtime has the server's user only",
                                 hint="leave user unset, or use another runtime")


def _ids(user: str) -> tuple[int, int]:
    """(user id, group id) of "name", "uid", "name:group", "uid:gid". NotFound with the name."""
    name, _, group = user.partition(":")
    try:
        known = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid = known.pw_uid, known.pw_gid
    except KeyError:
        if not name.isdigit():
            raise no_such_user(name, "give a user or a user id of this machine") from None
        uid = gid = int(name)
    try:
        return uid, gid if not group else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise errors.NotFound(f"no such group: {group!r}", hint="give a group or a group id of this machine") from None
