"""Real agents in sandboxes without a network, with the gateway and a scripted upstream.

The layers come from npm and PyPI, and are kept in ROCK_TEST_CACHE. `make agents` runs all of them. `make test` runs the
lightest one if its layer is there, and always a scripted agent, which needs no packages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rock.agents import builtin
from rock.agents.recipe import parse
from rock.errors import InvalidConfig
from rock.sync import Client, Sandbox
from tests.agents.layers import layer_or_skip
from tests.agents.scripted_model import COMPLETION, FINAL, KEY, PROMPT, ScriptedModel
from tests.conftest import RunningServer, hosting

LIGHTEST = "claude-code"
# The programs of the list, and LangGraph's library; each with the calls that it makes for this task.
CALLS = {"claude-code": 2, "codex": 2, "qwen-code": 2, "gemini-cli": 2, "opencode": 3, "mini-swe-agent": 1,
         "openhands": 2, "langgraph": 2}  # fmt: skip
COMMAND = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; mkdir -p made; echo done > made/result.txt"
SCRIPTED = parse('''
name = "scripted"
version = "1"
dialect = "openai-chat"
command = "python3 ${home}/agent.py ${prompt}"
[env]
BASE = "${base_url}"
KEY = "${api_key}"
[files]
"agent.py" = """
import json, os, subprocess, sys, urllib.request
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object",
    "properties": {"command": {"type": "string"}}, "required": ["command"]}}}]
messages = [{"role": "user", "content": sys.argv[1]}]
while True:
    body = {"model": "m", "messages": messages, "tools": TOOLS}
    request = urllib.request.Request(os.environ["BASE"] + "/v1/chat/completions", json.dumps(body).encode(),
        {"authorization": "Bearer " + os.environ["KEY"], "content-type": "application/json"})
    try:
        answer = json.loads(urllib.request.urlopen(request).read())["choices"][0]["message"]
    except urllib.error.HTTPError as error:
        sys.exit(error.read().decode())
    messages.append(answer)
    if not answer.get("tool_calls"):
        print(json.dumps({"text": answer["content"]}))
        break
    for call in answer["tool_calls"]:
        done = subprocess.run(json.loads(call["function"]["arguments"])["command"], shell=True, capture_output=True)
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": done.stdout.decode()})
"""
[log]
format = "jsonl"
text = "text"
''')


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel(COMMAND) as running:
        yield running


@pytest.fixture(scope="module")
def agent_server(
    tmp_path_factory: pytest.TempPathFactory, env_images: Path, model: ScriptedModel
) -> Iterator[RunningServer]:
    """A server with the cached layers, and an upstream in each dialect."""
    with hosting(tmp_path_factory.mktemp("agents"), env_images) as running:
        with Client(running.url) as client:
            for dialect in ("openai-chat", "openai-responses", "anthropic", "gemini"):
                client.upstreams.put(dialect, model.url, key=KEY, dialect=dialect)
        yield running


def files_of(sandbox: Sandbox) -> str:
    """The files that an agent made, with their contents."""
    return sandbox.exec("cd /work && find . -type f | sort | xargs sha256sum", check=True).stdout


def run_in(server: RunningServer, agent: Any, *layers: str, **options: Any) -> tuple[Any, str]:
    """The result of one run in a sandbox without a network, and its files."""
    with Sandbox("host", base_url=server.url, agents=list(layers), memory="4g", idle_timeout=0) as sandbox:
        sandbox.exec("mkdir /work && id > /dev/null", check=True)
        result = sandbox.run_agent(agent, "write the file", cwd="/work", timeout=300.0, **options)
        return result, files_of(sandbox)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CALLS)
def test_an_agent(agent_server: RunningServer, env_images: Path, model: ScriptedModel, name: str) -> None:
    layer_or_skip(name, env_images, fast=name == LIGHTEST)
    recipe, calls = builtin(name), CALLS[name]
    assert recipe is not None
    model.requests.clear()
    result, files = run_in(agent_server, name, name, upstream=recipe.dialect, budget={"calls": calls + 2})
    assert result.exit_code == 0, (result.stdout[-2000:], result.stderr[-2000:])
    assert files.endswith("  ./made/result.txt\n") and len(files.splitlines()) == 1
    if name != "mini-swe-agent":  # its command is the submission
        assert result.text is not None and FINAL in result.text
    check_run(agent_server, result, calls)
    assert len(model.requests) == calls
    replayed, same = run_in(agent_server, name, name, replay={"run": result.run_id, "by": "order"})
    assert replayed.exit_code == 0 and same == files and len(model.requests) == calls


def check_run(server: RunningServer, result: Any, calls: int) -> None:
    """Calls, tokens and budget of the run are exact; the upstream's key is nowhere."""
    counts, left = result.run.counts, result.run.left
    assert (counts.calls, counts.done, counts.failed, counts.refused) == (calls, calls, 0, 0)
    assert (counts.prompt_tokens, counts.completion_tokens) == (calls * PROMPT, calls * COMPLETION)
    assert (result.input_tokens, result.output_tokens) == (calls * PROMPT, calls * COMPLETION)
    assert left.calls == 2 and result.run.state == "ended" and result.run.tags["agent"] == result.agent
    with Client(server.url) as client:
        run = client.runs.get(result.run_id)
        texts = [one.model_dump_json() for one in run.calls()]
        texts += [json.dumps(run.trajectory(kind)) for kind in ("atif", "openai", "rock")]
        check_atif(run.trajectory("atif"), calls)
    texts += [result.stdout, result.stderr, result.run.model_dump_json(), server.log()]
    assert not any(KEY in text for text in texts)
    found = [path for path in (server.home / "logs").rglob("*") if path.is_file()]
    assert found and not any(KEY.encode() in path.read_bytes() for path in found)


def check_atif(found: dict[str, Any], calls: int) -> None:
    """A valid trajectory with the tokens of all calls."""
    if find_spec("rock.gateway.export.atif") is None:
        return  # this server has no export of trajectories yet
    assert found["schema_version"].startswith("ATIF-v1.")
    parts = [found, *found.get("subagent_trajectories", ())]  # opencode names its session beside the task
    assert sum(part["final_metrics"]["total_prompt_tokens"] for part in parts) == calls * PROMPT
    assert sum(part["final_metrics"]["total_completion_tokens"] for part in parts) == calls * COMPLETION
    assert any(step.get("tool_calls") for part in parts for step in part["steps"])
    if find_spec("atif") is not None:
        atif = import_module("atif")
        atif.Trajectory.model_validate(found)


def test_a_scripted_agent(agent_server: RunningServer, model: ScriptedModel) -> None:
    """The same with an agent of these tests, whose replay makes the same files, by order and by prefix."""
    model.requests.clear()
    result, files = run_in(agent_server, SCRIPTED, upstream="openai-chat", budget={"calls": 4})
    assert (result.exit_code, result.text) == (0, FINAL), result.stderr
    check_run(agent_server, result, 2)
    for by in ("order", "prefix"):
        replayed, same = run_in(agent_server, SCRIPTED, replay={"run": result.run_id, "by": by})
        assert (replayed.exit_code, replayed.text, same) == (0, FINAL, files)
    assert len(model.requests) == 2


def test_swe_agent_needs_a_source(agent_server: RunningServer) -> None:
    """Its recipe has no packages: an image without the program is an error that says what to do."""
    result, _ = run_in(agent_server, "swe-agent", upstream="openai-chat")
    assert result.exit_code == 127 and result.run.counts.calls == 0
    assert "the image has no program sweagent" in result.stderr and "docs/guides/agents.md" in result.stderr


def test_a_budget_ends_the_agent(agent_server: RunningServer) -> None:
    result, files = run_in(agent_server, SCRIPTED, upstream="openai-chat", budget={"calls": 1})
    assert result.exit_code == 1 and "budget" in result.stderr and result.run.counts.refused == 1
    assert files  # of the call that the budget allowed


def test_options_of_a_run(agent_server: RunningServer, model: ScriptedModel) -> None:
    model.requests.clear()
    with Sandbox("host", base_url=agent_server.url, memory="1g") as sandbox:
        with sandbox.start_run(upstream="openai-chat", model="pinned", tags={"task": "7"}) as run:
            result = sandbox.run_agent(SCRIPTED, "p", run=run, cwd="/tmp", env={"MORE": "x"}, user="daemon")
            assert result.exit_code == 0 and result.run.state == "active" and result.run_id == run.id, result.stderr
            assert {body["model"] for _, _, body in model.requests} == {"pinned"}
            owner = sandbox.exec(["stat", "-c", "%U %a", result.home, f"{result.home}/agent.py"], check=True).stdout
            assert owner.splitlines() == ["daemon 700", "daemon 600"]
        kept = sandbox.run_agent(SCRIPTED, "p", upstream="openai-chat", end=False, cwd="/tmp", timeout=60.0)
        assert kept.run.state == "active"
        slow = parse('name = "slow"\ncommand = "echo ${prompt}; sleep 60"\n')
        late = sandbox.run_agent(slow, "begun", upstream="openai-chat", timeout=1.0)
        assert (late.exit_code, late.timed_out, late.text, late.run.reason) == (None, True, "begun", "timeout")
        for agent, words in (("absent", "no recipe 'absent'"), ("codex", "is not in the sandbox"),
                             ("./none.toml", "cannot be read")):  # fmt: skip
            with pytest.raises(InvalidConfig, match=words):
                sandbox.run_agent(agent, "p", upstream="openai-chat")
        with pytest.raises(InvalidConfig, match="no option 'upstreams'"):
            sandbox.run_agent(SCRIPTED, "p", upstreams="x")
        with pytest.raises(InvalidConfig, match="exactly one of upstream, pull and replay"):
            sandbox.run_agent(SCRIPTED, "p")
