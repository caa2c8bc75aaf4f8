"""The `mcp` client of release 1, which most agent hosts have: mcp1_client.py http|stdio"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from typing import Any

from checks import check, raises
from mcp import ClientSession, McpError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client


async def main(transport: str) -> None:
    async with AsyncExitStack() as stack:
        if transport == "stdio":
            server = StdioServerParameters(command="rock", args=["mcp", "--memory", "512m"], env=dict(os.environ))
            reads, writes = await stack.enter_async_context(stdio_client(server))
        else:
            headers = {"Authorization": f"Bearer {os.environ['ROCK_API_KEY']}"}
            url = f"{os.environ['ROCK_BASE_URL']}/mcp?memory=512m"
            reads, writes, _ = await stack.enter_async_context(streamablehttp_client(url, headers=headers))
        session = await stack.enter_async_context(ClientSession(reads, writes))
        with check(f"{transport}: initialize"):
            started = await session.initialize()
            assert started.serverInfo.name == "rock" and started.capabilities.tools is not None

        async def call(name: str, **arguments: Any) -> Any:
            result = await session.call_tool(name, arguments)
            assert not result.isError, result.content
            return result.structuredContent

        with check(f"{transport}: ping and tools"):
            await session.send_ping()
            assert len((await session.list_tools()).tools) == 19
        with check(f"{transport}: command, code, files"):
            assert (await call("run_command", command="echo out; exit 3"))["exit_code"] == 3
            assert (await call("run_code", code="print(6 * 7)"))["stdout"] == "42\n"
            await call("write_file", path="/tmp/a", content="one")
            assert (await call("read_file", path="/tmp/a"))["content"] == "one"
        with check(f"{transport}: the sandbox of the session"):
            assert (await call("sandbox_info"))["memory"] == "512m"
        with check(f"{transport}: errors"):
            assert (await session.call_tool("read_file", {"path": "/nothing"})).isError
            with raises(McpError, "no tool"):
                await session.call_tool("nothing", {})
            with raises(McpError):
                await session.list_resources()


asyncio.run(main(*sys.argv[1:]))
