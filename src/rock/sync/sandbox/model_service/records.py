# GENERATED from src/rock/sdk/sandbox/model_service/records.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Files of ROCK's proxy: a JSON object a line, for each call."""

from __future__ import annotations

import json
import time
from typing import Any

from rock.protocol.runs import CallInfo

CHAT = "openai-chat"


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
