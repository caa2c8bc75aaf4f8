"""The life of one sandbox: start, attach, status, stop, restart, delete."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

from rock import errors
from rock.protocol.action import (
    CloseResponse,
    ConnectionList,
    IsAliveResponse,
    SandboxStatusResponse,
    StateTransitionRecord,
)
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import Cause, CommitPhase, CommitStatus, SandboxConfig, SandboxInfo, State
from rock.sdk import primitives
from rock.sdk.sandbox.link import SLACK, Link, new_id, parse

POLL = 20.0  # seconds of one long-poll
CLEAN_UP = 15.0
UNDO = 5.0

_PHASES = {"image": "image_pull", "sandbox": "docker_run"}  # ROCK's names

_BY_CAUSE: dict[Cause, type[errors.SandboxError]] = {
    Cause.OUT_OF_MEMORY: errors.OutOfMemory,
    Cause.DISK_FULL: errors.DiskFull,
    Cause.LOST: errors.Lost,
    Cause.EXITED: errors.Exited,
    Cause.START_FAILED: errors.StartFailed,
}


def _iso(seconds: float | None) -> str | None:
    """A time of the epoch as ROCK has it: ISO 8601 to the second, in UTC."""
    return None if not seconds else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


class Lifecycle(Link):
    """Start and end of a sandbox."""

    async def start(self) -> None:
        """Create the sandbox and wait until it runs.

        Raises what prevented it: InvalidConfig, ImageError, NoCapacity, StartFailed... After `startup_timeout` seconds
        it is StartFailed; then, and when the call is cancelled, what was started is stopped.
        """
        deadline = time.monotonic() + self.config.startup_timeout
        # The name is ours, so that even a creation whose answer was lost can be undone.
        self.sandbox_id = self.config.sandbox_id or new_id(self.config)
        key = os.urandom(16).hex()
        created = False
        try:
            info = await self._create(key, deadline)
            created = True
            info = await self._launched(info, deadline)
        except (errors.ClientError, errors.ImageError, errors.NoCapacity):
            self.sandbox_id = None  # it was refused: nothing was made
            raise
        except BaseException as error:
            if isinstance(error, errors.Unavailable) and error.details.get("unsent") and not created:
                raise  # no server was reached: there is nothing to undo, and nobody to ask
            answered = created or (isinstance(error, errors.RockError) and not isinstance(error, errors.Unavailable))
            await primitives.settle(self.stop if answered else partial(self._undo, key), CLEAN_UP)
            raise
        if info.state is not State.RUNNING:
            raise end_of(info)

    async def _launched(self, info: SandboxInfo, deadline: float) -> SandboxInfo:
        """What became of a start. StartFailed when it is not over in time."""
        while info.state is State.PENDING:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late(info)
            info = await self._get(min(left, POLL))
        return info

    async def attach(self, sandbox_id: str) -> Self:
        """Turn to a sandbox that exists. NotFound when there is none of this id."""
        before, self.sandbox_id = self.sandbox_id, sandbox_id
        try:
            await self._get()
        except BaseException:
            self.sandbox_id = before
            raise
        return self

    async def info(self, *, wait: float | None = None, usage: bool = False) -> SandboxInfo:
        """The sandbox as the server sees it. `wait`: seconds to wait while it is pending; `usage`: measure its use."""
        return await self._get(wait, usage)

    async def connections(self) -> ConnectionList:
        """What it connected to over network "nat", or tried to, oldest first; when it is stopped too."""
        return parse(ConnectionList, await self._call("list_connections", self._path("list_connections")))

    async def get_status(self, include_all_states: bool = False) -> SandboxStatusResponse:
        """The status in ROCK's shape, of a stopped sandbox too; `info` has ours."""
        info = await self._get()
        return SandboxStatusResponse(
            sandbox_id=info.sandbox_id,
            status={
                _PHASES.get(name, name): {"status": phase.status, "message": phase.message}
                for name, phase in info.phases.items()
            },
            state=info.state.value,
            is_alive=info.is_alive,
            host_name=info.host_name,
            host_ip=info.host_ip,
            image=info.image,
            cpus=info.cpus,
            memory=info.memory,
            user_id=info.user_id,
            experiment_id=info.experiment_id,
            namespace=info.namespace,
            num_gpus=self.config.num_gpus,
            accelerator_type=self.config.accelerator_type,
            disk=self.config.disk,
            disk_limit_rootfs=self.config.disk,
            create_time=_iso(info.created_at),
            start_time=_iso(info.started_at),
            stop_time=_iso(info.stopped_at),
            archive_time=_iso(info.archived_at),
            delete_time=_iso(info.deleted_at),
            auto_stop_time=_iso(info.auto_stop_at),
            auto_archive_time=_iso(info.auto_archive_at),
            auto_delete_time=_iso(info.auto_delete_at),
            state_history=[
                StateTransitionRecord(from_state=step.from_state.value, to_state=step.to_state.value, event=step.event,
                                      timestamp=_iso(step.timestamp))
                for step in info.state_history
            ],
            info=info.model_dump(mode="json"),
        )

    async def is_alive(self) -> IsAliveResponse:
        """Whether it runs; truthy when it does. A sandbox that nobody knows is not alive."""
        try:
            info = await self._get()
        except errors.NotFound as error:
            return IsAliveResponse(is_alive=False, message=error.message)
        return IsAliveResponse(is_alive=info.is_alive, message=(info.host_name if info.is_alive else info.reason) or "")

    async def stop(self) -> None:
        """Stop it. Nothing happens when it was never started, or is gone already.

        With `auto_delete_seconds` or `auto_archive_seconds` its files are kept, and `restart` starts it again."""
        if self.sandbox_id is None:
            return
        try:
            await self._call("stop_sandbox", self._path("stop_sandbox"), wait=CLEAN_UP)
        except (errors.NotFound, errors.SandboxError):
            return

    async def delete(self) -> None:
        """Stop it, and forget it, its tombstone and its kept files. Nothing happens when it is gone already."""
        if self.sandbox_id is None:
            return
        try:
            await self._call("delete_sandbox", self._path("delete_sandbox", force=True), wait=CLEAN_UP)
        except errors.NotFound:
            return

    async def restart(self) -> None:
        """Start it again, stopped or archived, over the files that it left; its sessions and processes are gone.

        Conflict when it runs, or its files were not kept; else as `start`. One that cannot be started stays as it was.
        """
        deadline = time.monotonic() + self.config.startup_timeout
        key = os.urandom(16).hex()
        wait = max(0.0, min(deadline - time.monotonic(), POLL))
        target = self._path("restart_sandbox", wait=round(wait, 3))
        info = await self._begin("restart_sandbox", target, None, wait, key, deadline)
        info = await self._launched(info, deadline)
        if info.state is not State.RUNNING:
            raise end_of(info)

    async def archive(self, timeout: float = 3600.0) -> None:
        """Bring the files of a stopped one to the server's archive, and wait until they are there; `restart` brings
        them back. It takes no room on its worker meanwhile.

        Conflict when it runs, or its files were not kept; InvalidConfig when they cannot be archived, and what the
        archive raises: then it is stopped, as it was. Unavailable after `timeout` seconds, and it goes on.
        """
        deadline = time.monotonic() + timeout
        key = os.urandom(16).hex()
        while True:
            wait = max(0.0, min(deadline - time.monotonic(), POLL))
            info = await self._info(
                "archive_sandbox", self._path("archive_sandbox", wait=round(wait, 3)), wait=wait or 1.0, key=key
            )
            if info.state is State.ARCHIVED:
                return
            if info.state is not State.ARCHIVING:
                raise end_of(info)
            if time.monotonic() >= deadline:
                raise errors.Unavailable(f"sandbox {info.sandbox_id} is not archived yet", sandbox_id=info.sandbox_id)

    async def commit(
        self,
        image_tag: str,
        username: str | None = None,
        password: str | None = None,
        timeout: float = 3600.0,
        *,
        push: bool | None = None,
    ) -> CommitStatus:
        """Make an image of it under that name, and wait until it is there: its image with what it wrote on top.

        It may run, and stands still while its files are read; or be stopped, with its files kept. push: to the registry
        that the name tells; as it is left, where there is a login. Raises why there is none, with `details["stage"]`;
        Conflict when it is being committed to another name; Unavailable after `timeout` seconds, and it goes on.
        """
        deadline = time.monotonic() + timeout
        status = await self.commit_async(image_tag, username, password, push=push)
        while status.phase is CommitPhase.RUNNING:
            wait = min(deadline - time.monotonic(), POLL)
            if wait <= 0:
                raise errors.Unavailable(f"{image_tag} is not made yet", sandbox_id=self.sandbox_id)
            status = await self.get_commit_status(wait)
        if status.phase is CommitPhase.FAILED:
            raise errors.from_wire(status.error or {})
        return status

    async def commit_async(
        self,
        image_tag: str,
        username: str | None = None,
        password: str | None = None,
        *,
        push: bool | None = None,
    ) -> CommitStatus:
        """Begin to make an image of it, see `commit`; `get_commit_status` tells what becomes of it."""
        spec = {"image_tag": image_tag, "registry_username": username or None, "registry_password": password or None,
                "push": bool(username) if push is None else push}  # fmt: skip
        answer = await self._call("commit_sandbox", self._path("commit_sandbox"), spec)
        return parse(CommitStatus, answer)

    async def get_commit_status(self, wait: float | None = None) -> CommitStatus:
        """The last commit, after at most `wait` seconds when it is under way. NotFound when there was none."""
        target = self._path("get_commit", wait=wait and round(wait, 3))
        return parse(CommitStatus, await self._call("get_commit", target, wait=wait or 0.0))

    async def close(self) -> CloseResponse:
        """Stop it; failures are told, not raised."""
        try:
            await self.stop()
        except errors.RockError as error:
            return CloseResponse(success=False, message=str(error))
        return CloseResponse()

    async def _create(self, key: str, deadline: float) -> SandboxInfo:
        wait = max(0.0, min(deadline - time.monotonic(), POLL))
        target = ROUTES["create_sandbox"].path + f"?wait={wait:.3f}"
        return await self._begin("create_sandbox", target, self._spec(), wait, key, deadline)

    async def _begin(
        self, name: str, target: str, body: Any, wait: float, key: str, deadline: float
    ) -> SandboxInfo:
        """Ask for a start, which its key keeps one, until `deadline`: a time of the monotonic clock."""
        left = max(1.0, deadline - time.monotonic())
        timeout = (wait or 1.0) + SLACK
        answer = await self._transport.json(ROUTES[name].method, target, body, timeout=timeout, key=key, deadline=left)
        return self._known(parse(SandboxInfo, answer))

    def _spec(self) -> dict[str, Any]:
        """What was set, and nothing else: the server knows the rest."""
        config = self.config.model_dump(mode="json", exclude_unset=True, include=set(SandboxConfig.model_fields))
        return {**config, "sandbox_id": self._id()}

    async def _undo(self, key: str) -> None:
        """Stop what a creation made, or may yet make, whose answer never came: asking again with its key shows it."""
        try:
            await self._transport.json("POST", ROUTES["create_sandbox"].path, self._spec(), timeout=UNDO, key=key)
        except errors.Conflict:
            if self.config.sandbox_id is not None:
                return  # somebody else's
        except errors.RockError:
            pass
        await self.stop()

    async def _get(self, wait: float | None = None, usage: bool = False) -> SandboxInfo:
        target = self._path("get_sandbox", wait=wait and round(wait, 3), usage=usage or None)
        return await self._info("get_sandbox", target, wait=wait or 0.0)

    def _late(self, info: SandboxInfo) -> errors.StartFailed:
        running = ((name, phase.message) for name, phase in info.phases.items() if phase.status == "running")
        at = next((f"; it is in phase {name!r}: {message}" for name, message in running), "")
        return errors.StartFailed(
            f"the sandbox did not run within startup_timeout={self.config.startup_timeout:g} seconds{at}",
            sandbox_id=info.sandbox_id,
        )


def end_of(info: SandboxInfo) -> errors.RockError:
    """The error that stands for a sandbox which does not run any more."""
    if info.error:
        body = info.error if isinstance(info.error.get("error"), dict) else {"error": info.error}
        return errors.from_wire(body)
    kind = _BY_CAUSE.get(info.cause, errors.Expired) if info.cause else errors.SandboxError
    reason = info.reason or f"it is {info.state.value}"
    return kind(f"sandbox {info.sandbox_id} does not run: {reason}", sandbox_id=info.sandbox_id)
