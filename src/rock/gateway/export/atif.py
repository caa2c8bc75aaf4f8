"""Export as ATIF v1.8, the agent trajectory interchange format.

The longest path of the prefix tree is the trajectory. Every other path (a sub-agent, a compacted conversation, a
branch) is an embedded trajectory, in which the steps that another trajectory has already are marked as copied context.
Results of tools are observations of the step that called them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rock.gateway.call import Media, Message, Part, Reasoning, Refusal, Text, ToolCall, ToolResult
from rock.gateway.call import RecordedCall as Recorded
from rock.gateway.dialects import fields
from rock.gateway.dialects.parts import schema_of, url_of
from rock.gateway.export.paths import new_messages, paths, response_of, run_fields
from rock.protocol.runs import RunInfo

VERSION = "ATIF-v1.8"
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def atif(calls: Sequence[Recorded], run: RunInfo) -> dict[str, Any]:
    """One ATIF document. `extra` of the root has the id, the reward and the tags of the run. The tags "agent" and
    "agent_version" name the agent."""
    found = paths(calls)
    seen: set[int] = set()
    trajectories = [_trajectory(run, f"{run.id}-{place}", path, seen) for place, path in enumerate(found)]
    if not trajectories:
        trajectories = [_trajectory(run, f"{run.id}-0", [], seen)]
    root, *others = trajectories
    failed = [{"call": call.number, "status": call.status, "error": call.error} for call in calls
              if call.status != "done"]  # fmt: skip
    root["extra"] = {**run_fields(run), "cost": run.counts.cost} | ({"failed_calls": failed} if failed else {})
    if others:
        root["subagent_trajectories"] = others
    return root


def _trajectory(run: RunInfo, id: str, path: list[Recorded], seen: set[int]) -> dict[str, Any]:
    steps = _Steps()
    before: Recorded | None = None
    for call in path:
        copied = call.number in seen
        if before is None and call.request.system:
            steps.add("system", call.request.system, call.started, copied=copied)
        for message in new_messages(call, before):
            steps.message(message, call.started, copied)
        steps.response(call, copied)
        before = call
    if not path:
        steps.add("system", "The run has no answered call.", run.created_at)
    own = [response_of(call).usage for call in path if call.number not in seen]
    seen.update(call.number for call in path)
    return {
        "schema_version": VERSION, "session_id": run.id, "trajectory_id": id, "agent": _agent(run, path),
        "steps": steps.rows, "final_metrics": {
            "total_prompt_tokens": sum(usage.prompt for usage in own),
            "total_completion_tokens": sum(usage.completion for usage in own),
            "total_cached_tokens": sum(usage.cached for usage in own), "total_steps": len(steps.rows),
        },
    }  # fmt: skip


def _agent(run: RunInfo, path: list[Recorded]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": run.tags.get("agent") or run.name or "agent",
                           "version": run.tags.get("agent_version") or "unknown"}  # fmt: skip
    if path:
        row["model_name"] = response_of(path[-1]).model or path[-1].request.model
        tools = [
            {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                              "parameters": schema_of(tool)}}
            for tool in path[-1].request.tools if tool.kind in ("function", "custom")
        ]  # fmt: skip
        if tools:
            row["tool_definitions"] = tools
    return row


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class _Steps:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, source: str, message: Any, at: float, *, copied: bool = False, **more: Any) -> None:
        row = {"step_id": len(self.rows) + 1, "timestamp": _time(at), "source": source, "message": message}
        row |= {key: value for key, value in more.items() if value is not None}
        self.rows.append(row | ({"is_copied_context": True} if copied else {}))

    def message(self, message: Message, at: float, copied: bool) -> None:
        """A message of a request. One of the assistant is not a response of this path: it is context."""
        match message.role:
            case "tool":
                self._results([part for part in message.parts if isinstance(part, ToolResult)], at, copied)
            case "assistant":
                self.add("agent", _content(message.parts), at, copied=True, llm_call_count=0,
                         tool_calls=_tool_calls(message.parts))  # fmt: skip
            case _:
                self.add("system" if message.role == "system" else "user", _content(message.parts), at, copied=copied)

    def _results(self, results: list[ToolResult], at: float, copied: bool) -> None:
        last = self.rows[-1] if self.rows else {}
        if last.get("source") != "agent" or not last.get("tool_calls"):
            for result in results:
                self.add("user", _content(result.parts), at, copied=copied)
            return
        called = {call["tool_call_id"] for call in last["tool_calls"]}
        rows = last.setdefault("observation", {"results": []})["results"]
        for result in results:
            row: dict[str, Any] = {"content": _content(result.parts)}
            if result.call_id in called:
                row["source_call_id"] = result.call_id
            if result.is_error:
                row["extra"] = {"is_error": True}
            rows.append(row)

    def response(self, call: Recorded, copied: bool) -> None:
        response = response_of(call)
        usage = response.usage
        parts = response.message.parts
        metrics: dict[str, Any] = {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion,
                                   "cached_tokens": usage.cached, "prompt_token_ids": response.prompt_token_ids,
                                   "completion_token_ids": response.token_ids,
                                   "logprobs": response.logprobs}  # fmt: skip
        metrics = {key: value for key, value in metrics.items() if value is not None}
        if usage.reasoning:
            metrics["extra"] = {"reasoning_tokens": usage.reasoning}
        reasoning = "\n\n".join(part.text for part in parts if isinstance(part, Reasoning) and part.text)
        extra = {
            "call": call.number, "finish_reason": response.finish_reason, "retry_of": call.retry_of,
            "weight_version": response.weight_version or call.weight_version,
        }  # fmt: skip
        self.add(
            "agent", _content(parts), call.started if call.ended is None else call.ended, copied=copied,
            model_name=response.model or call.request.model, reasoning_effort=call.request.effort,
            reasoning_content=reasoning or None, tool_calls=_tool_calls(parts), metrics=metrics, llm_call_count=1,
            extra={key: value for key, value in extra.items() if value is not None},
        )  # fmt: skip


def _tool_calls(parts: Iterable[Part]) -> list[dict[str, Any]] | None:
    found = [
        {"tool_call_id": part.id or f"call_{place}", "function_name": part.name,
         "arguments": fields.argument_object(part.arguments)}
        for place, part in enumerate(parts) if isinstance(part, ToolCall)
    ]  # fmt: skip
    return found or None


def _content(parts: Iterable[Part]) -> str | list[dict[str, Any]]:
    """A text, or content parts where there is an image. Other media are named in a text."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Text(text) | Refusal(text):
                rows.append({"type": "text", "text": text})
            case Media(kind="image", media_type=media_type) if media_type in _IMAGES:
                rows.append({"type": "image", "source": {"media_type": media_type, "path": url_of(part)}})
            case Media():
                rows.append({"type": "text", "text": f"[{part.kind} {part.name or part.url or part.media_type}]"})
            case ToolResult():
                rows.append({"type": "text", "text": str(_content(part.parts))})
    if all(row["type"] == "text" for row in rows):
        return "\n".join(row["text"] for row in rows)
    return rows
