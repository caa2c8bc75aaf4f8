"""The release script, on a copy of the files that it changes."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from tools import release

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A Git repository with the files of a release, committed."""
    for name in [*(name for name, _ in release.PLACES), "CHANGELOG.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_release_writes_the_version_everywhere_and_dates_the_changelog(copy: Path) -> None:
    entries = release.unreleased(copy)
    release.check(copy, "9.8.7")
    release.write(copy, "9.8.7", datetime.date(2030, 1, 2))
    assert release.current(copy) == "9.8.7"
    text = (copy / "CHANGELOG.md").read_text()
    assert "## [Unreleased]\n\n## [9.8.7] - 2030-01-02\n" in text and entries in text
    with pytest.raises(release.Refused, match="no entries"):
        release.unreleased(copy)


def test_what_is_refused(copy: Path) -> None:
    for version, reason in (("1.2", "not a version"), ("0.0.1", "below the current")):
        with pytest.raises(release.Refused, match=reason):
            release.check(copy, version)
    (copy / "CHANGELOG.md").write_text("changed\n## [Unreleased]\n\n- x\n")
    with pytest.raises(release.Refused, match="has changes"):
        release.check(copy, "9.8.7")


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"a")
    assert release.checksums(tmp_path) == f"{hashlib.sha256(b'a').hexdigest()}  a.whl\n"
    (tmp_path / "SHA256SUMS").write_text(release.checksums(tmp_path))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
