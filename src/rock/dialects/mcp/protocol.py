"""The methods of the protocol, independent of the transport: initialize, discover, ping, and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rock import __version__
from rock.dialects.mcp import commands, environments, files, sandboxes
from rock.dialects.mcp.context import Session, ToolContext
from rock.dialects.mcp.messages import (
    CANCELED,
    HANDSHAKE,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    VERSIONS,
    Failure,
    Message,
)
from rock.dialects.mcp.tools import Toolbox
from rock.protocol.keys import Access

INSTRUCTIONS = (
    "Isolated Linux sandboxes. Tools without sandbox_id use the sandbox of this session, which is created by the first "
    "call and stopped with the session. Use run_command for shell commands, the file tools for text files, "
    "start_process for servers, and sandbox_create for another image, limits or a network.")
STATELESS = (
    "Isolated Linux sandboxes. Call sandbox_create first, and pass its sandbox_id to the other tools. Call "
    "sandbox_stop at the end; an unused sandbox is stopped after its idle timeout.")

TOOLBOX = Toolbox([*sandboxes.TOOLS, *commands.TOOLS, *files.TOOLS, *environments.TOOLS])
_EMPTY = ("ping", "logging/setLevel")


def initialized(params: dict[str, Any]) -> dict[str, Any]:
    """The result of `initialize`: the requested version, or the newest that begins with a handshake."""
    requested = params.get("protocolVersion")
    if not isinstance(requested, str):
        raise Failure(INVALID_PARAMS, "initialize has no protocolVersion")
    version = requested if requested in HANDSHAKE else HANDSHAKE[-1]
    return {"protocolVersion": version, "capabilities": {"tools": {"listChanged": False}}, "serverInfo": _server(),
            "instructions": INSTRUCTIONS}  # fmt: skip


def discovered(has_session: bool, versions: Sequence[str] = VERSIONS) -> dict[str, Any]:
    """The result of `server/discover`. versions: those that a client which speaks several may choose from."""
    text = INSTRUCTIONS if has_session else STATELESS
    return {"supportedVersions": list(versions), "capabilities": {"tools": {}}, "serverInfo": _server(),
            "instructions": text, "ttlMs": 0, "cacheScope": "private"}  # fmt: skip


def _server() -> dict[str, str]:
    return {"name": "rock", "title": "ROCK sandboxes", "version": __version__}


async def result_of(
    message: Message, context: ToolContext, scopes: frozenset[Access] | None, versions: Sequence[str] = VERSIONS
) -> dict[str, Any]:
    """The result of a request. Failure.

    The request is registered in its session while it runs, so that the client can cancel it. scopes: the access rights
    of the caller; None where they are unknown. versions: as of `discovered`.
    """
    modern = message.is_modern
    if modern:
        message.check_envelope()
    if message.method == "server/discover":
        result = discovered(context.session is not None, versions)
    else:
        result = await _result_of(message, context, scopes)
    if modern:
        result["resultType"] = "complete"
        if message.method == "tools/list":
            result |= {"ttlMs": 0, "cacheScope": "private"}
    return result


async def _result_of(message: Message, context: ToolContext, scopes: frozenset[Access] | None) -> dict[str, Any]:
    has_session = context.session is not None
    if message.method in _EMPTY:
        return {}
    if message.method == "tools/list":
        if message.params.get("cursor") is not None:
            raise Failure(INVALID_PARAMS, "there is no such page of tools: the list has one page")
        return {"tools": TOOLBOX.listed(scopes, has_session)}
    if message.method == "tools/call":
        return await _call(message, context)
    raise Failure(METHOD_NOT_FOUND, f"there is no method {str(message.method)[:100]}")


async def _call(message: Message, context: ToolContext) -> dict[str, Any]:
    name, arguments = message.params.get("name"), message.params.get("arguments")
    tool = TOOLBOX.find(name)
    if tool is None:
        raise Failure(INVALID_PARAMS, f"there is no tool {str(name)[:100]!r}")
    if arguments is not None and not isinstance(arguments, dict):
        raise Failure(INVALID_PARAMS, "arguments is not an object")
    if message.params.get("task") is not None:
        raise Failure(INVALID_PARAMS, "task: calls as tasks are not supported; leave the field out")
    session = context.session
    if session is None or message.id is None:
        return await tool.call(context, arguments)
    return await _registered(session, message.id, asyncio.ensure_future(tool.call(context, arguments)))


async def _registered(session: Session, id: str | int, task: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    if id in session.running:
        task.cancel()
        raise Failure(INVALID_REQUEST, f"a request with the id {id!r} is in progress")
    session.running[id] = task
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    finally:
        session.running.pop(id, None)
    if task.cancelled():
        raise Failure(CANCELED, "the request was canceled")
    return task.result()
