"""Exports as bodies of chat completions: OpenAI messages, and ROCK's LLMTraj."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rock.gateway.call import RecordedCall
from rock.gateway.dialects import DIALECTS, DialectError
from rock.gateway.export.paths import paths, response_of, run_fields
from rock.protocol.runs import RunInfo

_CHAT = DIALECTS["openai-chat"]


def openai(calls: Sequence[RecordedCall], run: RunInfo) -> dict[str, Any]:
    """{run fields, "conversations": [{"calls", "messages", "tools", "finish_reason"}]}: one conversation for each leaf
    of the prefix tree, the longest first. messages end with the last response. A conversation without a form as chat
    messages has "error" instead of messages."""
    found: list[dict[str, Any]] = []
    for path in paths(calls):
        row: dict[str, Any] = {"calls": [call.number for call in path]}
        last = path[-1]
        try:
            body = _request(last)
            choice = _response(last)["choices"][0]
        except DialectError as error:
            found.append({**row, "error": str(error)})
            continue
        row |= {"messages": [*body["messages"], choice["message"]], "tools": body.get("tools") or []}
        found.append({**row, "finish_reason": choice.get("finish_reason")})
    return {**run_fields(run), "conversations": found}


def rock(calls: Sequence[RecordedCall], run: RunInfo) -> list[dict[str, Any]]:
    """Records of ROCK's model service, in the order of the calls: request and response of chat completions, model,
    stream, status ("success" or "failure"), times in seconds, error. Calls that are still running are left out.
    A call without a form as chat completion keeps its bodies, and has "dialect"."""
    found: list[dict[str, Any]] = []
    for call in calls:
        if call.ended is None:
            continue
        request, response = call.request, call.response
        row: dict[str, Any] = {
            "model": request.model, "stream": request.stream, "status": "success" if response else "failure",
            "response_time": call.ended - call.started, "start_time": call.started, "end_time": call.ended,
        }  # fmt: skip
        try:
            row |= {"request": _request(call), "response": _response(call) if response else None}
        except DialectError:
            row |= {"request": dict(request.raw), "dialect": request.dialect,
                    "response": dict(response.raw or {}) if response else None}  # fmt: skip
        found.append({**row, "error": call.error})
    return found


def _request(call: RecordedCall) -> dict[str, Any]:
    if call.request.dialect == "openai-chat" and call.request.raw:
        return dict(call.request.raw)
    return _CHAT.render_request(call.request, stream=call.request.stream)


def _response(call: RecordedCall) -> dict[str, Any]:
    return _CHAT.render_response(response_of(call), call.request)
