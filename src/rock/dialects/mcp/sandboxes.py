"""Tools for sandboxes and their ports."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rock.dialects.mcp.context import IDLE, ToolContext
from rock.dialects.mcp.tools import Arguments, InSandbox, Result, Tool, json_text
from rock.errors import InvalidConfig
from rock.http.asgi import validate
from rock.protocol.keys import Access
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import SandboxConfig

_SHOWN = ("sandbox_id", "name", "state", "image", "cpus", "memory", "isolation", "reason", "auto_stop_at", "labels")
IMAGE = "host"


class Create(Arguments):
    image: str = Field(default=IMAGE, min_length=1, max_length=1024,
                       description='Like "python:3.11"; "host" is the system of the server, read-only.')  # fmt: skip
    name: str | None = Field(default=None, max_length=63, description="A name for people.")
    memory: str = Field(default="2g", max_length=32, description="Memory limit, like 512m or 8g.")
    cpus: float = Field(default=2.0, gt=0, description="CPU limit.")
    network: Literal["none", "nat"] = Field(
        default="none", description='"none" has loopback only; "nat" reaches public addresses.')
    egress: list[str] | None = Field(
        default=None, max_length=64,
        description='The only allowed destinations, like "example.com:443"; implies "nat".')
    env: dict[str, str] | None = Field(default=None, description="Environment variables of all programs.")
    idle_timeout: int = Field(default=IDLE, ge=1, le=86400,
                              description="Seconds without a request after which it is stopped.")  # fmt: skip

    def config(self) -> SandboxConfig:
        """InvalidConfig."""
        fields: dict[str, Any] = {"image": self.image, "memory": self.memory, "cpus": self.cpus,
                                  "auto_clear_seconds": self.idle_timeout}  # fmt: skip
        if self.egress is None or "network" in self.model_fields_set:
            fields["network"] = self.network
        fields |= {name: value for name in ("name", "egress", "env") if (value := getattr(self, name)) is not None}
        return validate(SandboxConfig, fields)


class Listing(Arguments):
    state: Literal["pending", "running", "stopped", "archived"] | None = Field(
        default=None, description="By default those that have not ended.")
    limit: int = Field(default=50, ge=1, le=500)


class Port(InSandbox):
    port: int = Field(ge=1, le=65535, description="The port on which a program in the sandbox listens.")


def _short(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in _SHOWN if info.get(name) not in (None, {}, "")}


async def create(context: ToolContext, given: Create) -> Result:
    sandbox_id = await context.create(given.config())
    info = _short(await context.api.json("get_sandbox", sandbox_id=sandbox_id))
    return Result(f"sandbox {sandbox_id} runs image {given.image}", info)


async def listed(context: ToolContext, given: Listing) -> Result:
    query: dict[str, str | int] = {"limit": given.limit, "state": given.state or "pending,running,stopping"}
    items = [_short(info) for info in (await context.api.json("list_sandboxes", query=query))["items"]]
    rows = ["  ".join(str(item[name]) for name in ("sandbox_id", "state", "image", "name") if name in item)
            for item in items]  # fmt: skip
    return Result("\n".join(rows) or "no sandboxes", {"sandboxes": items})


async def info(context: ToolContext, given: InSandbox) -> Result:
    found = await context.json("get_sandbox", given=given.sandbox_id, query={"usage": 1})
    shown = {**_short(found), "usage": found.get("usage")}
    return Result(json_text(shown), shown)


async def stop(context: ToolContext, given: InSandbox) -> Result:
    session = context.session
    if given.sandbox_id is None and (session is None or session.sandbox_id is None):
        raise InvalidConfig("the session has no sandbox, and the call names none", hint="pass sandbox_id")
    found = await context.json("stop_sandbox", given=given.sandbox_id)
    sandbox_id = str(found["sandbox_id"])
    if session is not None and session.sandbox_id == sandbox_id:
        session.sandbox_id, session.is_given = None, False
    return Result(f"sandbox {sandbox_id} is {found['state']}", _short(found))


async def port_url(context: ToolContext, given: Port) -> Result:
    found = await context.json("get_sandbox", given=given.sandbox_id)
    path = ROUTES["port"].path.format(sandbox_id=found["sandbox_id"], port=given.port, rest="")
    url = context.base_url.rstrip("/") + path
    text = f"{url}\nRequests to it need the API key of the server, as header X-ROCK-API-Key."
    return Result(text, {"url": url, "sandbox_id": found["sandbox_id"], "port": given.port})


TOOLS: list[Tool[Any]] = [
    Tool("sandbox_create", "Create a sandbox",
         "Create an isolated Linux sandbox and return its sandbox_id. Use it for another image, other limits or a "
         "network; other tools create the default sandbox of a session themselves.", Create, Access.CREATE, create),
    Tool("sandbox_list", "List sandboxes", "List sandboxes, newest first.", Listing, Access.READ, listed,
         read_only=True),
    Tool("sandbox_info", "Show a sandbox", "State, limits and resource usage of a sandbox.", InSandbox, Access.READ,
         info, read_only=True),
    Tool("sandbox_stop", "Stop a sandbox", "Stop a sandbox. Its processes end and its files are deleted.", InSandbox,
         Access.CREATE, stop, destructive=True),
    Tool("port_url", "URL of a port", "The URL at which the HTTP server or WebSocket of a program in the sandbox is "
         "reachable through the server.", Port, Access.READ, port_url, read_only=True),
]  # fmt: skip
