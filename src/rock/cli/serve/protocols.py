"""MCP, OpenEnv, SWE-ReX and AgentScope, mounted beside the native API of a server."""

from __future__ import annotations

from rock.dialects.agentscope import AgentScopeEndpoint
from rock.dialects.mcp.endpoint import McpEndpoint
from rock.dialects.openenv.endpoint import OpenEnvEndpoint
from rock.dialects.swerex.endpoint import SwerexEndpoint
from rock.http.asgi import App, Receive, Router, Scope, Send

_PREFIXES = ("/mcp", "/swerex/", "/openenv/", "/agentscope/")


class Protocols:
    """The routes of these dialects. api: the application that serves the native API."""

    def __init__(self, api: App) -> None:
        self._router = Router("dialects")
        self._matches = [McpEndpoint(api).router.match, SwerexEndpoint(api).router.match, OpenEnvEndpoint(api).match,
                         AgentScopeEndpoint(api).router.match]  # fmt: skip

    def over(self, rest: App) -> App:
        """These routes, and `rest` for all other paths."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket") and scope["path"].startswith(_PREFIXES):
                method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
                for match in self._matches:
                    if (found := match(method, scope["path"])) is not None:
                        await self._router.serve(found, scope, receive, send)
                        return
            await rest(scope, receive, send)

        return app
