"""Requests, responses, streams and errors of the dialects, and conversion between each pair."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import orjson
import pytest

from rock.gateway.call import (
    Media,
    Message,
    ModelRequest,
    ModelResponse,
    Other,
    Reasoning,
    Refusal,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Usage,
)
from rock.gateway.dialects import DIALECTS, DialectError, Truncated
from rock.gateway.sse import SSEError, SSEEvent, SSEParser
from tests.gateway.bodies import DATA_URL, IMAGE, NAMES, SCHEMA, parsed_stream, request_body, response_body

PAIRS = [(one, other) for one in NAMES for other in NAMES]
EXPECTED = (
    Message("user", (Text("Look."), Media("image", "image/png", IMAGE))),
    Message("assistant", (Reasoning("Think."), Text("Two calls."), ToolCall("call_1", "bash", '{"cmd":"ls"}'),
                          ToolCall("call_2", "bash", '{"cmd":"pwd"}'))),
    Message("tool", (ToolResult("call_1", (Text("a b"),)), ToolResult("call_2", (Text("/"),)))),
    Message("user", (Text("Go on."),)),
)  # fmt: skip
ANSWER = (Reasoning("Think."), Text("Hello"), ToolCall("call_1", "bash", '{"cmd":"ls"}'),
          ToolCall("call_2", "bash", '{"cmd":"pwd"}'))  # fmt: skip


def comparable(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages without what only some dialects carry: names of results, details of images, ids of reasoning."""

    def part(value: Any) -> Any:
        match value:
            case ToolResult():
                return replace(value, name=None, parts=tuple(map(part, value.parts)))
            case Media():
                return replace(value, detail=None)
            case Reasoning():
                return replace(value, id=None)
        return value

    return tuple(Message(message.role, tuple(map(part, message.parts))) for message in messages)


def parsed(name: str, body: dict[str, Any]) -> ModelRequest:
    return DIALECTS[name].parse_request(body, "m" if name == "gemini" else None, None)


def answered(name: str) -> ModelResponse:
    return DIALECTS[name].parse_response(response_body(name))


# ---- requests ----


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_parsed_to_the_same_internal_form(name: str) -> None:
    request = parsed(name, request_body(name))
    assert comparable(request.messages) == EXPECTED
    assert (request.dialect, request.model, request.system, request.stream) == (name, "m", "Be brief.", False)
    assert request.tools[0] == Tool("bash", "Run", SCHEMA)
    assert request.tool_choice == ToolChoice("auto")
    assert request.sampling == {"temperature": 0.5, "max_tokens": 100}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_converted_request_has_the_same_content(source: str, target: str) -> None:
    request = parsed(source, request_body(source))
    body = DIALECTS[target].render_request(request, stream=False)
    again = parsed(target, json.loads(json.dumps(body)))
    assert comparable(again.messages) == EXPECTED
    assert (again.model, again.system, again.tool_choice) == ("m", "Be brief.", ToolChoice("auto"))
    assert [tool for tool in again.tools if tool.kind == "function"] == [
        Tool("bash", "Run", SCHEMA, strict=again.tools[0].strict)
    ]
    assert again.sampling == {"temperature": 0.5, "max_tokens": 100}
    assert ("x_unknown" in body) == (source == target)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_dialect_passes_all_fields_and_changes_only_what_the_run_changes(name: str) -> None:
    body = request_body(name)
    dialect, request = DIALECTS[name], parsed(name, body)
    same = dialect.render_request(request, stream=False)
    same.pop("stream", None)
    assert same == {**body, **({} if name == "gemini" else {"model": "m"})}
    changed = replace(request, model="other", sampling={"temperature": 0.1, "top_p": 0.9})
    again = dialect.parse_request(dialect.render_request(changed, stream=True), "other", None)
    expected = {"temperature": 0.1, "top_p": 0.9} | ({"max_tokens": 100} if name == "anthropic" else {})
    assert again.sampling == expected  # Anthropic requires a limit
    assert (again.model, again.messages) == ("other", request.messages)
    assert body == request_body(name), "the agent's body is unchanged"


def test_max_completion_tokens_keeps_its_name() -> None:
    chat = DIALECTS["openai-chat"]
    request = chat.parse_request({"model": "m", "messages": [], "max_completion_tokens": 5})
    assert request.sampling == {"max_tokens": 5}
    body = chat.render_request(replace(request, sampling={"max_tokens": 9}), stream=False)
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body


def test_tool_results_with_images_become_messages_of_the_user_in_chat() -> None:
    anthropic = request_body("anthropic")
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}}
    anthropic["messages"][2]["content"][0]["content"] = [{"type": "text", "text": "a b"}, image]
    body = DIALECTS["openai-chat"].render_request(parsed("anthropic", anthropic), stream=False)
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "tool", "user", "user"]
    assert body["messages"][5]["content"] == [{"type": "image_url", "image_url": {"url": DATA_URL}}]


def test_custom_tools_of_responses_become_functions_with_one_text_and_back() -> None:
    body = {"model": "m", "tools": [{"type": "custom", "name": "patch", "description": "Apply"}], "input": [
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"}]}  # fmt: skip
    request = parsed("openai-responses", body)
    chat = DIALECTS["openai-chat"].render_request(request, stream=False)
    assert chat["tools"][0]["function"]["parameters"]["required"] == ["input"]
    assert chat["messages"][0]["tool_calls"][0]["function"]["arguments"] == '{"input":"*** Begin"}'
    answer = Message("assistant", (ToolCall("c2", "patch", '{"input":"*** End"}'),))
    response = ModelResponse("r", "m", answer, "tool_calls")
    rendered = DIALECTS["openai-responses"].render_response(response, request)
    assert {k: rendered["output"][0][k] for k in ("type", "call_id", "name", "input")} == {
        "type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** End"}  # fmt: skip
    stream = DIALECTS["openai-responses"].stream_renderer(request)
    data = stream.begin() + stream.end(response)
    assert b"response.custom_tool_call_input.done" in data
    assert parsed_stream("openai-responses", data)[1].message == answer


def test_reasoning_with_signatures_survives_other_dialects() -> None:
    thinking = [{"type": "thinking", "thinking": "T", "signature": "S"}, {"type": "redacted_thinking", "data": "D"},
                {"type": "text", "text": "x"}]  # fmt: skip
    body = {**response_body("anthropic"), "content": thinking}
    response = DIALECTS["anthropic"].parse_response(body)
    agent = parsed("openai-responses", {"model": "m", "input": "hi"})
    rendered = DIALECTS["openai-responses"].render_response(response, agent)
    assert [item.get("encrypted_content") for item in rendered["output"]] == ["S", "redacted:D", None]
    back = parsed("openai-responses", {"model": "m", "input": [{"role": "user", "content": "hi"}, *rendered["output"]]})
    upstream = DIALECTS["anthropic"].render_request(back, stream=False)
    assert upstream["messages"][1]["content"] == thinking
    gemini = {"contents": [{"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}},
                                                        "thoughtSignature": "sig"}]}]}  # fmt: skip
    chat = DIALECTS["openai-chat"].render_request(parsed("gemini", gemini), stream=False)
    call = parsed("openai-chat", chat).messages[0].parts[0]
    assert call == ToolCall("call_0", "f", "{}", "sig")


def test_gemini_calls_without_ids_are_matched_with_their_results() -> None:
    call, result = {"functionCall": {"name": "f", "args": {}}}, {"name": "f", "response": {"output": "x"}}
    body = {"contents": [
        {"role": "model", "parts": [call, call]},
        {"role": "user", "parts": [{"functionResponse": result},
                                   {"functionResponse": {**result, "response": {"error": "no"}}}]},
        {"role": "model", "parts": [call]},
        {"role": "user", "parts": [{"functionResponse": {**result, "id": "made-by-the-agent"}}]}]}  # fmt: skip
    first, results, second, last = parsed("gemini", body).messages
    assert [part.id for part in (*first.parts, *second.parts)] == ["call_0", "call_1", "call_2"]  # type: ignore[union-attr]
    assert [(part.call_id, part.is_error) for part in (*results.parts, *last.parts)] == [  # type: ignore[union-attr]
        ("call_0", False), ("call_1", True), ("call_2", False)]  # fmt: skip


def test_schemas_of_gemini_become_json_schemas() -> None:
    schema = {"type": "OBJECT", "properties": {
        "type": {"type": "STRING", "nullable": True, "enum": ["A"]},
        "nullable": {"type": "ARRAY", "items": {"type": "INTEGER"}}}}  # fmt: skip
    body = {"contents": [], "tools": [{"functionDeclarations": [{"name": "f", "parameters": schema}]}]}
    assert parsed("gemini", body).tools[0].parameters == {"type": "object", "properties": {
        "type": {"type": ["string", "null"], "enum": ["A"]},
        "nullable": {"type": "array", "items": {"type": "integer"}},
    }}  # fmt: skip


def test_count_tokens_of_gemini_accepts_a_whole_request() -> None:
    inner = {**request_body("gemini"), "model": "models/m"}
    request = DIALECTS["gemini"].parse_request({"generateContentRequest": inner}, None, None)
    assert request.model == "m" and comparable(request.messages) == EXPECTED
    assert DIALECTS["gemini"].count_tokens(request) > 1000  # with an image


# ---- refusals of conversions ----

REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("openai-chat", {"messages": [], "n": 2}, "anthropic", "several choices"),
    ("openai-chat", {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f1"}}]}]},
     "gemini", "'file'"),
    ("openai-chat", {"messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]}]}, "anthropic", "audio"),
    ("openai-chat", {"messages": [], "response_format": {"type": "json_object"}}, "anthropic", "json_object"),
    ("openai-chat", {"messages": [], "stop": ["x"]}, "openai-responses", "stop sequences"),
    ("openai-responses", {"input": "x", "previous_response_id": "resp_1"}, "openai-chat", "previous_response_id"),
    ("openai-responses", {"input": [{"type": "web_search_call", "id": "w"}]}, "anthropic", "web_search_call"),
    ("openai-responses", {"input": "x", "tools": [{"type": "local_shell"}]}, "openai-chat", "local_shell"),
    ("openai-responses", {"input": "x", "tools": [{"type": "web_search"}], "tool_choice": "required"}, "openai-chat",
     "required tool"),
    ("anthropic", {"messages": [], "tools": [{"type": "bash_20250124", "name": "bash"}]}, "openai-chat", "'bash'"),
    ("anthropic", {"messages": [{"role": "assistant", "content": [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}]}]}, "openai-chat",
     "server_tool_use"),
    ("anthropic", {"messages": [], "mcp_servers": [{"url": "x"}]}, "gemini", "mcp_servers"),
    ("gemini", {"contents": [], "cachedContent": "c"}, "openai-chat", "cachedContent"),
    ("gemini", {"contents": [{"parts": [{"executableCode": {"code": "1"}}]}]}, "anthropic", "executableCode"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "body", "target", "reason"), REFUSED)
def test_what_has_no_form_in_another_dialect_is_refused_with_its_name(
    source: str, body: dict[str, Any], target: str, reason: str
) -> None:
    request = DIALECTS[source].parse_request(body, "m", None)
    same = DIALECTS[source].render_request(request, stream=False)
    assert {key: same[key] for key in body} == body, "the same dialect passes it"
    with pytest.raises(DialectError, match=reason):
        DIALECTS[target].render_request(request, stream=False)


def test_tools_that_the_provider_runs_are_left_out() -> None:
    request = parsed("openai-responses", request_body("openai-responses"))
    assert [tool.kind for tool in request.tools] == ["function", "provider"]
    body = DIALECTS["anthropic"].render_request(request, stream=False)
    assert [tool["name"] for tool in body["tools"]] == ["bash"]


# ---- responses ----


@pytest.mark.parametrize("name", NAMES)
def test_a_response_is_parsed_to_the_same_internal_form(name: str) -> None:
    response = answered(name)
    assert comparable((response.message,)) == (Message("assistant", ANSWER),)
    assert (response.id, response.model, response.finish_reason) == ("r1", "m", "tool_calls")
    assert response.usage == Usage(prompt=20, completion=7, cached=4)


@pytest.mark.parametrize(("upstream", "agent"), PAIRS)
def test_a_response_is_converted_whole_and_as_a_stream(upstream: str, agent: str) -> None:
    request = parsed(agent, request_body(agent))
    if agent == "openai-chat":
        request = replace(request, raw={**request.raw, "stream_options": {"include_usage": True}})
    response = answered(upstream)
    body = DIALECTS[agent].render_response(response, request)
    if upstream == agent:
        assert body == response_body(agent)
    renderer = DIALECTS[agent].stream_renderer(request)
    _, streamed = parsed_stream(agent, renderer.begin() + renderer.end(response))
    for found in (DIALECTS[agent].parse_response(json.loads(json.dumps(body))), streamed):
        assert comparable((found.message,)) == (Message("assistant", ANSWER),)
        assert (found.id, found.model, found.finish_reason) == ("r1", "m", "tool_calls")
        assert found.usage == Usage(prompt=20, completion=7, cached=4)


@pytest.mark.parametrize(("upstream", "agent"), PAIRS)
@pytest.mark.parametrize("portion", [1, 10_000])
def test_a_stream_is_converted_as_it_arrives(upstream: str, agent: str, portion: int) -> None:
    options = {"model": "m", "messages": [], "stream_options": {"include_usage": True}}
    source = DIALECTS[upstream].stream_renderer(parsed("openai-chat", options))
    data = source.begin() + source.end(replace(answered(upstream), raw=None))
    deltas, whole = parsed_stream(upstream, data, portion)
    assert [delta.kind for delta in deltas if delta.kind not in ("signature",)] == [
        "start", "reasoning", "text", "tool", "arguments", "tool", "arguments"]  # fmt: skip
    request = parsed(agent, {**request_body(agent), "stream_options": {"include_usage": True}})
    renderer = DIALECTS[agent].stream_renderer(request)
    parts = [renderer.begin(), *map(renderer.feed, deltas)]
    assert any(parts[1:4]), "the text is sent before the end"
    _, found = parsed_stream(agent, b"".join(parts) + renderer.end(whole), portion)
    assert comparable((found.message,)) == (Message("assistant", ANSWER),)
    assert (found.id, found.model, found.finish_reason) == ("r1", "m", "tool_calls")
    assert found.usage == Usage(prompt=20, completion=7, cached=4)


def chunks(*deltas: dict[str, Any], finish: str | None = "tool_calls") -> bytes:
    rows = [{"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            for delta in deltas]  # fmt: skip
    rows.append({"id": "c", "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return b"".join(b"data: " + orjson.dumps(row) + b"\n\n" for row in rows)


@pytest.mark.parametrize("agent", NAMES)
def test_interleaved_fragments_of_parallel_calls_stay_apart(agent: str) -> None:
    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        row = {"index": index, "function": {"arguments": arguments, **({"name": more.pop("name")} if more else {})}}
        return {"tool_calls": [{**row, **more}]}

    data = chunks(
        {"role": "assistant", "content": "Now"}, call(0, "", name="f", id="c1"), call(1, "", name="g", id="c2"),
        call(0, '{"a"'), call(1, '{"b"'), call(0, ":1}"), call(1, ":2}"), {"content": " and"},
    )  # fmt: skip
    deltas, whole = parsed_stream("openai-chat", data)
    renderer = DIALECTS[agent].stream_renderer(parsed(agent, request_body(agent)))
    _, found = parsed_stream(agent, b"".join(map(renderer.feed, deltas)) + renderer.end(whole))
    assert [part for part in found.message.parts if isinstance(part, ToolCall)] == [
        ToolCall("c1", "f", '{"a":1}'), ToolCall("c2", "g", '{"b":2}')]  # fmt: skip
    assert "".join(part.text for part in found.message.parts if isinstance(part, Text)) == "Now and"


@pytest.mark.parametrize("agent", NAMES)
@pytest.mark.parametrize(("arguments", "expected"), [("", "{}"), ('{"a": tru', '{"a": tru')])
def test_arguments_that_are_empty_or_no_json_reach_the_agent(agent: str, arguments: str, expected: str) -> None:
    body = response_body("openai-chat")
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]}  # fmt: skip
    response = DIALECTS["openai-chat"].parse_response(body)
    if agent == "openai-chat":
        response = replace(response, raw=None)
    rendered = DIALECTS[agent].render_response(response, parsed(agent, request_body(agent)))
    assert DIALECTS[agent].parse_response(rendered).message.parts == (ToolCall("c", "f", expected),)


# Reasons to end a response, in each dialect.
ENDS = {
    "length": {"openai-chat": "length", "anthropic": "max_tokens", "gemini": "MAX_TOKENS"},
    "stop": {"openai-chat": "stop", "anthropic": "end_turn", "gemini": "STOP"},
    "refusal": {"openai-chat": "content_filter", "anthropic": "refusal", "gemini": "SAFETY"},
}


@pytest.mark.parametrize("finish", ENDS)
@pytest.mark.parametrize("agent", NAMES)
def test_the_reason_of_the_end_is_converted(agent: str, finish: Any) -> None:
    response = ModelResponse("r", "m", Message("assistant", (Text("x"),)), finish)
    body = DIALECTS[agent].render_response(response, parsed(agent, request_body(agent)))
    given = {"openai-chat": lambda: body["choices"][0]["finish_reason"], "anthropic": lambda: body["stop_reason"],
             "gemini": lambda: body["candidates"][0]["finishReason"],
             "openai-responses": lambda: (body["status"], body["incomplete_details"])}[agent]()  # fmt: skip
    if agent == "openai-responses":
        expected = {"length": ("incomplete", {"reason": "max_output_tokens"})}.get(finish, ("completed", None))
        assert given == expected
    else:
        assert given == ENDS[finish][agent]


def test_refusals_and_blocked_prompts_are_recognized() -> None:
    chat = response_body("openai-chat")
    chat["choices"][0] = {"finish_reason": "stop", "message": {"content": None, "refusal": "No."}}
    found = DIALECTS["openai-chat"].parse_response(chat)
    assert (found.finish_reason, found.message.parts) == ("refusal", (Refusal("No."),))
    rendered = DIALECTS["openai-responses"].render_response(found, parsed("openai-responses", {"input": "x"}))
    assert rendered["output"][0]["content"] == [{"type": "refusal", "refusal": "No."}]
    assert DIALECTS["openai-responses"].parse_response(rendered).finish_reason == "refusal"
    anthropic = DIALECTS["anthropic"].render_response(found, parsed("anthropic", {"messages": []}))
    assert (anthropic["stop_reason"], anthropic["content"]) == ("refusal", [{"type": "text", "text": "No."}])
    blocked = DIALECTS["gemini"].parse_response({"promptFeedback": {"blockReason": "SAFETY"}, "responseId": "r"})
    assert (blocked.finish_reason, blocked.message.parts) == ("content_filter", ())


# ---- truncated and failed streams ----


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_ends_early_is_truncated(name: str) -> None:
    renderer = DIALECTS[name].stream_renderer(parsed(name, request_body(name)))
    deltas, _ = parsed_stream("openai-chat", chunks({"content": "Hello"}, {"content": " world"}, finish="stop"))
    data = b"".join(map(renderer.feed, deltas))
    ending = renderer.end(ModelResponse("r", "m", Message("assistant", (Text("Hello world"),)), "stop"))
    parsed_stream(name, data + ending)
    with pytest.raises(Truncated):
        parsed_stream(name, data)
    events = SSEParser().feed(ending)
    last = next(place for place in range(len(events), 0, -1) if any(
        mark in events[place - 1].data for mark in ('"finish_reason":"stop"', "response.completed", "message_stop",
                                                    '"finishReason"')))  # fmt: skip
    parser = DIALECTS[name].stream_parser()
    for event in [*SSEParser().feed(data), *events[: last - 1]]:
        parser.feed(event)
    with pytest.raises(Truncated):
        parser.finish()


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_a_stream_is_recognized_and_is_no_complete_response(name: str) -> None:
    renderer = DIALECTS[name].stream_renderer(parsed(name, request_body(name)))
    deltas, _ = parsed_stream("openai-chat", chunks({"content": "Hello"}, finish="stop"))
    data = b"".join(map(renderer.feed, deltas)) + renderer.error("upstream", "the upstream broke")
    with pytest.raises(DialectError, match="the upstream broke"):
        parsed_stream(name, data)


ERRORS = ["budget", "bad_request", "unauthorized", "ended", "upstream", "overloaded", "timeout", "unsupported"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_has_the_shape_of_the_dialect(name: str, kind: Any) -> None:
    status, body = DIALECTS[name].render_error(kind, "why")
    error = body["error"]
    assert error["message"] == "why"
    final = kind not in ("upstream", "overloaded", "timeout")
    assert (400 <= status < 500 and status not in (408, 409, 429)) if final else status >= 500
    assert error["status" if name == "gemini" else "type"]
    assert body.get("type") == ("error" if name == "anthropic" else None)
    with pytest.raises(DialectError, match="why"):
        DIALECTS[name].parse_response(body)


# ---- token ids ----


def with_tokens() -> dict[str, Any]:
    body = response_body("openai-chat")
    body["prompt_token_ids"] = [1, 2, 3]
    logs = [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []}, {"token": "b", "logprob": -0.25}]
    body["choices"][0] |= {"token_ids": [4, 5], "logprobs": {"content": logs}}
    return body


@pytest.mark.parametrize("form", ["vllm", "sglang", "sglang-meta"])
def test_token_ids_and_logprobs_are_recorded_and_hidden_from_the_agent(form: str) -> None:
    body, chat = with_tokens(), DIALECTS["openai-chat"]
    choice = body["choices"][0]
    if form != "vllm":
        choice["prompt_token_ids"] = body.pop("prompt_token_ids")
    if form == "sglang-meta":
        del choice["token_ids"], choice["logprobs"]
        choice["meta_info"] = {"output_token_logprobs": [[-0.5, 4, "a"], [-0.25, 5, "b"]]}
        body["metadata"] = {"weight_version": "step-7"}
    response = chat.parse_response(body)
    assert response.prompt_token_ids == [1, 2, 3]
    assert (response.token_ids, response.logprobs) == ([4, 5], [-0.5, -0.25])
    assert response.weight_version == ("step-7" if form == "sglang-meta" else None)
    expected = response_body("openai-chat") | ({"metadata": body["metadata"]} if form == "sglang-meta" else {})
    assert chat.strip_token_fields(body) == expected
    assert chat.render_response(response, parsed("openai-chat", request_body("openai-chat"))) == expected
    own = parsed("openai-chat", {**request_body("openai-chat"), "logprobs": True})
    assert ("logprobs" in chat.strip_token_fields(body, own)["choices"][0]) == (form != "sglang-meta")


def test_token_ids_of_a_stream_are_joined() -> None:
    rows: list[dict[str, Any]] = [
        {"id": "c", "model": "m", "prompt_token_ids": [1, 2], "choices": [{"index": 0, "delta": {"content": ""}}]},
        *({"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "token_ids": ids, "logprobs": {
            "content": [{"token": "t", "logprob": -0.5} for _ in ids]}}]} for text, ids in (("a", [3]), ("b", [4, 5]))),
        {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "token_ids": [6], "logprobs": {
            "content": [{"token": "e", "logprob": -1.0}]}}], "usage": {"prompt_tokens": 2, "completion_tokens": 4}},
    ]  # fmt: skip
    chat, parser = DIALECTS["openai-chat"], DIALECTS["openai-chat"].stream_parser()
    for row in rows:
        parser.feed(SSEEvent("", orjson.dumps(row).decode()))
        kept = chat.strip_token_fields(row)
        assert "prompt_token_ids" not in kept and not {"token_ids", "logprobs"} & set(kept["choices"][0])
    found = parser.finish()
    assert (found.prompt_token_ids, found.token_ids) == ([1, 2], [3, 4, 5, 6])
    assert found.logprobs == [-0.5, -0.5, -0.5, -1.0]
    assert found.usage.completion == 4


@pytest.mark.parametrize("wrong", [["4", 5], [4.5, 5], [True, 5], "45", [-1, 5], [1 << 40]])
def test_wrong_token_ids_are_refused(wrong: Any) -> None:
    body = with_tokens()
    body["choices"][0]["token_ids"] = wrong
    with pytest.raises(DialectError, match="token ids"):
        DIALECTS["openai-chat"].parse_response(body)


def test_logprobs_of_another_number_than_ids_are_left_out() -> None:
    body = with_tokens()
    body["choices"][0]["token_ids"] = [4, 5, 6]
    response = DIALECTS["openai-chat"].parse_response(body)
    assert (response.token_ids, response.logprobs) == ([4, 5, 6], None)


@pytest.mark.parametrize("name", NAMES)
def test_token_fields_are_requested(name: str) -> None:
    body = DIALECTS[name].render_request(parsed(name, request_body(name)), stream=False, token_fields=True)
    if name == "openai-chat":
        assert body["logprobs"] is True and body["return_token_ids"] is True
    elif name == "gemini":
        assert body["generationConfig"]["responseLogprobs"] is True


def test_token_ids_of_gemini() -> None:
    body = response_body("gemini")
    body["candidates"][0] |= {"avgLogprobs": -0.3, "logprobsResult": {"chosenCandidates": [
        {"token": "a", "tokenId": 4, "logProbability": -0.5}]}}  # fmt: skip
    found = DIALECTS["gemini"].parse_response(body)
    assert (found.token_ids, found.logprobs) == ([4], [-0.5])
    assert DIALECTS["gemini"].strip_token_fields(body) == response_body("gemini")


# ---- hostile input ----

DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"x": DEEP}
WRONG: list[tuple[str, dict[str, Any]]] = [
    *((name, {"model": "m"}) for name in NAMES),
    *((name, {**request_body(name), "model": []}) for name in NAMES if name != "gemini"),
    *((name, {**request_body(name), "x": DEEP}) for name in NAMES),
    ("openai-chat", {"messages": {}}), ("openai-chat", {"messages": ["x"]}),
    ("openai-chat", {"messages": [{"role": "root", "content": "x"}]}),
    ("openai-chat", {"messages": [], "tools": "x"}), ("openai-chat", {"messages": [], "max_tokens": "many"}),
    ("openai-chat", {"messages": [], "model": "x" * 1000}),
    ("openai-chat", {"messages": [{"role": "user", "content": "x"}] * 20_001}),
    ("openai-chat", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
    ("openai-responses", {"input": 5}), ("openai-responses", {"input": [{"type": "function_call"}]}),
    ("anthropic", {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}),
    ("anthropic", {"messages": [{"role": "user", "content": [[]]}]}),
    ("gemini", {"contents": [{"parts": [{"functionCall": {"args": {}, "name": 5}}]}]}),
    ("gemini", {"contents": [{"role": "root", "parts": []}]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body"), WRONG)
def test_wrong_requests_are_refused_with_the_field(name: str, body: dict[str, Any]) -> None:
    with pytest.raises(DialectError):
        DIALECTS[name].parse_request(copy.deepcopy(body), None, None)


def test_unknown_parts_pass_in_their_dialect() -> None:
    part = {"type": "container_upload", "file_id": "f"}
    request = parsed("anthropic", {"messages": [{"role": "user", "content": [part]}]})
    assert request.messages[0].parts == (Other("anthropic", "container_upload", part),)


def test_a_model_name_cannot_change_the_path() -> None:
    path = DIALECTS["gemini"].upstream_path("../../v1/x?y#z", True)
    assert path == "/v1beta/models/..%2F..%2Fv1%2Fx%3Fy%23z:streamGenerateContent?alt=sse"


# ---- server-sent events ----


@pytest.mark.parametrize("portion", [1, 2, 3, 100])
def test_events_of_any_portions_and_line_ends(portion: int) -> None:
    data = ("event: a\r\ndata: 1\r\ndata:2\r\n\r\n: comment\n\ndata: \u00e4\r\rid: 7\nretry: 5\n\nevent: empty\n\n"
            "data: last\n\n").encode()  # fmt: skip
    parser, found = SSEParser(), list[SSEEvent]()
    for start in range(0, len(data), portion):
        found += parser.feed(data[start : start + portion])
    assert found == [SSEEvent("a", "1\n2"), SSEEvent("", "\u00e4"), SSEEvent("", "last")]
    assert not parser.rest and [SSEParser().feed(event.render()) for event in found] == [[event] for event in found]


def test_an_event_over_the_limit_is_an_error() -> None:
    for data in (b"data: " + b"x" * 100, b"data: xxxxxxxxxx\n" * 20):
        parser = SSEParser(limit=50)
        with pytest.raises(SSEError):
            parser.feed(data)
