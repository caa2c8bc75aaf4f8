"""Images as a worker has them: those of its store, and those that carry the packages of environments, built when first
needed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rock.envhub.packages import requirements_of, wheels_only, without_dependencies
from rock.runtime.image.packages import PackageSet, ensure, is_built
from rock.runtime.image.store import ImageStore


class Images:
    """`prepare` may take minutes, once; after it `store.resolve` finds the image without waiting for a network."""

    def __init__(self, folder: Path) -> None:
        self.store = ImageStore(folder)
        self._preparing: dict[str, asyncio.Task[None]] = {}

    def is_ready(self, image: str) -> bool:
        """Whether `prepare` has nothing to do. InvalidConfig for a package set that nobody knows."""
        packages = _packages(image)
        return packages is None or is_built(self.store, packages)

    async def prepare(self, image: str) -> None:
        """Install the packages that an image is named after, once, however many ask at the same time."""
        if self.is_ready(image):
            return
        task = self._preparing.get(image)
        if task is None:
            task = asyncio.create_task(self._build(image), name=f"prepare-{image}")
            self._preparing[image] = task
            task.add_done_callback(lambda _: self._preparing.pop(image, None))
        await asyncio.shield(task)

    async def _build(self, image: str) -> None:
        packages = _packages(image)
        if packages is not None:
            await asyncio.to_thread(ensure, self.store, packages)


def _packages(image: str) -> PackageSet | None:
    """What an image is named after; None when it is an image like any other."""
    requirements = requirements_of(image)
    return None if requirements is None else PackageSet(
        image, requirements, wheels_only(image), without_dependencies(image)
    )
