"""Hides modules from a Python process and its children: those in ROCK_TEST_HIDDEN are as if they were not installed.

The tests of the documentation put this folder on PYTHONPATH.
"""

import importlib.machinery
import os
from typing import Any

_hidden = frozenset(os.environ.get("ROCK_TEST_HIDDEN", "").split(","))
_find_spec = importlib.machinery.PathFinder.find_spec


def _visible(fullname: str, path: Any = None, target: Any = None) -> Any:
    return None if fullname in _hidden else _find_spec(fullname, path, target)


importlib.machinery.PathFinder.find_spec = _visible  # type: ignore[assignment]
