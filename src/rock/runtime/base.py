"""The interface between the rocklet and the drivers that create sandboxes on this machine.

A driver implements `Runtime`. A `Handle` identifies a sandbox; it is plain data that the rocklet stores, so a restarted
rocklet finds the sandbox again. `spawn` starts a program and returns a `Process`, whose streams are file descriptors in
the rocklet.

Optional capabilities are separate protocols that callers test by type: `isinstance(runtime, Files)`. A property without
methods is a declared `Trait`.
"""

from __future__ import annotations

import signal as signals
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from rock.guest.init.link import CHANNEL_MEMORY as CHANNEL_MEMORY
from rock.images.records import RootFS
from rock.protocol.action import ConnectionList
from rock.protocol.sandbox import ArchivedFiles, Isolation, SandboxConfig, Usage

Stream = Literal["pipe", "null"]
Enforced = Literal["cgroup-v1", "cgroup-v2", "watched", "affinity", "rlimit", "loop", "tmpfs", "none"]

# Clock of `since`: the clock of process start times, which continues while the machine is suspended.
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Trait(StrEnum):
    """A guarantee of a runtime beyond its methods. Callers rely only on traits that the runtime declares.

    The conformance suite tests each trait, and docs/runtimes.md lists them.
    """

    PROGRAMS = "programs"  # programs of the image run as processes of the machine's kernel
    IMAGES = "images"  # mounts images of the server's store, which are prepared before `create`
    TERMINALS = "terminals"  # Program.pty; Unsupported without it
    OUTLIVES = "outlives"  # sandboxes and kept programs survive the server's process and are found again
    ROOT = "root"  # a file system of its own: no path or link leads to the host's files
    TREES = "trees"  # `tree` and `kill_tree` include orphans and daemons; start times have a resolution of 10 ms
    PROCESSES = "processes"  # a sandbox sees and signals only its own processes
    NETWORK = "network"  # network="none" gives a private loopback device only
    USERS = "users"  # several users inside: the kernel enforces `user` of programs and files
    LIMITS = "limits"  # memory, cpus and pids are enforced; Handle.enforced names the mechanism


class Liveness(StrEnum):
    """The result of `recover`."""

    RUNNING = "running"
    GONE = "gone"


@dataclass(frozen=True)
class Handle:
    """The identity of a sandbox on this machine. `data` is JSON-safe and private to the runtime."""

    runtime: str
    id: str
    isolation: Isolation
    enforced: Mapping[str, Enforced]  # mechanism per limit: "memory", "cpus", "pids", "disk", ...
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExitStatus:
    """The exit of a process: `code` of a normal exit, or the number of the `signal` that killed it.

    Both are None when the exit status is unknown. A status is never invented.
    """

    code: int | None = None
    signal: int | None = None

    @property
    def shell_code(self) -> int | None:
        """The status in shell convention: the exit code, or 128 + the signal."""
        return 128 + self.signal if self.signal is not None else self.code


@dataclass(frozen=True)
class Program:
    """A program to start in a sandbox.

    argv: runs without a shell; argv[0] is looked up in the PATH of `env`, inside.
    env: the whole environment; nothing is inherited.
    cwd: a folder inside; None is the image's working directory.
    user: "name", "uid", "name:group" or "uid:gid" inside; None is the image's user.
    stdin, stdout, stderr: "pipe" returns a descriptor to the rocklet, "null" is /dev/null; stderr="stdout" joins the
        two.
    pty: (rows, columns): one terminal as stdin, stdout and stderr and as the controlling terminal.
    channels: further pipes. The key is the descriptor number in the program. The value is "r" when the program reads
        (the rocklet gets the writing end), "w" when it writes (the rocklet gets the reading end), or "m": shared memory
        of CHANNEL_MEMORY bytes with a sealed size. A runtime that cannot share memory omits an "m" channel.
    key: a name that is unique in the sandbox, for `attach` after a restart of the rocklet.
    keep: pid 1 holds copies of the rocklet's ends of the streams. Neither side sees an end of file when the rocklet
        crashes, and `attach` returns the streams again. When False, the streams close with the rocklet.
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

    The descriptors belong to the rocklet (non-blocking, close-on-exec); None where the program has no such stream. With
    a pty, `stdin` and `stdout` are two descriptors of the terminal's master side and `stderr` is None.
    """

    pid: int  # as seen inside
    key: str
    stdin: int | None
    stdout: int | None
    stderr: int | None
    channels: Mapping[int, int]

    async def wait(self) -> ExitStatus:
        """Wait for the exit status. Supports any number of callers, before or after the exit. Raises Lost for a lost
        sandbox."""
        ...

    async def signal(
        self, number: signals.Signals | int, *, tree: bool = False, since: float | None = None, root: bool = True
    ) -> int:
        """Send a signal; returns the number of processes that received it. Returns 0 for an ended process.

        tree: includes all descendants, also those that left the process group or were orphaned.
        since: restricts the descendants to those started at or after this time (seconds of CLOCK); `root` alone decides
            about the process itself.
        """
        ...

    async def kill_tree(self, *, since: float | None = None, root: bool = True, tell: int | None = None) -> int:
        """Send SIGKILL to the same set until no process of it remains; returns the number of killed processes.

        tell: a signal for the process itself when `root` spares it. The process is stopped while its descendants are
        killed, and receives this signal first when it continues. Processes that it starts afterwards are not killed.
        """
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Set the terminal size; InvalidConfig without a pty."""
        ...

    async def close_stdin(self) -> None:
        """Close the program's input: the rocklet's `stdin` and, for a kept program, pid 1's copy. Idempotent."""
        ...

    def close(self, *, forget: bool = True) -> None:
        """Close our descriptors, and let pid 1 forget a kept process that has ended. Idempotent, and kills nothing.

        forget: False keeps what pid 1 knows of it, for the rocklet after this one.
        """
        ...


@runtime_checkable
class Reopens(Process, Protocol):
    """A kept process whose streams the rocklet can close while no one uses them."""

    @property
    def reopens(self) -> bool:
        """Whether this process supports it now."""
        ...

    async def close_streams(self, changed: Callable[[], None]) -> None:
        """Close our descriptors; bytes that are unread stay in the streams. `changed` is called once, at output, at end
        of file, at the exit, or when the sandbox is lost, possibly before this call returns. The caller has stopped
        reading. On an error the descriptors are open still."""
        ...

    async def reopen_streams(self) -> None:
        """Open them again, with other numbers. Idempotent. Lost, NotFound, Unavailable."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """A driver that creates sandboxes on this machine.

    traits: the guarantees per isolation level that the runtime supports; `Handle.isolation` is the level of one
    sandbox.
    """

    name: str
    traits: Mapping[Isolation, frozenset[Trait]]

    async def open(self) -> None:
        """Probe the host and start the helpers of the runtime (launcher, pool). Raises Unsupported with the reason."""
        ...

    async def close(self) -> None:
        """Release the resources of `open` and the warm pool. Sandboxes continue to run."""
        ...

    async def check(self, config: SandboxConfig) -> None:
        """Raise the InvalidConfig, Unsupported, ImageError or NoCapacity that `create` would raise; starts nothing."""
        ...

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        """Create a sandbox in which `spawn` works. A failed create leaves nothing behind."""
        ...

    async def recover(self, handle: Handle) -> Liveness:
        """Find a sandbox again after a restart of the rocklet."""
        ...

    async def spawn(self, handle: Handle, program: Program) -> Process:
        """Start a program. Raises NotFound (no such program, cwd or user, with its name), InvalidConfig, Lost."""
        ...

    async def attach(self, handle: Handle, key: str) -> Process:
        """The kept process with that key, with its streams; NotFound when there is none."""
        ...

    async def processes(self, handle: Handle) -> list[str]:
        """Keys of the kept processes that have not been closed."""
        ...

    async def wait(self, handle: Handle) -> str:
        """Return the reason when the sandbox has ended.

        "exited": its pid 1 exited, possibly because of code inside. "oom": it ran out of memory. "disk": its files
        exceeded the disk limit; "disk: " and a sentence for those of a volume. "gone", or a sentence with the known
        reason: it was ended from outside."""
        ...

    async def stop(self, handle: Handle, grace: float) -> None:
        """Send SIGTERM to its programs and SIGKILL after `grace` seconds. The sandbox ends; its files stay until
        `destroy`."""
        ...

    async def destroy(self, handle: Handle) -> None:
        """Remove the sandbox and all its resources. Idempotent; works on incomplete and on dead sandboxes."""
        ...

    async def sweep(self, known: Sequence[str]) -> list[str]:
        """Destroy the remains of sandboxes of this runtime whose ids are not in `known`; returns their ids."""
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


class Capability(type(Protocol)):  # type: ignore[misc]
    """Caches the result of isinstance per class: each create tests many capabilities, and an uncached test takes 10 us.
    The class has no fields because the test would require them of runtimes too."""

    def __instancecheck__(cls, instance: object) -> bool:
        key = (cls, type(instance))
        given = _GIVEN.get(key)
        if given is None:
            given = _GIVEN[key] = super().__instancecheck__(instance)
        return given


@runtime_checkable
class Files(Protocol, metaclass=Capability):
    """Access to files inside, without a shell and without any program of the image.

    Paths are absolute and resolve inside, so a symbolic link never leads out. `user` is as in Program: the kernel
    checks that user's rights. Errors: NotFound, Conflict (exists, not a folder, not empty), InvalidConfig (not a
    regular file: folders, FIFOs, devices and sockets are rejected without blocking), PermissionDenied (permission),
    StorageFull.
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
        """Return a descriptor for writing and a token.

        Without `append`, the descriptor is a new file beside the old one: `commit_write` replaces the old file
        atomically, `abort_write` removes the new one. `mode` None keeps the old file's mode, else 0644. A symbolic link
        at `path` is followed and its target replaced. With `append` the token is ""."""
        ...

    async def commit_write(self, handle: Handle, token: str) -> None: ...

    async def abort_write(self, handle: Handle, token: str) -> None: ...

    async def stat(self, handle: Handle, path: str, *, follow: bool = True) -> FileStat: ...

    async def list(self, handle: Handle, path: str, *, offset: int = 0, limit: int = 10_000) -> list[FileStat]:
        """Entries of a folder sorted by name, from `offset`, at most `limit`; links are not followed."""
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
class Ports(Protocol, metaclass=Capability):
    """Connections to ports inside. The connection is opened inside, so it works without a network too."""

    async def dial(self, handle: Handle, port: int, *, host: str = "127.0.0.1", timeout: float = 10.0) -> int:
        """A connected TCP socket's descriptor. Raises NotFound when nothing listens, PortTimeout."""
        ...


@runtime_checkable
class Pauses(Protocol, metaclass=Capability):
    """Stops all processes of a sandbox for a while; their memory is kept."""

    async def pause(self, handle: Handle) -> None:
        """Stop all processes, also over a crash of the rocklet. Idempotent. Unavailable when some do not stop."""
        ...

    async def resume(self, handle: Handle) -> None:
        """Continue them. Idempotent."""
        ...


@runtime_checkable
class ReportsEnds(Protocol, metaclass=Capability):
    """Reports the end of a sandbox without a task and without a descriptor for each of them."""

    def when_ended(self, handle: Handle, ended: Callable[[str], None]) -> Callable[[], None]:
        """Call `ended` once, with the reason that `wait` returns. Returns a function that cancels this; idempotent."""
        ...


@runtime_checkable
class Notes(Protocol, metaclass=Capability):
    """Includes a sandbox in `sweep` and in the enforcement of limits before `recover`, without a request to it."""
    def note_running(self, handle: Handle) -> bool: ...  # whether it runs


@runtime_checkable
class Swaps(Protocol, metaclass=Capability):
    """Moves memory of stopped processes out of the main memory."""

    async def swap_out(self, handle: Handle) -> int:
        """Swap out what can be swapped out; returns the bytes. Unsupported with the reason where nothing can be."""
        ...


@runtime_checkable
class Listens(Protocol, metaclass=Capability):
    """Loopback ports inside whose connections the rocklet serves. They need no network, and stay open while the rocklet
    restarts: connections wait until they are accepted."""

    async def listen(self, handle: Handle, port: int) -> int:
        """Listen on a port of 127.0.0.1 inside; 0 chooses one. Returns the port. Idempotent for a port that is open.
        Conflict when a program inside has it; Unsupported for a sandbox without ports."""
        ...

    async def accept(self, handle: Handle, port: int) -> int:
        """Wait for the next connection: the descriptor of a stream. NotFound when the port is closed. A cancelled call
        may lose a connection; close the port afterwards."""
        ...

    async def unlisten(self, handle: Handle, port: int) -> None:
        """Close the port. Idempotent; accepted connections stay."""
        ...


@runtime_checkable
class Connects(Protocol, metaclass=Capability):
    """Network "nat": sandboxes reach the destinations that their policy allows, and each attempt is logged."""

    async def connections(self, id: str) -> ConnectionList:
        """The latest connections of a sandbox, also of an ended one; empty for an unknown one."""
        ...


@runtime_checkable
class Accelerates(Protocol, metaclass=Capability):
    """Assigns GPUs of this machine to sandboxes."""

    def gpus(self) -> tuple[Sequence[str], int]:
        """Per kind, such as "A100", the number of unassigned GPUs."""
        ...


@runtime_checkable
class Limits(Protocol, metaclass=Capability):
    """Measured resource usage."""

    async def usage(self, handle: Handle) -> Usage: ...


@runtime_checkable
class Watches(Protocol, metaclass=Capability):
    """The runtime reports its own actions, such as an out-of-memory kill."""

    def oom_kills(self, handle: Handle) -> int:
        """The number of processes killed for memory so far."""
        ...


@runtime_checkable
class Keeps(Protocol, metaclass=Capability):
    """Retention: the files of a sandbox can outlive it. Used when `config.keeps_files` is set.

    A stopped sandbox has no process, memory, cgroup or network, only its files. `destroy` removes the files; `sweep`
    preserves those with known ids.
    """

    async def rest(self, handle: Handle, grace: float = 0.0) -> Handle:
        """End every process and retain the files; returns the handle of the stopped sandbox. Idempotent: completes a
        rest or a wake that a crash interrupted. Raises Lost when the files are gone. `grace` as in `stop`."""
        ...

    def pack(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """Yield the files of a stopped sandbox as the tar of an OCI layer, in chunks; the last item is the summary.

        limit: maximum bytes of file content, holes included. InvalidConfig, for files that a layer cannot represent or
        that exceed a limit, may be raised after some chunks.
        """
        ...

    async def unpack(self, id: str, config: SandboxConfig, files: ArchivedFiles, data: AsyncIterator[bytes]) -> Handle:
        """Create a stopped sandbox from such a tar. Raises ImageError when the local image is not the one below the
        files, and InvalidConfig when the data does not match `files`. A failure leaves nothing behind."""
        ...

    async def wake(self, handle: Handle, config: SandboxConfig) -> Handle:
        """Start a sandbox over the files of a stopped one. On failure the stopped sandbox is unchanged. ImageError when
        its image was removed."""
        ...


@runtime_checkable
class Snapshots(Protocol, metaclass=Capability):
    """Reads the files that a sandbox wrote, running or stopped, to make an image from them."""

    def image(self, handle: Handle) -> RootFS:
        """The image of the sandbox, whose layers it retains on disk."""
        ...

    def snapshot(self, handle: Handle, limit: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """Yield the written files as `Keeps.pack` does, while the processes are frozen. The processes continue when the
        generator is closed, and when the rocklet crashes. Unsupported for files that a layer cannot represent."""
        ...


@dataclass(frozen=True)
class FolderMount:
    """A folder of this machine that a sandbox mounts.

    root, path: the folder is `path` relative to `root`; no symbolic link is followed in either.
    target: the path inside.
    volume, name: id and name of the volume that it is; "" for a folder of the host and the layer of an agent, whose
    files keep their owners.
    identity: device and inode that a folder of the host had when it was checked.
    """

    root: str
    path: str
    target: str
    read_only: bool
    volume: str = ""
    name: str = ""
    identity: tuple[int, int] | None = None


class MountSource(Protocol):
    """What a runtime has to know of the volumes and host folders of this machine."""

    async def resolve(self, config: SandboxConfig) -> Sequence[FolderMount]:
        """The folders of `config.volumes`, `config.mounts` and `config.agents`. Called at each check and each start.
        NotFound, Forbidden, InvalidConfig, StorageFull."""
        ...

    def limit(self, volume_id: str) -> tuple[str, int] | None:
        """The folder of a volume, and the limit of its files in bytes; None for an unknown one."""
        ...

    def full(self) -> Collection[str]:
        """Ids of volumes that were over their limit when they were last measured."""
        ...

    def measured(self, volume_id: str, size: int) -> bool:
        """Take the size in bytes of a volume; returns whether it is over its limit."""
        ...


@runtime_checkable
class Mounts(Protocol, metaclass=Capability):
    """The runtime mounts folders of this machine with nosuid and nodev, and ends the sandboxes that write to a volume
    over its limit. Configs with `volumes`, `mounts` or `agents` reach no other runtime."""

    mount_source: MountSource | None
    """Set before `open`."""


@dataclass(frozen=True)
class Frozen:
    """What a checkpoint took. handle: of the sandbox from now on; store it before anything else. bytes: size of the new
    layer; None while it is unknown. layers: number of layers of the snapshot above the image. copied: keys of the kept
    programs that were copied with their processes; None when no processes were to be copied."""

    handle: Handle
    files: Literal["switch", "copy"]
    bytes: int | None
    layers: int
    paused_ms: float
    left_out: Sequence[str] = ()
    copied: Sequence[str] | None = None


@runtime_checkable
class Forks(Protocol, metaclass=Capability):
    """Snapshots of running sandboxes, and sandboxes from snapshots (decision 45). `create` with `config.snapshot`
    starts from one; NotFound when it is not here. Snapshots are named by 32 hexadecimal digits."""

    async def checkpoint(self, handle: Handle, snapshot_id: str, files: Literal["auto", "switch", "copy"],
                         processes: bool = False, continued: Callable[[], None] = lambda: None) -> Frozen:
        """Take the files of a running sandbox. processes: and all its processes, which run on in each sandbox that
        starts from the snapshot. continued: called when all is as of one moment, and its processes run again; the
        snapshot may still fail. Repeats are no error. Unsupported with the reasons where that is not possible; nothing
        has changed then. StorageFull, Unavailable: there is no snapshot."""
        ...

    async def refusals(self, handle: Handle) -> Sequence[str]:
        """The reasons against a checkpoint with processes at this moment; empty if it is possible."""
        ...

    def parent(self, handle: Handle) -> str | None:
        """The snapshot on which a sandbox runs."""
        ...

    async def replace(self, handle: Handle, config: SandboxConfig, snapshot_id: str) -> Handle:
        """A new sandbox from a snapshot, under the id of `handle`, which continues to run until it is destroyed."""
        ...

    def snapshots(self) -> Mapping[str, Sequence[str]]:
        """Ids of all snapshots here, with the ids of the sandboxes that use their files, running or retained."""
        ...

    async def drop_snapshot(self, snapshot_id: str) -> bool:
        """Remove a snapshot. One that is in use is hidden, and removed with its last user: False. Idempotent."""
        ...


@runtime_checkable
class OwnImages(Protocol, metaclass=Capability):
    """The runtime finds and fetches its own images, instead of using the server's store."""

    async def has_image(self, config: SandboxConfig) -> bool:
        """Whether `prepare_image` has nothing to do; always true with pull="never"."""
        ...

    async def prepare_image(self, config: SandboxConfig, tell: Callable[[str], None]) -> None:
        """Fetch the image according to `config.pull`; calls `tell` with progress text. ImageError."""
        ...
