"""Images of OpenEnv environments as sandboxes, by the provider and a client of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.waiting import until
from websockets.sync.client import connect

from rock.errors import Conflict, InvalidConfig, NotFound, RockError, StartFailed, Unsupported
from rock.integrations.openenv import RockProvider
from rock.sync import Client

TAG, ENDS = "openenv/counter:1", "openenv/ends:1"
PROGRAM = Path(__file__).parent / "openenv_image.py"


def build(url: str, folder: Path, key: str | None = None) -> None:
    """TAG, whose program serves, and ENDS, whose program ends."""
    for tag, words in ((TAG, '["python3", "/srv/server.py"]'), (ENDS, '["sh", "-c", "echo broken >&2; exit 7"]')):
        context = folder / tag.partition(":")[0].replace("/", "-")
        context.mkdir(parents=True)
        shutil.copy(PROGRAM, context / "server.py")
        (context / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY server.py /srv/server.py\nCMD {words}\n")
        with Client(url, key) as client:
            client.build_image(context, tag)


@pytest.fixture(scope="module")
def images(session_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    build(session_server.url, tmp_path_factory.mktemp("openenv"))


def provider(server: RunningServer, **more: Any) -> RockProvider:
    return RockProvider(base_url=server.url, memory="256m", **more)


def test_an_image_runs_as_a_sandbox(images: None, server: RunningServer) -> None:
    made = provider(server)
    url = made.start_container(TAG, env_vars={"GREETING": "hi"})
    made.wait_for_ready(url, 60)
    with connect(url.replace("http", "ws") + "/ws", proxy=None) as socket:
        for kind, data in (("reset", {}), ("step", {"action": 1}), ("step", {"action": 1})):
            socket.send(json.dumps({"type": kind, "data": data}))
            seen = json.loads(socket.recv(60))["data"]
    assert seen == {"observation": {"steps": 2, "greeting": "hi"}, "reward": 2.0, "done": True}
    with pytest.raises(Conflict, match="has a container"):
        made.start_container(TAG)
    sandbox_id = made.sandbox.sandbox_id if made.sandbox else ""
    made.stop_container()
    made.close()
    with Client(server.url) as client:
        until(lambda: client.get_sandbox(str(sandbox_id)).state.value == "stopped")
    with pytest.raises(OSError):
        connect(url.replace("http", "ws") + "/ws", proxy=None)


def test_refusals(images: None, server: RunningServer) -> None:
    with provider(server, image=ENDS) as made, pytest.raises(StartFailed, match="ended with 7: broken"):
        made.wait_for_ready(made.start_container(), 60)
    with pytest.raises(Unsupported, match="gpus"):
        provider(server).start_container(TAG, gpus=1)
    with pytest.raises(InvalidConfig, match="no image"):
        provider(server).start_container()
    with pytest.raises(Conflict, match="no container"):
        provider(server).wait_for_ready("http://127.0.0.1:1", 1)
    with pytest.raises((NotFound, RockError)):
        provider(server, pull="never").start_container("openenv/nothing:1")
    with provider(server, port=9) as made, pytest.raises(RockError, match="has not responded"):
        made.wait_for_ready(made.start_container(TAG), 1)
