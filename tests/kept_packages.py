"""Packages of environments for the tests of an ordinary user, which pip takes minutes to install: copied from root's,
where both have the same Python, else from what an earlier run installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rock.envhub.packages import GEM_GAMES, SETS, image_of
from rock.errors import NotFound
from rock.images.packages import PackageSet, ensure
from rock.images.store import ImageStore
from tests.unprivileged import Checkout

CACHE = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
KEPT = CACHE / "rootless"  # layer/, notes/ of what pip resolved, and diff_id
PACKAGES = PackageSet(image_of(GEM_GAMES), SETS[GEM_GAMES], no_deps=True)
# As the user: a copied folder becomes a layer of the user's store. Whether it is what is needed, the store judges.
TAKE = """
import os, sys
from pathlib import Path
from rock.images.store import ImageStore
copied, images, image, diff_id = sys.argv[1:]
def fill(writer):
    os.rename(f"{copied}/layer/opt", f"{writer.folder}/opt")
    return diff_id
store = ImageStore(Path(images))
store.host_with(image, "copying", fill, diff_id)
os.rename(f"{copied}/notes", f"{images}/packages")
"""


def give(checkout: Checkout, python: str) -> None:
    """Put into the user's store what there is."""
    copied, images = checkout.home / "copied", _images(checkout)
    if python == os.path.realpath(sys.executable):
        ensure(ImageStore(CACHE / "images"), PACKAGES)
        diff_id = _copy(CACHE / "images", copied)
    elif (KEPT / "diff_id").exists():
        shutil.copytree(KEPT, copied, symlinks=True)
        diff_id = (KEPT / "diff_id").read_text()
    else:
        return
    images.mkdir(parents=True)
    subprocess.run(["chown", "-Rh", f"{checkout.user}:{checkout.user}", checkout.home], check=True, timeout=300)
    subprocess.run([python, "-c", TAKE, copied, images, PACKAGES.image, diff_id], check=True, timeout=300,
                   cwd=checkout.path, env=checkout.environment, **checkout.identity)  # fmt: skip


def keep(checkout: Checkout) -> None:
    """Keep what the user has, for the next run."""
    try:
        layer = _layer(ImageStore(_images(checkout)))
    except NotFound:
        return
    kept = KEPT / "diff_id"
    if kept.exists() and kept.read_text() == layer:
        return
    made = KEPT.with_name(f"{KEPT.name}.{os.getpid()}")
    (made / "diff_id").write_text(_copy(_images(checkout), made))
    shutil.rmtree(KEPT, ignore_errors=True)
    made.rename(KEPT)


def _copy(images: Path, folder: Path) -> str:
    """The layer with the packages of a store, and its notes; answers the layer's digest."""
    store = ImageStore(images)
    layer = _layer(store)
    shutil.copytree(store.layers.path(layer), folder / "layer", symlinks=True)
    shutil.copytree(images / "packages", folder / "notes")
    return layer


def _layer(store: ImageStore) -> str:
    return store.inspect(PACKAGES.image).layers[1]


def _images(checkout: Checkout) -> Path:
    return checkout.home / ".cache" / "rock-tests" / "images"
