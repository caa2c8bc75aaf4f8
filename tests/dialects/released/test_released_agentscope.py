"""The released sandboxes of AgentScope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conftest import RunningServer
from tests.dialects.released.conftest import OWNER

from rock.protocol.env import BuildEnv
from rock.sync import Client


def test_the_released_client(run_script: Callable[..., Any], released_server: RunningServer) -> None:
    with Client(released_server.url, OWNER) as client:  # the client's timeout is 60 s
        for name in ("task:bfcl", "task:appworld"):
            client.build_env(BuildEnv(env_id=name))
    assert len(run_script("agentscope", "agentscope_client.py", timeout=900).checks) >= 20
