"""`rock mcp`: an MCP server on standard input and output, over the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import Any

import click
import orjson

from rock import settings
from rock.cli.connection import OPTIONS, find
from rock.cli.parsing import command, complete_id, complete_image
from rock.dialects.api import Query, check_path
from rock.dialects.mcp.sessions import session_of
from rock.dialects.mcp.stdio import StdioServer
from rock.protocol.routes import ROUTES
from rock.sdk.http import query_string
from rock.sdk.transport import ANSWER_TIMEOUT, Transport


class TransportApi:
    """The native API of a server, through the SDK."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def bytes(
        self, route: str, body: Any = b"", *, query: Query | None = None, key: str | None = None, **path: str
    ) -> bytes:
        row = ROUTES[route]
        check_path(path)
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        target = row.url(**path) + query_string(dict(query or {}))
        # the server limits the duration of what a call starts; beyond that it is unreachable
        seconds = float((query or {}).get("wait", 0)) + (body.get("timeout") or 0 if isinstance(body, dict) else 0)
        long = route in ("make_env", "reset_env", "step_env")
        return await self._transport.call(row.method, target, data, timeout=None if long else ANSWER_TIMEOUT + seconds,
                                          key=key)  # fmt: skip

    async def json(
        self, route: str, body: Any = b"", *, query: Query | None = None, key: str | None = None, **path: str
    ) -> Any:
        return orjson.loads(await self.bytes(route, body, query=query, key=key, **path))


@command("mcp", example='rock mcp\nrock mcp --image python:3.11 --memory 4g\nrock mcp --sandbox web')
@click.option("--image", shell_complete=complete_image, help="Image of the sandbox of the session; by default host.")
@click.option("--memory", help="Its memory limit, like 4g.")
@click.option("--cpus", help="Its CPU limit.")
@click.option("--network", type=click.Choice(["none", "nat"]), help="Its network.")
@click.option("--sandbox", shell_complete=complete_id, help="Use this existing sandbox, and leave it running.")
def mcp(image: str | None, memory: str | None, cpus: str | None, network: str | None, sandbox: str | None) -> None:
    """Serve the tools of sandboxes to an MCP client.

    Reads messages from the standard input and writes to the standard output. The first call of a tool creates a
    sandbox, which is stopped at the end of the input. A server also serves the protocol itself, at /mcp.
    """
    given = {"image": image, "memory": memory, "cpus": cpus, "network": network,
             "sandbox": None if sandbox is None else find(sandbox).sandbox_id}  # fmt: skip
    session = session_of("", {name: value for name, value in given.items() if value is not None})
    transport = Transport(OPTIONS.base_url or settings.base_url(), OPTIONS.api_key or settings.api_key())
    base_url = transport.url.partition(";")[0]
    server = StdioServer(TransportApi(transport), session, base_url, sys.stdin.fileno(), sys.stdout.buffer)
    asyncio.run(_serve(server))


async def _serve(server: StdioServer) -> None:
    task = asyncio.create_task(server.serve())
    with contextlib.suppress(NotImplementedError):  # on Windows Ctrl-C comes as KeyboardInterrupt
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
