"""Images built of Dockerfiles: each RUN in a sandbox of its own, each COPY written straight into a layer.

    stages     those that the wanted one needs, in order           dockerfile.py
    settings   ENV, WORKDIR, USER, ... change what the image says, and nothing else      instructions.py
    layers     RUN (buildrun.py), COPY, ADD, and a WORKDIR that is not there (copying.py)

Each layer has a key: of the layers below, the instruction as it is after its variables, and what it copies. A step is
kept as an image named after its key, so the next build finds it, a crash leaves nothing half-made, and `rock image
prune` removes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rock.protocol.images import BuildRequest, BuiltImage
from rock.rocklet.build import Build
from rock.rocklet.buildplan import Plan
from rock.rocklet.buildrun import Flow
from rock.runtime.image import dockerfile
from rock.runtime.image.merged import Merged
from rock.runtime.image.reference import new_name
from rock.runtime.image.steps import unpack_context

if TYPE_CHECKING:
    from rock.rocklet.node import Node

_AT_ONCE = 2

Tell = Callable[[bytes], None]


class Builds:
    """The builds of this machine, two at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[BuiltImage]] = set()

    async def close(self) -> None:
        """Break off what is under way; what is half-made goes with it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def build(
        self, wish: BuildRequest, tar: Path, folder: Path, tell: Tell, flow: Flow, tenant: str = ""
    ) -> BuiltImage:
        """Build from the context in `tar`, in `folder`, which is the caller's to remove. A cancelled caller ends it.
        tenant: who asks; "" is the server's owner.

        InvalidConfig and Unsupported for the Dockerfile, CommandFailed and CommandTimeout for a RUN, ImageError for
        images; each names its line.
        """
        task = asyncio.create_task(self._build(wish, tar, folder, tell, flow, tenant), name=f"build-{wish.image_tag}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    async def _build(
        self, wish: BuildRequest, tar: Path, folder: Path, tell: Tell, flow: Flow, tenant: str
    ) -> BuiltImage:
        new_name(wish.image_tag)
        plan = Plan(dockerfile.parse(wish.dockerfile), wish.build_args)
        if self._gate.locked():
            tell(b"waiting for another build to end\n")
        async with self._gate:
            context = folder / "context"
            await asyncio.to_thread(unpack_context, tar, context)
            build = Build(self._node, wish, plan, Merged([str(context)]), folder, tell, flow, tenant)
            try:
                return await build.run()
            finally:
                build.close()
