"""Runtime "process": the same pid 1 as a plain subprocess, without any isolation. It must be selected by name.

A sandbox is a folder of the host and a process tree. Its programs have the server user's access to the host's files,
network and processes; `Files` takes the host's paths. The only image is "host".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rock import errors, faults
from rock.guest.init import pid1, process_tree, remove
from rock.host import atomic_file
from rock.protocol.sandbox import Isolation, SandboxConfig, Usage
from rock.runtime.base import Enforced, Handle, Liveness, Program, Trait
from rock.runtime.init.files import InitSandboxes, merged
from rock.runtime.init.link import InitLink, bind_listener
from rock.runtime.refusals import START_LOG

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENFORCED: dict[str, Enforced] = {"memory": "none", "cpus": "none", "pids": "none"}


# Per process, not per runtime: a closed runtime leaves its sandboxes alive, and the next one reaps them.
children: dict[int, subprocess.Popen[bytes]] = {}


def can_hold_init() -> bool:
    """Whether guest/init/pid1.py, which requires Linux, can run here; runtime/process/portable.py replaces it
    elsewhere."""
    wanted = ((os, "pidfd_open"), (os, "O_PATH"), (select, "epoll"), (socket, "SOCK_SEQPACKET"))
    return all(hasattr(module, name) for module, name in wanted) and os.path.exists("/proc/self")


def refuse_unsupported(config: SandboxConfig, container_image: str = "") -> None:
    """Raise Unsupported for options that plain processes cannot enforce. container_image: of the container in which the
    rocklet runs, which enforces limits and network by itself (docs/guides/kubernetes.md)."""
    if config.image not in ("host", container_image or "host"):
        raise errors.Unsupported(f"the process runtime has no image {config.image!r}", hint='use image="host"')
    if config.isolation not in (None, Isolation.NONE):
        raise errors.Unsupported(f"isolation {config.isolation}: the process runtime isolates nothing",
                                 hint="name no runtime, or one that gives it")
    if config.minimum_isolation != Isolation.NONE:
        raise errors.Unsupported(f"{config.minimum_isolation} was asked for; the process runtime isolates nothing",
                                 hint="use the namespace runtime")
    own = ("host", "nat") if container_image else ("host",)
    if config.network not in own and "network" in config.model_fields_set:
        raise errors.Unsupported(f'the process runtime cannot give network "{config.network}"', hint='use "host"')
    of_container = () if container_image else ("num_gpus", "accelerator_type", "limit_cpus")
    for name in ("disk", "nofile", "shm_size", *of_container):
        if getattr(config, name) is not None:
            raise errors.Unsupported(f"the process runtime cannot enforce {name}",
                                     hint=f"leave {name} unset, or use the namespace runtime")
    if config.use_kata_runtime or config.oci_runtime is not None or config.image_os != "linux":
        raise errors.Unsupported("the process runtime runs programs of this machine only, without an OCI runtime",
                                 hint="leave use_kata_runtime, oci_runtime and image_os unset")


class ProcessRuntime(InitSandboxes):
    """Plain processes. `run_dir` holds one folder per sandbox; it is created when missing."""

    name = "process"
    isolation = Isolation.NONE
    prefix = "p-"  # of its sandboxes' folders
    traits: Mapping[Isolation, frozenset[Trait]] = {
        Isolation.NONE: frozenset({Trait.PROGRAMS, Trait.TERMINALS, Trait.OUTLIVES, Trait.TREES}),
    }

    def __init__(self, run_dir: Path, container_image: str = "") -> None:
        self._run_dir = Path(run_dir)
        self._container_image = container_image
        self._links: dict[str, InitLink] = {}

    async def open(self) -> None:
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    async def check(self, config: SandboxConfig) -> None:
        refuse_unsupported(config, self._container_image)

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        await self.check(config)
        slot = f"{self.prefix}{secrets.token_hex(5)}"
        folder = self._run_dir / slot
        home = folder / "root"
        home.mkdir(mode=0o700, parents=True)
        pid: int | None = None
        try:
            pid = self._start(folder)
            await faults.point("process.born")
            link = InitLink.connect(folder, id)
            self._links[slot] = link
            await link.request("hello", patience=config.startup_timeout)
            entry = process_tree.read(pid)
            if entry is None:
                raise errors.StartFailed("pid 1 of the sandbox exited during its start", sandbox_id=id, hint=START_LOG)
            data: dict[str, Any] = {"slot": slot, "pid": pid, "start": entry.start, "home": str(home),
                                    "env": dict(config.env), "id": id}
            write_record(folder, data)
            return Handle(self.name, id, Isolation.NONE, _ENFORCED, data)
        except BaseException as error:
            await asyncio.shield(self._clean(slot, pid, None))
            if isinstance(error, OSError | errors.Lost | errors.Unavailable):
                raise errors.StartFailed(f"the process runtime failed to start the sandbox: {error}", sandbox_id=id,
                                         hint=START_LOG) from error
            raise

    def _start(self, folder: Path) -> int:
        listener = bind_listener(folder)
        with listener, open(folder / "log", "ab") as log:
            options = json.dumps({"listen": listener.fileno(), "uid": os.geteuid()})
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", pid1.__file__, options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[listener.fileno()], start_new_session=True, cwd="/", env={"PATH": PATH})
        children[child.pid] = child
        return child.pid

    def link(self, handle: Handle) -> InitLink:
        slot = handle.data["slot"]
        link = self._links.get(slot)
        if link is None or link.closed:
            link = self._links[slot] = InitLink.connect(self._run_dir / slot, handle.id)
        return link

    def complete(self, handle: Handle, program: Program) -> Program:
        env = merged({"PATH": PATH, "HOME": handle.data["home"]}, handle.data["env"], program.env)
        return replace(program, env=env, cwd=program.cwd or handle.data["home"])

    async def recover(self, handle: Handle) -> Liveness:
        if not process_tree.lives(handle.data["pid"], handle.data["start"]):
            return Liveness.GONE
        entry = process_tree.read(handle.data["pid"])
        if entry is not None and entry.state in "Tt":  # stopped in order to be killed with its tree: it never responds
            return Liveness.GONE
        try:
            await self.link(handle).request("hello")
        except errors.RockError:
            return Liveness.GONE
        return Liveness.RUNNING

    async def wait(self, handle: Handle) -> str:
        await wait_gone(handle.data["pid"], handle.data["start"])
        reap()
        return "exited"

    async def stop(self, handle: Handle, grace: float) -> None:
        pid, start = handle.data["pid"], handle.data["start"]
        with contextlib.suppress(errors.RockError, TimeoutError):
            await self.link(handle).request("stop", {"grace": grace})
            async with asyncio.timeout(grace + 5):
                await wait_gone(pid, start)
        await asyncio.to_thread(_kill_sandbox, pid, start)
        reap()

    async def destroy(self, handle: Handle) -> None:
        await self._clean(handle.data["slot"], handle.data["pid"], handle.data["start"])

    async def _clean(self, slot: str, pid: int | None, start: int | None) -> None:
        link = self._links.pop(slot, None)
        if link is not None:
            link.close()
        if pid is not None:
            await asyncio.to_thread(_kill_sandbox, pid, start)
        reap()
        await asyncio.to_thread(remove.remove_tree, str(self._run_dir / slot))

    async def sweep(self, known: Sequence[str]) -> list[str]:
        gone = []
        for folder in self._run_dir.glob(f"{self.prefix}*"):
            record = read_record(folder)
            if folder.name not in self._links and record.get("id") not in known:
                pid = record.get("pid") or await asyncio.to_thread(_unrecorded, folder)
                await self._clean(folder.name, pid, record.get("start"))
                gone.append(str(record.get("id", "")))
        return gone

    async def usage(self, handle: Handle) -> Usage:
        return await asyncio.to_thread(_measure, handle.data["pid"])


def reap() -> None:
    for pid, child in list(children.items()):
        if child.poll() is not None:
            del children[pid]


def _unrecorded(folder: Path) -> int | None:
    """The pid 1 of a sandbox whose server died before it wrote the record: the process whose output is the sandbox's
    log."""
    log = os.path.realpath(folder / "log")
    for entry in process_tree.scan().values():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{entry.pid}/fd/1") == log:
                return entry.pid
    return None


def _kill_sandbox(pid: int, start: int | None) -> None:
    """Send SIGKILL to a pid 1 without a namespace and to its descendants, which survive a kill of pid 1 alone."""
    if process_tree.lives(pid, start):
        process_tree.run(process_tree.kill_tree(pid, None, True))


async def wait_gone(pid: int, start: int) -> None:
    """Return when exactly this process has ended; works for processes that are not children."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not process_tree.lives(pid, start):
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
    finally:
        os.close(fd)


def _measure(root: int) -> Usage:
    """Resident memory (shared pages counted once per process), CPU seconds and number of processes of a tree."""
    memory, ticks, pids = 0, 0, 0
    for pid in (root, *(entry.pid for entry in process_tree.descendants(process_tree.scan(), root))):
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        pids += 1
        ticks += sum(int(fields[index]) for index in (11, 12))
        memory += int(fields[21]) * os.sysconf("SC_PAGESIZE")
    return Usage(memory_bytes=memory, cpu_seconds=ticks / process_tree.TICK, pids=pids)


def write_record(folder: Path, data: dict[str, Any]) -> None:
    atomic_file.replace(folder / "record.json", atomic_file.summed(json.dumps(data)))


def read_record(folder: Path) -> dict[str, Any]:
    try:
        return atomic_file.parsed((folder / "record.json").read_bytes())
    except (OSError, ValueError):
        return {}
