"""Several rocklet processes of one server: each has sandboxes of its own, and a killed one affects no other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import members_of, rocklet_process
from tests.waiting import until

from rock.cli.serve.processes import count_of, name_of, number_of, usual_count
from rock.errors import ClientError, NotFound, StartFailed, Unsupported
from rock.settings import Settings
from rock.sync import Client, Sandbox, SandboxConfig
from rock.sync.transport import Transport

TWO = {"ROCK_PROCESSES": "2"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("pair")
    give_image(home)
    running = RunningServer(home, **TWO)
    running.start()
    yield running
    running.stop()


def make(server: RunningServer, count: int = 1, **fields: object) -> list[Sandbox]:
    config = {"base_url": server.url, "image": IMAGE, "memory": "256m", "cpus": 1.0, "network": "none", **fields}
    sandboxes = [Sandbox(SandboxConfig.model_validate(config)) for _ in range(count)]
    for sandbox in sandboxes:
        sandbox.start()
    return sandboxes


def again(server: RunningServer, sandbox: Sandbox) -> Sandbox:
    return Sandbox(SandboxConfig(base_url=server.url, image=IMAGE)).attach(sandbox.sandbox_id)


def worker_of(sandbox: Sandbox) -> str:
    return sandbox.info().worker or ""


def stop_server(server: RunningServer) -> None:
    """Stop the server, and leave its sandboxes."""
    assert server.process is not None
    server.process.terminate()
    assert server.process.wait(60) == 0, server.log()


def process_of(server: RunningServer, number: int) -> int:
    """The pid of a process."""
    return rocklet_process(server.pid, server.home, number)


def test_sandboxes_are_spread_and_usable(pair: RunningServer) -> None:
    sandboxes = make(pair, 4)
    try:
        assert {worker_of(one) for one in sandboxes} == {"local", "local-1"}
        for number, sandbox in enumerate(sandboxes):
            sandbox.arun(f"x={number}")
            sandbox.fs.write("/tmp/big", bytes(2_000_000))
        for number, sandbox in enumerate(sandboxes):
            assert sandbox.arun("echo $x").output == f"{number}\n"
            assert len(sandbox.fs.read("/tmp/big")) == 2_000_000
        with Client(pair.url) as client:
            assert {one.sandbox_id for one in client.list_sandboxes()} >= {one.sandbox_id for one in sandboxes}
            assert [worker.name for worker in client.list_workers()] == ["local", "local-1"]
    finally:
        for sandbox in sandboxes:
            sandbox.stop()


def test_a_response_larger_than_the_buffers_leaves_the_connection_usable(pair: RunningServer) -> None:
    """The next request on the connection between server and process has its response."""
    sandboxes = make(pair, 2)
    try:
        for sandbox in sandboxes:
            for _ in range(3):
                seen = sandbox.arun("head -c 20000000 /dev/zero | tr '\\0' x", timeout=60)
                assert seen.exit_code == 0 and sandbox.arun("echo next").output == "next\n"
    finally:
        for sandbox in sandboxes:
            sandbox.stop()


def test_a_fork_stays_with_its_process(pair: RunningServer) -> None:
    for parent in make(pair, 2):
        parent.arun("cd /tmp; echo one > file; v=1")
        child = parent.fork(1)[0]
        assert child.arun("echo $v $PWD $(cat file)").output == "1 /tmp one\n"
        assert worker_of(child) == worker_of(parent)
        child.stop()
        parent.stop()


def test_a_killed_process_recovers_its_sandboxes_and_no_other_is_affected(
    own_server: Callable[..., RunningServer]
) -> None:
    server = own_server(**TWO)
    sandboxes = make(server, 4)
    for number, sandbox in enumerate(sandboxes):
        sandbox.arun(f"x={number}; cd /tmp")
    killed = process_of(server, 1)
    other = process_of(server, 0)
    os.kill(killed, signal.SIGKILL)
    for number, sandbox in enumerate(sandboxes):
        if worker_of(sandbox) == "local":  # without any wait
            assert sandbox.arun("echo $x $PWD").output == f"{number} /tmp\n"
    for number, sandbox in enumerate(sandboxes):
        assert sandbox.arun("echo $x $PWD").output == f"{number} /tmp\n"
    assert process_of(server, 0) == other and process_of(server, 1) != killed


def test_a_killed_server_takes_its_processes_along_and_the_next_one_finds_all(
    own_server: Callable[..., RunningServer]
) -> None:
    server = own_server(**TWO)
    sandboxes = make(server, 4)
    for number, sandbox in enumerate(sandboxes):
        sandbox.arun(f"x={number}")
    before = members_of(server.pid)
    assert len(before) == 2
    server.kill()
    server.start()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))
    for number, sandbox in enumerate(sandboxes):
        assert again(server, sandbox).arun("echo $x").output == f"{number}\n"
    after = members_of(server.pid)
    assert len(after) == 2
    stop_server(server)
    assert not any(Path(f"/proc/{pid}").exists() for pid in after)
    server.start()


def test_the_number_of_processes_changes_without_a_loss(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_PROCESSES="1")
    first = make(server)[0]
    first.arun("x=first")
    stop_server(server)
    server.environment["ROCK_PROCESSES"] = "2"
    server.start()
    assert again(server, first).arun("echo $x").output == "first\n" and worker_of(again(server, first)) == "local"
    others = make(server, 3)
    assert "local-1" in {worker_of(one) for one in others}
    stop_server(server)
    server.environment["ROCK_PROCESSES"] = "1"
    with pytest.raises(AssertionError, match="start it with --workers 2"):
        server.start()
    server.environment["ROCK_PROCESSES"] = "2"
    server.start()
    for one in others:
        if worker_of(again(server, one)) == "local-1":
            again(server, one).stop()
    stop_server(server)
    for count in ("1", "2", "1"):
        server.environment["ROCK_PROCESSES"] = count
        server.start()
        assert again(server, first).arun("echo $x").output == "first\n"
        with Client(server.url) as client:
            assert len(list(client.list_workers())) == int(count)
        stop_server(server)
    server.start()


def test_an_image_that_is_built_is_there_for_all(pair: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nRUN echo built > /built\n")
    with Client(pair.url) as client:
        client.build_image(tmp_path, "team/built:1")
    sandboxes = make(pair, 2, image="team/built:1")
    assert [one.arun("cat /built").output for one in sandboxes] == ["built\n"] * 2
    assert {worker_of(one) for one in sandboxes} == {"local", "local-1"}
    for one in sandboxes:
        one.stop()


@pytest.mark.parametrize("url", ["process://00000000000000000000000000000000", "http://127.0.0.1:9"])
def test_another_program_cannot_join_as_a_process(pair: RunningServer, url: str) -> None:
    transport = Transport(pair.url, None)
    with Client(pair.url) as client:
        status = next(iter(client.list_workers())).status
        assert status is not None
    body = {"name": "local-1", "url": url, "holder": "h" * 20, "status": status.model_dump(mode="json")}
    with pytest.raises((NotFound, ClientError), match=r"no process of this server|names of a server's own workers"):
        transport.json("POST", "/v1/workers", body)


def test_numbers_and_names() -> None:
    assert [usual_count(cpus) for cpus in (1, 2, 4, 8, 16, 64, 192, 512)] == [1, 1, 1, 1, 2, 8, 24, 32]
    assert [number_of(name_of(number)) for number in range(3)] == [0, 1, 2]
    assert [number_of(name) for name in ("local-01", "local-x", "other", "local-")] == [None] * 4


def test_several_processes_need_sandboxes_of_its_own(tmp_path: Path) -> None:
    for more in ({"role": "read"}, {"workers": "none"}, {"scheduler": "ray"}):
        with pytest.raises(Unsupported, match="no sandboxes of its own"):
            count_of(Settings(tmp_path, processes=2, **more))  # type: ignore[arg-type]
        assert count_of(Settings(tmp_path, **more)) == 1  # type: ignore[arg-type]


EARLY = """
import socket
listener = socket.create_server(("127.0.0.1", 9014))
open("/tmp/ready", "w").close()
while True:
    client, _ = listener.accept()
    while b"\\r\\n\\r\\n" not in client.recv(65536):
        pass
    client.sendall(b"HTTP/1.1 413 Too Large\\r\\ncontent-length: 2\\r\\n\\r\\nno")
"""


def test_a_response_that_precedes_the_body(pair: RunningServer) -> None:
    """The server does not wait for a body before it forwards the head: the program may reject it by its size."""
    (sandbox,) = make(pair)
    with sandbox:
        sandbox.fs.write("/tmp/early.py", EARLY.encode())
        sandbox.processes.start(["python3", "/tmp/early.py"])
        sandbox.run("until [ -e /tmp/ready ]; do sleep 0.05; done")
        host, _, port = pair.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), 20) as client:
            place = f"/v1/sandboxes/{sandbox.sandbox_id}/ports/9014/"
            client.sendall(f"POST {place} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n".encode())
            seen = b""
            while not seen.endswith(b"no"):
                part = client.recv(4096)
                assert part, seen
                seen += part
        assert seen.startswith(b"HTTP/1.1 413")


def test_the_metrics_of_a_server_contain_those_of_its_processes(pair: RunningServer) -> None:
    sandboxes = make(pair, 4)
    for sandbox in sandboxes:
        sandbox.arun("true")
    text = Client(pair.url).transport.call("GET", "/metrics").decode()
    for name in ("local", "local-1"):
        count = re.search(rf'^rock_worker_sandboxes{{worker="{name}"}} ([0-9]+)$', text, re.MULTILINE)
        assert count is not None and int(count[1]) == [worker_of(one) for one in sandboxes].count(name)
        assert re.search(rf'^rock_command_seconds_count{{worker="{name}",kind="session"}} [1-9]', text, re.MULTILINE)
    heads = [line for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(heads) == len(set(heads)) and 'rock_info{version=' in text
    for sandbox in sandboxes:
        sandbox.stop()


def test_a_setting_that_a_process_refuses_ends_the_server_with_its_error(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, ROCK_HOST_MOUNTS="/srv:data", **TWO)
    with pytest.raises(AssertionError, match="'data' is not an absolute path"):
        server.start()
    assert server.process is not None and server.process.returncode == 1
    assert "ResourceWarning" not in server.log()


def test_a_removal_that_overtakes_its_create_leaves_nothing(pair: RunningServer) -> None:
    """The start fails by its time limit, and the removal reaches the process by another connection than the create."""
    before = pair.inventory()
    options = {"base_url": pair.url, "image": IMAGE, "memory": "64m"}
    for seconds in [0.000001, 0.003] * 30:
        with contextlib.suppress(StartFailed):
            Sandbox(SandboxConfig.model_validate({**options, "startup_timeout": seconds})).start()
    with Client(pair.url) as client:
        for info in client.list_sandboxes():
            client.stop_sandbox(info.sandbox_id)
    pair.assert_clean(before, 20)
