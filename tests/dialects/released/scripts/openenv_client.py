"""The released client of OpenEnv, and its validator, which sends no key: openenv_client.py [KEYLESS_URL]"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import requests
from checks import check, raises
from openenv.core.env_client import EnvClient
from openenv.core.env_server.mcp_types import CallToolAction, ListToolsAction
from openenv.core.generic_client import GenericAction, GenericEnvClient
from openenv.core.mcp_client import MCPToolClient

BASE = os.environ["ROCK_BASE_URL"] + "/openenv/"
HEADERS = {"Authorization": f"Bearer {os.environ['ROCK_API_KEY']}"}
GUESS, GYM, SUITE = "game:GuessTheNumber-v0-easy", "CartPole-v1", "task:bfcl"


def client(env_id: str, **options: Any) -> GenericEnvClient:
    return GenericEnvClient(base_url=BASE + env_id, headers=HEADERS, message_timeout_s=600, **options)


def environments() -> int:
    """The processes of all sandboxes: each environment is one."""
    found, base = 0, f"{os.environ['ROCK_BASE_URL']}/v1/sandboxes"
    for info in requests.get(f"{base}?state=running", headers=HEADERS).json()["items"]:
        usage = requests.get(f"{base}/{info['sandbox_id']}?usage=1", headers=HEADERS).json()["usage"]
        found += usage["pids"]
    return found


def sync_client() -> None:
    with client(GUESS).sync() as env:
        with check("GenericEnvClient: reset with a seed"):
            first = env.reset(seed=7)
            assert "Guess The Number" in first.observation["observation"] and not first.done and first.reward is None
            assert env.reset(seed=7).observation == first.observation
        with check("GenericEnvClient: step to the end of the episode"):
            done = [env.step({"action": f"\\boxed{{{guess}}}"}) for guess in (1, 10, 2, 9)][-1]
            assert done.done and isinstance(done.reward, float)
            with raises(RuntimeError, "EXECUTION_ERROR"):
                env.step({"action": "\\boxed{3}"})
        with check("GenericEnvClient: state and episode_id"):
            env.reset(seed=1, episode_id="mine")
            env.step(GenericAction(action="\\boxed{5}"))
            assert (env.state()["episode_id"], env.state()["step_count"]) == ("mine", 1)
        with check("GenericEnvClient: errors keep the socket"):
            for action in ({}, {"other": 1}, {"action": "x", "other": 1}):
                with raises(RuntimeError, "VALIDATION_ERROR"):
                    env.step(action)
            with raises(RuntimeError, "VALIDATION_ERROR"):
                env.reset(seed=-1)
            env.step({"action": "\\boxed{6}", "metadata": {"from": "typed clients"}})
        with check("GenericEnvClient: arguments of the constructor"):
            text = env.reset(seed=1, min_number=1, max_number=3).observation["observation"]
            assert "between 1 and 3" in text


async def async_client() -> None:
    with check("GenericEnvClient: eight clients at once"):
        async def play(seed: int) -> str:
            async with client(GUESS) as env:
                first = await env.reset(seed=seed)
                await asyncio.gather(env.step({"action": "\\boxed{1}"}))
                return str(first.observation["observation"])
        found = await asyncio.gather(*(play(seed) for seed in range(8)))
        assert len(found) == 8 and all("Guess" in text for text in found)
    with check("the end of a socket closes the environment"):
        env = client(GUESS)
        await env.connect()
        await env.reset(seed=1)
        before = environments()
        await env.close()
        for _ in range(100):
            if environments() < before:
                break
            await asyncio.sleep(0.1)
        assert environments() < before
    with check("Gymnasium"):
        async with client(GYM) as env:
            first = await env.reset(seed=42)
            assert len(first.observation["observation"]) == 4
            assert (await env.step({"action": 1})).reward == 1.0
            with raises(RuntimeError, "FACTORY_ERROR"):
                await env.reset(no_such_argument=1)
            assert len((await env.reset(seed=1)).observation["observation"]) == 4
    with check("MCPToolClient: session, tools, call"):
        async with MCPToolClient(base_url=BASE + GUESS, headers=HEADERS, message_timeout_s=600) as env:
            await env.reset(seed=7)
            assert [tool.name for tool in await env.list_tools()] == ["act"]
            found = await env.call_tool("act", action="\\boxed{5}")
            assert {"observation", "reward", "done"} <= set(found)
            with raises(RuntimeError, "no tool"):
                await env.call_tool("nothing")
            step = await env.step(CallToolAction(tool_name="act", arguments={"action": "\\boxed{6}"}))
            assert step.observation.tool_name == "act" and step.observation.error is None
            assert (await env.step(ListToolsAction())).observation.tools[0].name == "act"
            assert (await env.state()).step_count == 2
    with check("task suite: tasks, messages, reward"):
        async with client(SUITE) as env:
            first = await env.reset(task_id="multi_turn_base_0")
            messages = first.observation["observation"]
            assert messages[0]["role"] == "system" and first.metadata["info"]["task_id"] == "multi_turn_base_0"
            done = await env.step({"action": {"role": "assistant", "content": "[CONVERSATION_COMPLETED]"}})
            assert done.done and done.reward == 0.0
            assert (await env.reset(seed=3)).metadata["info"]["task_id"]
    with check("task suite: its functions are tools"):
        async with MCPToolClient(base_url=BASE + SUITE, headers=HEADERS, message_timeout_s=600) as env:
            await env.reset(task_id="multi_turn_base_0")
            names = {tool.name for tool in await env.list_tools()}
            assert {"cd", "ls", "say"} <= names, names
            found = await env.call_tool("ls")
            assert "tool_response" in json.dumps(found["observation"])


def routes_of_tasks() -> None:
    with check("task suite: routes of tasks"):
        url = BASE + SUITE
        assert requests.get(f"{url}/list_environments", headers=HEADERS).json() == [SUITE]
        count = requests.post(f"{url}/{SUITE}/num_tasks", json={"split": "train"}, headers=HEADERS).json()["num_tasks"]
        body = {"split": "train", "start": 0, "stop": 3}
        tasks = requests.post(f"{url}/{SUITE}/task_range", json=body, headers=HEADERS).json()["tasks"]
        assert count == 800 and len(tasks) == 3


def typed_client() -> None:
    with check("a typed EnvClient"):
        class Typed(EnvClient[Any, Any, Any]):
            def _step_payload(self, action: Any) -> dict[str, Any]:
                return {"action": action, "metadata": {}}

            def _parse_result(self, payload: dict[str, Any]) -> Any:
                return payload

            def _parse_state(self, payload: dict[str, Any]) -> Any:
                return payload

        with Typed(base_url=BASE + GUESS, headers=HEADERS, message_timeout_s=600).sync() as env:
            env.reset(seed=1)
            assert set(env.step("\\boxed{1}")) == {"observation", "reward", "done", "metadata"}


def validate(url: str) -> None:
    with check("openenv validate"):
        done = subprocess.run(["openenv", "validate", "--url", f"{url}/openenv/{GUESS}", "--json", "--timeout", "30"],
                              capture_output=True, text=True)
        report = json.loads(done.stdout[done.stdout.index("{"):])
        failed = [one["id"] for one in report["criteria"] if not one["passed"]]
        assert done.returncode == 0 and report["passed"] and not failed, failed
        assert report["mode"] == "simulation" and len(report["criteria"]) == 6


def image() -> None:
    with check("an image as a sandbox: from_docker_image with RockProvider"):
        from rock.integrations.openenv import RockProvider

        provider = RockProvider(memory="256m")
        with GenericEnvClient.from_docker_image(os.environ["IMAGE"], provider=provider).sync() as env:
            assert env.reset().observation["steps"] == 0
            assert env.step({"action": 1}).reward == 1.0 and env.step({"action": 1}).done
        assert provider.sandbox is None


sync_client()
typed_client()
asyncio.run(async_client())
routes_of_tasks()
image()
if len(sys.argv) > 1:
    validate(sys.argv[1])
