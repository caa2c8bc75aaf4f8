"""Which runtimes the suite has here, and that each declares what it may be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rock.runtime.base import Trait
from tests.runtime.conformance.subject import here, subjects


@pytest.mark.parametrize("name", list(subjects()))
def test_it_can_be_had_here(name: str, tmp_path: Path) -> None:
    reason = here()[name]
    if reason is not None:
        pytest.skip(f"the runtime {name} cannot be tried here: {reason}")
    runtime = subjects()[name].make(tmp_path)
    declared = runtime.traits[subjects()[name].isolation]
    assert declared <= frozenset(Trait)
    assert runtime.name and name.startswith(runtime.name)
