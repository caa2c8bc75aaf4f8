"""An ordinary user for tests that run as root: a user id without rights, a checkout that it can read, a home."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
USER = 61234  # no account: an ordinary user is a user id without rights


def open_to_all(path: Path) -> bool:
    """Whether any user can get to `path` and read it."""
    folders = [path, *path.parents] if path.is_dir() else list(path.parents)
    return all(p.stat().st_mode & stat.S_IXOTH for p in folders) and bool(path.stat().st_mode & stat.S_IROTH)


def interpreter() -> str | None:
    """An interpreter of this version that any user can run."""
    for name in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        path = Path(name)
        if path.exists() and open_to_all(path.resolve()):
            code = "import sys; print(*sys.version_info[:2])"
            said = subprocess.run([name, "-c", code], capture_output=True, text=True, timeout=20).stdout.split()
            if said == [str(n) for n in sys.version_info[:2]]:
                return name
    return None


@contextlib.contextmanager
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
        if open_to_all(packages):
            (top / "packages").symlink_to(packages)
        else:
            shutil.copytree(packages, top / "packages", ignore=ignore)
        home = top / "home"
        home.mkdir()
        os.chown(home, USER, USER)
        yield top


def environment(checkout: Path) -> dict[str, str]:
    """Of a Python process of that user."""
    home = checkout / "home"
    return {
        "HOME": str(home), "TMPDIR": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8",
        "PYTHONPATH": f"{checkout / 'src'}:{checkout}:{checkout / 'packages'}", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
