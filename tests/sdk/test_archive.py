"""Folders on their way in and out: what is packed comes back the same, and no archive writes outside its folder."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from rock.errors import InvalidConfig, ServerError
from rock.sdk.archive import FileSource, FolderSource, Incoming, unpack


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "a").write_bytes(b"x" * 1000)
    (source / "deep" / "block").write_bytes(os.urandom(3 << 20))
    (source / "deep" / "er" / ("n" * 200)).write_text("long name")
    (source / "\u00fcml\u00e4ut").write_text("text")
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("deep/block")
    (source / "deep" / "up").symlink_to("../a")
    os.mkfifo(source / "fifo")
    os.utime(source / "a", (1_000_000_000, 1_000_000_000))

    body = io.BytesIO(b"".join(FolderSource(source).chunks()))
    assert unpack(body, tmp_path / "target") == []
    target = tmp_path / "target"
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*"))
    assert names == sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.name != "fifo")
    assert (target / "deep" / "block").read_bytes() == (source / "deep" / "block").read_bytes()
    assert os.access(target / "run", os.X_OK) and not os.access(target / "a", os.X_OK)
    assert (target / "a").stat().st_mtime == 1_000_000_000
    assert os.readlink(target / "link") == "deep/block" and os.readlink(target / "deep" / "up") == "../a"


def test_what_an_ordinary_tar_writes_is_read(tmp_path: Path) -> None:
    file = tar(
        member("./", tarfile.DIRTYPE),
        member("./sub/", tarfile.DIRTYPE),
        member("./sub/file", data=b"1"),
        member("sub/hard", tarfile.LNKTYPE, "./sub/file"),
    )
    assert unpack(file, tmp_path / "t") == []
    assert (tmp_path / "t" / "sub" / "hard").read_bytes() == b"1"
    assert unpack(tar(member("no/parent/entry", data=b"2")), tmp_path / "t") == []
    assert (tmp_path / "t" / "no" / "parent" / "entry").read_bytes() == b"2"


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside", "a/.."])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_names_that_lead_out(tmp_path: Path, name: str, kind: bytes) -> None:
    with pytest.raises(ServerError, match="unsafe"):
        unpack(tar(member(name, kind, "x")), tmp_path / "t")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("link", ["/etc", "..", "../x", "a/..", "a/../..", "./../x", ""])
def test_links_that_lead_out_are_left_out(tmp_path: Path, link: str) -> None:
    assert unpack(tar(member("here", tarfile.SYMTYPE, link)), tmp_path / "t") == ["here"]
    assert not os.path.lexists(tmp_path / "t" / "here")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "t"
    target.mkdir()
    (target / "old").symlink_to(outside)  # stood there before
    with pytest.raises(ServerError, match="leads out"):
        unpack(tar(member("old/file", data=b"x")), target)
    # A link of the archive itself comes last, so that a file "behind" it makes a folder of that name first.
    with pytest.raises(InvalidConfig):
        unpack(tar(member("d", tarfile.SYMTYPE, "."), member("d/file", data=b"x")), tmp_path / "t2")
    assert list(outside.iterdir()) == []


def test_chains_of_links_stay_inside(tmp_path: Path) -> None:
    file = tar(
        member("a/b/", tarfile.DIRTYPE),
        member("a/b/here", tarfile.SYMTYPE, "."),
        member("a/b/up", tarfile.SYMTYPE, "here/../../.."),
        member("a/b/top", tarfile.SYMTYPE, "../.."),
        member("a/b/over", tarfile.SYMTYPE, "../../.."),
    )
    assert unpack(file, tmp_path / "t") == ["a/b/up", "a/b/over"]
    root = (tmp_path / "t").resolve()
    for path in root.rglob("*"):
        assert path.resolve().is_relative_to(root)


def test_files_replace_links_and_are_not_written_through_them(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("old")
    target = tmp_path / "t"
    target.mkdir()
    (target / "file").symlink_to(victim)
    unpack(tar(member("file", data=b"new")), target)
    assert victim.read_text() == "old" and (target / "file").read_text() == "new"


def test_special_files_and_set_id_bits(tmp_path: Path) -> None:
    info, data = member("suid", data=b"x")
    info.mode = 0o4755
    left = unpack(tar((info, data), member("fifo", tarfile.FIFOTYPE), member("dev", tarfile.CHRTYPE)), tmp_path / "t")
    assert left == ["fifo", "dev"]
    assert (tmp_path / "t" / "suid").stat().st_mode & 0o7777 == 0o755


def test_a_broken_archive(tmp_path: Path) -> None:
    whole = tar(member("a", data=b"x" * 5000)).getvalue()
    with pytest.raises(ServerError, match="broken"):
        unpack(io.BytesIO(whole[:2000]), tmp_path / "t")
    with pytest.raises(ServerError, match="broken"):
        unpack(io.BytesIO(b"no tar at all" * 100), tmp_path / "t")


def test_a_file_that_arrives_replaces_the_old_one_at_its_end(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "file"
    incoming = Incoming(target)
    incoming.write(b"new")
    assert not target.exists()
    incoming.keep()
    assert target.read_bytes() == b"new"
    incoming = Incoming(target)
    incoming.write(b"half")
    incoming.drop()
    assert [path.name for path in target.parent.iterdir()] == ["file"] and target.read_bytes() == b"new"


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * (3 << 20))
    seen: list[int] = []
    source = FileSource(tmp_path / "f", seen.append)
    assert source.size == 3 << 20
    assert sum(map(len, source.chunks())) == 3 << 20 == sum(seen)
    assert sum(map(len, source.chunks())) == 3 << 20  # again, for a request that is sent again
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "missing")
    with pytest.raises(InvalidConfig):
        FolderSource(tmp_path / "missing")
