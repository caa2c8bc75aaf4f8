"""The conformance suite at levels A and B, in boxes like pods. `make kubernetes` runs all of it, `make test` a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes import pod_conformance
from tests.kubernetes.pod_box import readable_path
from tests.kubernetes.pod_world import FULL
from tests.unprivileged import interpreter

# With one runtime of level A: the one without the compiled extension has its share in the whole suite.
SHORT = ("-k", "(conform_isolation or conform_life) and not fork and not fifty")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with readable_path(tmp_path_factory.mktemp("checkout")) as found:
        yield found


@pytest.mark.skipif(os.geteuid() != 0 or interpreter() is None, reason="needs root, and a Python for any user")
@pytest.mark.parametrize("level", pod_conformance.LEVELS)
def test_the_suite_in_a_pod(level: str, path: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rock-pod-") as folder:  # not pytest's, which is private
        Path(folder).chmod(0o755)
        results = pod_conformance.run(level, Path(folder) / "box", path, () if FULL else SHORT)
    assert pod_conformance.failures(results) == []
    assert sum(row["outcome"] == "passed" for row in results.values()) >= (50 if FULL else 5), results
    if FULL:
        assert pod_conformance.provided(results) == pod_conformance.declared(level)


def test_the_table_of_conformance_is_current() -> None:
    text = pod_conformance.PAGE.read_text()
    levels = {level: pod_conformance.declared(level) for level in pod_conformance.LEVELS}
    assert pod_conformance.page(text, levels) == text, "run python -m tests.kubernetes.pod_conformance"
