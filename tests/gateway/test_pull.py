"""Pull mode and replay: the trainer is the model; kill -9 of the server between and during calls."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from rock.errors import Conflict, InvalidConfig
from rock.sync import Client, Sandbox, SandboxConfig
from rock.sync.sandbox.runs import Run
from tests.conftest import IMAGE, RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body
from tests.waiting import slowness, until

REPLY = {"id": "r", "object": "chat.completion", "created": 1, "model": "policy",
         "choices": [{"index": 0, "message": {"role": "assistant", "content": "pulled"}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}  # fmt: skip


class Agent:
    """A call of an agent in a thread."""

    def __init__(self, run: Run, body: dict[str, Any], **headers: str) -> None:
        self.result: Any = None
        self._run = {"base_url": run.base_url, "api_key": run.api_key}
        self._thread = threading.Thread(target=self._ask, args=(body, headers))
        self._thread.start()

    def _ask(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            self.result = chat(self._run, body, **headers)
        except (OSError, http.client.HTTPException) as error:
            self.result = error

    def wait(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.result


def text_of(answer: Any) -> str:
    status, body, _ = answer
    assert status == 200, answer
    return str(body["choices"][0]["message"]["content"])


def test_answers_in_any_order(server: RunningServer) -> None:
    with Client(server.url) as client, client.runs.create(pull=True) as run:
        assert run.next(wait=0).call is None
        agents = [Agent(run, chat_body(str(place))) for place in range(3)]
        until(lambda: run.refresh().counts.waiting == 3)
        numbers, after = [], 0
        while (found := run.next(after, wait=0)).call is not None:
            after = found.call.number
            numbers.append((after, found.call.request["messages"][0]["content"]))  # type: ignore[index]
        assert [number for number, _ in numbers] == [1, 2, 3]
        for number, content in reversed(numbers):
            run.answer(number, text=f"to {content}", token_ids=[7, 8], logprobs=[-1.0, -2.0], weight_version="w1")
        assert [text_of(agent.wait()) for agent in agents] == ["to 0", "to 1", "to 2"]
        for call in run.calls():
            assert call.token_ids == [7, 8] and call.logprobs == [-1.0, -2.0] and call.weight_version == "w1"
        assert run.answer(1, text="again").state == "done"  # an answered call stays as it is
        assert run.call(1).token_ids == [7, 8]
        with pytest.raises(InvalidConfig):
            run.answer(1, text="x", error={"kind": "upstream"})
    assert run.next(wait=5).state == "ended"
    run.delete()


def test_streamed_answers_and_errors(server: RunningServer) -> None:
    with Client(server.url) as client, client.runs.create(pull=True) as run:
        agent = Agent(run, chat_body("a", stream=True))
        call = run.next(wait=30).call
        assert call is not None and call.stream
        base = {"id": "r", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        events = [{**base, "choices": [{"index": 0, "delta": {"role": "assistant", "content": part},
                                        "finish_reason": None}]} for part in ("one ", "two")]  # fmt: skip
        last = {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        run.answer_events(call.number, [*events, last])
        status, text, _ = agent.wait()
        assert status == 200 and "one " in text and "two" in text and text.endswith("data: [DONE]\n\n")
        assert run.call(1).response["choices"][0]["message"]["content"] == "one two"  # type: ignore[index]
        agent = Agent(run, chat_body("b", stream=True))
        run.next(1, wait=30)
        with pytest.raises(InvalidConfig):
            run.answer_events(2, events)  # no event that ends the response
        assert isinstance(agent.wait(), (OSError, http.client.HTTPException))
        agent = Agent(run, chat_body("c"))
        run.next(2, wait=30)
        with pytest.raises(InvalidConfig):
            run.answer(3, {"nonsense": 1})
        run.answer(3, error={"kind": "overloaded", "message": "the policy is updated", "status": 503})
        assert agent.wait()[0] == 503 and run.call(3).state == "failed"
        with pytest.raises(Conflict):
            run.answer(3, text="late")
    run.delete()


def test_a_pulled_call_takes_a_few_milliseconds(server: RunningServer) -> None:
    with Client(server.url) as client, client.runs.create(pull=True) as run:
        stop = threading.Event()

        def model() -> None:
            after = 0
            while not stop.is_set():
                call = run.next(after, wait=1).call
                if call is not None:
                    after = call.number
                    run.answer(after, REPLY)

        thread = threading.Thread(target=model)
        thread.start()
        address = {"base_url": run.base_url, "api_key": run.api_key}
        times = []
        for place in range(30):
            began = time.monotonic()
            assert text_of(chat(address, chat_body(str(place)))) == "pulled"
            times.append(time.monotonic() - began)
        stop.set()
        thread.join()
        assert sorted(times)[15] < 0.02 * slowness()
    run.delete()


def test_replay_by_order_and_by_prefix(server: RunningServer, upstream: FakeUpstream) -> None:
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url)
        run = client.runs.create(upstream="fake")
        address = {"base_url": run.base_url, "api_key": run.api_key}
        for text in ("a", "b"):
            chat(address, chat_body(text))
        run.end()
        again = client.runs.create(replay={"run": run.id})
        address = {"base_url": again.base_url, "api_key": again.api_key}
        assert [text_of(chat(address, chat_body(text))) for text in ("x", "y")] == ["reply 1", "reply 2"]
        assert chat(address, chat_body("z"))[0] == 400
        prefix = client.runs.create(replay={"run": run.id, "by": "prefix"})
        address = {"base_url": prefix.base_url, "api_key": prefix.api_key}
        found = [text_of(chat(address, chat_body(text))) for text in ("b", "a", "b")]
        assert found == ["reply 2", "reply 1", "reply 2"]
        assert "text/event-stream" in chat(address, chat_body("a", stream=True))[2]["content-type"]
        records = [{"request": chat_body("q"), "response": REPLY}]
        file = client.runs.create(replay={"records": records})
        assert text_of(chat({"base_url": file.base_url, "api_key": file.api_key}, chat_body("any"))) == "pulled"
        with pytest.raises(InvalidConfig, match=r"records\[0\]"):
            client.runs.create(replay={"records": [{"response": {}}]})
        for one in (run, again, prefix, file):
            one.delete(force=True)
        client.upstreams.delete("fake")
        assert len(upstream.seen()) == 2


# ---- kill -9 ----


def restart(server: RunningServer) -> None:
    port = int(server.url.rpartition(":")[2])
    server.kill()
    server.start(port)


def test_kill_between_and_during_pulled_calls(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    with Sandbox(
        SandboxConfig(base_url=server.url, image=IMAGE, network="none", memory="256m")
    ) as sandbox:
        run = sandbox.start_run(pull=True)
        code = (
            "import json, os, time, urllib.request\n"
            "body = json.dumps({'model': 'm', 'messages': [{'role': 'user', 'content': 'x'}]}).encode()\n"
            "for attempt in range(2000):\n"
            "    try:\n"
            "        r = urllib.request.Request(os.environ['OPENAI_BASE_URL'] + '/chat/completions', body,\n"
            "            {'authorization': 'Bearer ' + os.environ['OPENAI_API_KEY'], 'x-stainless-retry-count':"
            " str(attempt)})\n"
            "        print(json.load(urllib.request.urlopen(r))['choices'][0]['message']['content'])\n"
            "        break\n"
            "    except Exception as error:\n"
            "        time.sleep(0.1)\n"
        )
        process = sandbox.processes.start(["python3", "-c", code], env=run.environ)
        first = run.next(wait=60).call
        assert first is not None
        restart(server)  # during the call, before its answer
        again = run.next(wait=60).call
        assert again is not None and again.number == 1 and again.request == first.request
        run.answer(1, REPLY)
        restart(server)  # right after the answer
        until(lambda: "pulled" in process.logs().data.decode(), why=f"{process.info}: {server.log()}")
        (call,) = run.calls()
        assert call.state == "done" and call.retries >= 1
        assert run.refresh().counts.calls == 1 and not run.info.incomplete
        run.end(1.0)
        restart(server)
        assert run.refresh().reward == 1.0 and len(run.calls()) == 1
        run.delete()


def test_kill_during_an_upstream_call(own_server: Callable[..., RunningServer], upstream: FakeUpstream) -> None:
    server = own_server()
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url, key="sk-kept")
        run = client.runs.create(upstream="fake", budget={"calls": 3})
        address = {"base_url": run.base_url, "api_key": run.api_key}
        assert text_of(chat(address, chat_body("a"))) == "reply 1"
        upstream.plan({"delay": 20})
        agent = Agent(run, chat_body("a", "reply 1", "b"))
        until(lambda: len(upstream.seen()) == 2)
        restart(server)
        assert isinstance(agent.wait(), (OSError, http.client.HTTPException))
        assert run.refresh().incomplete and [call.state for call in run.calls()] == ["done", "failed"]
        assert text_of(chat(address, chat_body("a", "reply 1", "b"), x_stainless_retry_count="1")) == "reply 3"
        calls = run.calls()
        assert calls[2].retry_of == 2 and calls[2].parent == 1 and not run.refresh().incomplete
        assert calls[2].request == chat_body("a", "reply 1", "b") and run.info.left.calls == 1
        assert text_of(chat(address, chat_body("a"), x_stainless_retry_count="1")) == "reply 1"  # from the recording
        assert len(upstream.seen()) == 3 and upstream.seen()[2]["headers"]["authorization"] == "Bearer sk-kept"
        run.delete(force=True)


@pytest.mark.parametrize("point", ["begun", "sending", "answered", "recorded"])
def test_kill_at_each_point_of_a_call(
    own_server: Callable[..., RunningServer], upstream: FakeUpstream, point: str
) -> None:
    server = own_server(ROCK_FAULTS=f"gateway.call.{point}=kill@1")
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url)
        run = client.runs.create(upstream="fake")
        agent = Agent(run, chat_body("a", stream=True))
        assert isinstance(agent.wait(), (OSError, http.client.HTTPException))
        port = int(server.url.rpartition(":")[2])
        assert server.process is not None and server.process.wait(30) == -signal.SIGKILL
        server.environment.pop("ROCK_FAULTS")
        server.start(port)
        address = {"base_url": run.base_url, "api_key": run.api_key}
        status, text, _ = chat(address, chat_body("a", stream=True), x_stainless_retry_count="1")
        assert status == 200 and text.endswith("data: [DONE]\n\n") and "reply" not in text.partition("rep")[0]
        done = [call for call in run.calls() if call.state == "done"]
        assert len(done) == 1 and not run.refresh().incomplete
        assert len(upstream.seen()) == {"begun": 1, "sending": 1, "answered": 2, "recorded": 1}[point]
        run.delete(force=True)


def test_a_torn_record_is_set_aside(own_server: Callable[..., RunningServer], upstream: FakeUpstream) -> None:
    server = own_server()
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url)
        run = client.runs.create(upstream="fake")
        address = {"base_url": run.base_url, "api_key": run.api_key}
        chat(address, chat_body("a"))
        chat(address, chat_body("a", "reply 1", "b"))
        port = int(server.url.rpartition(":")[2])
        server.kill()
        file = server.home / "gateway" / "runs" / run.id / "calls"
        with open(file, "ab") as log:
            log.write(b"\0\0\x10\0torn")
        server.start(port)
        assert [call.state for call in run.calls()] == ["done", "done"] and run.refresh().incomplete
        assert file.with_name("calls.torn-1").read_bytes() == b"\0\0\x10\0torn"
        chat(address, chat_body("c"))
        assert json.loads(json.dumps(run.calls()[1].request)) == chat_body("a", "reply 1", "b")
        assert len(run.calls()) == 3 and os.path.exists(file)
        run.delete(force=True)
        assert not file.exists()
