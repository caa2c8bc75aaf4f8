"""Archives that are small and come to more than they may: refused on the way, with nothing left."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.image.image_archives import config_of, docker_archive, entry, leftovers, oci_files, sha, tar, write_files
from tests.image.registries import MANIFESTS, Odd, odd_registry

from rock.errors import ImageError, InvalidConfig
from rock.images.copy import Copy, sources
from rock.images.layers.blobs import Allowance
from rock.images.layers.views import Merged
from rock.images.layers.writer import LayerWriter
from rock.images.store import ImageStore
from rock.settings import Settings

BOUND = 4 << 20
REAL = 24 << 20  # what each of these comes to
MANY = 1000
ZEROS = tar([entry("small", b"s"), entry("zeros", bytes(REAL))])
AFTER_THE_END = tar([entry("small", b"s")]) + bytes(REAL)  # of no entry at all
CROWD = tar([entry(f"f{number}", b"") for number in range(MANY)])
DEEP = tar([entry("/".join([f"d{number}", *["d"] * 100, "f"]), b"") for number in range(MANY // 50)])


def _zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        pytest.skip("the program zstd is not on this machine")
    return subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.fixture
def bounded(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", allowance=Allowance(BOUND, MANY // 2))


BOMBS = pytest.mark.parametrize(
    ("layer", "setting"),
    [(ZEROS, "ROCK_IMAGE_MAX_BYTES"), (AFTER_THE_END, "ROCK_IMAGE_MAX_BYTES"), (CROWD, "ROCK_IMAGE_MAX_ENTRIES"),
     (DEEP, "ROCK_IMAGE_MAX_ENTRIES")], ids=["zeros", "after the end", "files", "folders"],
)  # fmt: skip
PACKINGS = pytest.mark.parametrize("pack", [gzip.compress, _zstd], ids=["gzip", "zstd"])


def _refused(store: ImageStore, setting: str, work: Callable[[], object]) -> None:
    with pytest.raises(ImageError) as refused:
        work()
    assert setting in (refused.value.hint or "")
    assert leftovers(store) == []


@BOMBS
@PACKINGS
def test_a_layer_is_bounded(
    bounded: ImageStore, tmp_path: Path, layer: bytes, setting: str, pack: Callable[[bytes], bytes]
) -> None:
    assert len(pack(layer)) < BOUND / 2
    folder = write_files(tmp_path / "oci", oci_files([layer], "bomb:1", pack))
    _refused(bounded, setting, lambda: bounded.import_any(folder))


@BOMBS
def test_a_tar_of_a_root_is_bounded(bounded: ImageStore, tmp_path: Path, layer: bytes, setting: str) -> None:
    path = tmp_path / "root.tar.gz"
    path.write_bytes(gzip.compress(layer))
    _refused(bounded, setting, lambda: bounded.import_tar(path, "bomb:1"))


def test_what_surrounds_an_archive_is_bounded(bounded: ImageStore, tmp_path: Path) -> None:
    whole = docker_archive(tmp_path / "saved.tar", [ZEROS], ["bomb:1"]).read_bytes()
    packed = tmp_path / "saved.tar.gz"
    packed.write_bytes(gzip.compress(whole))
    _refused(bounded, "ROCK_IMAGE_MAX_BYTES", lambda: bounded.import_docker_archive(packed))


def test_layers_share_their_bound(bounded: ImageStore, tmp_path: Path) -> None:
    """Each of them would do, and all of them do not."""
    parts = [tar([entry(f"part{number}", bytes([number]) * (BOUND // 3))]) for number in range(4)]
    folder = write_files(tmp_path / "oci", oci_files(parts, "bomb:1"))
    _refused(bounded, "ROCK_IMAGE_MAX_BYTES", lambda: bounded.import_any(folder))
    two = write_files(tmp_path / "two", oci_files(parts[:2], "fine:1"))
    assert bounded.import_any(two)[0].name == "fine:1"


@PACKINGS
def test_a_pulled_layer_is_bounded(bounded: ImageStore, pack: Callable[[bytes], bytes]) -> None:
    raw, packed = config_of([ZEROS]), pack(ZEROS)
    with _serving(raw, packed, len(packed)) as address:
        _refused(bounded, "ROCK_IMAGE_MAX_BYTES", lambda: bounded.pull(f"{address}/team/tool:1.0"))


def test_a_layer_that_says_it_is_too_large_is_not_fetched(bounded: ImageStore) -> None:
    raw, packed = config_of([ZEROS]), gzip.compress(ZEROS)
    with _serving(raw, packed, 1 << 40) as address:
        _refused(bounded, "ROCK_IMAGE_MAX_BYTES", lambda: bounded.pull(f"{address}/team/tool:1.0"))
        assert not any(sha(packed) in path for _, path, _ in Odd.asked)


def _serving(raw: bytes, packed: bytes, size: int) -> AbstractContextManager[str]:
    """A registry with an image of one layer that is said to have `size` bytes."""
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": MANIFESTS[0],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": sha(raw), "size": len(raw)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": sha(packed), "size": size}],
    }).encode()  # fmt: skip
    return odd_registry(Odd, {sha(raw): raw, sha(packed): packed, sha(manifest): manifest})


def test_an_archive_of_a_build_is_bounded(tmp_path: Path) -> None:
    """What ADD unpacks counts as the layer that it becomes."""
    context, out, below = tmp_path / "context", tmp_path / "out", tmp_path / "below"
    for folder in (context, out, below):
        folder.mkdir()
    (context / "bomb.tar.gz").write_bytes(gzip.compress(ZEROS))
    bounds = Allowance(BOUND, MANY).on(tmp_path)
    with LayerWriter(str(out), bounds) as writer:
        copy = Copy(Merged([str(below)]), writer)
        (found,) = sources(Merged([str(context)]), ["bomb.tar.gz"])
        with pytest.raises(ImageError, match="unpacked"):
            copy.unpack(found, b"/")
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) <= BOUND


def test_the_disk_bounds_too(tmp_path: Path) -> None:
    bounds = Allowance(1 << 60, 1 << 60).on(tmp_path)
    assert bounds.most_bytes is not None and bounds.most_bytes < 1 << 50


def test_a_bound_that_is_no_size_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="ROCK_IMAGE_MAX_BYTES"):
        ImageStore.of(Settings(tmp_path, image_max_bytes="much"))
    assert ImageStore.of(Settings(tmp_path, image_max_bytes="1g")).layers.allowance.most_bytes == 1 << 30


def test_these_are_bombs() -> None:
    assert len(zlib.compress(ZEROS)) * 100 < len(ZEROS)
