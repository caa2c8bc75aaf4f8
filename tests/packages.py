"""Programs of Debian that tests use and machines may lack: unpacked into the tests' cache, installed nowhere."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path


class CannotBeHad(Exception):
    """Why not, as a sentence."""


@functools.cache
def runsc() -> Path:
    """gVisor's runsc: the machine's own, else Debian's, downloaded once. CannotBeHad."""
    return _program("runsc", "runsc")


def _program(package: str, name: str) -> Path:
    if found := shutil.which(name):
        return Path(found)
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / package
    program = cache / "usr" / "bin" / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache / "ready").exists():
                _fetch(package, cache)
                (cache / "ready").touch()
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBeHad(f"{name} cannot be had here: {error}") from None
    return program


def _fetch(package: str, cache: Path) -> None:
    run = None
    for update in (False, True):
        if update:
            subprocess.run(["apt-get", "update"], capture_output=True, timeout=120)
        run = subprocess.run(["apt-get", "download", package], cwd=cache, capture_output=True, timeout=300)
        if run.returncode == 0:
            break
    else:
        said = run.stderr.decode()[-200:].strip() if run else ""
        raise CannotBeHad(f"apt has no {package}: {said}")
    for file in sorted(cache.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", file, cache], check=True, capture_output=True, timeout=60)
        file.unlink()


def tree(name: str, packages: list[str]) -> Path:
    """A folder with `opt/programs`, in which these packages of Debian are unpacked, and those that they need and this
    machine lacks. Downloaded once. CannotBeHad."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / name
    archives = cache / "archives"
    try:
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        (programs := cache / "layer" / "opt" / "programs").mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache / "ready").exists():
                subprocess.run(["apt-get", "update"], capture_output=True, timeout=180)
                subprocess.run(
                    ["apt-get", "install", "--yes", "--no-install-recommends", "--download-only",
                     "-o", f"Dir::Cache::archives={archives}", "-o", "Debug::NoLocking=1", *packages],
                    check=True, capture_output=True, timeout=900)  # fmt: skip
                for file in sorted(archives.glob("*.deb")):
                    subprocess.run(["dpkg-deb", "-x", file, programs], check=True, capture_output=True, timeout=120)
                    file.unlink()
                (cache / "ready").touch()
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBeHad(f"{', '.join(packages)} cannot be had here: {error}") from None
    return cache / "layer"
