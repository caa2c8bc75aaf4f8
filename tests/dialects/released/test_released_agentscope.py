"""The released sandboxes of AgentScope."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import RunningServer
from tests.dialects.released.conftest import OWNER
from tests.envs.test_training_sets import LIBRARIES, PYTHON, SITE

from rock.protocol.env import BuildEnv
from rock.sync import Client
from rock.training import TrainingSandbox

DATA = Path(__file__).parents[2] / "envs" / "small_appworld.py"


def test_the_released_client(run_script: Callable[..., Any], released_server: RunningServer) -> None:
    with Client(released_server.url, OWNER) as client:  # the client's timeout is 60 s
        for name in ("task:bfcl", "task:appworld"):
            client.build_env(BuildEnv(env_id=name))
    with TrainingSandbox(base_url=released_server.url, bearer_token=OWNER, box_type="appworld") as box:
        box.sandbox.fs.write("/tmp/make.py", DATA.read_bytes())
        made = box.sandbox.execute([PYTHON, "-s", "-P", "-B", "/tmp/make.py", "/tmp/rock-dataset"],
                                   env={"PYTHONPATH": SITE, "HOME": "/tmp", "LD_LIBRARY_PATH": LIBRARIES})  # fmt: skip
        assert made.exit_code == 0, made.stderr
        found = run_script("agentscope", "agentscope_client.py", str(box.sandbox.sandbox_id), timeout=900)
        assert len(found.checks) >= 22
