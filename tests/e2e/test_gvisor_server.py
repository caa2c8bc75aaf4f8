"""isolation="gvisor" through a server: chosen by the level alone, and kept over a crash of the server."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import Inventory
from tests.packages import CannotBeHad, runsc

from rock import errors
from rock.actions import CreateBashSessionRequest
from rock.protocol.routes import ROUTES
from rock.protocol.sandbox import Isolation
from rock.sync import Sandbox
from rock.sync.transport import Transport


@pytest.fixture(scope="module")
def gvisor_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    if os.geteuid() != 0:
        pytest.skip("gVisor here takes root")
    try:
        path = f"{runsc().parent}:{os.environ['PATH']}"
    except CannotBeHad as error:
        pytest.skip(f"no gVisor: {error}")
    home: Path = tmp_path_factory.mktemp("home")
    running = RunningServer(home, PATH=path)
    give_image(home)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


def test_the_level_chooses_it_and_it_outlives_the_server(gvisor_server: RunningServer) -> None:
    box = Sandbox(base_url=gvisor_server.url, image=IMAGE, isolation="gvisor", minimum_isolation="gvisor",
                  memory="512m", cpus=1.0)  # fmt: skip
    box.start()
    info = box.info()
    assert info.isolation is Isolation.GVISOR and info.enforced["memory"].startswith("cgroup")
    box.create_session(CreateBashSessionRequest(session="work"))
    assert box.arun("cd /tmp; X=7; python3 -c 'print(6 * 7)'; uname -r", session="work").output == "42\n4.4.0\n"
    box.fs.write("/root/data", b"kept" * 100_000)
    port = gvisor_server.url.rpartition(":")[2]
    gvisor_server.kill()
    gvisor_server.start(int(port))
    assert box.arun("echo $X $PWD", session="work").output == "7 /tmp\n"
    assert box.fs.read("/root/data") == b"kept" * 100_000
    seen = box.execute(["sh", "-c", "exit 5"])
    assert seen.exit_code == 5
    box.stop()


def test_a_command_is_run_once_over_a_crash(gvisor_server: RunningServer) -> None:
    """Its report goes nowhere while no server is there: then how it ended is not known, and it is not run again."""
    port = int(gvisor_server.url.rpartition(":")[2])
    with Sandbox(base_url=gvisor_server.url, image=IMAGE, isolation="gvisor", memory="512m", cpus=1.0) as box:
        box.arun("true")
        url = ROUTES["run"].url(sandbox_id=box.sandbox_id or "", session="default")
        for key, waits in (("long", "until [ -e /tmp/go ]; do sleep 0.2; done"), ("short", "sleep 2")):
            body = {"command": f"echo x >> /tmp/{key}; {waits}; echo end; (exit 7)"}
            with pytest.raises(errors.Unavailable), ThreadPoolExecutor(1) as pool:
                call = pool.submit(Transport(gvisor_server.url).json, "POST", url, body, key=key)
                end = time.monotonic() + 40
                while box.execute(["test", "-e", f"/tmp/{key}"]).exit_code != 0:
                    assert time.monotonic() < end
                gvisor_server.kill()
                call.result()
            if key == "short":
                time.sleep(4)  # it ends
            gvisor_server.start(port)
            if key == "long":
                box.execute(["touch", "/tmp/go"])
                seen = Transport(gvisor_server.url).json("POST", url, body, key=key)
                assert (seen["exit_code"], seen["output"]) == (7, "end\n")
            else:
                with pytest.raises(errors.Conflict, match="how is not known"):
                    Transport(gvisor_server.url).json("POST", url, body, key=key)
            assert box.arun(f"cat /tmp/{key}").output == "x\n"


@pytest.mark.parametrize(
    "spec", [{"disk": "64m"}, {"network": "nat"}, {"pids": 16}, {"oci_runtime": "kata"}, {"retain": 60}],
    ids=lambda spec: next(iter(spec)),
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(gvisor_server: RunningServer, spec: dict[str, object]) -> None:
    box = Sandbox(base_url=gvisor_server.url, image=IMAGE, isolation="gvisor", memory="512m", cpus=1.0, **spec)
    with pytest.raises(errors.Unsupported):
        box.start()
