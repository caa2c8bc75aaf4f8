"""Sandboxes from create to destroy: refusals, ends, many at once, recovery after a crash of the server, sweeps."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rock import errors
from rock.protocol.sandbox import Isolation
from rock.runtime.base import Handle, Liveness, Program, Trait
from tests.runtime.boxes import read_all, run
from tests.runtime.conformance.conftest import Bench
from tests.runtime.conformance.subject import needs

ROOT = Path(__file__).parents[3]
_TRUE = Program(["true"])


def test_what_cannot_be_given_is_refused_before_the_start(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            refused: tuple[tuple[dict[str, Any], type[errors.RockError]], ...] = (
                ({"num_gpus": 1}, errors.Unsupported),
                ({"use_kata_runtime": True}, errors.Unsupported),
                ({"image_os": "windows"}, errors.Unsupported),
            )
            if Trait.PROGRAMS in runtime.traits[box.subject.isolation]:  # else an image gives nothing
                refused += (({"image": "no-such-image:1"}, errors.RockError),)
            for values, kind in refused:
                with pytest.raises(kind) as caught:
                    await runtime.check(box.subject.config(**values))
                assert isinstance(caught.value, errors.ClientError | errors.ImageError)
                with pytest.raises(kind):
                    await runtime.create("x", box.subject.config(**values))
            for level in Isolation:  # all that are stronger than what it is
                config = box.subject.config(minimum_isolation=level)
                if list(Isolation).index(level) <= list(Isolation).index(box.subject.isolation):
                    await runtime.check(config)
                else:
                    with pytest.raises(errors.Unsupported, match=level.value):
                        await runtime.check(config)
            assert await runtime.sweep([]) == []
        assert box.subject.leftovers(box.folder) == before

    run(main())


def test_the_environment_of_a_sandbox_is_its_programs(box: Bench) -> None:
    async def main() -> None:
        async with box(env={"A": "of the sandbox", "B": "too"}) as b:
            assert await b.sh('echo "$A, $B"', env={"B": "the program"}) == "of the sandbox, the program\n"
            assert await b.sh("pwd", env={}) == f"{b.root}\n"

    run(main())


_ENDS = ("gone", "exited")  # not every runtime can tell who ended a pid 1 that is no more


def test_a_stopped_sandbox_is_gone_for_good(box: Bench) -> None:
    async def main() -> None:
        async with box() as b:
            program = await b.spawn("sleep", "1000")
            waiting = asyncio.create_task(b.runtime.wait(b.handle))
            await asyncio.sleep(0.1)
            assert not waiting.done(), "it lives"
            await b.runtime.stop(b.handle, 0.0)
            assert await waiting in _ENDS and await b.runtime.wait(b.handle) in _ENDS
            assert await b.runtime.recover(b.handle) is Liveness.GONE
            try:
                status = await program.wait()
                assert status.signal in (9, 15) or status.code is None, "a status is never invented"
            except errors.Lost:
                pass
            with pytest.raises(errors.Lost):
                await b.runtime.spawn(b.handle, _TRUE)
            await b.runtime.stop(b.handle, 0.1)

    run(main())


def test_destroy_can_be_repeated(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            handle = await runtime.create("x", box.subject.config())
            b = box.boxed(runtime, handle)
            await b.sh("mkdir -p a/b; touch a/b/c; ln -s / root; chmod 000 a/b")
            await b.spawn("sleep", "1000")
            b.close()
            await asyncio.gather(runtime.destroy(handle), runtime.destroy(handle))
            await runtime.destroy(handle)
            assert await runtime.recover(handle) is Liveness.GONE
            assert await runtime.wait(handle) in _ENDS
            again = await runtime.create("x", box.subject.config())  # its name is free
            assert await box.boxed(runtime, again).sh("ls") == ""
            await runtime.destroy(handle)
            assert await runtime.recover(again) is Liveness.RUNNING, "the first one's end is not the second one's"
            await runtime.destroy(again)
        assert box.subject.leftovers(box.folder) == before

    run(main())


def test_cancelled_creates_leave_nothing(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            for delay in (0.0, 0.001, 0.004, 0.008, 0.016, 0.05):
                task = asyncio.create_task(runtime.create("x", box.subject.config()))
                await asyncio.sleep(delay)
                task.cancel()
                result = (await asyncio.gather(task, return_exceptions=True))[0]
                if isinstance(result, Handle):
                    await runtime.destroy(result)
            assert await runtime.sweep([]) == []
        assert box.subject.leftovers(box.folder) == before

    run(main())


def test_fifty_at_once(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            made = await asyncio.gather(*(runtime.create(f"s{i}", box.subject.config()) for i in range(50)))
            boxes = [box.boxed(runtime, handle) for handle in made]
            scripts = [f"echo {number} > mine; cat mine; cd {b.root} && ls" for number, b in enumerate(boxes)]
            outputs = await asyncio.gather(*(b.sh(script) for b, script in zip(boxes, scripts, strict=True)))
            assert outputs == [f"{i}\nmine\n" for i in range(50)]
            await asyncio.gather(*(runtime.destroy(handle) for handle in made))
        assert box.subject.leftovers(box.folder) == before

    run(main(), 110)


def test_closing_ends_no_sandbox(box: Bench) -> None:
    async def main() -> None:
        async with box.runtime() as runtime:
            handle = await runtime.create("x", box.subject.config())
            await box.boxed(runtime, handle).sh("echo here > file")
            if Trait.OUTLIVES not in runtime.traits[handle.isolation]:
                await runtime.destroy(handle)
                return
        async with box.runtime() as runtime:
            assert await runtime.recover(handle) is Liveness.RUNNING
            assert await box.boxed(runtime, handle).sh("cat file") == "here\n"
            await runtime.destroy(handle)

    run(main())


def test_what_no_record_knows_is_swept(box: Bench) -> None:
    async def main() -> None:
        before = box.subject.leftovers(box.folder)
        async with box.runtime() as runtime:
            for name in ("known", "unknown"):
                await runtime.create(name, box.subject.config())
        async with box.runtime() as runtime:
            found = await runtime.sweep(["known"])
            assert set(found) <= {"unknown"} and await runtime.sweep(["known"]) == []
            assert set(await runtime.sweep([])) <= {"known"}
            if Trait.OUTLIVES in runtime.traits[box.subject.isolation]:
                assert found == ["unknown"]
        assert box.subject.leftovers(box.folder) == before

    run(main())


@needs(Trait.OUTLIVES)
def test_a_killed_server_loses_nothing(box: Bench) -> None:
    argv = [sys.executable, "-m", "tests.runtime.conformance.server", box.subject.name, str(box.folder)]
    before = box.subject.leftovers(box.folder)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        server.kill()
        _, told = server.communicate()
    assert line, told.decode()
    data = json.loads(line)
    handle = Handle(**{**data, "isolation": Isolation(data["isolation"])})
    assert dataclasses.asdict(handle) == data

    async def main() -> None:
        async with box.runtime() as runtime:
            assert await runtime.recover(handle) is Liveness.RUNNING
            assert await runtime.processes(handle) == ["k"]
            process = await runtime.attach(handle, "k")
            os.write(process.stdin or -1, b"one\ntwo\n")
            assert (await process.wait()).code == 5
            assert await read_all(process.stdout or -1) == b"one\ntwo\n"
            process.close()
            b = box.boxed(runtime, handle)
            assert await b.sh("cat out") == "got one\n"
            other = await runtime.create("other", box.subject.config())
            assert await runtime.sweep(["kept", "other"]) == []
            await runtime.destroy(other)
        async with box.runtime() as runtime:
            assert await runtime.sweep([]) == ["kept"]
            assert await runtime.recover(handle) is Liveness.GONE
            with pytest.raises(errors.Lost):
                await runtime.spawn(handle, _TRUE)
            await runtime.destroy(handle)

    run(main())
    assert box.subject.leftovers(box.folder) == before
