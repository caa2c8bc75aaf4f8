"""Requests of SWE-ReX, and its errors: HTTP 511 with the class that the client raises."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rock.errors import (
    CommandTimeout,
    Conflict,
    InvalidConfig,
    NotFound,
    PermissionDenied,
    RockError,
    SandboxError,
    SessionClosed,
)
from rock.http.asgi import Answer, answer, parsed
from rock.protocol.action import SESSION_PATTERN

FAILED, WRONG = 511, 422
_OWN, _BUILTINS = "swerex.exceptions.", "builtins."
_LONGEST_NAME = 100
_PREFIX = "swerex:"  # of the sessions of this dialect: the default session of a sandbox is another one
_SESSION = re.compile(SESSION_PATTERN)


class Asked(BaseModel):
    """Base of requests. Clients of other versions send fields that are not known here; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, defer_build=True)


class CreateSession(Asked):
    session: str = "default"
    session_type: Literal["bash"] = "bash"
    startup_source: list[str] = Field(default_factory=list, max_length=64)
    startup_timeout: float = Field(default=1.0, gt=0, le=3600)


class CloseSession(Asked):
    session: str = "default"
    session_type: Literal["bash"] = "bash"


class Run(Asked):
    command: str
    session: str = "default"
    timeout: float | None = Field(default=None, gt=0)
    is_interactive_command: bool = False
    is_interactive_quit: bool = False
    check: Literal["silent", "raise", "ignore"] = "raise"
    error_msg: str = ""
    expect: list[str] = Field(default_factory=list, max_length=64)
    action_type: Literal["bash"] = "bash"


class Interrupt(Asked):
    session: str = "default"
    timeout: float = Field(default=0.2, gt=0, le=60)
    n_retry: int = Field(default=3, ge=1, le=20)
    expect: list[str] = Field(default_factory=list, max_length=64)
    action_type: Literal["bash_interrupt"] = "bash_interrupt"


class Execute(Asked):
    command: str | list[str]
    timeout: float | None = Field(default=None, gt=0)
    shell: bool = False
    check: bool = False
    error_msg: str = ""
    env: dict[str, str] | None = None
    cwd: str | None = None
    merge_output_streams: bool = False


class ReadFile(Asked):
    path: str
    encoding: str | None = None
    errors: str | None = None


class WriteFile(Asked):
    content: str
    path: str


def request_of(data: bytes, *kinds: type[Asked]) -> Any:
    """The message of a body: of several kinds, the one with its action_type. InvalidConfig, ValidationError."""
    value = parsed(data)
    kind = kinds[0]
    if isinstance(value, dict):
        for other in kinds[1:]:
            if value.get("action_type") == other.model_fields["action_type"].default:
                kind = other
    return kind.model_validate(value)


def session_name(name: str) -> str:
    """The native name of a session."""
    if len(name) <= _LONGEST_NAME and _SESSION.match(name):
        return _PREFIX + name
    return _PREFIX + "sha-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def is_own(name: str) -> bool:
    """Whether a native session was created by this dialect."""
    return name.startswith(_PREFIX)


# ---- errors ----


class Refused(Exception):
    """An error of the client's own classes. name: without the module, for those of swerex.exceptions."""

    def __init__(self, name: str, message: str, extra: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.class_path = name if "." in name else _OWN + name
        self.extra = extra or {}


def failed(error: Refused) -> Answer:
    text = {"message": str(error), "class_path": error.class_path, "traceback": "", "extra_info": error.extra}
    return answer({"swerexception": text}, FAILED)


def malformed(error: ValidationError | InvalidConfig) -> Answer:
    """An invalid request, as FastAPI reports it."""
    if isinstance(error, InvalidConfig):
        return answer({"detail": [{"type": "json_invalid", "loc": ["body"], "msg": error.message}]}, WRONG)
    wrong = error.errors(include_url=False, include_input=False, include_context=False)
    return answer({"detail": [{**item, "loc": ["body", *item["loc"]]} for item in wrong]}, WRONG)


def refused(error: RockError) -> Refused:
    """The client's error for one of ours."""
    text = str(error)
    if isinstance(error, SandboxError) or (isinstance(error, NotFound) and error.message.startswith("Sandbox ")):
        return Refused("DeploymentNotStartedError", text)
    if isinstance(error, NotFound):
        session = error.message.startswith("session ")
        return Refused("SessionDoesNotExistError" if session else _BUILTINS + "FileNotFoundError", text)
    if isinstance(error, CommandTimeout):
        return Refused("CommandTimeoutError", text)
    if isinstance(error, SessionClosed):
        return Refused("SessionNotInitializedError", text)
    if isinstance(error, PermissionDenied):
        return Refused(_BUILTINS + "PermissionError", text)
    if isinstance(error, Conflict) and error.message.startswith("session "):
        return Refused("SessionExistsError", text)
    return Refused(_BUILTINS + "ValueError" if isinstance(error, InvalidConfig) else "SwerexException", text)
