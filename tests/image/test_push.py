"""Pushing to a real registry, and writing archives: what comes back is what was sent, and nothing is sent twice."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.image.image_archives import ARCHITECTURE, docker_archive, entry, tar
from tests.image.registries import USER, Odd, docker_registry, odd_registry, push

from rock.errors import ImageError, Unauthorized, Unsupported
from rock.images.registry.client import Registry
from rock.images.registry.logins import Login
from rock.images.registry.reference import parse
from rock.images.store import ImageStore

BASE = tar([
    entry("etc", mode=0o750, uid=7, gid=8), entry("etc/old", b"old"), entry("etc/kept", b"kept" * 50_000, mode=0o4755),
    entry("gone"), entry("gone/deep", b"x"), entry("link", type=tarfile.SYMTYPE, linkname="etc/kept"),
    entry("hard", type=tarfile.LNKTYPE, linkname="etc/kept"), entry("fifo", type=tarfile.FIFOTYPE),
    entry("x" * 120, "ünï".encode(), mtime=1.5, uid=3_000_000, pax_headers={"SCHILY.xattr.user.note": "hi"}),
])  # fmt: skip
TOP = tar([entry("etc/.wh.old", b""), entry("gone"), entry("gone/.wh..wh..opq", b""), entry("gone/new", b"n"),
           entry("big", bytes(3 << 20))])  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], ImageStore]:
    """Stores of other machines, as it were."""
    made: list[ImageStore] = []

    def make() -> ImageStore:
        made.append(ImageStore(tmp_path / f"other{len(made)}"))
        return made[-1]

    return make


def tree(store: ImageStore, name: str) -> list[tuple[object, ...]]:
    """All that there is to see of an image's layers."""
    seen: list[tuple[object, ...]] = []
    for layer in store.resolve(name).layers:
        for folder, folders, files in os.walk(layer):
            for path in (Path(folder, name) for name in sorted(folders + files)):
                info = path.lstat()
                content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
                marks = [(key, os.getxattr(path, key, follow_symlinks=False))
                         for key in sorted(os.listxattr(path, follow_symlinks=False)) if key.startswith("user.")]
                seen.append((str(path.relative_to(layer)), oct(info.st_mode), info.st_uid, info.st_gid, info.st_rdev,
                             info.st_nlink if content else 0,
                             0 if stat.S_ISCHR(info.st_mode) else info.st_mtime_ns, content,
                             os.readlink(path) if path.is_symlink() else "", marks))
        seen.append(("end of layer", oct(Path(layer).stat().st_mode)))
    return sorted(seen, key=repr)


def imported(store: ImageStore, name: str, folder: Path) -> ImageStore:
    archive = docker_archive(folder / "image.tar", [BASE, TOP], [name], Env=["A=b=c"], WorkingDir="/etc", User="7:8",
                             Entrypoint=["/e", "x"], Cmd=["c"], Labels={"l": "ö"})  # fmt: skip
    store.import_any(archive)
    return store


def test_there_and_back(
    store: ImageStore, fresh: Callable[[], ImageStore], registry: str, tmp_path: Path
) -> None:
    name = f"{registry}/team/sent:1.0"
    sent = imported(store, name, tmp_path).inspect(name)
    told: list[str] = []
    digest = store.push(name, progress=told.append)
    assert [line for line in told if "to send" in line and "of 2" in line]
    other = fresh()
    back = other.pull(name)
    assert back.digest == digest and back.architecture == ARCHITECTURE
    for field in ("env", "cwd", "user", "entrypoint", "cmd", "labels"):
        assert getattr(back, field) == getattr(sent, field), field
    assert tree(other, name) == tree(store, name)
    told.clear()
    assert store.push(name, progress=told.append) == digest, "the same image is the same manifest"
    assert told == ["layer 1 of 2: is there", "layer 2 of 2: is there"]
    assert not list((store.folder / "tmp").iterdir())


def test_layers_that_were_pulled_are_not_sent_again(
    store: ImageStore, fresh: Callable[[], ImageStore], registry: str, tmp_path: Path
) -> None:
    """Not to their own repository, and not to another one of the same registry."""
    base, name = f"{registry}/library/base:1", f"{registry}/team/child:1"
    push(base, [BASE, TOP], tmp_path)
    record = store.pull(base)
    store._records.save(replace(record, name=name))  # as a commit without a change would
    told: list[str] = []
    store.push(base, progress=told.append)
    store.push(name, progress=told.append)
    assert told == ["layer 1 of 2: is there", "layer 2 of 2: is there"] * 2
    other = fresh()
    assert other.pull(name).layers == record.layers, "the layers have kept their digests"
    with docker_registry_of(tmp_path / "second") as second:  # which has nothing yet
        elsewhere = f"{second}/team/child:1"
        store._records.save(replace(record, name=elsewhere))
        told.clear()
        store.push(elsewhere, progress=told.append)
        assert len([line for line in told if "to send" in line]) == 2
        third = fresh()
        third.pull(elsewhere)
        assert tree(third, elsewhere) == tree(store, name)


def docker_registry_of(folder: Path, login: bool = False) -> AbstractContextManager[str]:
    folder.mkdir()
    return docker_registry(folder, login)


def test_a_file_and_back(store: ImageStore, fresh: Callable[[], ImageStore], tmp_path: Path) -> None:
    imported(store, "team/tool:1.0", tmp_path)
    target = tmp_path / "out.tar"
    digest = store.export("team/tool:1.0", target)
    other = fresh()
    (record,) = other.import_any(target)
    assert (record.name, record.digest) == ("team/tool:1.0", digest)
    assert tree(other, record.name) == tree(store, record.name)
    with pytest.raises(ImageError, match="exists"):
        store.export("team/tool:1.0", target)
    assert target.stat().st_size > 1000, "and it is left as it was"


def test_this_machine_is_not_sent(store: ImageStore, registry: str, tmp_path: Path) -> None:
    name = f"{registry}/team/mine:1"
    store.from_host(name)
    for work in (lambda: store.push(name), lambda: store.push("host"), lambda: store.export(name, tmp_path / "x")):
        with pytest.raises(Unsupported, match="this machine's own system"):
            work()
    assert not (tmp_path / "x").exists()


def test_logins(store: ImageStore, tmp_path: Path) -> None:
    with docker_registry_of(tmp_path / "closed", login=True) as address:
        name = f"{address}/team/tool:1"
        imported(store, name, tmp_path)
        for login in (None, Login("alice", "wrong")):
            with pytest.raises(ImageError, match="refuses"):
                store.push(name, login)
        with pytest.raises(Unauthorized, match="refuses"):
            Registry(parse(name), Login("alice", "wrong")).log_in()
        Registry(parse(name), USER).log_in()
        digest = store.push(name, USER)
        assert store.pull(name, USER).digest == digest
    with pytest.raises(ImageError, match="cannot be reached"):
        store.push(name, USER)
    assert not list((store.folder / "tmp").iterdir())


class Full(Odd):
    """Takes nothing."""

    def do_POST(self) -> None:
        self.send(403, b'{"errors": [{"code": "DENIED", "message": "quota exceeded"}]}')

    def answer(self, path: str) -> bool:
        self.send(404, b"")
        return True

    do_HEAD = Odd.do_GET


def test_what_the_registry_says_is_told(store: ImageStore, tmp_path: Path) -> None:
    with odd_registry(Full, {"x": b""}) as address:
        name = f"{address}/team/tool:1.0"
        imported(store, name, tmp_path)
        with pytest.raises(ImageError, match="quota exceeded"):
            store.push(name)
    assert store.resolve(name)
