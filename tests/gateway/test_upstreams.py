"""Faults of an upstream, budgets, retries and disconnects, over a real server and real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from rock.errors import InvalidConfig, NotFound
from rock.sync import Client
from rock.sync.sandbox.runs import Run
from tests.conftest import RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body, http_json, http_raw
from tests.waiting import until

SECRET = "sk-upstream-secret-1234"


@pytest.fixture
def client(server: RunningServer, upstream: FakeUpstream) -> Iterator[Client]:
    with Client(server.url) as made:
        made.upstreams.put("fake", upstream.url, key=SECRET, retries=2, backoff=0.01, timeout=1.0)
        yield made
        for info in made.runs.list():
            made.runs.get(info.id).delete(force=True)
        for row in made.upstreams.list():
            made.upstreams.delete(row.name)


def address(run: Run) -> dict[str, Any]:
    return {"base_url": run.base_url, "api_key": run.api_key}


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_byte_are_retried(client: Client, upstream: FakeUpstream, stream: bool) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan({"status": 429, "headers": {"retry-after": "0"}}, {"status": 500})
    status, _, _ = chat(address(run), chat_body("a", stream=stream))
    (call,) = run.calls()
    assert status == 200 and call.attempts == 3 and call.state == "done" and run.refresh().counts.done == 1


def test_an_upstream_that_stays_broken(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake", budget={"calls": 1})
    upstream.plan(*[{"status": 503, "body": {"error": {"message": "busy"}}, "headers": {"retry-after": "0"}}] * 3)
    status, body, _ = chat(address(run), chat_body("a"))
    assert status == 503 and body == {"error": {"message": "busy"}}
    upstream.plan({"status": 400, "body": {"error": {"message": f"wrong, key {SECRET}"}}})
    status, body, _ = chat(address(run), chat_body("a"))
    assert status == 400 and body["error"]["message"] == "wrong, key ***"
    upstream.plan({"status": 401, "body": {"error": {"message": f"wrong key {SECRET[:9]}"}}})
    status, body, _ = chat(address(run), chat_body("a"))
    assert status == 502 and SECRET[:9] not in json.dumps(body)
    calls = run.calls()
    assert [call.state for call in calls] == ["failed"] * 3 and [call.attempts for call in calls] == [3, 1, 1]
    assert calls[1].retry_of == 1 and calls[2].retry_of == 2
    assert chat(address(run), chat_body("a"))[0] == 200  # failed calls do not count
    status, body, headers = chat(address(run), chat_body("b"))
    assert status == 400 and "budget" in body["error"]["message"] and headers["x-should-retry"] == "false"
    assert run.refresh().left.calls == 0 and run.info.counts.refused == 1


@pytest.mark.parametrize("plan", [{"malformed": True}, {"truncate": True}], ids=["malformed", "truncated"])
def test_a_broken_response_is_not_recorded_as_one(client: Client, upstream: FakeUpstream, plan: dict[str, Any]) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan(plan)
    assert chat(address(run), chat_body("a"))[0] == 502
    upstream.plan(plan)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        chat(address(run), chat_body("a", stream=True))
    one, two = run.calls()
    assert one.state == two.state == "failed" and one.response is None and two.response is None
    assert chat(address(run), chat_body("a", stream=True))[0] == 200
    assert run.calls()[2].retry_of == 2


@pytest.mark.parametrize("wanted", [None, False, True], ids=["no option", "false", "true"])
@pytest.mark.parametrize("agent", ["openai-chat", "anthropic"])
def test_a_stream_that_is_cut_before_its_usage(
    client: Client, upstream: FakeUpstream, agent: str, wanted: bool | None
) -> None:
    """The finish_reason alone is no complete answer: its tokens would be missing in the budget."""
    options = {} if wanted is None else {"stream_options": {"include_usage": wanted}}
    body = chat_body("a", stream=True, **(options if agent == "openai-chat" else {"max_tokens": 9}))
    path = "/v1/chat/completions" if agent == "openai-chat" else "/v1/messages"
    run = client.runs.create(upstream="fake", budget={"tokens": 30})

    def ask() -> bytes:
        given = {"authorization": f"Bearer {run.api_key}"}
        status, data, _ = http_raw("POST", f"{run.base_url}{path}", json.dumps(body).encode(), given)
        return data if status == 200 else b""

    upstream.plan({"cut": 2})  # usage and [DONE]
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        ask()
    (call,) = run.calls()
    assert call.state == "failed" and call.response is None and "before the usage" in (call.error or "")
    upstream.plan({"cut": 1}, {"no_usage": True})  # only [DONE], or only the usage, is missing
    for _ in range(2):
        data = ask()
        assert data
        body["messages"].append({"role": "user", "content": "more"})
    assert [call.state for call in run.calls()] == ["failed", "done", "done"]
    assert all(seen["body"]["stream_options"]["include_usage"] is True for seen in upstream.seen())
    assert run.refresh().counts.prompt_tokens == 10 and run.info.left.tokens == 15
    assert (b'"usage"' in data) == (agent == "anthropic")
    data = ask()
    assert agent != "openai-chat" or (b'"prompt_tokens"' in data) == bool(wanted)
    assert run.refresh().left.tokens == 0 and not ask()


def test_a_slow_upstream(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    client.upstreams.put("fake", upstream.url, retries=0, timeout=0.3)
    upstream.plan({"delay": 1.5})
    assert chat(address(run), chat_body("a"))[0] == 504
    assert run.calls()[0].error_kind == "timeout"


def test_the_first_streamed_byte_is_not_delayed(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan({"pause": 0.3})
    parts = urlsplit(run.base_url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    began = time.monotonic()
    connection.request("POST", parts.path + "/v1/chat/completions", json.dumps(chat_body("a", stream=True)),
                       {"authorization": f"Bearer {run.api_key}"})
    answer = connection.getresponse()
    answer.read1(10)
    first = time.monotonic() - began
    rest = answer.read()
    connection.close()
    assert first < 0.6 * (time.monotonic() - began) and rest.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in rest  # the gateway requested it, the agent did not
    assert run.calls()[0].usage.prompt == 10


def test_token_fields_are_recorded_and_hidden(client: Client, upstream: FakeUpstream) -> None:
    client.upstreams.put("tokens", upstream.url, token_fields="vllm", weight_version="step-7")
    run = client.runs.create(upstream="tokens")
    upstream.plan({"tokens": True}, {"tokens": True})
    for stream in (False, True):
        _, text, _ = http_raw("POST", f"{run.base_url}/v1/chat/completions",
                              json.dumps(chat_body("a", stream=stream)).encode(),
                              {"authorization": f"Bearer {run.api_key}"})
        assert b"token_ids" not in text and b"logprob\"" not in text
    for call in run.calls():
        assert call.prompt_token_ids == [1, 2, 3] and call.token_ids == [4, 5] and call.weight_version == "step-7"
        assert call.logprobs == pytest.approx([-0.5, -0.25 if not call.stream else -0.5])
    assert upstream.seen()[0]["body"]["return_token_ids"] is True


def test_the_same_dialect_passes_unknown_fields_and_bytes(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    body = json.dumps(chat_body("ä", custom={"x": [1, 2.50]}), indent=1).encode()
    _, data, _ = http_raw("POST", f"{run.base_url}/v1/chat/completions", body, {"x-api-key": run.api_key or ""})
    assert b'"x_unknown": {"kept": [1, 2.5]}' in data
    (seen,) = upstream.seen()
    assert seen["body"]["custom"] == {"x": [1, 2.5]} and seen["headers"]["content-length"] == str(len(body))
    assert run.api_key not in json.dumps(seen)


def test_models_and_sampling_of_a_run(client: Client, upstream: FakeUpstream) -> None:
    client.upstreams.put("mapped", upstream.url, models={"policy": "policy-v2"})
    run = client.runs.create(upstream="mapped", model="policy", sampling={"temperature": 0.5, "top_p": None})
    assert chat(address(run), chat_body("a", temperature=1.0, top_p=0.9, custom=1))[0] == 200
    (seen,) = upstream.seen()
    assert seen["body"]["model"] == "policy-v2" and seen["body"]["temperature"] == 0.5
    assert "top_p" not in seen["body"] and seen["body"]["custom"] == 1
    (call,) = run.calls()
    assert call.model == "small" and call.upstream_model == "policy-v2"
    assert run.environ["OPENAI_MODEL"] == "policy"


def test_cost_and_tokens_end_a_run(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake", budget={"tokens": 20, "cost": 1.0}, prices={"*": {"prompt": 1e4}})
    assert [chat(address(run), chat_body(text))[0] for text in "abc"] == [200, 200, 400]
    assert run.refresh().counts.cost == pytest.approx(0.2) and run.info.left.tokens == 0
    run = client.runs.create(upstream="fake", budget={"cost": 0.15}, prices={"*": {"prompt": 1e4}})
    answers = [chat(address(run), chat_body(text)) for text in "abc"]
    assert [status for status, _, _ in answers] == [200, 200, 400] and "cost" in answers[-1][1]["error"]["message"]
    assert run.refresh().counts.refused == 1 and len(upstream.seen()) == 4


def test_the_seconds_of_a_run_end_a_running_call(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake", budget={"seconds": 0.4})
    upstream.plan({"delay": 0.9})
    status, body, _ = chat(address(run), chat_body("a"))
    assert status == 400 and "seconds" in body["error"]["message"] and run.calls()[0].state == "cancelled"


def test_a_retried_call_is_recorded_once(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan({"delay": 0.4})
    found: list[Any] = []

    def ask(**headers: str) -> None:
        found.append(chat(address(run), chat_body("a"), **headers)[1]["choices"][0]["message"]["content"])

    first = threading.Thread(target=ask)
    first.start()
    until(lambda: run.refresh().counts.running == 1)
    ask(x_stainless_retry_count="1")  # joins the running call
    first.join()
    ask(x_stainless_retry_count="2")  # gets the response of the finished call
    assert found == ["reply 1"] * 3 and len(upstream.seen()) == 1
    (call,) = run.calls()
    assert call.retries == 2 and run.refresh().counts.calls == 1 and run.info.counts.retried == 2
    ask()  # not marked as a retry: another call
    assert found[-1] == "reply 2" and run.calls()[1].parent is None


def test_the_same_idempotency_key_is_a_retry(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    replies = [chat(address(run), chat_body("a"), idempotency_key=key)[1]["id"] for key in ("k1", "k1", "k2")]
    assert replies[0] == replies[1] != replies[2] and len(upstream.seen()) == 2


def test_a_client_that_disconnects_and_retries(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan({"delay": 0.5})
    _left_alone(run, chat_body("a"))
    time.sleep(0.2)  # until the server has seen the end of the connection
    assert chat(address(run), chat_body("a"))[1]["choices"][0]["message"]["content"] == "reply 1"
    assert len(run.calls()) == 1 and len(upstream.seen()) == 1


def _left_alone(run: Run, body: dict[str, Any]) -> None:
    """Send a request, and close the connection without reading the response."""
    parts = urlsplit(run.base_url)
    data = json.dumps(body).encode()
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as sock:
        head = (f"POST {parts.path}/v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {run.api_key}\r\n"
                f"content-length: {len(data)}\r\n\r\n")
        sock.sendall(head.encode() + data)
        until(lambda: run.refresh().counts.calls == 1)


def test_concurrent_calls(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan(*[{"delay": 0.3}] * 20)
    threads = [threading.Thread(target=chat, args=(address(run), chat_body(str(n)))) for n in range(20)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 4.0 and run.refresh().counts.done == 20
    assert sorted(call.number for call in run.calls()) == list(range(1, 21))


def test_a_web_socket_is_rejected_at_once(client: Client) -> None:
    run = client.runs.create(upstream="fake")
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
               "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==", "authorization": f"Bearer {run.api_key}"}
    began = time.monotonic()
    assert http_raw("GET", f"{run.base_url}/v1/responses", None, upgrade)[0] == 426
    assert time.monotonic() - began < 1.0


def test_bad_requests_have_the_error_shape_of_the_dialect(client: Client) -> None:
    run = client.runs.create(upstream="fake")
    url = f"{run.base_url}/v1/chat/completions"
    key = {"authorization": f"Bearer {run.api_key}"}
    for body in (b"", b"[]", b"{nonsense", b'{"model":"m"}', b'{"messages":7}', b"[" * 100_000, b"\xff\xfe"):
        status, data, _ = http_raw("POST", url, body, key)
        assert status == 400 and json.loads(data)["error"]["message"], body[:20]
    for secret in ("", "sk-rock-" + run.id, (run.api_key or "")[:-1] + "A", "sk-rock-nothing." + "A" * 43):
        assert http_raw("POST", url, b"{}", {"authorization": f"Bearer {secret}"})[0] == 401
    assert http_json("POST", f"{run.base_url}/v1/nothing", {}, key)[0] == 404
    assert http_json("GET", f"{run.base_url}/v1/models", None, key)[1]["object"] == "list"
    run.end()
    assert chat(address(run), chat_body("a"))[0] == 403
    assert run.refresh().counts.calls == 0


def test_ends_of_runs(client: Client, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake", tags={"group": "g1"})
    upstream.plan({"delay": 5})
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(chat(address(run), chat_body("a"))[0]))
    thread.start()
    until(lambda: run.refresh().counts.running == 1)
    run.end(valid=False, reason="the machine failed")
    thread.join()
    assert answers == [403]
    info = run.refresh()
    assert info.reward is None and info.reward_valid is False and info.counts.cancelled == 1
    with pytest.raises(InvalidConfig):
        run.end(0.0, valid=False)
    assert [info.id for info in client.runs.list(tags={"group": "g1"})] == [run.id]
    assert client.runs.list(tags={"group": "other"}) == []
    with pytest.raises(NotFound):
        client.runs.create(upstream="unknown")


def test_the_key_of_an_upstream_does_not_go_to_another_address(client: Client, upstream: FakeUpstream) -> None:
    with pytest.raises(InvalidConfig, match="its key is not given"):
        client.upstreams.put("fake", "http://127.0.0.1:9")
    assert client.upstreams.put("fake", upstream.url, retries=1).has_key


def test_the_key_is_nowhere_else(client: Client, server: RunningServer, upstream: FakeUpstream) -> None:
    run = client.runs.create(upstream="fake")
    upstream.plan({"echo": True}, {"status": 400, "body": {"error": {"message": SECRET}}}, {"status": 500}, {"echo": 1})
    shown = [chat(address(run), chat_body("a", stream=stream)) for stream in (False, False, False, True)]
    shown.append([call.model_dump() for call in run.calls()])  # type: ignore[arg-type]
    shown.append(client.upstreams.list())  # type: ignore[arg-type]
    shown.append(run.trajectory("openai"))
    shown.append(http_json("GET", f"{server.url}/metrics"))
    assert SECRET not in repr(shown)
    for path in server.home.rglob("*"):
        if path.is_file() and path.name != "upstreams.json" and "images" not in path.parts:
            assert SECRET.encode() not in path.read_bytes(), path
    file = server.home / "gateway" / "upstreams.json"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
