"""The error classes of ROCK, in one hierarchy.

  RockError                           code, message, sandbox_id, retryable, hint
  ├── ClientError                     the request is at fault            (BadRequestRockError)
  │   ├── InvalidConfig               a value or a name is wrong
  │   ├── Unsupported                 this host or runtime cannot provide what the request needs
  │   ├── NotFound                    no such sandbox, session, process, image, path
  │   │   └── NotHere                 a worker does not hold the sandbox; never seen by a client of the admin
  │   ├── WrongRole                   a reader received a write request, or a writer a read request
  │   ├── Conflict                    it exists already, or its state does not allow the operation
  │   ├── Unauthorized                the key is missing or wrong
  │   ├── Forbidden                   the key does not permit the operation
  │   ├── PermissionDenied            a file or program of the sandbox does not permit it
  │   └── QuotaExceeded               a limit of the caller is exceeded
  ├── SandboxError                    the sandbox is at fault            (InternalServerRockError)
  │   ├── StartFailed                 it never ran
  │   │   └── ImageError              because of its image
  │   ├── OutOfMemory                 it was ended because it exceeded its memory limit
  │   ├── DiskFull                    it was ended because its files exceeded the disk limit
  │   ├── SandboxStopped (Expired)    it was stopped: by its user, its idle timeout or its maximum lifetime
  │   ├── Exited                      its pid 1 exited; code inside may have caused that
  │   └── Lost                        its machine or its runtime failed
  ├── ActionError                     code in the sandbox is at fault    (CommandRockError)
  │   ├── CommandFailed               exit status not 0, and check="raise"
  │   ├── CommandTimeout              it exceeded its timeout and was killed
  │   ├── EnvironmentRaised           an environment raised an exception; it stays usable
  │   ├── EnvironmentEnded            the process of an environment is gone
  │   ├── SessionClosed               the shell of the session is gone
  │   └── PortFailed                  the listener on a port sent no valid response
  │       └── PortTimeout             or none in time
  ├── EnvHubError                     a request to the registry of environments failed
  └── ServerError                     the server is at fault             (InternalServerRockError)
      ├── NoCapacity                  no capacity now; retry
      ├── StorageFull                 the server's disk is full
      └── Unavailable                 the server cannot be reached or is stopping; retry

Each class has one wire code and one HTTP status; `from_wire` converts a body back to the class that was raised.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar

__all__ = [
    "ActionError",
    "BadRequestRockError",
    "ClientError",
    "CommandFailed",
    "CommandRockError",
    "CommandTimeout",
    "Conflict",
    "DiskFull",
    "EnvHubError",
    "EnvironmentEnded",
    "EnvironmentRaised",
    "Exited",
    "Expired",
    "Forbidden",
    "ImageError",
    "InternalServerRockError",
    "InvalidConfig",
    "Lost",
    "NoCapacity",
    "NotFound",
    "NotHere",
    "OutOfMemory",
    "PermissionDenied",
    "PortFailed",
    "PortTimeout",
    "QuotaExceeded",
    "RockError",
    "RockException",
    "SandboxError",
    "SandboxStopped",
    "ServerError",
    "SessionClosed",
    "StartFailed",
    "StorageFull",
    "Unauthorized",
    "Unavailable",
    "Unsupported",
    "WrongRole",
    "codes",
    "from_wire",
    "no_such_route",
    "no_such_sandbox",
    "raise_for_code",
    "unexpected",
]


class codes(IntEnum):
    """Numeric codes of the ROCK dialect: the first digit is the kind."""

    OK = 2000
    BAD_REQUEST = 4000
    INTERNAL_SERVER_ERROR = 5000
    COMMAND_ERROR = 6000

    @property
    def phrase(self) -> str:
        return "OK" if self is codes.OK else self.name.replace("_", " ").title()

    @classmethod
    def get_reason_phrase(cls, value: int) -> str:
        """The phrase of a code; "" for an unknown code."""
        return next((code.phrase for code in cls if code == value), "")

    @staticmethod
    def is_success(value: int) -> bool:
        return 2000 <= value <= 2999

    @staticmethod
    def is_client_error(value: int) -> bool:
        return 4000 <= value <= 4999

    @staticmethod
    def is_server_error(value: int) -> bool:
        return 5000 <= value <= 5999

    @staticmethod
    def is_command_error(value: int) -> bool:
        return 6000 <= value <= 6999

    @staticmethod
    def is_error(value: int) -> bool:
        return 4000 <= value <= 6999


class RockError(Exception):
    """Base of every error that ROCK raises.

    `message` states what happened, `hint` what to do next, `sandbox_id` the sandbox, `details` holds plain data (for
    example the observation of a failed command). `retryable` states whether the same call may succeed later.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    rock_code: ClassVar[int] = codes.INTERNAL_SERVER_ERROR
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        sandbox_id: str | None = None,
        hint: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.sandbox_id = sandbox_id
        self.hint = hint
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_wire(self) -> dict[str, Any]:
        """The wire form of the error: the body of every response that is not 2xx."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "sandbox_id": self.sandbox_id,
                "retryable": self.retryable,
                "hint": self.hint,
                "details": self.details,
            }
        }


RockException = RockError  # base class name of the original ROCK


class InternalServerRockError(RockError):
    """The original ROCK's name for errors that the caller did not cause."""

    code = "internal"


class ClientError(RockError):
    """The request cannot be served as given."""

    code = "bad_request"
    status = 400
    rock_code = codes.BAD_REQUEST


BadRequestRockError = ClientError


class InvalidConfig(ClientError):
    """A value, a combination or a name in the request is wrong."""

    code = "invalid_config"
    status = 422


class Unsupported(ClientError):
    """This host or runtime cannot provide what the request needs; rejected before anything was started."""

    code = "unsupported"
    status = 422


class NotFound(ClientError):
    """No such sandbox, session, process, image or path."""

    code = "not_found"
    status = 404


class NotHere(NotFound):
    """A worker does not hold the requested sandbox; the forwarding server knows its location or end."""

    code = "not_here"
    status = 421


class WrongRole(ClientError):
    """Another role serves the request: `details["role"]` is write or read."""

    code = "wrong_role"
    status = 421


class Conflict(ClientError):
    """It exists already, or its state does not allow the operation."""

    code = "conflict"
    status = 409


class Unauthorized(ClientError):
    """The key is missing or wrong."""

    code = "unauthorized"
    status = 401


class Forbidden(ClientError):
    """The key is valid, but does not permit the operation."""

    code = "forbidden"
    status = 403


class PermissionDenied(ClientError):
    """The permissions of a file in the sandbox, or a read-only file system, do not permit the operation."""

    code = "permission_denied"
    status = 403


class QuotaExceeded(ClientError):
    """A limit of this caller is exceeded; retry after `details["retry_after"]` seconds."""

    code = "quota_exceeded"
    status = 429
    retryable = True


class SandboxError(InternalServerRockError):
    """The sandbox failed or ended."""

    code = "sandbox_error"
    status = 410


class StartFailed(SandboxError):
    """The sandbox never ran; the message has the cause."""

    code = "start_failed"
    status = 500


class ImageError(StartFailed):
    """The image is missing or unusable."""

    code = "image_error"
    status = 422


class OutOfMemory(SandboxError):
    """The sandbox was ended because it exceeded its memory limit."""

    code = "out_of_memory"


class DiskFull(SandboxError):
    """The sandbox was ended because its files exceeded the disk limit."""

    code = "disk_full"


class SandboxStopped(SandboxError):
    """The sandbox was stopped: by its user, its idle timeout or its maximum lifetime."""

    code = "expired"


Expired = SandboxStopped  # the name that belongs to the wire code


class Exited(SandboxError):
    """The sandbox's pid 1 exited while its server was running. Code inside may have caused that, so a trainer that
    replays lost work must not replay this."""

    code = "exited"


class Lost(SandboxError):
    """The sandbox's machine failed, or its pid 1 ended while no server was running."""

    code = "lost"


class EnvHubError(RockError):
    """A call to the registry of environments failed; `__cause__` is the original error."""

    code = "envhub_error"


class CommandRockError(RockError):
    """The original ROCK's name for errors of a command."""

    code = "command_error"
    status = 400
    rock_code = codes.COMMAND_ERROR


class ActionError(CommandRockError):
    """Code in the sandbox is at fault."""

    code = "action_error"


class CommandFailed(ActionError):
    """The exit status was not 0 with check="raise"; `observation` holds the output."""

    code = "command_failed"
    observation: Any = None


class CommandTimeout(ActionError, TimeoutError):
    """The command exceeded its timeout and was killed; the session stays usable. It is a TimeoutError too."""

    code = "command_timeout"
    status = 408
    observation: Any = None


class EnvironmentRaised(ActionError):
    """The environment raised an exception; it stays usable. `type`: the exception's class name; `traceback`: as
    text."""

    code = "environment_raised"

    @property
    def type(self) -> str:
        return str(self.details.get("type", ""))

    @property
    def traceback(self) -> str:
        return str(self.details.get("traceback", ""))


class EnvironmentEnded(ActionError):
    """The environment's process is gone; `details` has its last lines ("stderr") and its exit ("exit")."""

    code = "environment_ended"
    status = 410


class SessionClosed(ActionError):
    """The session's shell ended; create a new session."""

    code = "session_closed"
    status = 409


class PortFailed(ActionError):
    """A program inside accepted a connection to its port, and closed it or sent an invalid HTTP response."""

    code = "port_failed"
    status = 502


class PortTimeout(PortFailed):
    """A program inside accepted a connection to its port, and did not respond in time."""

    code = "port_timeout"
    status = 504


class ServerError(InternalServerRockError):
    """The server is at fault."""

    code = "server_error"


class NoCapacity(ServerError):
    """No capacity is free now."""

    code = "no_capacity"
    status = 503
    retryable = True


class StorageFull(ServerError):
    """The server's disk is full; nothing was changed."""

    code = "storage_full"
    status = 507
    retryable = True


class Unavailable(ServerError):
    """The server cannot be reached, or is stopping."""

    code = "unavailable"
    status = 503
    retryable = True


def _tree(base: type[RockError]) -> dict[str, type[RockError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(RockError)


def from_wire(body: Any, http_status: int = 500) -> RockError:
    """The error of a `to_wire` body; any other body becomes a ServerError with its text."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        told = body.get("detail") if isinstance(body, dict) else body
        text = told if isinstance(told, str) else repr(body)
        kind: type[RockError] = ServerError if http_status >= 500 else ClientError
        if http_status in (502, 503, 504):
            kind = Unavailable
        return kind(f"HTTP {http_status}: {text[:500]}", details={"http_status": http_status})
    known, details = _BY_CODE.get(str(error.get("code")), ServerError), error.get("details")
    return known(
        str(error.get("message", "")),
        sandbox_id=error.get("sandbox_id"),
        hint=error.get("hint"),
        details=details if isinstance(details, dict) else {},
    )


def raise_for_code(code: int | None, message: str = "") -> None:
    """Raise the error of a numeric code of the ROCK dialect; None and 2000 to 2999 raise nothing."""
    if code is None or codes.is_success(code):
        return
    if codes.is_client_error(code):
        raise BadRequestRockError(message)
    if codes.is_server_error(code):
        raise InternalServerRockError(message)
    if codes.is_command_error(code):
        raise CommandRockError(message)
    raise RockException(message)


# ---- errors that several parts raise


def unexpected(error: BaseException, sandbox_id: str | None = None) -> InternalServerRockError:
    """An exception that the server did not expect; its log has the traceback."""
    return InternalServerRockError(f"unexpected error in the server: {type(error).__name__}: {error}",
                                   sandbox_id=sandbox_id)


def no_such_sandbox(sandbox_id: str) -> NotFound:
    """The message is ROCK's: its clients match it."""
    return NotFound(f"Sandbox {sandbox_id} not found", sandbox_id=sandbox_id,
                    hint="check the id; `rock ps -a` lists the sandboxes that your key can access")


def no_such_route(path: str, method: str | None = None) -> NotFound:
    return NotFound(f"no such route: {method + ' ' if method else ''}{path}",
                    hint="check the path and the method; /docs of the admin server lists the routes")
