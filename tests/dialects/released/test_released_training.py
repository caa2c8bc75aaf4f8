"""Adapters for packages that train: vectors, games of several agents, environments of trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = str(Path(__file__).parents[3] / "src")


def test_stable_baselines3(run_script: Callable[..., Any]) -> None:
    assert len(run_script("training", "sb3_client.py", timeout=1500, PYTHONPATH=SOURCE).checks) >= 12


def test_pettingzoo(run_script: Callable[..., Any]) -> None:
    assert len(run_script("pettingzoo", "pettingzoo_client.py", timeout=1500, PYTHONPATH=SOURCE).checks) >= 9
