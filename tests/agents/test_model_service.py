"""ROCK's model service over runs: ROLL's loop, the rules of the indexes, parallel and streamed calls, files of the
proxy, agents that use it, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.errors import Conflict
from rock.sync import Client, Sandbox
from rock.sync.sandbox.agent import RockAgentConfig
from rock.sync.sandbox.model_service.base import ModelService, ModelServiceConfig
from tests.agents.scripted_model import KEY, ScriptedModel
from tests.conftest import RunningServer

SESSION_END = "SESSION_END"
# An agent: asks until the answer has no command, runs each command, and prints the last answer.
AGENT = """
import json, os, subprocess, sys, urllib.request
def ask(messages, stream=False):
    body = {"model": "m", "messages": messages, "stream": stream}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
        {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"})
    data = urllib.request.urlopen(request, timeout=60).read().decode()
    if not stream:
        return json.loads(data)["choices"][0]["message"]["content"]
    deltas = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")]
    return "".join(d["choices"][0]["delta"].get("content") or "" for d in deltas if d["choices"])
if __name__ == "__main__":
    messages = [{"role": "user", "content": sys.argv[1]}]
    while True:
        answer = ask(messages)
        messages.append({"role": "assistant", "content": answer})
        if not answer.startswith("$ "):
            print(answer)
            break
        done = subprocess.run(answer[2:], shell=True, capture_output=True, text=True)
        messages.append({"role": "user", "content": done.stdout})
"""
PARALLEL = """
import sys, threading
sys.path.insert(0, "/tmp")
from agent import ask
seen = {}
def one(n):
    seen[n] = ask([{"role": "user", "content": f"question {n}"}])
threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
for t in threads: t.start()
for t in threads: t.join()
print(sorted(seen.items()))
"""


def completion(text: str) -> str:
    return json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}})  # fmt: skip


def last_message(request: str) -> str:
    return str(json.loads(request)["messages"][-1]["content"])


@pytest.fixture
def equipped(sandbox: Sandbox) -> Sandbox:
    """A sandbox with the programs of the agents."""
    sandbox.files.write("/tmp/agent.py", AGENT)
    sandbox.files.write("/tmp/parallel.py", PARALLEL)
    return sandbox


@pytest.fixture
def service(equipped: Sandbox) -> Iterator[ModelService]:
    """A started service of type local, at ROLL's port."""
    config = ModelServiceConfig(enabled=True, type="local",
                                start_cmd="rock model-service start --type ${type} --port 28080")  # fmt: skip
    made = ModelService(equipped, config)
    made.install()
    made.start()
    yield made
    made.stop()


class Agent:
    """An agent that runs in the background of a sandbox, watched by its service."""

    def __init__(self, sandbox: Sandbox, service: ModelService, *argv: str) -> None:
        self.process = sandbox.processes.start(["python3", *argv], env=service.environ)
        service.watch_agent(str(self.process.info.pid))

    def output(self) -> str:
        info = self.process.wait(60)
        assert info.exit_code == 0, self.process.logs("stderr").data.decode()
        text = self.process.logs().data.decode()
        self.process.forget()
        return text


def roll(service: ModelService, policy: Callable[[dict[str, Any]], str], retries: int = 3) -> list[str]:
    """ROLL's loop: index 0 fetches the first request; each answer fetches the next one; a policy that fails `retries`
    times is answered as a message of the assistant."""
    requests = [service.anti_call_llm(index=0)]
    while requests[-1] != SESSION_END:
        for attempt in range(retries):
            try:
                answer = policy(json.loads(requests[-1]))
                break
            except ConnectionError as error:
                answer = f"error after {attempt + 1} attempts: {error}"
        requests.append(service.anti_call_llm(index=len(requests), response_payload=completion(answer)))
    return requests


def test_the_loop_of_roll(equipped: Sandbox, service: ModelService) -> None:
    answers = iter(["$ echo one > /tmp/one; echo made", "$ cat /tmp/one", "the end"])
    agent = Agent(equipped, service, "/tmp/agent.py", "begin LLM_REQUEST_END and LLM_RESPONSE_START")
    requests = roll(service, lambda request: next(answers))
    assert requests[-1] == SESSION_END and len(requests) == 4
    said = [last_message(one) for one in requests[:3]]
    assert said == ["begin LLM_REQUEST_END and LLM_RESPONSE_START", "made\n", "one\n"]
    assert agent.output() == "the end\n" and equipped.files.read("/tmp/one") == b"one\n"
    assert service.anti_call_llm(len(requests), completion("late"), call_timeout=10) == SESSION_END
    service.stop()
    with Client() as client:
        run = client.runs.get(service.run.id if service.run else "")
        counts = run.info.counts
        assert (run.info.state, counts.calls, counts.prompt_tokens, counts.completion_tokens) == ("ended", 3, 15, 6)


def test_an_upstream_failure_becomes_a_message(equipped: Sandbox, service: ModelService) -> None:
    def policy(request: dict[str, Any]) -> str:
        raise ConnectionError("no route")

    agent = Agent(equipped, service, "/tmp/agent.py", "begin")
    assert roll(service, policy)[-1] == SESSION_END
    assert agent.output() == "error after 3 attempts: no route\n"


def test_a_repeated_index_is_answered_once(equipped: Sandbox, service: ModelService) -> None:
    agent = Agent(equipped, service, "/tmp/agent.py", "begin")
    first = service.anti_call_llm(0)
    assert service.anti_call_llm(0) == first
    second = service.anti_call_llm(1, completion("$ echo a"))
    assert service.anti_call_llm(1, completion("$ echo b")) == second and last_message(second) == "a\n"
    with pytest.raises(ValueError, match="must not be smaller"):
        service.anti_call_llm(0)
    assert service.anti_call_llm(2, completion("done")) == SESSION_END
    assert agent.output() == "done\n"


def test_wrong_arguments(equipped: Sandbox, service: ModelService) -> None:
    for index, payload in ((-1, None), (0, completion("x")), (1, None), (1, ""), (1, "no JSON"), (1, "[]")):
        with pytest.raises(ValueError, match="ind"):
            service.anti_call_llm(index, payload, call_timeout=1)
    with pytest.raises(RuntimeError, match="did not arrive in time"):
        service.anti_call_llm(0, call_timeout=0.2)
    other = ModelService(equipped, ModelServiceConfig())
    for call in (other.start, lambda: other.watch_agent("1"), lambda: other.anti_call_llm(0)):
        with pytest.raises(RuntimeError, match=r"call (install|start)"):
            call()
    other.stop()  # nothing happens
    for start_cmd in ("rock model-service start --port x", "rock model-service start --replay-file /tmp/x",
                      "rock model-service start --type cloud"):  # fmt: skip
        with pytest.raises(ValueError, match=r"port|proxy"):
            ModelService(equipped, ModelServiceConfig(start_cmd=start_cmd)).install()


def test_parallel_calls(equipped: Sandbox, service: ModelService) -> None:
    """ROCK's service waits for ever here."""
    agent = Agent(equipped, service, "/tmp/parallel.py")
    requests = roll(service, lambda request: "answer to " + request["messages"][-1]["content"])
    assert len(requests) == 4 and requests[-1] == SESSION_END
    assert agent.output() == f"{[(n, f'answer to question {n}') for n in range(3)]}\n"


def test_a_streaming_agent_and_a_large_answer(equipped: Sandbox, service: ModelService) -> None:
    code = "import sys; sys.path.insert(0, '/tmp'); import agent; " \
           "print(len(agent.ask([{'role': 'user', 'content': 'x'}], stream=True)))"  # fmt: skip
    agent = Agent(equipped, service, "-c", code)
    assert json.loads(service.anti_call_llm(0))["stream"] is True
    assert service.anti_call_llm(1, completion("ä" * 300_000)) == SESSION_END
    assert agent.output() == "300000\n"


def test_a_port_in_use_is_an_error(equipped: Sandbox, service: ModelService) -> None:
    code = "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 28081)); s.listen(); " \
           "print(1, flush=True); time.sleep(60)"  # fmt: skip
    process = equipped.processes.start(["python3", "-c", code])
    process.logs(wait=20)
    other = ModelService(equipped, ModelServiceConfig(start_cmd="rock model-service start --port 28081"))
    other.install()
    with pytest.raises(Conflict):
        other.start()
    assert not other.is_started
    process.kill()
    process.forget()


def test_record_and_replay(equipped: Sandbox) -> None:
    """A recording of the proxy is ROCK's file, and its replay makes the same files with the same output."""
    outputs, trees = [], []
    with ScriptedModel("unused") as model:
        address = f"--proxy-base-url {model.url}/v1 --proxy-api-key {KEY}"
        for options in (f"{address} --recording-file /tmp/recording.jsonl", "--replay-file /tmp/recording.jsonl"):
            config = ModelServiceConfig(type="proxy", start_cmd=f"rock model-service start --type ${{type}} {options}")
            service = ModelService(equipped, config)
            service.install()
            service.start()
            command = "mkdir -p /tmp/work; cd /tmp/work; python3 /tmp/agent.py begin | tee answer; find . | sort"
            seen = equipped.exec(["sh", "-c", command], env=service.environ, check=True)
            outputs.append(seen.stdout)
            trees.append(equipped.exec("cd /tmp/work && sha256sum $(find . -type f | sort); rm -r /tmp/work").stdout)
            service.stop()
        assert len(model.requests) == 1  # the replay calls no model
    assert outputs[0] == outputs[1] and "The file is written." in outputs[0] and trees[0] == trees[1]
    [line] = equipped.files.read("/tmp/recording.jsonl").decode().splitlines()
    record = json.loads(line)
    assert set(record) == {"model", "stream", "status", "response_time", "start_time", "end_time", "request",
                           "response", "error"}  # fmt: skip
    assert record["status"] == "success" and record["request"]["messages"][-1]["content"] == "begin"
    assert record["response"]["choices"][0]["message"]["content"] == "The file is written." and KEY not in line
    with Client() as client:
        assert not [one for one in client.upstreams.list() if one.name.startswith("model-service-")]


def test_an_agent_of_rock_with_a_model_service(equipped: Sandbox) -> None:
    """The variables of the run replace those of the configuration, and the watched process is the agent."""
    equipped.agent.install(RockAgentConfig(
        env={"OPENAI_BASE_URL": "http://nowhere/v1", "OPENAI_API_KEY": "xx"}, runtime_env_config=None,
        run_cmd="python3 /tmp/agent.py ${prompt}; exit 5", agent_run_timeout=100,
        model_service_config=ModelServiceConfig(enabled=True)))  # fmt: skip
    service, requests = equipped.model_service, list[str]()
    assert service is not None and service is equipped.agent.model_service
    trainer = threading.Thread(target=lambda: requests.extend(roll(service, lambda request: "well")))
    trainer.start()
    seen = equipped.agent.run("do it")
    trainer.join(60)
    assert (seen.output, seen.exit_code) == ("well\n", 5)
    assert [last_message(requests[0]), requests[1]] == ["do it", SESSION_END]
    first = service.run
    equipped.agent.install(equipped.agent.config.model_copy(update={"agent_session": "second"}))
    assert equipped.model_service is service and service.run != first  # one for each sandbox
    service.stop()


def test_the_command_line(equipped: Sandbox, server: RunningServer, tmp_path: Path) -> None:
    environ = {**os.environ, "ROCK_HOME": str(tmp_path), "ROCK_BASE_URL": server.url}

    def rock(*arguments: str, code: int = 0) -> str:
        done = subprocess.run([sys.executable, "-m", "rock.cli.main", "model-service", *arguments], env=environ,
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    assert "no model service was started here" in rock("anti-call-llm", "--index", "0", code=1)
    rock("stop")
    started = json.loads(rock("start", "--sandbox", equipped.sandbox_id or "", "--port", "28090", "--json"))
    state = tmp_path / "model-service.json"
    assert started["base_url"].startswith("http://127.0.0.1:28090") and state.stat().st_mode & 0o777 == 0o600
    process = equipped.processes.start(["python3", "/tmp/agent.py", "begin"], env=started["environ"])
    rock("watch-agent", "--pid", str(process.info.pid))
    assert last_message(rock("anti-call-llm", "--index", "0")) == "begin"
    assert "has no response_payload" in rock("anti-call-llm", "--index", "0", "--response", "{}", code=1)
    answer = tmp_path / "answer.json"
    answer.write_text(completion("$ echo x"))
    assert last_message(rock("anti-call-llm", "--index", "1", "--response-file", str(answer))) == "x\n"
    assert not answer.exists()
    assert rock("anti-call-llm", "--index", "2", "--response", completion("done")) == f"{SESSION_END}\n"
    assert process.wait(20).exit_code == 0
    process.forget()
    rock("stop")
    assert not state.exists()
    with Client() as client:
        assert client.runs.get(started["run"]).info.state == "ended"
