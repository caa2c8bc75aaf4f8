"""RockAgent and the model service of the released rl-rock, in a sandbox whose id is in TEST_BOX: its service runs
inside. Prints what it saw as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import warnings
from typing import Any

import rock

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

from rock.sdk.sandbox.agent.rock_agent import RockAgentConfig  # noqa: E402
from rock.sdk.sandbox.client import Sandbox  # noqa: E402
from rock.sdk.sandbox.config import SandboxConfig  # noqa: E402
from rock.sdk.sandbox.model_service.base import ModelServiceConfig  # noqa: E402


def completion(text: str) -> str:
    return json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})  # fmt: skip


async def work() -> dict[str, Any]:
    box = Sandbox(SandboxConfig(image="python:3.11"))
    await box.attach(os.environ["TEST_BOX"])
    config = RockAgentConfig(
        env={"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1", "OPENAI_API_KEY": "unused"},
        pre_init_cmds=[{"command": "echo pre > /tmp/pre"}], run_cmd="python3 /tmp/agent.py ${prompt}",
        agent_run_timeout=120, agent_run_check_interval=2, project_path="/tmp/project",
        model_service_config=ModelServiceConfig(enabled=True, install_cmd="true"),
    )  # fmt: skip
    await box.agent.install(config)
    service = box.model_service
    run = asyncio.create_task(box.agent.run("begin"))
    answers = ["$ echo made > made.txt", "the end"]
    requests = [await service.anti_call_llm(0, call_timeout=60, check_interval=1)]
    for index, answer in enumerate(answers, 1):
        requests.append(await service.anti_call_llm(index, completion(answer), call_timeout=60, check_interval=1))
    seen = await run
    await service.stop()
    return {
        "requests": requests,
        "output": seen.output, "code": seen.exit_code,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"client": rock.__file__, **asyncio.run(work())}))
