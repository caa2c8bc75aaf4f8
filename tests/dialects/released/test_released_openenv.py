"""The released client of OpenEnv, and its validator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import RunningServer, give_image, hosting
from tests.dialects.released.conftest import OWNER
from tests.dialects.test_openenv_provider import TAG, build


def test_the_released_client(
    run_script: Callable[..., Any], released_server: RunningServer, env_images: Path, tmp_path: Path
) -> None:
    give_image(released_server.home)
    build(released_server.url, tmp_path / "contexts", OWNER)
    source = str(Path(__file__).parents[3] / "src")
    with hosting(tmp_path, env_images) as keyless:  # the validator sends no key
        found = run_script("openenv", "openenv_client.py", keyless.url, timeout=1200, IMAGE=TAG, PYTHONPATH=source)
        assert len(found.checks) >= 15
