"""The dialect as a part of the server: which request is for which part, who sent it, and errors in E2B's formats."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

from rock.admin.tenants import Keys, TenantServices
from rock.dialects.e2b import connect, files
from rock.dialects.e2b.builds import Builds
from rock.dialects.e2b.call import Accounts, Call, user_of
from rock.dialects.e2b.control import Control
from rock.dialects.e2b.errors import (
    NotRunning,
    RpcError,
    failure,
    not_running,
    rpc_code,
    rpc_failure,
    text_of,
)
from rock.dialects.e2b.filesystem import SERVICE as FILESYSTEM
from rock.dialects.e2b.filesystem import FilesystemService, listed
from rock.dialects.e2b.interpreter import PORT as INTERPRETER_PORT
from rock.dialects.e2b.interpreter import Interpreter
from rock.dialects.e2b.native import Sandbox
from rock.dialects.e2b.ports import forward, target_of
from rock.dialects.e2b.process import SERVICE as PROCESS
from rock.dialects.e2b.process import ProcessService
from rock.dialects.e2b.programs import Programs
from rock.dialects.e2b.state import PRIVATE, RESUMES, TEMPLATE, Options
from rock.dialects.e2b.terminals import Terminals
from rock.dialects.e2b.tokens import Tokens
from rock.dialects.e2b.watching import Watching
from rock.errors import Forbidden, InvalidConfig, RockError, Unauthorized, no_such_route, unexpected
from rock.http.asgi import Answer, App, Disconnected, Receive, Request, Router, Scope, Send, answer
from rock.protocol.keys import GRANTED, Access, Caller, caller_of
from rock.protocol.route import Route
from rock.protocol.sandbox import ID_PATTERN, State
from rock.store.base import Record
from rock.telemetry.context import CURRENT

log = logging.getLogger("rock.e2b")
PREFIX = "/e2b"
DAEMON_PORT = 49983
_REMEMBERED = 20_000
_TEMPLATES = PREFIX + "/templates/"
_ID = re.compile(ID_PATTERN)
_SANDBOX, _PORT = b"e2b-sandbox-id", b"e2b-sandbox-port"
_TOKEN, _TRAFFIC = b"x-access-token", b"e2b-traffic-access-token"
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
Load = Callable[[str], Awaitable[Record | None]]


class E2B:
    """The dialect of one server. data: the data plane. load: the record of a sandbox by its id, of any tenant. secret:
    the key of the access tokens, which all servers of one installation share.

    on_pausing, on_continued: hooks of the service (admin/sandboxes/service.py).
    """

    def __init__(
        self, tenants: TenantServices, keys: Keys, data: App, load: Load, secret: bytes, options: Options
    ) -> None:
        self._data = data
        self._load = load
        self._options = options
        self._tokens = Tokens(secret, keys)
        self._tenants = tenants
        self._known: OrderedDict[str, tuple[str, bool]] = OrderedDict()  # (tenant, autoResume) by sandbox id
        self._accounts = Accounts()
        self._programs = Programs()
        self.on_pausing, self.on_continued = self._programs.withdraw, self._programs.repeat
        self._terminals = Terminals(data)
        self._interpreter = Interpreter(self._programs)
        self._builds = Builds(options.folder, data, self._tokens, options)
        self._control = Control(tenants, self._tokens, self._programs, self._builds, options)
        self._process = ProcessService(self._programs, self._terminals)
        self._filesystem = FilesystemService(Watching(self._programs, listed))
        self._rows = Router("e2b")
        for method, path, handler, access in self._control.rows():
            self._rows.add(Route(f"e2b:{path}", method, path, "control", "E2B dialect", access=access), handler)

    async def close(self) -> None:
        """End what belongs to this server. Programs in sandboxes continue; terminals end."""
        await self._programs.close()
        await self._terminals.close()
        await self._builds.close()

    # ---- before authentication ----

    def before_authentication(self, rest: App) -> App:
        """Identify the callers that have a credential of this dialect, and pass every request to `rest`, except
        requests to ports by host name, which need no key."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await rest(scope, receive, send)
                return
            path: str = scope["path"]
            if path.startswith(PREFIX + "/") or path == "/files":
                scope = await self._identified(scope)
                if scope["path"] == "/files" and scope["type"] == "http":
                    wrong = Unauthorized("the signature of this URL is wrong or expired, or the server has restarted",
                                         hint="create another URL")  # fmt: skip
                    await failure(wrong).send(send)
                    return
            elif self._options.domain and (target := target_of(scope, self._options.domain)) is not None:
                await self._by_host(target, scope, receive, send)
                return
            await rest(scope, receive, send)

        return app

    async def _identified(self, scope: Scope) -> Scope:
        """The scope with the caller of an access token or of a signed URL, if there is one."""
        headers = dict(scope["headers"])
        sandbox_id = headers.get(_SANDBOX, b"").decode("latin-1")
        token = headers.get(_TOKEN, b"").decode("latin-1")
        raw: bytes = scope.get("query_string", b"")
        if token and sandbox_id:
            caller = await self._tokens.caller(sandbox_id, token)
            return scope if caller is None else {**scope, GRANTED: caller}
        traffic = headers.get(_TRAFFIC, b"").decode("latin-1")
        if traffic and sandbox_id and headers.get(_PORT, b"") not in (b"", b"%d" % DAEMON_PORT):
            caller = await self._tokens.sender(sandbox_id, traffic)
            return scope if caller is None else {**scope, GRANTED: caller}
        is_upload = scope["path"].startswith(_TEMPLATES) and scope.get("method") == "PUT"
        if is_upload and not sandbox_id and b"token=" in raw:
            token = dict(parse_qsl(raw.decode("latin-1"))).get("token", "")
            caller = await self._tokens.uploader(scope["path"].rpartition("/")[2], token)
            return scope if caller is None else {**scope, GRANTED: caller}
        if not scope["path"].endswith("/files") or b"signature=" not in raw or scope["type"] != "http":
            return scope
        query = dict(parse_qsl(raw.decode("latin-1"), keep_blank_values=True))
        operation = "read" if scope["method"] in ("GET", "HEAD") else "write"
        signed = await self._tokens.signer(query, operation, sandbox_id)
        if signed is None:
            return scope
        # the signature covers the user, so none may be named by another header
        named = [header for header in scope["headers"] if header[0] not in (_SANDBOX, _PORT, b"authorization")]
        named += [(_SANDBOX, signed[0].encode()), (_PORT, b"%d" % DAEMON_PORT)]
        path = PREFIX + "/files"
        return {**scope, "path": path, "raw_path": path.encode(), "headers": named, GRANTED: signed[1]}

    async def _by_host(self, target: tuple[int, str], scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to a port: everybody may send it, unless the sandbox allows no public traffic. Sandboxes
        that were not created over this dialect have no public ports."""
        port, sandbox_id = target
        record = await self._load(sandbox_id)
        if record is None or record.state is not State.RUNNING or TEMPLATE not in record.info.labels:
            await _respond(scope, receive, send, not_running(NotRunning(sandbox_id)))
            return
        token = dict(scope["headers"]).get(_TRAFFIC, b"").decode("latin-1")
        if record.info.labels.get(PRIVATE) and await self._tokens.sender(sandbox_id, token) is None:
            refused = Forbidden("this sandbox allows no public traffic", hint="send its traffic access token as header "
                                "E2B-Traffic-Access-Token")  # fmt: skip
            await _respond(scope, receive, send, failure(refused))
            return
        caller = Caller(record.tenant, frozenset({Access.READ, Access.RUN}))
        await forward(self._data, scope, receive, send, sandbox_id, port, "", caller)

    # ---- behind authentication ----

    def over(self, rest: App) -> App:
        """The requests of this dialect, and `rest` for all others."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan" and scope["path"].startswith(PREFIX + "/"):
                await self(scope, receive, send)
            else:
                await rest(scope, receive, send)

        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def track(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        path = scope["path"][len(PREFIX) :]
        headers = dict(scope["headers"])
        sandbox_id = headers.get(_SANDBOX, b"").decode("latin-1")
        request = Request(scope, receive, {})
        rpc = scope["type"] == "http" and connect.is_rpc(request) and path.startswith((PROCESS, FILESYSTEM))
        try:
            if not sandbox_id:
                if scope["type"] == "websocket":
                    raise no_such_route(scope["path"], "WEBSOCKET")
                await (await self._controlled(path, request)).send(track)
                return
            if not _ID.match(sandbox_id):
                raise NotRunning(sandbox_id[:128])
            if (context := CURRENT.get()) is not None:
                context.route, context.sandbox_id = context.route or "e2b", sandbox_id
            await self._check(scope, sandbox_id)
            port = _port(headers.get(_PORT, b"").decode("latin-1"))
            if port in (DAEMON_PORT, INTERPRETER_PORT) and scope["type"] == "http":
                await self._inside(port, path, request, sandbox_id, track)
            else:
                caller = caller_of(scope)
                caller.require(Access.RUN)
                await forward(self._data, scope, receive, track, sandbox_id, port, PREFIX, caller)
        except Disconnected:
            return
        except NotRunning as error:
            if started:  # the broken connection is the remaining signal
                log.info("sandbox %s ended during %s", sandbox_id, path)
                return
            await _respond(scope, receive, send, not_running(error))
        except RpcError as error:
            if started:
                raise
            await _respond(scope, receive, send, rpc_failure(error.code, str(error)))
        except RockError as error:
            if started:
                raise
            reply = rpc_failure(rpc_code(error), text_of(error)) if rpc else failure(error)
            await _respond(scope, receive, send, reply)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if started:
                raise
            log.exception("%s %s", scope.get("method"), scope["path"])
            await _respond(scope, receive, send, failure(unexpected(error)))

    async def _check(self, scope: Scope, sandbox_id: str) -> None:
        """NotRunning for a sandbox of another tenant: what this server holds of it, such as terminals, is found by the
        id alone. A paused sandbox with autoResume is resumed. Neither the tenant nor autoResume changes."""
        tenant, record = caller_of(scope).tenant, None
        known = self._known.get(sandbox_id)
        if known is None:
            record = await self._load(sandbox_id)
            if record is None:
                raise NotRunning(sandbox_id)
            known = self._known[sandbox_id] = record.tenant, bool(record.info.labels.get(RESUMES))
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        owner, resumes = known
        if tenant is not None and owner != tenant:
            raise NotRunning(sandbox_id)
        if resumes:
            record = record or await self._load(sandbox_id)
            if record is not None and record.state is State.RUNNING and record.info.paused_at is not None:
                caller_of(scope).require(Access.RUN)
                await self._control.wake(self._tenants(scope), record)

    async def _controlled(self, path: str, request: Request) -> Answer:
        """A request to the control plane."""
        method = request.scope["method"]
        found = self._rows.match(method, path)
        if found is None:
            known = any(self._rows.match(other, path) for other in _METHODS)
            if known:
                return answer({"code": 405, "message": f"{method} {PREFIX}{path}: the method is not allowed"}, 405)
            raise no_such_route(PREFIX + path, method)
        handler, values, row = found
        caller_of(request.scope).require(row.access)
        if (context := CURRENT.get()) is not None:
            context.route = context.route or row.name
            context.sandbox_id = context.sandbox_id or values.get("sandbox_id", "")[:128]
        request.path = values
        reply: Answer = await handler(request)  # type: ignore[call-arg, assignment]
        return reply

    async def _inside(self, port: int, path: str, request: Request, sandbox_id: str, send: Send) -> None:
        """A request to the daemon or the interpreter of a sandbox."""
        call = Call(request, Sandbox(self._data, sandbox_id, caller_of(request.scope)), self._accounts)
        async with call.cleanup:
            call.cleanup.push_async_callback(call.sandbox.close)
            call.user = request.query.get("username", "") or user_of(request)
            reply = await (self._interpreter.serve(path, call) if port == INTERPRETER_PORT
                           else self._daemon(path, call))  # fmt: skip
            if reply is None:
                raise no_such_route(PREFIX + path, request.scope["method"])
            await reply.send(send)

    async def _daemon(self, path: str, call: Call) -> Answer | None:
        method = call.request.scope["method"]
        if method == "POST" and path.startswith(PROCESS):
            return await self._process.serve(path.removeprefix(PROCESS), call)
        if method == "POST" and path.startswith(FILESYSTEM):
            return await self._filesystem.serve(path.removeprefix(FILESYSTEM), call)
        if path == "/files" and method in ("GET", "POST"):
            return await (files.read(call) if method == "GET" else files.write(call))
        if method != "GET" or path not in ("/health", "/metrics", "/envs"):
            return None
        record = await self._running(call)
        if path == "/health":
            return Answer(b"", 204)
        if path == "/envs":
            return answer(record.config.env)
        found = await self._control.sample(self._tenants(call.request.scope), record)
        return answer({"ts": found["timestampUnix"], "cpu_count": found["cpuCount"],
                       "cpu_used_pct": found["cpuUsedPct"], "mem_total": found["memTotal"],
                       "mem_used": found["memUsed"], "disk_used": found["diskUsed"],
                       "disk_total": found["diskTotal"]})  # fmt: skip

    async def _running(self, call: Call) -> Record:
        """The record of the sandbox of a call. NotRunning."""
        call.require(Access.READ)
        record = await self._load(call.sandbox.id)
        tenant = call.sandbox.caller.tenant
        if record is None or record.state is not State.RUNNING or record.info.paused_at is not None:
            raise NotRunning(call.sandbox.id)
        if tenant is not None and record.tenant != tenant:
            raise NotRunning(call.sandbox.id)
        return record


def _port(text: str) -> int:
    """The port of a request; without the header it is that of the daemon. InvalidConfig."""
    if not text:
        return DAEMON_PORT
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536):
        raise InvalidConfig(f"E2b-Sandbox-Port: {text[:20]!r} is not a port", hint="send a number from 1 to 65535")
    return int(text)


async def _respond(scope: Scope, receive: Receive, send: Send, reply: Answer) -> None:
    """Send a response, also to the handshake of a WebSocket."""
    if scope["type"] == "http":
        await reply.send(send)
        return
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1011, "reason": f"status {reply.status}"})
        return

    async def translate(message: MutableMapping[str, Any]) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await reply.send(translate)
