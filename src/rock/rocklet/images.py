"""Root file systems for runtimes: images of the store, and images that carry the packages of environments.

An image named `env/NAME` is the built-in `host` with the package set NAME on top, installed when first needed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from rock.envhub import packages, registry
from rock.errors import ImageError
from rock.runtime.image.rootfs import RootFS
from rock.runtime.image.store import ImageStore


class Images:
    """What a runtime asks for root file systems. `prepare` may take minutes; `resolve` never waits for a network."""

    def __init__(self, folder: Path) -> None:
        self.store = ImageStore(folder)
        self._packages = packages.PackageLayers(folder / "packages")
        self._preparing: dict[str, asyncio.Task[None]] = {}

    def resolve(self, image: str) -> RootFS:
        """The root file system of an image on disk; ImageError says how to get one that is not."""
        if not image.startswith(registry.IMAGE_PREFIX):
            return self.store.resolve(image)
        layer = self._packages.find(image.removeprefix(registry.IMAGE_PREFIX))
        if layer is None:
            raise ImageError(f"the packages of {image} are not installed yet", hint="they are when a sandbox starts")
        return self.store.resolve("host").with_layers([str(layer)])

    def is_ready(self, image: str) -> bool:
        """Whether `prepare` has nothing to do."""
        return not image.startswith(registry.IMAGE_PREFIX) or self._packages.find(
            image.removeprefix(registry.IMAGE_PREFIX)
        ) is not None

    async def prepare(self, image: str) -> None:
        """Make an image ready to be resolved: install its packages once, however many ask at the same time."""
        if self.is_ready(image):
            return
        task = self._preparing.get(image)
        if task is None:
            name = image.removeprefix(registry.IMAGE_PREFIX)
            task = asyncio.create_task(asyncio.to_thread(self._install, name), name=f"prepare-{image}")
            self._preparing[image] = task
            task.add_done_callback(lambda _: self._preparing.pop(image, None))
        await asyncio.shield(task)

    def _install(self, name: str) -> None:
        self._packages.ensure(name)
