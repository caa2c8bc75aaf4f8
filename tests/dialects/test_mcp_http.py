"""/mcp by raw HTTP: sessions, both eras of the protocol, tools, keys, quotas and hostile messages."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import RunningServer
from tests.dialects.conftest import OWNER, Reply, send
from tests.waiting import until

from rock.sync import Client

MODERN = "2026-07-28"
ENVELOPE = {"io.modelcontextprotocol/protocolVersion": MODERN, "io.modelcontextprotocol/clientCapabilities": {}}


class Mcp:
    """One client. `session` is the header of its session."""

    def __init__(self, server: RunningServer, key: str, query: str = "") -> None:
        self.server = server
        self.key = key
        self.path = "/mcp" + query
        self.session = ""
        self.number = 0

    def post(self, body: Any, **headers: str) -> Reply:
        more = {"mcp_session_id": self.session} if self.session else {}
        return send(self.server.url, "POST", self.path, body, self.key,
                    **{"accept": "application/json, text/event-stream", **more, **headers})

    def open(self, version: str = "2025-11-25") -> dict[str, Any]:
        reply = self.post({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {
            "protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}})
        assert reply.status == 200, reply.body
        self.session = reply.headers["mcp-session-id"]
        assert self.post({"jsonrpc": "2.0", "method": "notifications/initialized"}).status == 202
        return dict(reply.json["result"])

    def ask(self, method: str, params: Any = None, **headers: str) -> dict[str, Any]:
        self.number += 1
        message = {"jsonrpc": "2.0", "id": self.number, "method": method, "params": params or {}}
        reply = self.post(message, **headers)
        assert reply.status == 200 and reply.json["id"] == self.number, reply
        return dict(reply.json)

    def tool(self, name: str, **arguments: Any) -> dict[str, Any]:
        return dict(self.ask("tools/call", {"name": name, "arguments": arguments})["result"])

    def done(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The data of a call that has no error."""
        result = self.tool(name, **arguments)
        assert not result["isError"], result
        return dict(result["structuredContent"])

    def close(self) -> None:
        assert send(self.server.url, "DELETE", self.path, key=self.key, mcp_session_id=self.session).status == 204


@pytest.fixture
def mcp(dialect_server: RunningServer, dialect_keys: dict[str, str], clean: None) -> Iterator[Mcp]:
    client = Mcp(dialect_server, dialect_keys["mine"])
    client.open()
    yield client
    if client.session:
        client.close()


def count(server: RunningServer, key: str) -> int:
    with Client(server.url, key) as client:
        return len(client.list_sandboxes(states="pending,running"))


def test_initialize_agrees_on_a_version(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> None:
    for asked, given in (("2025-06-18", "2025-06-18"), ("2024-11-05", "2024-11-05"), ("1999-01-01", "2025-11-25")):
        client = Mcp(dialect_server, dialect_keys["mine"])
        assert client.open(asked)["protocolVersion"] == given
        assert client.ask("ping")["result"] == {}
        client.close()


def test_a_session_has_one_sandbox_that_ends_with_it(mcp: Mcp, dialect_keys: dict[str, str]) -> None:
    assert count(mcp.server, mcp.key) == 0
    seen = mcp.done("run_command", command="echo out; echo err >&2; exit 3")
    assert (seen["stdout"], seen["stderr"], seen["exit_code"]) == ("out\n", "err\n", 3)
    mcp.done("run_command", command="cd /tmp; export A=kept", session="one")
    assert mcp.done("run_command", command='echo "$PWD $A"', session="one")["stdout"] == "/tmp kept\n"
    assert count(mcp.server, mcp.key) == 1
    mcp.close()
    gone = mcp.post({"jsonrpc": "2.0", "id": 1, "method": "ping"})
    assert gone.status == 404 and "send initialize" in gone.json["error"]["hint"]
    mcp.session = ""
    until(lambda: count(mcp.server, mcp.key) == 0)


def test_files(mcp: Mcp) -> None:
    assert mcp.done("write_file", path="/tmp/new/a.txt", content="one\ntwo\ntwo\n")["size"] == 12
    twice = mcp.tool("edit_file", path="/tmp/new/a.txt", old="two", new="three")
    assert twice["isError"] and "occurs 2 times" in twice["content"][0]["text"]
    assert mcp.done("edit_file", path="/tmp/new/a.txt", old="two", new="three", all=True)["replaced"] == 2
    assert mcp.done("read_file", path="/tmp/new/a.txt", line=2, lines=1) == {
        "content": "three\n", "lines": 3, "next_line": 3, "truncated": False}
    mcp.done("run_command", command="printf 'a\\377b' > /tmp/new/raw; chmod 750 /tmp/new/raw")
    mcp.done("edit_file", path="/tmp/new/raw", old="b", new="c")
    text = mcp.done("run_command", command="od -An -tx1 /tmp/new/raw; stat -c %a /tmp/new/raw")["stdout"].split()
    assert text == ["61", "ff", "63", "750"]
    assert [item["name"] for item in mcp.done("list_files", path="/tmp/new")["files"]] == ["a.txt", "raw"]
    missing = mcp.tool("read_file", path="/tmp/nothing")
    assert missing["isError"] and missing["structuredContent"]["error"]["code"] == "not_found"


def test_code_and_processes(mcp: Mcp) -> None:
    assert mcp.done("run_code", code="import sys\nprint(sys.stdin.read() == '', 6 * 7)")["stdout"] == "True 42\n"
    assert mcp.done("run_code", code="echo $((6 * 7))", language="bash")["stdout"] == "42\n"
    process = mcp.done("start_process", command="echo first; read line; sleep 1000")["process_id"]
    logs = mcp.done("process_logs", process_id=process, wait=20)
    assert (logs["output"], logs["next_offset"]) == ("first\n", 6)
    mcp.tool("stop_process", process_id=process, signal=9)
    assert not mcp.done("process_logs", process_id=process, offset=6)["running"]


def test_long_output_keeps_head_and_tail(mcp: Mcp) -> None:
    seen = mcp.done("run_command", command="echo head; seq 100000; echo tail")
    assert seen["stdout"].startswith("head\n") and seen["stdout"].endswith("tail\n")
    assert len(seen["stdout"]) < 40_000 and seen["dropped_bytes"] > 400_000


def test_a_timeout_is_a_result(mcp: Mcp) -> None:
    seen = mcp.done("run_command", command="echo before; sleep 1000", timeout=0.5)
    assert seen["timed_out"] and seen["stdout"] == "before\n" and seen["exit_code"] != 0


def test_the_url_of_a_port(mcp: Mcp) -> None:
    mcp.done("start_process", command="python3 -m http.server 8123 --bind 127.0.0.1", cwd="/tmp")
    url = mcp.done("port_url", port=8123)["url"]
    assert url.startswith(mcp.server.url)
    path = url.removeprefix(mcp.server.url)
    until(lambda: send(mcp.server.url, "GET", path, key=mcp.key).status == 200)


def test_environments(mcp: Mcp) -> None:
    ids = [item["id"] for item in mcp.done("env_list", contains="Sokoban")["environments"]]
    assert "game:Sokoban-v0-easy" in ids
    made = mcp.done("env_make", env_id="game:GuessTheNumber-v0-easy", seed=3)
    again = mcp.done("env_reset", environment=made["environment"], seed=3)
    assert again["observation"] == made["observation"]
    stepped = mcp.done("env_step", environment=made["environment"], action="\\boxed{1}")
    assert set(stepped) >= {"observation", "reward", "terminated", "truncated", "info"}
    assert mcp.done("env_close", environment=made["environment"])["closed"]
    wrong = mcp.tool("env_make", env_id="game:Nothing-v0")
    assert wrong["isError"] and wrong["structuredContent"]["error"]["code"] == "not_found"
    for bad in ("x", "../1", "a/b", f"{'a' * 300}/1"):
        assert mcp.tool("env_step", environment=bad, action="x")["isError"], bad
    with Client(mcp.server.url, mcp.key) as client:
        for info in client.list_sandboxes(states="pending,running"):
            client.stop_sandbox(info.sandbox_id)


def test_the_end_of_the_sandbox_is_an_error_and_the_next_call_has_another(mcp: Mcp) -> None:
    first = mcp.done("sandbox_info")["sandbox_id"]
    with Client(mcp.server.url, mcp.key) as client:
        client.stop_sandbox(first)
    failed = mcp.tool("run_command", command="true")
    assert failed["isError"] and "new sandbox" in failed["content"][0]["text"]
    assert mcp.done("sandbox_info")["sandbox_id"] != first


def test_a_canceled_request_ends_its_command(mcp: Mcp) -> None:
    mcp.done("run_command", command="true")
    replies: list[Reply] = []
    message = {"jsonrpc": "2.0", "id": "long", "method": "tools/call",
               "params": {"name": "run_command", "arguments": {"command": "echo $$ > /tmp/pid; sleep 1000"}}}
    thread = threading.Thread(target=lambda: replies.append(mcp.post(message)))
    thread.start()
    until(lambda: mcp.done("run_command", command="cat /tmp/pid")["exit_code"] == 0)
    twice = mcp.post(message).json
    assert twice["error"]["code"] == -32600 and "in progress" in twice["error"]["message"]
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "long"}}
    assert mcp.post(cancel).status == 202
    thread.join(60)
    assert replies[0].json["error"]["code"] == -32800
    until(lambda: mcp.done("run_command", command="kill -0 $(cat /tmp/pid)")["exit_code"] != 0)


def test_a_client_that_leaves_ends_its_command(mcp: Mcp) -> None:
    mcp.done("run_command", command="true")
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
        "name": "run_command", "arguments": {"command": "echo $$ > /tmp/left; sleep 1000"}}}).encode()
    connection = http.client.HTTPConnection(urlsplit(mcp.server.url).netloc)
    connection.request("POST", "/mcp", body, {"authorization": f"Bearer {mcp.key}", "mcp-session-id": mcp.session})
    until(lambda: mcp.done("run_command", command="cat /tmp/left")["exit_code"] == 0)
    connection.close()
    until(lambda: mcp.done("run_command", command="kill -0 $(cat /tmp/left)")["exit_code"] != 0)


# ---- the era without sessions


def modern(
    server: RunningServer, key: str, method: str, params: dict[str, Any], path: str = "/mcp", **headers: str
) -> Reply:
    given = {"mcp_protocol_version": MODERN, "mcp_method": method,
             **({"mcp_name": params["name"]} if "name" in params else {}), **headers}
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**params, "_meta": ENVELOPE}}
    return send(server.url, "POST", path, body, key, **given)


def test_requests_without_a_session(
    dialect_server: RunningServer, dialect_keys: dict[str, str], clean: None
) -> None:
    key = dialect_keys["mine"]
    found = modern(dialect_server, key, "server/discover", {}).json["result"]
    assert found["supportedVersions"][0] == "2025-11-25" and MODERN not in found["supportedVersions"]
    offered = modern(dialect_server, key, "server/discover", {}, path="/mcp?stateless=1").json["result"]
    assert offered["supportedVersions"][0] == MODERN and offered["resultType"] == "complete"
    assert modern(dialect_server, key, "ping", {}, path="/mcp?image=host").status == 422
    tools = {tool["name"]: tool for tool in modern(dialect_server, key, "tools/list", {}).json["result"]["tools"]}
    assert "sandbox_id" in tools["run_command"]["inputSchema"]["required"]
    without = modern(dialect_server, key, "tools/call", {"name": "run_command", "arguments": {"command": "true"}})
    assert without.json["result"]["isError"] and "sandbox_create" in without.json["result"]["content"][0]["text"]
    made = modern(dialect_server, key, "tools/call", {"name": "sandbox_create", "arguments": {"memory": "256m"}})
    sandbox_id = made.json["result"]["structuredContent"]["sandbox_id"]
    call = {"name": "run_command", "arguments": {"command": "echo hi", "sandbox_id": sandbox_id}}
    seen = modern(dialect_server, key, "tools/call", call).json["result"]
    assert seen["structuredContent"]["stdout"] == "hi\n" and seen["resultType"] == "complete"
    named = modern(dialect_server, key, "tools/call", {"name": "run_command", "arguments": {"command": "echo hi"}},
                   path=f"/mcp?sandbox={sandbox_id}").json["result"]
    assert named["structuredContent"]["stdout"] == "hi\n"
    foreign = modern(dialect_server, dialect_keys["other"], "tools/call", call).json["result"]
    assert foreign["isError"] and foreign["structuredContent"]["error"]["code"] == "not_found"
    modern(dialect_server, key, "tools/call", {"name": "sandbox_stop", "arguments": {"sandbox_id": sandbox_id}})


def test_errors_without_a_session(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> None:
    key = dialect_keys["mine"]
    for method, params, headers, status, code in (
        ("tools/list", {}, {"mcp_method": "tools/call"}, 400, -32020),
        ("tools/call", {"name": "run_command"}, {"mcp_name": "other"}, 400, -32020),
        ("nothing", {}, {}, 404, -32601),
        ("tools/call", {"name": "nothing"}, {}, 400, -32602),
    ):
        reply = modern(dialect_server, key, method, params, **headers)
        assert (reply.status, reply.json["error"]["code"]) == (status, code), reply
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {
        "_meta": {**ENVELOPE, "io.modelcontextprotocol/protocolVersion": "2099-01-01"}}}
    reply = send(dialect_server.url, "POST", "/mcp", body, key, mcp_protocol_version="2099-01-01",
                 mcp_method="tools/list")
    assert reply.json["error"]["code"] == -32022 and MODERN in reply.json["error"]["data"]["supported"]


# ---- keys, quotas


def test_keys(dialect_server: RunningServer, dialect_keys: dict[str, str], mcp: Mcp) -> None:
    for key in (None, "x"):
        for method in ("POST", "GET", "DELETE"):
            assert send(dialect_server.url, method, "/mcp", key=key).status == 401
    stolen = Mcp(dialect_server, dialect_keys["other"])
    stolen.session = mcp.session
    assert stolen.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}).status == 404
    assert send(dialect_server.url, "DELETE", "/mcp", key=stolen.key, mcp_session_id=mcp.session).status == 404
    reader = Mcp(dialect_server, dialect_keys["reader"])
    reader.open()
    names = {tool["name"] for tool in reader.ask("tools/list")["result"]["tools"]}
    assert "read_file" in names and not names & {"run_command", "sandbox_create", "write_file", "env_make"}
    refused = reader.tool("run_command", command="true", sandbox_id=mcp.done("sandbox_info")["sandbox_id"])
    assert refused["isError"] and refused["structuredContent"]["error"]["code"] == "forbidden"
    reader.close()


def test_quotas(dialect_server: RunningServer, dialect_keys: dict[str, str], clean: None) -> None:
    client = Mcp(dialect_server, dialect_keys["small"])
    client.open()
    client.done("run_command", command="true")
    refused = client.tool("sandbox_create", memory="128m")
    assert refused["isError"] and refused["structuredContent"]["error"]["code"] == "quota_exceeded"
    client.close()


def test_sessions_are_limited(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> None:
    clients = []
    try:
        while len(clients) < 300:
            client = Mcp(dialect_server, dialect_keys["small"])
            reply = client.post({"jsonrpc": "2.0", "id": 0, "method": "initialize",
                                 "params": {"protocolVersion": "2025-11-25"}})
            if reply.status != 200:
                assert reply.status == 429 and reply.json["error"]["code"] == "quota_exceeded"
                break
            client.session = reply.headers["mcp-session-id"]
            clients.append(client)
        assert len(clients) == 256
    finally:
        for client in clients:
            client.close()


def test_options_in_the_query(dialect_server: RunningServer, dialect_keys: dict[str, str], mcp: Mcp) -> None:
    there = mcp.done("sandbox_info")["sandbox_id"]
    second = Mcp(dialect_server, dialect_keys["mine"], f"?sandbox={there}")
    second.open()
    assert second.done("sandbox_info")["sandbox_id"] == there
    second.close()
    assert mcp.done("sandbox_info")["state"] == "running"
    small = Mcp(dialect_server, dialect_keys["mine"], "?image=host&memory=300m&cpus=0.5")
    small.open()
    assert small.done("sandbox_info")["memory"] == "300m"
    small.close()
    for query, status in (("?imag=host", 422), ("?memory=lots", 422), ("?network=host", 422), ("?cpus=-1", 422),
                          (f"?sandbox={there}&image=host", 422)):
        wrong = Mcp(dialect_server, dialect_keys["mine"], query)
        reply = wrong.post({"jsonrpc": "2.0", "id": 0, "method": "initialize",
                            "params": {"protocolVersion": "2025-11-25"}})
        assert reply.status == status, (query, reply)


# ---- hostile messages


HOSTILE: list[tuple[bytes, int]] = [
    (b"", -32700), (b"{", -32700), (b"\xff\xfe", -32700), (b"[" * 100_000, -32700), (b"null", -32600), (b"7", -32600),
    (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', -32600), (b'{"jsonrpc":"2.0","id":1}', -32600),
    (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', -32600), (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', -32600),
    (b'{"jsonrpc":"2.0","id":1,"method":7}', -32600), (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', -32602),
    (b'{"jsonrpc":"2.0","id":"' + b"x" * 300 + b'","method":"ping"}', -32600), (b"[]", -32600),
    (b"[" + b"1," * 100 + b"1]", -32600), (b'[{"jsonrpc":"2.0","id":1,"method":"initialize"}]', -32600),
    (b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{}}', -32602),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":{}}}', -32602),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"run_command","arguments":[]}}', -32602),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"cursor":"x"}}', -32602),
    (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"run_command","task":{}}}', -32602),
]  # fmt: skip


def test_hostile_messages(mcp: Mcp) -> None:
    for body, code in HOSTILE:
        reply = mcp.post(body)
        assert reply.status in (200, 400) and reply.json["error"]["code"] == code, (body[:80], reply)
    assert mcp.ask("ping")["result"] == {}


def test_hostile_arguments(mcp: Mcp) -> None:
    for name, arguments in (
        ("run_command", {"command": "true", "timeout": -1}), ("run_command", {"command": "true", "timeout": 1e9}),
        ("run_command", {"command": "a\0b"}), ("run_command", {"command": "true", "sandbox_id": "../x"}),
        ("run_command", {"command": "true", "sandbox_id": "x/stop"}), ("run_command", {"command": "true", "cwd": "\0"}),
        ("run_command", {"command": "true", "session": "s", "cwd": "/"}), ("read_file", {"path": "a\0"}),
        ("read_file", {"path": "relative"}), ("process_logs", {"process_id": "../../x"}),
        ("process_logs", {"process_id": "nothing"}), ("list_files", {"path": "/etc/passwd"}),
        ("port_url", {"port": 0}), ("run_code", {"code": "1", "language": "cobol"}),
        ("sandbox_create", {"memory": "lots"}), ("sandbox_create", {"network": "host"}),
        ("sandbox_create", {"image": "../../etc"}), ("env_make", {"env_id": "\n"}),
        ("env_make", {"env_id": "hf://a/b"}), ("env_step", {"environment": "/1", "action": None}),
    ):  # fmt: skip
        result = mcp.tool(name, **arguments)
        assert result["isError"], (name, arguments, result)
        assert result["structuredContent"]["error"]["code"] not in ("internal", "error"), (name, arguments, result)


def test_limits_of_the_transport(mcp: Mcp) -> None:
    began = time.monotonic()
    large = send(mcp.server.url, "POST", "/mcp", b" " * ((16 << 20) + 1), mcp.key, mcp_session_id=mcp.session)
    assert large.status == 422 and "limit" in large.json["error"]["message"] and time.monotonic() - began < 30
    assert send(mcp.server.url, "GET", "/mcp", key=mcp.key).status == 405
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    old = mcp.post(ping, mcp_protocol_version="1999-01-01")
    assert (old.status, old.json["error"]["code"]) == (400, -32022)
    no_session = send(mcp.server.url, "POST", "/mcp", ping, mcp.key)
    assert no_session.status == 422 and "Mcp-Session-Id" in no_session.json["error"]["message"]


def test_a_batch(mcp: Mcp) -> None:
    batch = [{"jsonrpc": "2.0", "id": number, "method": "ping"} for number in range(3)]
    reply = mcp.post([*batch, {"jsonrpc": "2.0", "method": "notifications/initialized"}])
    assert [item["id"] for item in reply.json] == [0, 1, 2]


def test_the_audit_log_names_the_native_call(mcp: Mcp) -> None:
    sandbox_id = mcp.done("sandbox_info")["sandbox_id"]
    with Client(mcp.server.url, OWNER) as client:
        found = client.audit(target=sandbox_id)
    (made,) = [entry for entry in found if entry.action == "create_sandbox"]
    assert (made.tenant, made.address, made.status) == ("mine", "127.0.0.1", 201) and made.key_id
