"""A store of one's own, and a folder for the ordinary user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rock.images.store import ImageStore


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder in which the ordinary user may write, and which they can reach."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    above = folder.parent
    while above != above.parent:
        if not above.stat().st_mode & 0o001:
            if above.stat().st_uid != os.geteuid():
                pytest.skip(f"{above} is closed to other users and not ours to open")
            above.chmod(above.stat().st_mode | 0o011)
        above = above.parent
    return folder
