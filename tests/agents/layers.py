"""Layers of real agents for tests: kept in ROCK_TEST_CACHE, installed by `make agents`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rock.agents import builtin
from rock.images.agents import AgentLayers

WANTED = "ROCK_TEST_AGENTS"


def layer_or_skip(name: str, images: Path, *, fast: bool = False) -> None:
    """Install the layer if ROCK_TEST_AGENTS is set. Else skip, but not a fast test with a cached layer."""
    recipe = builtin(name)
    assert recipe is not None
    if os.environ.get(WANTED):
        AgentLayers(images / "agents").ensure(recipe)
    elif not fast:
        pytest.skip(f"installs {name}: `make agents`, or {WANTED}=1")
    elif AgentLayers(images / "agents").find(recipe) is None:
        pytest.skip(f"the layer of {name} is not in the cache of the tests: `make agents` installs it")
