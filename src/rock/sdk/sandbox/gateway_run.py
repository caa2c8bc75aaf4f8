"""A run of the model gateway as `ModelService` and `run_agent` use it (docs/decisions/0039-model-gateway.md)."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Self

from rock import errors
from rock.protocol.routes import ROUTES
from rock.protocol.runs import CallInfo, CallList, NextCall, RunInfo, RunSpec, UpstreamInfo
from rock.sdk.http import query_string
from rock.sdk.sandbox.link import SLACK, parse
from rock.sdk.transport import Transport

POLL = 20.0  # seconds of one long-poll
CHAT = "openai-chat"


class GatewayRun:
    """One run. info: as the server described it last; `base_url`, `api_key` and `environ` are those of its creation.

    Every call raises RockError: NotFound for a run that was deleted.
    """

    def __init__(self, transport: Transport, info: RunInfo) -> None:
        self._transport = transport
        self.info = info

    @property
    def id(self) -> str:
        return self.info.id

    @classmethod
    async def create(cls, transport: Transport, spec: RunSpec | dict[str, Any]) -> Self:
        """Create a run. InvalidConfig, NotFound (sandbox, upstream), Unsupported (the runtime opens no ports)."""
        checked = spec if isinstance(spec, RunSpec) else RunSpec.model_validate(spec)
        body = checked.model_dump(mode="json", exclude_unset=True)
        key = os.urandom(16).hex()
        answer = await transport.json("POST", ROUTES["create_run"].path, body, timeout=SLACK, key=key)
        return cls(transport, parse(RunInfo, answer))

    async def next(self, after: int = 0, wait: float = POLL, dialect: str | None = None) -> NextCall:
        """Pull mode: the first unanswered call with a number above `after`; waits up to `wait` seconds for one.
        dialect: of the bodies; None is that of the agent."""
        query = query_string({"after": after, "wait": round(wait, 3), "dialect": dialect})
        target = ROUTES["next_call"].url(run=self.id) + query
        return parse(NextCall, await self._transport.json("GET", target, timeout=wait + SLACK))

    async def answer(self, number: int, **fields: Any) -> CallInfo:
        """Pull mode: answer a call with the fields of `AnswerCall`. Conflict: it has another answer."""
        target = ROUTES["answer_call"].url(run=self.id, number=str(number))
        key = os.urandom(16).hex()
        return parse(CallInfo, await self._transport.json("POST", target, fields, timeout=SLACK, key=key))

    async def calls(self, dialect: str | None = None) -> list[CallInfo]:
        """All calls with their bodies."""
        found: list[CallInfo] = []
        after: int | None = 0
        while after is not None:
            query = query_string({"after": after, "limit": 100, "bodies": True, "dialect": dialect})
            page = await self._transport.json("GET", ROUTES["list_calls"].url(run=self.id) + query, timeout=SLACK)
            parsed = parse(CallList, page)
            found += parsed.items
            after = parsed.after
        return found

    async def refresh(self) -> RunInfo:
        """Read the run again."""
        answer = await self._transport.json("GET", ROUTES["get_run"].url(run=self.id), timeout=SLACK)
        return self._known(parse(RunInfo, answer))

    async def end(self, **fields: Any) -> RunInfo:
        """End it with the fields of `EndRun`; an ended run stays as it is."""
        target = ROUTES["end_run"].url(run=self.id)
        try:
            answer = await self._transport.json("POST", target, fields, timeout=SLACK, key=os.urandom(16).hex())
        except errors.Conflict:
            return await self.refresh()
        return self._known(parse(RunInfo, answer))

    def _known(self, info: RunInfo) -> RunInfo:
        before = self.info
        self.info = info.model_copy(update={"api_key": before.api_key, "environ": before.environ})
        return self.info


async def put_upstream(transport: Transport, name: str, spec: dict[str, Any]) -> UpstreamInfo:
    """Define an upstream with the fields of `UpstreamSpec`."""
    target = ROUTES["put_upstream"].url(upstream=name)
    return parse(UpstreamInfo, await transport.json("PUT", target, spec, timeout=SLACK))


async def delete_upstream(transport: Transport, name: str) -> None:
    """Delete an upstream; one that does not exist is no error."""
    try:
        await transport.json("DELETE", ROUTES["delete_upstream"].url(upstream=name), timeout=SLACK)
    except errors.NotFound:
        return


# ---- files of ROCK's proxy


def rock_records(calls: list[CallInfo]) -> str:
    """The calls as ROCK's proxy records them: a JSON object a line, in the order of their numbers."""
    return "".join(json.dumps(_record(call), ensure_ascii=False) + "\n" for call in calls)


def _record(call: CallInfo) -> dict[str, Any]:
    ended = call.ended or call.started
    return {
        "model": call.model, "stream": call.stream, "status": "success" if call.state == "done" else "failure",
        "response_time": round(ended - call.started, 6), "start_time": _iso(call.started), "end_time": _iso(ended),
        "request": call.request, "response": call.response, "error": call.error,
    }  # fmt: skip


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}+00:00"


def replay_of(text: str) -> dict[str, Any]:
    """The fields of `Replay` for a file of ROCK's proxy: the n-th call gets the n-th successful response. ValueError:
    a line is not such a record."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"line {number} of the replay file is not JSON") from None
        if not isinstance(record, dict) or not ("response" in record or "request" in record):
            raise ValueError(f'line {number} of the replay file has no "response"')
        if isinstance(record.get("response"), dict):
            records.append({"request": record.get("request"), "response": record["response"]})
    return {"records": records, "dialect": CHAT, "by": "order"}
