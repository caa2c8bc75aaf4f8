"""Sandboxes outlive the server and the launcher, are found again by their handles, and are swept by their folders."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import native, process_tree
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Handle, Liveness
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, HandMade, leftovers, namespace_runtime, run, until

CONFIG = {"image": "hand", "memory": "128m", "cpus": 1, "pids": 64}
SERVER = """
import asyncio, dataclasses, json, os, sys
from pathlib import Path
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Program
from rock.runtime.namespace import records
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import HandMade

async def main():
    folder = Path(sys.argv[1])
    runtime = NamespaceRuntime(folder / "run", 1, HandMade(folder / "image"))
    await runtime.open()
    handle = await runtime.create("kept", SandboxConfig(**json.loads(sys.argv[2])))
    while runtime._pool.ready < 1:
        await asyncio.sleep(0.01)
    program = Program(["sh", "-c", "read a; echo got $a > /work/out; echo $a"], stdin="pipe", keep=True, key="k")
    await runtime.spawn(handle, program)
    print(json.dumps({**dataclasses.asdict(handle), "launcher": runtime._slots.launcher.pid}), flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path), json.dumps(CONFIG)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        text = server.communicate()[1].decode()
        if "Unsupported" in text:
            pytest.skip(f"no namespaces here: {text[-300:]}")
        raise AssertionError(text)
    data = json.loads(line)
    launcher = data.pop("launcher")
    handle = Handle(**data)
    server.kill()
    server.communicate()

    async def main() -> None:
        await until(lambda: not process_tree.lives(launcher, None))  # it ends with the server's socket
        runtime = NamespaceRuntime(tmp_path / "run", 0, HandMade(tmp_path / "image"))
        await runtime.open()
        assert await runtime.recover(handle) == Liveness.RUNNING
        assert await runtime.processes(handle) == ["k"]
        process = await runtime.attach(handle, "k")
        os.write(process.stdin, b"hello\n")
        assert (await process.wait()).code == 0
        assert os.read(process.stdout, 100) == b"hello\n"
        process.close()
        assert len(list((tmp_path / "run").glob("n-*"))) == 2
        swept = await runtime.sweep(["kept"])  # the pool member that the server left
        assert len(swept) == 1
        assert await Box(runtime, handle, Path("/work")).sh("cat out") == "got hello\n"
        other = await runtime.create("other", SandboxConfig(**CONFIG))
        assert other.data["base"] != handle.data["base"] or os.geteuid() != 0
        assert await runtime.sweep(["kept", "other"]) == []
        assert await runtime.sweep(["other"]) == ["kept"]
        assert await runtime.recover(handle) == Liveness.GONE
        with pytest.raises(errors.Lost):
            await Box(runtime, handle, Path("/work")).sh("true")
        await runtime.destroy(handle)
        await runtime.destroy(other)
        await runtime.close()

    run(main())
    assert leftovers(tmp_path)["slots"] == []
    assert leftovers(tmp_path)["groups"] == []


def test_a_crashed_launcher_is_started_again(tmp_path: Path) -> None:
    before = leftovers(tmp_path)["processes"]

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            first = await runtime.create("first", SandboxConfig(**CONFIG))
            assert runtime._slots.launcher.pid is not None
            os.kill(runtime._slots.launcher.pid, signal.SIGKILL)
            assert await Box(runtime, first, Path("/work")).sh("echo alive") == "alive\n"
            async with asyncio.timeout(60):
                while True:
                    try:
                        second = await runtime.create("second", SandboxConfig(**CONFIG))
                        break
                    except errors.Unavailable:  # its death was not noticed yet
                        await asyncio.sleep(0.05)
            assert await Box(runtime, second, Path("/work")).sh("echo alive") == "alive\n"
            for handle in (first, second):
                await runtime.destroy(handle)

    run(main())
    assert leftovers(tmp_path)["processes"] == before


def test_half_made_sandboxes_die_with_the_launcher(tmp_path: Path) -> None:
    before = leftovers(tmp_path)["processes"]

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            for delay in (0.002, 0.004, 0.006, 0.008, 0.012):
                tasks = [asyncio.create_task(runtime.create(f"x{i}", SandboxConfig(**CONFIG))) for i in range(4)]
                await asyncio.sleep(delay)
                os.kill(runtime._slots.launcher.pid, signal.SIGKILL)
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(result, Handle):
                        await runtime.destroy(result)
                    else:
                        assert isinstance(result, errors.Unavailable | errors.StartFailed | errors.Lost)
            assert leftovers(tmp_path)["slots"] == []
            assert leftovers(tmp_path)["groups"] == []

    run(main())
    assert leftovers(tmp_path)["processes"] == before


@pytest.mark.skipif(native.library is None, reason=f"no extension: {native.missing}")
def test_the_death_of_the_zygote_is_survived(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            first = await runtime.create("first", SandboxConfig(**CONFIG))
            launcher = runtime._slots.launcher.pid
            for entry in process_tree.descendants(process_tree.scan(), launcher):
                if entry.parent == launcher:  # or one of the children that live for a moment only
                    process_tree.send(entry, signal.SIGKILL)
            await asyncio.sleep(1.0)
            assert await Box(runtime, first, Path("/work")).sh("echo alive") == "alive\n"
            handles = []
            for number in range(3):
                try:
                    handles.append(await runtime.create(f"x{number}", SandboxConfig(**CONFIG)))
                except errors.StartFailed as error:
                    assert "zygote" in error.message
            assert len(handles) >= 2
            assert runtime._slots.launcher.pid == launcher
            for handle in (first, *handles):
                await runtime.destroy(handle)

    run(main())


def test_destroy_works_on_the_dead(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            handle = await runtime.create("x", SandboxConfig(**CONFIG))
            waiting = asyncio.create_task(runtime.wait(handle))
            await Box(runtime, handle, Path("/work")).sh("mkdir -p a/b; touch a/b/c; chmod 000 a/b; ln -s / root")
            os.kill(handle.data["pid"], signal.SIGKILL)
            assert await waiting == "exited"
            assert await runtime.wait(handle) == "exited"
            assert await runtime.recover(handle) == Liveness.GONE
            await runtime.destroy(handle)
            await runtime.stop(handle, 0.1)
            assert leftovers(tmp_path)["slots"] == []

    run(main())


def test_long_paths(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 60) / ("b" * 60) / ("c" * 60)
    folder.mkdir(parents=True)

    async def main() -> None:
        async with namespace_runtime(folder) as runtime:
            handle = await runtime.create("x", SandboxConfig(**CONFIG))
            assert await Box(runtime, handle, Path("/work")).sh("echo fine") == "fine\n"
            await runtime.destroy(handle)

    run(main())


def test_only_the_server_is_served(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")

    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            handle = await runtime.create("x", SandboxConfig(**CONFIG))
            sock = tmp_path / "run" / handle.data["slot"] / "s"
            script = ("import os, socket, sys\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
                      "try:\n os.setuid(1234); s.connect(sys.argv[1]); print('connected')\n"
                      "except OSError as e: print(type(e).__name__)")
            other = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(sock),
                                                         stdout=subprocess.PIPE)
            assert (await other.communicate())[0] == b"PermissionError\n"
            await runtime.destroy(handle)

    run(main())


def test_close_leaves_sandboxes_and_empties_the_pool(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path, pool=2) as runtime:
            handle = await runtime.create("x", SandboxConfig(**CONFIG))
            await until(lambda: runtime._pool.ready == 2)
        assert [path.name for path in (tmp_path / "run").glob("n-*")] == [handle.data["slot"]]
        async with namespace_runtime(tmp_path) as runtime:
            assert await runtime.recover(handle) == Liveness.RUNNING
            await runtime.destroy(handle)

    run(main())


def test_a_pid_1_that_responds_late_is_found_again(tmp_path: Path) -> None:
    """On a machine without free memory it may need more than the 10 s of one request."""

    async def main() -> None:
        images = HandMade(tmp_path / "image")
        earlier = NamespaceRuntime(tmp_path / "run", 0, images)
        await earlier.open()
        handle = await earlier.create("late", SandboxConfig(**CONFIG))
        await earlier.close()
        later = NamespaceRuntime(tmp_path / "run", 0, images)
        await later.open()
        os.kill(handle.data["pid"], signal.SIGSTOP)
        asyncio.get_running_loop().call_later(11, os.kill, handle.data["pid"], signal.SIGCONT)
        assert await later.recover(handle) == Liveness.RUNNING
        await later.destroy(handle)
        assert await later.recover(handle) == Liveness.GONE
        await later.close()

    run(main())
