"""The dialects of model APIs: OpenAI chat completions, OpenAI Responses, Anthropic Messages, Gemini.

A dialect parses requests, responses and streams to the internal form of `rock.gateway.call`, and renders them. Any pair
of dialects can be converted through it. Pure functions without I/O. Bodies are hostile: every problem of a body, an
event or a conversion is a `DialectError`, and no other exception is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from rock.gateway.call import Delta, ModelRequest, ModelResponse
from rock.gateway.dialects.anthropic import Anthropic
from rock.gateway.dialects.fields import DialectError as DialectError
from rock.gateway.dialects.fields import Truncated as Truncated
from rock.gateway.dialects.gemini import Gemini
from rock.gateway.dialects.openai_chat import OpenAIChat
from rock.gateway.dialects.openai_responses import OpenAIResponses
from rock.gateway.sse import SSEEvent

__all__ = ["DIALECTS", "Dialect", "DialectError", "ErrorKind", "StreamParser", "StreamRenderer", "Truncated"]

ErrorKind: TypeAlias = Literal[
    "budget", "bad_request", "unauthorized", "ended", "upstream", "overloaded", "timeout", "unsupported"
]


class StreamParser(Protocol):
    """Parses the stream of one response."""

    def feed(self, event: SSEEvent) -> list[Delta]:
        """The deltas of an event; [] for one that carries none. DialectError, also for an error event."""

    def finish(self) -> ModelResponse:
        """The whole response; its `raw` is the body that a call without a stream returns. Truncated: the event that
        completes the response did not arrive (chat: finish_reason; Responses: response.completed or .incomplete;
        Anthropic: message_stop; Gemini: finishReason)."""


class StreamRenderer(Protocol):
    """Renders one response as server-sent events. Each method returns the bytes to send, which may be b""."""

    def begin(self) -> bytes:
        """Before everything else."""

    def feed(self, delta: Delta) -> bytes: ...

    def end(self, response: ModelResponse) -> bytes:
        """The rest of the stream. Without an earlier delta, it has the whole response. DialectError for a part that the
        dialect cannot express."""

    def error(self, kind: ErrorKind, message: str) -> bytes:
        """An error in the middle of the stream; nothing follows. The client does not see a complete response."""


class Dialect(Protocol):
    """One dialect. Attributes are read-only."""

    @property
    def name(self) -> str: ...

    def parse_request(
        self, body: dict[str, Any], model_of_path: str | None = None, stream: bool | None = None
    ) -> ModelRequest:
        """model_of_path, stream: from the path of the request (Gemini); None: the body has them. DialectError."""

    def render_request(self, request: ModelRequest, *, stream: bool, token_fields: bool = False) -> dict[str, Any]:
        """The body for an upstream of this dialect. In the dialect of the request, `request.raw` with the model,
        sampling parameters and stream of the request; unknown fields pass. token_fields: also request token ids and log
        probabilities, with the fields of vLLM and SGLang. DialectError: it cannot be converted; the text says why."""

    def parse_response(self, body: dict[str, Any]) -> ModelResponse:
        """DialectError, also for a body that is an error."""

    def render_response(self, response: ModelResponse, request: ModelRequest) -> dict[str, Any]:
        """The body for the agent that sent `request`, without token fields. In the dialect of the response, its
        `raw`. DialectError: the response has a part that the dialect cannot express."""

    def stream_parser(self) -> StreamParser: ...

    def stream_renderer(self, request: ModelRequest) -> StreamRenderer: ...

    def render_error(self, kind: ErrorKind, message: str) -> tuple[int, dict[str, Any]]:
        """HTTP status and body of an error."""

    def strip_token_fields(self, body: dict[str, Any], request: ModelRequest | None = None) -> dict[str, Any]:
        """A response, or an event of a stream, without token ids and log probabilities. request: keeps the log
        probabilities that the agent requested itself. The body is not changed."""

    def count_tokens(self, request: ModelRequest) -> int:
        """An estimate of the prompt's tokens, for when no upstream counts them."""

    def upstream_path(self, model: str, stream: bool) -> str:
        """Path and query of the endpoint, from "/v1" on."""

    def auth_headers(self, key: str) -> dict[str, str]: ...


_ALL: tuple[Dialect, ...] = (OpenAIChat(), OpenAIResponses(), Anthropic(), Gemini())
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in _ALL}
