"""Raw HTTP: whatever is sent, the answer is a typed error with a code, never a 500 and never a hang."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer

from rock.errors import StorageFull
from rock.protocol.routes import METHODS, ROUTES
from rock.sync import Sandbox, SandboxConfig


def ask(server: RunningServer, method: str, path: str, body: bytes | str = b"", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        return reply.status, json.loads(data) if data[:1] in (b"{", b"[") else data
    finally:
        connection.close()


CREATE = ROUTES["create_sandbox"].path


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", CREATE, "{", 422, "invalid_config"),
        ("POST", CREATE, "[]", 422, "invalid_config"),
        ("POST", CREATE, '{"memroy": "8g"}', 422, "invalid_config"),
        ("POST", CREATE, '{"memory": "abc"}', 422, "invalid_config"),
        ("POST", CREATE, '{"cpus": 4096}', 422, "invalid_config"),
        ("POST", CREATE, '{"startup_timeout": "inf"}', 422, "invalid_config"),
        ("POST", CREATE, '{"limit_cpus": "Infinity"}', 422, "invalid_config"),
        ("POST", CREATE, '{"auto_delete_seconds": "1%s"}' % ("0" * 400), 422, "invalid_config"),
        ("POST", CREATE, '{"sandbox_id": "../../etc"}', 422, "invalid_config"),
        ("POST", CREATE, '{"image": "../../etc"}', 422, None),
        ("POST", CREATE, '{"image": "no/such:image", "pull": "never"}', 422, "image_error"),
        ("POST", CREATE + "?wait=x", "{}", 422, "invalid_config"),
        ("POST", CREATE, b"\xff\xfe", 422, "invalid_config"),
        ("GET", "/v1/sandboxes/nope", "", 404, "not_found"),
        ("POST", "/v1/sandboxes/nope/stop", "", 404, "not_found"),
        ("DELETE", "/v1/sandboxes/nope", "", 404, "not_found"),
        ("GET", "/v1/sandboxes?state=nope", "", 422, "invalid_config"),
        ("GET", "/v1/sandboxes?after=nope", "", 422, "invalid_config"),
        ("GET", "/v1/sandboxes?colour=red", "", 422, "invalid_config"),
        ("POST", "/v1/sandboxes/nope/execute", '{"command": "ls"}', 404, "not_found"),
        ("POST", "/v1/sandboxes/nope/sessions/default/run", '{"command": "ls"}', 404, "not_found"),
        ("GET", "/v1/sandboxes/nope/files/content?path=/x", "", 404, "not_found"),
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("GET", "/v1/sandboxes/a/b/c/d/e", "", 404, "not_found"),
        ("PATCH", CREATE, "", 405, "bad_request"),
        ("POST", "/v1/envs", '{"env_id": "game:NoSuch-v0"}', 404, "not_found"),
        ("POST", "/v1/envs", "{}", 422, "invalid_config"),
    ],
)
def test_errors_are_typed(
    server: RunningServer, method: str, path: str, body: str, status: int, code: str | None
) -> None:
    found, reply = ask(server, method, path, body)
    assert (found, code in (None, reply["error"]["code"])) == (status, True), reply
    assert reply["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", "/execute", "{}", "invalid_config"),
        ("POST", "/execute", '{"command": []}', "invalid_config"),
        ("POST", "/execute", '{"command": ["ls"], "cdw": "/"}', "invalid_config"),
        ("POST", "/execute", '{"command": "a\\u0000b"}', "invalid_config"),
        ("POST", "/execute", '{"command": ["ls"], "timeout": -1}', "invalid_config"),
        ("POST", "/sessions", '{"session": "a/b"}', "invalid_config"),
        ("POST", "/sessions", '{"session": "x", "max_read_size": -1}', "invalid_config"),
        ("POST", "/sessions", '{"session": "x", "shell": "nosuchshell"}', "not_found"),
        ("POST", "/sessions/zz/run", '{"command": "ls"}', "not_found"),
        ("POST", "/sessions/default/run", "17", "invalid_config"),
        ("POST", "/sessions/default/run", '{"command": "\\u0000"}', "invalid_config"),
        ("POST", "/sessions/default/resize", '{"rows": 0, "columns": "x"}', "invalid_config"),
        ("GET", "/files/content?path=relative", "", "invalid_config"),
        ("GET", "/files/content", "", "invalid_config"),
        ("GET", "/files/content?path=/tmp/%00", "", "invalid_config"),
        ("GET", "/files/content?path=/tmp&offset=x", "", "invalid_config"),
        ("GET", "/files/content?path=/nowhere", "", "not_found"),
        ("PUT", "/files/content?path=/tmp/x&mode=999", "x", "invalid_config"),
        ("POST", "/files/chmod", '{"paths": ["/tmp"], "mode": "rwx"}', "invalid_config"),
        ("PUT", "/files/archive?path=/tmp/x", "this is no tar", "invalid_config"),
        ("POST", "/processes/nope/signal", '{"signal": 9}', "not_found"),
        ("GET", "/processes/nope", "", "not_found"),
        ("DELETE", "/sessions/nope", "", "not_found"),
        ("POST", "/envs/x/step", "{}", "invalid_config"),
    ],
)
def test_errors_of_the_data_plane(server: RunningServer, method: str, path: str, body: str, code: str) -> None:
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="128m")) as sandbox:
        status, reply = ask(server, method, f"/v1/sandboxes/{sandbox.sandbox_id}{path}", body)
        assert 400 <= status < 500 and reply["error"]["code"] == code, (status, reply)
        assert sandbox.arun("echo fine").output == "fine\n"


def test_garbage_on_the_socket(server: RunningServer) -> None:
    for junk in (b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/sandboxes HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), 5) as raw:
            raw.sendall(junk)
            raw.settimeout(5)
            assert b"400" in raw.recv(4096)
    assert ask(server, "GET", "/healthz")[0] == 200


def test_the_page_of_the_api_has_every_route(server: RunningServer) -> None:
    status, page = ask(server, "GET", "/openapi.json")
    assert status == 200
    for row in ROUTES.values():
        # What Prometheus reads is text, and an upgraded connection has frames: no part of the API in JSON.
        if row.plane != "node" and row.method != "WEBSOCKET" and row.name not in ("metrics", "connection"):
            for method in METHODS if row.method == "ANY" else (row.method,):
                assert method.lower() in page["paths"][row.path], row.name
    assert ask(server, "GET", "/")[1] == {"message": "hello, ROCK!"}
    assert ask(server, "GET", "/", accept="text/html")[0] in (302, 303, 307), "to the web page"


def test_beyond_loopback_a_key_is_needed(tmp_path: Path) -> None:
    import os
    import sys

    environment = {**os.environ, "ROCK_HOME": str(tmp_path), "ROCK_API_KEY": ""}
    command = [sys.executable, "-m", "rock.cli.server", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "API key" in done.stderr and "Traceback" not in done.stderr


def test_a_taken_port(server: RunningServer, tmp_path: Path) -> None:
    twin = RunningServer(tmp_path)
    with pytest.raises(AssertionError, match="cannot listen on"):
        twin.start(port=urlsplit(server.url).port or 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 24 MB, which only root can make."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, own_server: Callable[..., RunningServer]) -> None:
    server = own_server(home=small_disk)
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m")) as sandbox:
        sandbox.fs.write("/tmp/small", b"old")
        with pytest.raises(StorageFull):
            sandbox.fs.write("/tmp/small", b"x" * (40 << 20))
        assert sandbox.fs.read("/tmp/small") == b"old"
        assert sandbox.arun("head -c 40000000 /dev/zero > /tmp/fill").exit_code != 0
        assert sandbox.arun("echo alive").output == "alive\n"
        with pytest.raises(StorageFull):
            Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m")).start()
        sandbox.fs.remove("/tmp/fill")
        with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m")) as other:
            assert other.arun("echo again").output == "again\n"
    assert shutil.disk_usage(small_disk).free > 0


@pytest.mark.one_process("other processes write to the disk while the test fills it")
def test_a_disk_that_is_nearly_full(small_disk: Path, own_server: Callable[..., RunningServer]) -> None:
    """Wherever in a start it is that the room ends."""
    # Without the audit log: its writes in the background would release the reserve, and then nothing starts.
    server = own_server(home=small_disk, ROCK_AUDIT_DAYS="0")
    ballast, outcomes = small_disk / "ballast", list[str]()
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m")):
        pass  # what a server makes once is there
    for pages in [*range(24), *range(24, 90, 6), 128, 256, 512]:  # the log of the store grows meanwhile
        ballast.unlink(missing_ok=True)
        room = shutil.disk_usage(small_disk).free - (pages << 12)
        with open(ballast, "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, room)
        made = Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m"))
        try:
            made.start()
            outcomes.append("runs")
            ballast.unlink()
            made.stop()
        except StorageFull:
            outcomes.append("full")
    assert outcomes[0] == "full" and outcomes[-1] == "runs" and set(outcomes) == {"full", "runs"}, outcomes


NUL_BODIES = [
    ("execute", {"command": ["true"], "cwd": "\0"}),
    ("execute", {"command": ["true"], "user": "a\0b"}),
    ("execute", {"command": ["tr\0ue"]}),
    ("execute", {"command": ["true"], "env": {"A\0": "b"}}),
    ("execute", {"command": ["true"], "env": {"A": "\0"}}),
    ("processes", {"command": ["true"], "cwd": "/\0"}),
    ("processes", {"command": ["true"], "user": "\0"}),
    ("processes", {"command": ["true"], "env": {"A": "\0"}}),
    ("sessions", {"session": "nul", "cwd": "\0"}),
    ("sessions", {"session": "nul", "remote_user": "\0"}),
    ("sessions", {"session": "nul", "shell": "\0"}),
    ("sessions", {"session": "nul", "env_enable": True, "env": {"A": "\0"}}),
    ("sessions", {"session": "nul", "startup_source": ["/\0"]}),
    ("sessions/default/run", {"command": "echo \0"}),
    ("commit", {"image_tag": "x\0:1"}),
    ("commit", {"image_tag": "x:1", "registry_username": "\0", "registry_password": "\0", "push": True}),
]


@pytest.mark.parametrize(("what", "body"), NUL_BODIES, ids=str)
def test_a_nul_character_is_a_typed_error(server: RunningServer, sandbox: Sandbox, what: str, body: Any) -> None:
    path = f"/v1/sandboxes/{sandbox.sandbox_id}/{what}"
    status, told = ask(server, "POST", path, json.dumps(body), **{"content-type": "application/json"})
    assert status == 422 and told["error"]["code"] == "invalid_config", told
    assert "NUL" in told["error"]["message"], told


def test_a_nul_character_in_a_query_or_a_create_is_a_typed_error(server: RunningServer, sandbox: Sandbox) -> None:
    base = f"/v1/sandboxes/{sandbox.sandbox_id}"
    for method, path in (("GET", "files/content?path=/a%00"), ("PUT", "files/content?path=/a%00"),
                         ("GET", "files/stat?path=/a%00"), ("GET", "files?path=/a%00"),
                         ("PUT", "files/archive?path=/a%00"), ("GET", "files/archive?path=/a%00"),
                         ("DELETE", "files?path=/a%00"), ("POST", "files/mkdir?path=/a%00")):  # fmt: skip
        status, told = ask(server, method, f"{base}/{path}")
        assert 400 <= status < 500, (method, path, told)
    for field in ("image", "user_id", "namespace", "sandbox_id", "cluster", "route_key", "runtime", "image_os"):
        status, told = ask(server, "POST", CREATE, json.dumps({"image": IMAGE, field: "a\0b"}))
        assert status == 422, (field, told)
    status, told = ask(server, "POST", CREATE, json.dumps({"image": IMAGE, "labels": {"a": "\0"}}))
    assert status == 422, told
    # Text is no name: what a program reads may have it.
    status, told = ask(server, "POST", f"{base}/execute", json.dumps({"command": ["wc", "-c"], "stdin": "a\0b"}))
    assert status == 200 and told["stdout"].strip() == "3"


def test_a_tar_of_deep_folders_is_unpacked_or_refused(server: RunningServer, sandbox: Sandbox) -> None:
    base = f"/v1/sandboxes/{sandbox.sandbox_id}"
    for depth, taken in ((1500, True), (3000, False)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("/".join(["a"] * depth) + "/file")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
        route = ROUTES["upload_dir"]
        path = route.url(sandbox_id=str(sandbox.sandbox_id)) + "?path=/tmp/deep"
        status, told = ask(server, route.method, path, data.getvalue())
        assert (status < 300) if taken else (400 <= status < 500), (depth, status, told)
    assert sandbox.execute(["sh", "-c", "find /tmp/deep -name file | wc -l"]).stdout.strip() == "1"
    sandbox.fs.remove("/tmp/deep", recursive=True)
    assert ask(server, "GET", f"{base}")[0] == 200
