"""The ROCK dialect by raw HTTP: what clients of rl-rock send and read, without one of them."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer, running

from rock.sync import Sandbox

BASE = "/apis/envs/sandbox/v1"
GEM = "/apis/v1/envs/gem"


class RockClient:
    """One HTTP request a call; `ask` is the envelope, of which the status is 200 whatever happened."""

    def __init__(self, server: RunningServer) -> None:
        self.address = urlsplit(server.url).netloc
        self.sandbox_id = ""

    def raw(
        self,
        method: str,
        path: str,
        body: bytes | str = b"",
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
        status, value = self.raw(method, BASE + path, data, headers)
        assert status == 200, value
        assert set(value) == {"status", "message", "error", "result"}
        assert value["status"] in ("Success", "Failed")
        assert (value["error"] is None) == (value["status"] == "Success")
        return dict(value)

    def done(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        value = self.ask(method, path, body, **headers)
        assert value["status"] == "Success", value
        return value["result"]

    def post(self, route: str, /, **fields: Any) -> dict[str, Any]:
        return self.ask("POST", route, {"sandbox_id": self.sandbox_id, **fields})

    def start(self, **fields: Any) -> str:
        spec = {"image": IMAGE, "memory": "512m", "cpus": 1, **fields}
        self.sandbox_id = self.done("POST", "/start_async", spec)["sandbox_id"]
        return self.sandbox_id

    def status(self, **query: Any) -> dict[str, Any]:
        return self.ask("GET", f"/get_status?{urlencode({'sandbox_id': self.sandbox_id, **query})}")

    def run(self, command: str, **fields: Any) -> dict[str, Any]:
        return self.post("/run_in_session", action_type="bash", command=command, **fields)

    def output(self, command: str, **fields: Any) -> str:
        seen = self.run(command, **fields)
        assert seen["status"] == "Success", seen
        return str(seen["result"]["output"])

    def upload(self, *parts: tuple[str, str | bytes], **more: Any) -> dict[str, Any]:
        body = b""
        for name, value in parts:
            head = f'--XyZ\r\nContent-Disposition: form-data; name="{name}"'
            if isinstance(value, bytes):
                head += '; filename="data.bin"\r\nContent-Type: application/octet-stream'
            body += head.encode() + b"\r\n\r\n" + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=XyZ"}
        status, value = self.raw("POST", BASE + "/upload", body + b"--XyZ--\r\n", headers)
        assert status == 200
        return dict(value)


@pytest.fixture
def client(server: RunningServer) -> Iterator[RockClient]:
    made = RockClient(server)
    yield made
    if made.sandbox_id:
        made.post("/stop")


@pytest.fixture
def box(client: RockClient) -> RockClient:
    client.start()
    return client


# ---- life -----------------------------------------------------------------------------------------------------------


def test_the_first_look_finds_it_running(client: RockClient) -> None:
    started = client.done("POST", "/start_async", {"image": IMAGE, "memory": "512m", "cpus": 1, "disk": "50G"})
    client.sandbox_id = started["sandbox_id"]
    assert started["host_name"] and started["host_ip"]
    seen = client.status()["result"]
    assert seen["is_alive"] is True and seen["state"] == "running"
    assert seen["sandbox_id"] == client.sandbox_id and seen["image"] == IMAGE
    assert (seen["memory"], seen["cpus"], seen["user_id"]) == ("512m", 1.0, "default")
    assert seen["disk"] is None  # clients ask for 50 GB by themselves; here no limit is held, and the status says so
    assert {name: step["status"] for name, step in seen["status"].items()} == {
        "image_pull": "success",
        "docker_run": "success",
    }
    assert datetime.fromisoformat(seen["start_time"]).tzinfo is not None
    assert client.done("GET", f"/is_alive?sandbox_id={client.sandbox_id}")["is_alive"] is True


def test_clients_of_every_age_can_start(client: RockClient) -> None:
    spec = {
        "image": f" {IMAGE} ", "auto_clear_time": 0.5, "auto_clear_time_minutes": "0.5", "memory": "256m", "cpus": "1",
        "num_gpus": None, "sandbox_id": None, "resources": {"gpu": 1}, "pull": "missing", "startup_timeout": None,
    }  # fmt: skip
    headers = {"ROUTE-KEY": "abc", "X-Cluster": "zb", "X-User-Id": "u1", "X-Experiment-Id": "e1", "X-Namespace": "n1"}
    client.sandbox_id = client.done("POST", "/start_async", spec, **headers)["sandbox_id"]
    seen = client.status(include_all_states="False")["result"]
    assert (seen["user_id"], seen["experiment_id"], seen["namespace"]) == ("u1", "e1", "n1")
    left = datetime.fromisoformat(seen["auto_stop_time"]).timestamp() - time.time()
    assert 25 < left <= 31  # half a minute, and not the whole one


def test_a_name_of_its_own_is_taken_once(client: RockClient) -> None:
    assert client.start(sandbox_id="my-own.name") == "my-own.name"
    again = client.ask("POST", "/start_async", {"image": IMAGE, "sandbox_id": "my-own.name"})
    assert again["status"] == "Failed" and again["message"] == "async start sandbox failed"
    assert again["result"]["code"] == 4000
    assert "Sandbox my-own.name already exists" in again["result"]["failure_reason"]


@pytest.mark.parametrize(
    ("spec", "code", "text"),
    [
        ({"image": "no/such:image"}, 5000, "no/such:image"),
        ({"image": IMAGE, "memory": "abc"}, 4000, "Invalid memory size: abc"),
        ({"image": IMAGE, "cpus": 4096}, 4000, "4096"),
        ({"image": IMAGE, "use_kata_runtime": True, "disk": "50G"}, 4000, "kata"),
        ({"image": IMAGE, "num_gpus": 1}, 4000, "no worker has 1 GPU"),
        ({"image": IMAGE, "sandbox_id": "../up"}, 4000, "sandbox_id"),
    ],
)
def test_a_start_that_cannot_be(client: RockClient, spec: dict[str, Any], code: int, text: str) -> None:
    told = client.ask("POST", "/start_async", spec)
    assert (told["status"], told["message"], told["result"]["code"]) == ("Failed", "async start sandbox failed", code)
    assert text in told["error"] and text in told["result"]["failure_reason"]
    assert told["result"]["exit_code"] is None and told["result"]["sandbox_id"] is None


def test_the_phases_tell_why_a_start_failed(client: RockClient) -> None:
    spec = {"image": IMAGE, "memory": "256m", "cpus": 1, "startup_timeout": 0.0001, "sandbox_id": "too-slow"}
    client.ask("POST", "/start_async", spec)
    client.sandbox_id = "too-slow"
    seen = client.status()["result"]
    assert seen["is_alive"] is False and seen["stop_time"] is not None
    assert seen["status"]["image_pull"]["status"] == "success"
    assert seen["status"]["docker_run"]["status"] == "failed"
    assert "did not start within 0.0001 s" in seen["status"]["docker_run"]["message"]
    listed = client.done("GET", "/sandboxes")["items"]
    assert "too-slow" not in {item["sandbox_id"] for item in listed}


def test_stop_and_what_is_said_afterwards(box: RockClient) -> None:
    assert box.post("/stop") == {
        "status": "Success", "message": None, "error": None, "result": f"{box.sandbox_id} stopped",
    }  # fmt: skip
    assert box.post("/stop")["status"] == "Success"
    gone = box.status()
    assert gone["status"] == "Failed" and gone["error"] == f"Sandbox {box.sandbox_id} not found"
    assert gone["result"]["code"] == 4000 and gone["result"]["is_alive"] is None
    seen = box.status(include_all_states="True")["result"]
    assert (seen["state"], seen["is_alive"]) == ("deleted", False)
    assert [step["to_state"] for step in seen["state_history"]] == ["running", "stopped"]
    ran = box.run("true")
    assert ran["message"] == "run in session failed" and ran["result"] is None
    assert ran["error"].startswith(f"sandbox {box.sandbox_id} not started")
    assert box.done("GET", f"/is_alive?sandbox_id={box.sandbox_id}")["is_alive"] is False
    assert box.post("/delete")["result"] == f"{box.sandbox_id} deleted"
    assert box.post("/delete")["status"] == "Success"
    assert box.status(include_all_states="True")["status"] == "Failed"


def test_a_running_one_cannot_be_deleted(box: RockClient) -> None:
    told = box.post("/delete")
    assert told["result"]["code"] == 4000
    assert "cannot be deleted: current state is 'running', must be stopped" in told["error"]
    assert box.status()["result"]["is_alive"] is True


def test_restart_and_archive_of_what_cannot_be(box: RockClient) -> None:
    """Running, and then stopped without the wish to keep anything, which is deleted in ROCK's words."""
    for state in ("running", "deleted"):
        for told, what in (
            (box.post("/restart"), "restarted"),
            (box.post(f"/sandboxes/{box.sandbox_id}/restart"), "restarted"),
            (box.post(f"/sandboxes/{box.sandbox_id}/archive"), "archived"),
        ):
            assert (told["status"], told["result"]["code"]) == ("Failed", 4000)
            begin = f"Sandbox {box.sandbox_id} cannot be {what}: current state is '{state}'"
            assert told["error"].startswith(begin)
            assert told["message"] == ("archive" if what == "archived" else "restart") + " sandbox failed"
        box.post("/stop")
    for route, body in (("/restart", {"sandbox_id": "nobody"}), ("/sandboxes/nobody/archive", {})):
        assert box.ask("POST", route, body)["error"] == "Sandbox nobody not found"


def test_stopped_restarted_archived_restored_deleted(client: RockClient) -> None:
    client.start(auto_delete_seconds=500)
    client.output("echo kept > /root/file; cd /tmp")
    first = client.status()["result"]
    client.post("/stop")
    assert client.status()["error"] == f"Sandbox {client.sandbox_id} not found"
    seen = client.status(include_all_states=True)["result"]
    assert (seen["state"], seen["is_alive"], seen["delete_time"]) == ("stopped", False, None)
    stop, delete = (datetime.fromisoformat(seen[name]) for name in ("stop_time", "auto_delete_time"))
    assert (delete - stop).total_seconds() == 500
    started = client.post(f"/sandboxes/{client.sandbox_id}/restart")["result"]
    assert started["sandbox_id"] == client.sandbox_id and started["host_ip"]
    again = client.status()["result"]
    assert again["is_alive"] and again["create_time"] == first["create_time"] and again["stop_time"] is None
    assert client.output("cat /root/file; pwd") == "kept\n/"
    told = [(s["from_state"], s["event"], s["to_state"]) for s in again["state_history"]]
    assert told == [
        ("pending", "alive", "running"), ("running", "stop", "stopped"), ("stopped", "restart", "pending"),
        ("pending", "alive", "running"),
    ]  # fmt: skip
    client.post("/stop")
    archived = client.post(f"/sandboxes/{client.sandbox_id}/archive")
    assert archived["result"] == f"{client.sandbox_id} archiving"
    end = time.monotonic() + 30
    while (seen := client.status(include_all_states=True)["result"])["state"] != "archived":
        assert seen["state"] == "archiving" and time.monotonic() < end
        time.sleep(0.05)
    assert seen["status"]["image_archive"]["status"] == "success" and seen["archive_time"] is not None
    assert client.post("/restart")["status"] == "Success"
    while not client.status(include_all_states=True)["result"]["is_alive"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert client.output("cat /root/file") == "kept"
    client.post("/stop")
    assert client.post("/delete")["result"] == f"{client.sandbox_id} deleted"
    assert client.post("/restart")["error"] == f"Sandbox {client.sandbox_id} not found"


def test_its_time_is_over_in_rocks_words(client: RockClient) -> None:
    client.start(auto_delete_seconds=1)
    client.post("/stop")
    end = time.monotonic() + 30
    while (seen := client.status(include_all_states=True)["result"])["state"] != "deleted":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert seen["delete_time"] is not None and seen["state_history"][-1]["event"] == "delete"
    assert "current state is 'deleted'" in client.post("/restart")["error"]
    assert client.post("/stop")["status"] == "Success" and client.post("/delete")["status"] == "Success"


def test_lists_batches_and_statistics(box: RockClient) -> None:
    first = box.sandbox_id
    second = box.done("POST", "/start_async", {"image": IMAGE, "memory": "256m", "cpus": 1}, **{"X-User-Id": "other"})
    try:
        both = {first, second["sandbox_id"]}
        page = box.done("GET", "/sandboxes")
        assert both <= {item["sandbox_id"] for item in page["items"]} and page["has_more"] is False
        pages = [box.done("GET", f"/sandboxes?page={n}&page_size=1") for n in (1, 2, 3)]
        assert {item["sandbox_id"] for p in pages for item in p["items"]} == both
        assert [p["has_more"] for p in pages] == [True, False, False] and {p["total"] for p in pages} == {2}
        mine = box.done("GET", "/sandboxes?user_id=other&state=running")
        assert [item["sandbox_id"] for item in mine["items"]] == [second["sandbox_id"]]
        assert box.ask("GET", "/sandboxes?colour=red")["status"] == "Failed"
        batch = box.done("POST", "/sandboxes/batch", {"sandbox_ids": [first, "nobody", second["sandbox_id"]]})
        assert [status["sandbox_id"] for status in batch["statuses"]] == [first, second["sandbox_id"]]
        assert all(status["is_alive"] for status in batch["statuses"])
    finally:
        box.post("/stop", sandbox_id=second["sandbox_id"])
    batch = box.done("POST", "/sandboxes/batch", {"sandbox_ids": [first, second["sandbox_id"]]})
    assert [status["sandbox_id"] for status in batch["statuses"]] == [first]
    box.output("yes > /dev/null & true", session="default")
    used = box.done("GET", f"/get_sandbox_statistics?sandbox_id={first}")
    assert 0 < used["cpu"] < 300 and 0 < used["mem"] < 100
    assert set(used) == {"cpu", "mem", "disk", "disk_log_percent", "disk_dind_percent", "net"}


# ---- commands -------------------------------------------------------------------------------------------------------


def test_a_session_keeps_its_state(box: RockClient) -> None:
    opened = box.post("/create_session", session="work", session_type="bash", startup_source=[], env_enable=False,
                      env=None, remote_user=None, startup_timeout=1.0, max_read_size=2000)  # fmt: skip
    assert opened["result"] == {"output": "", "session_type": "bash"}
    box.output("cd /tmp; export A=5", session="work")
    seen = box.run("echo $A $PWD", session="work")["result"]
    assert seen == {
        "session_type": "bash", "output": "5 /tmp", "exit_code": 0, "failure_reason": "",
        "expect_string": "SHELLPS1PREFIX",
    }  # fmt: skip
    assert box.post("/create_session", session="work")["result"]["output"] == ""  # as it was, and no error
    assert box.output("echo $A", session="work") == "5"
    assert box.post("/close_session", session="work")["result"] == {"session_type": "bash"}
    assert box.post("/close_session", session="work")["status"] == "Success"
    told = box.run("echo", session="work", check="ignore")
    assert told["status"] == "Failed" and told["error"].startswith("session 'work' does not exist")


def test_a_session_may_be_called_anything(box: RockClient) -> None:
    name = "my session/№ 1"
    box.post("/create_session", session=name)
    box.output("A=7", session=name)
    assert box.output("echo $A", session=name) == "7"
    assert box.run("echo", session="my session/№ 2")["error"].startswith("session 'my session/№ 2' does not exist")


def test_the_default_session_is_as_it_was_asked_for(box: RockClient) -> None:
    box.done("POST", "/write_file", {"sandbox_id": box.sandbox_id, "path": "/tmp/rc", "content": "B=2; echo hello"})
    spec = {"env": {"A": "1"}, "env_enable": True, "startup_source": ["/tmp/rc"]}
    assert box.post("/create_session", **spec)["result"]["output"].strip() == "hello"
    assert box.output("C=3; echo $A$B") == "12"
    assert box.post("/create_session", **spec)["result"]["output"] == ""
    assert box.output("echo $A$B$C") == "123"  # the second one changed nothing


def test_files_to_source_that_are_missing_are_no_error(box: RockClient) -> None:
    box.post("/write_file", path="/tmp/rc", content="D=4")
    opened = box.post("/create_session", session="s", startup_source=["/no/.bashrc", "/tmp/rc"])
    assert opened["result"]["output"] == "bash: /no/.bashrc: No such file or directory"
    assert box.output("echo $D", session="s") == "4"
    box.post("/write_file", path="/tmp/bad", content="echo my words; exit 9")
    told = box.post("/create_session", session="t", startup_source=["/tmp/bad"])
    assert told["status"] == "Failed" and "my words" in told["error"]


def test_a_crash_of_the_server_changes_nothing(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    box = RockClient(server)
    box.start()
    box.post("/create_session", session="s")
    box.output("A=kept", session="s")
    server.kill()
    server.start()
    box.address = urlsplit(server.url).netloc
    assert box.status()["result"]["is_alive"] is True
    assert box.output("echo $A", session="s") == "kept"
    box.post("/stop")


def test_what_a_check_makes_of_a_status(box: RockClient) -> None:
    told = box.run("echo some output; (exit 3)", check="raise")
    assert (told["status"], told["message"], told["result"]) == ("Failed", None, None)
    assert told["error"] == (
        "Command 'echo some output; (exit 3)' failed with exit code 3. Here is the output:\n'some output'"
    )
    assert box.run("false")["status"] == "Failed"  # "raise" is the default
    assert box.run("(exit 3)", check="silent")["result"]["exit_code"] == 3
    assert box.run("(exit 3)", check="ignore")["result"]["exit_code"] is None
    for nothing in ("", "# nothing"):
        assert box.run(nothing)["result"]["exit_code"] == 0


@pytest.mark.parametrize("check", ["raise", "silent", "ignore"])
def test_what_bash_cannot_read(box: RockClient, check: str) -> None:
    told = box.run("if then", check=check)
    assert (told["status"], told["message"], told["result"]) == ("Failed", None, None)
    assert told["error"].startswith("Error (exit code 2) while checking bash command")
    assert "/bin/bash: line 1: syntax error" in told["error"]


def test_a_command_that_only_speaks_of_syntax_errors(box: RockClient) -> None:
    seen = box.run("echo syntax error near you; (exit 2)", check="silent")["result"]
    assert (seen["output"], seen["exit_code"]) == ("syntax error near you", 2)


def test_output_is_plain(box: RockClient) -> None:
    assert box.output("printf '\\n \\033[1;31mred\\033[0m\\nblue\\n\\n'") == "red\nblue"


def test_a_command_runs_out_of_time(box: RockClient) -> None:
    told = box.run("echo partial; sleep 37", timeout=2)
    assert told["status"] == "Failed" and told["message"] is None
    assert "timed out" in told["error"] and "'partial'" in told["error"]
    assert box.output("echo next") == "next"  # and not the answer before
    assert running(Sandbox(base_url=f"http://{box.address}").attach(box.sandbox_id), "sleep 37") == 0


def test_a_client_that_leaves_ends_its_command(box: RockClient) -> None:
    body = json.dumps({"sandbox_id": box.sandbox_id, "command": "sleep 38", "timeout": None})
    with pytest.raises(TimeoutError):
        box.raw("POST", BASE + "/run_in_session", body, timeout=1.0)
    assert box.output("echo next") == "next"
    assert running(Sandbox(base_url=f"http://{box.address}").attach(box.sandbox_id), "sleep 38") == 0


def test_a_background_command_that_ends_before_it_is_disowned(box: RockClient) -> None:
    box.post("/create_session", session="s")
    submit = "nohup true < /dev/null > /tmp/o 2>&1 & echo PIDSTART${!}PIDEND;disown"
    for _ in range(300):  # it is a matter of microseconds: one in a hundred does
        assert re.fullmatch(r"PIDSTART\d+PIDEND", box.output(submit, session="s", timeout=30))


def test_sessions_read_bashrc(box: RockClient) -> None:
    box.post("/write_file", path="/root/.bashrc", content="echo noise; export PATH=/opt/conda/bin:$PATH")
    for session in ("s", "default"):
        assert box.post("/create_session", session=session)["result"]["output"] == "noise"
        assert box.output("echo ${PATH%%:*}", session=session) == "/opt/conda/bin"


def test_nohup_as_clients_do_it(box: RockClient) -> None:
    box.post("/create_session", session="bash-1")
    inside = "nohup bash -c 'echo one; sleep 1.5; echo two; exit 5' < /dev/null > /tmp/tmp_1.out 2>&1 "
    seen = box.output(inside + "& echo PIDSTART${!}PIDEND;disown", session="bash-1", timeout=30)
    pid = int(seen.partition("PIDSTART")[2].partition("PIDEND")[0])
    began = time.monotonic()
    assert box.run(f"kill -0 {pid}", session="bash-1")["status"] == "Success"
    assert time.monotonic() - began > 0.8, "the first probe waits for a short command"
    end = time.monotonic() + 10
    while box.run(f"kill -0 {pid}", session="bash-1")["status"] == "Success":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert box.output("cat /tmp/tmp_1.out", session="bash-1") == "one\ntwo"
    assert box.output("head -c 3 /tmp/tmp_1.out", session="bash-1") == "one"
    size = "stat -c %s /tmp/tmp_1.out 2>/dev/null || stat -f %z /tmp/tmp_1.out"
    assert box.output(size, session="bash-1") == "8"


def test_the_first_probe_waits_for_the_end_of_a_short_command(box: RockClient) -> None:
    """Clients look once, and then not again for 5 s or more."""
    box.post("/create_session", session="s")
    submit = "nohup sleep 0.4 < /dev/null > /tmp/o 2>&1 & echo PIDSTART${!}PIDEND;disown"
    pid = re.search(r"PIDSTART(\d+)PIDEND", box.output(submit, session="s", timeout=30))[1]
    assert box.run(f"kill -0 {pid}", session="s")["status"] == "Failed"
    began = time.monotonic()
    assert box.run("kill -0 $$", session="s")["status"] == "Success"
    assert box.run("kill -0 1", session="s")["status"] == "Success"
    assert time.monotonic() - began < 5, "other probes are answered at once"


def test_unknown_fields_are_named(box: RockClient) -> None:
    """They are ignored, as by ROCK, and a mistyped one can be found."""
    connection = http.client.HTTPConnection(box.address, timeout=60)
    body = {"sandbox_id": box.sandbox_id, "command": ["true"], "time_out": 5, "bad\r\nname": 1}
    connection.request("POST", f"{BASE}/execute", json.dumps(body))
    reply = connection.getresponse()
    assert json.loads(reply.read())["status"] == "Success"
    assert reply.headers["x-rock-warning"] == "unknown fields are ignored: bad??name, time_out"
    connection.close()


def test_the_network_of_a_sandbox(box: RockClient) -> None:
    """As ROCK's have one, theirs have one here; a request may name another."""
    def network() -> str:
        return str(box.raw("GET", f"/v1/sandboxes/{box.sandbox_id}")[1]["network"])

    assert network() == "nat"
    box.post("/stop")
    box.start(network="none")
    assert network() == "none"
    box.post("/stop")
    refused = box.ask("POST", "/start_async", {"image": IMAGE, "memory": "512m", "cpus": 1, "network": "wide"})
    assert refused["status"] == "Failed" and "network" in refused["error"]
    box.start()


def test_execute(box: RockClient) -> None:
    seen = box.post("/execute", command=["sh", "-c", "echo $A; echo err >&2; pwd; exit 4"], env={"A": "b"}, cwd="/tmp")
    assert seen["result"] == {"stdout": "b\n/tmp\n", "stderr": "err\n", "exit_code": 4}
    assert box.post("/execute", command="echo a | wc -c", timeout=None)["result"]["stdout"].strip() == "2"
    for command, more, text in (
        (["no-such-program"], {}, "no-such-program"),
        (["ls"], {"cwd": "/no/such/folder"}, "/no/such/folder"),
        (["sleep", "30"], {"timeout": 0.2}, "timed out"),
    ):
        seen = box.post("/execute", command=command, **more)["result"]
        assert seen["exit_code"] == -1 and text in seen["stderr"], seen
    told = box.post("/execute", command=["false"], check=True, error_msg="my words")
    assert told["status"] == "Failed" and told["error"].startswith("my words: ")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files(box: RockClient) -> None:
    text = "héllo\r\n\tworld\n"
    assert box.post("/write_file", path="/tmp/new/deep/file.txt", content=text)["result"]["success"] is True
    assert box.post("/read_file", path="/tmp/new/deep/file.txt", encoding=None)["result"] == {"content": text}
    latin = box.post("/read_file", path="/tmp/new/deep/file.txt", encoding="latin-1")["result"]["content"]
    assert latin == text.encode().decode("latin-1")
    missing = box.post("/read_file", path="/tmp/nothing")["result"]
    assert missing["content"] == "" and "/tmp/nothing" in missing["failure_reason"]
    told = box.post("/write_file", path="/proc/no/such", content="x")
    assert (told["status"], told["message"]) == ("Failed", "write file failed")
    assert box.post("/read_file", path="/tmp/new/deep/file.txt", encoding="no-such")["status"] == "Failed"


def test_bytes_that_are_no_text(box: RockClient) -> None:
    box.output("printf 'a\\377b' > /tmp/bytes")
    assert box.post("/read_file", path="/tmp/bytes")["result"]["content"] == "a\\xffb"
    replaced = box.post("/read_file", path="/tmp/bytes", errors="replace")["result"]["content"]
    assert replaced == "a\N{REPLACEMENT CHARACTER}b"
    assert box.post("/read_file", path="/tmp/bytes", errors="strict")["status"] == "Failed"


@pytest.mark.parametrize("order", [("sandbox_id", "target_path", "file"), ("file", "target_path", "sandbox_id")])
def test_upload_in_any_order(box: RockClient, order: tuple[str, ...]) -> None:
    data = bytes(range(256)) * 12_345 + b"\r\n--Xy-is-not-the-boundary\r\n-"
    fields: dict[str, str | bytes] = {"sandbox_id": box.sandbox_id, "target_path": "/tmp/in/data.bin", "file": data}
    seen = box.upload(*((name, fields[name]) for name in order))
    assert seen["result"]["success"] is True and seen["result"]["file_name"] == "data.bin"
    assert Sandbox(base_url=f"http://{box.address}").attach(box.sandbox_id).fs.read("/tmp/in/data.bin") == data


def test_uploads_that_cannot_be(box: RockClient) -> None:
    data = b"x" * 3_000_000
    told = box.upload(("sandbox_id", box.sandbox_id), ("target_path", "/proc/no/such"), ("file", data))
    assert (told["status"], told["message"]) == ("Failed", "upload file failed")
    told = box.upload(("sandbox_id", "nobody"), ("target_path", "/tmp/x"), ("file", data))
    assert told["error"] == "sandbox nobody not started"
    told = box.upload(("sandbox_id", box.sandbox_id), ("file", data))
    assert (told["message"], told["error"]) == ("invalid parameter", "body.target_path: Field required")
    assert box.upload(("sandbox_id", box.sandbox_id), ("target_path", "/tmp/x"))["error"] == "body.file: Field required"
    headers = {"Content-Type": "multipart/form-data; boundary=XyZ"}
    head = b'--XyZ\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    for body in (b"", b"--XyZ\r\n", head + b"cut off", b"--XyZ\r\n\r\n\r\n--XyZ--", data):
        status, value = box.raw("POST", BASE + "/upload", body, headers)
        assert (status, value["status"]) == (200, "Failed"), body[:80]
    status, value = box.raw("POST", BASE + "/upload", data, {"Content-Type": "application/json"})
    assert (status, value["status"]) == (200, "Failed")


# ---- rough requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "error"),
    [
        ("POST", "/start_async", {}, "body.image: Field required"),
        ("POST", "/start_async", {"image": "  "}, "body.image: String should have at least 1 character"),
        ("POST", "/start_async", b"{", "body.1: JSON decode error"),
        ("POST", "/start_async", b"", "body: Field required"),
        ("POST", "/start_async", [], "body: "),
        ("POST", "/start_async", {"image": IMAGE, "auto_clear_time": -1}, "body.auto_clear_time: "),
        ("POST", "/start_async", {"image": IMAGE, "cpus": "many"}, "body.cpus: "),
        ("POST", "/run_in_session", {"command": "ls"}, "body.sandbox_id: Field required"),
        ("POST", "/run_in_session", {"sandbox_id": "x", "command": "ls", "check": "never"}, "body.check: "),
        ("POST", "/execute", {"sandbox_id": "x"}, "body.command: Field required"),
        ("POST", "/stop", {"sandbox_id": ""}, "body.sandbox_id: String should have at least 1 character"),
        ("POST", "/sandboxes/batch", {"sandbox_ids": ["x"] * 2001}, "body.sandbox_ids: "),
        ("GET", "/get_status", None, "query.sandbox_id: Field required"),
        ("GET", "/sandboxes?page=0", None, "query.page: "),
    ],
)
def test_malformed_requests(client: RockClient, method: str, path: str, body: Any, error: str) -> None:
    told = client.ask(method, path, body)
    assert (told["status"], told["message"], told["result"]) == ("Failed", "invalid parameter", None)
    assert told["error"].startswith(error)


@pytest.mark.parametrize("sandbox_id", ["nobody", "a/b", "../x", "x?y=1", "\N{SNOWMAN}", "a" * 1000])
def test_sandboxes_that_nobody_has(client: RockClient, sandbox_id: str) -> None:
    for path, fields in (
        ("/execute", {"command": ["ls"]}),
        ("/run_in_session", {"command": "ls"}),
        ("/create_session", {}),
        ("/close_session", {}),
        ("/read_file", {"path": "/etc/hostname"}),
        ("/write_file", {"path": "/tmp/x", "content": ""}),
    ):
        told = client.ask("POST", path, {"sandbox_id": sandbox_id, **fields})
        assert told["status"] == "Failed" and told["result"] is None
        assert told["error"] == f"sandbox {sandbox_id} not started", path
    assert client.ask("POST", "/stop", {"sandbox_id": sandbox_id})["status"] == "Success"
    query = urlencode({"sandbox_id": sandbox_id})
    assert client.ask("GET", f"/get_status?{query}")["result"]["code"] == 4000
    assert client.done("GET", f"/is_alive?{query}")["is_alive"] is False


def test_no_such_route(client: RockClient) -> None:
    assert client.raw("GET", BASE + "/nothing") == (404, {"detail": "Not Found"})
    assert client.raw("DELETE", BASE + "/stop") == (405, {"detail": "Method Not Allowed"})
    assert client.raw("GET", "/") == (200, {"message": "hello, ROCK!"})
    assert client.done("GET", "/get_token?account=primary") is None


def test_a_key_is_asked_for_here_too(own_server: Callable[..., RunningServer]) -> None:
    client = RockClient(own_server(ROCK_API_KEY="secret"))
    for path in (BASE + "/sandboxes", "/health"):
        assert client.raw("GET", path)[0] == 401
        assert client.raw("GET", path, headers={"Authorization": "Bearer secret"})[0] == 200


# ---- EnvHub ---------------------------------------------------------------------------------------------------------


def test_envhub_remembers(own_server: Callable[..., RunningServer]) -> None:
    server = own_server()
    hub = RockClient(server)

    def ask(path: str, **body: Any) -> tuple[int, Any]:
        return hub.raw("POST", path, json.dumps(body))

    spec = {"env_name": "maze", "image": "a:1", "owner": "me", "tags": ["x", "y"], "extra_spec": {"n": [1]}}
    status, first = ask("/env/register", **spec)
    assert status == 200 and first == {
        **spec, "description": "", "create_at": first["create_at"], "update_at": first["update_at"],
    }  # fmt: skip
    ask("/env/register", env_name="other", image="b:1", owner="you", tags=["z"])
    server.kill()
    server.start()
    hub = RockClient(server)
    assert ask("/env/get", env_name="maze") == (200, first)
    status, again = ask("/env/register", **{**spec, "image": "a:2"})
    assert (again["image"], again["create_at"]) == ("a:2", first["create_at"])

    def names(**filters: Any) -> list[str]:
        return [env["env_name"] for env in ask("/env/list", **filters)[1]["envs"]]

    assert names(owner=None, tags=None) == ["EnvhubDefaultDockerImage", "maze", "other"]
    assert names(owner="me") == ["maze"] and names(tags=["z", "y"]) == ["maze", "other"]
    assert names(owner="me", tags=["z"]) == []
    assert ask("/env/delete", env_name="maze") == (200, True)
    assert ask("/env/delete", env_name="maze")[0] == 404
    status, told = ask("/env/get", env_name="maze")
    assert status == 404 and "maze" in told["detail"]
    assert ask("/env/register", env_name="x")[0] == 422
    assert hub.raw("GET", "/health") == (200, {"status": "ok"})


# ---- environments ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_an_episode(env_server: RunningServer) -> None:
    gem = RockClient(env_server)

    def ask(path: str, **body: Any) -> tuple[int, Any]:
        return gem.raw("POST", GEM + path, json.dumps(body), timeout=1100)

    made = [ask("/make", env_id="game:Sokoban-v0-easy") for _ in range(2)]
    assert [status for status, _ in made] == [200, 200]
    one, two = (value["sandbox_id"] for _, value in made)
    assert one != two
    assert ask("/list", sandbox_id=one) == (200, {"env_id": ["game:Sokoban-v0-easy"]})
    boards = [ask("/reset", sandbox_id=sandbox_id, seed=3)[1] for sandbox_id in (one, two)]
    assert boards[0] == boards[1] and "Sokoban" in boards[0]["observation"]
    status, step = ask("/step", sandbox_id=one, action="\\boxed{up}")
    assert status == 200 and set(step) == {"observation", "reward", "terminated", "truncated", "info"}
    assert ask("/close", sandbox_id=one) == (200, {"sandbox_id": one})
    assert ask("/close", sandbox_id=one) == (200, {"sandbox_id": one})
    status, told = ask("/step", sandbox_id=one, action="up")
    assert status == 404 and told["detail"]
    assert ask("/step", sandbox_id=two, action="\\boxed{up}")[1] == step  # the other one is another
    ask("/close", sandbox_id=two)
    status, told = ask("/make", env_id="game:Nothing-v0")
    assert status == 404 and "game:Nothing-v0" in told["detail"]
    for unknown in ("nobody", "nobody/0/x", "/0/"):
        assert ask("/reset", sandbox_id=unknown)[0] == 404
        assert ask("/close", sandbox_id=unknown)[0] == 404
    status, told = ask("/step", sandbox_id=two)
    assert (status, told["message"], told["error"]) == (200, "invalid parameter", "body.action: Field required")


def test_a_catalogue_of_a_folder_that_is_gone(tmp_path: Path) -> None:
    import asyncio

    from rock.envhub.catalogue import Catalogue
    from rock.errors import Unavailable

    async def work() -> None:
        catalogue = Catalogue(tmp_path / "hub.sqlite")
        (tmp_path / "hub.sqlite").mkdir()
        with pytest.raises(Unavailable, match=r"hub\.sqlite"):
            await catalogue.open()
        await catalogue.close()

    asyncio.run(work())


def test_a_user_is_made_as_clients_do_it(box: RockClient) -> None:
    made = box.post("/execute", command=["useradd", "-m", "-s", "/bin/bash", "agent"])["result"]
    assert made["exit_code"] == 0, made
    assert box.post("/execute", command=["id", "-un", "agent"])["result"]["stdout"] == "agent\n"
    box.post("/create_session", session="hers", remote_user="agent")
    assert box.output("whoami; echo ~", session="hers") == "agent\n/home/agent"
