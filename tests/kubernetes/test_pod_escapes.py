"""The escape suite at levels A and B, in boxes like pods. `make kubernetes` runs all of it, `make test` two themes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.escape.catalogue import ATTEMPTS
from tests.kubernetes import pod_escapes
from tests.kubernetes.pod_box import readable_path
from tests.kubernetes.pod_world import FULL
from tests.unprivileged import interpreter

SHORT = ("identity: ", "state: ")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with readable_path(tmp_path_factory.mktemp("checkout")) as found:
        yield found


@pytest.mark.skipif(os.geteuid() != 0 or interpreter() is None, reason="needs root, and a Python for any user")
@pytest.mark.parametrize("level", pod_escapes.RUNTIMES)
def test_escapes_in_a_pod(level: str, path: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rock-pod-") as folder:  # not pytest's, which is private
        Path(folder).chmod(0o755)
        found = pod_escapes.run(level, Path(folder) / "box", path, () if FULL else SHORT)
    assert found["isolation"] == pod_escapes.RUNTIMES[level]
    wanted = {attempt.key for attempt in ATTEMPTS if FULL or attempt.key.startswith(SHORT)}
    assert wanted and set(found["results"]) >= wanted, "attempts did not run"
    assert pod_escapes.differences(level, found["results"]) == []
    assert not any(found["left"].values()), found["left"]


def test_the_table_of_the_guide_is_current() -> None:
    text = pod_escapes.PAGE.read_text()
    assert pod_escapes.page(text) == text, "run python -m tests.kubernetes.pod_escapes"
    assert set(pod_escapes.KNOWN) <= {attempt.key for attempt in ATTEMPTS}
