"""Random requests to every protocol: no internal error, and the server serves afterwards."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.dialects.conftest import send
from websockets.sync.client import connect

from rock.dialects.mcp.protocol import TOOLBOX
from rock.sync import Client, Sandbox, SandboxConfig

ENV = "/openenv/game:GuessTheNumber-v0-easy"
TIMES = int(os.environ.get("ROCK_TEST_FUZZ") or 40)  # requests to each
NAMES = ("jsonrpc", "id", "method", "params", "name", "arguments", "command", "path", "content", "session", "timeout",
         "data", "type", "action", "seed", "identity", "tool_name", "meta", "args", "instance_id", "env", "cwd",
         "action_type", "check", "startup_source", "split", "index", "options", "episode_id", "task_id")  # fmt: skip
REX = ("create_session", "run_in_session", "close_session", "execute", "read_file", "write_file", "upload")
SCOPE = ("release", "call_tool", "list_tools", "get_info", "get_status", "check_health", "get_session_mapping", "start")
SKIPPED = ("env_make", "sandbox_create", "sandbox_stop")  # they start and stop sandboxes


class Values:
    """Random values of JSON."""

    def __init__(self, seed: int, sandbox_id: str) -> None:
        self.random = random.Random(seed)
        self._texts = ("", "x", "\0", "../..", "a" * 300, "é\u2028", "default", sandbox_id, "true", ENV)

    def some(self, depth: int = 0) -> Any:
        kind = self.random.randrange(12 if depth < 3 else 8)
        if kind < 8:
            plain = (None, True, self.random.choice((0, -1, 1 << 63, 1e308)), self.random.choice(self._texts), 0.5,
                     "name:x", [], {})  # fmt: skip
            return plain[kind]
        if kind < 10:
            return [self.some(depth + 1) for _ in range(self.random.randrange(3))]
        return self.fields(NAMES, depth + 1)

    def fields(self, names: tuple[str, ...], depth: int = 0) -> dict[str, Any]:
        return {self.random.choice(names): self.some(depth) for _ in range(self.random.randrange(5))}


@pytest.mark.parametrize("protocol", ["mcp", "swerex", "openenv", "agentscope", "socket"])
def test_random_requests(
    dialect_server: RunningServer, dialect_keys: dict[str, str], clean: None, protocol: str
) -> None:
    url, key = dialect_server.url, dialect_keys["mine"]
    config = SandboxConfig(base_url=url, api_key=key, image="host", memory="256m")
    with Sandbox(config) as sandbox:
        values = Values(7, str(sandbox.sandbox_id))
        if protocol == "socket":
            _socket(url, key, values)
        else:
            make = {"mcp": _mcp, "swerex": _swerex, "openenv": _openenv, "agentscope": _agentscope}[protocol]
            ask = make(url, key, values, str(sandbox.sandbox_id))
            for _ in range(TIMES):
                path, body, status, reply = ask()
                seen = json.dumps(body)[:500], status, reply[:500]
                assert status in (200, 202, 400, 404, 409, 410, 422, 511), (path, *seen)
                assert b"unexpected error" not in reply and b'"internal"' not in reply, (path, *seen)
        assert sandbox.execute(["true"]).exit_code == 0
    with Client(url, key) as client:
        for info in client.list_sandboxes(states="pending,running"):  # those of environments
            client.stop_sandbox(info.sandbox_id)


Ask = Callable[[], tuple[str, Any, int, bytes]]


def _sender(url: str, key: str, **headers: str) -> Callable[[str, Any], tuple[str, Any, int, bytes]]:
    def ask(path: str, body: Any) -> tuple[str, Any, int, bytes]:
        reply = send(url, "POST", path, body, key, **headers)
        return path, body, reply.status, reply.body

    return ask


def _mcp(url: str, key: str, values: Values, sandbox_id: str) -> Ask:
    begin = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {"protocolVersion": "2025-11-25"}}
    session = send(url, "POST", f"/mcp?sandbox={sandbox_id}", begin, key).headers["mcp-session-id"]
    ask = _sender(url, key, mcp_session_id=session)
    tools = [tool for tool in TOOLBOX.listed(None, True) if tool["name"] not in SKIPPED]

    def one() -> tuple[str, Any, int, bytes]:
        tool = values.random.choice(tools)
        given = values.fields((*tool["inputSchema"]["properties"], "other"))
        if tool["name"] in ("run_command", "run_code"):
            given["timeout"] = 1
        params = {"name": tool["name"], "arguments": given}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        return ask("/mcp", message if values.random.random() < 0.8 else values.fields(NAMES[:6]))

    return one


def _swerex(url: str, key: str, values: Values, sandbox_id: str) -> Ask:
    ask = _sender(url, key)
    ask(f"/swerex/{sandbox_id}/create_session", {})

    def one() -> tuple[str, Any, int, bytes]:
        body = {**values.fields(NAMES), "timeout": 1}
        if values.random.random() < 0.5:
            body["command"] = values.random.choice(("true", ["true"], "cat", "a\nb"))
        return ask(f"/swerex/{values.random.choice((sandbox_id, 'x'))}/{values.random.choice(REX)}", body)

    return one


def _openenv(url: str, key: str, values: Values, sandbox_id: str) -> Ask:
    ask = _sender(url, key)

    def one() -> tuple[str, Any, int, bytes]:
        route, body = values.random.choice(("reset", "step", "mcp", "mcp")), values.fields(NAMES)
        if route == "mcp":
            method = values.random.choice(("tools/list", "tools/call", "openenv/session/close", "initialize"))
            body |= {"jsonrpc": "2.0", "method": method, "params": values.fields(("session_id", "name", "arguments"))}
        return ask(f"{ENV}/{route}", body)

    return one


def _agentscope(url: str, key: str, values: Values, sandbox_id: str) -> Ask:
    ask = _sender(url, key)
    names = ("identity", "args", "tool_name", "arguments", "session_ctx_id", "instance_id")
    return lambda: ask(f"/agentscope/{values.random.choice(SCOPE)}", values.fields(names))


def _socket(url: str, key: str, values: Values) -> None:
    with connect(url.replace("http", "ws") + f"{ENV}/ws", additional_headers={"authorization": f"Bearer {key}"},
                 proxy=None) as socket:  # fmt: skip
        for _ in range(TIMES):
            kind = values.random.choice(("reset", "step", "state", "mcp", "x", None))
            data = values.fields(NAMES) if values.random.random() < 0.7 else values.some()
            socket.send(json.dumps({"type": kind, "data": data}))
            reply = json.loads(socket.recv(60))
            assert reply["type"] in ("observation", "state", "mcp", "error"), (kind, data, reply)
            assert "unexpected error" not in json.dumps(reply), (kind, data, reply)
