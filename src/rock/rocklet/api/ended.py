"""Errors of requests whose sandbox ends while they are served: each request gets the error that describes the end.

Without this module, a request would see a symptom of the end that depends on its kind: a broken link, a missing shell,
an observation without an exit status. None of these symptoms may look like an error that is worth a retry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from rock.errors import ClientError, Expired, NotHere, RockError, SessionClosed, Unavailable
from rock.http.asgi import Answer, Handler, Request, Router, SocketHandler
from rock.protocol.route import SANDBOX, Route
from rock.rocklet.node import Node
from rock.rocklet.sandbox import Supervisor

T = TypeVar("T")

_SOON = 2.0  # seconds to notice the end of pid 1 after its link has broken
PERHAPS = 0.5  # seconds to notice the end when only a shell or a program may have ended
_NO_STATUS = b'"exit_code":null'
_TIMED_OUT = b'"timed_out":true'


class SandboxRouter(Router):
    """A router whose sandbox routes respond with the end of the sandbox when it ended during the request."""

    def __init__(self, name: str, node: Node) -> None:
        super().__init__(name)
        self._node = node

    def add(self, route: Route, handler: Handler | SocketHandler) -> None:
        if route.plane == "data" and route.path.startswith(SANDBOX) and route.method not in ("WEBSOCKET", "ANY"):
            handler = self._told(handler)  # type: ignore[arg-type]
        super().add(route, handler)

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
        return _NO_STATUS in answer.body and _TIMED_OUT not in answer.body
    return getattr(answer, "exit_code", 0) is None and not getattr(answer, "timed_out", False)
