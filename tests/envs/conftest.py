"""Hosts of environments in sandboxes of the process runtime, and GEM itself, installed once for many runs."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_gem

from rock.envhub.packages import GEM, GEM_GAMES, SETS, image_of
from rock.errors import ImageError
from rock.images.packages import PackageSet, ensure, packages_folder
from rock.images.store import ImageStore
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.environments.host import EnvHost
from rock.runtime.base import Handle
from rock.runtime.process.runtime import ProcessRuntime

Body = Callable[[EnvHost, ProcessRuntime, Handle], Awaitable[Any]]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of packages with the environments of small_gem."""
    return small_gem.write(tmp_path / "packages")


@pytest.fixture
def hosted(tmp_path: Path) -> Callable[..., Any]:
    """Runs a body with an open host in a sandbox of its own."""

    def run(folder: Path, body: Body, **more: Any) -> Any:
        async def work() -> Any:
            runtime = ProcessRuntime(tmp_path / "run")
            await runtime.open()
            handle = await runtime.create("envs", SandboxConfig(image="host"))
            host = EnvHost(runtime, handle, folder=str(folder), python=sys.executable, **more)
            try:
                await host.open()
                return await body(host, runtime, handle)
            finally:
                await host.close()
                await runtime.destroy(handle)
                await runtime.close()

        return asyncio.run(work())

    return run


@pytest.fixture(scope="session")
def gem_folder() -> Iterator[Path]:
    """GEM's packages, installed by pip the first time and kept between runs."""
    yield from _installed(PackageSet(image_of(GEM), SETS[GEM]))


@pytest.fixture(scope="session")
def games_folder() -> Iterator[Path]:
    """The packages of GEM's games alone, likewise."""
    yield from _installed(PackageSet(image_of(GEM_GAMES), SETS[GEM_GAMES], no_deps=True))


def _installed(packages: PackageSet) -> Iterator[Path]:
    base = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    store = ImageStore(base / "images")
    try:
        rootfs = ensure(store, packages)
    except ImageError as error:
        if "failed" not in error.message:
            raise
        pytest.skip(f"GEM cannot be installed: {error}")
    lease = store.lease(rootfs)
    yield packages_folder(rootfs)
    lease.close()


@pytest.fixture(scope="session")
def word_list() -> Path:
    """English words, one a line: of this machine, or of Debian's package, fetched once and kept between runs."""
    found = Path("/usr/share/dict/words")
    if found.is_file():
        return found
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "words"
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / "usr/share/dict/american-english"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            told = "this machine has no apt-get"
            if shutil.which("apt-get"):
                command = ["apt-get", "download", "wamerican"]
                told = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=100).stderr[-200:]
            packages = sorted(cache.glob("wamerican_*.deb"))
            if not packages:
                pytest.skip(f"there is no /usr/share/dict/words, and no package of it: {told}")
            subprocess.run(["dpkg-deb", "-x", packages[0], cache], check=True, capture_output=True)
    return made
