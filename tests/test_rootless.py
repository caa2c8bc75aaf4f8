"""As root, the tests that an ordinary user can run are run again as one: the same suites with nothing but a user id."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USER = 61234  # no account: an ordinary user is a user id without rights
SUITES = [
    "tests/rocklet/test_streams.py",
    "tests/runtime",
    "tests/image",
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
]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="this is the share for root; an ordinary user runs all anyway"
)


def _open_to_all(path: Path) -> bool:
    """Whether any user can get to `path` and read it."""
    folders = [path, *path.parents] if path.is_dir() else list(path.parents)
    return all(p.stat().st_mode & stat.S_IXOTH for p in folders) and bool(path.stat().st_mode & stat.S_IROTH)


def _interpreter() -> str | None:
    """An interpreter of this version that any user can run."""
    for name in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        path = Path(name)
        if path.exists() and _open_to_all(path.resolve()):
            code = "import sys; print(*sys.version_info[:2])"
            said = subprocess.run([name, "-c", code], capture_output=True, text=True, timeout=20).stdout.split()
            if said == [str(n) for n in sys.version_info[:2]]:
                return name
    return None


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the checkout that the user can read, and a home that is his."""
    with tempfile.TemporaryDirectory(prefix="rock-rootless-") as folder:
        top = Path(folder)
        top.chmod(0o755)
        ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        for name in ("src", "tests", "examples"):
            shutil.copytree(ROOT / name, top / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", top)
        packages = Path(sysconfig.get_paths()["purelib"])
        if _open_to_all(packages):
            (top / "packages").symlink_to(packages)
        else:
            shutil.copytree(packages, top / "packages", ignore=ignore)
        home = top / "home"
        home.mkdir()
        os.chown(home, USER, USER)
        yield top


@pytest.mark.timeout(900)
def test_as_an_ordinary_user(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = _interpreter()
    if python is None:
        pytest.skip("no interpreter of this version that an ordinary user can run")
    home = checkout / "home"
    environment = {
        "HOME": str(home), "TMPDIR": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8",
        "PYTHONPATH": f"{checkout / 'src'}:{checkout}:{checkout / 'packages'}", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={home / 'pytest'}", *SUITES],
        cwd=checkout, env=environment, user=USER, group=USER, extra_groups=[], capture_output=True, text=True,
        timeout=880,
    )  # fmt: skip
    tail = "\n".join(done.stdout.splitlines()[-25:])
    with capsys.disabled():
        print(f"\nas user {USER}: {done.stdout.splitlines()[-1] if done.stdout else done.stderr}")
    assert done.returncode == 0, f"{tail}\n{done.stderr[-2000:]}"
