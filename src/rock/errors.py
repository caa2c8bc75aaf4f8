"""What can go wrong, drawn once.

RockError                           code, message, sandbox_id, retryable, hint
├── ClientError                     the request is at fault            (BadRequestRockError)
│   ├── InvalidConfig               a value or a name is wrong
│   ├── Unsupported                 this host or runtime cannot give what was asked
│   ├── NotFound                    no such sandbox, session, process, image, path
│   │   └── NotHere                 a worker does not hold it; never seen by a client of the admin
│   ├── WrongRole                   a reader was asked to change something, or a writer for what readers serve
│   ├── Conflict                    it exists already, or its state forbids this
│   ├── Unauthorized                no key, or the wrong one
│   ├── Forbidden                   a key that is not for this
│   └── QuotaExceeded               over a limit set for you
├── SandboxError                    the sandbox is at fault            (InternalServerRockError)
│   ├── StartFailed                 it never ran
│   │   └── ImageError              because of its image
│   ├── OutOfMemory                 the kernel ended it for its memory
│   ├── DiskFull                    it was ended for what its files took
│   ├── Expired                     it was ended by its idle time or deadline, or by its user
│   ├── Exited                      it ended by itself: what ran in it may have ended it
│   └── Lost                        its machine went away, or what runs sandboxes on it
├── ActionError                     what was run in it is at fault     (CommandRockError)
│   ├── CommandFailed               exit status not 0, and check="raise"
│   ├── CommandTimeout              it ran out of time and was killed
│   ├── EnvironmentRaised           an environment raised an exception; it stays usable
│   ├── EnvironmentEnded            the process of an environment is gone
│   ├── SessionClosed               the shell of the session is gone
│   └── PortFailed                  what listens on a port does not answer as it should
│       └── PortTimeout             or not in time
├── EnvHubError                     the registry of environments did not do what it was asked
└── ServerError                     we are at fault                    (InternalServerRockError)
    ├── NoCapacity                  nothing free now; retry
    ├── StorageFull                 the server's disk is full
    └── Unavailable                 the server cannot be reached or is stopping; retry

Each class has one wire code and one HTTP status; `from_wire` turns a body back into the class that was raised.
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
    "PortFailed",
    "PortTimeout",
    "QuotaExceeded",
    "RockError",
    "RockException",
    "SandboxError",
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
    "raise_for_code",
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
        """The phrase of a code; "" when it is none of these."""
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

    `message` says what happened, `hint` what to do next, `sandbox_id` to which sandbox, `details` holds plain data
    (for example the observation of a failed command). `retryable` tells whether the same call may succeed later.
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
        """The error as it travels: the body of every answer that is not 2xx."""
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


RockException = RockError  # ROCK's name for its base class


class InternalServerRockError(RockError):
    """ROCK's name for everything that is not the caller's fault."""

    code = "internal"


class ClientError(RockError):
    """The request cannot be served as it is."""

    code = "bad_request"
    status = 400
    rock_code = codes.BAD_REQUEST


BadRequestRockError = ClientError


class InvalidConfig(ClientError):
    """A value, a combination or a name in the request is wrong."""

    code = "invalid_config"
    status = 422


class Unsupported(ClientError):
    """This host or runtime cannot give what was asked; refused before anything was started."""

    code = "unsupported"
    status = 422


class NotFound(ClientError):
    """No such sandbox, session, process, image or path."""

    code = "not_found"
    status = 404


class NotHere(NotFound):
    """A worker was asked for a sandbox that it does not hold; whoever forwarded the request knows what became of it."""

    code = "not_here"
    status = 421


class WrongRole(ClientError):
    """This server is not the one for that; `details["role"]` is: write or read."""

    code = "wrong_role"
    status = 421


class Conflict(ClientError):
    """It exists already, or its state forbids this."""

    code = "conflict"
    status = 409


class Unauthorized(ClientError):
    """The key is missing or wrong."""

    code = "unauthorized"
    status = 401


class Forbidden(ClientError):
    """The key is right, and not for this."""

    code = "forbidden"
    status = 403


class QuotaExceeded(ClientError):
    """A limit that was set for this caller; `details["retry_after"]` seconds later it may be otherwise."""

    code = "quota_exceeded"
    status = 429
    retryable = True


class SandboxError(InternalServerRockError):
    """The sandbox did not live as asked."""

    code = "sandbox_error"
    status = 410


class StartFailed(SandboxError):
    """The sandbox never ran; the message has the real reason."""

    code = "start_failed"
    status = 500


class ImageError(StartFailed):
    """The image is missing or unusable."""

    code = "image_error"
    status = 422


class OutOfMemory(SandboxError):
    """The sandbox was ended for its memory use."""

    code = "out_of_memory"


class DiskFull(SandboxError):
    """The sandbox was ended because its files took more of the disk than it may have."""

    code = "disk_full"


class Expired(SandboxError):
    """The sandbox was stopped: by its user, its idle time or its deadline."""

    code = "expired"


class Exited(SandboxError):
    """The sandbox's pid 1 ended while its server was running. Code inside may have caused that, so a trainer that
    replays what was lost must not replay this."""

    code = "exited"


class Lost(SandboxError):
    """The sandbox's machine went away, or its pid 1 while no server was running."""

    code = "lost"


class EnvHubError(RockError):
    """A call to the registry of environments failed; `__cause__` is what went wrong."""

    code = "envhub_error"


class CommandRockError(RockError):
    """ROCK's name for errors of a command."""

    code = "command_error"
    status = 400
    rock_code = codes.COMMAND_ERROR


class ActionError(CommandRockError):
    """What was run in the sandbox is at fault."""

    code = "action_error"


class CommandFailed(ActionError):
    """The exit status was not 0 and check="raise" was asked for; `observation` holds what was seen."""

    code = "command_failed"
    observation: Any = None


class CommandTimeout(ActionError, TimeoutError):
    """The command ran out of time; it was killed, and the session is usable. It is a TimeoutError too."""

    code = "command_timeout"
    status = 408
    observation: Any = None


class EnvironmentRaised(ActionError):
    """The environment raised an exception; it stays usable. `type`: the exception's own name; `traceback`: as text."""

    code = "environment_raised"

    @property
    def type(self) -> str:
        return str(self.details.get("type", ""))

    @property
    def traceback(self) -> str:
        return str(self.details.get("traceback", ""))


class EnvironmentEnded(ActionError):
    """The environment's process is gone; `details` has its last lines ("stderr") and how it ended ("exit")."""

    code = "environment_ended"
    status = 410


class SessionClosed(ActionError):
    """The session's shell ended; create a new session."""

    code = "session_closed"
    status = 409


class PortFailed(ActionError):
    """A program inside took a connection to its port, and broke it off or answered with what is no HTTP."""

    code = "port_failed"
    status = 502


class PortTimeout(PortFailed):
    """A program inside took a connection to its port, and did not answer in time."""

    code = "port_timeout"
    status = 504


class ServerError(InternalServerRockError):
    """The server is at fault."""

    code = "server_error"


class NoCapacity(ServerError):
    """Nothing is free for this now."""

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
    """The error that a body of `to_wire` stands for; any other body becomes a ServerError with its text."""
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
    """Raise the error of a numeric code of the ROCK dialect; None and 2000 to 2999 are no error."""
    if code is None or codes.is_success(code):
        return
    if codes.is_client_error(code):
        raise BadRequestRockError(message)
    if codes.is_server_error(code):
        raise InternalServerRockError(message)
    if codes.is_command_error(code):
        raise CommandRockError(message)
    raise RockException(message)
