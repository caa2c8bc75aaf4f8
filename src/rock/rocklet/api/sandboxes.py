"""The HTTP API of the rocklet: the data plane and the node plane of protocol/routes.py, over a Node."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Any, Literal, TypeVar

import orjson

from rock.errors import ClientError, Expired, InvalidConfig, NotHere, RockError, SessionClosed, Unavailable, from_wire
from rock.http.asgi import (
    JSON_OBJECT,
    Answer,
    Found,
    Handler,
    Receive,
    Request,
    Router,
    Scope,
    Send,
    SocketHandler,
    answer,
    answer_model,
    deny,
    failure,
    validate,
)
from rock.protocol.action import BashAction, Command, CreateBashSessionRequest
from rock.protocol.configuration import NodeConfiguration
from rock.protocol.node import NodeCommit, NodeVolume, ProcessList, SessionList, WorkerImage
from rock.protocol.pools import NodePools
from rock.protocol.route import SANDBOX, Route
from rock.protocol.routes import LOG_NEXT, LOG_RUNNING, LOG_START, ROUTES
from rock.protocol.sandbox import SandboxConfig
from rock.protocol.snapshots import NodeCheckpoint, NodeImport, NodeRollback
from rock.rocklet import ports
from rock.rocklet.api import environments, files, frames
from rock.rocklet.commands import programs, terminal
from rock.rocklet.commands.output import Streaming
from rock.rocklet.durability import resume
from rock.rocklet.durability.idempotency import IdempotentCalls, place_of
from rock.rocklet.node import Node
from rock.rocklet.sandbox import Supervisor
from rock.settings import RECONNECT_TIMEOUT
from rock.telemetry import tracing
from rock.telemetry.metrics import REGISTRY


class Api:
    """Handlers by route name. Each finds its sandbox, counts as activity, and calls one method of its supervisor."""

    def __init__(self, node: Node, reconnect: float = RECONNECT_TIMEOUT) -> None:
        """reconnect: seconds during which a client may retry a request with its key."""
        self.node = node
        self.once = IdempotentCalls(reconnect)

    def router(self) -> Router:
        router = SandboxRouter("rocklet", self.node)
        for name in (
            "create_session",
            "list_sessions",
            "close_session",
            "run",
            "interrupt",
            "session_input",
            "resize",
            "execute",
            "start_process",
            "list_processes",
            "get_process",
            "process_logs",
            "signal_process",
            "process_stdin",
            "forget_process",
            "node_create",
            "node_list",
            "node_get",
            "node_destroy",
            "node_connections",
            "node_rest",
            "node_wake",
            "node_pause",
            "node_resume",
            "node_commit",
            "node_image",
            "node_status",
            "node_events",
            "node_volumes",
            "node_create_volume",
            "node_delete_volume",
            "node_configure",
            "node_pools",
            "node_define_pools",
            "node_snapshots",
            "node_export_snapshot",
            "node_import_snapshot",
            "node_checkpoint",
            "node_forkable",
            "node_rollback",
            "node_delete_snapshot",
        ):
            router.add(ROUTES[name], getattr(self, name))
        router.add(ROUTES["terminal"], terminal.handler(self.node))
        ports.add_routes(router, self.node)
        files.add_routes(router, self.node, self.once)
        frames.add_retained_routes(router, self.node)
        frames.add_bulk_routes(router, self.node)
        frames.add_build_routes(router, self.node)
        environments.add_routes(router, self.node, self.once)
        return router

    def _find(self, request: Request) -> Supervisor:
        return self.node.get(request.path["sandbox_id"])

    # ---- sessions ----

    async def create_session(self, request: Request) -> Answer:
        sandbox = self._find(request)
        wanted = await request.model(CreateBashSessionRequest)

        async def work() -> Answer:
            with sandbox.active():
                return await resume.create_session(sandbox, wanted, place_of(request))

        return await self.once.do(request, work())

    async def list_sessions(self, request: Request) -> Answer:
        sandbox = self._find(request)
        return answer(SessionList(items=[s.info for s in sandbox.sessions if s.closed is None]))

    async def close_session(self, request: Request) -> Answer:
        sandbox = self._find(request)

        async def work() -> Answer:
            await sandbox.sessions.close(request.path["session"])
            return answer({"session_type": "bash"})

        return await self.once.call(sandbox, request, work)

    async def run(self, request: Request) -> Answer:
        sandbox = self._find(request)
        body = await request.json()
        if not isinstance(body, dict):
            raise InvalidConfig("the body is not a JSON object", hint=JSON_OBJECT)
        body["session"] = request.path["session"]
        action = validate(BashAction, body)
        if request.flag("stream"):
            return await self._stream_run(sandbox, request, action)

        async def work() -> Answer:
            with sandbox.active(), command_span("session", sandbox.id, sandbox.config):
                return await resume.run(sandbox, action, place_of(request))

        return await self.once.do(request, work(), abandon=True)

    async def _stream_run(self, sandbox: Supervisor, request: Request, action: BashAction) -> Answer:
        session = await sandbox.sessions.get(action.session)
        place = await self._first(sandbox, request)
        streaming = Streaming(session.pause, session.resume)

        async def work() -> Any:
            with (
                sandbox.active(),
                command_span("session", sandbox.id, sandbox.config),
                resume.streamed(sandbox, place),
            ):
                return await session.run(action, streaming.put)

        return streaming.answer(told_of_end(self.node, sandbox, work(), was_stopped), request)

    async def _first(self, sandbox: Supervisor, request: Request) -> str | None:
        """Accept a streamed request once per key, including keys of an earlier rocklet process. Conflict for a
        repetition."""
        self.once.first(request)
        place = place_of(request)
        known = await sandbox.journal.known(place)
        if known is not None:
            raise from_wire(orjson.loads(known.body), known.status)
        return place

    async def interrupt(self, request: Request) -> Answer:
        sandbox = self._find(request)
        session = await sandbox.sessions.get(request.path["session"])

        async def work() -> Answer:
            await session.interrupt()
            return answer(session.info)

        return await self.once.call(sandbox, request, work)

    async def session_input(self, request: Request) -> Answer:
        sandbox = self._find(request)
        data = await request.body()

        async def work() -> Answer:
            session = await sandbox.sessions.get(request.path["session"])
            await session.type(data)
            return answer(session.info)

        return await self.once.call(sandbox, request, work)

    async def resize(self, request: Request) -> Answer:
        session = await self._find(request).sessions.get(request.path["session"])
        rows, columns = size_of(await request.json())
        await session.resize(rows, columns)
        return answer(session.info)

    # ---- processes ----

    async def execute(self, request: Request) -> Answer:
        sandbox = self._find(request)
        command = await request.model(Command)
        if request.flag("stream"):
            return await self._stream_execute(sandbox, request, command)

        async def work() -> Answer:
            with sandbox.active(), command_span("program", sandbox.id, sandbox.config):
                return await resume.execute(sandbox, command, place_of(request))

        return await self.once.do(request, work(), abandon=True)

    async def _stream_execute(self, sandbox: Supervisor, request: Request, command: Command) -> Answer:
        place = await self._first(sandbox, request)
        with tracing.span("spawn"):  # the streaming runs in a task of its own
            process = await programs.start(sandbox.runtime, sandbox.handle, command, await sandbox.shell_for(command))
        streaming = Streaming()
        execution = programs.Execution(process, command, streaming.put)
        streaming.pause, streaming.resume = execution.pause, execution.resume

        async def work() -> Any:
            with (
                sandbox.active(),
                command_span("program", sandbox.id, sandbox.config),
                resume.streamed(sandbox, place),
            ):
                return await execution.run()

        return streaming.answer(told_of_end(self.node, sandbox, work(), was_stopped), request)

    async def start_process(self, request: Request) -> Answer:
        sandbox = self._find(request)
        command = await request.model(Command)

        async def work() -> Answer:
            with sandbox.active(), command_span("background", sandbox.id, sandbox.config):
                return await resume.start_process(sandbox, command, place_of(request))

        return await self.once.do(request, work())

    async def list_processes(self, request: Request) -> Answer:
        return answer(ProcessList(items=[p.info for p in self._find(request).processes.values()]))

    async def get_process(self, request: Request) -> Answer:
        sandbox = self._find(request)
        process = sandbox.process(request.path["process_id"])
        with sandbox.active():
            return answer(await process.wait(request.number("wait", 0, high=3600)))

    async def process_logs(self, request: Request) -> Answer:
        sandbox = self._find(request)
        process = sandbox.process(request.path["process_id"])
        offset = request.integer("offset", 0)
        limit = request.integer("limit", 1 << 20, low=1, high=16 << 20)
        with sandbox.active():
            data, more = await process.read(
                request.query.get("stream", "stdout"), offset, limit, request.number("wait", 0, high=3600)
            )
        if not more and process.info.exit_code is None and await sandbox.ends_within(PERHAPS):
            raise NotHere("it ended with its sandbox", sandbox_id=sandbox.id)
        headers = [
            (LOG_START.encode(), b"%d" % offset),
            (LOG_NEXT.encode(), b"%d" % (offset + len(data))),
            (LOG_RUNNING.encode(), b"1" if more else b"0"),
        ]
        return Answer(data, content_type=b"application/octet-stream", headers=headers)

    async def signal_process(self, request: Request) -> Answer:
        sandbox = self._find(request)
        process = sandbox.process(request.path["process_id"])
        body = await request.json()
        number = body.get("signal", 15) if isinstance(body, dict) else None
        if type(number) is not int or not 1 <= number <= 64:
            raise InvalidConfig(f"no such signal: {number!r}", hint="a number from 1 to 64")

        async def work() -> Answer:
            if process.status is None:
                await process.process.signal(number, tree=bool(body.get("tree", False)))
            return answer(process.info)

        return await self.once.call(sandbox, request, work)

    async def process_stdin(self, request: Request) -> Answer:
        sandbox = self._find(request)
        process = sandbox.process(request.path["process_id"])
        data = await request.body()

        async def work() -> Answer:
            await process.write(data, request.flag("close"))
            return answer(process.info)

        return await self.once.call(sandbox, request, work)

    async def forget_process(self, request: Request) -> Answer:
        sandbox = self._find(request)

        async def work() -> Answer:
            return answer((await sandbox.forget_process(request.path["process_id"])).info)

        return await self.once.call(sandbox, request, work)

    # ---- node plane ----

    async def node_create(self, request: Request) -> Answer:
        config = await request.model(SandboxConfig)
        if request.flag("check"):
            await self.node.runtimes.check(config)
            return answer({})
        return answer_model(await self.node.create(request.path["sandbox_id"], config), 201)

    async def node_list(self, request: Request) -> Answer:
        return answer_model(self.node.inventory())

    async def node_get(self, request: Request) -> Answer:
        look = self.node.look(request.path["sandbox_id"], touch=request.flag("touch"), usage=request.flag("usage"))
        return answer_model(await look)

    async def node_connections(self, request: Request) -> Answer:
        return answer_model(await self.node.runtimes.connections(request.path["sandbox_id"]))

    async def node_destroy(self, request: Request) -> Answer:
        return answer_model(await self.node.destroy(request.path["sandbox_id"], request.number("grace", 0, high=600)))

    async def node_rest(self, request: Request) -> Answer:
        return answer_model(await self.node.rest(request.path["sandbox_id"], request.number("grace", 0, high=600)))

    async def node_wake(self, request: Request) -> Answer:
        return answer_model(await self.node.wake(request.path["sandbox_id"], await request.model(SandboxConfig)))

    async def node_pause(self, request: Request) -> Answer:
        return answer_model(await self.node.pause(request.path["sandbox_id"]))

    async def node_resume(self, request: Request) -> Answer:
        return answer_model(await self.node.resume(request.path["sandbox_id"]))

    async def node_commit(self, request: Request) -> Answer:
        return answer_model(await self.node.commits.commit(request.path["sandbox_id"], await request.model(NodeCommit)))

    async def node_image(self, request: Request) -> Answer:
        spec = await request.model(WorkerImage)
        return answer_model(await self.node.images.look(spec.image, spec.wait))

    async def node_status(self, request: Request) -> Answer:
        return answer_model(await self.node.status())

    async def node_events(self, request: Request) -> Answer:
        after = request.integer("after", 0)
        wait, boot = request.number("wait", 0, high=600), request.query.get("boot") or ""
        return answer_model(await self.node.ends.since(after, wait, boot))

    async def node_volumes(self, request: Request) -> Answer:
        return answer_model(self.node.volumes.inventory())

    async def node_create_volume(self, request: Request) -> Answer:
        spec = await request.model(NodeVolume)
        return answer_model(await self.node.volumes.create(request.path["volume_id"], spec))

    async def node_delete_volume(self, request: Request) -> Answer:
        return answer_model(await self.node.delete_volume(request.path["volume_id"]))

    async def node_configure(self, request: Request) -> Answer:
        return answer_model(await self.node.configuration.configure(await request.model(NodeConfiguration)))

    async def node_pools(self, request: Request) -> Answer:
        return answer_model(self.node.pools.states())

    async def node_define_pools(self, request: Request) -> Answer:
        return answer_model(await self.node.pools.define(await request.model(NodePools)))

    async def node_snapshots(self, request: Request) -> Answer:
        return answer_model(self.node.snapshots.inventory())

    async def node_export_snapshot(self, request: Request) -> Answer:
        stream = self.node.snapshots.export(request.path["snapshot_id"])
        first = await anext(stream)  # errors before it have a status

        async def whole() -> AsyncGenerator[bytes]:
            async with contextlib.aclosing(stream):
                yield first
                async for part in stream:
                    yield part

        return Answer(stream=whole(), content_type=b"application/x-tar")

    async def node_import_snapshot(self, request: Request) -> Answer:
        spec = NodeImport(tenant=request.query.get("tenant", ""), name=request.query.get("name") or None)
        return answer_model(await self.node.snapshots.take_in(request.path["snapshot_id"], spec, request.chunks()))

    async def node_checkpoint(self, request: Request) -> Answer:
        spec = await request.model(NodeCheckpoint)
        return answer_model(await self.node.snapshots.checkpoint(request.path["sandbox_id"], spec))

    async def node_forkable(self, request: Request) -> Answer:
        return answer_model(await self.node.snapshots.forkable(request.path["sandbox_id"]))

    async def node_rollback(self, request: Request) -> Answer:
        spec = await request.model(NodeRollback)
        return answer_model(await self.node.rollback(request.path["sandbox_id"], spec.snapshot_id))

    async def node_delete_snapshot(self, request: Request) -> Answer:
        return answer_model(await self.node.snapshots.delete(request.path["snapshot_id"]))


def size_of(body: Any) -> tuple[int, int]:
    """(rows, columns) of a request; InvalidConfig for values that are no valid terminal size."""
    values = [body.get(name) for name in ("rows", "columns")] if isinstance(body, dict) else [None, None]
    rows, columns = (v if isinstance(v, int) and 1 <= v <= 10_000 else 0 for v in values)
    if not rows or not columns:
        raise InvalidConfig(f"the terminal size {values} is invalid",
                            hint="send rows and columns as numbers from 1 to 10000, as in {'rows': 24, 'columns': 80}")
    return rows, columns


# ---- metrics and traces of commands ----

SECONDS = REGISTRY.histogram("rock_command_seconds", "From a command's arrival at its sandbox to its end", "kind")
_SERIES = {kind: SECONDS.of(kind) for kind in ("session", "program", "background")}
_LONGEST = 256


class command_span:
    """Context of one command, or of the start of one in the background, for metrics and traces. Programs that it starts
    find the span in their environment."""

    __slots__ = ("_began", "_kind", "_span")

    def __init__(
        self, kind: Literal["session", "program", "background"], sandbox_id: str, config: SandboxConfig
    ) -> None:
        self._kind = kind
        self._span: contextlib.AbstractContextManager[object] | None = None
        if tracing.tracer() is not None:
            said: dict[str, tracing.Value] = {"rock.sandbox_id": sandbox_id, "rock.image": config.image[:_LONGEST]}
            said |= {f"rock.label.{name[:_LONGEST]}": value[:_LONGEST] for name, value in config.labels.items()}
            self._span = tracing.span(kind, said)
        self._began = time.perf_counter()

    def __enter__(self) -> None:
        if self._span is not None:
            self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._span is not None:
                self._span.__exit__(kind, error, trace)
        finally:
            _SERIES[self._kind].observe(time.perf_counter() - self._began)


# ---- errors of ended sandboxes ----
#
# Errors of requests whose sandbox ends while they are served: each request gets the error that describes the end.
#
# Without this, a request would see a symptom of the end that depends on its kind: a broken link, a missing shell, an
# observation without an exit status. None of these symptoms may look like an error that is worth a retry.

T = TypeVar("T")

_SOON = 2.0  # seconds to notice the end of pid 1 after its link has broken
PERHAPS = 0.5  # seconds to notice the end when only a shell or a program may have ended
_NO_STATUS = b'"exit_code":null'
_TIMED_OUT = b'"timed_out":true'
_RUNNING = b'"running":true'  # a background process, which has no exit status yet


class SandboxRouter(Router):
    """A router whose sandbox routes respond with the end of the sandbox when it ended during the request."""

    def __init__(self, name: str, node: Node) -> None:
        super().__init__(name)
        self._node = node

    def add(self, route: Route, handler: Handler | SocketHandler) -> None:
        if route.plane == "data" and route.path.startswith(SANDBOX) and route.method not in ("WEBSOCKET", "ANY"):
            handler = self._told(handler)  # type: ignore[arg-type]
        super().add(route, handler)

    async def serve(self, found: Found | None, scope: Scope, receive: Receive, send: Send) -> None:
        """As of Router, once the sandbox is attached; one that was paused because it was idle is continued first."""
        supervisor = None
        if found is not None and self._node.recovery.unattached:
            try:
                await self._node.recovery.found(found[1].get("sandbox_id", ""))
            except RockError as error:
                await _refuse(scope, send, error)
                return
        if found is not None and found[2].plane == "data":
            supervisor = self._node.supervisors.get(found[1].get("sandbox_id", ""))
        if supervisor is None or supervisor.auto_pause is None:
            await super().serve(found, scope, receive, send)
            return
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(supervisor.awake())
            except RockError as error:
                await _refuse(scope, send, error)
                return
            await super().serve(found, scope, receive, send)

    def _told(self, handler: Handler) -> Handler:
        async def told(request: Request) -> Answer:
            supervisor = self._node.supervisors.get(request.path["sandbox_id"])
            if supervisor is None:
                return await handler(request)
            try:
                reply = await handler(request)
            except RockError as error:
                ended = await _end_behind(self._node, supervisor, error, _not_here)
                if ended is None:
                    raise
                raise ended from error
            if _NO_STATUS in reply.body and await _ended_untold(supervisor, reply):
                raise _end(self._node, supervisor, _not_here)
            return reply

        return told


async def _refuse(scope: Scope, send: Send, error: RockError) -> None:
    await (deny(scope, send, error) if scope["type"] == "websocket" else failure(error).send(send))


async def told_of_end(
    node: Node, supervisor: Supervisor, work: Awaitable[T], unknown: Callable[[Supervisor], RockError] | None = None
) -> T:
    """The result of `work`. Raises Lost, OutOfMemory or the error of `unknown` (by default NotHere, which a proxy
    replaces by the reason in the record) when the sandbox ended or was being ended meanwhile."""
    try:
        answer = await work
    except RockError as error:
        ended = await _end_behind(node, supervisor, error, unknown or _not_here)
        if ended is None:
            raise
        raise ended from error
    if await _ended_untold(supervisor, answer):
        raise _end(node, supervisor, unknown or _not_here)
    return answer


async def _end_behind(
    node: Node, supervisor: Supervisor, error: RockError, unknown: Callable[[Supervisor], RockError]
) -> RockError | None:
    """The error for the end of the sandbox that caused `error`; None when the sandbox has not ended."""
    if isinstance(error, ClientError) and not isinstance(error, NotHere):
        return None
    within = PERHAPS if isinstance(error, SessionClosed) else _SOON
    if not await _ends(supervisor, 0.0 if supervisor.leaving else within, error):
        return None
    return _end(node, supervisor, unknown)


async def _ended_untold(supervisor: Supervisor, answer: Any) -> bool:
    """Whether a response has no exit status because its sandbox has ended."""
    return _has_no_status(answer) and await _ends(supervisor, 0.0 if supervisor.leaving else PERHAPS)


def was_stopped(supervisor: Supervisor) -> RockError:
    """The error for responses that no proxy replaces, such as those within a stream."""
    return Expired(f"sandbox {supervisor.id} was stopped while this ran", sandbox_id=supervisor.id)


def _not_here(supervisor: Supervisor) -> RockError:
    return NotHere(f"sandbox {supervisor.id} was stopped while this ran", sandbox_id=supervisor.id)


def _end(node: Node, supervisor: Supervisor, unknown: Callable[[Supervisor], RockError]) -> RockError:
    known = node.ends.error(supervisor.id) if supervisor.cause is not None else None
    return known or unknown(supervisor)


async def _ends(supervisor: Supervisor, within: float, error: RockError | None = None) -> bool:
    """Whether the sandbox has ended or is being ended. within: seconds to wait for that."""
    if supervisor.cause is not None:
        return True
    if error is not None and not (isinstance(error, SessionClosed | Unavailable) or error.status >= 500
                                  or error.status == 410):  # fmt: skip
        return False
    return await supervisor.ends_within(within)


def _has_no_status(answer: Any) -> bool:
    """Whether it is the result of a command with an unknown exit status."""
    if isinstance(answer, Answer):
        return _NO_STATUS in answer.body and _TIMED_OUT not in answer.body and _RUNNING not in answer.body
    known = getattr(answer, "timed_out", False) or getattr(answer, "running", False)
    return getattr(answer, "exit_code", 0) is None and not known
