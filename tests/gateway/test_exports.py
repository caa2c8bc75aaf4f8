"""The prefix tree and the exports. test_official_clients.py validates ATIF documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from rock.gateway.call import Message, ModelResponse, Reasoning, RecordedCall, Text, ToolCall, ToolResult, Usage
from rock.gateway.dialects import DIALECTS, DialectError
from rock.gateway.export import FORMATS, export
from rock.gateway.tree import Prefixes, branches, message_key, prefix_keys
from rock.protocol.runs import RunInfo
from tests.gateway.bodies import NAMES, request_body

RUN = RunInfo(id="run-1", state="ended", source="upstream", base_url="http://127.0.0.1:1", reward=1.0,
              reward_valid=True, tags={"agent": "mini", "task": "t"})  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, call: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"role": "assistant", "content": text}
    if call:
        row["tool_calls"] = [{"id": call, "type": "function", "function": {"name": "bash", "arguments": '{"c": 1}'}}]
    return row


def result(call: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": text}


class Recorder:
    """Records calls as the gateway does."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self._prefixes = Prefixes()

    def call(
        self, messages: list[dict[str, Any]], answer: dict[str, Any] | None, prompt: list[int] | None = None,
        ids: list[int] | None = None, logprobs: list[float] | None = None, **more: Any,
    ) -> RecordedCall:  # fmt: skip
        chat, number = DIALECTS["openai-chat"], len(self.calls) + 1
        request = chat.parse_request({"model": "m", "messages": messages})
        response = None
        if answer is not None:
            usage = {"prompt_tokens": len(prompt or ()) or 10, "completion_tokens": len(ids or ()) or 5}
            finish = "tool_calls" if "tool_calls" in answer else "stop"
            response = chat.parse_response({"id": f"r{number}", "model": "m", "usage": usage, "choices": [
                {"index": 0, "message": answer, "finish_reason": finish}]})  # fmt: skip
            response = replace(response, prompt_token_ids=prompt, token_ids=ids, logprobs=logprobs)
        parent = self._prefixes.add(number, request)
        if response is not None:
            self._prefixes.answered(number, response)
        at = 1_700_000_000.0 + number
        status, error = ("done", None) if answer is not None else ("failed", "the upstream broke")
        call = RecordedCall(number, parent, request, response, at, at + 0.1, at + 0.5, status=status, error=error,
                            **more)  # fmt: skip
        self.calls.append(call)
        return call

    @property
    def parents(self) -> list[int | None]:
        return [call.parent for call in self.calls]


def conversation() -> Recorder:
    """1 - 2 - 5, a sub-agent 3, a failed call 4 whose retry is 5."""
    run = Recorder()
    first = [SYSTEM, user("Fix it.")]
    run.call(first, said("Look.", "c1"), [1, 2, 3], [4, 5], [-0.1, -0.2])
    second = [*first, said("Look.", "c1"), result("c1", "a.py")]
    run.call(second, said("Edit.", "c2"), [1, 2, 3, 4, 5, 6, 7], [8, 9], [-0.3, -0.4])
    run.call([{"role": "system", "content": "Name this."}, user("Fix it.")], said("A title"), [20, 21], [22], [-0.5])
    third = [*second, said("Edit.", "c2"), result("c2", "ok")]
    run.call(third, None)
    run.call(third, said("Done."), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11], [-0.6], retry_of=4)
    return run


# ---- tree ----


def test_a_call_continues_the_one_whose_messages_it_repeats() -> None:
    run = conversation()
    assert run.parents == [None, 1, None, 2, 2]
    assert branches(dict(enumerate(run.parents, 1))) == [[3], [1, 2, 4], [1, 2, 5]]


def test_parallel_samples_differ_by_their_responses() -> None:
    run = Recorder()
    first = [user("Go.")]
    run.call(first, said("Left", "c1"))
    run.call(first, said("Right", "c1"))
    run.call([*first, said("Left", "c1"), result("c1", "x")], said("End left"))
    run.call([*first, said("Right", "c1"), result("c1", "x")], said("End right"))
    run.call([*first, said("Edited", "c1"), result("c1", "x")], said("End"))
    assert run.parents == [None, None, 1, 2, 2]


def test_a_response_is_recognized_although_the_agent_changes_its_form() -> None:
    prefixes, chat = Prefixes(), DIALECTS["openai-chat"]
    prefixes.add(1, chat.parse_request({"messages": [user("a")]}))
    prefixes.add(2, chat.parse_request({"messages": [user("a")]}))
    parts = (Reasoning("secret", "sig"), Text("Look. "), ToolCall("x-1", "bash", '{"b": 2, "a": 1}'))
    prefixes.answered(1, ModelResponse("r", "m", Message("assistant", parts), "tool_calls"))
    echo = {"role": "assistant", "content": "Look.", "tool_calls": [
        {"id": "y-2", "function": {"name": "bash", "arguments": '{"a":1,"b":2}'}}]}  # fmt: skip
    later = chat.parse_request({"messages": [user("a"), echo, result("y-2", "x")]})
    assert prefixes.add(3, later) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_is_the_same_in_each_dialect(name: str) -> None:
    dialect, prefixes = DIALECTS[name], Prefixes()
    found = []
    for number, call in enumerate(conversation().calls, 1):
        body = dialect.render_request(replace(call.request, raw={}), stream=False)
        found.append(prefixes.add(number, dialect.parse_request(body, "m", None)))
        if call.response is not None:
            prefixes.answered(number, dialect.parse_response(dialect.render_response(call.response, call.request)))
    assert found == [None, 1, None, 2, 2]


# ---- token chains ----


def test_tokens_of_a_conversation_are_one_chain() -> None:
    found = export("chains", conversation().calls, RUN)
    assert (found["run"], found["reward"], found["reward_valid"]) == ("run-1", 1.0, True)
    main, sub = found["chains"]
    assert main["calls"] == [1, 2, 5] and sub["calls"] == [3]
    assert main["tokens"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert main["mask"] == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    assert main["logprobs"] == [0, 0, 0, -0.1, -0.2, 0, 0, -0.3, -0.4, 0, -0.6]
    assert main["prompt_length"] == 3
    assert [(row["call"], row["start"], row["end"]) for row in main["segments"]] == [(1, 3, 5), (2, 7, 9), (5, 10, 11)]
    assert (sub["tokens"], sub["mask"]) == ([20, 21, 22], [0, 0, 1])
    assert found["missing"] == [{"call": 4, "reason": "it is failed: the upstream broke"}]


def test_a_branch_and_a_changed_prompt_begin_a_new_chain() -> None:
    run = Recorder()
    first = [user("Go.")]
    run.call(first, said("A", "c1"), [1, 2], [3], [-1.0])
    run.call([*first, said("A", "c1"), result("c1", "x")], said("B"), [1, 2, 3, 4], [5], [-1.0])
    run.call([*first, said("A", "c1"), result("c1", "y")], said("C"), [1, 2, 3, 6], [7], [-1.0])  # another branch
    run.call([*first, said("A", "c1"), result("c1", "x"), said("B"), user("More")], said("D"), [1, 9, 9, 8], [5], None)
    found = export("chains", run.calls, RUN)["chains"]
    assert run.parents == [None, 1, 1, 2]
    assert [row["calls"] for row in found] == [[1, 2], [3], [4]]
    assert found[1]["mask"] == [0, 0, 0, 0, 1], "tokens of call 1 are trained on once"
    assert (found[2]["tokens"], found[2]["logprobs"]) == ([1, 9, 9, 8, 5], None)


def test_calls_with_incomplete_tokens_are_reported() -> None:
    run = Recorder()
    run.call([user("a")], said("x"))
    run.call([user("b")], said("x"), None, [1])
    call = run.call([user("c")], said("x"), [1, 2], [3, 4])
    assert call.response is not None
    run.calls[2] = replace(call, response=replace(call.response, usage=Usage(prompt=2, completion=9)))
    found = export("chains", run.calls, RUN)
    assert found["chains"] == []
    assert [(row["call"], row["reason"]) for row in found["missing"]] == [
        (1, "the response has no token ids"), (2, "the response has no prompt token ids"),
        (3, "the response has 2 token ids, and its usage says 9")]  # fmt: skip


# ---- ATIF ----


def test_the_steps_of_a_trajectory() -> None:
    found = export("atif", conversation().calls, RUN)
    assert found["schema_version"] == "ATIF-v1.8" and found["agent"]["name"] == "mini"
    assert [(row["step_id"], row["source"], row["message"]) for row in found["steps"]] == [
        (1, "system", "Be brief."), (2, "user", "Fix it."), (3, "agent", "Look."), (4, "agent", "Edit."),
        (5, "agent", "Done.")]  # fmt: skip
    look = found["steps"][2]
    assert look["tool_calls"] == [{"tool_call_id": "c1", "function_name": "bash", "arguments": {"c": 1}}]
    assert look["observation"] == {"results": [{"content": "a.py", "source_call_id": "c1"}]}
    assert look["metrics"]["prompt_token_ids"] == [1, 2, 3] and look["metrics"]["logprobs"] == [-0.1, -0.2]
    assert found["final_metrics"]["total_completion_tokens"] == 5
    assert found["extra"]["reward"] == 1.0 and found["extra"]["failed_calls"][0]["call"] == 4
    (sub,) = found["subagent_trajectories"]
    assert [row["message"] for row in sub["steps"]] == ["Name this.", "Fix it.", "A title"]


def test_a_branch_marks_the_steps_of_another_trajectory() -> None:
    run = Recorder()
    first = [user("Go.")]
    run.call(first, said("A", "c1"))
    run.call([*first, said("A", "c1"), result("c1", "x")], said("B"))
    run.call([*first, said("A", "c1"), result("c1", "y")], said("C"))
    (sub,) = export("atif", run.calls, RUN)["subagent_trajectories"]
    assert [(row["message"], row.get("is_copied_context", False)) for row in sub["steps"]] == [
        ("Go.", True), ("A", True), ("C", False)]  # fmt: skip
    assert sub["final_metrics"]["total_completion_tokens"] == 5


# ---- messages ----


@pytest.mark.parametrize("name", NAMES)
def test_openai_messages_of_each_dialect(name: str) -> None:
    request = DIALECTS[name].parse_request(request_body(name), "m", None)
    response = ModelResponse("r", "m", Message("assistant", (Text("End"),)), "stop")
    call = RecordedCall(1, None, request, response, 1.0, 2.0, 3.0)
    (found,) = export("openai", [call], RUN)["conversations"]
    assert [row["role"] for row in found["messages"]][-3:] == ["tool", "user", "assistant"]
    assert found["messages"][-1]["content"] == "End" and found["calls"] == [1]
    assert found["tools"][0]["function"]["name"] == "bash"


def test_records_of_rock_can_be_replayed() -> None:
    records = export("rock", conversation().calls, RUN)
    assert [row["status"] for row in records] == ["success", "success", "success", "failure", "success"]
    assert records[0]["response"]["choices"][0]["message"]["content"] == "Look."
    assert records[3]["response"] is None and records[3]["error"] == "the upstream broke"
    chat = DIALECTS["openai-chat"]
    for row, call in zip(records, conversation().calls, strict=True):
        assert chat.parse_request(row["request"]).messages == call.request.messages
        assert row["end_time"] - row["start_time"] == pytest.approx(row["response_time"])


@pytest.mark.parametrize("kind", FORMATS)
def test_exports_of_runs_without_calls_and_with_results_without_calls_are_json(kind: str) -> None:
    lost = RecordedCall(1, None, DIALECTS["openai-chat"].parse_request({"messages": [result("c", "x")]}), None, 1.0,
                        status="running")  # fmt: skip
    odd = replace(lost, number=2, parent=7, status="done", response=ModelResponse(
        "", "", Message("assistant", (ToolCall("", "f", "no json"), ToolResult("c", ()))), None))  # fmt: skip
    for calls in ([], [lost], [lost, odd] if kind in ("atif", "chains") else [lost]):
        orjson.dumps(export(kind, calls, RUN))


@pytest.mark.parametrize("role", ["user", "assistant", "system", "developer"])
def test_a_plain_message_is_like_one_with_parts(role: str) -> None:
    """Messages with a text only take a shorter way through the parser and the keys; the result is the same."""
    chat = DIALECTS["openai-chat"]
    forms: list[Any] = ["a text ", [{"type": "text", "text": "a text "}]]
    rows = [{"role": role, "content": content, **more} for content in forms for more in ({}, {"name": "x"})]
    found = [chat.parse_request({"model": "m", "messages": [user("first"), row]}) for row in rows]
    assert all(request.messages == found[0].messages and prefix_keys(request) == prefix_keys(found[0])
               for request in found)  # fmt: skip
    split = Message(found[0].messages[1].role, (Text("a text "), Reasoning("why")))
    assert message_key(split) == message_key(found[0].messages[1])
    for wrong in ({"role": [], "content": "x"}, {"role": "x", "content": "x"}, {"role": "user", "content": 1}):
        with pytest.raises(DialectError):
            chat.parse_request({"model": "m", "messages": [wrong]})
