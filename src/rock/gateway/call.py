"""The internal form of a model call, independent of the dialect. Plain data without I/O.

    ModelRequest ─ messages ─ Message(role, parts) ─ Text, Media, Reasoning, Refusal, ToolCall, ToolResult, Other
    Delta, Delta, ...                                the response while it is produced
    ModelResponse ─ message, finish_reason, usage, token ids, log probabilities
    RecordedCall                                     request and response with times, for exports

Roles of messages: "user", "assistant", "tool" (only `ToolResult` parts) and "system" (a system message in the middle of
a conversation; those at its beginning are `ModelRequest.system`).

`Other` is what has no internal form, such as a file at the provider or a tool that the provider runs. It passes
unchanged in its own dialect, and cannot be converted to another one.

Values are compared and hashed as JSON (`orjson.dumps` accepts these classes), so they hold JSON types only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["user", "assistant", "tool", "system"]
# stop: the model ended its turn, or at a stop sequence. refusal, content_filter: the model or a filter declined.
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "refusal", "content_filter", "pause"]
DeltaKind: TypeAlias = Literal["start", "text", "reasoning", "signature", "refusal", "tool", "arguments"]


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """An image, audio or a file: `data` (base64) or `url`. media_type: "image/png"; "" when only the URL is known."""

    kind: Literal["image", "audio", "file"]
    media_type: str = ""
    data: str | None = None
    url: str | None = None
    name: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning of the model. signature: data of the provider that belongs to it, returned unchanged in later requests
    (Anthropic: signature, or "redacted:" and the data of a redacted block; Responses: encrypted_content; Gemini:
    thoughtSignature)."""

    text: str
    signature: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """arguments: JSON text of an object; of a custom tool, {"input": TEXT}. signature: as in `Reasoning` (Gemini)."""

    id: str
    name: str
    arguments: str
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """call_id: of the `ToolCall`. name: of the tool, where the dialect gives it. parts: Text and Media."""

    call_id: str
    parts: tuple[Part, ...]
    is_error: bool = False
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """A part without an internal form. kind: its type in `dialect`; raw: the JSON object."""

    dialect: str
    kind: str
    raw: Mapping[str, Any]


Part: TypeAlias = Text | Media | Reasoning | Refusal | ToolCall | ToolResult | Other


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the model may call. kind:

    function: parameters is a JSON schema of an object. custom: free text input (Responses); other dialects get a
    function with one argument `input`. provider: the provider runs it; left out when the request is converted.
    other: the agent runs it, but its schema is known to the provider only; it cannot be converted.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    kind: Literal["function", "custom", "provider", "other"] = "function"
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """mode: "named" is the tool `name`. parallel: whether several calls in one response are allowed."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool | None = None


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """JSON output. schema: None is any JSON object."""

    schema: Mapping[str, Any] | None = None
    name: str = "response"
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request. raw: the body that it was parsed from, rendered again with all of its fields in the same dialect; a
    change of messages, system or tools sets raw to {}.

    sampling: temperature, top_p, top_k, max_tokens, stop (list of texts), seed, presence_penalty, frequency_penalty;
    absent where the agent gave none. effort: of reasoning, as the dialect names it. unconvertible: why it cannot be
    sent in another dialect; None: it can, as far as its parts and tools can.
    """

    dialect: str
    model: str
    messages: tuple[Message, ...]
    system: str | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)
    response_format: ResponseFormat | None = None
    effort: str | None = None
    unconvertible: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens. prompt includes cached; completion includes reasoning."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class ModelResponse:
    """A complete response. prompt_token_ids, token_ids, logprobs: None where the upstream sent none; logprobs[i] is the
    log probability of token_ids[i]. raw: the body in `dialect`; "" is a response that was parsed from no body."""

    id: str
    model: str
    message: Message
    finish_reason: FinishReason | None
    usage: Usage = Usage()
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    weight_version: str | None = None
    raw: Mapping[str, Any] | None = None
    dialect: str = ""
    stop_sequence: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed response. index: equal for all pieces of one part, and for no other part.

    start        id, name (the model): once, first
    text, reasoning, refusal        text
    signature    text: of the reasoning, or of the tool call, with this index
    tool         id, name: a tool call begins
    arguments    text: the next characters of its arguments
    """

    kind: DeltaKind
    index: int = 0
    text: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A recorded call. parent: the call whose messages this one continues. status: running, waiting, done, failed or
    cancelled. started, first_byte, ended: seconds since the epoch. retry_of: the broken call that this one repeats."""

    number: int
    parent: int | None
    request: ModelRequest
    response: ModelResponse | None
    started: float
    first_byte: float | None = None
    ended: float | None = None
    weight_version: str | None = None
    status: str = "done"
    error: str | None = None
    retry_of: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
