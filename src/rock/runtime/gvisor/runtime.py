"""Runtime "gvisor": a sandbox with its own gVisor kernel, which `runsc` runs without a container engine.

    create -> admission -> image -> starter.py -> runsc -> pid 1 responds (init/multiplexer.py) -> Handle
    spawn, files, ports -> pid 1 (runtime/init/files.py)      destroy -> kill runsc and its cgroups, remove the folder

    run folder: record.json  config.json  in out (pipes)  upper work (written files)  root (mounted for runsc only)

Sandboxes survive the server: runsc is reparented, its pipes are named files, and the next server finds both by the
handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.init import process_tree
from rock.guest.init.remove import remove_tree
from rock.images.records import RootFS
from rock.images.store import Images
from rock.protocol.sandbox import Isolation, SandboxConfig, Usage
from rock.runtime.base import Enforced, Handle, Program, Trait
from rock.runtime.gvisor import starter
from rock.runtime.init.delayed import BACK, DelayedInit, DelayedSandboxes
from rock.runtime.init.files import merged
from rock.runtime.init.link import InitLink
from rock.runtime.init.multiplexer import Multiplexer
from rock.runtime.init.python import INSIDE, GuestPython, prepare
from rock.runtime.namespace import admission, slots
from rock.runtime.namespace.launcher import mounts, seccomp
from rock.runtime.namespace.limits import cgroups, disk_layout, limiter
from rock.runtime.namespace.limits.cgroups import Cgroups
from rock.runtime.process.runtime import children, read_record, reap, wait_gone, write_record
from rock.runtime.refusals import LINUX_ONLY

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RUNSC = "check runsc with `rock doctor` on the worker, and its log"
_PREFIX = "g-"
_BASE, _PROBE = "base", "probe"
_AT_ONCE = 4  # concurrent starts: each uses one CPU for a while


@dataclass
class _Sandbox(DelayedInit):
    """A living sandbox; its pid is that of runsc."""

    mux: Multiplexer | None = None

    async def let_go(self) -> None:
        if self.link is not None:
            self.link.close()
        if self.mux is not None:
            self.mux.close()
            await self.mux.gone()
        self.link = self.mux = None


class GvisorRuntime(DelayedSandboxes[_Sandbox]):
    """Sandboxes of runsc. run_dir: one folder per sandbox; guest_dir: our Python interpreters; program: runsc, by name
    or path."""

    name = "gvisor"
    isolation = Isolation.GVISOR
    traits: Mapping[Isolation, frozenset[Trait]] = {
        # The same traits as containers under runsc: see docs/decisions/0021-gvisor.md.
        Isolation.GVISOR: frozenset(Trait) - {Trait.TERMINALS, Trait.PROCESSES, Trait.TREES, Trait.LIMITS},
    }

    def __init__(self, run_dir: Path, guest_dir: Path, images: Images, program: str = "runsc") -> None:
        super().__init__(Path(os.path.realpath(run_dir)))
        self._guest_dir = guest_dir
        self._images = images
        self._program = program
        self._making: set[str] = set()
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._guest: asyncio.Task[GuestPython] | None = None
        self._tried: asyncio.Task[None] | None = None
        self._limiter = limiter.Limiter(cgroups.Cgroups())

    # ---- lifecycle of the runtime ----

    async def open(self) -> None:
        """Never fails because of a missing runsc: the first create reports that error."""
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self._run_dir, 0o700)
        mounts.make_base(str(self._run_dir / _BASE))
        (self._run_dir / _BASE / MOUNT_POINT).mkdir(exist_ok=True)
        self._limiter = limiter.Limiter(await asyncio.to_thread(cgroups.discover, str(self._run_dir)))

    async def close(self) -> None:
        for task in (self._tried, self._guest):
            if task is not None:  # wait for a thread and for a sandbox under construction
                await asyncio.gather(task, return_exceptions=True)
        self._tried = self._guest = None
        for slot in list(self._live):
            await self._forget(slot)
        cgroups.remove_parents(self._limiter.groups)

    # ---- capabilities ----

    async def check(self, config: SandboxConfig) -> None:
        await self._admit(config)

    async def _admit(self, config: SandboxConfig) -> RootFS:
        refuse(config, self._limiter.groups)
        await self.probe()
        return await asyncio.to_thread(self._images.resolve, config.image)

    async def probe(self) -> None:
        """Raise Unsupported when this host cannot run gVisor. Tests it by creating a sandbox, until one create
        succeeds."""
        if self._tried is None or (self._tried.done() and (self._tried.cancelled() or self._tried.exception())):
            self._tried = asyncio.create_task(self._try_one(), name="gvisor probe")
        await asyncio.shield(self._tried)

    async def _try_one(self) -> None:
        refuse_host(self._program, self._limiter.groups)
        layer = self._run_dir / _PROBE
        for name in ("proc", "sys", "dev", "tmp", "etc"):
            (layer / name).mkdir(parents=True, exist_ok=True)
        config = SandboxConfig(image=_PROBE, memory="256m", cpus=1, pids=256)
        try:
            await self.destroy(await self._make(_PROBE, config, RootFS(_PROBE, (str(layer),))))
        except (errors.StartFailed, errors.Lost, errors.Unavailable, OSError) as error:
            raise errors.Unsupported(f"isolation gvisor: {error}", hint="see what `runsc do true` tells") from None
        finally:
            await asyncio.to_thread(remove_tree, str(layer))

    # ---- create ----

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        rootfs = await self._admit(config)
        task = asyncio.create_task(self._make(id, config, rootfs))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # wait for the outcome, so that nothing is left behind
            with contextlib.suppress(errors.RockError):
                await self.destroy(await task)
            raise

    async def _python(self) -> GuestPython:
        if self._guest is None or (self._guest.done() and self._guest.exception() is not None):
            self._guest = asyncio.create_task(asyncio.to_thread(prepare, self._guest_dir))
        return await asyncio.shield(self._guest)

    async def _make(self, id: str, config: SandboxConfig, rootfs: RootFS) -> Handle:
        slot = _PREFIX + secrets.token_hex(5)
        folder, folders = self._run_dir / slot, self._limiter.groups.folders(slot)
        self._making.add(slot)
        pid: int | None = None
        try:
            python = await self._python()
            async with self._gate:
                folder.mkdir(mode=0o700)
                data: dict[str, Any] = {"id": id, "slot": slot, "cgroups": folders}
                write_record(folder, data)
                pid = self._start(slot, config, rootfs, python)
                entry = process_tree.read(pid)
                if entry is None:
                    raise errors.StartFailed("runsc exited during its start", sandbox_id=id, hint=RUNSC)
                data |= {"pid": pid, "start": entry.start}
                write_record(folder, data)
                sandbox = self._live[slot] = _Sandbox(slot, pid, entry.start, folders)
                await self._enter(sandbox, id, config.startup_timeout)
            return self._handle(id, config, rootfs, data)
        except BaseException as error:
            last = _log_of(folder)
            await asyncio.shield(self._clean_up(slot, pid, None, folders))
            if isinstance(error, OSError | errors.Lost | errors.Unavailable):
                reason = last or (error.message if isinstance(error, errors.RockError) else str(error))
                raise errors.StartFailed(f"runsc failed to start the sandbox: {reason}", sandbox_id=id,
                                         hint=RUNSC) from None
            raise
        finally:
            self._making.discard(slot)

    def _start(self, slot: str, config: SandboxConfig, rootfs: RootFS, python: GuestPython) -> int:
        folder, folders = self._run_dir / slot, self._limiter.groups.folders(slot)
        for group in dict.fromkeys(folders.values()):
            os.makedirs(group, exist_ok=True)
        cgroups.write_limits(self._limiter.files(slot, config))
        for name in (ROOT, STATE):
            (folder / name).mkdir(mode=0o700)
        (folder / "config.json").write_text(json.dumps(bundle_config(config, python)))
        program = shutil.which(self._program)
        if program is None:
            raise errors.StartFailed(f"the program {self._program} no longer exists on this machine",
                                     hint="install runsc again, and restart the server")
        binds = [{"source": bind.source, "target": bind.target, "writable": bind.writable, "public": True}
                 for bind in rootfs.binds]
        spec = {
            "slot": str(folder), "root": str(folder / ROOT), "woken": False, "etc": {},
            "layers": [str(self._run_dir / _BASE), *rootfs.layers], "cgroups": list(dict.fromkeys(folders.values())),
            "binds": [*binds, {"source": str(python.folder), "target": INSIDE, "writable": False,
                                "public": False}],
            "command": runsc_command(program, folder, slot), "path": _PATH,
        }  # fmt: skip
        lease = self._images.lease(rootfs)
        source, sink = make_pipes(folder)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", starter.__file__, json.dumps(spec)], stdin=source, stdout=sink,
                stderr=subprocess.DEVNULL, pass_fds=() if lease is None else (lease.fd,), start_new_session=True,
                cwd="/", env={"PATH": _PATH})  # fmt: skip
        finally:
            os.close(source)
            os.close(sink)
            if lease is not None:
                lease.close()
        children[child.pid] = child
        return child.pid

    def _handle(self, id: str, config: SandboxConfig, rootfs: RootFS, data: dict[str, Any]) -> Handle:
        enforced: dict[str, Enforced] = self._limiter.enforced()
        data = {**data, "env": merged({"PATH": _PATH}, rootfs.env, config.env), "cwd": rootfs.cwd or "/",
                "user": rootfs.user}
        if config.nofile is not None:
            data["nofile"], enforced["nofile"] = config.nofile, "rlimit"
        if config.shm_size is not None:
            enforced["shm_size"] = "tmpfs"
        return Handle(self.name, id, self.isolation, enforced, data)

    async def _enter(self, sandbox: _Sandbox, id: str, patience: float) -> None:
        """Connect to its pid 1. Lost when runsc ends meanwhile, Unavailable on a timeout."""
        folder = self._run_dir / sandbox.slot
        try:
            mux = Multiplexer(Pipes(folder), folder, id)
        except OSError as error:
            raise errors.Lost(f"the pipes of the sandbox cannot be opened: {error.strerror}", sandbox_id=id) from None
        entering = asyncio.ensure_future(mux.begin(patience))
        ending = asyncio.ensure_future(wait_gone(sandbox.pid, sandbox.start))
        try:
            await asyncio.wait({entering, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not entering.done():
                raise errors.Lost("the sandbox's kernel ended at once", sandbox_id=id)
            link = InitLink(entering.result(), id)
        except BaseException:
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
            mux.close()
            await mux.gone()
            raise
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
        link.resize = mux.resize
        sandbox.mux, sandbox.link = mux, link
        await link.request("hello", patience=patience)

    # ---- operations ----

    def _found(self, handle: Handle) -> _Sandbox:
        data = handle.data
        return _Sandbox(data["slot"], data["pid"], data["start"], dict(data["cgroups"]))

    async def _enter_again(self, sandbox: _Sandbox, handle: Handle) -> None:
        if not process_tree.lives(sandbox.pid, sandbox.start):
            raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
        await sandbox.let_go()
        await self._enter(sandbox, handle.id, BACK)

    def complete(self, handle: Handle, program: Program) -> Program:
        if program.pty is not None:
            raise errors.Unsupported("runsc has no terminals here", sandbox_id=handle.id, hint="run it without a pty")
        return super().complete(handle, program)

    async def wait(self, handle: Handle) -> str:
        kills = self.oom_kills(handle)
        data = handle.data
        await wait_gone(data["pid"], data["start"])
        reap()
        if self._was_ended(data["slot"]):
            return "gone"
        if self.oom_kills(handle) > kills:
            return "oom"
        if cgroups.read_field(f"{data['cgroups'].get('pids', '')}/pids.events", "max"):
            return "exited: its kernel had as many processes as it may"
        return "exited"

    async def usage(self, handle: Handle) -> Usage:
        data = handle.data
        used = await asyncio.to_thread(limiter.usage, data["cgroups"], data["pid"], self.oom_kills(handle))
        used.disk_bytes = await asyncio.to_thread(disk_layout.written, f"{self._run_dir}/{data['slot']}/upper")
        return used

    # ---- stop and destroy ----

    async def _end(self, handle: Handle) -> None:
        await self._kill(handle.data["pid"], handle.data["start"])

    async def destroy(self, handle: Handle) -> None:
        data = handle.data
        await self._clean_up(data["slot"], data["pid"], data["start"], dict(data["cgroups"]))

    @staticmethod
    async def _kill(pid: int, start: int | None) -> None:
        """Kill runsc; the sandbox's kernel and file server end with it."""
        entry = process_tree.read(pid)
        if entry is not None and start in (None, entry.start):
            slots.kill_init(pid, entry.start)
            await wait_gone(pid, entry.start)
        reap()

    async def _clean_up(self, slot: str, pid: int | None, start: int | None, folders: Mapping[str, str]) -> None:
        """Remove all resources of a complete or incomplete sandbox. Idempotent."""
        await self._forget(slot)
        if pid is not None:
            await self._kill(pid, start)
            await self._forget(slot)  # a concurrent request may have recovered it meanwhile
        # All processes in its cgroups belong to the sandbox, whether runsc lives or not.
        await asyncio.to_thread(slots.remove_remains, self._run_dir / slot, list(folders.values()))
        reap()

    async def sweep(self, known: Sequence[str]) -> list[str]:
        keep, gone = set(known), []
        found = {folder.name for folder in self._run_dir.glob(f"{_PREFIX}*")}
        for place in self._limiter.groups.places.values():
            with contextlib.suppress(OSError):
                found.update(name for name in os.listdir(place.parent) if name.startswith(_PREFIX))
        for slot in sorted(found):
            record = read_record(self._run_dir / slot)
            id = str(record.get("id", ""))
            if slot in self._making or (id in keep if id else slot in self._live):
                continue
            await self._clean_up(slot, record.get("pid"), record.get("start"), self._limiter.groups.folders(slot))
            gone.append(id or slot)
        return gone


def _log_of(folder: Path) -> str:
    """The reason of a failed start, as the starter or runsc reports it."""
    for name in ("failure", "log"):
        with contextlib.suppress(OSError):
            if text := (folder / name).read_text(errors="replace").strip():
                return text.splitlines()[-1][-400:]
    return ""


# ---- admission checks, before anything starts ----

LEAST_MEMORY, LEAST_PIDS = 96 << 20, 128  # include its own kernel and file server: 30 MB and 80 threads
_UNHELD = {
    "disk": "runsc holds no limit of what is written",
    "inodes": "runsc holds no limit of files",
    "num_gpus": "this version of runsc gives sandboxes no accelerators",
    "accelerator_type": "this version of runsc gives sandboxes no accelerators",
}


def refuse(config: SandboxConfig, groups: Cgroups) -> None:
    """Raise Unsupported, InvalidConfig or NoCapacity for a config that `create` cannot satisfy."""
    if config.image_os != "linux":
        raise errors.Unsupported(f"image_os {config.image_os!r}: the gvisor runtime runs Linux images only",
                                 hint=LINUX_ONLY)
    if config.use_kata_runtime or config.oci_runtime not in (None, "runsc"):
        raise errors.Unsupported("the gvisor runtime runs sandboxes under runsc, and nothing else",
                                 hint='runtime="docker" knows other OCI runtimes')
    for name, why in _UNHELD.items():
        if getattr(config, name):
            raise errors.Unsupported(f"the gvisor runtime does not support {name}: {why}", hint=f"leave {name} unset")
    if config.network != "none":
        raise errors.Unsupported(f'network "{config.network}": sandboxes of the gvisor runtime have loopback only',
                                 hint='network="none"; ports inside can be reached all the same')
    if config.memory_bytes < LEAST_MEMORY:
        raise errors.Unsupported(f"memory={config.memory}: gVisor's own kernel is counted, and needs its share",
                                 hint=f"ask for at least {LEAST_MEMORY >> 20}m")
    if config.pids < LEAST_PIDS:
        raise errors.Unsupported(f"pids={config.pids}: the threads of gVisor's own kernel are counted too",
                                 hint=f"ask for at least {LEAST_PIDS}")
    admission.refuse_nofile(config)
    admission.refuse_level(config, Isolation.GVISOR)
    admission.refuse_too_large(config)


def refuse_host(program: str, groups: Cgroups) -> None:
    """Raise Unsupported where this host lacks a requirement of every sandbox."""
    if os.geteuid() != 0:
        raise errors.Unsupported("isolation gvisor: mounting images takes root", hint="run the server as root")
    if shutil.which(program) is None:
        raise errors.Unsupported(f"isolation gvisor: there is no {program} on this machine",
                                 hint="apt install runsc; or, with a container engine that knows it, "
                                      'runtime="docker" and oci_runtime="runsc"')
    for controller in ("memory", "cpu", "pids"):
        if groups.version(controller) is None:
            raise errors.Unsupported(
                f"isolation gvisor: no cgroup of the controller {controller} can be made, and limits would not be held "
                f"({groups.reasons.get(controller, 'it is missing')})", hint="run with delegated cgroups")


# ---- OCI bundle ----
#
# The OCI bundle's config.json and the command line of runsc, as plain data.

# The capabilities of sandboxes in every runtime.
CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
                "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT")  # fmt: skip
ROOT = "root"  # mount point of the image in the sandbox's folder, visible to runsc only
STATE = "state"  # state folder of runsc
MOUNT_POINT = INSIDE.strip("/")
_MOST_SHARED = 2 << 30
_OPTIONS = ["nosuid", "nodev", "noexec"]


def shared_memory(config: SandboxConfig) -> int:
    """Size of /dev/shm in bytes."""
    return config.shm_bytes or min(_MOST_SHARED, max(1 << 20, config.memory_bytes // 4))


def _options() -> dict[str, object]:
    """Options of pid 1: the same filter as in every runtime, applied by gVisor's kernel."""
    return {"filter": seccomp.build().hex()} if seccomp.supported() else {}


def bundle_config(config: SandboxConfig, python: GuestPython) -> dict[str, Any]:
    """config.json: pid 1 on our own Python, as root with few capabilities, over a root that is mounted beforehand."""
    rights = list(CAPABILITIES)
    return {
        "ociVersion": "1.0.2", "hostname": "sandbox",
        "process": {
            "terminal": False, "user": {"uid": 0, "gid": 0}, "args": python.command(_options()), "env": [], "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), rights),
            "noNewPrivileges": True, "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        },
        "root": {"path": ROOT, "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": _OPTIONS},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": [*_OPTIONS, "mode=1777", f"size={shared_memory(config)}"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_OPTIONS, "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }  # fmt: skip


def runsc_command(program: str, folder: Path, slot: str) -> list[str]:
    """The command line of runsc, which runs until the sandbox ends; killing it ends the sandbox.

    The rocklet creates the cgroups around the whole process tree. The sandbox gets nothing of the host's network.
    """
    return [program, f"--root={folder / STATE}", "--ignore-cgroups", "--network=none", f"--log={folder / 'log'}",
            "run", f"--bundle={folder}", slot]


# ---- pipes ----
#
# The stream to a sandbox's pid 1: two named pipes in its run folder, which are its standard streams.
#
#     in   rocklet writes, pid 1 reads      out   pid 1 writes, rocklet reads
#
# runsc holds both ends of each pipe, so neither side sees an end of file while no server runs. The next server opens
# them again.

_PIECE = 256 << 10
_ROOM = 1 << 20  # capacity of a pipe in bytes, if the kernel permits it


def make_pipes(folder: Path) -> tuple[int, int]:
    """Create both pipes and return pid 1's ends, for its standard input and output; the caller closes them."""
    ends: list[int] = []
    try:
        for name in ("in", "out"):
            os.mkfifo(folder / name, 0o600)
            ends.append(os.open(folder / name, os.O_RDWR | os.O_CLOEXEC))
            with contextlib.suppress(OSError):
                fcntl.fcntl(ends[-1], fcntl.F_SETPIPE_SZ, _ROOM)
    except OSError:
        for fd in ends:
            os.close(fd)
        raise
    return ends[0], ends[1]


class Pipes:
    """The rocklet's ends of the pipes in `folder`: a `ByteStream`. OSError (ENXIO) when the other ends are closed."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._writing = os.open(folder / "in", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._reading = os.open(folder / "out", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            os.close(self._writing)
            raise
        self._closed = False

    async def read(self) -> bytes:
        """Read available bytes; empty at the end."""
        while not self._closed:
            try:
                return os.read(self._reading, _PIECE)
            except BlockingIOError:
                await self._until(self._reading, reading=True)
        return b""

    async def write(self, data: bytes) -> None:
        """Write; returns when all bytes are in the pipe. OSError when the pipe is broken."""
        view = memoryview(data)
        while view:
            if self._closed:
                raise BrokenPipeError("the stream was closed")
            try:
                view = view[os.write(self._writing, view) :]
            except BlockingIOError:
                await self._until(self._writing, reading=False)

    async def _until(self, fd: int, *, reading: bool) -> None:
        ready = asyncio.Event()
        add, remove = (
            (self._loop.add_reader, self._loop.remove_reader)
            if reading else (self._loop.add_writer, self._loop.remove_writer)
        )  # fmt: skip
        add(fd, ready.set)
        try:
            await ready.wait()
        finally:
            if not self._closed:
                remove(fd)

    def close(self) -> None:
        """Close both pipes. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._reading)
        self._loop.remove_writer(self._writing)
        os.close(self._reading)
        os.close(self._writing)
