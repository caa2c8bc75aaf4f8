"""The MCP toolset of Pydantic AI, with its test model."""

from __future__ import annotations

import asyncio
import os

from checks import check
from pydantic_ai import Agent
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel


def scripted(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Calls run_command once, and answers with its output."""
    results = [part for message in messages for part in message.parts if isinstance(part, ToolReturnPart)]
    if results:
        return ModelResponse(parts=[TextPart(str(results[-1].content))])
    assert "run_command" in {tool.name for tool in info.function_tools}
    return ModelResponse(parts=[ToolCallPart("run_command", {"command": "echo $((6 * 7))"})])


async def play(name: str, toolset: object) -> None:
    with check(f"Pydantic AI, {name}: tools"):
        agent = Agent(FunctionModel(scripted), toolsets=[toolset])
        async with agent:
            found = await agent.run("compute 6 * 7")
        assert "42" in found.output, found.output


async def main() -> None:
    config = {"command": "rock", "args": ["mcp", "--memory", "512m"], "env": dict(os.environ)}
    await play("stdio", MCPToolset({"mcpServers": {"rock": config}}))
    headers = {"Authorization": f"Bearer {os.environ['ROCK_API_KEY']}"}
    await play("HTTP", MCPToolset(f"{os.environ['ROCK_BASE_URL']}/mcp", headers=headers))


asyncio.run(main())
