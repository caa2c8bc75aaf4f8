"""Adapters for packages that train: vectors, games of several agents, environments of trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.dialects.released.test_released_inspect import metadata

SOURCE = str(Path(__file__).parents[3] / "src")


def test_stable_baselines3(run_script: Callable[..., Any]) -> None:
    assert len(run_script("training", "sb3_client.py", timeout=1500, PYTHONPATH=SOURCE).checks) >= 12


def test_pettingzoo(run_script: Callable[..., Any]) -> None:
    assert len(run_script("pettingzoo", "pettingzoo_client.py", timeout=1500, PYTHONPATH=SOURCE).checks) >= 9


def test_trl(run_script: Callable[..., Any]) -> None:
    assert len(run_script("trl", "trl_client.py", PYTHONPATH=SOURCE).checks) >= 10


def test_skyrl_gym(run_script: Callable[..., Any]) -> None:
    assert len(run_script("skyrl", "skyrl_client.py", PYTHONPATH=SOURCE).checks) >= 6


def test_tinker_cookbook(run_script: Callable[..., Any]) -> None:
    assert len(run_script("tinker", "tinker_client.py", PYTHONPATH=SOURCE).checks) >= 6


def test_nemo_gym(run_script: Callable[..., Any], tmp_path: Path) -> None:
    assert len(run_script("nemo", "nemo_client.py", PYTHONPATH=metadata(tmp_path)).checks) >= 7
    run_script("nemo", "nemo_server_client.py", PYTHONPATH=SOURCE)


def test_verl(run_script: Callable[..., Any]) -> None:
    assert len(run_script("verl", "verl_client.py", PYTHONPATH=SOURCE).checks) >= 7


def test_a_training_step_of_trl(run_script: Callable[..., Any]) -> None:
    environment = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run_script("trl", "trl_training.py", timeout=900, PYTHONPATH=SOURCE, **environment)
