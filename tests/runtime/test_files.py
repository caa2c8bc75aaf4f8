"""Files of a sandbox, on each runtime with our pid 1: what they do, and what hostile paths cannot make them do."""

from __future__ import annotations

import asyncio
import os
import stat

import pytest

from rock import errors
from tests.runtime.boxes import Box, Maker, namespace_box, run


async def put(box: Box, path: str, data: bytes, **options: object) -> None:
    fd, token = await box.runtime.open_write(box.handle, path, **options)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
    finally:
        os.close(fd)
    await box.runtime.commit_write(box.handle, token)


async def get(box: Box, path: str, **options: object) -> bytes:
    fd = await box.runtime.open_read(box.handle, path, **options)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def test_write_read_append_replace(box: Maker) -> None:
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


def test_replacing_is_atomic_and_can_be_aborted(box: Maker) -> None:
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


def test_a_link_is_followed_and_its_target_replaced(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            await put(b, str(b.root / "target"), b"old")
            await b.runtime.symlink(b.handle, "target", str(b.root / "link"))
            await put(b, str(b.root / "link"), b"new")
            assert await get(b, str(b.root / "target")) == b"new"
            link = await b.runtime.stat(b.handle, str(b.root / "link"), follow=False)
            assert (link.kind, link.target) == ("symlink", "target")

    run(main())


def test_folders(box: Maker) -> None:
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
            with pytest.raises(errors.Conflict):
                await runtime.open_read(handle, str(root / "x"))
            with pytest.raises(errors.Conflict):
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


def test_large_folders_come_in_pages(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            folder = b.root / "many"
            await b.sh(f"mkdir {folder}; cd {folder}; seq -f 'name-%05g-{'x' * 100}' 3000 | xargs touch")
            names = [entry.name[:10] for entry in await b.runtime.list(b.handle, str(folder))]
            assert names == [f"name-{i:05}" for i in range(1, 3001)]
            page = await b.runtime.list(b.handle, str(folder), offset=2990, limit=20)
            assert [entry.name[:10] for entry in page] == names[2990:]

    run(main())


def test_odd_names(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            for name in ("a b", "new\nline", "ünï", os.fsdecode(b"\xff\xfe"), "x" * 250, "-rf", "$(reboot)"):
                await put(b, str(b.root / name), name.encode("utf-8", "surrogateescape"))
                assert await get(b, str(b.root / name)) == name.encode("utf-8", "surrogateescape")
            assert len(await b.runtime.list(b.handle, str(b.root))) == 7

    run(main())


def test_modes_of_a_tree(box: Maker) -> None:
    async def main() -> None:
        async with box() as b:
            await put(b, str(b.root / "t/a/file"), b"1")
            await b.runtime.symlink(b.handle, "/etc/passwd", str(b.root / "t/link"))
            await b.runtime.chmod(b.handle, str(b.root / "t"), 0o700, recursive=True)
            assert (await b.runtime.stat(b.handle, str(b.root / "t/a/file"))).mode == 0o700
            assert (await b.runtime.stat(b.handle, "/etc/passwd")).mode == 0o644
            owner = f"{os.geteuid()}:{os.getegid()}" if b.root.name != "work" else "0:0"
            await b.runtime.chown(b.handle, str(b.root / "t"), owner, recursive=True)

    run(main())


def test_special_files_are_refused_and_never_block(box: Maker) -> None:
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


# ---- what only a sandbox with a root of its own can show ----


def test_links_never_lead_out(tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")

    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            await b.sh(f"ln -s {secret} abs; ln -s ../../../../../../../../..{secret} rel; ln -s {tmp_path} dir; "
                       "ln -s /proc/1/root root; ln -s /etc/hostname name")
            for path in ("/work/abs", "/work/rel", "/work/dir/secret", str(secret)):
                with pytest.raises(errors.NotFound):
                    await b.runtime.open_read(b.handle, path)
            with pytest.raises(errors.Unauthorized):
                await b.runtime.open_read(b.handle, f"/work/root{secret}")
            assert await get(b, "/work/name") == b"sandbox\n"
            await put(b, "/work/abs", b"inside")  # the link's target is made inside
            assert await b.sh(f"cat {secret}") == "inside"
            assert secret.read_text() == "the host's"
            await b.runtime.remove(b.handle, "/work/dir", recursive=True)
            assert tmp_path.exists()

    run(main())


def test_pid_1_is_closed_to_file_operations_too(tmp_path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/fd/3", "/proc/1/root/etc/passwd"):
                with pytest.raises((errors.Unauthorized, errors.NotFound)):
                    await b.runtime.open_read(b.handle, path)
            with pytest.raises((errors.Unauthorized, errors.InvalidConfig)):
                await b.runtime.open_write(b.handle, "/proc/sys/kernel/core_pattern")
            with pytest.raises(errors.Unauthorized):
                await b.runtime.open_write(b.handle, "/usr/bin/bash")
            with pytest.raises(errors.InvalidConfig):
                await b.runtime.open_read(b.handle, "/dev/null")

    run(main())


def test_users_have_their_own_rights(tmp_path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            if b.handle.isolation != "namespaces":
                pytest.skip("an ordinary user's sandbox has one user: this needs root")
            await b.sh("mkdir -m 755 alice; chown alice:alice alice; echo s > secret; chmod 600 secret")
            with pytest.raises(errors.Unauthorized):
                await b.runtime.open_read(b.handle, "/work/secret", user="alice")
            with pytest.raises(errors.Unauthorized):
                await b.runtime.open_write(b.handle, "/work/secret", user="alice")
            await put(b, "/work/alice/file", b"mine", user="alice")
            found = await b.runtime.stat(b.handle, "/work/alice/file")
            assert (found.uid, found.gid) == (1000, 1000)
            assert await get(b, "/work/alice/file", user="1000:1000") == b"mine"
            await put(b, "/work/alice/file", b"root was here")
            assert (await b.runtime.stat(b.handle, "/work/alice/file")).uid == 1000
            await b.runtime.make_dir(b.handle, "/work/alice/dir", user="alice")
            assert (await b.runtime.stat(b.handle, "/work/alice/dir")).uid == 1000
            await b.runtime.chown(b.handle, "/work/alice", "nobody:staff", recursive=True)
            found = await b.runtime.stat(b.handle, "/work/alice/file")
            assert (found.uid, found.gid) == (65534, 50)
            assert await b.sh("id -un; id -G; pwd; echo $HOME", user="alice", env={"PATH": "/usr/bin:/bin"}) == (
                "alice\n1000 50\n/work\n/home/alice\n")

    run(main())


def test_a_full_disk_is_told(tmp_path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            await b.sh("head -c 300m /dev/zero > /dev/shm/fill 2>/dev/null; seq 100000 | while read i; do "
                       "echo > /dev/shm/f$i || break; done 2>/dev/null")
            with pytest.raises(errors.StorageFull):
                await put(b, "/dev/shm/more", b"x" * 1_000_000)

    async def main_write() -> None:
        async with namespace_box(tmp_path) as b:
            fd, token = await b.runtime.open_write(b.handle, "/dev/shm/big")
            with pytest.raises(OSError, match="No space"):
                while True:
                    os.write(fd, bytes(1 << 20))
            os.close(fd)
            await b.runtime.abort_write(b.handle, token)
            assert await b.runtime.list(b.handle, "/dev/shm") == []

    run(main_write())


def test_mount_points_are_written_in_place(tmp_path) -> None:
    """What is mounted onto a file cannot be renamed over; it is written in place then."""
    from rock.runtime.image.rootfs import Bind
    from tests.runtime.boxes import HandMade

    images = HandMade(tmp_path / "image")
    outside = tmp_path / "outside"
    outside.write_text("read only")
    (images.layer / "bound").touch()
    images.binds = (*images.binds, Bind(str(outside), "/bound"))

    async def main() -> None:
        async with namespace_box(tmp_path, images) as b:
            assert await get(b, "/bound") == b"read only"
            with pytest.raises((errors.Unauthorized, errors.Conflict)):
                await put(b, "/bound", b"changed")
            assert outside.read_text() == "read only"
            assert stat.S_ISREG(outside.stat().st_mode)

    run(main())


def test_deep_trees_can_be_removed(tmp_path) -> None:
    deep = "import os\nfor i in range(1200):\n os.mkdir('dddddddd'); os.chdir('dddddddd')\nopen('f','w').close()"

    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            assert await b.python(deep) == ""
            await b.runtime.remove(b.handle, "/work/dddddddd", recursive=True)
            assert await b.runtime.list(b.handle, "/work") == []
            assert await b.python(deep) == ""
            await b.sh("mkdir -p locked/in; touch locked/in/file; chmod 000 locked/in locked")

    run(main())
