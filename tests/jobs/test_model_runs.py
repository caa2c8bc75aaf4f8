"""Trials with a run of the model gateway: tokens and the run id are stored, and the run gets the reward."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import RunningServer

from rock.agents import builtin
from rock.jobs.plan import AgentPlan, Plan
from rock.jobs.tasks import harbor_task
from rock.protocol.routes import ROUTES
from rock.sdk.job import Job, use_recipes
from rock.sync import Client

pytestmark = pytest.mark.skipif("create_run" not in ROUTES, reason="this server has no model gateway")

GREET = Path(__file__).parent.parent / "envs" / "harbor" / "greet"
CALL = """python3 - <<'END'
import json, os, urllib.request
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
text = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
os.makedirs("/tmp/app", exist_ok=True)
open("/tmp/app/greeting.txt", "w").write(text + "\\n")
END"""
RECORD = {"request": {}, "response": {
    "id": "x", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello, world"}}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}}}  # fmt: skip


class Recipe:
    """A recipe without packages."""

    name, version, packages = "tiny", "1", None

    def render(self, prompt: str, *, base_url: str, api_key: str, home: str, model: str | None, path: str) -> Any:
        env = {"OPENAI_BASE_URL": f"{base_url}/v1", "OPENAI_API_KEY": api_key}
        return SimpleNamespace(line=CALL, env=env, files={f"{home}/prompt.txt": prompt})


AGENTS = [AgentPlan(name="bash", command=CALL), AgentPlan(name="tiny")]


@pytest.mark.parametrize("agent", AGENTS, ids=lambda one: one.name)
def test_a_trial_has_a_run(server: RunningServer, agent: AgentPlan) -> None:
    use_recipes(lambda name: Recipe() if name == "tiny" else None)
    try:
        replay = {"replay": {"records": [RECORD]}}
        plan = Plan(name="model", environment={"memory": "256m"}, agents=[agent], model=replay)
        done = asyncio.run(Job(plan, tasks=[harbor_task(GREET)], base_url=server.url).run())
    finally:
        use_recipes(builtin)
    (trial,) = done.trial_results
    assert trial.score == 1.0, trial
    assert trial.agent_result is not None
    assert (trial.agent_result["n_input_tokens"], trial.agent_result["n_output_tokens"]) == (11, 3)
    with Client(server.url) as client:
        run = client.transport.json("GET", f"/v1/runs/{trial.result['run_id']}")
    assert run["state"] == "ended" and run["reward"] == 1.0 and run["reward_valid"]
    assert run["tags"]["rock_job_id"] == done.job_id and run["tags"]["rock_trial"] == "1"
