"""Runs of agents and upstreams of the model gateway (`Client().runs`, `sandbox.start_run`)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import orjson
from pydantic import ValidationError

from rock.protocol.routes import ROUTES
from rock.protocol.rows import NDJSON
from rock.protocol.runs import (
    AnswerCall,
    CallInfo,
    CallList,
    EndRun,
    NextCall,
    RunInfo,
    RunList,
    RunSpec,
    TrajectoryFormat,
    UpdateRun,
    UpstreamInfo,
    UpstreamList,
    UpstreamSpec,
)
from rock.protocol.wire import explain
from rock.sdk.http import query_string
from rock.sdk.sandbox.link import SLACK, parse
from rock.sdk.transport import Transport

CREATE_TIMEOUT = 120.0  # seconds; the loopback port may need the start of a worker's connection
_PAGE = 100


class Run:
    """One run. `info` is its state as last read; `api_key` and `environ` are known to its creator only.

    As a context it is ended on exit; after an exception without a valid reward.
    """

    def __init__(self, transport: Transport, info: RunInfo) -> None:
        self._transport = transport
        self.info = info
        self.id = info.id
        self.base_url = info.base_url
        self.api_key = info.api_key
        self.environ = dict(info.environ)

    def __repr__(self) -> str:
        return f"Run({self.id!r}, state={self.info.state!r})"

    def _path(self, name: str, query: dict[str, object] | None = None, **values: str) -> str:
        return ROUTES[name].url(run=self.id, **values) + query_string(query or {})

    async def _state(self, method: str, target: str, body: Any = None) -> RunInfo:
        self.info = parse(RunInfo, await self._transport.json(method, target, body))
        return self.info

    async def refresh(self) -> RunInfo:
        """Read the state. NotFound."""
        return await self._state("GET", self._path("get_run"))

    async def update(self, *, tags: dict[str, str] | None = None, weight_version: str | None = None) -> RunInfo:
        """Add tags, or set the weight version of later calls. Conflict for an ended run."""
        body = UpdateRun(tags=tags, weight_version=weight_version)
        return await self._state("PATCH", self._path("update_run"), body.model_dump(mode="json"))

    async def end(
        self, reward: float | None = None, *, rewards: dict[str, float] | None = None, valid: bool = True,
        reason: str | None = None,
    ) -> RunInfo:  # fmt: skip
        """Freeze the run: running calls are cancelled, later ones are refused. valid: False when an infrastructure
        error prevented a reward. Conflict when it has ended with another reward."""
        spec = EndRun(reward=reward, rewards=rewards or {}, valid=valid, reason=reason)
        return await self._state("POST", self._path("end_run"), spec.model_dump(mode="json"))

    async def delete(self, *, force: bool = False) -> RunInfo:
        """Delete the run and its calls. Conflict for an active one without `force`."""
        return await self._state("DELETE", self._path("delete_run", {"force": force or None}))

    # ---- calls ----

    async def calls(
        self, *, after: int = 0, limit: int | None = None, bodies: bool = True, dialect: str | None = None
    ) -> list[CallInfo]:
        """Recorded calls in order of arrival, with requests and responses unless `bodies` is False."""
        found: list[CallInfo] = []
        at: int | None = after
        while at is not None and (limit is None or len(found) < limit):
            size = _PAGE if limit is None else min(_PAGE, limit - len(found))
            query: dict[str, object] = {"after": at, "limit": size, "bodies": bodies or None, "dialect": dialect}
            page = parse(CallList, await self._transport.json("GET", self._path("list_calls", query)))
            found += page.items
            at = page.after
        return found

    async def call(self, number: int, *, wait: float = 0.0, dialect: str | None = None) -> CallInfo:
        """One call; waits up to `wait` seconds for its end. NotFound."""
        target = self._path("get_call", {"wait": wait or None, "dialect": dialect}, number=str(number))
        return parse(CallInfo, await self._transport.json("GET", target, timeout=wait + SLACK))

    async def trajectory(self, format: TrajectoryFormat = "atif") -> Any:
        """The calls as an ATIF trajectory, OpenAI messages, token chains, or ROCK's LLMTraj."""
        return await self._transport.json("GET", self._path("get_trajectory", {"format": format}))

    # ---- pull mode ----

    async def next(self, after: int = 0, *, wait: float = 30.0, dialect: str | None = None) -> NextCall:
        """The first unanswered call with a number above `after`; waits up to `wait` seconds for one. `call` is None
        when there is none, or the run has ended. Conflict for a run that is not in pull mode."""
        target = self._path("next_call", {"after": after, "wait": wait, "dialect": dialect})
        return parse(NextCall, await self._transport.json("GET", target, timeout=wait + SLACK))

    async def answer(
        self, number: int, response: dict[str, Any] | None = None, *, text: str | None = None, **fields: Any
    ) -> CallInfo:
        """Answer a call with a response body, or with text. fields: of AnswerCall, such as `error`, `dialect`,
        `token_ids` and `logprobs`. An answered call stays unchanged. InvalidConfig, Conflict."""
        try:
            spec = AnswerCall.model_validate({"response": response, "text": text, **fields})
        except ValidationError as error:
            raise explain(error, AnswerCall) from None
        target = self._path("answer_call", number=str(number))
        return parse(CallInfo, await self._transport.json("POST", target, spec.model_dump(mode="json")))

    async def answer_events(
        self, number: int, events: Iterable[dict[str, Any]], *, dialect: str | None = None
    ) -> CallInfo:
        """Answer with the events of a stream, in the dialect of the call or in `dialect`."""
        target = self._path("answer_call", {"dialect": dialect}, number=str(number))
        body = b"".join(orjson.dumps(event) + b"\n" for event in events)
        return parse(CallInfo, await self._transport.json_raw("POST", target, body, content_type=NDJSON))

    # ---- context ----

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.info.state == "active":
            if error is None:
                await self.end()
            else:
                await self.end(valid=False, reason=f"{type(error).__name__}: {error}"[:2000])


class Runs:
    """The runs of a server."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(self, *, sandbox: str | None = None, **fields: Any) -> Run:
        """Create a run. fields: of RunSpec; exactly one of `upstream`, `pull` and `replay`. InvalidConfig, NotFound,
        Conflict for a port that is in use inside, QuotaExceeded."""
        try:
            spec = RunSpec.model_validate({"sandbox": sandbox, **fields})
        except ValidationError as error:
            raise explain(error, RunSpec) from None
        body = spec.model_dump(mode="json")
        answer = await self._transport.json("POST", ROUTES["create_run"].path, body, key=os.urandom(16).hex(),
                                            timeout=CREATE_TIMEOUT)  # fmt: skip
        return Run(self._transport, parse(RunInfo, answer))

    async def get(self, run_id: str) -> Run:
        """An existing run, without its secret. NotFound."""
        target = ROUTES["get_run"].url(run=run_id)
        return Run(self._transport, parse(RunInfo, await self._transport.json("GET", target)))

    async def list(
        self, *, state: str | None = None, sandbox: str | None = None, upstream: str | None = None,
        name: str | None = None, tags: Mapping[str, str] | None = None, limit: int | None = None,
    ) -> list[RunInfo]:  # fmt: skip
        """Runs, newest first; all when `limit` is None."""
        found: list[RunInfo] = []
        async for info in self._pages(
            {"state": state, "sandbox": sandbox, "upstream": upstream, "name": name}, tags or {}
        ):
            found.append(info)
            if limit is not None and len(found) >= limit:
                break
        return found

    async def _pages(self, filters: Mapping[str, str | None], tags: Mapping[str, str]) -> AsyncIterator[RunInfo]:
        after: str | None = None
        while True:
            query: dict[str, object] = {
                **filters, "after": after, "limit": _PAGE,
                "tag": [f"{key}={value}" for key, value in tags.items()] or None,
            }  # fmt: skip
            target = ROUTES["list_runs"].path + query_string(query)
            page = parse(RunList, await self._transport.json("GET", target))
            for info in page.items:
                yield info
            after = page.after
            if after is None:
                return


class Upstreams:
    """The model servers of a server, by name."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def put(self, name: str, urls: str | list[str], *, key: str | None = None, **fields: Any) -> UpstreamInfo:
        """Define or replace an upstream. key: None keeps the key of an existing one. fields: of UpstreamSpec."""
        given = {"urls": [urls] if isinstance(urls, str) else urls, "key": key, **fields}
        try:
            spec = UpstreamSpec.model_validate(given)
        except ValidationError as error:
            raise explain(error, UpstreamSpec) from None
        body = {**spec.model_dump(mode="json"), "key": key, "headers": dict(fields.get("headers") or {})}
        target = ROUTES["put_upstream"].url(upstream=name)
        return parse(UpstreamInfo, await self._transport.json("PUT", target, body))

    async def list(self) -> list[UpstreamInfo]:
        """Upstreams of this tenant, and shared ones; without their keys."""
        return parse(UpstreamList, await self._transport.json("GET", ROUTES["list_upstreams"].path)).items

    async def delete(self, name: str) -> UpstreamInfo:
        """Delete an upstream. Later calls of its runs fail. NotFound."""
        target = ROUTES["delete_upstream"].url(upstream=name)
        return parse(UpstreamInfo, await self._transport.json("DELETE", target))
