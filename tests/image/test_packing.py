"""The writable layer as a tar and back: what a guest may have left, and what Python's own tar reader makes of it."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.errors import ImageError
from rock.images.layers import tar_writer
from rock.images.layers.tar_reader import ByteStream, Entry, Kind, TarReader
from rock.images.layers.tar_writer import Packer, Part, TarWriter, unpack

ROOT = os.geteuid() == 0
OVERLAY = "trusted.overlay." if ROOT else "user.overlay."


def packed(*parts: Part, limit: int = 1 << 30) -> bytes:
    out = bytearray()
    Packer(TarWriter(out.extend), OVERLAY, limit).pack(parts)
    return bytes(out)


def names_of(data: bytes) -> list[str]:
    """As another reader has them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getnames()


def unpacked(data: bytes, *parts: Part) -> None:
    for part in parts:
        os.makedirs(part.folder)
    unpack(pieces(data), parts, one_owner=not ROOT)


def pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 10_007):
        yield data[start : start + 10_007]


def listing(folder: Path) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for root, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            path = os.path.join(root, name)
            info = os.lstat(path)
            if stat.S_ISSOCK(info.st_mode):
                continue
            body = os.readlink(path) if stat.S_ISLNK(info.st_mode) else b""
            if stat.S_ISREG(info.st_mode):
                body = Path(os.fsdecode(path)).read_bytes()
            is_whiteout = stat.S_ISCHR(info.st_mode)  # which has no time of its own
            rows.append((
                os.path.relpath(path, os.fsencode(folder)), info.st_mode, info.st_uid, info.st_gid, body,
                0 if is_whiteout else info.st_mtime_ns, info.st_rdev, info.st_nlink if not folders else 0,
            ))  # fmt: skip
    return sorted(rows, key=repr)


NAMES = st.binary(min_size=1, max_size=300).filter(
    lambda name: b"\0" not in name and not name.startswith(b"/") and name.strip(b"/") != b""
)


@given(
    path=NAMES, target=st.binary(max_size=300).filter(lambda b: b"\0" not in b), kind=st.sampled_from([
        Kind.FILE, Kind.FOLDER, Kind.SYMLINK, Kind.FIFO]), mode=st.integers(0, 0o7777),
    uid=st.integers(0, (1 << 32) - 2), gid=st.integers(0, (1 << 32) - 2), mtime=st.integers(-(1 << 62), 1 << 62),
    size=st.integers(0, 2000), xattrs=st.dictionaries(st.text(st.characters(codec="ascii", exclude_characters="=\0"),
                                                              min_size=1), st.binary(max_size=600), max_size=3),
)  # fmt: skip
def test_what_is_written_is_read(
    path: bytes, target: bytes, kind: Kind, mode: int, uid: int, gid: int, mtime: int, size: int,
    xattrs: dict[str, bytes],
) -> None:  # fmt: skip
    size = size if kind is Kind.FILE else 0
    target = target if kind is Kind.SYMLINK else b""
    path = path.rstrip(b"/")
    entry = Entry(path, kind, mode, uid, gid, mtime, size, target, xattrs)
    out = bytearray()
    writer = TarWriter(out.extend)
    for _ in range(2):
        writer.header(entry)
        if size:
            writer.data(b"x" * size)
    writer.finish()
    assert len(out) % 512 == 0
    reader = TarReader(ByteStream(pieces(bytes(out))))
    for _ in range(2):
        found = reader.next()
        assert found is not None
        found.path = found.path.rstrip(b"/")
        assert b"".join(reader.data()) == b"x" * size
        assert found == entry
    assert reader.next() is None


def fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_bytes(os.urandom(100_000))
    os.link(folder / "deep" / "er" / "file", folder / "hard")
    os.symlink("../../../../etc", folder / "out")
    os.symlink("/etc/shadow", folder / "secret")
    os.mkfifo(folder / "fifo", 0o640)
    (folder / ("n" * 200)).write_text("long")
    (folder / "ünï").write_text("not ascii")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff\n")).write_text("not utf-8")
    (folder / "empty").mkdir(mode=0o701)
    (folder / "holes").write_bytes(b"")
    os.truncate(folder / "holes", 8 << 20)
    os.utime(folder / "deep", ns=(1, 1_234_567_890_123_456_789))


def test_a_tree_there_and_back(tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    fill(source)
    os.mknod(source / "gone", stat.S_IFCHR, 0)
    os.setxattr(source / "empty", f"{OVERLAY}opaque", b"y")
    os.setxattr(source / "hard", "user.mine", b"1")
    data = packed(Part(str(source)))
    unpacked(data, Part(str(back)))
    assert listing(back) == listing(source)
    assert os.getxattr(back / "empty", f"{OVERLAY}opaque") == b"y"
    assert os.getxattr(back / "hard", "user.mine") == b"1"
    assert (back / "holes").stat().st_blocks < 100
    names = names_of(data)
    assert ".wh.gone" in names and "empty/.wh..wh..opq" in names and "out/passwd" not in names
    assert b"root:" not in data  # nothing behind a link that leads out


def test_parts_are_packed_at_their_place(tmp_path: Path) -> None:
    top, usr = tmp_path / "top", tmp_path / "usr"
    fill(usr)
    top.mkdir()
    (top / "usr" / "covered").mkdir(parents=True)
    (top / "other").write_text("1")
    data = packed(Part(str(top)), Part(str(usr), b"usr"))
    assert not any("covered" in name for name in names_of(data))
    unpacked(data, Part(str(tmp_path / "a")), Part(str(tmp_path / "b"), b"usr"))
    assert os.listdir(tmp_path / "a") == ["other"]
    assert listing(tmp_path / "b") == listing(usr)


def test_what_cannot_be_told_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in ((".wh.file", "begins with"), (".wh..wh..opq", "begins with")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("")
        with pytest.raises(ImageError, match=text):
            packed(Part(str(folder)))
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "one").write_bytes(b"x" * 1000)
    os.truncate(folder / "one", 1 << 40)
    with pytest.raises(ImageError, match="over the limit"):
        packed(Part(str(folder)), limit=1 << 30)
    monkeypatch.setattr(tar_writer, "MOST_ENTRIES", 10)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(11):
        (folder / str(number)).touch()
    with pytest.raises(ImageError, match="more than 10 files"):
        packed(Part(str(folder)))


@pytest.mark.parametrize("path", [b"../out", b"usr/../../out", b"/../out", b"usr/x/../../../out"])
def test_an_archive_does_not_lead_out(tmp_path: Path, path: bytes) -> None:
    out = bytearray()
    writer = TarWriter(out.extend)
    writer.header(Entry(path, Kind.FILE, size=1))
    writer.data(b"x")
    writer.finish()
    with pytest.raises(ImageError, match="outside of its root"):
        unpacked(bytes(out), Part(str(tmp_path / "a")), Part(str(tmp_path / "b"), b"usr"))
    assert not (tmp_path / "out").exists()


def test_an_archive_does_not_write_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    out = bytearray()
    writer = TarWriter(out.extend)
    writer.header(Entry(b"link", Kind.SYMLINK, target=os.fsencode(tmp_path / "victim")))
    writer.header(Entry(b"link/file", Kind.FILE, size=1))
    writer.data(b"x")
    writer.finish()
    with pytest.raises((ImageError, OSError)):
        unpacked(bytes(out), Part(str(tmp_path / "a")))
    assert os.listdir(tmp_path / "victim") == []


def test_a_name_that_is_cut_off_after_a_slash_is_of_a_file(tmp_path: Path) -> None:
    """The name in the header is the first 100 bytes of the one in the pax header before it."""
    folder = tmp_path / "from" / ("a" * 40) / ("b" * 58)
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"content" * 100)
    assert f"{'a' * 40}/{'b' * 58}/file"[:100].endswith("/")
    unpacked(packed(Part(str(tmp_path / "from"))), Part(str(tmp_path / "to")))
    assert listing(tmp_path / "to") == listing(tmp_path / "from")
