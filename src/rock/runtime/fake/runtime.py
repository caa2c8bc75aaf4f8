"""FakeRuntime: the interface of runtime/base.py over sandboxes in memory."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rock import errors
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.base import Enforced, ExitStatus, FileStat, Frozen, Handle, Liveness, Program, Trait
from rock.runtime.fake import programs
from rock.runtime.fake.builtins import PROGRAMS
from rock.runtime.fake.programs import Descriptor, FakeProcess, FakeSandbox, Null, Open
from rock.runtime.fake.tools import TOOLS
from rock.runtime.fake.tree import MOST_BYTES, SMALLER, Tree
from rock.runtime.refusals import key_taken, no_kept_program, no_program, no_such_user, not_writing, unavailable_channel

HOME = "/work"
_PATH = "/usr/local/bin:/usr/bin:/bin"
_ENFORCED: dict[str, Enforced] = {"memory": "none", "cpus": "none", "pids": "none"}
_ROOT = ("root", "0", "root:root", "0:0", "root:0", "0:root")
ROOT_ONLY = "leave user unset; a fake sandbox has the user root only"  # hint of errors


class SpawnedStreams:
    """A spawned program and the caller's ends of its streams, which `attach` returns while it is kept."""

    def __init__(self, process: FakeProcess, key: str, keep: bool, ours: dict[str, int]) -> None:
        self.process = process
        self.key = key
        self.keep = keep
        self.held = {name: os.dup(fd) for name, fd in ours.items()} if keep else {}

    def release(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


class SpawnedProcess:
    """A program of a fake sandbox: implements `Process`."""

    def __init__(self, runtime: FakeRuntime, sandbox: FakeSandbox, kept: SpawnedStreams, ours: dict[str, int]) -> None:
        self.pid = kept.process.pid
        self.key = kept.key
        self._runtime = runtime
        self._sandbox = sandbox
        self._kept = kept
        self._closed = False
        self.stdin: int | None = ours.pop("stdin", None)
        self.stdout: int | None = ours.pop("stdout", None)
        self.stderr: int | None = ours.pop("stderr", None)
        self.channels: Mapping[int, int] = {int(name): fd for name, fd in ours.items()}

    async def wait(self) -> ExitStatus:
        return await self._kept.process.wait()

    async def signal(self, number: int, *, tree: bool = False, since: float | None = None, root: bool = True) -> int:
        process = self._kept.process
        if process.status is not None:
            return 0
        found = list(programs.tree_of(process, since, include=root)) if tree else [process] if root else []
        for each in found:
            each.deliver(int(number))
        return len(found)

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        process = self._kept.process
        if process.status is not None:
            return 0
        if tell is not None and not root:
            process.deliver(tell)
        return await self._sandbox.kill(process, since, include=root)

    async def resize(self, rows: int, columns: int) -> None:
        raise errors.InvalidConfig("this program has no terminal", sandbox_id=self._sandbox.id,
                                   hint="the fake runtime has no terminals; use another runtime for a pty")

    async def close_stdin(self) -> None:
        if self.stdin is None:
            return
        fd, self.stdin = self.stdin, None
        os.close(fd)
        held = self._kept.held.pop("stdin", None)
        if held is not None:
            os.close(held)

    def close(self, *, forget: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        for fd in (self.stdin, self.stdout, self.stderr, *self.channels.values()):
            if fd is not None:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = None
        self.channels = {}
        if forget and self._kept.keep and self._kept.process.status is not None:
            self._runtime.forget(self._sandbox, self._kept)


class FakeRuntime:
    """Sandboxes in memory, which end with `close`.

    programs: functions of a `Call` by name; they take precedence over the built-in programs.
    """

    name = "fake"
    traits: Mapping[Isolation, frozenset[Trait]] = {
        Isolation.NONE: frozenset({Trait.ROOT, Trait.PROCESSES, Trait.TREES}),
    }

    def __init__(self, programs: Mapping[str, programs.Program] | None = None) -> None:
        self._programs = {**TOOLS, **PROGRAMS, **(programs or {})}
        self._sandboxes: dict[str, FakeSandbox] = {}
        self._kept: dict[str, dict[str, SpawnedStreams]] = {}  # by slot and key
        self._snapshots: dict[str, tuple[Tree, Frozen]] = {}
        self._runs_on: dict[str, str] = {}  # by slot, the snapshot on which a sandbox runs

    # ---- sandboxes ----

    async def open(self) -> None:
        return

    async def close(self) -> None:
        """End all sandboxes: no other process holds them."""
        for slot in list(self._sandboxes):
            await self._remove(slot)

    async def check(self, config: SandboxConfig) -> None:
        if config.minimum_isolation != Isolation.NONE:
            raise errors.Unsupported(f"{config.minimum_isolation} was asked for; the fake runtime isolates nothing",
                                     hint="use the namespace runtime")
        if config.network != "none":
            raise errors.Unsupported(f'the fake runtime has no network "{config.network}"', hint='use "none"')
        if config.isolation not in (None, Isolation.NONE):
            raise errors.Unsupported(f"isolation {config.isolation}: the fake runtime isolates nothing",
                                     hint="use the namespace runtime")
        for name in ("disk", "num_gpus", "accelerator_type", "limit_cpus", "nofile", "shm_size"):
            if getattr(config, name) is not None:
                raise errors.Unsupported(f"the fake runtime cannot enforce {name}",
                                         hint=f"leave {name} unset, or use the namespace runtime")
        if config.use_kata_runtime or config.oci_runtime is not None or config.image_os != "linux":
            raise errors.Unsupported("the fake runtime runs programs of its own only, without an OCI runtime",
                                     hint="leave use_kata_runtime, oci_runtime and image_os unset")
        if config.snapshot is not None:
            self._snapshot(config.snapshot)

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        await self.check(config)
        slot = secrets.token_hex(6)
        made = self._sandboxes[slot] = FakeSandbox(id, dict(config.env), self._programs)
        if config.snapshot is not None:
            made.files = self._snapshot(config.snapshot).copy()
            self._runs_on[slot] = config.snapshot
        return Handle(self.name, id, Isolation.NONE, _ENFORCED, {"slot": slot})

    def sandbox(self, handle: Handle) -> FakeSandbox:
        """The sandbox of a handle, for tests that inspect or change it. Lost when it is gone."""
        found = self._sandboxes.get(handle.data["slot"])
        if found is None or not found.alive:
            raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
        return found

    # ---- snapshots ----

    def _snapshot(self, snapshot_id: str) -> Tree:
        found = self._snapshots.get(snapshot_id)
        if found is None:
            raise errors.NotFound(f"there is no snapshot {snapshot_id} on this worker", hint="`rock snapshot ls`")
        return found[0]

    async def checkpoint(self, handle: Handle, snapshot_id: str, files: Literal["auto", "switch", "copy"],
                         processes: bool = False, continued: Callable[[], None] = lambda: None) -> Frozen:
        if processes:
            raise errors.Unsupported("processes cannot be copied: the fake runtime has none", sandbox_id=handle.id,
                                     hint='use memory="files" or "auto"')
        if snapshot_id not in self._snapshots:
            if files == "switch":
                raise errors.Unsupported("the fake runtime has no layers to switch", sandbox_id=handle.id,
                                         hint='use files="copy" or "auto"')
            tree = self.sandbox(handle).files.copy()
            self._snapshots[snapshot_id] = tree, Frozen(handle, "copy", tree.used, 1, 0.0)
            self._runs_on[handle.data["slot"]] = snapshot_id
        return self._snapshots[snapshot_id][1]

    async def refusals(self, handle: Handle) -> Sequence[str]:
        return ["the fake runtime has no processes"]

    def parent(self, handle: Handle) -> str | None:
        found = self._runs_on.get(handle.data["slot"])
        return found if found in self._snapshots else None

    async def replace(self, handle: Handle, config: SandboxConfig, snapshot_id: str) -> Handle:
        return await self.create(handle.id, config.model_copy(update={"snapshot": snapshot_id}))

    def snapshots(self) -> Mapping[str, Sequence[str]]:
        return {one: [] for one in self._snapshots}  # each sandbox has a copy

    async def drop_snapshot(self, snapshot_id: str) -> bool:
        self._snapshots.pop(snapshot_id, None)
        return True

    # ---- end ----

    async def recover(self, handle: Handle) -> Liveness:
        found = self._sandboxes.get(handle.data["slot"])
        return Liveness.RUNNING if found is not None and found.alive else Liveness.GONE

    async def wait(self, handle: Handle) -> str:
        found = self._sandboxes.get(handle.data["slot"])
        if found is not None:
            await found.ended()
        return "gone"

    async def stop(self, handle: Handle, grace: float) -> None:
        found = self._sandboxes.get(handle.data["slot"])
        if found is not None:
            await found.stop(grace)

    async def destroy(self, handle: Handle) -> None:
        await self._remove(handle.data["slot"])

    async def _remove(self, slot: str) -> None:
        found = self._sandboxes.get(slot)
        if found is None:
            return
        await found.stop(0.0)
        for kept in self._kept.pop(slot, {}).values():
            kept.release()
        for fd in found.writing.values():
            os.close(fd)
        found.writing.clear()
        self._sandboxes.pop(slot, None)
        self._runs_on.pop(slot, None)

    async def sweep(self, known: Sequence[str]) -> list[str]:
        names = set(known)
        gone = [(slot, found.id) for slot, found in self._sandboxes.items() if found.id not in names]
        for slot, _ in gone:
            await self._remove(slot)
        return [id for _, id in gone]

    # ---- programs ----

    async def spawn(self, handle: Handle, program: Program) -> SpawnedProcess:
        sandbox = self.sandbox(handle)
        argv, env = self._admit(handle, sandbox, program)
        cwd = program.cwd or HOME
        try:
            sandbox.files.folder(cwd)
        except errors.RockError as error:
            raise type(error)(f"working folder {cwd!r}: {error.message}", sandbox_id=handle.id) from None
        function, words = sandbox.program(argv, env, cwd)
        ours, theirs = _streams(program)
        try:
            process = FakeProcess(sandbox, None, sandbox.files.real(cwd), theirs)
        except BaseException:
            for stream in theirs.values():
                stream.close()
            for fd in ours.values():
                os.close(fd)
            raise
        kept = SpawnedStreams(process, program.key, program.keep, ours)
        if program.keep:
            self._kept.setdefault(handle.data["slot"], {})[program.key] = kept
        sandbox.processes[process.pid] = process
        process.run(lambda: process.play(function, words, env))
        return SpawnedProcess(self, sandbox, kept, ours)

    def _admit(self, handle: Handle, sandbox: FakeSandbox, program: Program) -> tuple[list[str], dict[str, str]]:
        if not program.argv or any("\0" in word for word in program.argv):
            raise no_program(handle.id)
        if not program.argv[0]:
            raise errors.InvalidConfig("the name of the program is empty", sandbox_id=handle.id,
                                       hint="give the program and its arguments, as in ['python3', 'main.py']")
        if program.pty is not None:
            raise errors.Unsupported("the fake runtime has no terminals", sandbox_id=handle.id, hint="leave pty out")
        if program.user is not None and program.user not in _ROOT:
            raise no_such_user(program.user, ROOT_ONLY)
        for number, way in program.channels.items():
            if not 3 <= number <= 255 or way not in ("r", "w", "m"):
                raise unavailable_channel(number, way, handle.id)
        if program.key and program.key in self._kept.get(handle.data["slot"], {}):
            raise key_taken(program.key, handle.id)
        return list(program.argv), {"PATH": _PATH, "HOME": "/root", **sandbox.env, **program.env}

    async def attach(self, handle: Handle, key: str) -> SpawnedProcess:
        sandbox = self.sandbox(handle)
        kept = self._kept.get(handle.data["slot"], {}).get(key)
        if kept is None:
            raise no_kept_program(key, handle.id)
        return SpawnedProcess(self, sandbox, kept, {name: os.dup(fd) for name, fd in kept.held.items()})

    async def processes(self, handle: Handle) -> list[str]:
        self.sandbox(handle)
        return list(self._kept.get(handle.data["slot"], {}))

    def forget(self, sandbox: FakeSandbox, kept: SpawnedStreams) -> None:
        """Called by a process that was closed after its end."""
        for of_sandbox in self._kept.values():
            if of_sandbox.get(kept.key) is kept:
                del of_sandbox[kept.key]
                kept.release()
                return

    # ---- files ----

    def _user(self, user: str | None) -> None:
        if user is not None and user not in _ROOT:
            raise no_such_user(user, ROOT_ONLY)

    async def open_read(self, handle: Handle, path: str, *, user: str | None = None) -> int:
        self._user(user)
        fd = _memory()
        try:
            _fill(fd, self.sandbox(handle).files.read(path))
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def open_write(
        self, handle: Handle, path: str, *, append: bool = False, mode: int | None = None, parents: bool = True,
        user: str | None = None,
    ) -> tuple[int, str]:
        """`append` also returns a token: written data becomes visible at the commit."""
        self._user(user)
        sandbox = self.sandbox(handle)
        sandbox.files.place(path, parents=parents)
        fd = _memory()
        token = f"{secrets.token_hex(8)}:{int(append)}:{'' if mode is None else mode}:{path}"
        sandbox.writing[token] = os.dup(fd)
        return fd, token

    async def commit_write(self, handle: Handle, token: str) -> None:
        sandbox = self.sandbox(handle)
        fd = sandbox.writing.pop(token, None)
        if fd is None:
            raise not_writing(handle.id)
        try:
            size = os.fstat(fd).st_size
            if size > MOST_BYTES:
                raise errors.StorageFull(f"the files of a fake sandbox exceed its limit of {MOST_BYTES} bytes",
                                         hint=SMALLER)
            data = os.pread(fd, size, 0)
        finally:
            os.close(fd)
        _, append, mode, path = token.split(":", 3)
        sandbox.files.write(path, data, int(mode) if mode else None, append=append == "1")

    async def abort_write(self, handle: Handle, token: str) -> None:
        fd = self.sandbox(handle).writing.pop(token, None)
        if fd is not None:
            os.close(fd)

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat:
        return self.sandbox(handle).files.stat(path, follow=follow)

    async def list(self, handle: Handle, path: str, *, offset: int = 0, limit: int = 10_000) -> list[FileStat]:
        return self.sandbox(handle).files.list(path)[offset : offset + limit]

    async def remove(self, handle: Handle, path: str, *, recursive: bool = False) -> None:
        self.sandbox(handle).files.remove(path, recursive=recursive)

    async def make_dir(
        self, handle: Handle, path: str, *, parents: bool = True, mode: int = 0o755, user: str | None = None
    ) -> None:
        self._user(user)
        self.sandbox(handle).files.make_dir(path, parents=parents, mode=mode)

    async def symlink(self, handle: Handle, target: str, path: str) -> None:
        self.sandbox(handle).files.symlink(target, path)

    async def move(self, handle: Handle, source: str, target: str) -> None:
        self.sandbox(handle).files.move(source, target)

    async def chmod(self, handle: Handle, path: str, mode: int, *, recursive: bool = False) -> None:
        self.sandbox(handle).files.chmod(path, mode, recursive=recursive)

    async def chown(self, handle: Handle, path: str, user: str, *, recursive: bool = False) -> None:
        name, _, group = user.partition(":")
        ids = [0 if word in ("root", "") else int(word) if word.isdigit() else -1 for word in (name, group)]
        if -1 in ids:
            raise no_such_user(user, ROOT_ONLY)
        self.sandbox(handle).files.chown(path, ids[0], ids[1], recursive=recursive)


def _streams(program: Program) -> tuple[dict[str, int], dict[int, Open]]:
    """(the caller's ends by name, the program's by number) of a program's streams."""
    ours: dict[str, int] = {}
    theirs: dict[int, Open] = {}
    specs: list[tuple[str, int, str]] = [("stdin", 0, program.stdin), ("stdout", 1, program.stdout),
                                          ("stderr", 2, program.stderr)]
    specs += [(str(number), number, "pipe") for number, way in program.channels.items() if way != "m"]
    try:
        for name, number, spec in specs:
            if spec == "stdout":
                theirs[2] = theirs[1].copy()
            elif spec == "null":
                theirs[number] = Null()
            elif spec == "pipe":
                reading, writing = os.pipe()
                reads = number == 0 or program.channels.get(number) == "r"
                ours[name], fd = (writing, reading) if reads else (reading, writing)
                theirs[number] = Descriptor(fd)
                for each in (reading, writing):
                    os.set_blocking(each, False)
            else:
                raise errors.InvalidConfig(f"{name} cannot be {spec!r} in the fake runtime",
                                           hint="use a pipe, the null device, or stdout for stderr")
    except BaseException as error:
        for fd in ours.values():
            os.close(fd)
        for stream in theirs.values():
            stream.close()
        if isinstance(error, OSError):
            raise errors.Unavailable(f"the streams of the program cannot be opened: {error.strerror}",
                                     hint="close programs that are no longer needed; the server may be at its limit of "
                                          "open files") from None
        raise
    return ours, theirs


def _memory() -> int:
    """An unnamed file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rock-fake")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _fill(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)


