"""The released client of OpenEnv, and its validator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import hosting


def test_the_released_client(run_script: Callable[..., Any], env_images: Path, tmp_path: Path) -> None:
    with hosting(tmp_path, env_images) as keyless:  # the validator sends no key
        assert len(run_script("openenv", "openenv_client.py", keyless.url, timeout=1200).checks) >= 14
