"""The envelope of the ROCK dialect, `{"status", "message", "error", "result"}` under HTTP 200, and its data plane
requests."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import orjson
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from rock.errors import (
    InvalidConfig,
    NotFound,
    QuotaExceeded,
    RockError,
    from_wire,
    unexpected,
)
from rock.http.asgi import Answer, App, Disconnected, Handler, Request, answer, call, retry_after
from rock.protocol.keys import Access, caller_of
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import ID_PATTERN

log = logging.getLogger("rock.admin")

_UNKNOWN = "rock.unknown"  # in a scope: ignored fields of the body
_MOST_NAMED, _MOST_WARNED = 16, 1000
_warned: set[tuple[str, str]] = set()  # (request, field) pairs that were logged already

Row = tuple[str, str, Handler, Access]
"""A route of the dialect: method, path, handler, and what it takes of a key."""

Body = TypeVar("Body", bound="Asked")
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""Text that is stripped, and then must not be empty: ids and images."""


class Asked(BaseModel):
    """Base of request bodies. Clients of all versions send fields that others do not know; unknown fields are
    ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class AboutSandbox(Asked):
    """A body that contains only the sandbox id."""

    sandbox_id: Name


class Malformed(Exception):
    """An invalid request; the text names each wrong field."""


class Failed(Exception):
    """A "Failed" response with a text that clients of ROCK search for. `told`: it includes the route's own message."""

    def __init__(self, error: str, *, told: bool = True) -> None:
        super().__init__(error)
        self.told = told


def _dump(value: dict[str, Any]) -> Answer:
    return Answer(orjson.dumps(value, default=repr))


def success(result: Any) -> Answer:
    return _dump({"status": "Success", "message": None, "error": None, "result": result})


def failed(message: str | None, error: str, result: Any = None) -> Answer:
    return _dump({"status": "Failed", "message": message, "error": error, "result": result})


def malformed(error: str) -> Answer:
    return failed("invalid parameter", error)


def text_of(error: RockError) -> str:
    """The text of an error in a response. That of a missing sandbox is ROCK's, without a hint: clients match it."""
    missing = isinstance(error, NotFound) and error.message == f"Sandbox {error.sandbox_id} not found"
    return error.message if missing else str(error)


def enveloped(
    handler: Callable[[Request], Awaitable[Any]], message: str, fields: dict[str, Any] | None = None
) -> Handler:
    """A handler that always responds in the envelope.

    message: the message of "Failed" for this route. fields: failures of the route have a code, among the fields of its
    result; None: their result is null, as in ROCK for all operations inside a sandbox.
    """

    async def reply(request: Request) -> Answer:
        try:
            done = success(await handler(request))
            if unknown := request.scope.get(_UNKNOWN):
                done.headers.append((b"x-rock-warning", f"unknown fields are ignored: {', '.join(unknown)}".encode()))
            return done
        except Disconnected:
            raise
        except Malformed as error:
            return malformed(str(error))
        except Failed as error:
            return failed(message if error.told else None, str(error))
        except RockError as error:
            told = error
        except Exception as error:
            log.error("%s: %s", message, traceback.format_exc())
            told = unexpected(error)
        text = text_of(told)
        coded = {"code": told.rock_code, "exit_code": None, "failure_reason": text}
        reply = failed(message, text, None if fields is None else {**fields, **coded})
        if isinstance(told, QuotaExceeded):
            reply.headers.append((b"retry-after", b"%d" % retry_after(told)))
        return reply

    return reply


def detailed(handler: Callable[[Request], Awaitable[Any]], refusal: int | None = None) -> Handler:
    """A handler without an envelope: an error is an HTTP status with `{"detail"}`, which clients show.

    refusal: the status for an invalid request; None: the envelope's response, as in ROCK.
    """

    async def reply(request: Request) -> Answer:
        try:
            return answer(await handler(request))
        except Malformed as error:
            return malformed(str(error)) if refusal is None else answer({"detail": str(error)}, refusal)
        except Failed as error:
            return answer({"detail": str(error)}, NotFound.status)
        except RockError as error:
            return answer({"detail": text_of(error)}, error.status)

    return reply


CODED: dict[str, Any] = {"code": None, "exit_code": None, "failure_reason": None}
"""Fields of a result that is nothing more."""


async def body_of(request: Request, kind: type[Body]) -> Body:
    """The request's JSON body; Malformed names the problem."""
    data = await request.body()
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"body.{error.pos}: JSON decode error" if data else "body: Field required") from None
    if "sandbox_id" in request.path and issubclass(kind, AboutSandbox) and isinstance(value, dict):
        value = {**value, "sandbox_id": request.path["sandbox_id"]}  # the path contains the sandbox id for the body
    found = parsed(kind, value)
    if unknown := sorted(set(value) - set(kind.model_fields)):
        _warn(request, kind, unknown)
    return found


def _warn(request: Request, kind: type[BaseModel], names: list[str]) -> None:
    """Unknown fields are ignored, as by ROCK: the response names them in X-ROCK-Warning, and the log contains each of
    them once."""
    names = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in names[:_MOST_NAMED]]
    request.scope[_UNKNOWN] = names
    new = {(kind.__name__, name) for name in names} - _warned
    if new and len(_warned) < _MOST_WARNED:
        _warned.update(new)
        log.warning("ROCK dialect: fields of %s that are not known here are ignored: %s", kind.__name__,
                    ", ".join(sorted(name for _, name in new)))  # fmt: skip


def parsed(kind: type[Body], value: Any, where: str = "body") -> Body:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise Malformed(tell(error, where)) from None


def tell(error: ValidationError, where: str) -> str:
    """Each wrong field with its location, as FastAPI names them."""
    return "; ".join(
        f"{'.'.join([where, *map(str, item['loc'])])}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False, include_input=False)
    )


def query_id(request: Request) -> str:
    value = request.query.get("sandbox_id", "").strip()
    if not value:
        raise Malformed("query.sandbox_id: Field required")
    return value


def query_number(request: Request, name: str, default: int, high: int) -> int:
    try:
        return request.integer(name, default, low=1, high=high)
    except InvalidConfig as error:
        raise Malformed(f"query.{name}: {error.message}") from None


# ---- data plane requests ----
#
# A data request of the dialect is the native request, through the data plane's ASGI application in this process.

_ID = re.compile(ID_PATTERN)


class DataPlane:
    """Requests to sandboxes by the names of the native routes."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def bytes(
        self,
        request: Request,
        route: str,
        sandbox_id: str,
        body: Any = b"",
        query: dict[str, str] | None = None,
        **path: str,
    ) -> bytes:
        """The bytes of the response. body: bytes, a stream of them, or plain data to be sent as JSON.

        Raises the errors of the data plane; a missing sandbox is Failed, with the text of ROCK.
        """
        row = ROUTES[route]
        if not is_id(sandbox_id):
            raise not_started(sandbox_id)
        if not isinstance(body, bytes | AsyncIterator):
            body = orjson.dumps(body)
        status, reply = await call(
            self._app,
            row.method,
            row.path.format(sandbox_id=sandbox_id, **path),
            body=body,
            query=urlencode(query) if query else "",
            caller=caller_of(request.scope),
            client=request.client,
        )
        if status < 400:
            return reply
        raise raised(reply, status, sandbox_id)

    async def json(
        self,
        request: Request,
        route: str,
        sandbox_id: str,
        body: Any = b"",
        query: dict[str, str] | None = None,
        **path: str,
    ) -> Any:
        """The response as plain data."""
        return orjson.loads(await self.bytes(request, route, sandbox_id, body, query, **path))


def not_started(sandbox_id: str, why: RockError | None = None) -> Failed:
    return Failed(f"sandbox {sandbox_id} not started" + (f": {why}" if why else ""))


def is_id(text: str) -> bool:
    """Whether the text is a valid sandbox id."""
    return _ID.match(text) is not None


def raised(reply: bytes, status: int, sandbox_id: str) -> RockError | Failed:
    """The error of a data plane response; Failed for a missing sandbox."""
    try:
        error = from_wire(orjson.loads(reply), status)
    except orjson.JSONDecodeError:
        return from_wire(reply.decode(errors="replace"), status)
    if isinstance(error, NotFound) and error.message == f"Sandbox {sandbox_id} not found":
        return not_started(sandbox_id)
    if "cause" in error.details or error.message.startswith(f"sandbox {sandbox_id} has not started"):
        return not_started(sandbox_id, error)
    return error
