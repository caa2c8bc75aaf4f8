"""Folders in and out of a sandbox: small files pass in batches, large ones and odd ones by themselves."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from tests.conftest import RunningServer

from rock.errors import ClientError, InvalidConfig, StorageFull
from rock.guest.init.files import BATCH, BATCH_ENTRIES
from rock.protocol.formats import tar
from rock.sync import Sandbox, SandboxConfig


def tree_of(root: Path) -> dict[str, bytes | str | None]:
    """What is in a folder: contents, targets of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def packed(*entries: tuple[str, bytes, bytes]) -> io.BytesIO:
    """A tar of (name, kind, content or target)."""
    parts = []
    for name, kind, content in entries:
        size = len(content) if kind == tar.FILE else 0
        target = content.decode() if kind == tar.LINK else ""
        parts.append(tar.header(name, kind, 0o755 if kind == tar.FOLDER else 0o640, 1e9, size, target))
        if kind == tar.FILE:
            parts.append(content + tar.padding(size))
    return io.BytesIO(b"".join(parts) + tar.END)


def test_a_mixed_tree_is_the_same_after_both_ways(sandbox: Sandbox, tmp_path: Path) -> None:
    """Sizes around the limits of a batch, names that are no ASCII, long or not UTF-8, empty folders, links."""
    source, rng = tmp_path / "source", random.Random(3)
    for folder in ("a/b/c", "empty", "x" * 120, "ü"):
        (source / folder).mkdir(parents=True)
    for number in range(3 * BATCH_ENTRIES):
        size = rng.choice([0, 1, 511, 512, 513, 5000, BATCH - 1, BATCH, BATCH + 1, 300_000])
        place = source / rng.choice(["a", "a/b", "a/b/c", "x" * 120, "ü"]) / f"f{number}"
        place.write_bytes(rng.randbytes(size))
        place.chmod(rng.choice([0o600, 0o644, 0o755]))
    (source / os.fsdecode(b"not\xffutf8")).write_bytes(b"1")
    (source / "link").symlink_to("a/b")
    (source / "dangling").symlink_to("nowhere")
    sandbox.fs.upload_dir(source, "/tmp/tree", check="raise")
    fetched = tmp_path / "fetched"
    assert sandbox.fs.download_dir("/tmp/tree", fetched) == []
    assert tree_of(fetched) == tree_of(source)
    for path in source.rglob("f*"):
        if path.is_file():
            assert (fetched / path.relative_to(source)).stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    assert sandbox.arun("find /tmp/tree -name '*.part'").output == ""


def test_files_that_are_there_are_replaced_as_by_a_write(sandbox: Sandbox) -> None:
    sandbox.arun("mkdir -p /tmp/t/folder; cd /tmp/t; echo old > file; echo far > far; chmod 600 far; ln -s far link")
    inode = sandbox.arun("stat -c %i file").output
    sandbox.fs.unpack(packed(("file", tar.FILE, b"new\n"), ("link", tar.FILE, b"by the link\n")), "/tmp/t")
    assert sandbox.arun("cat file far; readlink link; stat -c %a far").output == "new\nby the link\nfar\n640\n"
    assert sandbox.arun("stat -c %i file").output != inode, "a reader of the old file sees it whole"
    for entry in (("folder", tar.FILE, b"x"), ("file/below", tar.FILE, b"x")):
        with pytest.raises(ClientError, match=r"folder|[Nn]ot a directory|exists"):
            sandbox.fs.unpack(packed(entry), "/tmp/t")
    sandbox.fs.unpack(packed(("link", tar.LINK, b"file")), "/tmp/t")
    assert sandbox.arun("cat link").output == "new\n"


def test_a_link_of_the_archive_is_followed_inside_only(sandbox: Sandbox, tmp_path: Path) -> None:
    """A link, and a file below it: what is written is written inside the sandbox."""
    outside = tmp_path / "outside"
    outside.mkdir()
    sandbox.fs.unpack(packed(("l", tar.LINK, str(outside).encode()), ("l/file", tar.FILE, b"x")), "/tmp/t")
    assert not list(outside.iterdir())
    assert sandbox.fs.read(f"{outside}/file") == b"x"


def test_the_files_before_a_broken_entry_stay(sandbox: Sandbox) -> None:
    source = packed(("one", tar.FILE, b"1"), ("../two", tar.FILE, b"2"))
    with pytest.raises(InvalidConfig, match="outside of its root"):
        sandbox.fs.unpack(source, "/tmp/t")
    cut = packed(*((f"f{number}", tar.FILE, b"y" * 900) for number in range(100))).getvalue()
    with pytest.raises(InvalidConfig, match="cannot be unpacked"):
        sandbox.fs.unpack(io.BytesIO(cut[:50_000]), "/tmp/t")
    found = sandbox.arun("cd /tmp/t && ls -A").output.split()
    assert "two" not in found and not [name for name in found if name.endswith(".part")]
    assert all(len(sandbox.fs.read(f"/tmp/t/{name}")) == 900 for name in found if name.startswith("f"))


def test_a_full_disk_is_reported_and_leaves_no_parts(server: RunningServer) -> None:
    config = SandboxConfig(base_url=server.url, image="host", memory="256m", network="none", shm_size="1m")
    with Sandbox(config) as sandbox:
        with pytest.raises(StorageFull):
            many = packed(*((f"f{number}", tar.FILE, b"y" * 9000) for number in range(400)))
            sandbox.fs.unpack(many, "/dev/shm/t")
        assert sandbox.arun("find /dev/shm -name '*.part'").output == ""


def test_special_files_and_changing_files(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.arun("mkdir -p /tmp/t && cd /tmp/t && mkfifo pipe && echo 1 > plain && ln -s /proc/self/environ secret "
                 "&& for i in $(seq 200); do echo $i > f$i; done")  # fmt: skip
    sandbox.processes.start("while :; do for i in 1 2 3; do head -c $RANDOM /dev/zero > /tmp/t/f$i; done; done")
    for number in range(5):
        target = tmp_path / str(number)
        left_out = sandbox.fs.download_dir("/tmp/t", target)
        assert left_out == ["secret"]
        assert len(list(target.iterdir())) == 201 and (target / "f200").read_text() == "200\n"


def test_plain_headers_are_those_of_tarfile() -> None:
    """Byte by byte, where the name and the numbers fit."""
    rng = random.Random(7)
    for _ in range(300):
        name = "".join(rng.choice("abc/. -_é\udcff") for _ in range(rng.choice([1, 5, 99, 100, 101, 300])))
        kind = rng.choice([tar.FILE, tar.FOLDER, tar.LINK])
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime = kind, rng.choice([0, 0o644, 0o7777]), rng.choice([0, 1, 2_000_000_000])
        info.size = rng.choice([0, 5, 8**11 - 1, 8**11]) if kind == tar.FILE else 0
        info.uid = info.gid = rng.choice([0, 1000, 8**7 - 1, 8**7])
        info.linkname = "a/b" if kind == tar.LINK else ""
        made = tar.header(name, kind, info.mode, info.mtime, info.size, info.linkname, info.uid, info.gid)
        assert made == info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        assert tarfile.TarInfo.frombuf(made[-tar.BLOCK:], "utf-8", "surrogateescape").type == kind
        with tarfile.open(fileobj=io.BytesIO(made + tar.END), mode="r:") as archive:
            if info.size == 0:
                [read] = archive.getmembers()
                assert (read.mode, read.mtime, read.uid) == (info.mode, info.mtime, info.uid)
                assert read.name.rstrip("/") == name.rstrip("/")
                assert read.linkname == info.linkname
