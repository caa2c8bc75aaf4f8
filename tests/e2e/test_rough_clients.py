"""Clients that leave, dawdle, ask twice or all at once: nothing hangs, leaks or is done twice."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until

from rock.actions import CreateBashSessionRequest
from rock.errors import NotFound, Unavailable
from rock.sync import Sandbox

SECONDS = 20.0


def call(
    server: RunningServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """(status, JSON) of one request over a connection of its own."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        raw = answer.read()
        return answer.status, json.loads(raw) if raw[:1] in (b"{", b"[") else raw
    finally:
        connection.close()


def begin(server: RunningServer, path: str, body: dict[str, Any]) -> socket.socket:
    """A request that is sent and whose answer nobody reads yet, by a client with little room for it."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    data = json.dumps(body).encode()
    client.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    return client


def test_a_client_that_leaves_a_stream_it_was_too_slow_for(server: RunningServer, sandbox: Sandbox) -> None:
    path = f"/v1/sandboxes/{sandbox.sandbox_id}/sessions/default/run"
    client = begin(server, f"{path}?stream=1", {"command": "yes | head -c 100000000"})
    time.sleep(1.0)  # until the output waits for the client
    client.close()
    seen = sandbox.arun("head -c 300000 /dev/zero | tr '\\0' x", timeout=SECONDS)
    assert len(seen.output) == 300_000 and not seen.timed_out


def test_a_client_that_leaves_ends_its_command(server: RunningServer, sandbox: Sandbox) -> None:
    begin(server, f"/v1/sandboxes/{sandbox.sandbox_id}/sessions/default/run", {"command": "sleep 600"}).close()
    seen = sandbox.arun("echo free", timeout=SECONDS)
    assert seen.output == "free\n" and seen.exit_code == 0


@pytest.mark.parametrize("size", [0, 300_000])
def test_the_same_key_is_done_once(server: RunningServer, sandbox: Sandbox, size: int) -> None:
    base = f"/v1/sandboxes/{sandbox.sandbox_id}"
    command = f"echo once >> /tmp/log; sleep 0.2; head -c {size} /dev/zero"
    specs = [("execute", {"command": command}), ("sessions/default/run", {"command": command})]
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(call, server, "POST", f"{base}/{path}", body, {"idempotency-key": "k"})
            for path, body in specs
            for _ in range(4)
        ]
        assert [status for status, _ in (one.result() for one in asked)] == [200] * 8
    for path, body in specs:  # and again, when it is long done
        assert call(server, "POST", f"{base}/{path}", body, {"idempotency-key": "k"})[0] == 200
    assert sandbox.execute("cat /tmp/log").stdout == "once\n" * 2


def test_all_who_stop_are_answered_when_nothing_is_left(server: RunningServer) -> None:
    sandbox = Sandbox(base_url=server.url, image=IMAGE, memory="256m")
    sandbox.start()
    folder = server.home / "run" / "records" / str(sandbox.sandbox_id)

    def stop() -> tuple[int, str, bool]:
        status, info = call(server, "POST", f"/v1/sandboxes/{sandbox.sandbox_id}/stop")
        return status, info["state"], folder.exists()

    with ThreadPoolExecutor(4) as pool:
        assert [one.result() for one in [pool.submit(stop) for _ in range(4)]] == [(200, "stopped", False)] * 4


def test_more_uploads_at_once_than_the_server_has_threads(server: RunningServer, sandbox: Sandbox) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(10):
            member = tarfile.TarInfo(f"file{number}")
            member.size = 200_000
            archive.addfile(member, io.BytesIO(os.urandom(member.size)))

    def upload(number: int) -> int:
        path = f"/v1/sandboxes/{sandbox.sandbox_id}/files/archive?path=/tmp/u{number}"
        return call(server, "PUT", path, buffer.getvalue())[0]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(upload, range(12))) == [200] * 12


def test_writers_to_one_standard_input_take_turns(server: RunningServer, sandbox: Sandbox) -> None:
    process = sandbox.processes.start("sleep 0.5; cat | tr -s abc | wc -c")
    path = f"/v1/sandboxes/{sandbox.sandbox_id}/processes/{process.id}/stdin"
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda text: call(server, "POST", path, text * 300_000)[0], (b"a", b"b", b"c")))
    assert done == [200] * 3
    process.write_stdin(b"", close=True)
    process.wait(SECONDS)
    assert process.logs().data.strip() == b"3"  # each one's bytes stay together


def test_a_process_that_does_not_read_its_input_still_starts(sandbox: Sandbox) -> None:
    began = time.monotonic()
    process = sandbox.processes.start("sleep 5", stdin="x" * 1_000_000)
    assert time.monotonic() - began < 4
    process.forget()


def test_a_slow_download_is_no_idleness(server: RunningServer) -> None:
    with Sandbox(base_url=server.url, image=IMAGE, memory="512m", idle_timeout=2) as sandbox:
        sandbox.execute("head -c 60000000 /dev/zero > /tmp/big")
        host, _, port = server.url.removeprefix("http://").partition(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            path = f"/v1/sandboxes/{sandbox.sandbox_id}/files/archive?path=/tmp"
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            for _ in range(7):
                client.recv(4096)
                time.sleep(0.5)
            assert call(server, "GET", f"/v1/sandboxes/{sandbox.sandbox_id}")[1]["state"] == "running"


@pytest.mark.parametrize("moment", [0.6, 0.95, 1.0, 1.05])
def test_a_session_closed_around_its_time_out_leaves_its_name_free(
    server: RunningServer, sandbox: Sandbox, moment: float
) -> None:
    sandbox.create_session(CreateBashSessionRequest(session="work"))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sandbox.arun, "trap '' TERM; sleep 30", session="work", timeout=1.0)
        time.sleep(moment)
        sandbox.close_session("work")
        run.result()
    sandbox.create_session(CreateBashSessionRequest(session="work"))
    assert sandbox.arun("echo here", session="work").output == "here\n"


def test_sessions_opened_and_closed_at_once(server: RunningServer, sandbox: Sandbox) -> None:
    path = f"/v1/sandboxes/{sandbox.sandbox_id}/sessions"

    def churn(_: int) -> set[int]:
        seen = set()
        for _ in range(25):
            seen |= {call(server, "POST", path, {"session": "s"})[0], call(server, "DELETE", f"{path}/s")[0]}
        return seen

    with ThreadPoolExecutor(3) as pool:
        assert set().union(*pool.map(churn, range(3))) <= {200, 201, 404, 409}


def test_a_shell_that_its_own_job_ends_while_idle_keeps_its_state(sandbox: Sandbox) -> None:
    sandbox.arun("x=kept; (sleep 0.2; kill $$) &")
    time.sleep(0.6)
    assert sandbox.arun("echo $x").output == "kept\n"
    assert not sandbox.arun("set -e; false", check="silent").session_closed


def test_output_of_a_terminal_is_that_of_its_command(sandbox: Sandbox) -> None:
    sandbox.create_session(CreateBashSessionRequest(session="pty", pty=(24, 80)))
    for number in range(500):
        assert sandbox.arun(f"echo '<{number}>'", session="pty").output.strip() == f"<{number}>"


def test_what_runs_in_a_session_goes_on_when_the_server_is_stopped(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_DRAIN_SECONDS="0")
    sandbox = Sandbox(base_url=server.url, image=IMAGE, memory="256m")
    sandbox.start()
    assert server.process is not None
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sandbox.arun, "sleep 2; echo done > /tmp/done", timeout=60)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(Unavailable, match="goes on"):
            run.result()
    assert server.process.wait(SECONDS) == 0
    server.start()
    with Sandbox(base_url=server.url).attach(str(sandbox.sandbox_id)) as again:
        until(lambda: again.execute("cat /tmp/done").stdout == "done\n")


def test_web_pages_of_others_are_refused(server: RunningServer) -> None:
    ours = server.url.removeprefix("http://")
    port = ours.partition(":")[2]
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": f"http://evil.example:{port}", "host": f"evil.example:{port}"},
        {"sec-fetch-site": "same-origin", "host": f"evil.example:{port}"},
        {"origin": "null"},
    ):
        assert call(server, "POST", "/v1/sandboxes", {"image": IMAGE}, headers)[0] == 401
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert call(server, "GET", "/v1/sandboxes", headers=own)[0] == 200


def test_a_name_used_again_has_no_past(server: RunningServer) -> None:
    for _ in range(2):
        with Sandbox(base_url=server.url, image=IMAGE, memory="256m", sandbox_id="again") as sandbox:
            assert sandbox.execute("echo 1").stdout == "1\n"
        assert call(server, "DELETE", "/v1/sandboxes/again")[0] == 200
        with pytest.raises(NotFound):
            Sandbox(base_url=server.url).attach("again")


def test_a_streamed_request_is_not_begun_twice(server: RunningServer, sandbox: Sandbox) -> None:
    base = f"/v1/sandboxes/{sandbox.sandbox_id}"
    sandbox.arun("rm -f /tmp/log")
    for path, body in (
        ("execute?stream=1", {"command": "echo once >> /tmp/log"}),
        ("sessions/default/run?stream=1", {"command": "echo once >> /tmp/log"}),
    ):
        headers = {"idempotency-key": f"stream {path}"}
        assert call(server, "POST", f"{base}/{path}", body, headers)[0] == 200
        status, answer = call(server, "POST", f"{base}/{path}", body, headers)
        assert status == 409 and "begun already" in answer["error"]["message"]
    assert sandbox.execute("cat /tmp/log").stdout == "once\n" * 2
