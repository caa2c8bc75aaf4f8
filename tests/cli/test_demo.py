"""What `make demo` runs, with a home of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1600)  # the first one installs the environment's packages
def test_the_demo_does_its_job_and_leaves_nothing(tmp_path: Path, env_images: Path) -> None:
    (tmp_path / "images").symlink_to(env_images)
    command = [sys.executable, "-m", "rock.cli.demo", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("first command", "start a group of 8", "an episode of random moves", "left behind: nothing"):
        assert words in done.stdout
    assert sorted(path.name for path in (tmp_path / "run" / "records").iterdir()) == []


@pytest.mark.timeout(1600)
def test_it_tells_when_something_is_left(tmp_path: Path, env_images: Path) -> None:
    (tmp_path / "images").symlink_to(env_images)
    (tmp_path / "run" / "other" / "stray").mkdir(parents=True)
    command = [sys.executable, "-m", "rock.cli.demo", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 1 and "run/other/stray" in done.stdout
