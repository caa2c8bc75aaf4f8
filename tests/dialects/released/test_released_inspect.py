"""The sandbox provider of Inspect, which its entry point registers."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def metadata(folder: Path) -> str:
    """The entry points of pyproject.toml as metadata beside the source: a path for PYTHONPATH."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = folder / "rock_sandbox-0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (found / "entry_points.txt").write_text("".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()))  # fmt: skip
    return f"{folder}:{ROOT / 'src'}"


def test_the_released_framework(run_script: Callable[..., Any], tmp_path: Path) -> None:
    found = run_script("inspect", "inspect_client.py", timeout=900, PYTHONPATH=metadata(tmp_path))
    assert len(found.checks) >= 44 + 13
