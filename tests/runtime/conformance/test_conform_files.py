"""Files of a sandbox: what they do, and what hostile paths cannot make them do."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rock import errors
from rock.runtime.base import Files, Trait
from tests.runtime.boxes import get, put, run
from tests.runtime.conformance.conftest import Bench
from tests.runtime.conformance.subject import needs

pytestmark = needs(Files)


def test_write_read_append_replace(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            path = str(b.root / "a/b/c.bin")
            blob = bytes(range(256)) * 20_000
            await put(b, path, blob)
            assert await get(b, path) == blob
            await put(b, path, b"more", append=True)
            assert (await get(b, path))[-4:] == b"more"
            await b.runtime.chmod(b.handle, path, 0o640)
            await put(b, path, b"new")
            assert await get(b, path) == b"new"
            found = await b.runtime.stat(b.handle, path)
            assert (found.kind, found.size, found.mode) == ("file", 3, 0o640)
            await put(b, path, b"x", mode=0o755)
            assert (await b.runtime.stat(b.handle, path)).mode == 0o755
            fresh = str(b.root / "fresh")
            await put(b, fresh, b"")
            assert (await b.runtime.stat(b.handle, fresh)).mode == 0o644
            assert [entry.name for entry in await b.runtime.list(b.handle, str(b.root / "a/b"))] == ["c.bin"]

    run(main())


def test_replacing_is_atomic_and_can_be_aborted(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            path = str(b.root / "file")
            await put(b, path, b"old")
            fd, token = await b.runtime.open_write(b.handle, path)
            os.write(fd, b"half")
            assert await get(b, path) == b"old"
            os.close(fd)
            await b.runtime.abort_write(b.handle, token)
            await b.runtime.abort_write(b.handle, token)
            assert await get(b, path) == b"old"
            assert [entry.name for entry in await b.runtime.list(b.handle, str(b.root))] == ["file"]

    run(main())


def test_a_link_is_followed_and_its_target_replaced(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            await put(b, str(b.root / "target"), b"old")
            await b.runtime.symlink(b.handle, "target", str(b.root / "link"))
            await put(b, str(b.root / "link"), b"new")
            assert await get(b, str(b.root / "target")) == b"new"
            link = await b.runtime.stat(b.handle, str(b.root / "link"), follow=False)
            assert (link.kind, link.target) == ("symlink", "target")

    run(main())


def test_folders(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            runtime, handle, root = b.runtime, b.handle, b.root
            await runtime.make_dir(handle, str(root / "x/y/z"), mode=0o700)
            await runtime.make_dir(handle, str(root / "x/y/z"))
            assert (await runtime.stat(handle, str(root / "x/y/z"))).mode == 0o700
            with pytest.raises(errors.Conflict):
                await runtime.make_dir(handle, str(root / "x"), parents=False)
            with pytest.raises(errors.NotFound):
                await runtime.make_dir(handle, str(root / "q/r"), parents=False)
            await put(b, str(root / "x/file"), b"1")
            with pytest.raises(errors.Conflict):
                await runtime.remove(handle, str(root / "x"))
            with pytest.raises(errors.Conflict):
                await runtime.list(handle, str(root / "x/file"))
            with pytest.raises(errors.InvalidConfig):
                await runtime.open_read(handle, str(root / "x"))
            with pytest.raises(errors.InvalidConfig):
                await runtime.open_write(handle, str(root / "x"))
            await runtime.move(handle, str(root / "x"), str(root / "w"))
            assert [(e.name, e.kind) for e in await runtime.list(handle, str(root / "w"))] == [
                ("file", "file"), ("y", "directory")]
            await runtime.remove(handle, str(root / "w"), recursive=True)
            with pytest.raises(errors.NotFound, match="/w"):
                await runtime.stat(handle, str(root / "w"))
            with pytest.raises(errors.NotFound):
                await runtime.remove(handle, str(root / "w"))
            with pytest.raises(errors.InvalidConfig):
                await runtime.remove(handle, "/", recursive=True)
            for path in ("relative", "", "/a\0b"):
                with pytest.raises(errors.InvalidConfig):
                    await runtime.stat(handle, path)

    run(main())


def test_large_folders_come_in_pages(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            folder = b.root / "many"
            await b.sh(f"mkdir {folder}; cd {folder}; seq -f 'name-%05g-{'x' * 100}' 3000 | xargs touch")
            names = [entry.name[:10] for entry in await b.runtime.list(b.handle, str(folder))]
            assert names == [f"name-{i:05}" for i in range(1, 3001)]
            page = await b.runtime.list(b.handle, str(folder), offset=2990, limit=20)
            assert [entry.name[:10] for entry in page] == names[2990:]

    run(main())


def test_odd_names(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            for name in ("a b", "new\nline", "ünï", os.fsdecode(b"\xff\xfe"), "x" * 250, "-rf", "$(reboot)"):
                await put(b, str(b.root / name), name.encode("utf-8", "surrogateescape"))
                assert await get(b, str(b.root / name)) == name.encode("utf-8", "surrogateescape")
            assert len(await b.runtime.list(b.handle, str(b.root))) == 7

    run(main())


def test_modes_of_a_tree(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            await put(b, str(b.root / "t/a/file"), b"1")
            await b.runtime.symlink(b.handle, "/etc/passwd", str(b.root / "t/link"))
            before = (await b.runtime.stat(b.handle, "/etc/passwd")).mode
            await b.runtime.chmod(b.handle, str(b.root / "t"), 0o700, recursive=True)
            assert (await b.runtime.stat(b.handle, str(b.root / "t/a/file"))).mode == 0o700
            assert (await b.runtime.stat(b.handle, "/etc/passwd")).mode == before
            own = await b.runtime.stat(b.handle, str(b.root / "t"))
            owner = f"{own.uid}:{own.gid}"
            await b.runtime.chown(b.handle, str(b.root / "t"), owner, recursive=True)

    run(main())


@needs(Trait.PROGRAMS)
def test_special_files_are_refused_and_never_block(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            await b.sh(f"mkfifo {b.root}/fifo; ln -s /dev/zero {b.root}/zero; ln -s loop {b.root}/loop")
            await b.python(f"import socket;s=socket.socket(socket.AF_UNIX);s.bind({str(b.root / 'sock')!r})")
            async with asyncio.timeout(5):
                for name in ("fifo", "zero", "sock"):
                    with pytest.raises(errors.InvalidConfig):
                        await b.runtime.open_read(b.handle, str(b.root / name))
                    with pytest.raises(errors.InvalidConfig):
                        await b.runtime.open_write(b.handle, str(b.root / name))
                    with pytest.raises(errors.InvalidConfig):
                        await b.runtime.open_write(b.handle, str(b.root / name), append=True)
                with pytest.raises(errors.InvalidConfig):
                    await b.runtime.open_read(b.handle, str(b.root / "loop"))
            assert (await b.runtime.stat(b.handle, str(b.root / "fifo"))).kind == "fifo"
            assert (await b.runtime.stat(b.handle, str(b.root / "zero"))).kind == "device"

    run(main())


@needs(Trait.ROOT, Trait.PROGRAMS)
def test_links_never_lead_out(box: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")

    async def main() -> None:
        async with box() as b:
            await b.sh(f"ln -s {secret} abs; ln -s ../../../../../../../../..{secret} rel; ln -s {tmp_path} dir; "
                       "ln -s /proc/1/root root; ln -s /etc/passwd name")
            for path in (f"{b.root}/abs", f"{b.root}/rel", f"{b.root}/dir/secret", str(secret)):
                with pytest.raises(errors.NotFound):
                    await b.runtime.open_read(b.handle, path)
            with pytest.raises((errors.PermissionDenied, errors.NotFound)):
                await b.runtime.open_read(b.handle, f"{b.root}/root{secret}")
            assert await get(b, f"{b.root}/name") == (await b.sh("cat /etc/passwd")).encode()
            await put(b, f"{b.root}/abs", b"inside")  # the link's target is made inside
            assert await b.sh(f"cat {secret}") == "inside"
            assert secret.read_text() == "the host's"
            await b.runtime.remove(b.handle, f"{b.root}/dir", recursive=True)
            assert tmp_path.exists()

    run(main())


@needs(Trait.USERS, Trait.PROGRAMS)
def test_users_have_their_own_rights(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            await b.sh("mkdir -m 755 alice; chown alice:alice alice; echo s > secret; chmod 600 secret")
            with pytest.raises(errors.PermissionDenied):
                await b.runtime.open_read(b.handle, f"{b.root}/secret", user="alice")
            with pytest.raises(errors.PermissionDenied):
                await b.runtime.open_write(b.handle, f"{b.root}/secret", user="alice")
            await put(b, f"{b.root}/alice/file", b"mine", user="alice")
            found = await b.runtime.stat(b.handle, f"{b.root}/alice/file")
            assert (found.uid, found.gid) == (1000, 1000)
            assert await get(b, f"{b.root}/alice/file", user="1000:1000") == b"mine"
            await put(b, f"{b.root}/alice/file", b"root was here")
            assert (await b.runtime.stat(b.handle, f"{b.root}/alice/file")).uid == 1000
            await b.runtime.make_dir(b.handle, f"{b.root}/alice/dir", user="alice")
            assert (await b.runtime.stat(b.handle, f"{b.root}/alice/dir")).uid == 1000
            await b.runtime.chown(b.handle, f"{b.root}/alice", "nobody:staff", recursive=True)
            found = await b.runtime.stat(b.handle, f"{b.root}/alice/file")
            assert (found.uid, found.gid) == (65534, 50)
            assert await b.sh("id -un; id -G; pwd; echo $HOME", user="alice", env={"PATH": "/usr/bin:/bin"}) == (
                f"alice\n1000 50\n{b.root}\n/home/alice\n")

    run(main())


@needs(Trait.PROGRAMS)
def test_deep_trees_can_be_removed(box: Bench) -> None:
    deep = "import os\nfor i in range(1200):\n os.mkdir('dddddddd'); os.chdir('dddddddd')\nopen('f','w').close()"

    async def main() -> None:
        async with box() as b:
            assert await b.python(deep) == ""
            await b.runtime.remove(b.handle, f"{b.root}/dddddddd", recursive=True)
            assert await b.runtime.list(b.handle, str(b.root)) == []
            assert await b.python(deep) == ""
            await b.sh("mkdir -p locked/in; touch locked/in/file; chmod 000 locked/in locked")

    run(main())
