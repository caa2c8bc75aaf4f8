"""The released client of SWE-ReX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conftest import RunningServer
from tests.dialects.released.conftest import OWNER

from rock.sync import Sandbox, SandboxConfig


def test_the_released_client(run_script: Callable[..., Any], released_server: RunningServer) -> None:
    with Sandbox(SandboxConfig(base_url=released_server.url, api_key=OWNER, image="host", memory="1g")) as sandbox:
        url = f"{released_server.url}/swerex/{sandbox.sandbox_id}"
        assert len(run_script("swerex", "swerex_client.py", "rock", url, OWNER).checks) >= 15
