"""The released TrainingSandbox, BFCLSandbox and APPWorldSandbox of AgentScope with base_url.

agentscope_client.py SANDBOX_WITH_DATA_OF_APPWORLD
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import requests
from agentscope_runtime.sandbox.box.sandbox import SandboxAsync
from agentscope_runtime.sandbox.box.training_box.training_box import APPWorldSandbox, BFCLSandbox, TrainingSandbox
from agentscope_runtime.sandbox.client.training_client import TrainingSandboxClient
from agentscope_runtime.sandbox.enums import SandboxType
from agentscope_runtime.sandbox.manager.sandbox_manager import SandboxManager
from agentscope_runtime.sandbox.model import ContainerModel
from checks import check, raises

URL = os.environ["ROCK_BASE_URL"]
KEY = os.environ["ROCK_API_KEY"]
BASE = f"{URL}/agentscope"
SOLVED = {"role": "assistant", "content": "[CONVERSATION_COMPLETED]"}


def running() -> set[str]:
    found = requests.get(f"{URL}/v1/sandboxes?state=running", headers={"Authorization": f"Bearer {KEY}"})
    return {item["sandbox_id"] for item in found.json()["items"]}


def calls(name: str, box: Any) -> None:
    """The nine calls of a training sandbox, on a suite whose data is there."""
    with check(f"{name}: get_env_profile and get_task_ids"):
        tasks = box.get_env_profile(env_type="bfcl", split="train")
        assert len(tasks) == 800 and box.get_task_ids("bfcl", "train") == tasks
    with check(f"{name}: create_instance"):
        made = box.create_instance(env_type="bfcl", task_id="multi_turn_base_0")
        instance_id = made["info"]["instance_id"]
        assert made["info"]["task_id"] == "multi_turn_base_0" and made["state"][0]["role"] == "system"
    with check(f"{name}: step"):
        action = {"role": "assistant", "content": '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>'}
        done = box.step(instance_id=instance_id, action=action)
        assert "tool_response" in json.dumps(done["state"]) and done["is_terminated"] is False
    with check(f"{name}: evaluate"):
        assert box.evaluate(instance_id, params={"sparse": True}) == 0.0
        assert box.step(instance_id, SOLVED)["is_terminated"] is True
    with check(f"{name}: release_instance"):
        assert box.release_instance(instance_id) is True and box.release_instance(instance_id) is False
    with check(f"{name}: get_info, list_tools"):
        info = ContainerModel(**box.get_info())
        assert info.container_id == box.sandbox_id and info.state.value == "running"
        assert box.list_tools() is None
    with check(f"{name}: errors"):
        assert "Instance nothing not found" in box.step("nothing", SOLVED) or "Error" in box.step("nothing", SOLVED)
        assert "Error" in box.create_instance("bfcl", "no such task")
        assert "Error" in box.create_instance("webshop", "0")
        assert "no tool" in box.call_tool("nothing", {})


with BFCLSandbox(base_url=BASE, bearer_token=KEY) as box:
    calls("BFCLSandbox", box)
    with check("BFCLSandbox: the sandbox is its own"):
        with BFCLSandbox(base_url=BASE, bearer_token=KEY) as other:
            assert other.sandbox_id != box.sandbox_id and {other.sandbox_id, box.sandbox_id} <= running()
        assert other.sandbox_id not in running() and box.sandbox_id in running()
    with check("BFCLSandbox: an existing sandbox by its id"):
        assert len(BFCLSandbox(box.sandbox_id, BASE, KEY).get_task_ids("bfcl")) == 800
    with check("TrainingSandboxClient: the url of get_info"):
        client = TrainingSandboxClient(box.get_info()["url"])
        client.session.headers["Authorization"] = f"Bearer {KEY}"
        with client:
            assert len(client.get_task_ids("bfcl")) == 800

with TrainingSandbox(base_url=BASE, bearer_token=KEY, box_type=SandboxType.BFCL) as box:
    calls("TrainingSandbox", box)

with check("APPWorldSandbox: starts, and its calls name the missing data"):
    with APPWorldSandbox(base_url=BASE, bearer_token=KEY) as box:
        assert box.sandbox_id in running()
        assert "Error" in box.create_instance("appworld", "x") and "data" in box.get_env_profile("appworld")

with check("APPWorldSandbox: a task, in a sandbox that has data"):
    box = APPWorldSandbox(sys.argv[1], BASE, KEY)
    assert box.get_task_ids("appworld") == ["abc1234_1"]
    made = box.create_instance("appworld", "abc1234_1")
    assert made["state"][1]["content"] == "What is six times seven?"
    code = "```python\napis.supervisor.complete_task(answer=6 * 7)\n```"
    done = box.step(made["info"]["instance_id"], {"role": "assistant", "content": code})
    assert done["is_terminated"] and done["reward"] == 1.0
    assert box.evaluate(made["info"]["instance_id"], params={"sparse": True}) == 1.0
    assert box.release_instance(made["info"]["instance_id"]) is True

with check("manager: sessions, status, health, cleanup"):
    manager = SandboxManager(base_url=BASE, bearer_token=KEY)
    made = manager.create_from_pool(sandbox_type="bfcl", meta={"session_ctx_id": "mine"})
    assert manager.create_from_pool(sandbox_type="bfcl", meta={"session_ctx_id": "mine"}) == made  # repeated
    assert manager.get_session_mapping("mine") == [made] and "mine" in manager.list_session_keys()
    assert manager.get_status(made) == "running" and manager.check_health(made) is True
    assert manager.cleanup() is True and made not in running()
    assert manager.get_status(made) == "exited" and manager.release("nothing") is False

with check("unsupported types and arguments are refused"):
    for kind in (SandboxType.BROWSER, SandboxType.BASE):
        with raises(RuntimeError, "No sandbox available"):
            TrainingSandbox(base_url=BASE, bearer_token=KEY, box_type=kind).start()
    assert manager.create(sandbox_type="bfcl", mount_dir="/etc") is None
    assert "not supported" in manager.add_mcp_servers("x", {})
    assert "401" in SandboxManager(base_url=BASE, bearer_token="wrong").get_status(made)


async def concurrent() -> None:
    with check("SandboxAsync: four at once"):
        async def play() -> str:
            async with SandboxAsync(base_url=BASE, bearer_token=KEY, sandbox_type=SandboxType.BFCL) as box:
                assert (await box.get_info_async())["container_id"] == box.sandbox_id
                arguments = {"env_type": "bfcl", "task_id": "multi_turn_base_1", "instance_id": None, "params": {}}
                made = await box.call_tool_async("create_instance", arguments)
                return str(made["info"]["task_id"])
        assert await asyncio.gather(*(play() for _ in range(4))) == ["multi_turn_base_1"] * 4


asyncio.run(concurrent())
