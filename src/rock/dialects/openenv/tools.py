"""Tools of environments: a task suite offers its functions, and every environment the tool "act"."""

from __future__ import annotations

from typing import Any

import orjson

from rock.dialects.openenv.messages import VALIDATION_ERROR, Failure

ACT, SAY = "act", "say"
RESERVED = ("reset", "step", "state", "close")  # names that OpenEnv reserves
_MOST = 512


def of_environment(protocol: str) -> list[dict[str, Any]]:
    if protocol == "task":
        schema: dict[str, Any] = {"type": "object", "properties": {"content": {"type": "string"}},
                                  "required": ["content"]}  # fmt: skip
        return [_tool(SAY, "Send a message of the agent: an answer, or the end of a turn.", schema)]
    action = {"type": "string"} if protocol == "gem" else {"description": "A number, text, a list or an object."}
    schema = {"type": "object", "properties": {"action": action}, "required": ["action"]}
    return [_tool(ACT, "Perform one action of the environment.", schema)]


def of_suite(found: Any) -> list[dict[str, Any]]:
    """Tools of a suite: a list of functions, or text with one function on each line, as {"name", "description",
    "parameters"}. Other content has no tools; it comes from inside the sandbox."""
    if isinstance(found, str):
        found = [_json(line) for line in found.splitlines()[:_MOST]]
    tools: list[dict[str, Any]] = []
    for item in found if isinstance(found, list) else []:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        if function["name"] in (*RESERVED, ACT, SAY) or len(tools) == _MOST:
            continue
        parameters = function.get("parameters")
        schema = parameters if isinstance(parameters, dict) else {"type": "object"}
        tools.append(_tool(function["name"], str(function.get("description", "")), {**schema, "type": "object"}))
    return tools


def action_of(protocol: str, offered: list[str], name: Any, arguments: Any) -> Any:
    """The native action for the call of a tool. Failure."""
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or name not in offered:
        raise Failure(VALIDATION_ERROR, f"there is no tool {str(name)[:100]!r}; there are {', '.join(offered)[:500]}")
    if not isinstance(arguments, dict):
        raise Failure(VALIDATION_ERROR, "the arguments of a tool are not an object")
    if name == ACT and protocol != "task":
        if set(arguments) != {"action"}:
            raise Failure(VALIDATION_ERROR, "the tool act has the argument action alone")
        return arguments["action"]
    if name == SAY:
        if set(arguments) != {"content"} or not isinstance(arguments["content"], str):
            raise Failure(VALIDATION_ERROR, "the tool say has the argument content alone, a text")
        message: dict[str, Any] = {"role": "assistant", "content": arguments["content"]}
    else:
        call = {"name": name, "arguments": orjson.dumps(arguments).decode()}
        message = {"role": "assistant", "content": "",
                   "tool_calls": [{"id": "call_0", "type": "function", "function": call}]}  # fmt: skip
    return {"action": message, "params": {}}


def _tool(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "description": description, "inputSchema": schema}


def _json(line: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
