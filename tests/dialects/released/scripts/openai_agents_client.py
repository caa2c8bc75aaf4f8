"""The sandbox client "e2b" of the OpenAI Agents SDK over the E2B dialect."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

from agents.extensions.sandbox.e2b import E2BSandboxClient, E2BSandboxClientOptions
from agents.sandbox.entries import File
from agents.sandbox.errors import WorkspaceReadNotFoundError
from agents.sandbox.manifest import Manifest
from checks import check, raises

from rock.sync import Client

OPTIONS = E2BSandboxClientOptions(sandbox_type="e2b", template="host", timeout=600)


def running() -> int:
    with Client() as client:
        return len(client.list_sandboxes(states="running"))


async def main() -> None:
    client = E2BSandboxClient()
    manifest = Manifest(entries={"notes.txt": File(content=b"6 7")})
    session: Any = await client.create(manifest=manifest, options=OPTIONS)
    with check("create and start: the files of the manifest are in the workspace"):
        await session.start()
        assert await session.running() and running() == 1
        assert (await session.read(Path("notes.txt"))).read() == b"6 7"
    with check("exec: output, exit code, shell"):
        done = await session.exec("cat notes.txt; echo err >&2; exit 3", shell=True)
        assert (done.stdout, done.stderr, done.exit_code) == (b"6 7", b"err\n", 3), done
    with check("files"):
        await session.write(Path("deep/data.bin"), io.BytesIO(b"\0\xff"))
        assert (await session.read(Path("deep/data.bin"))).read() == b"\0\xff"
        with raises(WorkspaceReadNotFoundError):
            await session.read(Path("missing.txt"))
    with check("the workspace survives a stop, in a new sandbox"):
        tar = await session.persist_workspace()
        assert b"deep/data.bin" in tar.read()
    with check("shutdown stops the sandbox"):
        await session.stop()
        await session.shutdown()
        await client.delete(session)
        assert running() == 0


asyncio.run(main())
