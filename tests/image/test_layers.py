"""Layers of well-meant and of hostile archives."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_archives import as_ordinary_user, entry, leftovers, tar

from rock.errors import ImageError
from rock.images.store import ImageStore

ROOT = os.geteuid() == 0


def unpack(store: ImageStore, data: bytes) -> Path:
    path = store.folder / "in.tar"
    path.write_bytes(data)
    store.import_tar(path, "t")
    return Path(store.resolve("t").layers[0])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_everything_a_system_has(store: ImageStore, format: int) -> None:
    long = "d/" + "x" * 90 + "/" + "y" * 99
    folder = unpack(store, tar([
        entry("./", mode=0o755), entry("d", mode=0o500, mtime=1_000_000_000),
        entry("d/f", b"hello", mode=0o4751, uid=7, gid=8),
        entry(long, b"long" * 10_000), entry("d/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("d/hard", type=tarfile.LNKTYPE, linkname="d/f"), entry("d/pipe", type=tarfile.FIFOTYPE),
        entry("d/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), entry("big", os.urandom(3_000_001), mtime=1.5e9),
    ], format))  # fmt: skip
    assert (folder / "d/f").read_bytes() == b"hello"
    assert (folder / long).read_bytes() == b"long" * 10_000
    assert os.readlink(folder / "d/link") == "/etc/passwd"
    assert (folder / "d/hard").samefile(folder / "d/f")
    assert stat.S_ISFIFO((folder / "d/pipe").stat().st_mode)
    assert not (folder / "d/null").exists()
    assert store.inspect("t").note == "1 device nodes left out"
    assert int((folder / "big").stat().st_mtime) == 1_500_000_000
    assert int((folder / "d").stat().st_mtime) == 1_000_000_000
    info = (folder / "d/f").stat()
    assert stat.S_IMODE(info.st_mode) == 0o4751
    if ROOT:
        assert (info.st_uid, info.st_gid) == (7, 8)
        assert stat.S_IMODE((folder / "d").stat().st_mode) == 0o500
    else:
        assert stat.S_IMODE((folder / "d").stat().st_mode) == 0o700


def test_a_later_entry_wins(store: ImageStore) -> None:
    folder = unpack(store, tar([
        entry("a/b/c", b"1"), entry("a", b"now a file"), entry("s", type=tarfile.SYMTYPE, linkname="/tmp"),
        entry("s", None), entry("s/f", b"in a folder"), entry("f", b"1"), entry("f", b"2"),
    ]))  # fmt: skip
    assert (folder / "a").read_bytes() == b"now a file"
    assert (folder / "s/f").read_bytes() == b"in a folder"
    assert (folder / "f").read_bytes() == b"2"


HOSTILE = {
    "dotdot": [entry("../../escaped", b"x")],
    "dotdot inside": [entry("a/../../../escaped", b"x")],
    "link above": [entry("l", type=tarfile.SYMTYPE, linkname="../../.."), entry("l/../escaped", b"x")],
    "hard link out": [entry("h", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")],
    "hard link absolute": [entry("h", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "hard link by link": [entry("l", type=tarfile.SYMTYPE, linkname="/etc"),
                          entry("h", type=tarfile.LNKTYPE, linkname="l/passwd")],
    "below a file": [entry("f", b"x"), entry("f/g", b"y")],
    "dangling": [entry("l", type=tarfile.SYMTYPE, linkname="/nowhere"), entry("l/f", b"x")],
    "loop": [entry("l", type=tarfile.SYMTYPE, linkname="l"), entry("l/f", b"x")],
    "whiteout of dotdot": [entry("a/.wh...", b"")],
    "owner": [entry("f", b"x", uid=2**40)],
    "deep": [entry("d/" * 300 + "f", b"x")],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused(store: ImageStore, case: str) -> None:
    with pytest.raises(ImageError):
        unpack(store, tar(HOSTILE[case]))
    (store.folder / "in.tar").unlink()
    assert leftovers(store) == []
    assert not list(store.folder.parent.rglob("escaped"))


def test_names_that_lead_out_stay_in(store: ImageStore) -> None:
    folder = unpack(store, tar([
        entry("/etc/absolute", b"1"), entry("up", type=tarfile.SYMTYPE, linkname="../../../../.."),
        entry("up/made", b"2"), entry("abs", type=tarfile.SYMTYPE, linkname="/etc"), entry("abs/too", b"3"),
    ]))  # fmt: skip
    assert (folder / "etc/absolute").read_bytes() == b"1"
    assert (folder / "made").read_bytes() == b"2"
    assert (folder / "etc/too").read_bytes() == b"3"


def test_attributes(store: ImageStore) -> None:
    info, data = entry("f", b"x")
    info.pax_headers = {
        "SCHILY.xattr.user.mine": "yes",
        "SCHILY.xattr.user.overlay.redirect": "/etc",
        "SCHILY.xattr.security.capability": "\x01",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
    }
    folder = unpack(store, tar([(info, data)]))
    assert [n for n in os.listxattr(folder / "f") if n != "security.selinux"] == ["user.mine"]


@pytest.mark.parametrize("data", [b"", b"x" * 511, b"\0" * 100, b"hello" * 1000])
def test_no_archive_at_all(store: ImageStore, data: bytes) -> None:
    if data == b"":
        assert list(unpack(store, data).iterdir()) == []
        return
    with pytest.raises(ImageError):
        unpack(store, data)


@settings(max_examples=150, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=6), cut=st.integers(0, 4096))
def test_damaged_archives_raise_only_image_errors(store: ImageStore, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(tar([entry("a", None), entry("a/f", b"x" * 600), entry("é" * 60, b"y"),
                          entry("l", type=tarfile.SYMTYPE, linkname="a/f")]))  # fmt: skip
    for place, value in flips:
        if place < len(data):
            data[place] = value
    try:
        unpack(store, bytes(data[: len(data) - cut]))
        store.remove("t")
    except ImageError:
        pass
    assert [str(p) for p in (store.folder / "tmp").iterdir()] == []


OVERLAY = """
set -e
cd "$1"; mkdir -p up work merged
mount -t overlay overlay -o "lowerdir=$2,upperdir=up,workdir=work$3" merged
cd merged; find . | sort
"""


def _merged(store: ImageStore, name: str, folder: Path, options: str) -> list[str]:
    layers = ":".join(store.resolve(name).layers)
    run = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", OVERLAY, "sh", str(folder), layers, options], capture_output=True, text=True
    )
    if "unshare" in run.stderr:
        pytest.skip(f"no user namespaces here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


LOWER = [entry("keep", b"1"), entry("gone", b"2"), entry("d", None), entry("d/old", b"3"), entry("o", None),
         entry("o/old", b"4"), entry("r", None), entry("r/old", b"5")]  # fmt: skip
UPPER = [entry(".wh.gone", b""), entry("d", None), entry("d/.wh.old", b""), entry("d/new", b"6"), entry("o", None),
         entry("o/new", b"7"), entry("o/.wh..wh..opq", b""), entry(".wh.r", b""), entry("r", None),
         entry("r/new", b"8"), entry(".wh..wh.plnk", b"")]  # fmt: skip
MERGED = [".", "./d", "./d/new", "./keep", "./o", "./o/new", "./r", "./r/new"]


def _import_two(folder: Path) -> ImageStore:
    from image_archives import docker_archive

    store = ImageStore(folder / "images")
    store.import_any(docker_archive(folder / "two.tar", [tar(LOWER), tar(UPPER)], ["two:1"]))
    return store


def test_deleted_files_are_deleted(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("needs root: mounts an overlay of the kind that root mounts; see the next test")
    store = _import_two(tmp_path)
    layers = ":".join(store.resolve("two:1").layers)
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", OVERLAY, "sh", str(tmp_path), layers, ""], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == MERGED
    assert _merged(store, "two:1", _fresh(tmp_path), ",userxattr") == MERGED  # root's layers, in a user namespace


def _fresh(folder: Path) -> Path:
    (folder / "again").mkdir()
    return folder / "again"


def test_deleted_files_are_deleted_for_an_ordinary_user(open_folder: Path) -> None:
    assert as_ordinary_user(lambda: _merged(_import_two(open_folder), "two:1", open_folder, ",userxattr")) == MERGED


def test_an_ordinary_user_can_read_and_remove_everything(open_folder: Path) -> None:
    def work() -> list[str]:
        store = ImageStore(open_folder / "images")
        folder = unpack(store, tar([entry("d", mode=0), entry("d/e", mode=0o555), entry("d/e/f", b"x", mode=0, uid=9)]))
        assert (folder / "d/e/f").read_bytes() == b"x"
        assert (folder / "d/e/f").stat().st_uid == os.geteuid()
        assert store.remove("t") == 1
        with store.layers.scratch() as scratch:
            (scratch / "closed/inner").mkdir(parents=True)
            (scratch / "closed/inner/file").touch()
            (scratch / "closed/inner").chmod(0)
            (scratch / "closed").chmod(0o500)
        return leftovers(store)

    assert as_ordinary_user(work) == []
