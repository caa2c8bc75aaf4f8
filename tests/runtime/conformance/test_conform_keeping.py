"""Files that outlive their sandbox: at rest and woken, packed and unpacked, and read while it runs."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator

import pytest

from rock import errors
from rock.protocol.sandbox import ArchivedFiles, SandboxConfig
from rock.runtime.base import Handle, Keeps, Liveness, Snapshots
from tests.runtime.boxes import run, until_line
from tests.runtime.conformance.conftest import Bench
from tests.runtime.conformance.subject import needs


def keeping(box: Bench) -> SandboxConfig:
    return box.subject.config(auto_delete_seconds=60)


async def written(box: Bench, runtime: Keeps, script: str) -> Handle:
    """What is at rest of a sandbox that ran a script."""
    handle = await runtime.create("box", keeping(box))
    b = box.boxed(runtime, handle)
    assert await b.sh(script) == ""
    b.close()
    return await runtime.rest(handle)


async def told(box: Bench, runtime: Keeps, handle: Handle, script: str) -> str:
    b = box.boxed(runtime, handle)
    out = await b.sh(script)
    b.close()
    return out


@needs(Keeps)
def test_files_rest_and_wake(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            kept = await written(box, runtime, "echo kept > file; mkdir d; chmod 700 d; ln -s file link")
            assert await runtime.recover(kept) is Liveness.GONE
            assert await runtime.rest(kept) == kept
            assert await runtime.sweep(["box"]) == []
            for number in range(2):
                woken = await runtime.wake(kept, keeping(box))
                assert await told(box, runtime, woken, "cat link; stat -c %a d; echo more >> file") == (
                    "kept\n" + "more\n" * number + "700\n")
                kept = await runtime.rest(woken, 0.1)
        async with box.runtime() as runtime:
            woken = await runtime.wake(kept, keeping(box))
            assert await told(box, runtime, woken, "cat file") == "kept\nmore\nmore\n"
            kept = await runtime.rest(woken)
            await runtime.destroy(kept)
            await runtime.destroy(kept)
            with pytest.raises(errors.Lost):
                await runtime.wake(kept, keeping(box))
            with pytest.raises(errors.Lost):
                await runtime.rest(kept)
        assert box.subject.leftovers(box.folder) == before

    run(main())


@needs(Keeps)
def test_a_cancelled_wake_leaves_it_at_rest(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            kept = await written(box, runtime, "echo kept > file")
            for delay in (0.0, 0.001, 0.005, 0.02):
                task = asyncio.create_task(runtime.wake(kept, keeping(box)))
                await asyncio.sleep(delay)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                kept = await runtime.rest(kept)
            woken = await runtime.wake(kept, keeping(box))
            assert await told(box, runtime, woken, "cat file") == "kept\n"
            await runtime.destroy(woken)
        assert box.subject.leftovers(box.folder) == before

    run(main())


@needs(Keeps)
def test_packed_and_unpacked(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            kept = await written(box, runtime, "echo kept > file; rm -f /etc/group")
            items = [item async for item in runtime.pack(kept, 1 << 30)]
            files, data = items[-1], b"".join(item for item in items if isinstance(item, bytes))
            assert isinstance(files, ArchivedFiles) and files.size == len(data)
            stream = runtime.pack(kept, 1 << 30)  # whoever reads it may leave
            await anext(stream)
            await stream.aclose()
            with pytest.raises(errors.InvalidConfig):
                async for _ in runtime.pack(kept, 1):
                    pass
            await runtime.destroy(kept)

            async def given(*, broken: bool = False, changed: bool = False) -> AsyncIterator[bytes]:
                yield data[:1000]
                if broken:
                    raise errors.Unavailable("the archive broke off")
                yield bytes(len(data) - 1000) if changed else data[1000:]

            with pytest.raises(errors.Unavailable, match="broke off"):
                await runtime.unpack("box", keeping(box), files, given(broken=True))
            with pytest.raises(errors.InvalidConfig):
                await runtime.unpack("box", keeping(box), files, given(changed=True))
            assert await runtime.sweep([]) == []
            kept = await runtime.unpack("box", keeping(box), files, given())
            woken = await runtime.wake(kept, keeping(box))
            assert await told(box, runtime, woken, "cat file; test -e /etc/group || echo gone") == "kept\ngone\n"
            await runtime.destroy(woken)
        assert box.subject.leftovers(box.folder) == before

    run(main())


@needs(Snapshots)
def test_a_snapshot_of_what_runs(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            script = "echo one > file; echo x > count; echo ready; while :; do echo x >> count; sleep 0.01; done"
            writer = await b.spawn("sh", "-c", script)
            await until_line(writer.stdout)
            assert b.runtime.image(b.handle).digest
            items = [item async for item in b.runtime.snapshot(b.handle, 1 << 30)]
            assert isinstance(items[-1], ArchivedFiles)
            data = b"".join(item for item in items if isinstance(item, bytes))
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                names = {member.name.lstrip("./"): member for member in tar.getmembers()}
                found = tar.extractfile(names[f"{str(b.root).lstrip('/')}/file"])
                assert found is not None and found.read() == b"one\n"
            size = (await b.sh("wc -c < count")).strip()
            for _ in range(400):  # it goes on
                if (await b.sh("wc -c < count")).strip() != size:
                    break
            else:
                raise AssertionError("what was snapshotted does not go on")
            await writer.kill_tree()

    run(main())
