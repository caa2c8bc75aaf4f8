"""`Sandbox`: an isolated computer on a ROCK server."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, Unpack, overload

from rock import errors
from rock.agents import Recipe
from rock.protocol.action import BashAction, BashObservation, CommandResponse, ConnectionList, GroupInfo
from rock.protocol.recordings import RecordedEntry
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import BaseConfig, CommitPhase, CommitStatus, SandboxConfig, SandboxInfo, State, Usage
from rock.protocol.snapshots import Forkable, ForkResult, Mechanism, Memory, SnapshotInfo
from rock.protocol.wire import html_table
from rock.sdk import primitives
from rock.sdk.http import query_string
from rock.sdk.sandbox.agent.recipes import AgentOptions, AgentResult, run_agent
from rock.sdk.sandbox.agent.rock_agent import RockAgent
from rock.sdk.sandbox.link import (
    CLEAN_UP,
    SLACK,
    end_of,
    headers_of,
    list_sandboxes,
    new_id,
    parse,
    transport_of,
)
from rock.sdk.sandbox.options import (
    ConnectOptions,
    ProgramOptions,
    RunOptions,
    SandboxOptions,
    config_of,
    known,
    reach_of,
)
from rock.sdk.sandbox.processes import TIMEOUT
from rock.sdk.sandbox.replay import NO_START, Recording, Replayed, read_entries
from rock.sdk.sandbox.rock_methods import RockMethods
from rock.sdk.sandbox.runs import Run, Runs
from rock.sdk.sandbox.sessions import DEFAULT
from rock.sdk.sandbox.sessions import TIMEOUT as RUN_TIMEOUT
from rock.sdk.sandbox.stream import OutputStream

POLL = 20.0  # seconds of one long-poll
UNDO = 5.0


class Forward(Protocol):
    """A forwarded port: `host` and `port` on this machine."""

    host: str

    @property
    def port(self) -> int: ...


class Sandbox(RockMethods):
    """One sandbox, from an image and typed options.

        async with Sandbox("python:3.11", memory="2g", idle_timeout=600) as sandbox:
            result = await sandbox.run("echo hello")

    `Sandbox(SandboxConfig(...))` uses a configuration of ROCK. `options.py` documents all options.

    files: read, write, list, upload and download files. sessions: shells that keep their state. processes: background
    processes. agent: ROCK's configurable agent. config: the configuration. sandbox_id: None before the start. url: URL
    of the server. host_name, host_ip, cluster: location of the sandbox.

    Calls are safe from all threads and event loops. Each call raises RockError: Unavailable when the server is
    unreachable, NotFound when the sandbox does not exist, SandboxStopped, OutOfMemory, Exited or Lost when it has
    ended. The base class has the methods of the original ROCK, such as `arun` and `execute`.
    """

    def __init__(
        self,
        image: str | SandboxConfig | None = None,
        *,
        config: SandboxConfig | None = None,
        **options: Unpack[SandboxOptions],
    ) -> None:
        super().__init__(config_of(SandboxConfig, image, config, options))
        self.agent = RockAgent(self)
        self.replayed: Replayed | None = None

    def _repr_html_(self) -> str:
        return html_table({"sandbox": self.sandbox_id or "not started", "image": self.config.image, "server": self.url})

    def __repr__(self) -> str:
        return f"Sandbox({self.sandbox_id or 'not started'}, image={self.config.image!r})"

    @classmethod
    async def connect(cls, id_or_name: str, /, **options: Unpack[ConnectOptions]) -> Self:
        """An existing sandbox by its id or name. NotFound."""
        sandbox = cls(SandboxConfig(**reach_of(options, "connect")))
        return await sandbox.attach(id_or_name)

    @classmethod
    async def replay(cls, run_id: str, /, *, repeat: bool = False, **options: Unpack[ConnectOptions]) -> Self:
        """A new sandbox with the state of a recorded one (`record=True`), on any worker, by its id; `replayed` of the
        result reports what was done. It starts from the newest snapshot that is available, and the requests after it
        are sent again.

        repeat: requests to the new sandbox that are equal to the recorded ones, in their order, get the recorded
        responses and are not executed; the first one that differs ends this. So a client can run its program again from
        the beginning. NotFound, Conflict; errors of `start`.
        """
        reach = reach_of(options, "replay")
        recording = Recording(transport_of(SandboxConfig(**reach)), run_id)
        await recording.load()
        report = Replayed(run_id)
        begins = recording.begins()
        while True:
            config, skip = begins.pop(0)
            sandbox = cls(config.model_copy(update=reach))
            report.snapshot = config.snapshot
            try:
                await sandbox.start()
                break
            except NO_START:
                if not begins:
                    raise
        try:
            await recording.replay(sandbox._id(), skip, report)
            if repeat:
                target = ROUTES["repeat_recording"].url(sandbox_id=sandbox._id())
                await sandbox._transport.json("PUT", target, {"source": run_id})
        except BaseException:
            await primitives.settle(sandbox.stop, CLEAN_UP)
            raise
        sandbox.replayed = report
        return sandbox

    async def log(self) -> list[RecordedEntry]:
        """The entries of its recording (`record=True`), also after its end. NotFound without a recording."""
        return await read_entries(self._transport, self._id())

    # ---- runs of agents

    async def start_run(self, **fields: Any) -> Run:
        """Start a run of an agent in this sandbox: a port on its loopback leads to the model gateway, without a
        network. The run has `base_url`, `api_key`, and `environ` with the variables of common agents. fields: of
        RunSpec, as in `upstream="NAME"` or `pull=True`."""
        return await Runs(self._transport).create(sandbox=self._id(), **fields)

    # ---- life

    @primitives.hinted
    async def start(self) -> None:
        """Create the sandbox and wait until it runs.

        Raises InvalidConfig, Unsupported, ImageError, NoCapacity, QuotaExceeded; StartFailed, also after
        `startup_timeout` seconds. A start that fails or is cancelled leaves no sandbox behind.
        """
        deadline = time.monotonic() + self.config.startup_timeout
        # The client chooses the id, so that a creation with a lost response can be undone.
        self.sandbox_id = self.config.sandbox_id or new_id(self.config)
        key = os.urandom(16).hex()
        created = False
        try:
            info = await self._create(key, deadline)
            created = True
            info = await self._launched(info, deadline)
        except (errors.ClientError, errors.ImageError, errors.NoCapacity):
            self.sandbox_id = None  # it was rejected: no sandbox exists
            raise
        except BaseException as error:
            if isinstance(error, errors.Unavailable) and error.details.get("unsent") and not created:
                raise  # no server was reached: there is nothing to undo
            answered = created or (isinstance(error, errors.RockError) and not isinstance(error, errors.Unavailable))
            await primitives.settle(self.stop if answered else partial(self._undo, key), CLEAN_UP)
            raise
        if info.state is not State.RUNNING:
            raise end_of(info)

    async def _launched(self, info: SandboxInfo, deadline: float) -> SandboxInfo:
        """The result of a start. StartFailed after the deadline."""
        while info.state is State.PENDING:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late(info)
            info = await self._get(min(left, POLL))
        return info

    async def stop(self) -> None:
        """Stop it. Nothing happens when it never started or has ended.

        With `retain` or `archive_after` its files are retained, and `restart` starts it again."""
        if self.sandbox_id is None:
            return
        try:
            await self._call("stop_sandbox", self._path("stop_sandbox"), wait=CLEAN_UP)
        except (errors.NotFound, errors.SandboxError):
            return

    async def delete(self) -> None:
        """Stop it, and delete its record and its retained files. Nothing happens when it does not exist."""
        if self.sandbox_id is None:
            return
        try:
            await self._call("delete_sandbox", self._path("delete_sandbox", force=True), wait=CLEAN_UP)
        except errors.NotFound:
            return

    async def pause(self) -> None:
        """Stop all processes until `resume`. Memory, sessions and processes are kept, and there is no idle timeout.

        Conflict while requests are in progress or environments are open; other calls meanwhile raise Conflict too.
        Unsupported by runtimes without our pid 1.
        """
        await self._call("pause_sandbox", self._path("pause_sandbox"), wait=CLEAN_UP)

    async def resume(self) -> None:
        """Continue a paused sandbox. Nothing happens when it is not paused."""
        await self._call("resume_sandbox", self._path("resume_sandbox"), wait=CLEAN_UP)

    async def checkpoint(
        self,
        *,
        memory: Memory = "auto",
        files: Mechanism = "auto",
        name: str | None = None,
        wait: float = 5.0,
        ttl_seconds: float | None = None,
    ) -> SnapshotInfo:
        """Take a snapshot. It continues to run; processes stop for some milliseconds.

        memory: what is taken beside the files; a named level is refused where it is not possible. files: "switch"
        freezes them without a copy, "copy" copies them, "auto" copies only where it must. name: unique among your
        snapshots. wait: seconds to wait for running commands. ttl_seconds: retention after the last use.

        The result states what was taken, and `left_out` what was not. Conflict: a command runs, or the name is taken.
        Unsupported: it cannot be taken this way; nothing has changed.
        """
        body = {"memory": memory, "files": files, "name": name, "wait": wait, "ttl_seconds": ttl_seconds}
        return parse(SnapshotInfo, await self._snapshot_call("checkpoint_sandbox", body, wait))

    async def forkable(self) -> Forkable:
        """The level that `checkpoint(memory="auto")` would have at this moment, and the reasons against a better one.
        Nothing is taken; processes stop for some milliseconds."""
        return parse(Forkable, await self._call("forkable_sandbox", self._path("forkable_sandbox"), wait=CLEAN_UP))

    async def rollback(self, snapshot: SnapshotInfo | str) -> None:
        """Return to a snapshot (or its id or name): a new set of files, processes end, and the sessions of the snapshot
        are opened again. The id, the limits and the deadline stay. NotFound, Conflict, Unsupported; it then continues
        unchanged."""
        name = snapshot if isinstance(snapshot, str) else snapshot.snapshot_id
        target = self._path("rollback_sandbox")
        await self._transport.json("POST", target, {"snapshot": name}, timeout=CLEAN_UP + SLACK)

    async def fork(
        self,
        count: int = 1,
        *,
        memory: Memory = "auto",
        files: Mechanism = "auto",
        name: str | None = None,
        wait: float = 5.0,
        ttl_seconds: float | None = None,
        best_effort: bool = False,
        **changes: Any,
    ) -> list[Self]:
        """Take one snapshot and start `count` sandboxes from it; returns them running, each with
        `config.snapshot`.

        memory, files, name, wait, ttl_seconds: as of `checkpoint`. best_effort: as many as fit, else all or none.
        changes: fields of SandboxConfig that differ from this sandbox's, such as env, labels, auto_clear_seconds.
        """
        begun = min(self.config.startup_timeout, POLL)
        body = {"memory": memory, "files": files, "name": name, "wait": wait, "ttl_seconds": ttl_seconds,
                "count": count, "start": begun, "changes": changes, "best_effort": best_effort}  # fmt: skip
        made = parse(ForkResult, await self._snapshot_call("fork_sandbox", body, wait + begun))
        group, deadline = made.group, time.monotonic() + self.config.startup_timeout
        while any(one.state is State.PENDING for one in group.sandboxes):
            left = min(deadline - time.monotonic(), POLL)
            if left <= 0:
                break
            target = ROUTES["get_group"].url(group_id=group.group_id) + query_string({"wait": round(left, 3)})
            group = parse(GroupInfo, await self._transport.json("GET", target, timeout=left + SLACK))
        running = [one for one in group.sandboxes if one.state is State.RUNNING]
        if not running or (len(running) < count and not best_effort):
            await self._transport.json("POST", ROUTES["stop_group"].url(group_id=group.group_id),
                                       timeout=CLEAN_UP + SLACK)  # fmt: skip
            ended = next((one for one in group.sandboxes if one.state is not State.RUNNING), None)
            raise end_of(ended) if ended is not None and ended.state is not State.PENDING else errors.StartFailed(
                "the children did not start in time", hint="increase startup_timeout")  # fmt: skip
        return [self._child(one, made.snapshot.snapshot_id) for one in running]

    def _child(self, info: SandboxInfo, snapshot: str) -> Self:
        config = self.config.model_copy(update={"sandbox_id": info.sandbox_id, "snapshot": snapshot, "name": None})
        child = type(self)(config)
        child.sandbox_id = info.sandbox_id
        child.host_name, child.host_ip = info.host_name, info.host_ip
        return child

    async def _snapshot_call(self, name: str, body: dict[str, Any], wait: float) -> Any:
        key = os.urandom(16).hex()
        return await self._transport.json("POST", self._path(name), body, timeout=wait + CLEAN_UP + SLACK, key=key)

    async def restart(self) -> None:
        """Start a stopped or archived sandbox again with its retained files, without its sessions and processes.

        Conflict: it runs, or its files were not retained. Other errors are those of `start`; the sandbox then keeps its
        state.
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
        """Move the files of a stopped sandbox to the server's archive and wait for the end. `restart` restores them.

        Conflict: it runs, or its files were not retained. InvalidConfig: they cannot be archived; the sandbox
        then stays stopped. Unavailable after `timeout` seconds; archiving continues.
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
                raise errors.Unavailable(
                    f"the archiving of sandbox {info.sandbox_id} took longer than {timeout:g} seconds",
                    hint="it continues: call archive again",
                    sandbox_id=info.sandbox_id,
                )

    async def commit(
        self,
        image_tag: str,
        username: str | None = None,
        password: str | None = None,
        timeout: float = 3600.0,
        *,
        push: bool | None = None,
    ) -> CommitStatus:
        """Create an image of its image and its written files under a name, and wait for the end.

        A running sandbox is paused while its files are read; a stopped one needs retained files. push: push it to the
        registry in the name; the default is to push if a username is given. The error has `details["stage"]`.
        Conflict: a commit under another name is in progress. Unavailable after `timeout` seconds; the commit continues.
        """
        deadline = time.monotonic() + timeout
        status = await self.commit_async(image_tag, username, password, push=push)
        while status.phase is CommitPhase.RUNNING:
            wait = min(deadline - time.monotonic(), POLL)
            if wait <= 0:
                raise errors.Unavailable(
                    f"the commit to {image_tag} took longer than {timeout:g} seconds",
                    hint="it continues: call get_commit_status",
                    sandbox_id=self.sandbox_id,
                )
            status = await self.get_commit_status(wait)
        if status.phase is CommitPhase.FAILED:
            raise errors.from_wire(status.error or {})
        return status

    async def info(self, *, wait: float | None = None, usage: bool = False) -> SandboxInfo:
        """Its state on the server. wait: seconds to wait while it is pending. usage: measure its usage."""
        return await self._get(wait, usage)

    async def usage(self) -> Usage:
        """Its current usage of memory, CPU, processes and disk."""
        return (await self._get(usage=True)).usage or Usage()

    async def egress_log(self) -> ConnectionList:
        """Its connections over network "nat", allowed and rejected, oldest first; also after its stop."""
        return parse(ConnectionList, await self._call("list_connections", self._path("list_connections")))

    # ---- programs

    @primitives.hinted
    async def run(
        self,
        command: str,
        *,
        session: str = DEFAULT,
        timeout: float | None = RUN_TIMEOUT,
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> BashObservation:
        """Run a command line in a session, which keeps its working directory and variables.

        timeout: seconds after which the command is killed; the result then has `timed_out`, and the session stays
        usable. None is no limit. check: raise CommandFailed for an exit code other than 0, and CommandTimeout.
        The other options are those of `RunOptions`. SessionClosed: the shell of the session has ended.
        """
        return await self.sessions.run(command, session=session, timeout=timeout, check=check, **options)

    @primitives.hinted
    async def exec(
        self,
        command: str | Sequence[str],
        *,
        timeout: float | None = TIMEOUT,
        check: bool = False,
        **options: Unpack[ProgramOptions],
    ) -> CommandResponse:
        """Run one program, independent of sessions. A list is an argv; a string is run by the image's shell.

        timeout: seconds after which its process tree is killed; None is no limit. check: raise CommandFailed for an
        exit code other than 0, and CommandTimeout. The other options are those of `ProgramOptions`.
        """
        return await self.processes.run(command, timeout=timeout, check=check, **options)

    @overload
    def stream(
        self, command: str, *, session: str, timeout: float | None = ..., **options: Unpack[RunOptions]
    ) -> OutputStream: ...

    @overload
    def stream(self, command: BashAction) -> OutputStream: ...

    @overload
    def stream(
        self,
        command: str | Sequence[str],
        *,
        session: None = None,
        timeout: float | None = ...,
        **options: Unpack[ProgramOptions],
    ) -> OutputStream: ...

    def stream(
        self, command: Any, *, session: str | None = None, timeout: float | None = TIMEOUT, **options: Any
    ) -> OutputStream:
        """The output of a program while it runs, or of a command in a session with `session`.

            async for chunk in sandbox.stream("make"):
                print(chunk.text, end="")

        timeout: seconds after which the command is killed, by default 1200; None is no limit. The other options are
        those of `exec` or of `run`. A streamed `stdin` is read while the program runs.
        """
        if isinstance(command, BashAction):
            return self.sessions.stream_of(command)
        if session is not None:
            return self.sessions.stream(command, session=session, timeout=timeout, **options)
        return self.processes.stream(command, timeout=timeout, **options)

    # ---- agents

    @primitives.hinted
    async def run_agent(
        self, agent: str | os.PathLike[str] | Recipe, prompt: str, **options: Unpack[AgentOptions]
    ) -> AgentResult:
        """Run an agent on a task, with a run of the model gateway, and wait for its end.

            async with Sandbox("python:3.11", agents=["claude-code"]) as sandbox:
                result = await sandbox.run_agent("claude-code", "fix the tests", upstream="main", budget={"calls": 50})

        agent: name of a recipe, path of a recipe file, or a Recipe. The options are those of `AgentOptions`; one of
        `upstream`, `pull`, `replay` and `run` is the source of responses. InvalidConfig: there is no such recipe, or
        the sandbox was created without it. An exit code other than 0 is no error.
        """
        known(options, AgentOptions, "run_agent")
        return await run_agent(self, agent, prompt, **options)

    # ---- ports

    def port_url(self, port: int) -> str:
        """URL of an HTTP or WebSocket server on a port of the sandbox. Requests need the server's API key."""
        return self.url + ROUTES["port"].url(sandbox_id=self._id(), port=_checked(port, 1), rest="")

    @asynccontextmanager
    async def port_forward(self, remote: int, local: int = 0) -> AsyncIterator[Forward]:
        """Forward port `local` of this machine to port `remote` of the sandbox; 0 selects a free port.

            async with sandbox.port_forward(5432) as forward:
                connect(forward.host, forward.port)

        Conflict: `local` is in use.
        """
        _checked(local, 0)
        target = ROUTES["tunnel"].url(sandbox_id=self._id(), port=_checked(remote, 1))
        from rock.sdk.forward import PortForward  # its WebSocket library takes a third of the import time of the SDK

        forward = PortForward(self.url, target, headers_of(self.config), local)
        await primitives.in_thread(forward.open)
        try:
            yield forward
        finally:
            await primitives.in_thread(forward.close)

    async def __aenter__(self) -> Self:
        if self.sandbox_id is None:
            await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _create(self, key: str, deadline: float) -> SandboxInfo:
        wait = max(0.0, min(deadline - time.monotonic(), POLL))
        target = ROUTES["create_sandbox"].path + f"?wait={wait:.3f}"
        return await self._begin("create_sandbox", target, self._spec(), wait, key, deadline)

    async def _begin(self, name: str, target: str, body: Any, wait: float, key: str, deadline: float) -> SandboxInfo:
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
            hint="increase startup_timeout, or pull the image first with `rock image pull`",
            sandbox_id=info.sandbox_id,
        )

    @classmethod
    async def list(
        cls,
        *,
        states: str | Iterable[str] | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
        filters: Mapping[str, str] | None = None,
        **options: Unpack[ConnectOptions],
    ) -> list[SandboxInfo]:
        """Sandboxes on the server, newest first.

        states: names of states; None is all. labels: only sandboxes with all of these labels. filters: equality of
        `name`, `image`, `user_id`, `experiment_id`, `namespace`. limit: maximum number.
        """
        reach = BaseConfig(**reach_of(options, "list"))
        query: dict[str, object] = {**(filters or {})}
        if labels:
            query["label"] = [f"{name}={value}" for name, value in labels.items()]
        return await list_sandboxes(transport_of(reach), states, limit, query)


def _checked(port: int, lowest: int) -> str:
    if not lowest <= port < 65536:
        raise errors.InvalidConfig(f"{port} is not a port", hint=f"use a number from {lowest} to 65535")
    return str(port)
