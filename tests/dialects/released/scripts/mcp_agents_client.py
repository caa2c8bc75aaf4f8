"""MCP servers of the OpenAI Agents SDK, with a scripted model."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from agents.mcp import MCPServerStdio, MCPServerStreamableHttp
from agents.models.interface import Model
from checks import check
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from agents import Agent, ModelResponse, Runner, Usage, set_tracing_disabled

set_tracing_disabled(True)


class Scripted(Model):
    """Calls run_command once, and answers with its output."""

    async def get_response(self, system_instructions: Any, input: Any, *rest: Any, **more: Any) -> ModelResponse:
        results = [item for item in input if isinstance(item, dict) and item.get("type") == "function_call_output"]
        output: list[Any]
        if not results:
            arguments = json.dumps({"command": "echo $((6 * 7))"})
            output = [ResponseFunctionToolCall(type="function_call", call_id="1", name="run_command",
                                               arguments=arguments)]  # fmt: skip
        else:
            text = ResponseOutputText(type="output_text", annotations=[], text=str(results[-1]["output"]))
            output = [ResponseOutputMessage(id="1", type="message", role="assistant", status="completed",
                                            content=[text])]  # fmt: skip
        return ModelResponse(output=output, usage=Usage(), response_id=None)

    def stream_response(self, *words: Any, **more: Any) -> AsyncIterator[Any]:
        raise NotImplementedError


async def play(name: str, server: Any) -> None:
    with check(f"OpenAI Agents SDK, {name}: tools"):
        async with server:
            assert "run_command" in {tool.name for tool in await server.list_tools()}
            agent = Agent(name="agent", model=Scripted(), mcp_servers=[server])
            found = await Runner.run(agent, "compute 6 * 7")
            assert "42" in found.final_output, found.final_output


async def main() -> None:
    stdio = {"command": "rock", "args": ["mcp", "--memory", "512m"], "env": dict(os.environ)}
    await play("stdio", MCPServerStdio(params=stdio, client_session_timeout_seconds=60))
    headers = {"Authorization": f"Bearer {os.environ['ROCK_API_KEY']}"}
    http = {"url": f"{os.environ['ROCK_BASE_URL']}/mcp", "headers": headers, "timeout": 60}
    await play("HTTP", MCPServerStreamableHttp(params=http, client_session_timeout_seconds=60))


asyncio.run(main())
