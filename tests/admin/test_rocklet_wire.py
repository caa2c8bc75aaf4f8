"""The wire of ROCK's rocklet by raw HTTP: answers without an envelope, errors under HTTP 511."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import RunningServer

from rock.sync import Sandbox

Ask = Callable[..., tuple[int, Any]]
BASE = "/apis/envs/rocklet/v1"


@pytest.fixture
def ask(sandbox: Sandbox, server: RunningServer) -> Iterator[Ask]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)

    def send(
        method: str, path: str, body: Any = None, *, of: str = "", kind: str = "application/json"
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
        connection.request(method, f"{BASE}/{of or sandbox.sandbox_id}{path}", data, {"content-type": kind})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())

    yield send
    connection.close()


def test_commands_and_files(ask: Ask) -> None:
    assert ask("GET", "") == (200, {"message": "hello world"})
    assert ask("GET", "/is_alive")[1]["is_alive"] is True
    seen = ask("POST", "/execute", {"command": ["sh", "-c", "echo out; echo err >&2; exit 3"]})
    assert seen == (200, {"stdout": "out\n", "stderr": "err\n", "exit_code": 3})
    assert ask("POST", "/create_session", {"session": "s", "session_type": "bash"})[0] == 200
    body = {"session": "s", "command": "cd /tmp && echo $PWD", "action_type": "bash", "check": "silent"}
    status, seen = ask("POST", "/run_in_session", body)
    assert (status, seen["output"], seen["exit_code"]) == (200, "/tmp", 0)
    assert ask("POST", "/write_file", {"path": "/tmp/x", "content": "text"})[1]["success"] is True
    assert ask("POST", "/read_file", {"path": "/tmp/x"})[1] == {"content": "text"}
    form = (b'--b\r\ncontent-disposition: form-data; name="target_path"\r\n\r\n/tmp/up\r\n'
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="up"\r\n\r\nsent\r\n--b--\r\n')  # fmt: skip
    assert ask("POST", "/upload", form, kind="multipart/form-data; boundary=b")[1]["file_name"] == "up"
    assert ask("POST", "/read_file", {"path": "/tmp/up"})[1]["content"] == "sent"
    assert ask("POST", "/close_session", {"session": "s", "session_type": "bash"})[0] == 200


def test_errors(ask: Ask) -> None:
    status, told = ask("POST", "/run_in_session", {"session": "none", "command": "true", "action_type": "bash"})
    assert status == 511 and told["rockletexception"]["class_path"].endswith(".SessionDoesNotExistError")
    status, told = ask("POST", "/run_in_session", {"session": "default", "command": "false", "action_type": "bash"})
    assert status == 511 and told["rockletexception"]["class_path"].endswith(".NonZeroExitCodeError")
    body = {"session": "default", "command": "sleep 60", "action_type": "bash", "timeout": 0.2}
    assert ask("POST", "/run_in_session", body)[0] == 504
    assert ask("POST", "/execute", {"comand": "true"})[0] == 422
    assert ask("POST", "/execute", b"{")[0] == 422
    status, told = ask("POST", "/execute", {"command": "true"}, of="no-such-sandbox")
    assert status == 511 and "no-such-sandbox not started" in told["rockletexception"]["message"]
    assert ask("GET", "/is_alive", of="no-such-sandbox")[1]["is_alive"] is False


def test_a_body_is_about_the_sandbox_of_the_path(ask: Ask, server: RunningServer) -> None:
    """What a body says of another one is not believed."""
    status, seen = ask("POST", "/execute", {"sandbox_id": "another", "command": "echo here"})
    assert (status, seen["stdout"]) == (200, "here\n")


def test_environments_need_an_image_that_has_them(ask: Ask) -> None:
    status, told = ask("POST", "/env/make", {"env_id": "game:GuessTheNumber-v0-easy", "sandbox_id": "e1"})
    assert status == 511 and "no gymnasium" in told["rockletexception"]["message"]
    assert ask("POST", "/env/step", {"sandbox_id": "e1", "action": "x"})[0] == 511
    assert ask("POST", "/env/close", {"sandbox_id": "e1"}) == (200, {"sandbox_id": "e1"})
