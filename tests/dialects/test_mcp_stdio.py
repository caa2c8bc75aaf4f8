"""`rock mcp` on pipes: the session is the process, and hostile lines do not end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.waiting import until

from rock.sync import Client, Sandbox, SandboxConfig


class Stdio:
    """The process, and messages to it."""

    def __init__(self, server: RunningServer, key: str, *words: str) -> None:
        environ = {**os.environ, "ROCK_BASE_URL": server.url, "ROCK_API_KEY": key}
        self.process = subprocess.Popen([sys.executable, "-m", "rock.cli.main", "mcp", *words], env=environ,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.number = 0

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def ask(self, method: str, params: Any = None) -> dict[str, Any]:
        self.number += 1
        self.send(json.dumps({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params or {}}).encode())
        reply = self.receive()
        assert reply["id"] == self.number, reply
        return reply

    def tool(self, name: str, **arguments: Any) -> dict[str, Any]:
        return dict(self.ask("tools/call", {"name": name, "arguments": arguments})["result"])

    def end(self) -> int:
        """End the input, and return the exit status."""
        pipes = (self.process.stdin, self.process.stdout, self.process.stderr)
        if pipes[0] is not None:
            with contextlib.suppress(BrokenPipeError):
                pipes[0].close()
        status = self.process.wait(60)
        for pipe in pipes:
            if pipe is not None:
                pipe.close()
        return status


@pytest.fixture
def stdio(dialect_server: RunningServer, dialect_keys: dict[str, str], clean: None) -> Iterator[Stdio]:
    made = Stdio(dialect_server, dialect_keys["mine"], "--memory", "512m")
    yield made
    assert made.end() == 0


def living(server: RunningServer, key: str) -> int:
    with Client(server.url, key) as client:
        return len(client.list_sandboxes(states="pending,running"))


def test_a_session_is_a_process(stdio: Stdio, dialect_server: RunningServer, dialect_keys: dict[str, str]) -> None:
    started = stdio.ask("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}})["result"]
    assert started["protocolVersion"] == "2025-06-18" and started["serverInfo"]["name"] == "rock"
    stdio.send(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
    assert "run_command" in {tool["name"] for tool in stdio.ask("tools/list")["result"]["tools"]}
    seen = stdio.tool("run_command", command="echo $((6 * 7))")["structuredContent"]
    assert (seen["stdout"], seen["exit_code"]) == ("42\n", 0)
    assert stdio.tool("sandbox_info")["structuredContent"]["memory"] == "512m"
    assert stdio.tool("run_command", command="exit 7")["structuredContent"]["exit_code"] == 7
    for body, code in ((b"{", -32700), (b"[1]", -32600), (b'{"jsonrpc":"2.0","id":9,"method":"nothing"}', -32601)):
        stdio.send(body)
        assert stdio.receive()["error"]["code"] == code
    stdio.send(b'"' + b"x" * (17 << 20) + b'"')
    assert "more than" in stdio.receive()["error"]["message"]
    assert living(dialect_server, dialect_keys["mine"]) == 1
    assert stdio.end() == 0
    assert living(dialect_server, dialect_keys["mine"]) == 0


def test_a_signal_stops_the_sandbox(stdio: Stdio, dialect_server: RunningServer, dialect_keys: dict[str, str]) -> None:
    assert not stdio.tool("run_command", command="true")["isError"]
    stdio.send(b'{"jsonrpc":"2.0","id":99,"method":"tools/call","params":{"name":"run_command",'
               b'"arguments":{"command":"sleep 1000"}}}')
    stdio.process.send_signal(signal.SIGTERM)
    assert stdio.process.wait(60) == 0
    until(lambda: living(dialect_server, dialect_keys["mine"]) == 0)


def test_an_existing_sandbox_stays(dialect_server: RunningServer, dialect_keys: dict[str, str], clean: None) -> None:
    key = dialect_keys["mine"]
    with Sandbox(SandboxConfig(base_url=dialect_server.url, api_key=key, image="host", memory="256m")) as sandbox:
        client = Stdio(dialect_server, key, "--sandbox", str(sandbox.sandbox_id))
        client.tool("write_file", path="/tmp/x", content="here")
        assert client.end() == 0
        assert sandbox.execute("cat /tmp/x").stdout == "here"


def test_requests_before_the_end_of_the_input_are_answered(stdio: Stdio) -> None:
    for number in range(3):
        stdio.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": "tools/list"}).encode())
    assert stdio.process.stdin is not None
    stdio.process.stdin.close()
    assert sorted(stdio.receive()["id"] for _ in range(3)) == [0, 1, 2]


def test_wrong_options(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> None:
    wrong = Stdio(dialect_server, dialect_keys["mine"], "--memory", "lots")
    _, text = wrong.process.communicate(timeout=60)
    assert wrong.process.returncode == 1 and b"memory" in text
