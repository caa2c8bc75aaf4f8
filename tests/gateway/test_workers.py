"""A worker that joined forwards the loopback port of its sandboxes to the server."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rock.protocol.node import WorkerState
from rock.sync import Client, Sandbox, SandboxConfig
from tests.cluster.machines import KEY, TOKEN, Machine, server
from tests.conftest import IMAGE
from tests.gateway.conftest import FakeUpstream, chat_body
from tests.gateway.test_service import AGENT
from tests.waiting import until


def test_a_joined_worker_forwards_to_the_server(tmp_path: Path, upstream: FakeUpstream) -> None:
    admin = server(tmp_path / "server")
    worker = Machine(tmp_path / "one", "--join", admin.url, "--token", TOKEN, "--name", "one")
    try:
        worker.start()
        with Client(admin.url, KEY) as client:
            until(lambda: any(one.state is WorkerState.READY for one in client.list_workers()))
            client.upstreams.put("fake", upstream.url, key="sk-of-the-upstream")
            config = SandboxConfig(base_url=admin.url, api_key=KEY, image=IMAGE, memory="128m", cpus=0.5,
                                   network="none")
            with Sandbox(config) as sandbox:
                run = sandbox.start_run(upstream="fake")
                for stream in (False, True):
                    body = json.dumps(chat_body("hello", stream=stream))
                    done = sandbox.execute(["python3", "-c", AGENT, body], env=run.environ)
                    assert "rep" in done.stdout, done
                (one, two) = run.calls()
                assert one.state == two.state == "done" and two.stream
                upstream.plan({"delay": 0.5})
                worker.kill()
                worker.start()
                until(lambda: "rep" in sandbox.execute(["python3", "-c", AGENT, json.dumps(chat_body("again"))],
                                                       env=run.environ).stdout)
                run.delete(force=True)
        for path in (tmp_path / "one").rglob("*"):
            if path.is_file() and not path.is_symlink() and "images" not in path.parts and os.access(path, os.R_OK):
                assert b"sk-of-the-upstream" not in path.read_bytes()
    finally:
        admin.stop()
        worker.end()
