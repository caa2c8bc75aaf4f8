"""Sandboxes at rest, as the runtime has them: what a guest may have left in their way, and what stays behind."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from rock import errors
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Handle, Keeps
from rock.runtime.namespace.runtime import NamespaceRuntime
from rock.runtime.process.runtime import ProcessRuntime
from tests.runtime.boxes import Box, HandMade, leftovers, namespace_runtime, run

CONFIG = SandboxConfig(image="hand", memory="256m", cpus=1, pids=256, auto_delete_seconds=60)


async def at_rest(runtime: NamespaceRuntime, script: str = "echo kept > /work/file") -> tuple[Handle, Path]:
    """A sandbox that ran a script, at rest, and its run folder."""
    handle = await runtime.create("box", CONFIG)
    box = Box(runtime, handle, Path("/work"))
    await box.sh(script)
    box.close()
    kept = await runtime.rest(handle)
    return kept, runtime._run_dir / kept.data["slot"]


async def read(runtime: NamespaceRuntime, handle: Handle) -> str:
    box = Box(runtime, handle, Path("/work"))
    out = await box.sh("cat /work/file")
    box.close()
    return out


def test_who_keeps(tmp_path: Path) -> None:
    assert issubclass(NamespaceRuntime, Keeps) and not isinstance(ProcessRuntime(tmp_path), Keeps)


def test_only_files_are_left_at_rest(tmp_path: Path) -> None:
    async def main() -> None:
        before = leftovers(tmp_path)
        async with namespace_runtime(tmp_path) as runtime:
            running = leftovers(tmp_path)
            kept, folder = await at_rest(runtime)
            now = leftovers(tmp_path)
            assert now.pop("slots") == [folder.name] and running.pop("slots") == []
            now["processes"] = running["processes"] = []  # the launcher's zygote may have come meanwhile
            assert now == running
            assert sorted(os.listdir(folder)) == ["record.json", "upper", "work"]
            assert await runtime.rest(kept) == kept  # again is the same
            for _ in range(2):
                woken = await runtime.wake(kept, CONFIG)
                assert await read(runtime, woken) == "kept\n"
                assert await runtime.sweep(["box"]) == []
                kept = await runtime.rest(woken)
            await runtime.destroy(kept)
            await runtime.destroy(kept)
            with pytest.raises(errors.Lost):
                await runtime.wake(kept, CONFIG)
            with pytest.raises(errors.Lost):
                await runtime.rest(kept)
        assert leftovers(tmp_path) == before

    run(main())


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_what_a_guest_puts_in_the_place_of_a_mount_is_not_followed(tmp_path: Path, name: str) -> None:
    """In a layer without them these are the guest's own folders once nothing is mounted there."""
    victim = tmp_path / "victim"
    victim.mkdir()

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            kept, folder = await at_rest(runtime)
            for target in (f"../../../../..{victim}", str(victim)):
                os.symlink(target, folder / "upper" / name)
                with pytest.raises(errors.StartFailed, match=f"/{name} of the stopped sandbox is not a folder"):
                    await runtime.wake(kept, CONFIG)
                os.unlink(folder / "upper" / name)
            woken = await runtime.wake(kept, CONFIG)
            assert await read(runtime, woken) == "kept\n"
            await runtime.destroy(woken)
        assert os.listdir(victim) == []

    run(main())


def test_links_in_the_place_of_folders_are_the_guests_own_matter(tmp_path: Path) -> None:
    script = "echo kept > /work/file; rm -rf /tmp /etc; ln -s ../../../../../../tmp /etc; ln -s /nowhere /tmp"

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            kept, _ = await at_rest(runtime, script)
            woken = await runtime.wake(kept, CONFIG)
            assert await read(runtime, woken) == "kept\n"
            await runtime.destroy(woken)

    run(main())


def test_an_image_that_was_removed_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        images = HandMade(tmp_path / "image")
        extra = tmp_path / "extra"
        extra.mkdir()
        images.extra = (str(extra),)
        async with namespace_runtime(tmp_path, images=images) as runtime:
            kept, _ = await at_rest(runtime)
            shutil.rmtree(extra)
            with pytest.raises(errors.StartFailed, match="layer of the image is missing"):
                await runtime.wake(kept, CONFIG)
            extra.mkdir()
            woken = await runtime.wake(kept, CONFIG)  # the failure took nothing
            assert await read(runtime, woken) == "kept\n"
            await runtime.destroy(woken)

    run(main())


def test_a_cancelled_wake_leaves_it_at_rest(tmp_path: Path) -> None:
    async def main() -> None:
        before = leftovers(tmp_path)
        async with namespace_runtime(tmp_path) as runtime:
            kept, folder = await at_rest(runtime)
            for delay in (0.0, 0.001, 0.005, 0.02):
                task = asyncio.create_task(runtime.wake(kept, CONFIG))
                await asyncio.sleep(delay)
                task.cancel()
                if not isinstance((await asyncio.gather(task, return_exceptions=True))[0], Handle):
                    assert sorted(os.listdir(folder)) == ["record.json", "upper", "work"]
                kept = await runtime.rest(kept)
            woken = await runtime.wake(kept, CONFIG)
            assert await read(runtime, woken) == "kept\n"
            await runtime.destroy(woken)
        assert leftovers(tmp_path) == before

    run(main())


def test_another_runtime_puts_away_what_a_crash_left(tmp_path: Path) -> None:
    """A wake whose server died: pid 1 runs and no record tells of it."""

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            kept, _ = await at_rest(runtime)
            await runtime.wake(kept, CONFIG)
        async with namespace_runtime(tmp_path) as runtime:
            again = await runtime.rest(kept)
            woken = await runtime.wake(again, CONFIG)
            assert await read(runtime, woken) == "kept\n"
            await runtime.destroy(woken)

    run(main())
