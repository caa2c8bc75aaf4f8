"""Errors in the formats of E2B: of the control plane, of Connect RPC, and of a sandbox that does not run."""

from __future__ import annotations

import orjson

from rock.errors import (
    ClientError,
    CommandTimeout,
    Conflict,
    Forbidden,
    InvalidConfig,
    NoCapacity,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    RockError,
    SandboxError,
    StorageFull,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from rock.http.asgi import Answer, retry_after

NOT_RUNNING = 502
GONE = "The sandbox was not found"  # SDKs compare this text
_STATUS: tuple[tuple[type[RockError], int], ...] = (
    (InvalidConfig, 400), (Unsupported, 400), (Unauthorized, 401), (Forbidden, 403), (PermissionDenied, 403),
    (NotFound, 404), (Conflict, 409), (QuotaExceeded, 429), (StorageFull, 507), (NoCapacity, 503), (Unavailable, 503),
    (CommandTimeout, 504), (SandboxError, 404), (ClientError, 400),
)  # fmt: skip
_CODES: tuple[tuple[type[RockError], str], ...] = (
    (Unsupported, "unimplemented"), (InvalidConfig, "invalid_argument"), (Unauthorized, "unauthenticated"),
    (Forbidden, "permission_denied"), (PermissionDenied, "permission_denied"), (NotFound, "not_found"),
    (Conflict, "failed_precondition"), (QuotaExceeded, "resource_exhausted"), (StorageFull, "resource_exhausted"),
    (NoCapacity, "unavailable"), (Unavailable, "unavailable"), (CommandTimeout, "deadline_exceeded"),
    (ClientError, "invalid_argument"),
)  # fmt: skip
_HTTP = {
    "canceled": 499, "unknown": 500, "invalid_argument": 400, "deadline_exceeded": 504, "not_found": 404,
    "already_exists": 409, "permission_denied": 403, "resource_exhausted": 429, "failed_precondition": 400,
    "aborted": 409, "out_of_range": 400, "unimplemented": 501, "internal": 500, "unavailable": 503,
    "data_loss": 500, "unauthenticated": 401,
}  # fmt: skip


class NotRunning(Exception):
    """A request for a sandbox that does not exist, is paused or has ended."""

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(sandbox_id)
        self.sandbox_id = sandbox_id


class PortClosed(Exception):
    """A request for a port of a running sandbox on which nothing listens."""

    def __init__(self, sandbox_id: str, port: int) -> None:
        super().__init__(f"{sandbox_id}:{port}")
        self.sandbox_id, self.port = sandbox_id, port


class RpcError(Exception):
    """An error of Connect RPC that no RockError corresponds to. code: of Connect, as in "already_exists"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def text_of(error: RockError) -> str:
    """The message with its hint."""
    return str(error)


def status_of(error: RockError) -> int:
    """The HTTP status by which E2B's SDKs distinguish errors."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def failure(error: RockError, message: str = "") -> Answer:
    """An error of the control plane, and of HTTP routes of a sandbox."""
    status = status_of(error)
    body = {"code": status, "message": message or text_of(error), "error_code": error.code}
    headers = [(b"should-retry", b"true" if error.retryable else b"false")] if status in (429, 502, 503, 504) else []
    if error.retryable:
        headers.append((b"retry-after", b"%d" % retry_after(error)))
    return Answer(orjson.dumps(body), status, headers=headers)


def not_running(error: NotRunning) -> Answer:
    """The response from which SDKs conclude that a sandbox has ended."""
    body = {"sandboxId": error.sandbox_id, "message": GONE, "code": NOT_RUNNING}
    return Answer(orjson.dumps(body), NOT_RUNNING, headers=[(b"should-retry", b"false")])


def port_closed(error: PortClosed) -> Answer:
    body = {"sandboxId": error.sandbox_id, "message": "The sandbox is running but port is not open",
            "port": error.port, "code": NOT_RUNNING}  # fmt: skip
    return Answer(orjson.dumps(body), NOT_RUNNING, headers=[(b"should-retry", b"false")])


def rpc_code(error: RockError) -> str:
    return next((code for kind, code in _CODES if isinstance(error, kind)), "internal")


def rpc_body(code: str, message: str) -> dict[str, str]:
    return {"code": code, "message": message}


def rpc_failure(code: str, message: str) -> Answer:
    """The response to a failed unary call."""
    return Answer(orjson.dumps(rpc_body(code, message)), _HTTP.get(code, 500))
