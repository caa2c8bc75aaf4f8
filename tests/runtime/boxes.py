"""Sandboxes for the tests of the runtimes: real ones, of a root file system made by hand."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rock import errors
from rock.guest.init import process_tree
from rock.images.records import Bind, Lease, RootFS
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import ExitStatus, Handle, Process, Program
from rock.runtime.namespace.limits import cgroups
from rock.runtime.namespace.runtime import NamespaceRuntime
from rock.runtime.process.runtime import ProcessRuntime

T = TypeVar("T")
ROOT = os.geteuid() == 0


def run(main: Awaitable[T], timeout: float = 60.0) -> T:
    """Run a test's coroutine to its end, in a loop of its own."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout):
            return await main

    return asyncio.run(bounded())


def skeleton(folder: Path) -> Path:
    """A layer with what a system needs beside /usr."""
    for name in ("etc", "usr", "proc", "sys", "dev", "tmp", "root", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    for name in ("bin", "lib", "lib64", "sbin"):
        if not os.path.lexists(folder / name) and os.path.exists(f"/{name}"):
            os.symlink(f"usr/{name}", folder / name)
    (folder / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nbroken line\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n"
        "nobody:x:65534:65534::/:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\nalice:x:1000:\nstaff:x:50:alice\nnogroup:x:65534:\n")
    return folder


class HandMade:
    """Images for the runtime: "hand" is the skeleton with the host's /usr."""

    def __init__(self, folder: Path) -> None:
        self.layer = skeleton(folder)
        self.extra: tuple[str, ...] = ()
        self.binds: tuple[Bind, ...] = (Bind("/usr", "/usr"),)
        self.env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "FROM_IMAGE": "yes"}

    def resolve(self, name: str) -> RootFS:
        if name != "hand":
            raise errors.ImageError(f"image {name} is not on this machine")
        layers = (*self.extra, str(self.layer))
        return RootFS("hand" + "".join(layers), layers, self.binds, self.env, "/work", "root", name)

    def lease(self, rootfs: RootFS) -> Lease | None:
        return None


async def read_all(fd: int) -> bytes:
    """All that comes out of one of our descriptors, until its end."""
    loop = asyncio.get_running_loop()
    out = bytearray()
    done = loop.create_future()

    def readable() -> None:
        try:
            while piece := os.read(fd, 1 << 16):
                out.extend(piece)
        except BlockingIOError:
            return
        except OSError:  # a terminal whose other side is closed
            pass
        loop.remove_reader(fd)
        done.set_result(None)

    loop.add_reader(fd, readable)
    await done
    return bytes(out)


@dataclass
class Box:
    """One sandbox under test."""

    runtime: Any
    handle: Handle
    root: Path  # where its own files are, as its programs see it
    interpreter: str = "/usr/bin/python3"
    started: list[Process] = field(default_factory=list)

    async def spawn(self, *argv: str, **options: Any) -> Process:
        options.setdefault("env", {"PATH": "/usr/local/bin:/usr/bin:/bin"})
        process = await self.runtime.spawn(self.handle, Program(argv, **options))
        self.started.append(process)
        return process

    async def run(self, *argv: str, **options: Any) -> tuple[ExitStatus, bytes, bytes]:
        process = await self.spawn(*argv, **options)
        streams = [read_all(fd) if fd is not None else _nothing() for fd in (process.stdout, process.stderr)]
        out, err = await asyncio.gather(*streams)
        status = await process.wait()
        process.close()
        return status, out, err

    async def sh(self, script: str, **options: Any) -> str:
        """Standard output and error of a shell script, joined."""
        _, out, _ = await self.run("sh", "-c", script, stderr="stdout", **options)
        return out.decode()

    async def python(self, script: str, **options: Any) -> str:
        _, out, _ = await self.run(self.interpreter, "-I", "-S", "-c", script, stderr="stdout", **options)
        return out.decode()

    def close(self) -> None:
        for process in self.started:
            process.close()


async def until_line(fd: int) -> bytes:
    """What comes out of one of our descriptors up to the end of a line."""
    out = b""
    while not out.endswith(b"\n"):
        try:
            piece = os.read(fd, 1)
        except BlockingIOError:
            await asyncio.sleep(0.01)
            continue
        assert piece, f"it ended after {out!r}"
        out += piece
    return out


async def put(box: Box, path: str, data: bytes, **options: object) -> None:
    fd, token = await box.runtime.open_write(box.handle, path, **options)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
    finally:
        os.close(fd)
    await box.runtime.commit_write(box.handle, token)


async def get(box: Box, path: str, **options: object) -> bytes:
    fd = await box.runtime.open_read(box.handle, path, **options)
    with os.fdopen(fd, "rb") as file:
        return file.read()


async def _nothing() -> bytes:
    return b""


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that happens by itself."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


Maker = Callable[..., Any]


@asynccontextmanager
async def namespace_runtime(
    folder: Path, pool: int = 0, images: HandMade | None = None,
) -> AsyncIterator[NamespaceRuntime]:
    runtime = NamespaceRuntime(folder / "run", pool, images or HandMade(folder / "image"))
    try:
        await runtime.open()
    except errors.Unsupported as error:
        pytest.skip(f"no namespaces here: {error.message}")
    try:
        yield runtime
    finally:
        await runtime.close()


@asynccontextmanager
async def namespace_box(folder: Path, images: HandMade | None = None, **config: Any) -> AsyncIterator[Box]:
    """One sandbox of the namespace runtime, destroyed at the end, after which nothing may be left of it."""
    before = leftovers(folder)
    async with namespace_runtime(folder, images=images) as runtime:
        config = {"image": "hand", "memory": "512m", "cpus": 1, "pids": 256, **config}
        handle = await runtime.create("box", SandboxConfig(**config))
        box = Box(runtime, handle, Path("/work"))
        try:
            yield box
        finally:
            box.close()
            await runtime.destroy(handle)
    assert leftovers(folder) == before


@asynccontextmanager
async def process_box(folder: Path) -> AsyncIterator[Box]:
    runtime = ProcessRuntime(folder / "processes")
    await runtime.open()
    handle = await runtime.create("box", SandboxConfig(image="host"))
    box = Box(runtime, handle, Path(handle.data["home"]))
    try:
        yield box
    finally:
        box.close()
        await runtime.destroy(handle)
        await runtime.close()
    assert list((folder / "processes").iterdir()) == []
    assert [entry for entry in process_tree.descendants(process_tree.scan(), os.getpid()) if entry.alive] == []


def leftovers(folder: Path) -> dict[str, list[str]]:
    """What sandboxes of a run folder would leave on the machine: processes, mounts, cgroups, folders, descriptors."""
    run_dir = folder / "run"
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(run_dir) in line]
    ours = cgroups.discover(str(run_dir))
    groups = [str(path) for place in ours.places.values() for path in Path(place.parent).glob("[ng]-*")]
    cgroups.remove_parents(ours)
    slots = [path.name for path in run_dir.glob("[ng]-*")] if run_dir.exists() else []
    processes = [str(entry.pid) for entry in process_tree.descendants(process_tree.scan(), os.getpid()) if entry.alive]
    if not ROOT:  # without cgroups: what is ours and called so
        processes += [str(pid) for pid in process_tree.scan() if _is_our_init(pid)]
    return {"mounts": mounts, "groups": groups, "slots": slots, "processes": processes,
            "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in _descriptors())}


def _is_our_init(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    ours = status.startswith("Name:\trock-init\n") and f"\nUid:\t{os.geteuid()}\t" in status
    return ours and "State:\tZ" not in status


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
