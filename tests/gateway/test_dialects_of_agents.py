"""Calls of agents in each dialect, with and without streams, to upstreams of each dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rock.sync import Client
from rock.sync.sandbox.runs import Run
from tests.conftest import RunningServer
from tests.gateway.conftest import FakeUpstream, http_raw

DIALECTS = ("openai-chat", "openai-responses", "anthropic", "gemini")
TOOL = {"type": "object", "properties": {"command": {"type": "string"}}}


def request_of(dialect: str, text: str, stream: bool) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request with one tool, as agents of the dialect send it."""
    if dialect == "openai-chat":
        tools: list[Any] = [{"type": "function", "function": {"name": "bash", "parameters": TOOL}}]
        return "/v1/chat/completions", {"model": "m", "stream": stream, "tools": tools,
                                        "messages": [{"role": "user", "content": text}]}  # fmt: skip
    if dialect == "openai-responses":
        tools = [{"type": "function", "name": "bash", "parameters": TOOL, "strict": False}]
        return "/v1/responses", {"model": "m", "stream": stream, "tools": tools, "store": False, "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}]}  # fmt: skip
    if dialect == "anthropic":
        tools = [{"name": "bash", "input_schema": TOOL}]
        return "/v1/messages?beta=true", {"model": "m", "stream": stream, "max_tokens": 100, "tools": tools,
                                          "messages": [{"role": "user", "content": text}]}  # fmt: skip
    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    tools = [{"functionDeclarations": [{"name": "bash", "parametersJsonSchema": TOOL}]}]
    return f"/v1beta/models/m:{verb}", {"contents": [{"role": "user", "parts": [{"text": text}]}], "tools": tools}


def ask(run: Run, dialect: str, text: str, stream: bool) -> tuple[int, str]:
    path, body = request_of(dialect, text, stream)
    key = run.api_key or ""
    header = {"anthropic": {"x-api-key": key}, "gemini": {"x-goog-api-key": key}}
    given = header.get(dialect, {"authorization": f"Bearer {key}"})
    status, data, headers = http_raw("POST", run.base_url + path, json.dumps(body).encode(), given)
    assert status != 200 or ("event-stream" in headers["content-type"]) == stream
    return status, data.decode()


@pytest.mark.parametrize("agent", DIALECTS)
@pytest.mark.parametrize("model", DIALECTS)
def test_each_pair_of_dialects(server: RunningServer, upstream: FakeUpstream, agent: str, model: str) -> None:
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url, dialect=model, key="sk-of-the-upstream", retries=0)
        run = client.runs.create(upstream="fake")
        for stream in (False, True):
            status, text = ask(run, agent, "hello", stream)
            assert status == 200 and "rep" in text and "ly " in text, text  # a stream may divide it
            upstream.plan({"tool": ["bash", '{"command": "ls"}']})
            status, text = ask(run, agent, "call the tool", stream)
            assert status == 200 and "bash" in text and "ls" in text, text
        calls = run.calls()
        assert [call.state for call in calls] == ["done"] * 4 and {call.dialect for call in calls} == {agent}
        assert all(call.usage.prompt == 10 and call.usage.completion == 5 for call in calls)
        for call in run.calls(dialect="openai-chat"):
            assert call.request and call.request["messages"][-1]["role"] == "user"
        run.delete(force=True)
        client.upstreams.delete("fake")
        assert "sk-of-the-upstream" in json.dumps(upstream.seen()[0]["headers"])
        assert (run.api_key or "x") not in json.dumps(upstream.seen())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_errors_in_each_dialect(server: RunningServer, upstream: FakeUpstream, dialect: str) -> None:
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url, retries=0)
        run = client.runs.create(upstream="fake", budget={"calls": 1})
        assert ask(run, dialect, "a", False)[0] == 200
        for stream in (False, True):
            status, text = ask(run, dialect, "b", stream)
            error = json.loads(text)["error"]
            assert status in (400, 403, 429) and "budget" in error["message"], text
        run.end()
        assert ask(run, dialect, "c", True)[0] in (400, 403)
        run.delete()
        client.upstreams.delete("fake")


def test_count_tokens(server: RunningServer) -> None:
    with Client(server.url) as client, client.runs.create(pull=True) as run:
        _, body = request_of("anthropic", "hello " * 100, False)
        status, data, _ = http_raw("POST", run.base_url + "/v1/messages/count_tokens", json.dumps(body).encode(),
                                   {"x-api-key": run.api_key or ""})
        assert status == 200 and json.loads(data)["input_tokens"] > 20 and run.refresh().counts.calls == 0
    run.delete()
