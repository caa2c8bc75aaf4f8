"""Messages, errors and descriptions of OpenEnv."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rock.errors import InvalidConfig, NoCapacity, QuotaExceeded, RockError
from rock.http.asgi import tell_validation

LONGEST = 16 << 20  # bytes of a message
VERSION = "1.0.0"  # of the HTTP interface

INVALID_JSON, UNKNOWN_TYPE, VALIDATION_ERROR = "INVALID_JSON", "UNKNOWN_TYPE", "VALIDATION_ERROR"
EXECUTION_ERROR, CAPACITY_REACHED = "EXECUTION_ERROR", "CAPACITY_REACHED"
FACTORY_ERROR, SESSION_ERROR = "FACTORY_ERROR", "SESSION_ERROR"


class Failure(Exception):
    """The error of a message, with one of the codes above. status: over HTTP."""

    def __init__(self, code: str, message: str, details: dict[str, Any] | None = None, status: int = 422) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details or {}
        self.status = status

    def to_wire(self) -> dict[str, Any]:
        return {"type": "error", "data": {"message": self.message, "code": self.code, **self.details}}


def failure_of(error: RockError, making: bool = False) -> Failure:
    """The failure for one of our errors. making: while the environment was made."""
    if isinstance(error, QuotaExceeded | NoCapacity):
        code = CAPACITY_REACHED
    elif isinstance(error, InvalidConfig):
        code = VALIDATION_ERROR
    else:
        code = FACTORY_ERROR if making else EXECUTION_ERROR
    return Failure(code, str(error), {"error": error.to_wire()["error"]}, error.status)


class Reset(BaseModel):
    """The data of a reset. Other fields are arguments of the constructor of the environment."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, defer_build=True)

    seed: int | None = Field(default=None, ge=0)
    episode_id: str | None = Field(default=None, min_length=1, max_length=255)
    options: dict[str, Any] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class StepRequest(BaseModel):
    """The body of a step over HTTP."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)

    action: dict[str, Any]
    timeout_s: float | None = Field(default=None, gt=0, le=3600)
    request_id: str | None = Field(default=None, max_length=255)


def parsed(text: bytes | str) -> dict[str, Any]:
    """A message from its text. Failure."""
    if len(text) > LONGEST:
        raise Failure(VALIDATION_ERROR, f"the message has more than {LONGEST} bytes")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Failure(INVALID_JSON, f"the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Failure(VALIDATION_ERROR, "the message is not an object")
    return value


def validated(kind: type[Reset] | type[StepRequest], value: Any) -> Any:
    """Failure names each wrong field."""
    try:
        return kind.model_validate({} if value is None else value)
    except ValidationError as error:
        raise Failure(VALIDATION_ERROR, f"invalid message: {tell_validation(error)}") from None


def dumps(value: Any) -> bytes:
    return orjson.dumps(value, default=repr, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


# ---- descriptions ----


def metadata(env_id: str, about: dict[str, Any]) -> dict[str, Any]:
    note = f" {about['note']}" if about.get("note") else ""
    family = {"gem": "GEM", "gym": "Gymnasium", "task": "a task suite"}[str(about["protocol"])]
    version = about.get("version")
    return {"name": env_id, "description": f"Environment {env_id} of {family}, hosted in a sandbox.{note}",
            "readme_content": None, "version": None if version is None else str(version), "author": None,
            "documentation_url": None}  # fmt: skip


def schemas(protocol: str) -> dict[str, Any]:
    """JSON schemas of actions, observations and states."""
    text = {"description": "The text of the agent.", "type": "string"}
    message = {"description": 'A message of the agent: {"role": "assistant", "content": "..."}, with tool_calls.',
               "type": "object"}  # fmt: skip
    value = {"description": "The action, as the environment expects it: a number, text, a list or an object."}
    action = {"gem": text, "task": message, "gym": value}[protocol]
    properties: dict[str, Any] = {"action": action, "metadata": {"type": "object", "default": {}}}
    if protocol == "task":
        properties["params"] = {"type": "object", "description": "Parameters of the step."}
    observation = {"type": "object", "properties": {"observation": {"description": "What the environment returned."}},
                   "required": ["observation"]}  # fmt: skip
    state = {"type": "object", "properties": {"episode_id": {"type": ["string", "null"]},
                                              "step_count": {"type": "integer", "minimum": 0}}}  # fmt: skip
    return {"action": {"type": "object", "properties": properties, "required": ["action"],
                       "additionalProperties": False},
            "observation": observation, "state": state}  # fmt: skip


_PATHS = {"/reset": "post", "/step": "post", "/state": "get", "/schema": "get", "/metadata": "get", "/health": "get",
          "/mcp": "post"}  # fmt: skip


def openapi(env_id: str) -> dict[str, Any]:
    """The page that tells a client which routes exist: the mode "simulation"."""
    answer = {"responses": {"200": {"description": "the response"}}}
    return {"openapi": "3.1.0", "info": {"title": env_id, "version": VERSION},
            "paths": {path: {method: answer} for path, method in _PATHS.items()}}  # fmt: skip
