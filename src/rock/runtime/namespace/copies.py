"""Copied processes of snapshots: take them, start copies, and keep templates within a limit of memory (decision 52).

    <run_dir>/snapshots/ID/processes.json, /pages    the processes (processes/state.py), beside the files
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from rock import errors, faults
from rock.host.child_process import Ended
from rock.runtime.base import Handle
from rock.runtime.init.link import InitLink
from rock.runtime.namespace.launcher import ptrace
from rock.runtime.namespace.processes import state
from rock.runtime.namespace.slots import Sandbox, Slots

_STREAMS = "streams"
_OVERHEAD = 8 << 20  # bytes of a template itself
_MOST = 32  # templates
_PAUSES = (0.003, 0.01, 0.03, 0.1)  # seconds before a look is repeated, such as while a process receives a signal


_Programs = tuple[list[dict[str, Any]], int]  # of a tree, as pid 1 adopts them, and the bytes of its pages


class CopiesEnded(errors.StartFailed):
    """The template or the launcher was killed while it started copies: another sandbox may succeed. In this one pid 1
    may have seen the end of programs already."""


class Copies:
    """memory: bytes of the templates of all snapshots, and most bytes of one. Templates over it end, the one that was
    not used for the longest time first; the next start reads the pages from the disk."""

    def __init__(self, slots: Slots, memory: int) -> None:
        self._slots = slots
        self.memory = memory
        self._held: OrderedDict[str, int] = OrderedDict()  # bytes by snapshot
        self._starting: Counter[str] = Counter()  # starts in progress, by snapshot
        self._programs: OrderedDict[str, _Programs] = OrderedDict()  # of the last snapshots, which do not change

    def refused(self) -> str:
        """The reason why this server copies no processes, or ""."""
        if os.geteuid() != 0:
            return "the server is not root"
        if not ptrace.SUPPORTED:
            return "this machine's processor is not supported"
        if not self.memory:
            return "ROCK_SNAPSHOT_MEMORY is 0"
        return ""

    # ---- take ----

    async def take(self, sandbox: Sandbox, spec: dict[str, Any], link: InitLink, snapshot_id: str, space: int, *,
                   dry: bool = False) -> dict[str, Any]:
        """The launcher's reply to a switch with processes. space: bytes that are left on the disk. dry: only the
        reasons against it. Ended."""
        name = f"look {snapshot_id}" if dry else snapshot_id
        for pause in (*_PAUSES, None):
            hello, _ = await link.request("hello")
            await faults.point("namespace.processes.known")
            reply = await self._slots.launcher.request("take", {
                **spec, "pid": sandbox.pid, "start": sandbox.start, "snapshot": name, "dry": dry,
                "most": min(self.memory, space), "limit": sandbox.memory,
                "programs": hello["programs"]})  # fmt: skip
            if not reply.get("passing") or pause is None:
                break
            await asyncio.sleep(pause)
        await faults.point("namespace.processes.taken")
        if reply.get("copied"):
            self._hold(snapshot_id, int(reply["bytes"]))
        return reply

    async def finish(self, snapshot_id: str, sandbox_id: str) -> None:
        """Wait until all pages of a `take` are read and stored; the processes continue meanwhile. StorageFull,
        Unavailable, Ended."""
        reply = await self._slots.launcher.request("finish", {"snapshot": snapshot_id})
        await faults.point("namespace.processes.finished")
        if "failed" in reply:
            raise errors.StorageFull(f"the memory of the processes could not be stored: {reply['failed']}",
                                     sandbox_id=sandbox_id, hint="free space on the worker's disk")  # fmt: skip
        if "finished" not in reply:
            raise errors.Unavailable(f"the processes were not copied: {reply.get('vanished') or reply.get('error')}",
                                     sandbox_id=sandbox_id, hint="retry")

    def _hold(self, snapshot_id: str, size: int) -> None:
        self._held[snapshot_id] = size + _OVERHEAD
        self._held.move_to_end(snapshot_id)
        idle = [one for one in self._held if one != snapshot_id and not self._starting[one]]
        while idle and (sum(self._held.values()) > self.memory or len(self._held) > _MOST):
            self.forget(idle.pop(0))

    def forget(self, snapshot_id: str) -> None:
        """End the template of a snapshot. Idempotent."""
        self._programs.pop(snapshot_id, None)
        if self._held.pop(snapshot_id, None) is not None:
            self._slots.launcher.post("forget", {"snapshot": snapshot_id})

    # ---- start ----

    async def start(self, sandbox: Sandbox, handle_id: str, snapshot_id: str, folder: str) -> None:
        """Start copies of the processes in a new sandbox. CopiesEnded, StartFailed, Lost; the sandbox is then to be
        removed."""
        if snapshot_id not in self._programs:
            self._programs[snapshot_id] = await asyncio.to_thread(_programs, Path(folder), handle_id)
        self._programs.move_to_end(snapshot_id)
        if len(self._programs) > _MOST:
            self._programs.popitem(last=False)
        programs, size = self._programs[snapshot_id]
        link = sandbox.link
        assert link is not None
        reply, fds = await link.request("adopt", {"programs": programs})
        self._starting[snapshot_id] += 1
        try:
            await faults.point("namespace.processes.adopted")
            self._hold(snapshot_id, size)
            try:
                done = await self._slots.launcher.ask("start", {
                    "snapshot": snapshot_id, "folder": folder, "pid": sandbox.pid, "start": sandbox.start,
                    "cgroups": list(sandbox.folders.values()), _STREAMS: reply[_STREAMS]}, fds)  # fmt: skip
            except Ended as error:  # its templates have ended with it
                done = {"error": error.message, "errno": errno.ECHILD}
        finally:
            self._starting[snapshot_id] -= 1
            self._starting += Counter()  # without zeros
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        await faults.point("namespace.processes.started")
        if "error" not in done:
            return
        kind = CopiesEnded if done.get("errno") == errno.ECHILD else errors.StartFailed
        raise kind(f"the processes of snapshot {snapshot_id} could not be started: {done['error']}",
                   sandbox_id=handle_id,
                   hint="raise the limits of the sandbox, or take a snapshot with memory=\"session\"")


def _programs(folder: Path, sandbox_id: str) -> _Programs:
    """The programs of copied processes, as pid 1 adopts them, and the bytes of their pages. StartFailed."""
    try:
        tree = state.read(str(folder))
    except (OSError, state.Damaged) as error:
        raise errors.StartFailed(f"the processes of snapshot {folder.name} cannot be read: {error}",
                                 sandbox_id=sandbox_id, hint="start from another snapshot") from None
    return [{"pid": one.pid, "key": one.key, _STREAMS: dict(one.streams)} for one in tree.programs], tree.bytes


def refused(handle: Handle, reasons: list[str]) -> errors.Unsupported:
    """The error for processes that cannot be copied."""
    return errors.Unsupported(f"processes cannot be copied: {'; '.join(reasons)}", sandbox_id=handle.id,
                              hint='end them, or use memory="session" or "auto"')
