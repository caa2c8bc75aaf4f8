"""Packages as a layer: without the network, by a requirement that is a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from rock.envhub.packages import GEM, SETS, image_of, requirements_of
from rock.errors import ImageError, InvalidConfig, NotFound
from rock.runtime.image.packages import PackageSet, ensure, is_built, packages_folder
from rock.runtime.image.store import ImageStore

IMAGE = "rock.local/env/tiny"


@pytest.fixture
def tiny(tmp_path: Path) -> PackageSet:
    """A package that pip can install from where it lies, without asking anybody for a build tool."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    build = tmp_path / "build"
    files = {
        "tiny.py": "ANSWER = 42\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/RECORD": "",
    }
    for name, text in files.items():
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_text(text)
    shutil.make_archive(str(wheel.with_suffix("")), "zip", build)
    wheel.with_suffix(".zip").rename(wheel)
    return PackageSet(IMAGE, (str(wheel),))


def test_they_are_installed_once(tmp_path: Path, tiny: PackageSet) -> None:
    stores = [ImageStore(tmp_path / "images") for _ in range(3)]
    told: list[str] = []
    threads = [threading.Thread(target=ensure, args=(store, tiny, told.append)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.count("compiling") == 1
    rootfs = stores[0].resolve(IMAGE)
    assert rootfs == stores[1].resolve(IMAGE)
    folder = packages_folder(rootfs)
    assert (folder / "packages").read_text() == "tiny 1.0\n"
    assert list((folder / "site/__pycache__").glob("tiny.*.pyc"))
    assert os.readlink(folder / "python").startswith("/")
    assert folder.stat().st_mode & 0o005 == 0o005
    assert rootfs.layers[1:] == stores[0].resolve("host").layers
    assert not any(bind.writable for bind in rootfs.binds)
    assert stores[0].gc() == 0
    assert stores[0].remove(IMAGE) > 0
    assert not is_built(stores[0], tiny)


def test_other_requirements_are_another_layer(tmp_path: Path, tiny: PackageSet) -> None:
    store = ImageStore(tmp_path / "images")
    first = ensure(store, tiny)
    other = PackageSet(IMAGE, (*tiny.requirements, *tiny.requirements))
    assert not is_built(store, other)
    assert ensure(store, other).layers[0] != first.layers[0]


def test_pip_s_words_are_told(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    missing = PackageSet(IMAGE, (str(tmp_path / "missing-1.0-py3-none-any.whl"),))
    with pytest.raises(ImageError, match=r"installing .* failed: .*missing-1\.0") as caught:
        ensure(store, missing)
    assert "missing-1.0" in caught.value.details["output"]
    assert list((store.folder / "tmp").iterdir()) == []
    with pytest.raises(ImageError, match="not on this machine"):
        store.resolve(IMAGE)


def test_they_work_inside(tmp_path: Path, tiny: PackageSet) -> None:
    """Mounted by hand, without the runtime."""
    rootfs = ensure(ImageStore(tmp_path / "images"), tiny)
    (tmp_path / "up").mkdir()
    lines = [f'cd "{tmp_path}"; mkdir work root', "mount -t overlay overlay -o lowerdir="
             f'"{":".join(rootfs.layers)}",upperdir=up,workdir=work,userxattr root']  # fmt: skip
    lines += [f'mount --rbind "{b.source}" "root{b.target}"' for b in rootfs.binds]
    base = "/opt/rock/envs/current"
    code = f"import sys; sys.path.insert(0, '{base}/site'); import tiny; print(tiny.ANSWER, tiny.__cached__)"
    lines.append(f'exec chroot root {base}/python -I -B -c "{code}"')
    run = subprocess.run(["unshare", "-Urm", "sh", "-ec", "\n".join(lines)], capture_output=True, text=True, env={})
    if "unshare" in run.stderr:
        pytest.skip(f"no user namespaces here: {run.stderr.strip()}")
    assert run.stdout.startswith("42 /opt/rock/envs/current/site/__pycache__/tiny"), run.stderr


def test_an_image_without_packages(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        packages_folder(ImageStore(tmp_path / "images").resolve("host"))


def test_names() -> None:
    assert requirements_of(image_of(GEM)) == SETS[GEM]
    assert requirements_of("python:3.11") is None
    assert requirements_of("host") is None
    with pytest.raises(InvalidConfig, match="gem"):
        requirements_of(image_of("nothing"))
