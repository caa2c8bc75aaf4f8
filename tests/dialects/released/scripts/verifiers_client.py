"""The runtime "e2b" of verifiers over the E2B dialect."""

from __future__ import annotations

import asyncio
import os

from checks import check, raises
from verifiers.v1.errors import SandboxError
from verifiers.v1.runtimes import make_runtime
from verifiers.v1.runtimes.e2b import E2BConfig

from rock.sync import Client

CONFIG = E2BConfig(image="host", cpu=1.0, memory=0.5, workdir="/work", creates_per_sec=None)


def running() -> int:
    with Client() as client:
        return len(client.list_sandboxes(states="running"))


async def main() -> None:
    runtime = make_runtime(CONFIG)
    with check("start: the template is built, and the sandbox has the working directory"):
        await runtime.start()
        assert running() == 1 and runtime.info.id
    with check("run: output, exit code and variables"):
        done = await runtime.run(["sh", "-c", "echo $WORD; pwd; echo err >&2; exit 3"], {"WORD": "hello"})
        assert (done.exit_code, done.stdout, done.stderr) == (3, "hello\n/work\n", "err\n"), done
    with check("files"):
        data = os.urandom(200_000)
        await runtime.write("/work/deep/data", data)
        assert await runtime.read("/work/deep/data") == data
        with raises(SandboxError, "10 byte limit"):
            await runtime.read("/work/deep/data", max_bytes=10)
    with check("a background program, and a process with input and output"):
        await runtime.run_background(["sh", "-c", "echo begun; sleep 4321"], {}, "/work/log")
        async with asyncio.timeout(30):
            while await runtime.read("/work/log") != b"begun\n":  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        process = await runtime.open_process(["cat"], {})
        await process.write(b"\x00\xff bytes")
        assert await anext(process.stdout) == b"\x00\xff bytes"
        await process.kill()
        assert await process.wait() != 0
    with check("a second runtime uses the template"):
        other = make_runtime(CONFIG)
        await other.start()
        assert (await other.run(["pwd"], {})).stdout == "/work\n" and running() == 2
        await other.stop()
    with check("stop"):
        assert await runtime.alive()
        await runtime.stop()
        await runtime.stop()
        assert running() == 0
    with check("a command after the end is an error of the sandbox"), raises(SandboxError):
        await runtime.run(["true"], {})


asyncio.run(main())
