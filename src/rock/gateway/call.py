"""The internal form of a model call, independent of the dialect. Plain data without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    type: str = "text"


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str
    type: str = "reasoning"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """arguments: JSON text."""

    id: str
    name: str
    arguments: str
    type: str = "tool_call"


@dataclass(frozen=True, slots=True)
class ToolResult:
    call_id: str
    parts: tuple[Any, ...]
    is_error: bool = False
    type: str = "tool_result"


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    parts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class ModelRequest:
    dialect: str
    model: str
    messages: tuple[Message, ...]
    system: str | None = None
    tools: tuple[Any, ...] = ()
    tool_choice: Any = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelResponse:
    id: str
    model: str
    message: Message
    finish_reason: str | None
    usage: Usage = Usage()
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    weight_version: str | None = None
    raw: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RecordedCall:
    number: int
    parent: int | None
    request: ModelRequest
    response: ModelResponse | None
    started: float
    first_byte: float | None
    ended: float | None
    weight_version: str | None
    status: str
    error: str | None
    retry_of: int | None
    tags: Mapping[str, str]
