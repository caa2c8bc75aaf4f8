"""/agentscope by raw HTTP: sandboxes, tools, keys, quotas and hostile input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.dialects.conftest import Reply, send
from tests.waiting import until

from rock.sync import Client, Sandbox, SandboxConfig

SUITE = "webshop"  # it has no packages
METHODS = ("create_from_pool", "create", "release", "cleanup", "call_tool", "list_tools", "get_info", "get_status",
           "check_health", "start", "stop", "add_mcp_servers", "get_session_mapping", "list_session_keys")  # fmt: skip


class Manager:
    def __init__(self, server: RunningServer, key: str | None) -> None:
        self.server = server
        self.key = key

    def post(self, method: str, body: Any) -> Reply:
        return send(self.server.url, "POST", f"/agentscope/{method}", body, self.key, timeout=600)

    def data(self, method: str, **arguments: Any) -> Any:
        reply = self.post(method, arguments)
        assert reply.status == 200 and set(reply.json) == {"data"}, (method, reply)
        return reply.json["data"]

    def failed(self, method: str, **arguments: Any) -> tuple[int, str]:
        reply = self.post(method, arguments)
        assert reply.status >= 400 and reply.json["detail"].startswith(f"Error in {method}: "), (method, reply)
        return reply.status, reply.json["error"]["code"]

    def tool(self, sandbox_id: str, name: str, **arguments: Any) -> Any:
        return self.data("call_tool", identity=sandbox_id, tool_name=name, arguments=arguments)


@pytest.fixture(scope="module")
def manager(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> Manager:
    return Manager(dialect_server, dialect_keys["mine"])


@pytest.fixture(scope="module")
def box(manager: Manager) -> Iterator[str]:
    made = manager.data("create_from_pool", sandbox_type=SUITE, meta={"session_ctx_id": "module"})
    yield made
    assert manager.data("release", identity=made) is True


def test_the_calls_of_a_training_sandbox(manager: Manager, box: str) -> None:
    tasks = manager.tool(box, "get_env_profile", env_type=SUITE, split="train", params=None)
    assert tasks and manager.tool(box, "get_task_ids", env_type=SUITE, split="train") == tasks
    made = manager.tool(box, "create_instance", env_type=SUITE, task_id=tasks[0], instance_id=None, params=None)
    instance = made["info"]["instance_id"]
    action = {"role": "assistant", "content": "search[shoes]"}
    assert manager.tool(box, "step", instance_id=instance, action=action, params={})["is_terminated"] is False
    manager.tool(box, "evaluate", instance_id=instance, messages={}, params={})
    assert manager.data("list_tools", identity=box, tool_type=None) is None
    manager.data("list_tools", identity=box, instance_id=instance)
    assert manager.tool(box, "release_instance", instance_id=instance) is True
    assert manager.tool(box, "release_instance", instance_id=instance) is False


def test_information(manager: Manager, box: str) -> None:
    info = manager.data("get_info", identity=box)
    assert (info["container_id"], info["state"], info["sandbox_type"]) == (box, "running", SUITE)
    path = info["url"].removeprefix(manager.server.url)
    assert send(manager.server.url, "GET", f"{path}/healthz", key=manager.key).status == 200
    assert manager.data("get_info_async", args=box) == info
    assert manager.data("get_status", identity=box) == "running" and manager.data("check_health", identity=box) is True
    assert manager.data("get_session_mapping", session_ctx_id="module") == [box]
    assert "module" in manager.data("list_session_keys")
    assert send(manager.server.url, "GET", "/agentscope/health", key=manager.key).status == 200


def test_a_repeated_creation_is_the_same_sandbox(manager: Manager, box: str) -> None:
    assert manager.data("create_from_pool", sandbox_type=SUITE, meta={"session_ctx_id": "module"}) == box
    own = manager.data("create", sandbox_type=SUITE)
    assert own != box and manager.data("release_async", identity=own) is True
    until(lambda: manager.data("get_status", identity=own) == "exited")


def test_a_failed_creation_has_no_data(manager: Manager) -> None:
    for arguments, code in (
        ({"sandbox_type": "browser"}, "unsupported"), ({"sandbox_type": "nothing"}, "unsupported"),
        ({"sandbox_type": "../x"}, "invalid_config"), ({"sandbox_type": 7}, "invalid_config"), ({}, "invalid_config"),
        ({"sandbox_type": SUITE, "mount_dir": "/etc"}, "unsupported"),
        ({"sandbox_type": SUITE, "x": 1}, "invalid_config"),
        ({"sandbox_type": SUITE, "environment": {"A": "1"}}, "unsupported"),
        ({"sandbox_type": SUITE, "meta": {"session_ctx_id": 7}}, "invalid_config"),
        ({"sandbox_type": SUITE, "meta": {"session_ctx_id": "x" * 300}}, "invalid_config"),
    ):  # fmt: skip
        reply = manager.post("create_from_pool", arguments)
        assert reply.status == 200 and reply.json["data"] is None, (arguments, reply)
        assert reply.json["error"]["code"] == code and reply.json["detail"], (arguments, reply)


def test_errors(manager: Manager, box: str, dialect_keys: dict[str, str]) -> None:
    for method in ("start", "stop", "add_mcp_servers"):
        assert manager.failed(method, identity=box) == (422, "unsupported")
    for method in ("get_info", "get_status", "check_health", "list_tools"):
        assert manager.failed(method)[0] == 422 and manager.failed(method, identity="nothing")[0] == 404
        assert manager.failed(method, identity="../x")[0] == 404
    assert manager.data("release", identity="nothing") is False
    for arguments in ({"tool_name": "nothing", "arguments": {}}, {"tool_name": "step"}, {"tool_name": {}},
                      {"tool_name": "step", "arguments": {"instance_id": "nothing"}},
                      {"tool_name": "create_instance", "arguments": {"env_type": SUITE, "task_id": "nothing"}},
                      {"tool_name": "create_instance", "arguments": {"env_type": "bfcl", "task_id": "x"}},
                      {"tool_name": "get_env_profile", "arguments": {"env_type": SUITE, "split": {}}},
                      {"tool_name": "step", "arguments": {"instance_id": {}, "action": 7}}):  # fmt: skip
        reply = manager.post("call_tool", {"identity": box, **arguments})
        assert 400 <= reply.status < 500 and reply.json["detail"], (arguments, reply)
    config = SandboxConfig(base_url=manager.server.url, api_key=dialect_keys["mine"], image="host", memory="128m")
    with Sandbox(config) as plain:
        assert manager.failed("get_info", identity=plain.sandbox_id)[0] == 404
        assert manager.data("release", identity=plain.sandbox_id) is False and plain.is_alive()


def test_hostile_bodies(manager: Manager) -> None:
    for method in METHODS:
        if method == "cleanup":
            continue
        for body in (b"{", b"[]", b"7", b"\xff", b"[" * 50_000, b'{"identity": {}}', b'{"args": []}'):
            reply = manager.post(method, body)
            refused = reply.status in (404, 422) or (reply.status == 200 and not reply.json["data"])
            assert refused or method == "list_session_keys", (method, body, reply)
    assert send(manager.server.url, "POST", "/agentscope/nothing", {}, manager.key).status == 404


def test_keys_and_cleanup(manager: Manager, box: str, dialect_keys: dict[str, str]) -> None:
    for method in METHODS:
        for key in (None, "x"):
            assert Manager(manager.server, key).post(method, {}).status == 401
    other = Manager(manager.server, dialect_keys["other"])
    for method in ("get_info", "get_status", "check_health", "list_tools"):
        assert other.failed(method, identity=box)[0] == 404
    assert other.data("release", identity=box) is False and other.data("cleanup") is True
    assert other.post("call_tool", {"identity": box, "tool_name": "step", "arguments": {}}).status == 404
    assert manager.data("get_status", identity=box) == "running"
    reader = Manager(manager.server, dialect_keys["reader"])
    for method in ("create_from_pool", "release", "cleanup", "call_tool"):
        assert reader.post(method, {"identity": box}).status == 403
    small = Manager(manager.server, dialect_keys["small"])
    first = small.data("create", sandbox_type=SUITE)
    full = small.post("create", {"sandbox_type": SUITE})
    assert full.json["data"] is None and full.json["error"]["code"] == "quota_exceeded"
    assert small.data("cleanup") is True
    with Client(manager.server.url, dialect_keys["small"]) as client:
        until(lambda: first not in {info.sandbox_id for info in client.list_sandboxes(states="pending,running")})
