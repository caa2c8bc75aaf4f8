"""An ordinary user for tests that run as root: a user id without rights, a checkout that it can read, a home."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
USERS = range(61234, 61298)  # no accounts: an ordinary user is a user id without rights


@dataclass(frozen=True)
class Checkout:
    """A copy of the checkout, and a user of its own who can read it. Nobody else's tests run as that user."""

    path: Path
    user: int

    @property
    def home(self) -> Path:
        return self.path / "home"

    @property
    def identity(self) -> dict[str, Any]:
        """For subprocess.run: to be that user."""
        return {"user": self.user, "group": self.user, "extra_groups": []}

    @property
    def environment(self) -> dict[str, str]:
        """Of a Python process of that user. It writes no byte code: it cannot, and `checkout` has compiled all."""
        return {
            "HOME": str(self.home), "TMPDIR": str(self.home), "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": f"{self.path / 'src'}:{self.path}:{self.path / 'packages'}",
        }  # fmt: skip


def _owners() -> Iterator[int]:
    """Of the processes that there are."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                yield entry.stat().st_uid


@contextlib.contextmanager
def _user() -> Iterator[int]:
    """A user id that no other run of the tests has: they count what is left of theirs."""
    taken = set(_owners())
    for user in USERS:
        if user in taken:  # by what somebody else left running
            continue
        with open(Path(tempfile.gettempdir()) / f"rock-user-{user}.lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield user
            return
    raise RuntimeError(f"{len(USERS)} runs of the tests have all their users")


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
def checkout() -> Iterator[Checkout]:
    """A copy of the checkout that the user can read, and a home that is his."""
    with _user() as user, tempfile.TemporaryDirectory(prefix="rock-rootless-") as folder:
        top = Path(folder)
        top.chmod(0o755)
        ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        for name in ("src", "native", "tests", "examples"):
            shutil.copytree(ROOT / name, top / name, ignore=ignore)
        # Once, and not in every process that the user starts: a server is half a second of work sooner there.
        subprocess.run([interpreter() or sys.executable, "-m", "compileall", "-q", top / "src", top / "tests"],
                       check=True, timeout=300)  # fmt: skip
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, top)
        packages = Path(sysconfig.get_paths()["purelib"])
        if open_to_all(packages):
            (top / "packages").symlink_to(packages)
        else:
            shutil.copytree(packages, top / "packages", ignore=ignore)
        home = top / "home"
        home.mkdir()
        os.chown(home, user, user)
        yield Checkout(top, user)
