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
from rock.images.host import PYTHON_LIBRARIES
from rock.images.packages import PackageSet, ensure, is_built, packages_folder
from rock.images.store import ImageStore

IMAGE = "rock.local/env/tiny"


@pytest.fixture
def tiny(tmp_path: Path) -> PackageSet:
    """A package that pip can install from where it lies, without asking anybody for a build tool."""
    return PackageSet(IMAGE, (str(write_wheel(tmp_path, "1.0")),))


def write_wheel(folder: Path, version: str, requires: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"tiny-{version}-py3-none-any.whl"
    build = folder / f"build-{version}"
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": "ANSWER = 42\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n"
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    for name, text in files.items():
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_text(text)
    shutil.make_archive(str(wheel.with_suffix("")), "zip", build)
    wheel.with_suffix(".zip").rename(wheel)
    return wheel


def test_they_are_installed_once(tmp_path: Path, tiny: PackageSet) -> None:
    stores = [ImageStore(tmp_path / "images") for _ in range(3)]
    told: list[str] = []
    threads = [threading.Thread(target=ensure, args=(store, tiny, told.append)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.count("compiling packages") == 1
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


def test_what_comes_to_the_same_is_one_layer(tmp_path: Path, tiny: PackageSet) -> None:
    store = ImageStore(tmp_path / "images")
    told: list[str] = []
    first = ensure(store, tiny, told.append)
    (wheel,) = tiny.requirements
    link = tmp_path / "elsewhere" / Path(wheel).name
    link.parent.mkdir()
    shutil.copy(wheel, link)
    other = PackageSet("rock.local/env/other", (str(link),))
    assert not is_built(store, other)
    assert ensure(store, other, told.append).layers == first.layers
    assert told.count("compiling packages") == 1 and is_built(store, other) and is_built(store, tiny)
    store.remove(IMAGE)
    assert is_built(store, other) and not is_built(store, tiny)
    assert (packages_folder(store.resolve(other.image)) / "pins").read_text() == "tiny==1.0\n"


def test_another_version_is_another_layer(tmp_path: Path, tiny: PackageSet) -> None:
    store = ImageStore(tmp_path / "images")
    first = ensure(store, tiny)
    other = ensure(store, PackageSet(IMAGE, (str(write_wheel(tmp_path / "more", "2.0")),)))
    assert other.layers[0] != first.layers[0] and other.layers[1:] == first.layers[1:]
    assert (packages_folder(other) / "packages").read_text() == "tiny 2.0\n"
    assert not is_built(store, tiny), "the name stands for the other one now"


def test_without_what_they_ask_for(tmp_path: Path) -> None:
    """Exactly the requirements: what one of them depends on is looked for only where that is wanted."""
    wheel = write_wheel(tmp_path, "1.0", requires="no-such-package-of-ours")
    exactly = PackageSet(IMAGE, (str(wheel),), no_deps=True)
    store = ImageStore(tmp_path / "images")
    assert (packages_folder(ensure(store, exactly)) / "packages").read_text() == "tiny 1.0\n"
    assert is_built(store, exactly) and not is_built(store, PackageSet(IMAGE, (str(wheel),)))


def test_no_packages_at_all(tmp_path: Path) -> None:
    """A set whose adapter needs nothing but Python."""
    store = ImageStore(tmp_path / "images")
    nothing = PackageSet("rock.local/env/nothing", ())
    folder = packages_folder(ensure(store, nothing))
    assert is_built(store, nothing) and (folder / "packages").read_text() == (folder / "pins").read_text() == ""


def test_pip_s_own_configuration_reaches_it(tmp_path: Path, tiny: PackageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(f"[install]\nno-index = true\nfind-links = {tmp_path}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    store = ImageStore(tmp_path / "images")
    found = ensure(store, PackageSet(IMAGE, ("tiny>=1",), wheels_only=True))
    assert (packages_folder(found) / "packages").read_text() == "tiny 1.0\n"
    with pytest.raises(ImageError, match="tiny>=3"):
        ensure(store, PackageSet("rock.local/env/more", ("tiny>=3",), wheels_only=True))


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
    run = subprocess.run(["unshare", "-Urm", "sh", "-ec", "\n".join(lines)], capture_output=True, text=True,
                         env={"LD_LIBRARY_PATH": PYTHON_LIBRARIES})  # fmt: skip
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
