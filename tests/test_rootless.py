"""As root, the tests that an ordinary user can run are run again as one: the same suites with nothing but a user id."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import unprivileged

SUITES = [
    [
        "tests/rocklet/test_streams.py",
        "tests/runtime",
        "tests/image/test_host_image.py",
        "tests/image/test_image_store.py",
        "tests/image/test_layers.py",
        "tests/image/test_packing.py",
    ],
    [
        "tests/cli/test_demo.py",
        "tests/e2e/test_images.py",
        "tests/e2e/test_sessions.py",
        "tests/e2e/test_programs_and_files.py",
        "tests/e2e/test_lifecycle.py",
        "tests/e2e/test_recovery.py",
        "tests/e2e/test_kept_files.py",
        "tests/e2e/test_archiving.py",
        "tests/e2e/test_commit.py",
        "tests/e2e/test_parity.py",
    ],
]  # each by a user of its own, beside the others

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="this is the share for root; an ordinary user runs all anyway"
)


def _run(python: str, suites: list[str]) -> subprocess.CompletedProcess[str]:
    with unprivileged.checkout() as checkout:
        return subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={checkout.home / 'pytest'}", *suites],
            cwd=checkout.path, env=checkout.environment, **checkout.identity,
            capture_output=True, text=True, timeout=1700,
        )  # fmt: skip


@pytest.mark.timeout(1800)
def test_as_an_ordinary_user(capsys: pytest.CaptureFixture[str]) -> None:
    python = unprivileged.interpreter()
    if python is None:
        pytest.skip("no interpreter of this version that an ordinary user can run")
    with ThreadPoolExecutor(len(SUITES)) as threads:
        runs = list(threads.map(lambda suites: _run(python, suites), SUITES))
    with capsys.disabled():
        for done in runs:
            print(f"\nas an ordinary user: {done.stdout.splitlines()[-1] if done.stdout else done.stderr}")
    for done in runs:
        tail = "\n".join(done.stdout.splitlines()[-150:])
        assert done.returncode == 0, f"{tail}\n{done.stderr[-2000:]}"
