"""Runs, their recorded calls, and upstreams: the messages of the model gateway (docs/decisions/0039-model-gateway.md).

A run is one agent on one task. It has a secret, a source of responses, a budget, and the calls that the agent made. The
agent calls /gateway with the secret; the owner of the run reads its calls, answers them (pull mode), and ends it.

Times are seconds since the epoch. Dialects are "openai-chat", "openai-responses", "anthropic" and "gemini".
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from rock.protocol.action import Answer
from rock.protocol.wire import Wire

DialectName = Literal["openai-chat", "openai-responses", "anthropic", "gemini"]
Source = Literal["upstream", "pull", "replay"]
RunState = Literal["active", "ended"]
CallState = Literal["running", "waiting", "done", "failed", "cancelled"]
TrajectoryFormat = Literal["atif", "openai", "chains", "rock"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
RUN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
Tags = Annotated[dict[str, str], Field(max_length=64)]
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_BREAKS = re.compile(r"[\r\n\0]")
_TAG_BYTES = 16 << 10
_SAMPLING_BYTES = 64 << 10


def _check_tags(tags: dict[str, str]) -> None:
    if any(not name or len(name) > 128 for name in tags):
        raise ValueError("tags: a name has from 1 to 128 characters")
    if sum(len(name) + len(value) for name, value in tags.items()) > _TAG_BYTES:
        raise ValueError(f"tags: names and values are over {_TAG_BYTES} characters in total")


# ---- upstreams ----


class Price(Wire):
    """Prices in any currency for a million tokens. cached: for cached prompt tokens; None is the price of `prompt`."""

    prompt: float = Field(default=0.0, ge=0, le=1e9, allow_inf_nan=False)
    completion: float = Field(default=0.0, ge=0, le=1e9, allow_inf_nan=False)
    cached: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)


class UpstreamSpec(Wire):
    """A model server. The key is stored on the server (mode 0600) and is in no response.

    urls: base addresses without the path of the dialect, as "http://127.0.0.1:8000"; a path such as "/v1" at the end is
        allowed. Calls of one run use one address while it works.
    dialect: the dialect that the server speaks. Calls of agents in another dialect are converted.
    key: sent in the header of the dialect; None keeps the key of an existing upstream of this name; "" removes it.
    headers: additional request headers. Their values are treated as the key is.
    models: model names of agents and the names at the upstream; "*" is the name for all others.
    token_fields: request token ids and log probabilities ("vllm", "sglang"). The agent does not see these fields.
    retries: attempts after the first one, before the first byte of a response, after connection errors and the statuses
        408, 425, 429, 500, 502, 503, 504 and 529. backoff: seconds before the first retry; doubled for each one after.
    timeout: seconds without a byte of the response. connections: the largest number of concurrent calls.
    prices: by model name at the upstream; "*" is the price of all others.
    weight_version: recorded with each call, unless the response or the run names one.
    """

    urls: list[str] = Field(min_length=1, max_length=64)
    dialect: DialectName = "openai-chat"
    key: SecretStr | None = None
    headers: dict[str, SecretStr] = Field(default_factory=dict, max_length=32)
    models: dict[str, str] = Field(default_factory=dict, max_length=1000)
    token_fields: Literal["none", "vllm", "sglang"] = "none"
    retries: int = Field(default=5, ge=0, le=20)
    backoff: float = Field(default=0.5, ge=0, le=60, allow_inf_nan=False)
    timeout: float = Field(default=600.0, gt=0, le=86_400, allow_inf_nan=False)
    connections: int = Field(default=512, ge=1, le=10_000)
    prices: dict[str, Price] = Field(default_factory=dict, max_length=1000)
    weight_version: str | None = Field(default=None, max_length=200)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"urls: {url[:200]!r} is not the address of a server, as http://HOST:PORT")
            if parts.username is not None or parts.password is not None:
                raise ValueError("urls: a user or a password is in the address; use `key` or `headers`")
            parts.port  # noqa: B018  # ValueError for a wrong port
        for name, value in self.headers.items():
            text = value.get_secret_value()
            if not _HEADER.fullmatch(name) or not text.isascii() or _BREAKS.search(text):
                raise ValueError(f"headers: {name[:100]!r} is not a header")
            if name.lower() in ("host", "content-length", "transfer-encoding", "connection"):
                raise ValueError(f"headers: {name!r} is set by the gateway")
        key = "" if self.key is None else self.key.get_secret_value()
        if not key.isascii() or _BREAKS.search(key):
            raise ValueError("key: it has characters that a header cannot have")
        return self


class UpstreamInfo(Answer):
    """An upstream without its key. headers: names only. tenant: "" is the server's owner. shared: one of the server's
    owner, that all tenants can use."""

    name: str
    urls: list[str]
    dialect: DialectName
    has_key: bool
    headers: list[str] = Field(default_factory=list)
    models: dict[str, str] = Field(default_factory=dict)
    token_fields: str = "none"
    retries: int = 5
    backoff: float = 0.5
    timeout: float = 600.0
    connections: int = 512
    prices: dict[str, Price] = Field(default_factory=dict)
    weight_version: str | None = None
    created_at: float = 0.0
    tenant: str = ""


class UpstreamList(Answer):
    items: list[UpstreamInfo]


# ---- runs ----


class Budget(Wire):
    """Limits of a run; None is no limit. Each call is checked before it begins, so the last call may exceed a limit.

    calls: answered and running calls; retries are not counted again. tokens: prompt and completion. seconds: since the
    creation of the run; running calls are cancelled then. cost: in the currency of the prices.
    """

    calls: int | None = Field(default=None, ge=0, le=10_000_000)
    tokens: int | None = Field(default=None, ge=0, le=1 << 53)
    seconds: float | None = Field(default=None, ge=0, le=31_536_000, allow_inf_nan=False)
    cost: float | None = Field(default=None, ge=0, le=1e12, allow_inf_nan=False)


class Replay(Wire):
    """Recorded responses as the source. Exactly one of `run` and `records`.

    run: id of a recorded run of the same tenant. records: objects {"request": ..., "response": ...} of bodies in
    `dialect`, as ROCK's trajectory files have them.
    by: "order" gives the n-th call the n-th recorded response; "prefix" gives the response of the recorded call with
    the same messages, also for parallel calls. A call without a recorded response fails.
    """

    run: str | None = Field(default=None, pattern=RUN_PATTERN)
    records: list[dict[str, Any]] | None = Field(default=None, max_length=100_000)
    dialect: DialectName = "openai-chat"
    by: Literal["order", "prefix"] = "order"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.run is None) == (self.records is None):
            raise ValueError("give one of run and records")
        if self.records and not all(isinstance(row.get("response"), dict) for row in self.records):
            raise ValueError('records: each one is an object with "response", and with "request" for by="prefix"')
        return self


class RunSpec(Wire):
    """A new run. Exactly one of `upstream`, `pull` and `replay` is the source of responses.

    sandbox: id of the sandbox of the agent: a loopback port inside is opened, and closed with the run. Without it the
        agent uses the address of the server.
    port: the loopback port inside; None lets the server choose, and runs of one sandbox share a port.
    upstream: name of an upstream of the tenant, or of the server's owner.
    pull: the client that created the run answers the calls. pull_timeout: seconds that a call waits for its answer.
    model: replaces the model of every call. models: replacements by name; "*" is all others.
    sampling: fields that replace those of each request, in the names of the internal form: temperature, top_p, top_k,
        max_tokens, stop, seed, presence_penalty, frequency_penalty; None removes the field of the agent.
    prices: instead of those of the upstream.
    tags: for queries. name: for people. weight_version: recorded with each call.
    """

    sandbox: str | None = Field(default=None, min_length=1, max_length=128)
    port: int | None = Field(default=None, ge=1024, le=65535)
    upstream: str | None = Field(default=None, pattern=NAME_PATTERN)
    pull: bool = False
    pull_timeout: float = Field(default=3600.0, gt=0, le=604_800, allow_inf_nan=False)
    replay: Replay | None = None
    model: str | None = Field(default=None, min_length=1, max_length=200)
    models: dict[str, str] = Field(default_factory=dict, max_length=1000)
    sampling: dict[str, Any] = Field(default_factory=dict, max_length=16)
    budget: Budget = Field(default_factory=Budget)
    prices: dict[str, Price] | None = Field(default=None, max_length=1000)
    tags: Tags = Field(default_factory=dict)
    name: str | None = Field(default=None, min_length=1, max_length=200)
    weight_version: str | None = Field(default=None, max_length=200)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        given = [self.upstream is not None, self.pull, self.replay is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of upstream, pull and replay as the source of responses")
        if self.port is not None and self.sandbox is None:
            raise ValueError("port: it is a port inside a sandbox; give `sandbox` too")
        unknown = sorted(set(self.sampling) - SAMPLING)
        if unknown:
            raise ValueError(f"sampling: unknown fields {', '.join(unknown)}; there are {', '.join(sorted(SAMPLING))}")
        if len(json.dumps(self.sampling)) > _SAMPLING_BYTES:
            raise ValueError(f"sampling: it is over {_SAMPLING_BYTES} bytes")
        _check_tags(self.tags)
        return self


SAMPLING = frozenset({"temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "presence_penalty",
                      "frequency_penalty"})  # fmt: skip


class UpdateRun(Wire):
    """Fields of an active run that can be changed. tags: merged; weight_version: of the calls from now on."""

    tags: Tags | None = None
    weight_version: str | None = Field(default=None, max_length=200)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        _check_tags(self.tags or {})
        return self


class Counts(Wire):
    """Calls of a run by state, and their usage. retried: requests that joined a recorded call. refused: by the budget
    or after the end."""

    calls: int = 0
    running: int = 0
    waiting: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class RunInfo(Answer):
    """A run. base_url: the address for the agent, without "/v1". api_key and environ: in the response of the creation
    only; environ has the variables of common agents.

    reward: None without one. reward_valid: False when an infrastructure error prevented a reward. incomplete: a call
    was interrupted or could not be recorded; do not train on the run.
    """

    id: str
    state: RunState
    source: Source
    sandbox: str | None = None
    base_url: str
    api_key: str | None = Field(default=None, repr=False)
    environ: dict[str, str] = Field(default_factory=dict, repr=False)
    upstream: str | None = None
    model: str | None = None
    counts: Counts = Field(default_factory=Counts)
    budget: Budget = Field(default_factory=Budget)
    left: Budget = Field(default_factory=Budget)
    reward: float | None = None
    rewards: dict[str, float] = Field(default_factory=dict)
    reward_valid: bool | None = None
    reason: str | None = None
    incomplete: bool = False
    tags: dict[str, str] = Field(default_factory=dict)
    name: str | None = None
    tenant: str = ""
    weight_version: str | None = None
    created_at: float = 0.0
    ended_at: float | None = None
    last_call_at: float | None = None


class RunList(Answer):
    """after: argument for the next page; None on the last one."""

    items: list[RunInfo]
    after: str | None = None


class EndRun(Wire):
    """The end of a run. Running calls are cancelled, and later calls are refused.

    reward, rewards: one number, or several by name. valid: False when an infrastructure error prevented a reward, which
    is then None, never 0. reason: why it ended, for people.
    """

    reward: float | None = Field(default=None, allow_inf_nan=False)
    rewards: dict[str, float] = Field(default_factory=dict, max_length=100)
    valid: bool = True
    reason: str | None = Field(default=None, max_length=2000)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.valid and (self.reward is not None or self.rewards):
            raise ValueError("a run without a valid reward has no reward; leave it out")
        if any(value != value or value in (float("inf"), float("-inf")) for value in self.rewards.values()):
            raise ValueError("rewards: they are finite numbers")
        return self


# ---- calls ----


class CallUsage(Wire):
    """Tokens of one call. prompt includes cached; completion includes reasoning."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


class CallInfo(Answer):
    """A recorded call. number: from 1 in the order of arrival. parent: the call whose messages this one continues.

    request, response: bodies in `dialect`, the dialect of the agent; left out of lists unless bodies=1.
    model: as the agent requested it. upstream_model: as it was sent. retries: requests that joined this call; retry_of:
    the broken call that this one repeats. first_byte: of the response.
    token ids and log probabilities: where the upstream sends them, one log probability for each entry of token_ids.
    """

    number: int
    parent: int | None = None
    dialect: DialectName
    state: CallState
    stream: bool = False
    model: str = ""
    upstream_model: str | None = None
    finish_reason: str | None = None
    usage: CallUsage = Field(default_factory=CallUsage)
    cost: float = 0.0
    started: float
    first_byte: float | None = None
    ended: float | None = None
    weight_version: str | None = None
    error: str | None = None
    error_kind: str | None = None
    attempts: int = 1
    retries: int = 0
    retry_of: int | None = None
    request: dict[str, Any] | None = None
    response: dict[str, Any] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None


class CallList(Answer):
    """after: argument for the next page; None on the last one."""

    items: list[CallInfo]
    after: int | None = None


class NextCall(Answer):
    """Pull mode: the next call without an answer. call: None when none arrived within `wait`, or the run has ended."""

    state: RunState
    call: CallInfo | None = None
    waiting: int = 0


class AnswerError(Wire):
    """An error as the answer of a call. kind: the kind of the dialect's error; status: replaces its HTTP status."""

    kind: Literal["bad_request", "upstream", "overloaded", "timeout"] = "upstream"
    message: str = Field(default="the model failed", max_length=10_000)
    status: int | None = Field(default=None, ge=400, le=599)


class AnswerCall(Wire):
    """Pull mode: the answer of a call: one of `response`, `text` and `error`.

    response: a response body in `dialect` (default: the dialect of the call); converted for the agent, and sent as a
    stream when the agent requested one. text: an assistant message that ends the turn. token ids and log probabilities:
    recorded with the call; log probabilities belong to token_ids.

    A stream of parts is sent instead with content type application/x-ndjson: each line is one stream event of `dialect`
    (query ?dialect=) as its SSE data would be, and the end of the body is the end of the response.
    """

    response: dict[str, Any] | None = None
    dialect: DialectName | None = None
    text: str | None = None
    error: AnswerError | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    weight_version: str | None = Field(default=None, max_length=200)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.response, self.text, self.error)) != 1:
            raise ValueError("give one of response, text and error")
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids or ()):
            raise ValueError("logprobs: it has one number for each of token_ids")
        return self


# ---- loopback port ----


class GatewayPort(Wire):
    """The loopback port of a sandbox. port: None lets the worker choose."""

    port: int | None = Field(default=None, ge=1, le=65535)


class GatewayPortInfo(Answer):
    port: int
    connections: int = 0
