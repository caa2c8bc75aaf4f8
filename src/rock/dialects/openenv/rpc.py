"""MCP of OpenEnv: JSON-RPC for the tools of an environment, over HTTP and over sockets."""

from __future__ import annotations

from typing import Any

from rock.dialects.openenv.episode import Episode
from rock.dialects.openenv.messages import VALIDATION_ERROR, Failure, dumps
from rock.dialects.openenv.sessions import Episodes

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, SERVER_ERROR = -32700, -32600, -32601, -32602, -32000
_PROTOCOL = "2025-06-18"


async def response(message: Any, episodes: Episodes, episode: Episode | None) -> dict[str, Any]:
    """The response to a message. episode: of the socket; None over HTTP, where the parameter session_id names it."""
    id = message.get("id") if isinstance(message, dict) else None
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0" or not isinstance(message.get("method"), str):
        return error(id, INVALID_REQUEST, 'the message is no request with "jsonrpc": "2.0" and a method')
    params = message.get("params") or {}
    if not isinstance(params, dict):
        return error(id, INVALID_PARAMS, "params is not an object")
    try:
        found = await _result(message["method"], params, episodes, episode)
    except Failure as failure:
        code = INVALID_PARAMS if failure.code == VALIDATION_ERROR else SERVER_ERROR
        return error(id, code, failure.message, {"code": failure.code})
    if found is None:
        return error(id, METHOD_NOT_FOUND, f"there is no method {message['method'][:100]}")
    return {"jsonrpc": "2.0", "id": id, "result": found}


async def _result(
    method: str, params: dict[str, Any], episodes: Episodes, own: Episode | None
) -> dict[str, Any] | None:
    """The result; None for an unknown method. Failure."""
    if method == "initialize":
        return {"protocolVersion": _PROTOCOL, "capabilities": {"tools": {}},
                "serverInfo": {"name": episodes.env_id, "version": "1"}}  # fmt: skip
    if method == "ping":
        return {}
    if method == "openenv/session/create":
        return {"session_id": episodes.create()}
    if method == "openenv/session/close":
        return {"session_id": params.get("session_id"), "closed": await episodes.close(params.get("session_id"))}
    if method not in ("tools/list", "tools/call"):
        return None
    episode = own if own is not None else episodes.find(params.get("session_id"))
    if episode is None:
        if method == "tools/call":
            raise Failure(VALIDATION_ERROR, "tools/call needs a session_id; call openenv/session/create, then reset")
        return {"tools": await episodes.one_off().tools()}
    if method == "tools/list":
        return {"tools": await episode.tools()}
    found = await episode.call_tool(params.get("name"), params.get("arguments"))
    value = found["observation"]["observation"]
    text = value if isinstance(value, str) else dumps(value).decode()
    data = {"observation": value, "reward": found["reward"], "done": found["done"], "metadata": found["metadata"]}
    return {"content": [{"type": "text", "text": text}], "data": data, "isError": False}


def error(id: Any, code: int, message: str, data: Any = None) -> dict[str, Any]:
    body: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        body["data"] = data
    return {"jsonrpc": "2.0", "id": id if isinstance(id, str | int) else None, "error": body}
