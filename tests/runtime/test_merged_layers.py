"""Merged layers of snapshots: the files of a sandbox before and after, unused layers, hostile trees, restarts."""

from __future__ import annotations

import asyncio
import io
import os
import random
import re
import stat
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import pytest

from rock import errors, faults
from rock.protocol.sandbox import ArchivedFiles
from rock.runtime.namespace.layers import merger, merges
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, HandMade, namespace_runtime, run
from tests.runtime.test_frozen_files import CONFIG, child, forking, shared_folder, shell, switching

TREE = ("cd /; find work etc opt ! -type d -printf '%p %y %m %U:%G %s %T@ %l\\n' | sort; "
        "find work etc opt -type d -printf '%p %m %U:%G %T@\\n' | sort; "  # the size of a folder may differ
        "find work etc opt -type f | sort | xargs -r sha256sum; getfattr -R -h -d -m user. work 2>/dev/null")


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Merge from four layers on, all but the newest."""
    for name, value in (("MERGED_FROM", 4), ("_KEPT", 1), ("_EVERY", 1)):
        monkeypatch.setattr(merges, name, value)
    yield
    faults.arm("")


def operations(chance: random.Random) -> str:
    """A script of random changes below /work, /etc and /opt; each one may fail."""
    names = [f"{top}/{a}{b}" for top in ("/work", "/etc", "/opt") for a in "ab" for b in ("", "/x", "/x/y", "/z")]
    one, two = chance.sample(names, 2)
    kinds = (
        f"mkdir -p {one}", f"mkdir -p {one}; echo $RANDOM > {one}/file; echo $RANDOM >> {one}/log", f"rm -rf {one}",
        f"rm -rf {one}; mkdir -p {one}; echo new > {one}/only", f"rm -rf {one}; echo file > {one}",
        f"mv -T {one} {two}", f"ln {one}/file {two}/hard", f"ln -sfn {two} {one}",
        f"chmod {chance.choice('57')}51 {one}",
        f"touch -d @{chance.randrange(10**9)} {one}", f"mkfifo {one}/fifo", f"truncate -s 100k {one}/sparse",
        f"rm -f {one}/file; rm -f {two}/log", f"setfattr -n user.note -v {chance.randrange(99)} {one}",
        f"cp -a {one} {two}/copy", "rm -rf /etc/group; echo g > /etc/passwd2", f"chown 1000:1000 {one}",
    )  # fmt: skip
    return chance.choice(kinds)


async def deep(runtime: NamespaceRuntime, box: Box, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        await box.sh(f"echo {number} > n{number}; rm -f n{number - 3}")
        await runtime.checkpoint(box.handle, f"{number:032x}", "switch")
        await idle(runtime)


async def idle(runtime: NamespaceRuntime) -> None:
    """Wait for the merges in progress."""
    await asyncio.gather(*runtime._snapshots.merges._running.values())
    await runtime._snapshots.collected()


def folders(runtime: NamespaceRuntime) -> set[str]:
    return set(os.listdir(runtime._run_dir / "snapshots"))


@switching
@pytest.mark.parametrize("seed", range(3))
def test_the_files_are_the_same_on_merged_layers(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    images = HandMade(tmp_path / "image")
    for name in ("opt/a/x/y", "opt/b/z", "etc/a/x"):
        (images.layer / name).mkdir(parents=True)
        (images.layer / name / "file").write_text(f"image {name}\n")

    async def main() -> None:
        async with forking(tmp_path, images) as (runtime, box):
            before, least = list[str](), 99
            for number in range(14):
                script = "; ".join(f"({operations(chance)}) 2>&1" for _ in range(12))
                await box.sh(script)
                before.append(await box.sh(TREE))
                taken = await runtime.checkpoint(box.handle, f"{number:032x}", "switch")
                least = min(least, taken.layers) if number > 6 else 99
                assert await box.sh(TREE) == before[-1], f"after checkpoint {number}"
                await idle(runtime)
            assert least <= 4 and max(map(len, before)) > 1000
            for number in (3, 8, 13):
                assert await child(runtime, f"{number:032x}", TREE) == before[number].strip(), number

    run(main(), timeout=180)


@switching
def test_a_sandbox_has_any_number_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "MERGED_FROM", 32)
    monkeypatch.setattr(merges, "_KEPT", 8)
    monkeypatch.setattr(merges, "_EVERY", 8)

    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            sh = await shell(box, "exec 7>>log")
            layers = []
            for number in range(80):
                os.write(sh.stdin or 0, f"echo {number} >&7\n".encode())
                taken = await runtime.checkpoint(box.handle, f"{number:032x}", "switch")
                layers.append(taken.layers)
                if number > 2:
                    await runtime.drop_snapshot(f"{number - 2:032x}")
            await idle(runtime)
            assert max(layers) <= 45 and min(layers[40:]) < 20, layers
            await asyncio.sleep(0.2)
            assert await child(runtime, f"{79:032x}", "wc -l < log") in ("79", "80")
            assert len(folders(runtime)) < 2 * max(layers)

    run(main(), timeout=120)


@switching
def test_merged_layers_live_as_long_as_their_users(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await deep(runtime, box, 4)
            assert len(folders(runtime)) == 5, "four snapshots and a merged layer"
            await deep(runtime, box, 1, first=4)
            assert len(runtime._snapshots.layers(box.handle.data["slot"])) == 3
            handle = await runtime.create("other", CONFIG.model_copy(update={"snapshot": f"{4:032x}"}))
            for number in range(5):
                await runtime.drop_snapshot(f"{number:032x}")
            assert len(folders(runtime)) == 3, "the layers of two sandboxes"
            other = Box(runtime, handle, Path("/work"))
            assert await other.sh("ls") == await box.sh("ls") == "n2\nn3\nn4\n"
            other.close()
            await runtime.destroy(handle)

    run(main())


@switching
def test_whiteouts_without_effect_are_not_kept(tmp_path: Path) -> None:
    images = HandMade(tmp_path / "image")
    (images.layer / "work/of-image").write_text("x")

    async def main() -> None:
        async with forking(tmp_path, images) as (runtime, box):
            await box.sh("touch a b c; mkdir d; touch d/e")
            await runtime.checkpoint(box.handle, f"{0:032x}", "switch")
            await box.sh("rm -r a b d of-image; mkdir d; touch d/f")
            for number in range(1, 5):
                await runtime.checkpoint(box.handle, f"{number:032x}", "switch")
                await idle(runtime)
            merged = runtime._snapshots.layers(box.handle.data["slot"])[-1]
            top = runtime._run_dir / "snapshots" / merged / "upper/work"
            assert sorted(os.listdir(top)) == ["c", "d", "of-image"]
            assert stat.S_ISCHR(os.lstat(top / "of-image").st_mode)
            assert os.listdir(top / "d") == ["f"]
            assert await box.sh("ls; ls d") == "c\nd\nf\n"

    run(main())


@switching
def test_folders_of_the_machine_are_merged_too(tmp_path: Path) -> None:
    images = HandMade(tmp_path / "image")
    shared = shared_folder(tmp_path, images)

    async def main() -> None:
        async with forking(tmp_path, images) as (runtime, box):
            await box.sh("echo a > /shared/below/a; rm /shared/file")
            for number in range(6):
                await box.sh(f"echo {number} >> /shared/below/log; rm -f /shared/old; echo {number} > /shared/new")
                await runtime.checkpoint(box.handle, f"{number:032x}", "switch")
                await idle(runtime)
            assert len(runtime._snapshots.layers(box.handle.data["slot"])) < 5
            assert await box.sh("cd /shared; find . | sort; cat new below/log below/a | tr '\\n' ' '") == \
                ".\n./below\n./below/a\n./below/log\n./new\n5 0 1 2 3 4 5 a "
        assert (shared / "file").read_text() == "host\n" and os.listdir(shared / "below") == []

    run(main())


@switching
def test_a_stopped_server_loses_no_layer(tmp_path: Path) -> None:
    """The server ends after a switch to merged layers, before it recorded them: they are found in the journal."""

    async def main() -> None:
        images = HandMade(tmp_path / "image")
        async with namespace_runtime(tmp_path, images=images) as runtime:
            handle = await runtime.create("box", CONFIG)
            box = Box(runtime, handle, Path("/work"))
            await deep(runtime, box, 4)
            faults.arm("namespace.checkpoint.switched=error")
            with pytest.raises(errors.RockError):
                await runtime.checkpoint(handle, "f" * 32, "switch")
            faults.arm("")
            box.close()
        async with namespace_runtime(tmp_path, images=images) as runtime:
            await runtime.recover(handle)
            box = Box(runtime, handle, Path("/work"))
            assert len(runtime._snapshots.layers(handle.data["slot"])) == 3
            for number in range(4):
                await runtime.drop_snapshot(f"{number:032x}")
            assert len(folders(runtime)) == 3
            assert await box.sh("ls; cat n1 n2 n3; rm n1; ls") == "n1\nn2\nn3\n1\n2\n3\nn2\nn3\n"
            await runtime.checkpoint(handle, "e" * 32, "switch")
            assert await child(runtime, "e" * 32, "ls") == "n2\nn3"
            await idle(runtime)
            box.close()
            await runtime.destroy(handle)
            await runtime.drop_snapshot("e" * 32)
            assert not (runtime._run_dir / "snapshots").exists()

    run(main())


@switching
@pytest.mark.parametrize("point", ["made", "done"])
def test_a_failed_merge_changes_nothing(tmp_path: Path, point: str) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            faults.arm(f"namespace.merge.{point}=error")
            await deep(runtime, box, 6)
            assert len(runtime._snapshots.layers(box.handle.data["slot"])) == 6
            assert len(folders(runtime)) == 6, "no incomplete layer is left"
            faults.arm("")
            await deep(runtime, box, 2, first=6)
            assert len(runtime._snapshots.layers(box.handle.data["slot"])) == 3
            assert await box.sh("ls | tr '\\n' ' '") == "n5 n6 n7 "

    run(main())


@switching
def test_a_runtime_that_closes_ends_its_merge(tmp_path: Path) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            faults.arm("namespace.merge.made=stall:30")
            for number in range(4):
                await runtime.checkpoint(box.handle, f"{number:032x}", "switch")
            assert runtime._snapshots.merges._running
            async with asyncio.timeout(5):
                await runtime._snapshots.merges.close()
            assert not runtime._snapshots.merges._running
            faults.arm("")

    run(main())


# ---- the program that merges ----


def merged(tmp_path: Path, *sources: Path, below: Path | None = None) -> Path:
    (tmp_path / "none").mkdir(exist_ok=True)
    target = tmp_path / "merged"
    target.mkdir(0o755)
    opened = [os.open(one, os.O_RDONLY | os.O_DIRECTORY) for one in (target, *sources)]
    place = os.open(below or tmp_path / "none", os.O_PATH | os.O_DIRECTORY)
    try:
        merger.Merger([place], "user.overlay.").merge(opened[1:], opened[0])
    finally:
        for fd in (*opened, place):
            os.close(fd)
    return target


def test_links_of_a_guest_are_not_followed(tmp_path: Path) -> None:
    outside, new, old = (tmp_path / name for name in ("outside", "new", "old"))
    for folder in (outside, new / "d", old):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (old / "d").symlink_to(outside)  # hidden by the folder of the newer layer
    (new / "link").symlink_to(outside)
    (new / "d/inner").symlink_to("../../outside/secret")
    top = merged(tmp_path, new, old)
    assert sorted(os.listdir(top)) == ["d", "link"] and os.listdir(top / "d") == ["inner"]
    assert (top / "link").is_symlink() and (top / "d/inner").is_symlink()
    assert os.getxattr(top / "d", "user.overlay.opaque") == b"y"


def test_limits_of_hostile_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, deep_one = tmp_path / "wide", tmp_path / "deep"
    wide.mkdir()
    for number in range(20):
        (wide / str(number)).touch()
    monkeypatch.setattr(merger, "MOST_ENTRIES", 19)
    with pytest.raises(merger.Refused, match="more than 19 files"):
        merged(tmp_path, wide)
    (tmp_path / "merged").rmdir()
    monkeypatch.setattr(merger, "MOST_ENTRIES", 1000)
    below = deep_one
    for _ in range(merger.DEEPEST + 1):
        below = below / "d"
    below.mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(merger.Refused, match="deep"):
        merged(tmp_path, deep_one)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_program_reports_what_it_cannot_merge(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(errors.Unavailable, match=r"could not be merged: .*No such file"):
            await merges.run_program(merges._MERGER, {"parts": [
                {"sources": [str(tmp_path / "missing")], "target": str(tmp_path / "t"), "below": []}],
                "overlay": "user.overlay.", "enter": False}, "merged", 10.0)  # fmt: skip

    run(main())


# ---- archives ----


async def read(parts: AsyncGenerator[bytes | ArchivedFiles]) -> tuple[bytes, ArchivedFiles]:
    data = [part async for part in parts]
    files = data.pop()
    assert isinstance(files, ArchivedFiles)
    return b"".join(one for one in data if isinstance(one, bytes)), files


async def stream(data: bytes) -> AsyncIterator[bytes]:
    yield data


def names(data: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return set(tar.getnames())


def test_a_child_of_a_child_is_archived(tmp_path: Path) -> None:
    """Also where files are copied, as for an ordinary user; the guest made folders unreadable."""
    config = CONFIG.model_copy(update={"auto_delete_seconds": 60})

    async def main() -> None:
        async with namespace_runtime(tmp_path, images=HandMade(tmp_path / "image")) as runtime:
            handle = await runtime.create("0", config)
            for number in range(3):
                box = Box(runtime, handle, Path("/work"))
                await box.sh(f"mkdir -p d e{number}; echo {number} >> log; rm -rf e{number - 1}; "
                             f"echo {number} > d/{number}; rm -rf d/{number - 2}; touch e{number}/f; "
                             f"chmod 0 e{number}; ln -s d l{number}")
                await runtime.checkpoint(handle, f"{number:032x}", "auto")
                box.close()
                await runtime.destroy(handle)
                handle = await runtime.create(str(number + 1),
                                              config.model_copy(update={"snapshot": f"{number:032x}"}))
            kept = await runtime.rest(handle)
            data, files = await read(runtime.pack(kept, 1 << 30))
            await runtime.destroy(kept)
            for number in range(3):
                await runtime.drop_snapshot(f"{number:032x}")
            assert not (runtime._run_dir / "snapshots").exists()
            woken = await runtime.wake(await runtime.unpack("again", config, files, stream(data)), config)
            again = Box(runtime, woken, Path("/work"))
            assert await again.sh("find . | sort; stat -c %a e2; cat log d/*") == \
                ".\n./d\n./d/1\n./d/2\n./e2\n./e2/f\n./l0\n./l1\n./l2\n./log\n0\n0\n1\n2\n1\n2\n"
            again.close()
            await runtime.destroy(woken)

    run(main())


@switching
def test_a_sandbox_on_layers_is_archived_and_committed(tmp_path: Path) -> None:
    chance = random.Random(7)
    config = CONFIG.model_copy(update={"auto_delete_seconds": 60})

    async def main() -> None:
        async with namespace_runtime(tmp_path, images=HandMade(tmp_path / "image")) as runtime:
            handle = await runtime.create("box", config)
            box = Box(runtime, handle, Path("/work"))
            for number in range(6):
                await box.sh("; ".join(f"({operations(chance)}) 2>&1" for _ in range(12)))
                await runtime.checkpoint(handle, f"{number:032x}", "switch")
            await box.sh("mkdir -p w; echo last > w/last; echo $RANDOM > w/other")
            before = await box.sh(TREE)
            await idle(runtime)
            there = folders(runtime)
            committed, _ = await read(runtime.snapshot(handle, 1 << 30))
            assert await box.sh(TREE + "; touch /work/w/runs") == before
            box.close()
            kept = await runtime.rest(handle)
            data, files = await read(runtime.pack(kept, 1 << 30))
            await idle(runtime)
            assert folders(runtime) == there, "the merged layer of an archive is removed"
            assert names(committed) == names(data) - {"work/w/runs"}
            with pytest.raises(errors.InvalidConfig, match="limit of 3 bytes"):
                await read(runtime.pack(kept, 3))
            woken = await runtime.wake(await runtime.unpack("again", config, files, stream(data)), config)
            again = Box(runtime, woken, Path("/work"))
            found = await again.sh(f"rm w/runs; {TREE}")
            times = re.compile(r"(?m)^(work/w \d+ \S+) \S+$")  # its own time has changed
            assert times.sub(r"\1", found) == times.sub(r"\1", before)
            again.close()
            for one in (woken, kept):
                await runtime.destroy(one)
            for number in range(6):
                await runtime.drop_snapshot(f"{number:032x}")
            assert not (runtime._run_dir / "snapshots").exists()

    run(main(), timeout=120)
