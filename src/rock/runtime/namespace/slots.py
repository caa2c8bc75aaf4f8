"""The run folders of one server, one slot each, and their sandboxes: find, end, remove, sweep."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.init import process_tree
from rock.guest.init.remove import remove_tree
from rock.runtime.base import Handle, MountSource
from rock.runtime.init.link import InitLink, InitProcess
from rock.runtime.namespace import records
from rock.runtime.namespace.egress_sockets import EgressSockets
from rock.runtime.namespace.launcher import mounts
from rock.runtime.namespace.launcher.link import LaunchLink
from rock.runtime.namespace.limits import cgroups, devices, disk_layout, limiter
from rock.runtime.namespace.limits.disk_watch import Held
from rock.runtime.pools import Prepared
from rock.runtime.process.runtime import wait_gone

# ---- teardown: end a sandbox from outside; safe on incomplete and on dead ones ----

def kill_init(pid: int, start: int) -> None:
    """Send SIGKILL to a pid 1, which ends its whole pid namespace; never to another process with a reused pid."""
    entry = process_tree.read(pid)
    if entry is not None and entry.start == start:
        process_tree.send(entry, signal.SIGKILL)


def find_init(folder: Path) -> tuple[int, int] | None:
    """Pid and start time of a pid 1 that listens in a run folder without a record: the kernel reports the listener."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
                sock.connect(f"/proc/self/fd/{fd}/s")
                pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                entry = process_tree.read(pid)
                return (pid, entry.start) if entry is not None else None
        finally:
            os.close(fd)
    return None


def remove_remains(folder: Path, groups: list[str]) -> None:
    """Remove the remains of a sandbox without pid 1. Blocking. Raises Unavailable when something stays."""
    left = cgroups.remove(groups)
    try:
        if not mounts.remove_folder(str(folder)):
            remove_tree(str(folder))
    except OSError as error:
        raise errors.Unavailable(f"the files of a destroyed sandbox could not be removed: {error}",
                                 hint=f"look at {folder}; the next sweep tries again") from None
    if left:
        raise errors.Unavailable(f"cgroups of a destroyed sandbox could not be removed: {', '.join(left)}",
                                 hint="the next sweep tries again")


def leftover_groups(groups: cgroups.Cgroups) -> set[str]:
    """Slots that have a cgroup under the server's parents."""
    found: set[str] = set()
    for place in groups.places.values():
        try:
            found.update(name for name in os.listdir(place.parent) if name.startswith(records.SLOT_PREFIX))
        except OSError:
            continue
    return found


# ---- slots ----


def _cpu_of(folders: Mapping[str, str]) -> str:
    """The file with the CPU time of a sandbox, or ""."""
    if "cpuacct" in folders:
        return f"{folders['cpuacct']}/cpuacct.usage"
    return f"{folders['cpu']}/cpu.stat" if os.path.exists(f"{folders.get('cpu', '')}/cpu.stat") else ""


def _processes(one: Sandbox) -> tuple[int, str]:
    return one.pid, one.folders.get("pids", "")


@dataclass
class Sandbox:
    """State of a living sandbox in this server; all of it can be recovered from the handle."""

    slot: str
    pid: int
    start: int
    base: int
    folders: dict[str, str]
    link: InitLink | None = None
    memory: int = 0
    disk: int = 0  # limit of its files in bytes, where they are measured
    over: int = 0  # their size when that ended the sandbox
    kills: int = 0  # by the memory monitor
    prepared: Prepared | None = None
    volumes: dict[str, list[Any]] | None = None  # name, and whether it is read-only, by id
    snapshots: Sequence[str] = ()  # its layers above the image, newest first
    over_volume: str = ""  # the name of the volume whose size ended it
    first: tuple[str, InitProcess] | None = None  # its first program, until its user takes it
    shell: tuple[str, int] | None = None  # the path and the pid inside of the first program that was started
    recovered: bool = False  # an earlier server created it

    def count_kill(self) -> None:
        """Record a kill by the memory monitor."""
        self.kills += 1

    def close_first(self) -> None:
        """Close the streams of a first program that was not taken."""
        first, self.first = self.first, None
        if first is not None:
            first[1].close()

    def record(self, id: str) -> dict[str, Any]:
        """Its record on disk, under the name `id`."""
        found: dict[str, Any] = {"id": id, "slot": self.slot, "pid": self.pid, "start": self.start, "base": self.base,
                                 "cgroups": self.folders}
        if self.snapshots:
            found["snapshots"] = list(self.snapshots)
        if self.shell is not None:
            found["first"] = list(self.shell)
        return found


_RETRY = 1.0  # seconds


class Ending:
    """Calls `ended` once when a pid 1 ends. The end of its connection shows that, without a further descriptor; where
    the process lives on, as it does for a moment, the process itself is awaited."""

    def __init__(self, pid: int, start: int, link: Callable[[], InitLink], ended: Callable[[], None]) -> None:
        self._pid = pid
        self._start = start
        self._ended: Callable[[], None] | None = ended
        self._task: asyncio.Task[None] | None = None
        try:
            self._link = link()
        except errors.Lost:
            self._lost()
        else:
            self._link.on_lost = self._lost

    def _lost(self) -> None:
        if self._ended is not None:
            self._task = asyncio.create_task(self._wait(), name=f"end-of-{self._pid}")

    async def _wait(self) -> None:
        while True:
            try:
                await wait_gone(self._pid, self._start)
                break
            except OSError:  # no descriptor is free
                await asyncio.sleep(_RETRY)
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()

    def cancel(self) -> None:
        """Call nothing from now on. Idempotent."""
        self._ended = None
        if self._task is not None:
            self._task.cancel()


class Slots:
    """The slots below `run_dir`, whose path has no links. making: slots under construction, which the sweep skips.
    ending: slots that are being removed.

    launcher: set when the runtime opens, once the launcher's options are known.
    """

    launcher: LaunchLink

    def __init__(self, run_dir: Path, egress: EgressSockets) -> None:
        self.run_dir = run_dir
        self.live: dict[str, Sandbox] = {}
        self.making: set[str] = set()
        self.ending: set[str] = set()
        self.slot_of: dict[str, str] = {}  # by sandbox: a rollback gives a sandbox another slot
        self.layers: dict[str, Sequence[str]] = {}  # by slot: layers of snapshots above the image, newest first
        self.removed: list[Callable[[str], None]] = []  # called with a slot whose files are gone
        self._egress = egress

    async def open(self) -> None:
        """Create the folder, and detect the used uid ranges and the mechanisms for limits."""
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.run_dir, 0o700)
        await self.remove_spares()
        (self.run_dir / records.SPARE).mkdir(mode=0o700)
        for folder in (self.run_dir, self.run_dir / records.SPARE):
            disk_layout.spread(str(folder))
        mounts.make_base(str(self.run_dir / records.BASE))
        self.ranges = records.UidRanges(self.run_dir)
        for slot in records.slots(self.run_dir):
            base = records.read(self.run_dir, slot).get("base")
            if isinstance(base, int):
                self.ranges.reserve(base, slot)
        self.limiter = limiter.Limiter(await asyncio.to_thread(cgroups.discover, str(self.run_dir)))
        for parent in {place.parent for place in self.limiter.groups.places.values() if place.version == 2}:
            with contextlib.suppress(OSError):
                devices.limit_folder(parent)
            with contextlib.suppress(OSError):
                cgroups.write(f"{parent}/io.weight", "default 100")

    async def close(self) -> None:
        """Close an opened instance. The sandboxes survive."""
        await self.remove_spares()
        cgroups.remove_parents(self.limiter.groups)
        await asyncio.to_thread(devices.remove_shared, str(self.run_dir))

    async def remove_spares(self) -> None:
        await asyncio.to_thread(remove_tree, str(self.run_dir / records.SPARE))

    def let_go_of_all(self) -> None:
        for sandbox in self.live.values():
            sandbox.close_first()
            if sandbox.link is not None:
                sandbox.link.close()
        self.live.clear()

    # ---- lookup ----

    def find(self, handle: Handle) -> Sandbox:
        """The living sandbox. Lost."""
        slot = handle.data["slot"]
        sandbox = self.live.get(slot)
        self.slot_of[handle.id] = slot
        if sandbox is None:
            data = handle.data
            if "pid" not in data or not process_tree.lives(data["pid"], data["start"]):  # a stopped one has none
                raise errors.Lost("the sandbox is gone", sandbox_id=handle.id)
            sandbox = Sandbox(slot, data["pid"], data["start"], data["base"], dict(data["cgroups"]),
                              memory=int(data["memory"]), disk=int(data.get("disk_limit", 0)),
                              volumes=data.get("volumes"),
                              snapshots=self.layers.get(slot, ()), recovered=True)
            self.ranges.reserve(sandbox.base, slot)
            self.live[slot] = sandbox
        return sandbox

    def link(self, handle: Handle) -> InitLink:
        """The connection to its pid 1. Lost."""
        sandbox = self.find(handle)
        if sandbox.link is None or sandbox.link.closed:
            sandbox.link = InitLink.connect(self.run_dir / sandbox.slot, handle.id)
        return sandbox.link

    def oom_kills(self, handle: Handle) -> int:
        """How many of its processes were killed for memory so far."""
        sandbox = self.live.get(handle.data["slot"])
        folder = handle.data["cgroups"].get("memory")
        return (cgroups.oom_kills(folder) if folder else 0) + (sandbox.kills if sandbox else 0)

    def measured(self) -> list[Held]:
        """The sandboxes whose files are measured."""
        return [Held(str(self.run_dir / one.slot), one.disk, [_processes(one)], [_cpu_of(one.folders)],
                     partial(self._end_full, one), without=list(one.volumes or ()))
                for one in self.live.values() if one.disk]

    def measured_volumes(self, source: MountSource) -> list[Held]:
        """The volumes that sandboxes write, and those that were over their limit."""
        writers: dict[str, list[Sandbox]] = {volume_id: [] for volume_id in source.full()}
        for one in self.live.values():
            for volume_id, (_, read_only) in (one.volumes or {}).items():
                if not read_only:
                    writers.setdefault(volume_id, []).append(one)
        found = []
        for volume_id, sandboxes in writers.items():
            held = source.limit(volume_id)
            if held is not None:
                found.append(Held(held[0], held[1], [_processes(one) for one in sandboxes],
                                  [_cpu_of(one.folders) for one in sandboxes],
                                  partial(self._volume_measured, source, volume_id, sandboxes), only=volume_id))
        return found

    @staticmethod
    def _volume_measured(source: MountSource, volume_id: str, writers: Sequence[Sandbox], size: int) -> None:
        if source.measured(volume_id, size):
            for one in writers:
                one.over_volume = str((one.volumes or {})[volume_id][0])
                one.over = size
                kill_init(one.pid, one.start)

    @staticmethod
    def _end_full(sandbox: Sandbox, size: int) -> None:
        if size > sandbox.disk:
            sandbox.over = size
            kill_init(sandbox.pid, sandbox.start)

    def full(self, handle: Handle) -> str | None:
        """The reason for `wait`, when it was ended because files exceeded their limit."""
        sandbox = self.live.get(handle.data["slot"])
        if sandbox is None or not sandbox.over:
            return None
        return f"disk: volume {sandbox.over_volume} is over its limit" if sandbox.over_volume else "disk"

    # ---- stop and destroy ----

    async def stop(self, handle: Handle, grace: float) -> None:
        """End its processes with SIGTERM and, after `grace` seconds, SIGKILL; its files stay."""
        pid, start, slot = handle.data["pid"], handle.data["start"], handle.data["slot"]
        with contextlib.suppress(OSError):
            self._stopped(slot).touch()
        with contextlib.suppress(errors.RockError, TimeoutError):
            await self.link(handle).request("stop", {"grace": grace}, patience=grace + 5)
            async with asyncio.timeout(grace + 2):
                await wait_gone(pid, start)
        kill_init(pid, start)
        await wait_gone(pid, start)
        self.forget(slot)

    def was_signalled(self, handle: Handle) -> bool:
        """Whether pid 1 ended because of `stop`, or the sandbox was removed."""
        stopped = self._stopped(handle.data["slot"])
        return stopped.exists() or not stopped.parent.exists()

    def _stopped(self, slot: str) -> Path:
        return self.run_dir / slot / "stopped"

    async def discard(self, sandbox: Sandbox) -> None:
        """Remove all resources of a sandbox without a handle."""
        if sandbox.prepared is not None:
            await sandbox.prepared.discard()
        await self.clean_up(sandbox.slot, sandbox.pid, sandbox.start, sandbox.base, sandbox.folders)

    async def clean_up(self, slot: str, pid: int | None, start: int | None, base: int | None,
                       folders: Mapping[str, str]) -> None:
        """Remove all resources of a complete or incomplete sandbox. Idempotent."""
        link = self._release(slot)
        self.ending.add(slot)
        try:
            await self._remove(slot, pid, start, base, folders)
        finally:
            self.ending.discard(slot)
            if link is not None:  # not before: pid 1 would wake and work, and then be killed
                link.close()

    async def _remove(self, slot: str, pid: int | None, start: int | None, base: int | None,
                      folders: Mapping[str, str]) -> None:
        if pid is None or start is None:
            pid, start = find_init(self.run_dir / slot) or (None, None)
        clean = False
        if pid is not None and start is not None:
            with contextlib.suppress(errors.RockError):
                clean = await self._retire(slot, pid, start, folders)
            if not clean:
                kill_init(pid, start)
                await wait_gone(pid, start)
        if not clean:
            await asyncio.to_thread(remove_remains, self.run_dir / slot, list(folders.values()))
        if base is not None:
            self.ranges.give_back(base, slot)
        for tell in self.removed:
            tell(slot)

    async def _retire(self, slot: str, pid: int, start: int, folders: Mapping[str, str]) -> bool:
        """Have the launcher end it; False when more remains than the launcher removes."""
        reply = await self.launcher.request("retire", {
            "pid": pid, "start": start, "slot": f"{self.run_dir}/{slot}", "cgroups": list(folders.values())})
        return bool(reply.get("clean"))

    def forget(self, slot: str) -> None:
        """Close this server's descriptors of it."""
        link = self._release(slot)
        if link is not None:
            link.close()

    def _release(self, slot: str) -> socket.socket | None:
        """As `forget`; returns the connection to pid 1, which the caller closes."""
        self._egress.drop(slot)
        sandbox = self.live.pop(slot, None)
        if sandbox is None:
            return None
        sandbox.close_first()
        return None if sandbox.link is None else sandbox.link.release()

    async def sweep(self, known: Sequence[str]) -> list[str]:
        """Remove all resources that belong to none of these ids; returns the removed ids, or slots."""
        keep, gone = set(known), []
        groups = await asyncio.to_thread(leftover_groups, self.limiter.groups)
        for slot in sorted({*records.slots(self.run_dir), *groups}):
            record = records.read(self.run_dir, slot)
            id = str(record.get("id", ""))
            if slot in self.making or (id in keep and self.slot_of.get(id, slot) == slot if id else slot in self.live):
                continue
            folders = self.limiter.groups.folders(slot)
            await self.clean_up(slot, record.get("pid"), record.get("start"), record.get("base"), folders)
            gone.append(id or slot)
        return gone
