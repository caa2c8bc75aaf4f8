"""The SDK over upgraded connections: the same results, errors, rights and retries as over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.waiting import until

import rock.sdk
from rock.errors import Forbidden, NotFound, RockError, Unauthorized
from rock.protocol.keys import Access, CreateKey
from rock.protocol.routes import ROUTES
from rock.sdk import multiplexing as of_async
from rock.sync import Client, Sandbox, SandboxConfig
from rock.sync import multiplexing as of_sync

KEY = "the-key-of-the-owner"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("frames")
    give_image(home)
    running = RunningServer(home, ROCK_API_KEY=KEY)
    running.start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def unused() -> Iterator[None]:
    """No connections of an earlier test, and none for a later one."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for module in (of_sync, of_async):
        module.clear()
        module._KNOWN.clear()


def box(url: str, key: str = KEY, **fields: Any) -> Sandbox:
    config = {"base_url": url, "api_key": key, "image": IMAGE, "memory": "128m", **fields}
    sandbox = Sandbox(SandboxConfig.model_validate(config))
    sandbox.start()
    return sandbox


def channels(module: Any = of_sync) -> list[Any]:
    """The open upgraded connections of this process."""
    return [channel for known in module._KNOWN.values() for channel in known._all]


def warmed(sandbox: Sandbox) -> Sandbox:
    """After enough requests for an upgrade."""
    for _ in range(of_sync.AFTER + 2):
        assert sandbox.run("true").exit_code == 0
    assert len(channels()) == 1
    return sandbox


def requests(url: str, key: str = KEY) -> str:
    with Client(url, key) as client:
        return client.transport.call("GET", "/metrics").decode()


def test_results_errors_and_files_are_those_of_http(keyed: RunningServer) -> None:
    with box(keyed.url) as sandbox:
        warmed(sandbox)
        assert sandbox.run("cd /tmp; X=5; echo $X; exit_with() { return 7; }; exit_with").exit_code == 7
        assert sandbox.run("echo $X $PWD").output == "5 /tmp\n"
        with pytest.raises(NotFound) as caught:
            sandbox.processes.get("nothing")
        assert caught.value.sandbox_id == sandbox.sandbox_id
        sandbox.files.write("/root/file", b"\0\1" * 600_000)
        assert sandbox.files.read("/root/file") == b"\0\1" * 600_000
        assert len(sandbox.run("head -c 3000000 /dev/zero | tr '\\0' x", max_output_bytes=4 << 20).output) == 3_000_000
        assert "".join(part.text for part in sandbox.stream("echo a; echo b")) == "a\nb\n"
        (channel,) = channels()
        assert channel._number > 5, "the requests went over it"
        assert 'route="run",status="200"' in requests(keyed.url)
    with pytest.raises(RockError, match=r"stopped|gone|expired"):
        sandbox.run("true")


def test_calls_of_one_loop_share_a_connection_and_those_of_threads_do_not(
    keyed: RunningServer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROCK_DIRECT", "off")  # with several processes, direct requests have connections of their own

    async def work() -> None:
        async with rock.sdk.Sandbox(SandboxConfig(base_url=keyed.url, api_key=KEY, image=IMAGE)) as sandbox:
            for number in range(40):
                await sandbox.sessions.create(f"s{number}")
            outputs = await asyncio.gather(*(sandbox.run(f"sleep 0.2; echo {n}", session=f"s{n}") for n in range(40)))
            assert [found.output for found in outputs] == [f"{number}\n" for number in range(40)]
            assert len(channels(of_async)) == 1

    asyncio.run(work())
    asyncio.run(work())
    assert len(channels(of_async)) == 1, "the connection of a loop that was closed is used again"
    with box(keyed.url) as sandbox:
        warmed(sandbox)
        found: list[str] = []

        def one(number: int) -> None:
            sandbox.sessions.create(f"t{number}")
            found.append(sandbox.run(f"sleep 0.3; echo {number}", session=f"t{number}").output)

        before = threading.active_count()
        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        assert threading.active_count() <= before + 8, "no thread for each call"
        for thread in threads:
            thread.join()
        assert sorted(found) == [f"{number}\n" for number in range(8)]


def test_a_canceled_call_ends_its_command_and_not_the_connection(keyed: RunningServer) -> None:
    async def work() -> None:
        async with rock.sdk.Sandbox(SandboxConfig(base_url=keyed.url, api_key=KEY, image=IMAGE)) as sandbox:
            for _ in range(6):
                await sandbox.run("true")
            (channel,) = channels(of_async)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await sandbox.run("touch /tmp/begun; sleep 1000; touch /tmp/over")
            assert (await sandbox.run("while pgrep -x sleep; do :; done; true", timeout=60)).exit_code == 0
            assert (await sandbox.run("ls /tmp/begun /tmp/over 2>/dev/null")).output == "/tmp/begun\n"
            assert channels(of_async) == [channel] and channel.usable

    asyncio.run(work())


def test_rights_are_checked_for_each_request_and_a_revoked_key_ends_at_once(keyed: RunningServer) -> None:
    with Client(keyed.url, KEY) as owner:
        writer = owner.create_key(CreateKey(name="writer", tenant="frames"))
        reader = owner.create_key(CreateKey(name="reader", tenant="frames", scopes=[Access.READ]))
        foreign = owner.create_key(CreateKey(name="foreign", tenant="others"))
        sandbox = warmed(box(keyed.url, writer.key))
        (channel,) = channels()
        # other keys over the same connection
        sessions = ROUTES["list_sessions"].url(sandbox_id=sandbox.sandbox_id)
        run = ROUTES["run"].url(sandbox_id=sandbox.sandbox_id, session="default")
        number = channel._number
        with Client(keyed.url, reader.key) as looks:
            assert looks.transport.json("GET", sessions)["items"]
            with pytest.raises(Forbidden):
                looks.transport.json("POST", run, {"command": "true"})
        with Client(keyed.url, foreign.key) as stranger, pytest.raises(NotFound):
            stranger.transport.json("POST", run, {"command": "true"})
        with Client(keyed.url, "wrong") as unknown, pytest.raises(Unauthorized):
            unknown.transport.json("GET", sessions)
        assert channel._number == number + 4
        assert channels() == [channel]
        assert sandbox.run("echo on").output == "on\n"
        owner.revoke_key(writer.id)
        with pytest.raises(Unauthorized):
            sandbox.run("touch /tmp/revoked")
        owner.stop_sandbox(sandbox.sandbox_id)


def test_a_command_whose_server_is_killed_has_one_result(own_server: Callable[..., RunningServer]) -> None:
    running = own_server(ROCK_API_KEY=KEY)
    sandbox = warmed(box(running.url))
    found: list[str] = []
    command = "echo x >>/tmp/runs; sleep 3; wc -l </tmp/runs"
    thread = threading.Thread(target=lambda: found.append(sandbox.run(command, timeout=100).output.strip()))
    thread.start()
    until(lambda: sandbox.files.exists("/tmp/runs"))
    port = int(running.url.rpartition(":")[2])
    running.kill()
    time.sleep(0.3)
    running.start(port)
    thread.join(120)
    assert found == ["1"], "it ran once, and its client has the result"
    warmed_again = [sandbox.run(f"echo {number}").output for number in range(10)]
    assert warmed_again == [f"{number}\n" for number in range(10)]
    sandbox.stop()


def test_a_stopped_server_closes_the_connection_and_clients_return(own_server: Callable[..., RunningServer]) -> None:
    running = own_server(ROCK_API_KEY=KEY)
    sandbox = warmed(box(running.url))
    (before,) = channels()
    port = int(running.url.rpartition(":")[2])
    assert running.process is not None
    running.process.terminate()
    assert running.process.wait(60) == 0, running.log()
    running.start(port)
    assert sandbox.run("echo back").output == "back\n"
    for module in (of_sync,):
        for known in module._KNOWN.values():
            known._not_before = 0.0
    assert sandbox.run("echo again").output == "again\n"
    assert before not in channels() and len(channels()) == 1
    sandbox.stop()


def test_a_recording_sees_the_requests(keyed: RunningServer) -> None:
    with box(keyed.url, record=True) as sandbox:
        warmed(sandbox)
        sandbox.run("echo recorded")
        with Client(keyed.url, KEY) as client:
            target = f"/v1/recordings/{sandbox.sandbox_id}/entries"
            assert "echo recorded" in str(_bodies(client.transport.json("GET", target)))


def _bodies(page: Any) -> list[bytes]:
    return [b64decode(entry.get("request") or "") for entry in page["items"]]


def test_two_processes_and_their_workers_directly(own_server: Callable[..., RunningServer]) -> None:
    running = own_server(ROCK_API_KEY=KEY, ROCK_PROCESSES="2")
    with box(running.url) as sandbox:
        for _ in range(20):
            assert sandbox.run("true").exit_code == 0
        to_workers = [key for key, known in of_sync._KNOWN.items() if known._all and str(key).count(".sock")]
        assert to_workers, "requests go to the worker over an upgraded connection"
        assert sandbox.run("echo direct").output == "direct\n"
        found = sandbox._transport._direct._targets[sandbox.sandbox_id]  # type: ignore[union-attr]
        found.renew_at = 0.0  # another token, over the same connection
        assert sandbox.run("echo renewed").output == "renewed\n"
        assert [len(of_sync._KNOWN[key]._all) for key in to_workers] == [1]


def test_a_proxy_without_upgrades_is_used_with_http(keyed: RunningServer) -> None:
    front = Path(__file__).parents[1] / "wire" / "front.py"
    with subprocess.Popen([sys.executable, str(front), keyed.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        url = process.stdout.readline().strip()
        with box(url) as sandbox:
            assert [sandbox.run(f"echo {n}").output for n in range(10)] == [f"{n}\n" for n in range(10)]
            assert channels() == []
            assert any(known.offered and known._not_before > 0 for known in of_sync._KNOWN.values())
        process.stdin.close()


def test_a_connection_that_something_cuts_is_replaced_by_http(keyed: RunningServer) -> None:
    with Cutting(keyed.url) as cutting, box(cutting.url) as sandbox:
        warmed(sandbox)
        sandbox.files.write("/tmp/n", "0")
        for number in range(1, 6):
            cutting.cut()
            assert sandbox.run("echo $(($(cat /tmp/n) + 1)) >/tmp/n; cat /tmp/n").output == f"{number}\n"


class Cutting:
    """A TCP proxy that can cut its connections."""

    def __init__(self, url: str) -> None:
        self._to = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self) -> Cutting:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            other = socket.create_connection(self._to)
            self._pairs += [one, other]
            for source, target in ((one, other), (other, one)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        while self._pairs:
            one = self._pairs.pop()
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.mark.parametrize("side", ["client", "server"])
def test_it_can_be_switched_off(side: str, own_server: Callable[..., RunningServer],
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    running = own_server(ROCK_API_KEY=KEY, **({"ROCK_MULTIPLEX": "off"} if side == "server" else {}))
    if side == "client":
        monkeypatch.setenv("ROCK_MULTIPLEX", "off")
    with box(running.url) as sandbox:
        for _ in range(8):
            assert sandbox.run("true").exit_code == 0
        assert channels() == []
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as sock:
            sock.sendall(f"GET /v1/connection HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
                         "connection: upgrade\r\nupgrade: rock-frames/1\r\n\r\n".encode())  # fmt: skip
            status = sock.recv(100)[9:12]
        assert status == (b"404" if side == "server" else b"101")


def test_an_upgrade_needs_a_key(keyed: RunningServer) -> None:
    for header, status in (("", b"401"), ("authorization: Bearer wrong\r\n", b"401"), ("x-api-key: x\r\n", b"401")):
        with socket.create_connection(("127.0.0.1", int(keyed.url.rpartition(":")[2]))) as sock:
            sock.sendall(f"GET /v1/connection HTTP/1.1\r\nhost: 127.0.0.1\r\n{header}connection: upgrade\r\n"
                         "upgrade: rock-frames/1\r\n\r\n".encode())  # fmt: skip
            assert sock.recv(100)[9:12] == status
    with Client(keyed.url, KEY) as client, pytest.raises(RockError, match="Upgrade"):
        client.transport.json("GET", "/v1/connection")


def test_a_forked_child_uses_connections_of_its_own(keyed: RunningServer) -> None:
    with box(keyed.url) as sandbox:
        warmed(sandbox)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, sandbox.run("echo child").output.encode())
            finally:
                os._exit(0)
        os.close(writer)
        assert [sandbox.run(f"echo {n}").output for n in range(5)] == [f"{n}\n" for n in range(5)]
        os.waitpid(pid, 0)
        assert os.read(reader, 100) == b"child\n"
        os.close(reader)
        assert sandbox.run("echo parent").output == "parent\n"


def test_connections_leave_nothing_behind(keyed: RunningServer) -> None:
    def files() -> int:
            return len(os.listdir(f"/proc/{keyed.pid}/fd"))

    with box(keyed.url) as sandbox:
        warmed(sandbox)
        before = files()
        for _ in range(20):
            of_sync.clear()
            for known in of_sync._KNOWN.values():
                known._not_before = 0.0
            assert sandbox.run("true").exit_code == 0
        of_sync.clear()
        until(lambda: files() <= before + 2, why="descriptors of closed connections stay open")
