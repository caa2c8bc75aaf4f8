"""Images as a worker has them: those of its store, and those that carry the packages of environments, built when first
needed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from rock.envhub.packages import requirements_of, wheels_only
from rock.errors import ImageError, NotFound
from rock.protocol.node import NodeImage
from rock.runtime.image.packages import PackageSet, ensure, is_built, packages_folder
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

    async def look(self, image: str, wait: float) -> NodeImage:
        """What there is of an image; spends up to `wait` seconds on building it. ImageError when that fails."""
        if wait > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self.prepare(image)
        return await asyncio.to_thread(self._look, image)

    def _look(self, image: str) -> NodeImage:
        packages = _packages(image)
        try:
            record = self.store.inspect(image)
            listed = packages_folder(self.store.resolve(image)) / "packages" if packages is not None else None
        except (NotFound, ImageError):
            return NodeImage(image=image, is_ready=False)
        if packages is not None and not is_built(self.store, packages):
            return NodeImage(image=image, is_ready=False)
        names = listed.read_text().splitlines() if listed is not None else []
        digest = record.digest if packages is None else record.layers[-1]
        return NodeImage(image=image, is_ready=True, digest=digest, packages=names)

    async def _build(self, image: str) -> None:
        packages = _packages(image)
        if packages is not None:
            await asyncio.to_thread(ensure, self.store, packages)


def _packages(image: str) -> PackageSet | None:
    """What an image is named after; None when it is an image like any other."""
    requirements = requirements_of(image)
    return None if requirements is None else PackageSet(image, requirements, wheels_only(requirements))
