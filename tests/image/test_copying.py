"""Layers that are written over others: where COPY goes, what it keeps, and that no link leads out of anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.image.image_archives import entry, tar

from rock.errors import ImageError, InvalidConfig, NotFound, Unsupported
from rock.images.copy import Copy, Owner, digest_of, is_archive, owner_of, sources
from rock.images.layers.views import Merged
from rock.images.layers.writer import LayerWriter

ROOT = os.geteuid() == 0


def layer(folder: Path, files: dict[str, str | None], links: dict[str, str] | None = None) -> str:
    """A layer's folder: text of files, None for folders; targets of links."""
    folder.mkdir()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_text(text)
    for name, target in (links or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    return str(folder)


def whiteout(folder: str, name: str) -> None:
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mknod(path, stat.S_IFCHR, 0)
    except PermissionError:
        pytest.skip("this host does not let an ordinary user make whiteouts")


def names(tree: Merged, path: bytes) -> list[bytes]:
    node = tree.find(path)
    assert node is not None
    return [found.name for found in tree.entries(node)]


def test_layers_are_merged(tmp_path: Path) -> None:
    low = layer(tmp_path / "low", {"a/one": "1", "a/two": "2", "b/x": "x", "file": "f", "c/d": None}, {"l": "a"})
    top = layer(tmp_path / "top", {"a/two": "new", "b/y": "y", "c": "now a file"})
    whiteout(top, "a/one")
    os.setxattr(f"{top}/b", "user.overlay.opaque", b"y")
    tree = Merged([top, low])
    assert names(tree, b"/") == [b"a", b"b", b"c", b"file", b"l"]
    assert names(tree, b"/a") == [b"two"] and tree.text(b"/l/two") == "new"
    assert names(tree, b"b") == [b"y"], "an opaque folder hides what is below"
    assert tree.find(b"/a/one") is None is tree.find(b"/b/x") is tree.find(b"/c/d")
    found = tree.find(b"/c")
    assert found is not None and found.is_file
    link = tree.find(b"/l", follow=False)
    assert link is not None and link.is_link
    with pytest.raises(NotFound):
        tree.text(b"/a")


_PASSWD = f"me:x:7:8::/:/\nodd:x:\u00b2:8::/:/\nlong:x:{'9' * 5000}:8::/:/\n"


def test_links_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the machine")
    links = {"up": "../../../../../../secret", "abs": "/etc", "here": str(tmp_path / "secret"), "round": "round2",
             "round2": "round", "a/rel": "../b", "dots": "a/../b/./in"}  # fmt: skip
    tree = Merged([layer(tmp_path / "layer", {"b/in": "b", "etc/passwd": _PASSWD, "a/z": ""}, links)])
    for path in (b"/up", b"/here", b"../secret", b"/a/rel/../../secret"):
        assert tree.find(path) is None
    assert tree.text(b"/abs/passwd").startswith("me:") and tree.text(b"/a/rel/in") == "b" == tree.text(b"dots")
    with pytest.raises(ImageError, match="form a loop"):
        tree.find(b"/round")
    assert owner_of("me", tree) == Owner(7, 7) and owner_of("5:6", tree) == Owner(5, 6)
    for wrong in ("nobody", "me:nobody", "", ":", "-1", "99999999999", "odd", "long"):
        with pytest.raises(NotFound):
            owner_of(wrong, tree)


def copied(tmp_path: Path, below: str, context: str, patterns: list[str], target: str, **more: object) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    with LayerWriter(str(out)) as writer:
        copy = Copy(Merged([below]), writer, **more)  # type: ignore[arg-type]
        copy.put(sources(Merged([context]), patterns), target.encode())
        writer.finish()
    return out


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("patterns", "target", "expected"),
    [
        (["one"], "/new", ["new"]),
        (["one"], "/new/", ["new", "new/one"]),
        (["one"], "/there", ["there", "there/one"]),
        (["one"], "/link", ["there", "there/one"]),
        (["one"], "/link/sub/x", ["there", "there/sub", "there/sub/x"]),
        (["dir"], "/new", ["new", "new/deep", "new/deep/f", "new/g"]),
        (["dir/"], "/there/", ["there", "there/deep", "there/deep/f", "there/g"]),
        (["dir", "one"], "/new/", ["new", "new/deep", "new/deep/f", "new/g", "new/one"]),
        (["*.txt", "o?e"], "/new/", ["new", "new/a.txt", "new/b.txt", "new/one"]),
        (["d*/deep"], "/new", ["new", "new/f"]),
        (["ln"], "/new", ["new"]),
        (["."], "/new", None),
        (["../../one"], "/new", ["new"]),
    ],
)
def test_where_it_goes(tmp_path: Path, patterns: list[str], target: str, expected: list[str] | None) -> None:
    context = layer(tmp_path / "context", {"one": "1", "a.txt": "a", "b.txt": "b", "dir/deep/f": "f", "dir/g": "g"},
                    {"ln": "one"})  # fmt: skip
    below = layer(tmp_path / "below", {"there/old": "o"}, {"link": "there"})
    out = copied(tmp_path, below, context, patterns, target)
    if expected is None:
        assert len(listed(out)) == 9
    else:
        assert listed(out) == expected
    if patterns == ["ln"]:
        assert (out / "new").read_text() == "1" and not (out / "new").is_symlink()


def test_a_folder_goes_through_links_and_folders_keep_what_they_are(tmp_path: Path) -> None:
    files: dict[str, str | None] = {"root/bin/tool": "t", "root/etc/conf": "c"}
    context = layer(tmp_path / "context", files, {"root/etc/link": "/etc/passwd"})
    below = layer(tmp_path / "below", {"usr/bin/sh": "sh", "etc/passwd": "p"}, {"bin": "usr/bin"})
    os.chmod(f"{below}/etc", 0o700)
    os.chmod(f"{below}/usr", 0o711)
    out = copied(tmp_path, below, context, ["root"], "/", owner=Owner(3, 4), mode=0o640)
    assert listed(out) == ["etc", "etc/conf", "etc/link", "usr", "usr/bin", "usr/bin/tool"]
    assert (out / "etc").stat().st_mode & 0o777 == 0o700 and (out / "usr").stat().st_mode & 0o777 == 0o711
    assert (out / "etc/conf").stat().st_mode & 0o777 == 0o640
    assert os.readlink(out / "etc/link") == "/etc/passwd"
    if ROOT:
        info = (out / "etc/conf").lstat()
        assert (info.st_uid, info.st_gid) == (3, 4) and (out / "etc").stat().st_uid == 0


@pytest.mark.parametrize(
    ("patterns", "target", "kind", "match"),
    [
        (["nothing"], "/x", NotFound, "no 'nothing' to copy"),
        (["*.none"], "/x", NotFound, "none"),
        (["a", "b"], "/x", InvalidConfig, "several files"),
        (["a"], "/file/x", InvalidConfig, "not a folder"),
        (["dir"], "/file", InvalidConfig, "not a folder"),
        (["over"], "/", InvalidConfig, "cannot replace the folder"),
        (["out"], "/x", NotFound, "no 'out'"),
        (["a"], "/loop/x", ImageError, "form a loop"),
        (["a"], "/shown/x", Unsupported, "/shown/x"),
    ],
)
def test_what_cannot_be(tmp_path: Path, patterns: list[str], target: str, kind: type[Exception], match: str) -> None:
    context = layer(tmp_path / "context", {"a": "", "b": "", "dir/x": "", "over/there": ""}, {"out": "/etc/hostname"})
    below = layer(tmp_path / "below", {"file": "f", "there/old": "o", "shown": None}, {"loop": "loop"})

    def refused(parts: tuple[bytes, ...]) -> None:
        if parts[:1] == (b"shown",) and len(parts) > 1:
            raise Unsupported("/" + b"/".join(parts).decode())

    with pytest.raises(kind, match=match):
        copied(tmp_path, below, context, patterns, target, refused=refused)


def test_the_digest_is_of_what_is_copied(tmp_path: Path) -> None:
    context = layer(tmp_path / "context", {"a/x": "1", "a/y": "2", "b": "3"})
    tree = Merged([context])

    def now(*patterns: str) -> str:
        return digest_of(sources(tree, patterns))

    first = now("a")
    os.utime(f"{context}/a/x", (1, 1))
    Path(context, "b").write_text("other")
    assert now("a") == first, "times, and what is not copied, do not count"
    Path(context, "a/x").write_text("new")
    second = now("a")
    os.chmod(f"{context}/a/y", 0o755)
    third = now("a")
    Path(context, "a/y").rename(f"{context}/a/z")
    assert len({first, second, third, now("a")}) == 4


def test_archives_are_unpacked(tmp_path: Path) -> None:
    context = layer(tmp_path / "context", {})
    Path(context, "it.tar").write_bytes(tar([entry("bin/tool", b"t"), entry("new/x", b"x"), entry("../out", b"evil")]))
    Path(context, "good.tar").write_bytes(tar([entry("bin/tool", b"t"), entry("new/x", b"x")]))
    Path(context, "plain").write_text("x" * 1000)
    below = layer(tmp_path / "below", {"usr/bin/sh": "sh"}, {"bin": "usr/bin"})
    tree = Merged([context])
    good, plain, bad = sources(tree, ["good.tar", "plain", "it.tar"])
    assert is_archive(good.node) and not is_archive(plain.node)
    out = tmp_path / "unpacked"
    out.mkdir()
    with LayerWriter(str(out)) as writer:
        copy = Copy(Merged([below]), writer)
        copy.unpack(good, b"/")
        with pytest.raises(ImageError, match="outside of its root"):
            copy.unpack(bad, b"/")
        writer.finish()
    assert listed(out) == ["new", "new/x", "usr", "usr/bin", "usr/bin/tool"]
