"""The contract between the rocklet and whatever makes sandboxes on this machine.

A runtime implements `Runtime`; a sandbox is known by its `Handle`, plain data that is stored, so that a restarted
rocklet finds it again. A program is started with `spawn` and is then a `Process`, whose streams are descriptors of
ours.

Optional capabilities stand beside it and are asked for by type: `isinstance(runtime, Files)`. What has no methods by
which it could be told is a `Trait`, and declared.
"""

from __future__ import annotations

import signal as signals
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from rock.guest.init.link import CHANNEL_MEMORY as CHANNEL_MEMORY
from rock.images.records import RootFS
from rock.protocol.action import ConnectionList
from rock.protocol.sandbox import ArchivedFiles, Isolation, SandboxConfig, Usage

Stream = Literal["pipe", "null"]
Enforced = Literal["cgroup-v1", "cgroup-v2", "watched", "affinity", "rlimit", "loop", "tmpfs", "none"]


# The clock of `since`: that of start times, which goes on while the machine sleeps.
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Trait(StrEnum):
    """What a runtime promises beyond its methods. What it does not declare it need not hold, and nobody relies on it.

    The conformance suite has tests for each, and docs/runtimes.md a row.
    """

    PROGRAMS = "programs"  # programs of the image run as processes of the machine's kernel
    IMAGES = "images"  # it mounts images of the server's store, which are made ready before `create`
    TERMINALS = "terminals"  # Program.pty; Unsupported without it
    OUTLIVES = "outlives"  # sandboxes and kept programs go on when the server's process ends, and are found again
    ROOT = "root"  # a file system of its own: no path and no link leads to the host's files
    TREES = "trees"  # `tree` and `kill_tree` reach orphans and daemons, and know start times to 10 ms
    PROCESSES = "processes"  # sees and signals no processes but its own
    NETWORK = "network"  # network="none" is a loopback of its own, and nothing else
    USERS = "users"  # several users inside: `user` of programs and files is held by the kernel
    LIMITS = "limits"  # memory, cpus and pids are held; Handle.enforced says how


class Liveness(StrEnum):
    """What `recover` found."""

    RUNNING = "running"
    GONE = "gone"


@dataclass(frozen=True)
class Handle:
    """Where a sandbox is. `data` is JSON-safe and belongs to the runtime; nobody else reads it."""

    runtime: str
    id: str
    isolation: Isolation
    enforced: Mapping[str, Enforced]  # how each limit is held: "memory", "cpus", "pids", "disk", ...
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: `code` of a normal exit, or the number of the `signal` that killed it.

    Both None: it ended and nobody saw how. A status is never invented.
    """

    code: int | None = None
    signal: int | None = None

    @property
    def shell_code(self) -> int | None:
        """The status as a shell tells it: the exit code, or 128 + the signal."""
        return 128 + self.signal if self.signal is not None else self.code


@dataclass(frozen=True)
class Program:
    """A program to start in a sandbox.

    argv: no shell is involved; argv[0] is looked up in the PATH of `env`, inside.
    env: the whole environment; nothing is inherited.
    cwd: a folder inside; None is the image's working directory.
    user: "name", "uid", "name:group" or "uid:gid" inside; None is the image's user.
    stdin, stdout, stderr: "pipe" gives our side a descriptor, "null" is /dev/null; stderr="stdout" joins the two.
    pty: (rows, columns): one terminal as stdin, stdout and stderr and as the controlling terminal.
    channels: further pipes; key: the descriptor number that the program sees, value: "r" when the program reads it
        (we get the writing end), "w" when it writes it (we get the reading end), "m": memory of CHANNEL_MEMORY bytes
        that both can map, whose size nobody can change. Where a runtime cannot share memory there is no such channel.
    key: a name that is unique in the sandbox, for `attach` after a restart of the rocklet.
    keep: pid 1 holds copies of our ends of the streams, so that neither side sees an end of file when the
        rocklet crashes, and `attach` gives them again. When False the streams die with the rocklet.
    nofile: limit on open files; None leaves the default.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    stdin: Stream = "null"
    stdout: Stream = "pipe"
    stderr: Literal["pipe", "null", "stdout"] = "pipe"
    pty: tuple[int, int] | None = None
    channels: Mapping[int, Literal["r", "w", "m"]] = field(default_factory=dict)
    key: str = ""
    keep: bool = False
    nofile: int | None = None


class Process(Protocol):
    """One running program in a sandbox.

    The descriptors are ours (non-blocking, close-on-exec); None where the program has no such stream. With a pty,
    `stdin` and `stdout` are two descriptors of the terminal's master side and `stderr` is None.
    """

    pid: int  # as seen inside
    key: str
    stdin: int | None
    stdout: int | None
    stderr: int | None
    channels: Mapping[int, int]

    async def wait(self) -> ExitStatus:
        """How it ended. Any number of callers may wait, before or after the end; a lost sandbox raises Lost."""
        ...

    async def signal(
        self, number: signals.Signals | int, *, tree: bool = False, since: float | None = None, root: bool = True
    ) -> int:
        """Send a signal; answers how many processes got it. An ended process is no error, and gives 0.

        tree: to all its descendants too, those that left its process group or were orphaned included.
        since: only to descendants started at or after this time (seconds of CLOCK); the process itself
            is governed by `root` alone.
        """
        ...

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        """SIGKILL to the same set, again and again until none of it is left; answers how many were killed.

        tell: a signal for the process itself, when `root` spares it. It is stopped while its descendants are killed,
        and finds that signal first when it goes on: what it does then is not part of what was killed.
        """
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal; InvalidConfig without a pty."""
        ...

    async def close_stdin(self) -> None:
        """Give the program the end of its input: closes our `stdin`, and pid 1's copy of a kept one. Idempotent."""
        ...

    def close(self, *, forget: bool = True) -> None:
        """Close our descriptors, and let pid 1 forget a kept process that has ended. Idempotent, and kills nothing.

        forget: False keeps what pid 1 knows of it, for the rocklet after this one.
        """
        ...


@runtime_checkable
class Runtime(Protocol):
    """A way to make sandboxes on this machine.

    traits: what a sandbox of each isolation level that it may come to has; `Handle.isolation` is the level of one.
    """

    name: str
    traits: Mapping[Isolation, frozenset[Trait]]

    async def open(self) -> None:
        """Probe the host and start what the runtime needs (a launcher, a pool). Raises Unsupported with the reason."""
        ...

    async def close(self) -> None:
        """Release what `open` made and the warm pool. Sandboxes stay alive."""
        ...

    async def check(self, config: SandboxConfig) -> None:
        """Raise InvalidConfig, Unsupported, ImageError or NoCapacity where `create` would have to; starts nothing."""
        ...

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        """Make a sandbox in which `spawn` works. On failure nothing of it is left."""
        ...

    async def recover(self, handle: Handle) -> Liveness:
        """Find a sandbox again after a restart of the rocklet."""
        ...

    async def spawn(self, handle: Handle, program: Program) -> Process:
        """Start a program. Raises NotFound (no such program, cwd or user, with its name), InvalidConfig, Lost."""
        ...

    async def attach(self, handle: Handle, key: str) -> Process:
        """The kept process of that key, with its streams again; NotFound when there is none."""
        ...

    async def processes(self, handle: Handle) -> list[str]:
        """Keys of the kept processes that have not been closed."""
        ...

    async def wait(self, handle: Handle) -> str:
        """Return when the sandbox is gone, with the reason. Never returns while it lives.

        "exited": its pid 1 ended by itself, which code inside may have caused. "oom". "disk": its files took more than
        it may have. "gone", or a sentence where more is known: it was ended from outside."""
        ...

    async def stop(self, handle: Handle, grace: float) -> None:
        """SIGTERM to its programs, SIGKILL after `grace` seconds; the sandbox ends and its files stay until destroy."""
        ...

    async def destroy(self, handle: Handle) -> None:
        """Remove it and all it used. Idempotent; works on half-made and on dead sandboxes."""
        ...

    async def sweep(self, known: Sequence[str]) -> list[str]:
        """Destroy what this runtime left on the machine for ids that are not in `known`; answers their ids."""
        ...


# ---- optional capabilities ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileStat:
    """One file inside. `mtime` in seconds since the epoch, `mode` the permission bits, `target` of a symbolic link."""

    name: str
    kind: Literal["file", "directory", "symlink", "fifo", "socket", "device"]
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    target: str | None = None


_GIVEN: dict[tuple[type, type], bool] = {}


class _Capability(type(Protocol)):  # type: ignore[misc]
    """Asked for many times in each create, of a few classes: seen once for each of them, as looking takes 10 us. It has
    no fields, which would be looked for in runtimes too."""

    def __instancecheck__(cls, instance: object) -> bool:
        key = (cls, type(instance))
        given = _GIVEN.get(key)
        if given is None:
            given = _GIVEN[key] = super().__instancecheck__(instance)
        return given


@runtime_checkable
class Files(Protocol, metaclass=_Capability):
    """Files inside, without a shell and without any program of the image.

    Paths are absolute, resolved inside, so a symbolic link never leads out. `user` as in Program: with it the
    kernel checks that user's rights. Errors: NotFound, Conflict (exists, not a folder, is a folder, not empty),
    InvalidConfig (not a regular file: a FIFO, a device or a socket is refused and never blocks),
    Unauthorized (permission), StorageFull.
    """

    async def open_read(self, handle: Handle, path: str, *, user: str | None = None) -> int:
        """A descriptor for reading a regular file; the caller closes it."""
        ...

    async def open_write(
        self,
        handle: Handle,
        path: str,
        *,
        append: bool = False,
        mode: int | None = None,
        parents: bool = True,
        user: str | None = None,
    ) -> tuple[int, str]:
        """A descriptor for writing and a token. Without `append` it is a new file beside the old one; `commit_write`
        puts it in the old one's place at once, `abort_write` removes it. `mode` None keeps the old file's, else 0644.
        A symbolic link at `path` is followed: its target is replaced. With `append` the token is ""."""
        ...

    async def commit_write(self, handle: Handle, token: str) -> None: ...

    async def abort_write(self, handle: Handle, token: str) -> None: ...

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat: ...

    async def list(self, handle: Handle, path: str, *, offset: int = 0, limit: int = 10_000) -> list[FileStat]:
        """Entries of a folder by name, from `offset`, at most `limit`; links are not followed."""
        ...

    async def remove(self, handle: Handle, path: str, *, recursive: bool = False) -> None: ...

    async def make_dir(
        self, handle: Handle, path: str, *, parents: bool = True, mode: int = 0o755, user: str | None = None
    ) -> None: ...

    async def symlink(self, handle: Handle, target: str, path: str) -> None: ...

    async def move(self, handle: Handle, source: str, target: str) -> None: ...

    async def chmod(self, handle: Handle, path: str, mode: int, *, recursive: bool = False) -> None: ...

    async def chown(self, handle: Handle, path: str, user: str, *, recursive: bool = False) -> None: ...


@runtime_checkable
class Ports(Protocol, metaclass=_Capability):
    """Connections to ports inside, dialled from inside, so they work without a network too."""

    async def dial(self, handle: Handle, port: int, *, host: str = "127.0.0.1", timeout: float = 10.0) -> int:
        """A connected TCP socket's descriptor. Raises NotFound when nothing listens, PortTimeout."""
        ...


@runtime_checkable
class Connects(Protocol, metaclass=_Capability):
    """Network "nat": sandboxes reach what their policy allows, and all that they tried is noted."""

    async def connections(self, id: str) -> ConnectionList:
        """The last connections of a sandbox, of one that ended too; none of an unknown one."""
        ...


@runtime_checkable
class Accelerates(Protocol, metaclass=_Capability):
    """Gives sandboxes GPUs of this machine."""

    def gpus(self) -> tuple[Sequence[str], int]:
        """The kind of each, as "A100", and how many of them no sandbox has now."""
        ...


@runtime_checkable
class Limits(Protocol, metaclass=_Capability):
    """Measured use."""

    async def usage(self, handle: Handle) -> Usage: ...


@runtime_checkable
class Watches(Protocol, metaclass=_Capability):
    """The runtime tells what it did by itself, such as a kill for memory."""

    def oom_kills(self, handle: Handle) -> int:
        """How many processes were killed for memory so far."""
        ...


@runtime_checkable
class Keeps(Protocol, metaclass=_Capability):
    """What a sandbox wrote can outlive it. Asked for when `config.keeps_files`.

    A sandbox at rest has no process, memory, cgroup or network, only its files; `destroy` removes them, `sweep` leaves
    those that are known.
    """

    async def rest(self, handle: Handle, grace: float = 0.0) -> Handle:
        """End every process and keep the files; answers the handle of what is at rest. Idempotent, and finishes what a
        crash broke off, in a rest or in a wake. Lost when the files are gone. `grace` as in `stop`."""
        ...

    def pack(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """The files of one at rest as an OCI layer's tar, in pieces; the last item tells what was given.

        limit: most bytes of file content, holes counted. InvalidConfig, where the files cannot be told in a layer or
        are over a limit, may come after some pieces.
        """
        ...

    async def unpack(self, id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]) -> Handle:
        """A sandbox at rest with the files of such a tar. ImageError when the image here is not the one below them,
        InvalidConfig when the data is not `files`; then nothing of it is left."""
        ...

    async def wake(self, handle: Handle, config: SandboxConfig) -> Handle:
        """A new sandbox over the files of one at rest. When it fails, that stays at rest. ImageError when its image was
        removed."""
        ...


@runtime_checkable
class Snapshots(Protocol, metaclass=_Capability):
    """What a sandbox wrote can be read, whether it runs or is at rest: to make an image of it."""

    def image(self, handle: Handle) -> RootFS:
        """The image that it was made of, which it holds on disk."""
        ...

    def snapshot(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """What it wrote, as `Keeps.pack` gives it; its processes stand still meanwhile. They go on when the generator
        is closed, and when we crash. Unsupported where files were written that no layer can have."""
        ...


@runtime_checkable
class OwnImages(Protocol, metaclass=_Capability):
    """Its images are not those of our store: it finds and fetches them itself."""

    async def has_image(self, config: SandboxConfig) -> bool:
        """Whether `prepare_image` has nothing to do; with pull="never" always."""
        ...

    async def prepare_image(self, config: SandboxConfig, tell: Callable[[str], None]) -> None:
        """Fetch the image as `config.pull` says; `tell` is called with words on the progress. ImageError."""
        ...


class Prepared(Protocol):
    """What was started in a sandbox that nobody has claimed yet."""

    async def detach(self) -> None:
        """Let go of it: the sandbox is being removed."""
        ...


@runtime_checkable
class Pools(Protocol, metaclass=_Capability):
    """The runtime makes sandboxes ahead, and has them prepared by its user."""

    prepare: Callable[[Handle], Awaitable[Prepared | None]] | None
    """Called with each sandbox that is made ahead, under a handle that ends with its claim.

    A RockError says that nothing was started."""

    def prepared(self, handle: Handle) -> Prepared | None:
        """What `prepare` answered for the sandbox that has this handle now. It is the caller's from then on."""
        ...
