"""MCP, OpenEnv, SWE-ReX and AgentScope, mounted beside the native API of a server.

Each is imported by its first request, in a thread: together they would take a twentieth of the start.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Protocol

from rock.http.asgi import App, Found, Receive, Router, Scope, Send


class Endpoint(Protocol):
    """What each dialect provides: the handler of a request, and the end of what it runs."""

    def match(self, method: str, path: str) -> Found | None: ...

    async def close(self) -> None: ...


# The module and the class of each path. A class is called with the application of the native API.
_ENDPOINTS = {
    "/mcp": "rock.dialects.mcp.endpoint:McpEndpoint",
    "/openenv/": "rock.dialects.openenv.endpoint:OpenEnvEndpoint",
    "/swerex/": "rock.dialects.swerex.endpoint:SwerexEndpoint",
    "/agentscope/": "rock.dialects.agentscope:AgentScopeEndpoint",
}
_PREFIXES = tuple(_ENDPOINTS)


class Protocols:
    """The routes of these dialects. api: the application that serves the native API."""

    def __init__(self, api: App) -> None:
        self._api = api
        self._router = Router("protocols")
        self._made: dict[str, Endpoint] = {}
        self._lock = asyncio.Lock()

    def over(self, rest: App) -> App:
        """These routes, and `rest` for all other paths."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket") and scope["path"].startswith(_PREFIXES):
                method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
                found = (await self._endpoint_of(scope["path"])).match(method, scope["path"])
                if found is not None:
                    await self._router.serve(found, scope, receive, send)
                    return
            await rest(scope, receive, send)

        return app

    async def _endpoint_of(self, path: str) -> Endpoint:
        prefix = next(name for name in _PREFIXES if path.startswith(name))
        if prefix not in self._made:
            async with self._lock:
                if prefix not in self._made:
                    module, _, name = _ENDPOINTS[prefix].partition(":")
                    made = await asyncio.to_thread(import_module, module)
                    self._made[prefix] = getattr(made, name)(self._api)
        return self._made[prefix]

    async def close(self) -> None:
        """End what the dialects run."""
        for endpoint in self._made.values():
            await endpoint.close()
