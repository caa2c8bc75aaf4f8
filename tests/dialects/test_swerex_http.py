"""/swerex by raw HTTP: the format of errors, keys, repetitions and hostile input."""

from __future__ import annotations

import io
import struct
import uuid
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.dialects.conftest import Reply, send
from tests.waiting import until

from rock.dialects.swerex.archive import entries_of
from rock.errors import InvalidConfig
from rock.sync import Sandbox, SandboxConfig

ROUTES = ("create_session", "run_in_session", "close_session", "execute", "read_file", "write_file", "upload", "close")


class Rex:
    """Requests to one sandbox."""

    def __init__(self, server: RunningServer, key: str, sandbox: Sandbox) -> None:
        self.server = server
        self.key = key
        self.sandbox = sandbox
        self.base = f"/swerex/{sandbox.sandbox_id}"

    def post(self, route: str, body: Any = b"", **headers: str) -> Reply:
        return send(self.server.url, "POST", f"{self.base}/{route}", body, x_api_key=self.key, **headers)

    def done(self, route: str, body: Any, **headers: str) -> Any:
        reply = self.post(route, body, **headers)
        assert reply.status == 200, reply
        return reply.json

    def failed(self, route: str, body: Any) -> str:
        """The class of an error."""
        reply = self.post(route, body)
        assert reply.status == 511 and set(reply.json) == {"swerexception"}, (route, body, reply)
        error = reply.json["swerexception"]
        assert set(error) == {"message", "class_path", "traceback", "extra_info"} and error["message"]
        return str(error["class_path"])


@pytest.fixture(scope="module")
def rex(dialect_server: RunningServer, dialect_keys: dict[str, str]) -> Iterator[Rex]:
    config = SandboxConfig(base_url=dialect_server.url, api_key=dialect_keys["mine"], image="host", memory="512m")
    with Sandbox(config) as sandbox:
        made = Rex(dialect_server, dialect_keys["mine"], sandbox)
        made.done("create_session", {})
        yield made


def test_commands_and_files(rex: Rex) -> None:
    seen = rex.done("run_in_session", {"action_type": "bash", "command": "cd /tmp; pwd"})
    assert seen == {"output": "/tmp\n", "exit_code": 0, "failure_reason": "", "expect_string": "SHELLPS1PREFIX",
                    "session_type": "bash"}  # fmt: skip
    assert rex.done("execute", {"command": ["sh", "-c", "exit 3"]}) == {"stdout": "", "stderr": "", "exit_code": 3}
    assert rex.done("write_file", {"path": "/tmp/new/x", "content": "ü"}) == {}
    assert rex.done("read_file", {"path": "/tmp/new/x"}) == {"content": "ü"}
    assert rex.done("run_in_session", {"action_type": "bash_interrupt"})["exit_code"] == 0
    assert rex.sandbox.run("pwd").output != "/tmp\n"  # the default session is another one


def test_errors(rex: Rex) -> None:
    own = "swerex.exceptions."
    for route, body, kind in (
        ("create_session", {}, own + "SessionExistsError"),
        ("close_session", {"session": "nothing"}, own + "SessionDoesNotExistError"),
        ("run_in_session", {"command": "true", "session": "no/thing \n"}, own + "SessionDoesNotExistError"),
        ("run_in_session", {"command": "(exit 3)"}, own + "NonZeroExitCodeError"),
        ("run_in_session", {"command": "if true"}, own + "BashIncorrectSyntaxError"),
        ("run_in_session", {"command": "sleep 100", "timeout": 0.3}, own + "CommandTimeoutError"),
        ("run_in_session", {"command": "true", "expect": [">"]}, own + "SwerexException"),
        ("execute", {"command": "no such program"}, "builtins.FileNotFoundError"),
        ("execute", {"command": ["sleep", "100"], "timeout": 0.3}, own + "CommandTimeoutError"),
        ("execute", {"command": ["false"], "check": True}, own + "NonZeroExitCodeError"),
        ("execute", {"command": ["a\0b"]}, "builtins.ValueError"), ("execute", {"command": []}, "builtins.ValueError"),
        ("read_file", {"path": "/nothing"}, "builtins.FileNotFoundError"),
        ("read_file", {"path": "relative"}, "builtins.ValueError"),
        ("read_file", {"path": "/tmp", "encoding": "no"}, "builtins.ValueError"),
        ("write_file", {"path": "/tmp/a\0", "content": ""}, "builtins.ValueError"),
    ):  # fmt: skip
        assert rex.failed(route, body) == kind, (route, body)


def interact(rex: Rex, command: str, *expect: str, **more: Any) -> Any:
    body = {"command": command, "is_interactive_command": True, "expect": list(expect), "timeout": 20, **more}
    return rex.done("run_in_session", body)


def test_an_interactive_program(rex: Rex) -> None:
    rex.done("run_in_session", {"command": "cd /var; export FOR_PROGRAM='a b'"})
    started = interact(rex, "python3 -q", ">>> ")
    assert (started["expect_string"], started["exit_code"]) == (">>> ", 0)
    shown = interact(rex, "import os; print(os.getcwd(), os.environ['FOR_PROGRAM'])", ">>> ")
    assert shown["output"] == "/var a b"
    assert interact(rex, "print(6 * 7)", "nothing", r"\>\>\> ")["output"] == "42"
    assert rex.failed("run_in_session", {"command": "true"}) == "swerex.exceptions.SwerexException"
    late = {"command": "import time; time.sleep(100)", "is_interactive_command": True, "expect": [">>> "], "timeout": 1}
    assert rex.failed("run_in_session", late) == "swerex.exceptions.CommandTimeoutError"
    stopped = rex.done("run_in_session", {"action_type": "bash_interrupt", "expect": [">>> "], "timeout": 5})
    assert "KeyboardInterrupt" in stopped["output"] and stopped["expect_string"] == ">>> "
    body = {"command": "exit()", "is_interactive_quit": True, "timeout": 20}
    assert rex.done("run_in_session", body)["expect_string"] == "SHELLPS1PREFIX"
    assert rex.done("run_in_session", {"command": "pwd"})["output"] == "/var\n"
    assert rex.sandbox.execute("ls -a /tmp").stdout.count(".swerex-") == 0


def test_interactive_programs_that_end_or_flood(rex: Rex) -> None:
    ended = interact(rex, "echo only; exit 3", "never")
    assert (ended["output"], ended["expect_string"]) == ("only", "SHELLPS1PREFIX")
    assert interact(rex, "echo start; yes", "start")["expect_string"] == "start"
    rex.done("run_in_session", {"action_type": "bash_interrupt", "timeout": 5})
    interact(rex, "trap '' INT; echo deaf; while :; do sleep 1; done", "deaf")
    rex.done("run_in_session", {"action_type": "bash_interrupt", "timeout": 0.2, "n_retry": 2})
    assert rex.done("run_in_session", {"command": "echo here"})["output"] == "here\n"


def test_the_programs_of_a_session_end_with_it(rex: Rex) -> None:
    rex.done("create_session", {"session": "closing"})
    interact(rex, "echo up; sleep 12345", "up", session="closing")
    there = ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 1234[5]'"]
    assert rex.sandbox.execute(there).stdout.strip() != "0"
    rex.done("close_session", {"session": "closing"})
    until(lambda: rex.sandbox.execute(there).stdout.strip() == "0")


def test_a_session_whose_shell_exits(rex: Rex) -> None:
    rex.done("create_session", {"session": "short"})
    kind = rex.failed("run_in_session", {"command": "exit 4", "session": "short", "timeout": 20})
    assert kind in ("swerex.exceptions.NonZeroExitCodeError", "swerex.exceptions.NoExitCodeError")
    rex.post("close_session", {"session": "short"})
    rex.done("create_session", {"session": "short"})
    rex.done("close_session", {"session": "short"})


def test_a_repeated_request_runs_once(rex: Rex) -> None:
    key, body = str(uuid.uuid4()), {"command": ["sh", "-c", "echo x >> /tmp/once; wc -l < /tmp/once"]}
    first = rex.done("execute", body, x_request_id=key)
    assert rex.done("execute", body, x_request_id=key) == first == {"stdout": "1\n", "stderr": "", "exit_code": 0}


def test_keys(rex: Rex, dialect_keys: dict[str, str]) -> None:
    for route in ROUTES:
        path = f"{rex.base}/{route}"
        for headers in ({}, {"x_api_key": "wrong"}):
            assert send(rex.server.url, "POST", path, {}, **headers).status == 401
        other = send(rex.server.url, "POST", path, {"command": "true", "path": "/tmp/x", "content": ""},
                     x_api_key=dialect_keys["other"])
        assert other.status in (422, 511), (route, other)
        if other.status == 511:
            error = other.json["swerexception"]
            assert error["class_path"].endswith(("DeploymentNotStartedError", "ValueError")), (route, error)
        if route not in ("read_file",):
            assert send(rex.server.url, "POST", path, {}, x_api_key=dialect_keys["reader"]).status == 403
    alive = f"{rex.base}/is_alive"
    assert send(rex.server.url, "GET", alive, x_api_key=rex.key).json == {"is_alive": True, "message": ""}
    other = send(rex.server.url, "GET", alive, x_api_key=dialect_keys["other"])
    assert other.status == 200 and not other.json["is_alive"]
    missing = send(rex.server.url, "POST", "/swerex/nothing/execute", {"command": ["true"]}, x_api_key=rex.key)
    assert missing.json["swerexception"]["class_path"] == "swerex.exceptions.DeploymentNotStartedError"


def test_hostile_bodies(rex: Rex) -> None:
    for route in ROUTES[:6]:
        for body in (b"", b"{", b"[]", b"7", b"\xff", b"[" * 50_000, b'{"command": {}}', b'{"session": 7, "path": 1}',
                     b'{"command": "x", "timeout": -1}', b'{"command": "x", "timeout": 1e999}'):  # fmt: skip
            reply = rex.post(route, body)
            assert reply.status in (200, 422, 511), (route, body, reply)
            assert reply.status != 200 or route in ("create_session", "close_session"), (route, body, reply)
    for path in ("/swerex/../v1/sandboxes", "/swerex//execute", "/swerex/a/b/c", "/swerex/x%2Fstop/execute"):
        assert send(rex.server.url, "POST", path, {"command": ["true"]}, x_api_key=rex.key).status in (404, 511), path


# ---- uploads


def form(file: bytes, **fields: str) -> tuple[bytes, str]:
    body = b""
    for name, value in fields.items():
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    body += b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + file + b"\r\n--b--\r\n"
    return body, "multipart/form-data; boundary=b"


def zipped(*names: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as opened:
        for name in names:
            opened.writestr(name, "content")
    return target.getvalue()


def upload(rex: Rex, file: bytes, **fields: str) -> Reply:
    body, kind = form(file, **fields)
    return rex.post("upload", body, content_type=kind)


def test_uploads(rex: Rex) -> None:
    assert upload(rex, b"data", target_path="/tmp/up/file", unzip="false").json == {}
    assert rex.sandbox.execute("cat /tmp/up/file").stdout == "data"
    assert upload(rex, zipped("a", "b/c"), target_path="/tmp/up/folder", unzip="true").json == {}
    assert rex.sandbox.execute("cd /tmp/up/folder && cat a b/c").stdout == "contentcontent"


def test_hostile_uploads(rex: Rex) -> None:
    whole = zipped("a", "b")
    lying = bytearray(whole)
    struct.pack_into("<HI", lying, len(lying) - 12, 60_000, 0x7FFFFFFF)
    many = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    wide = (b"PK\6\6" + b"\0" * 28 + struct.pack("<QQ", 1 << 40, 1 << 50) + b"\0" * 8
            + b"PK\6\7" + struct.pack("<IQI", 0, 0, 1) + many)
    for file in (b"", b"no zip", whole[:-30], bytes(lying), many, wide, whole[:20] + b"\xff" * 10 + whole[30:]):
        reply = upload(rex, file, target_path="/tmp/bad", unzip="true")
        assert reply.status == 511, (file[:20], reply)
        assert reply.json["swerexception"]["class_path"] == "builtins.ValueError", reply
    escape = upload(rex, zipped("../../escaped"), target_path="/tmp/bad", unzip="true")
    assert escape.status == 511
    assert rex.sandbox.execute("ls /escaped /tmp/escaped").exit_code != 0
    for body, kind in (form(b"x"), (b"", "multipart/form-data; boundary=b"), (b"x", "text/plain"), (b"--b", "")):
        assert rex.post("upload", body, content_type=kind).status == 511
    assert rex.done("execute", {"command": ["true"]})["exit_code"] == 0


def test_a_zip_with_large_files_is_refused_by_its_directory() -> None:
    data = bytearray(zipped(*(f"file{number}" for number in range(9))))
    at = -1
    for _ in range(8):
        at = data.index(b"PK\1\2", at + 1)
        struct.pack_into("<I", data, at + 24, 0xFFFFFFFE)
    assert sum(entry.file_size for entry in entries_of(io.BytesIO(data))) == 8 * 0xFFFFFFFE + 7
    struct.pack_into("<I", data, data.index(b"PK\1\2", at + 1) + 24, 0xFFFFFFFE)
    with pytest.raises(InvalidConfig, match="the limits are"):
        entries_of(io.BytesIO(data))
