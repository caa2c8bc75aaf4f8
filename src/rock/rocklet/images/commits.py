"""Commits: images made of the sandboxes of this machine. The changes become a layer, which is pushed on request.

    login      the registry accepts the login, before a sandbox is paused
    commit     the processes are paused while the files are packed; then the layer and the name are created
    push       to the registry
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from rock.errors import Conflict, RockError, Unavailable, Unsupported
from rock.images.records import RootFS, storing
from rock.images.registry.logins import Login
from rock.images.registry.reference import new_name
from rock.images.store import ImageStore
from rock.protocol.node import NodeCommit, NodeImage
from rock.protocol.sandbox import ArchivedFiles
from rock.rocklet.images.store import in_dedicated_thread
from rock.rocklet.retained import RetainedSandboxes
from rock.rocklet.sandbox import Supervisor
from rock.runtime.base import Handle, Runtime, Snapshots

_STAGE = "stage"


class Commits:
    """At most one commit per sandbox at a time. A caller that disconnects ends its commit; the partial result is
    removed.

    kept: the stopped sandboxes. supervisors: the running ones by id. find: a running one, or the error that describes
    its end.
    """

    def __init__(self, store: ImageStore, kept: RetainedSandboxes, supervisors: Mapping[str, Supervisor],
                 find: Callable[[str], Awaitable[Supervisor]]) -> None:  # fmt: skip
        self._store = store
        self._kept = kept
        self._supervisors = supervisors
        self._find = find
        self._under_way: dict[str, asyncio.Task[NodeImage]] = {}

    async def close(self) -> None:
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def commit(self, sandbox_id: str, spec: NodeCommit) -> NodeImage:
        """Make the commit. Every error has the stage in its details; Conflict when another commit is in progress."""
        if sandbox_id in self._under_way:
            raise Conflict(f"another commit of sandbox {sandbox_id} is in progress", sandbox_id=sandbox_id,
                           hint="wait until it has ended, then start the next one")
        task = asyncio.create_task(self._commit(sandbox_id, spec), name=f"commit-{sandbox_id}")
        self._under_way[sandbox_id] = task
        task.add_done_callback(lambda _: self._under_way.pop(sandbox_id, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    async def _commit(self, sandbox_id: str, spec: NodeCommit) -> NodeImage:
        try:
            stopped = sandbox_id in self._kept
            async with self._read(sandbox_id, stopped) as (runtime, handle):
                if not isinstance(runtime, Snapshots):
                    raise Unsupported(f"runtime {handle.runtime!r} cannot commit a sandbox to an image",
                                      hint="use the namespace runtime, or build an image with `rock image build`")
                base = runtime.image(handle)
                login = await self._logged_in(spec, base)
                async with scratch_of(self._store) as folder:
                    tar = folder / "written.tar"
                    files = await written(runtime, handle, spec.limit, tar)
                    if not stopped:
                        self._refuse_stopped(sandbox_id, handle)
                    return await in_dedicated_thread(
                        lambda gone: self._make(spec, base, tar, files, login, gone), "rock-commit")
        except RockError as error:
            error.sandbox_id = sandbox_id
            error.details.setdefault(_STAGE, "commit")
            raise

    # ---- checks before the commit ----

    @contextlib.asynccontextmanager
    async def _read(self, sandbox_id: str, stopped: bool) -> AsyncGenerator[tuple[Runtime, Handle]]:
        """The sandbox, protected against its idle timeout; a stopped one is protected against changes."""
        if stopped:
            with self._kept.reading(sandbox_id) as found:
                yield found.runtime, found.handle
            return
        supervisor = await self._find(sandbox_id)
        if supervisor.paused:  # it has no idle timeout now, and its processes are stopped already
            yield supervisor.runtime, supervisor.handle
            return
        with supervisor.active():
            yield supervisor.runtime, supervisor.handle

    async def _logged_in(self, spec: NodeCommit, base: RootFS) -> Login | None:
        """Reject a request whose push would be rejected."""
        reference = replace(new_name(spec.image_tag), public_only=spec.public_registries)
        if not spec.push:
            return None
        if base.binds:
            raise _at("push", Unsupported(
                f"an image made of {base.name} shows this machine's own system, which no registry can hold",
                hint="commit without a push, or use sandboxes of an image that was imported or pulled"))  # fmt: skip
        if spec.registry_username is None:
            login = self._store.logins.of(reference.domain)
            if login is None:
                return None
        else:
            login = Login(spec.registry_username, spec.registry_password or "")
        from rock.images.registry.client import Registry  # it imports urllib3, which is slow

        registry = Registry(reference, login)
        try:
            await asyncio.to_thread(registry.log_in)
        except RockError as error:
            raise _at("login", error) from None
        finally:
            registry.close()
        return login

    def _refuse_stopped(self, sandbox_id: str, handle: Handle) -> None:
        """Reject the result when the sandbox stopped during the read: its processes may have continued, or its files
        may be missing."""
        supervisor = self._supervisors.get(sandbox_id)
        if supervisor is None or supervisor.cause is not None or supervisor.handle != handle:
            raise Conflict(f"sandbox {sandbox_id} was stopped during the commit", sandbox_id=sandbox_id,
                           hint="commit the stopped sandbox if its files are retained, or commit before the stop")

    # ---- image; runs in a thread ----

    def _make(self, spec: NodeCommit, base: RootFS, tar: Path, files: ArchivedFiles, login: Login | None,
              gone: threading.Event) -> NodeImage:
        record = self._store.commit(spec.image_tag, base, tar, files.digest, spec.tenant)
        made = NodeImage(name=record.name, digest=record.digest, size=record.size)
        if not spec.push:
            return made

        def tell(_: str) -> None:
            if gone.is_set():
                raise Unavailable("the commit was canceled: the server is stopping, or the client disconnected",
                                  hint="start the commit again")

        try:
            digest = self._store.push(record.name, login, tell, {files.digest: tar},
                                      public_only=spec.public_registries)  # fmt: skip
        except RockError as error:
            raise _at("push", error) from None
        return made.model_copy(update={"pushed": digest})


@contextlib.asynccontextmanager
async def scratch_of(store: ImageStore) -> AsyncGenerator[Path]:
    """A scratch folder of a store. It is removed at the end; after a crash the next open of the store removes it."""
    with storing("making room for an image"):
        scratch = store.layers.scratch()
        folder = await asyncio.to_thread(scratch.__enter__)
    try:
        yield folder
    finally:
        await asyncio.shield(asyncio.to_thread(scratch.__exit__, None, None, None))


async def written(runtime: Snapshots, handle: Handle, limit: int, tar: Path) -> ArchivedFiles:
    """Pack the changes of a sandbox into a file, with holes for ranges of zeros, so that a sparse file of a guest takes
    no space."""
    told: list[ArchivedFiles] = []
    with storing("packing what was written"), open(tar, "xb") as file:
        async with contextlib.aclosing(runtime.snapshot(handle, limit)) as parts:
            async for part in parts:
                if isinstance(part, ArchivedFiles):
                    told.append(part)
                else:
                    await asyncio.to_thread(_append, file, part)
        file.truncate(told[0].size)
    return told[0]


def _at(stage: str, error: RockError) -> RockError:
    error.details[_STAGE] = stage
    return error


def _append(file: BinaryIO, part: bytes) -> None:
    if part.strip(b"\0"):
        file.write(part)
    else:
        file.seek(len(part), 1)
