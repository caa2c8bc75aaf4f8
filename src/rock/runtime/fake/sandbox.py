"""One fake sandbox: its files, its processes, and its programs by name."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import time
from collections.abc import Mapping

from rock import errors
from rock.runtime.fake.programs import FakeProcess, Program, tree_of
from rock.runtime.fake.shell import alone, sh
from rock.runtime.fake.tools import TOOLS
from rock.runtime.fake.tree import Tree

_ALONE = ("[", "echo", "kill", "printf", "pwd", "test")
PROGRAMS: dict[str, Program] = {**TOOLS, **dict.fromkeys(_ALONE, alone), "sh": sh, "bash": sh, "dash": sh}
_FOLDERS = ("/bin", "/usr/bin", "/usr/local/bin")
_PATIENCE = 10.0  # seconds for a killed program to end
MOST_PROCESSES = 4096


class FakeSandbox:
    """The complete state of a sandbox. Files and processes are created on demand."""

    __slots__ = ("_ended", "_files", "_pid", "alive", "env", "given", "id", "processes", "writing")

    def __init__(self, id: str, env: dict[str, str], given: Mapping[str, Program]) -> None:
        self.id = id
        self.env = env
        self.given = given
        self.alive = True
        self.processes: dict[int, FakeProcess] = {}
        self.writing: dict[str, int] = {}  # descriptors of files open for writing, by token
        self._files: Tree | None = None
        self._pid = 1
        self._ended: asyncio.Event | None = None

    @property
    def files(self) -> Tree:
        if self._files is None:
            self._files = Tree()
        return self._files

    def next_pid(self) -> int:
        if len(self.processes) >= MOST_PROCESSES:
            raise errors.QuotaExceeded(f"a fake sandbox has at most {MOST_PROCESSES} processes", sandbox_id=self.id)
        self._pid += 1
        return self._pid

    def gone(self, process: FakeProcess) -> None:
        self.processes.pop(process.pid, None)

    # ---- programs ----

    def program(self, argv: list[str], env: Mapping[str, str], cwd: str) -> tuple[Program, list[str]]:
        """The function and the arguments of a command line. NotFound, PermissionDenied, InvalidConfig."""
        name = argv[0]
        known = self.given.get(name) or PROGRAMS.get(name)
        if "/" not in name:
            if known is not None:
                return known, argv
            for folder in env.get("PATH", ":".join(_FOLDERS)).split(":"):
                if folder.startswith("/") and self.files.get(f"{folder}/{name}") is not None:
                    return self._file(f"{folder}/{name}", argv)
            raise errors.NotFound(f"no such program: {name!r}", sandbox_id=self.id,
                                  hint="FakeRuntime(programs={name: function}) gives a fake sandbox further programs")
        path = name if name.startswith("/") else f"{cwd.rstrip('/')}/{name}"
        base = posixpath.basename(path)
        known = self.given.get(path) or self.given.get(base) or PROGRAMS.get(base)
        if known is not None and posixpath.dirname(path) in _FOLDERS:
            return known, argv
        return self._file(path, argv)

    def _file(self, path: str, argv: list[str]) -> tuple[Program, list[str]]:
        node = self.files.get(path)
        if node is None:
            raise errors.NotFound(f"no such program: {argv[0]!r}", sandbox_id=self.id)
        if node.kind != "file" or not node.mode & 0o111:
            raise errors.PermissionDenied(f"program {path!r} is not executable: permission denied", sandbox_id=self.id)
        if not node.data.startswith(b"#!"):
            raise errors.InvalidConfig(f"program {path!r} is not in a format that this machine can execute",
                                       sandbox_id=self.id)
        words = node.data[2:].split(b"\n", 1)[0].decode("utf-8", "replace").split()
        names = [posixpath.basename(word) for word in words]
        interpreter = names[1] if names[:1] == ["env"] and len(names) > 1 else names[0] if names else ""
        program = self.given.get(interpreter) or PROGRAMS.get(interpreter)
        if program is None:
            raise errors.NotFound(f"program {path!r} is there, but its interpreter {interpreter!r} is missing",
                                  sandbox_id=self.id)
        return program, [interpreter, path, *argv[1:]]

    # ---- end ----

    async def kill(self, root: FakeProcess, since: float | None, *, include: bool) -> int:
        """Send SIGKILL to a tree until no process of it remains; returns the number of killed processes."""
        killed: set[int] = set()
        end = time.monotonic() + _PATIENCE
        while found := list(tree_of(root, since, include=include)):
            for process in found:
                killed.add(process.pid)
                process.deliver(9)
            left = max(0.0, end - time.monotonic())
            await _ended(found, left)
            if left == 0.0:
                break
        return len(killed)

    async def stop(self, grace: float) -> None:
        """Send SIGTERM to all, SIGKILL after `grace` seconds; then the sandbox is dead. Idempotent."""
        end = time.monotonic() + grace
        if grace > 0:
            for process in list(self.processes.values()):
                process.deliver(15)
        while self.processes and (left := end - time.monotonic()) > 0:
            await _ended(list(self.processes.values()), left)
        self.alive = False
        while self.processes:
            found = list(self.processes.values())
            for process in found:
                process.deliver(9)
            await _ended(found, _PATIENCE)
        if self._ended is not None:
            self._ended.set()

    async def ended(self) -> None:
        """Return when the sandbox is dead."""
        if self.alive:
            self._ended = self._ended or asyncio.Event()
            await self._ended.wait()


async def _ended(found: list[FakeProcess], seconds: float) -> None:
    """Wait until these have ended, up to the timeout."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for process in found:
                await process.ended.wait()
