"""Images with little in them: no bash, no Python, no shell, another C library. ROCK needs none of these inside."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import RunningServer

from rock.errors import NotFound
from rock.images.store import ImageStore
from rock.sync import Client, Sandbox

_PACKAGES = ("busybox-static", "musl", "musl-dev")
_SOURCE = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char cwd[256];
    printf("%d words, last %s, A=%s, uid %d, in %s\\n", argc - 1, argv[argc - 1], getenv("A") ? getenv("A") : "none",
           (int) getuid(), getcwd(cwd, sizeof cwd));
    return argc > 3 ? 7 : 0;
}
"""


@pytest.fixture(scope="module")
def debian() -> Path:
    """Debian's packages, unpacked into the tests' cache."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "odd-images"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "ready").exists():
            try:
                run = subprocess.run(["apt-get", "download", *_PACKAGES], cwd=cache, capture_output=True, timeout=100)
                if run.returncode != 0:
                    pytest.skip(f"{', '.join(_PACKAGES)} cannot be had: {run.stderr.decode()[-200:].strip()}")
                for package in sorted(cache.glob("*.deb")):
                    subprocess.run(["dpkg-deb", "-x", package, cache], check=True, capture_output=True)
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"{', '.join(_PACKAGES)} cannot be had: {error}")
            (cache / "ready").touch()
    return cache


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """A small C program, linked as the flags say."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler on this machine")

    def build(name: str, *flags: str) -> Path:
        (tmp_path / "program.c").write_text(_SOURCE)
        out = tmp_path / name
        run = subprocess.run([compiler, "-o", out, tmp_path / "program.c", *flags], capture_output=True, text=True)
        if run.returncode != 0:
            pytest.skip(f"{' '.join(flags)} cannot be linked here: {run.stderr[-200:]}")
        return out

    return build


def files_work(sandbox: Sandbox) -> None:
    """Without any program of the image."""
    sandbox.fs.write("/data/x", b"1 2 3")
    assert sandbox.fs.read("/data/x") == b"1 2 3"
    sandbox.fs.move("/data/x", "/data/y")
    assert [found.name for found in sandbox.fs.list("/data")] == ["y"]


def start(server: RunningServer, image: str) -> Sandbox:
    return Sandbox(base_url=server.url, image=image, memory="128m")


def test_busybox(server: RunningServer, debian: Path, tmp_path: Path) -> None:
    """sh and nothing else, statically linked; sessions, commands and builds."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(debian / "bin" / "busybox", root / "bin" / "busybox")
    for name in ("sh", "cat", "ls", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    store = ImageStore(server.home / "images")
    store.import_folder(root, "busybox:1")
    with start(server, "busybox:1") as sandbox:
        assert sandbox.arun("cd /tmp && A=b; echo $0 $A").output.split()[-1] == "b"
        seen = sandbox.arun("pwd; false")
        assert (seen.output, seen.exit_code) == ("/tmp\n", 1)
        assert sandbox.arun("echo partial; sleep 60", timeout=2).timed_out
        assert sandbox.execute("echo $((6 * 7))").stdout == "42\n"
        files_work(sandbox)
        sandbox.commit("busybox:committed")
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text("FROM busybox:committed\nRUN cat /data/y > /copy\n")
    with Client(server.url) as client:
        client.build_image(folder, "busybox:built")
    with start(server, "busybox:built") as sandbox:
        assert sandbox.arun("cat /copy").output == "1 2 3"
    for name in ("busybox:1", "busybox:committed", "busybox:built"):
        store.remove(name)


def test_one_static_program(
    server: RunningServer, compiled: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No shell: what needs one is refused with a word, and everything else works. ENTRYPOINT where it is asked for."""
    folder = tmp_path / "context"
    folder.mkdir()
    shutil.copy(compiled("app", "-static"), folder / "app")
    (folder / "Dockerfile").write_text(
        'FROM scratch\nCOPY app /app\nENV A=b\nWORKDIR /work\nUSER 12:34\nENTRYPOINT ["/app", "one"]\nCMD ["two"]\n')
    with Client(server.url) as client:
        client.build_image(folder, "distroless:1")
    uid = 12 if os.geteuid() == 0 else 0
    with start(server, "distroless:1") as sandbox:
        assert sandbox.execute(["/app", "x"], user="0", cwd="/", env={"A": "c"}).stdout == \
            "1 words, last x, A=c, uid 0, in /\n"
        if uid:
            told = sandbox.execute([], entrypoint=True)
            assert (told.stdout, told.exit_code) == ("2 words, last two, A=b, uid 12, in /work\n", 0)
            told = sandbox.execute(["x", "y"], entrypoint=True)
            assert (told.stdout, told.exit_code) == ("3 words, last y, A=b, uid 12, in /work\n", 7)
        with pytest.raises(NotFound, match="shell"):
            sandbox.execute("echo x")
        with pytest.raises(NotFound):
            sandbox.arun("echo x")
        files_work(sandbox)
    if uid:
        command = [sys.executable, "-m", "rock.cli.main", "run", "--entrypoint", "-m", "128m", "distroless:1"]
        environ = {**os.environ, "ROCK_BASE_URL": server.url}
        run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert run.stdout == "2 words, last two, A=b, uid 12, in /work\n", run.stderr
    ImageStore(server.home / "images").remove("distroless:1")


def test_another_c_library(
    server: RunningServer, debian: Path, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    """A program of musl, dynamically linked: its loader and library are the image's own."""
    (library,) = debian.glob("usr/lib/*-linux-musl")
    (loader,) = debian.glob("lib/ld-musl-*.so.1")
    shared = debian / "lib" / library.name / "libc.so"
    headers = debian / "usr" / "include" / library.name
    start_up = [str(library / name) for name in ("crt1.o", "crti.o", "crtn.o")]
    app = compiled("musl-app", "-nostdlib", "-nostdinc", "-no-pie", "-isystem", str(headers), *start_up,
                   f"-Wl,-dynamic-linker,/lib/{loader.name}", "-L", str(shared.parent), "-lc")  # fmt: skip
    root = tmp_path / "root"
    (root / "lib").mkdir(parents=True)
    shutil.copy(app, root / "app")
    shutil.copy(shared, root / "lib" / loader.name)
    store = ImageStore(server.home / "images")
    store.import_folder(root, "musl:1")
    with start(server, "musl:1") as sandbox:
        done = sandbox.execute(["/app", "x"])
        assert done.stdout == "1 words, last x, A=none, uid 0, in /\n", done
        files_work(sandbox)
    store.remove("musl:1")
