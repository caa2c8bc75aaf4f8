"""Lone surrogates in the gateway, over HTTP: a text that UTF-8 cannot express is refused, and is never a 500."""

from __future__ import annotations

import copy
import http.client
import json
from typing import Any

import pytest

from rock.sync import Client
from tests.conftest import RunningServer
from tests.gateway.bodies import NAMES, request_body
from tests.gateway.conftest import FakeUpstream, chat, chat_body, http_raw

LONE = "cut \ud83d"
ESCAPED = '{"cmd": "\\ud83d"}'  # JSON text within a text: valid outside, and with a lone surrogate inside
PATHS = {"openai-chat": "/v1/chat/completions", "openai-responses": "/v1/responses", "anthropic": "/v1/messages"}
COUNTS = {"anthropic": "/v1/messages/count_tokens", "gemini": "/v1beta/models/m:countTokens"}


def replaced(value: Any, text: str) -> Any:
    """The body with each prompt, and the arguments of each tool call, replaced by a text."""
    if isinstance(value, dict):
        return {key: text if key in ("text", "content", "arguments", "output", "instructions")
                and isinstance(inner, str) else replaced(inner, text) for key, inner in value.items()}  # fmt: skip
    return [replaced(inner, text) for inner in value] if isinstance(value, list) else value


def address(name: str, stream: bool) -> str:
    if name == "gemini":
        return "/v1beta/models/m:" + ("streamGenerateContent" if stream else "generateContent")
    return PATHS[name]


def post(run: Any, path: str, body: Any) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, found, _ = http_raw("POST", f"{run.base_url}{path}", data, {"authorization": f"Bearer {run.api_key}"})
    return status, found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", NAMES)
def test_requests(server: RunningServer, upstream: FakeUpstream, name: str, stream: bool) -> None:
    """Refused in the shape of the dialect, and not recorded. JSON text in a text is a call like others."""
    with Client(server.url) as client:
        client.upstreams.put("lone", upstream.url)
        run = client.runs.create(upstream="lone")
        body = copy.deepcopy(request_body(name))
        if name != "gemini":
            body["stream"] = stream
        bad = replaced(body, LONE)
        paths = [address(name, stream), *([COUNTS[name]] if name in COUNTS else [])]
        raw = json.dumps(body, ensure_ascii=False).encode().replace(b"Go on.", b"\xed\xa0\xbd")
        for path in paths:
            for wrong in (bad, raw):
                status, data = post(run, path, wrong)
                assert status == 400 and b"not JSON" in data and isinstance(json.loads(data)["error"], dict), data
        if name == "gemini":
            for path in ("/v1beta/models/%ED%A0%BD:generateContent", "/v1beta/models/%ff:countTokens"):
                assert post(run, path, body)[0] in (200, 400, 404, 502)
            return
        assert run.calls() == []
        text = replaced(body, ESCAPED)
        for path in paths:
            status, data = post(run, path, text)
            assert status in (200, 400), data  # 400: the arguments of a tool call have no form for this upstream
        run.end()
        for kind in ("atif", "openai", "rock", "chains"):
            assert run.trajectory(kind) is not None
        done = run.refresh().counts.done
        for by in ("order", "prefix"):
            again = client.runs.create(replay={"run": run.id, "by": by})
            assert post(again, paths[0], text)[0] == (200 if done else 400)
        client.upstreams.delete("lone")


def test_responses_of_upstreams(server: RunningServer, upstream: FakeUpstream) -> None:
    with Client(server.url) as client:
        client.upstreams.put("lone", upstream.url, retries=0)
        run = client.runs.create(upstream="lone")
        for stream in (False, True):
            for name, path in PATHS.items():
                body = {**request_body(name), "stream": stream, "model": f"{name}{stream}"}
                upstream.plan({"text": LONE})
                try:
                    status, data = post(run, path, body)
                    assert status == 502 and isinstance(json.loads(data)["error"], dict), data
                except (http.client.IncompleteRead, ConnectionError):
                    assert stream
                upstream.plan({"tool": ["bash", ESCAPED]})
                try:
                    status, data = post(run, path, body)
                    assert status in (200, 502), data
                except (http.client.IncompleteRead, ConnectionError):
                    assert stream
        states = [call.state for call in run.calls()]
        assert len(states) == 12 and "failed" in states and "running" not in states
        for kind in ("atif", "openai", "rock", "chains"):
            assert run.trajectory(kind) is not None
        client.upstreams.delete("lone")


def test_the_api_of_runs(server: RunningServer) -> None:
    """Recorded calls of a replay, answers of pull mode, tags and rewards with lone surrogates are refused."""

    def send(method: str, path: str, body: Any) -> tuple[int, bytes]:
        status, data, _ = http_raw(method, f"{server.url}{path}", json.dumps(body).encode())
        return status, data

    response = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}]}  # fmt: skip
    record = {"request": chat_body("a"), "response": response}
    with Client(server.url) as client:
        run = client.runs.create(pull=True)
        for method, path, body in (
            ("POST", "/v1/runs", {"replay": {"by": "prefix", "records": [replaced(record, LONE)]}}),
            ("POST", "/v1/runs", {"pull": True, "tags": {"a": LONE}}),
            ("POST", f"/v1/runs/{run.id}/calls/1", {"text": LONE}),
            ("POST", f"/v1/runs/{run.id}/end", {"reason": LONE}),
            ("PATCH", f"/v1/runs/{run.id}", {"tags": {"a": LONE}}),
        ):
            status, data = send(method, path, body)
            assert 400 <= status < 500 and status not in (401, 403), (path, data)
        escaped = client.runs.create(replay={"by": "prefix", "records": [replaced(record, ESCAPED)]})
        assert chat({"base_url": escaped.base_url, "api_key": escaped.api_key}, chat_body(ESCAPED))[0] == 200
        run.delete(force=True)
        escaped.delete(force=True)
