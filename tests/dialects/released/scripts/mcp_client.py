"""The released `mcp` client, in both eras of the protocol: mcp_client.py http|stdio MODE"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import httpx2
from checks import check, raises
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client


def target_of(transport: str) -> Any:
    if transport == "stdio":
        return StdioServerParameters(command="rock", args=["mcp", "--memory", "512m"], env=dict(os.environ))
    headers = {"Authorization": f"Bearer {os.environ['ROCK_API_KEY']}"}
    client = httpx2.AsyncClient(headers=headers, timeout=120)
    return streamable_http_client(f"{os.environ['ROCK_BASE_URL']}/mcp", http_client=client)


async def main(transport: str, mode: str) -> None:
    prefix = f"{transport} {mode}: "
    async with Client(target_of(transport), mode=mode) as client:
        with check(prefix + "version"):
            modern = mode not in ("legacy", "auto") or (mode == "auto" and transport == "stdio")
            assert client.protocol_version == ("2026-07-28" if modern else "2025-11-25")
        with check(prefix + "list of tools"):
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert {"run_command", "run_code", "read_file", "env_make", "sandbox_create"} <= set(tools)
        where: dict[str, str] = {}
        if transport == "http" and modern:
            made = await client.call_tool("sandbox_create", {"memory": "512m"})
            where = {"sandbox_id": made.structured_content["sandbox_id"]}

        async def call(tool: str, **arguments: Any) -> Any:
            result = await client.call_tool(tool, {**arguments, **where})
            assert not result.is_error, result.content
            return result.structured_content

        with check(prefix + "command"):
            seen = await call("run_command", command="echo out; echo err >&2; exit 3")
            assert (seen["stdout"], seen["stderr"], seen["exit_code"]) == ("out\n", "err\n", 3)
        with check(prefix + "session"):
            await call("run_command", command="cd /tmp", session="s")
            assert (await call("run_command", command="pwd", session="s"))["stdout"] == "/tmp\n"
        with check(prefix + "code"):
            assert (await call("run_code", code="print(6 * 7)"))["stdout"] == "42\n"
        with check(prefix + "files"):
            await call("write_file", path="/tmp/a", content="one\ntwo\n")
            await call("edit_file", path="/tmp/a", old="two", new="2")
            assert (await call("read_file", path="/tmp/a"))["content"] == "one\n2\n"
            assert "a" in [item["name"] for item in (await call("list_files", path="/tmp"))["files"]]
        with check(prefix + "background process"):
            process = (await call("start_process", command="echo up; sleep 1000"))["process_id"]
            assert (await call("process_logs", process_id=process, wait=20))["output"] == "up\n"
            await call("stop_process", process_id=process)
        with check(prefix + "concurrent calls"):
            seen = await asyncio.gather(*(call("run_command", command=f"sleep 0.1; echo {n}") for n in range(8)))
            assert [one["stdout"] for one in seen] == [f"{n}\n" for n in range(8)]
        with check(prefix + "error of a tool"):
            result = await client.call_tool("read_file", {"path": "/nothing", **where})
            assert result.is_error and "no such file" in result.content[0].text
        with check(prefix + "unknown tool"), raises(MCPError, "there is no tool"):
            await client.call_tool("nothing", {})
        with check(prefix + "cancellation"):
            try:
                async with asyncio.timeout(1):
                    await client.call_tool("run_command", {"command": "echo $$ > /tmp/pid; sleep 1000", **where})
            except TimeoutError:
                pass
            for _ in range(100):
                seen = await call("run_command", command="kill -0 $(cat /tmp/pid)")
                if seen["exit_code"]:
                    break
                await asyncio.sleep(0.1)
            assert seen["exit_code"], "the command still runs"
        with check(prefix + "environment"):
            made = (await client.call_tool("env_make", {"env_id": "game:GuessTheNumber-v0-easy"})).structured_content
            step = {"environment": made["environment"], "action": "\\boxed{1}"}
            assert "reward" in (await client.call_tool("env_step", step)).structured_content
            await client.call_tool("env_close", {"environment": made["environment"]})
        if where:
            await client.call_tool("sandbox_stop", where)


asyncio.run(main(*sys.argv[1:]))
