"""The images of deploy/images, made by our builder: they start, they are small, the admin is an ordinary user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tools import image_context

from rock.errors import CommandFailed
from rock.images.store import ImageStore
from rock.sync import Client, Sandbox
from tests.conftest import RunningServer
from tests.e2e.test_images import small_root

BASE = "rock-base:1"
FILES = Path(__file__).parent.parent.parent / "deploy" / "images"
LARGEST = 150 << 20  # bytes that an image adds to its base
PYTHON = Path("/usr/bin/python3.11")
LIBRARY = Path("/usr/lib/python3.11")

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not LIBRARY.is_dir() or not PYTHON.exists(),
                                reason="needs root, and Debian's Python with pip")  # fmt: skip


def python_root(folder: Path) -> Path:
    """A base image: a shell, and Debian's Python with pip and venv, as small as they are."""
    small_root(folder, "sh", "mkdir", "chown", "chmod", "id")
    shutil.copy(PYTHON, folder / "usr/bin/python3.11")
    skip = shutil.ignore_patterns("__pycache__", "test", "tests", "idlelib", "tkinter", "config-*", "lib2to3")
    shutil.copytree(LIBRARY, folder / "usr/lib/python3.11", symlinks=True, ignore=skip, dirs_exist_ok=True)
    packages = folder / "usr/lib/python3/dist-packages"
    shutil.copytree("/usr/lib/python3/dist-packages/pip", packages / "pip", ignore=skip)
    (folder / "usr/bin/python3").symlink_to("python3.11")
    for extension in [PYTHON, *(folder / "usr/lib/python3.11/lib-dynload").glob("*.so")]:
        output = subprocess.run(["ldd", extension], capture_output=True, text=True).stdout
        for library in re.findall(r"(/\S+) \(", output):
            target = folder / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(library, target)
    for name in ("libpthread.so.0", "libdl.so.2", "librt.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6"):
        for library in Path("/lib").glob(f"*-linux-gnu/{name}"):  # wheels are linked with them
            target = folder / str(library).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
    if not (folder / "bin/sh").exists():
        (folder / "bin/sh").symlink_to("/usr/bin/sh")
    (folder / "etc").mkdir(exist_ok=True)
    (folder / "tmp").mkdir(mode=0o1777)
    return folder


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build context; the packages are kept in the tests' cache."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "image-context"
    try:
        image_context.write(cache, "3.11")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the packages cannot be had here: {error}")
    return cache


@pytest.mark.parametrize(("name", "program", "user"), [("admin", "admin", 10001), ("worker", "rocklet", 0)])
def test_an_image_of_ours_is_built_and_starts(
    server: RunningServer, context: Path, tmp_path: Path, name: str, program: str, user: int
) -> None:
    store = ImageStore(server.home / "images")
    if not store.has(BASE):
        store.import_folder(python_root(tmp_path / "base"), BASE)
    output: list[str] = []
    with Client(server.url) as client:
        try:
            made = client.build_image(context, f"rock-{name}:1", dockerfile=FILES / f"{name}.Dockerfile",
                                      build_args={"BASE": BASE}, progress=output.append, timeout=600)  # fmt: skip
        except CommandFailed as error:
            raise AssertionError("".join(output)) from error
    record = store.inspect(made.name)
    base = store.inspect(BASE)
    folders = zip(store.resolve(made.name).layers, record.layers, strict=True)
    size = sum(folder_size(Path(folder)) for folder, layer in folders if layer not in base.layers)
    assert size < LARGEST, f"{size >> 20} MiB"
    assert record.entrypoint == (f"/opt/rock/bin/{program}",)
    assert record.user.partition(":")[0] in ((str(user),) if user else ("", "0", "root"))
    with Sandbox(base_url=server.url, image=made.name, memory="512m") as sandbox:
        who = sandbox.execute(["/usr/bin/id", "-u"])
        assert who.stdout.strip() == str(user), who.stderr
        helped = sandbox.execute([f"/opt/rock/bin/{program}", "--help"], timeout=60)
        assert helped.exit_code == 0 and "--port" in helped.stdout, helped.stderr
        text = "import rock, asyncpg, yaml" if name == "admin" else "from rock.runtime.namespace import runtime"
        imported = sandbox.execute(["/opt/rock/bin/python", "-c", text], timeout=60)
        assert imported.exit_code == 0, imported.stderr
        wrote = sandbox.execute(["/usr/bin/mkdir", "/var/lib/rock/run"])
        assert wrote.exit_code == 0, f"ROCK_HOME is not writable: {wrote.stderr}"
    store.remove(made.name)


def folder_size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
