"""The environments of the folder `worlds` in this process, and when what comes from others is the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

WORLDS = Path(__file__).parent / "worlds"


def worlds() -> Any:
    """The module of the folder, in this process."""
    if "worlds_env" not in sys.modules:
        spec = importlib.util.spec_from_file_location("worlds_env", WORLDS / "env.py")
        assert spec is not None and spec.loader is not None
        sys.modules["worlds_env"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["worlds_env"])
    return sys.modules["worlds_env"]


def alike(left: Any, right: Any) -> None:
    """The same values of the same types, NaN included."""
    assert type(left) is type(right), (left, right)
    if isinstance(left, dict):
        assert sorted(left) == sorted(right)
        for key in left:
            alike(left[key], right[key])
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            alike(one, other)
    elif isinstance(left, np.ndarray) and left.dtype == object:
        alike(left.tolist(), right.tolist())
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right or (left != left and right != right)
