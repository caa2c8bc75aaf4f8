"""Tools: a name, a description, a model of the arguments, the access right, and the function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rock.dialects.mcp.context import ToolContext
from rock.errors import InvalidConfig, RockError
from rock.http.asgi import tell_validation
from rock.protocol.keys import Access

OUTPUT = 30_000  # bytes of one stream of output in a result; the head and the tail remain
_SANDBOX = "sandbox_id"


class Arguments(BaseModel):
    """Base of arguments. An unknown argument is an error, so that a model notices a wrong name."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class InSandbox(Arguments):
    """Arguments of a tool that uses a sandbox."""

    sandbox_id: str | None = Field(default=None, max_length=128,
                                   description="The sandbox; by default the one of this session.")  # fmt: skip


A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True)
class Result:
    """The result of a tool: text for a model, and the same as data."""

    text: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Tool(Generic[A]):
    """read_only, destructive: hints for the user interface of a client."""

    name: str
    title: str
    description: str
    arguments: type[A]
    access: Access
    run: Callable[[ToolContext, A], Awaitable[Result]]
    read_only: bool = False
    destructive: bool = False

    @cached_property
    def _schema(self) -> dict[str, Any]:
        return _plain(self.arguments.model_json_schema())  # type: ignore[no-any-return]

    def described(self, has_session: bool) -> dict[str, Any]:
        """The entry of a list of tools. Without a session the sandbox is a required argument."""
        schema = self._schema
        if not has_session and _SANDBOX in schema["properties"] and _SANDBOX not in schema.get("required", ()):
            own = {"type": "string", "description": "The sandbox, as sandbox_create returned it."}
            schema = {**schema, "properties": {**schema["properties"], _SANDBOX: own},
                      "required": [*schema.get("required", ()), _SANDBOX]}  # fmt: skip
        hints = {"readOnlyHint": self.read_only, "destructiveHint": self.destructive, "openWorldHint": False}
        return {"name": self.name, "title": self.title, "description": self.description, "inputSchema": schema,
                "annotations": hints}  # fmt: skip

    async def call(self, context: ToolContext, given: Any) -> dict[str, Any]:
        """The result of a call, in the format of the protocol. An error of the tool is a result too, so that a model
        can correct its arguments."""
        try:
            return _shown(await self.run(context, self._checked(given)))
        except RockError as error:
            return {"content": [{"type": "text", "text": str(error)}], "isError": True,
                    "structuredContent": error.to_wire()}  # fmt: skip

    def _checked(self, given: Any) -> A:
        try:
            return self.arguments.model_validate({} if given is None else given)
        except ValidationError as error:
            names = ", ".join(self.arguments.model_fields)
            raise InvalidConfig(f"wrong arguments of {self.name}: {tell_validation(error)}",
                                hint=f"the arguments are {names}" if names else "it has no arguments") from None


class Toolbox:
    """All tools, by name."""

    def __init__(self, tools: Iterable[Tool[Any]]) -> None:
        self._tools = {tool.name: tool for tool in tools}

    def find(self, name: Any) -> Tool[Any] | None:
        return self._tools.get(name) if isinstance(name, str) else None

    def listed(self, scopes: frozenset[Access] | None, has_session: bool) -> list[dict[str, Any]]:
        """Descriptions of the tools that a key with these rights can use. None: the rights are unknown."""
        return [tool.described(has_session) for tool in self._tools.values() if scopes is None or tool.access in scopes]


def _shown(result: Result) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": result.text}], "structuredContent": result.data, "isError": False}


def _plain(value: Any) -> Any:
    """A schema of pydantic without titles, and without null as a type of optional arguments."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _plain(item) for key, item in value.items() if not (key == "title" and isinstance(item, str))}
    choices = found.get("anyOf")
    if isinstance(choices, list) and {"type": "null"} in choices:
        rest = [choice for choice in choices if choice != {"type": "null"}]
        del found["anyOf"]
        found.pop("default", None) if found.get("default") is None else None
        found |= rest[0] if len(rest) == 1 else {"anyOf": rest}
    return found


def json_text(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2, default=repr).decode()
