"""Two admins on one PostgreSQL, one worker: one leads, the other takes over, and who was late can do nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import Inventory, take_inventory
from tests.waiting import until

from rock.admin.sandboxes.lifecycle import new_info
from rock.protocol.keys import CreateKey, Quota
from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import Cause, Isolation, State
from rock.store.base import Record
from rock.sync import Client, Sandbox, SandboxConfig

KEY = "the owner's key"
ECHO = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())
socketserver.TCPServer(("127.0.0.1", 7000), Echo).serve_forever()
"""
pytestmark = pytest.mark.skipif(
    not os.environ.get("ROCK_TEST_ADMINS"), reason="takes a minute of waiting for leases: set ROCK_TEST_ADMINS=1"
)


class Site:
    """A worker and the admins that command it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.folder = folder
        self.home = folder / "worker"
        give_image(self.home)
        environment = {**os.environ, "ROCK_HOME": str(self.home), "ROCK_API_KEY": KEY, "ROCK_POOL_SIZE": "0"}
        with open(folder / "worker.log", "wb") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-c", "from rock.cli.scripts import rocklet_main; rocklet_main()", "--port", "0"],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.port = int(self._note()["port"])
        self.admins: list[RunningServer] = []

    def _note(self) -> dict[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end and self.worker.poll() is None:
            try:
                note = json.loads((self.home / "server.json").read_text())
                assert isinstance(note, dict)
                return note
            except (OSError, ValueError):
                time.sleep(0.02)
        raise AssertionError((self.folder / "worker.log").read_text())

    def admin(self) -> RunningServer:
        home = self.folder / f"admin{len(self.admins)}"
        home.mkdir()
        made = RunningServer(home, ROCK_API_KEY=KEY, ROCK_STORE=self.url,
                             ROCK_WORKERS=f"one=http://127.0.0.1:{self.port}")  # fmt: skip
        self.admins.append(made)
        made.start()
        return made

    def command(self, fence: int | None) -> tuple[int, Any]:
        """A command to the worker by a lease."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"authorization": f"Bearer {KEY}"}
        if fence is not None:
            headers["x-rock-fence"] = str(fence)
        try:
            connection.request("DELETE", "/node/v1/sandboxes/nothing", headers=headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()


@pytest.fixture
def site(tmp_path: Path, database: Callable[[], str]) -> Iterator[Site]:
    made = Site(tmp_path, database())
    try:
        yield made
    finally:
        alive = [admin for admin in made.admins if admin.process is not None and admin.process.poll() is None]
        for admin in alive:
            admin.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        if alive:
            alive[0].stop()
        for admin in alive[1:]:
            admin.process.terminate()  # type: ignore[union-attr]
            admin.process.wait(30)  # type: ignore[union-attr]
        made.worker.terminate()
        assert made.worker.wait(30) == 0, (tmp_path / "worker.log").read_text()
        end = time.monotonic() + 10
        while (left := take_inventory(made.home, made.worker.pid) - Inventory()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, left


def leads(admin: RunningServer) -> int:
    """The token of the last lease that it had."""
    return max((int(token) for token in re.findall(r"this admin leads, token (\d+)", admin.log())), default=0)


def echoes(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), 10) as connection, connection.makefile("rwb") as stream:
            stream.write(b"hello\n")
            stream.flush()
            return stream.readline() == b"hello\n"
    except OSError:
        return False


def config(admin: RunningServer, **more: Any) -> SandboxConfig:
    return SandboxConfig(base_url=admin.url, api_key=KEY, image=IMAGE, memory="64m", cpus=0.2, **more)


def ends_by_its_deadline(made: RunningServer, seen: RunningServer) -> None:
    """A sandbox of one admin is stopped in time, by whoever leads."""
    sandbox = Sandbox(config(made, timeout=1.0))
    sandbox.start()
    with Client(seen.url, KEY) as client:
        until(lambda: client.get_sandbox(str(sandbox.sandbox_id)).state is State.STOPPED)
        assert client.get_sandbox(str(sandbox.sandbox_id)).cause is Cause.DEADLINE


def test_one_leads_and_another_takes_over(site: Site) -> None:
    first, second = site.admin(), site.admin()
    assert (leads(first), leads(second)) == (1, 0)
    with Sandbox(config(second)) as sandbox:
        sandbox.fs.write("/tmp/data", bytes(range(256)) * 4096)
        other = Sandbox(config(first)).attach(str(sandbox.sandbox_id))
        assert other.fs.read("/tmp/data") == bytes(range(256)) * 4096
        assert "".join(chunk.text for chunk in other.stream("for i in 1 2 3; do echo $i; done")) == "1\n2\n3\n"
        sandbox.processes.start(["python3", "-c", ECHO])
        with other.port_forward(7000) as forward:  # a WebSocket to the worker
            until(lambda: echoes(forward.host, forward.port))
        ends_by_its_deadline(second, first)  # its admin does not lead

        first.kill()
        until(lambda: leads(second) == 2, 30.0)
        assert sandbox.execute("echo here").stdout == "here\n"  # nothing happened to what ran
        ends_by_its_deadline(second, second)

        third = site.admin()
        assert leads(third) == 0
        second.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        until(lambda: leads(third) == 3, 30.0)
        ends_by_its_deadline(third, third)
        # Whatever the second still does by its lease comes too late.
        status, told = site.command(2)
        assert status == 409 and told["error"]["details"] == {"fence": 3}
        assert site.command(3)[0] == 200 and site.command(None)[0] == 200
        second.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        until(lambda: "leads no more" in second.log(), 30.0)
        assert sandbox.execute("echo here").stdout == "here\n"
        # A lease that is given back is taken at once.
        assert third.process is not None
        third.process.terminate()
        third.process.wait(30)
        until(lambda: leads(second) == 4, 30.0)


def test_what_an_admin_left_unfinished(site: Site) -> None:
    leading, other = site.admin(), site.admin()
    spec = config(leading, labels={"left": "1"})

    async def leave() -> None:
        """As an admin that was killed between saving and commanding."""
        from rock.store.postgres import PostgresStore

        store = PostgresStore(site.url)
        await store.open()
        try:
            status = NodeStatus(host_name="x", host_ip="x", runtime="namespace", isolation=Isolation.NONE, cpus=1,
                                memory_total=1, memory_free=1, sandboxes=0, sandbox_limit=1)  # fmt: skip
            await store.insert(Record(new_info("left", spec, "one", status, ""), spec))
        finally:
            await store.close()

    asyncio.run(leave())
    with Client(other.url, KEY) as client:
        until(lambda: client.get_sandbox("left").state is State.RUNNING)
        # Keys and quotas are of all admins.
        key = client.create_key(CreateKey(name="x", tenant="t", quota=Quota(sandboxes=1))).key
        with Client(leading.url, key) as tenant:
            assert tenant.list_sandboxes() == []
            client.revoke_key(client.list_keys()[0].id)

            def refused() -> bool:
                try:
                    tenant.list_sandboxes()
                except Exception:
                    return True
                return False

            until(refused, 30.0)
