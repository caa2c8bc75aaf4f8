"""/openenv by raw WebSockets and HTTP: messages, sessions, keys, disconnects and hostile input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from tests.conftest import RunningServer
from tests.dialects.conftest import Reply, send
from tests.waiting import until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rock.dialects.openenv import tools
from rock.sync import Client

ENV = "game:GuessTheNumber-v0-easy"


class Environment:
    """The routes of one environment."""

    def __init__(self, server: RunningServer, key: str | None, env_id: str = ENV) -> None:
        self.server = server
        self.key = key
        self.path = f"/openenv/{env_id}"

    @contextlib.contextmanager
    def socket(self, route: str = "/ws") -> Iterator[ClientConnection]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        url = self.server.url.replace("http", "ws") + quote(self.path) + route
        with connect(url, additional_headers=headers, proxy=None, open_timeout=60, max_size=None) as made:
            yield made

    def get(self, route: str) -> Reply:
        return send(self.server.url, "GET", quote(self.path) + route, key=self.key)

    def post(self, route: str, body: Any) -> Reply:
        return send(self.server.url, "POST", quote(self.path) + route, body, self.key, timeout=600)

    def rpc(self, method: str, **params: Any) -> Any:
        reply = self.post("/mcp", {"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        assert reply.status == 200 and reply.json["id"] == 1, reply
        return reply.json


def ask(socket: ClientConnection, kind: Any, data: Any = None) -> Any:
    socket.send(json.dumps({"type": kind} if data is None else {"type": kind, "data": data}))
    return json.loads(socket.recv(300))


def failed(reply: Any) -> str:
    assert reply["type"] == "error" and reply["data"]["message"], reply
    return str(reply["data"]["code"])


@pytest.fixture(scope="module")
def env(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> Iterator[Environment]:
    yield Environment(dialect_server, dialect_keys["mine"])
    with Client(dialect_server.url, dialect_keys["mine"]) as client:
        for info in client.list_sandboxes(states="pending,running"):
            client.stop_sandbox(info.sandbox_id)


def processes(env: Environment) -> int:
    """The processes of all sandboxes of the tenant: each environment is one."""
    with Client(env.server.url, env.key) as client:
        infos = client.list_sandboxes(states="running")
        usages = [client.get_sandbox(info.sandbox_id, usage=True).usage for info in infos]
        return sum(usage.pids or 0 for usage in usages if usage is not None)


def test_an_episode(env: Environment) -> None:
    with env.socket() as socket:
        assert ask(socket, "state") == {"type": "state", "data": {"episode_id": None, "step_count": 0}}
        assert failed(ask(socket, "step", {"action": "x"})) == "EXECUTION_ERROR"
        first = ask(socket, "reset", {"seed": 5, "episode_id": "mine"})
        assert first["type"] == "observation" and set(first["data"]) == {"observation", "reward", "done", "metadata"}
        assert (first["data"]["reward"], first["data"]["done"]) == (None, False)
        stepped = ask(socket, "step", {"action": "\\boxed{1}", "metadata": {}})["data"]
        assert isinstance(stepped["reward"], float) and stepped["metadata"]["terminated"] in (True, False)
        assert ask(socket, "state")["data"] == {"episode_id": "mine", "step_count": 1}
        assert ask(socket, "reset", {"seed": 5})["data"]["observation"] == first["data"]["observation"]
        assert ask(socket, "state")["data"]["step_count"] == 0
        socket.send('{"type": "close"}')
        with pytest.raises(ConnectionClosed):
            socket.recv(60)


def test_the_environment_ends_with_the_socket(env: Environment) -> None:
    with env.socket() as socket:
        ask(socket, "reset", {})
        before = processes(env)
    until(lambda: processes(env) < before)


def test_messages_ahead_are_answered_in_order(env: Environment) -> None:
    with env.socket() as socket:
        for message in ('{"type":"reset"}', *['{"type":"state"}'] * 5, '{"type":"nothing"}', "no json"):
            socket.send(message)
        kinds = [json.loads(socket.recv(60))["type"] for _ in range(8)]
    assert kinds == ["observation", *["state"] * 5, "error", "error"]


def test_a_client_that_leaves_during_a_request(env: Environment) -> None:
    for _ in range(3):
        with env.socket() as socket:
            socket.send('{"type":"reset"}')
    with env.socket() as socket:
        assert ask(socket, "reset", {})["type"] == "observation"


def test_hostile_messages(env: Environment) -> None:
    with env.socket() as socket:
        for text, code in (
            ("{", "INVALID_JSON"), ("[" * 50_000, "INVALID_JSON"), ("[]", "VALIDATION_ERROR"),
            ("7", "VALIDATION_ERROR"), ("{}", "UNKNOWN_TYPE"),
            ('{"type": {}}', "UNKNOWN_TYPE"), ('{"type":"step"}', "VALIDATION_ERROR"),
            ('{"type":"step","data":[]}', "VALIDATION_ERROR"), ('{"type":"reset","data":7}', "VALIDATION_ERROR"),
            ('{"type":"reset","data":{"seed":-1}}', "VALIDATION_ERROR"),
            ('{"type":"reset","data":{"seed":"x"}}', "VALIDATION_ERROR"),
            ('{"type":"reset","data":{"options":7}}', "VALIDATION_ERROR"),
            ('{"type":"reset","data":{"episode_id":"' + "x" * 300 + '"}}', "VALIDATION_ERROR"),
        ):  # fmt: skip
            socket.send(text)
            assert failed(json.loads(socket.recv(60))) == code, text[:80]
        socket.send(b"\xff\xfe")
        assert failed(json.loads(socket.recv(60))) == "INVALID_JSON"
        ask(socket, "reset", {})
        for action in ({}, {"act": 1}, {"action": "x", "more": 1}, {"type": "call_tool"}):
            reply = ask(socket, "step", action)
            problem = reply["data"]["observation"]["error"] if reply["type"] == "observation" else reply["data"]["code"]
            assert problem, action
        assert ask(socket, "step", {"action": "x" * 100_000})["type"] == "observation"
        socket.send('{"type":"reset","data":{"x":"' + "x" * (17 << 20) + '"}}')
        with pytest.raises(ConnectionClosed):
            socket.recv(60)


def test_unknown_environments(env: Environment, dialect_keys: dict[str, str]) -> None:
    for env_id in ("game:Nothing-v0", "hf://a/b", "task:nothing", "x" * 300, "file:/etc"):
        other = Environment(env.server, env.key, env_id)
        for route in ("/health", "/metadata", "/schema", "/openapi.json"):
            assert other.get(route).status in (404, 422), (env_id, route)
        with pytest.raises(InvalidStatus) as refused, other.socket():
            pass
        assert refused.value.response.status_code in (404, 422)
    for path in ("/openenv", "/openenv/", "/openenv//ws", "/openenv/ws", f"/openenv/{ENV}", f"/openenv/{ENV}/nothing"):
        assert send(env.server.url, "GET", path, key=env.key).status == 404, path


def test_descriptions(env: Environment) -> None:
    assert env.get("/health").json == {"status": "healthy"}
    assert env.get("/metadata").json["name"] == ENV
    schema = env.get("/schema").json
    assert set(schema) == {"action", "observation", "state"} and schema["action"]["required"] == ["action"]
    page = env.get("/openapi.json").json
    assert page["info"]["version"] and {"/reset", "/step", "/state"} <= set(page["paths"])
    assert env.get("/state").json == {"episode_id": None, "step_count": 0}
    assert env.get("/list_environments").json == [ENV]
    assert env.get(f"/{ENV}/splits").status == 422


def test_single_requests(env: Environment) -> None:
    before = processes(env)
    first = env.post("/reset", {"seed": 5})
    assert first.status == 200 and first.json["reward"] is None
    assert env.post("/step", {"action": {"action": "\\boxed{1}"}}).json["metadata"]["terminated"] in (True, False)
    for body in ({}, {"action": 7}, {"action": {}}, {"action": {"action": "x"}, "timeout_s": 1}, {"more": 1}):
        assert env.post("/step", body).status == 422, body
    failed = env.post("/reset", {"env_id": "the constructor has this argument"})
    assert (failed.status, failed.json["code"]) == (400, "FACTORY_ERROR")
    assert env.post("/reset", {"options": {}}).json["code"] == "VALIDATION_ERROR"
    assert env.post("/reset", b"{").status == 422 and env.post("/reset", {"seed": -1}).status == 422
    until(lambda: processes(env) <= max(before, 3))


def test_tools_over_http_and_a_socket_share_an_episode(env: Environment) -> None:
    session = env.rpc("openenv/session/create")["result"]["session_id"]
    with env.socket(f"/ws?session_id={session}") as socket:
        ask(socket, "reset", {"seed": 1})
        assert env.rpc("tools/list", session_id=session)["result"]["tools"][0]["name"] == "act"
        found = env.rpc("tools/call", session_id=session, name="act", arguments={"action": "\\boxed{1}"})["result"]
        assert set(found["data"]) == {"observation", "reward", "done", "metadata"} and not found["isError"]
        assert ask(socket, "state")["data"]["step_count"] == 1
        mcp = {"jsonrpc": "2.0", "id": 7, "method": "tools/list"}
        assert ask(socket, "mcp", mcp)["data"]["result"]["tools"][0]["name"] == "act"
        with env.socket(f"/ws?session_id={session}") as second:
            assert failed(json.loads(second.recv(60))) == "SESSION_ERROR"
    assert env.rpc("openenv/session/close", session_id=session)["result"]["closed"]
    for method in ("tools/list", "tools/call", "openenv/session/close"):
        assert "no session" in env.rpc(method, session_id=session, name="act")["error"]["message"]
    with env.socket(f"/ws?session_id={session}") as socket:
        assert failed(json.loads(socket.recv(60))) == "SESSION_ERROR"


def test_rpc_errors(env: Environment) -> None:
    for body, code in ((b"{", -32700), ({}, -32600), ({"jsonrpc": "2.0", "id": 1}, -32600), ([], -32700),
                       ({"jsonrpc": "2.0", "id": 1, "method": "x"}, -32601),
                       ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": []}, -32602),
                       ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "act"}}, -32602),
                       ({"jsonrpc": "2.0", "id": 1, "method": "openenv/session/close"}, -32602)):  # fmt: skip
        reply = env.post("/mcp", body if isinstance(body, bytes) else json.dumps(body).encode())
        assert (reply.status, reply.json["error"]["code"]) == (200, code), (body, reply)
    with env.socket("/mcp") as socket:
        socket.send('{"jsonrpc":"2.0","id":1,"method":"initialize"}')
        assert json.loads(socket.recv(60))["result"]["serverInfo"]["name"] == ENV
        socket.send("{")
        assert json.loads(socket.recv(60))["error"]["code"] == -32700


def test_keys(env: Environment, dialect_keys: dict[str, str]) -> None:
    for key in (None, "x"):
        other = Environment(env.server, key)
        assert other.get("/health").status == 401 and other.post("/reset", {}).status == 401
        with pytest.raises(InvalidStatus) as refused, other.socket():
            pass
        assert refused.value.response.status_code == 401
    reader = Environment(env.server, dialect_keys["reader"])
    assert reader.get("/schema").status == 200 and reader.post("/reset", {}).status == 403
    with pytest.raises(InvalidStatus) as refused, reader.socket():
        pass
    assert refused.value.response.status_code == 403
    session = env.rpc("openenv/session/create")["result"]["session_id"]
    thief = Environment(env.server, dialect_keys["other"])
    assert "no session" in thief.rpc("tools/list", session_id=session)["error"]["message"]
    env.rpc("openenv/session/close", session_id=session)


def test_the_functions_of_a_suite() -> None:
    line = {"name": "cd", "description": "change", "parameters": {"type": "dict", "properties": {"folder": {}}}}
    found = tools.of_suite(json.dumps(line) + "\nno json\n" + json.dumps({"name": "reset"}))
    assert [tool["name"] for tool in found] == ["cd"] and found[0]["inputSchema"]["type"] == "object"
    assert tools.of_suite([{"type": "function", "function": line}]) == found
    for odd in (None, 7, {}, [7, {}, {"name": 7}], "x" * 10):
        assert tools.of_suite(odd) == []
    action = tools.action_of("task", ["cd"], "cd", {"folder": "x"})
    assert json.loads(action["action"]["tool_calls"][0]["function"]["arguments"]) == {"folder": "x"}
