"""Images as a worker has them: those of its store, those that are pulled when first needed, and those that carry the
packages of environments, which are built then."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rock.envhub.packages import requirements_of, wheels_only, without_dependencies
from rock.errors import Conflict, ImageError, NotFound, Unavailable
from rock.images.packages import PackageSet, ensure, is_built, packages_folder
from rock.images.registry.logins import Login
from rock.images.store import ImageStore
from rock.protocol.node import ImageState
from rock.protocol.sandbox import SandboxConfig

_AT_ONCE = 64  # pulls; a registry may be slow, or mean harm
_MOST_USED = 256  # names that are told of, for the scheduler
_LONGEST_NAME = 256


class Images:
    """`prepare` may take minutes, once; after it `store.resolve` finds the image without waiting for a network."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)

    def is_ready(self, config: SandboxConfig) -> bool:
        """Whether `prepare` has nothing to do. InvalidConfig for a package set that nobody knows."""
        packages = _packages(config.image)
        if packages is not None:
            return is_built(self.store, packages)
        return config.pull == "never" or (config.pull == "missing" and self.store.has(config.image))

    async def prepare(self, config: SandboxConfig, tell: Callable[[str], None] = lambda _: None) -> None:
        """Install the packages that an image is named after, or pull it, once, however many ask at the same time.

        tell: called with words on the progress, from any thread; those who come later are not told.
        """
        if self.is_ready(config):
            return
        key = f"{config.image} {config.public_registries} {config.registry_username or ''}"
        task = self._preparing.get(key)
        if task is None:
            task = asyncio.create_task(self._build(config, tell), name=f"prepare-{config.image}")
            self._preparing[key] = task
            task.add_done_callback(lambda _: self._preparing.pop(key, None))
        await asyncio.shield(task)

    async def look(self, image: str, wait: float) -> ImageState:
        """What there is of an image; spends up to `wait` seconds on building or pulling it. ImageError when that
        fails."""
        if wait > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self.prepare(SandboxConfig(image=image))
        return await asyncio.to_thread(self._look, image)

    def _look(self, image: str) -> ImageState:
        packages = _packages(image)
        try:
            record = self.store.inspect(image)
            listed = packages_folder(self.store.resolve(image)) / "packages" if packages is not None else None
        except (NotFound, ImageError):
            return ImageState(image=image, is_ready=False)
        if packages is not None and not is_built(self.store, packages):
            return ImageState(image=image, is_ready=False)
        names = listed.read_text().splitlines() if listed is not None else []
        digest = record.digest if packages is None else record.layers[-1]
        return ImageState(image=image, is_ready=True, digest=digest, packages=names)

    async def _build(self, config: SandboxConfig, tell: Callable[[str], None]) -> None:
        packages = _packages(config.image)
        if packages is not None:
            async with self._gate:  # takes minutes: not in a thread that heartbeats and ends wait for
                await in_dedicated_thread(lambda gone: ensure(self.store, packages), "rock-packages")
            return
        await asyncio.to_thread(self._refuse_replacing, config.image)
        login = None
        if config.registry_username is not None:
            login = Login(config.registry_username, config.registry_password or "")

        def pull(gone: threading.Event) -> None:
            def told(text: str) -> None:
                if gone.is_set():
                    raise Unavailable("the server is stopping")
                tell(text)

            self.store.pull(config.image, login, told, public_only=config.public_registries)

        async with self._gate:
            await in_dedicated_thread(pull, "rock-pull")


    def _refuse_replacing(self, image: str) -> None:
        """Conflict for a name that stands for what was made here, of which no registry has another version."""
        if self.store.has(image):
            found = self.store.inspect(image)
            if found.made or found.by_reference:
                raise Conflict(f"the image {found.name} was made on this machine: a pull would replace it for all",
                               hint='use pull="missing"; who runs the server replaces it by `rock image pull`')


class UsedImages:
    """Names of images that are here, for the scheduler."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()  # the last used last

    def note(self, image: str) -> None:
        """It is here, and was used just now."""
        if len(image) <= _LONGEST_NAME:
            self._names[image] = None
            self._names.move_to_end(image)
            while len(self._names) > _MOST_USED:
                self._names.popitem(last=False)

    def names(self) -> list[str]:
        """The last used first."""
        return [*reversed(self._names)]


def _packages(image: str) -> PackageSet | None:
    """What an image is named after; None when it is an image like any other."""
    requirements = requirements_of(image)
    if requirements is None:
        return None
    return PackageSet(image, requirements, wheels_only(image), without_dependencies(image))


# ---- fetching ----
#
# How far the images are that sandboxes wait for.

_MOST = 100  # images that are told of
_LONGEST = 200  # characters


class Fetching:
    """The last words on each, by the image's name, for as long as a sandbox waits for it."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def of(self, image: str) -> Iterator[Callable[[str], None]]:
        """Somebody waits for it: what is to be called with words on the progress, from any thread."""

        def tell(words: str) -> None:
            if self._waiting[image]:
                self._words[image] = words[:_LONGEST]

        self._waiting[image] += 1
        try:
            yield tell
        finally:
            self._waiting[image] -= 1
            if not self._waiting[image]:
                del self._waiting[image]
                self._words.pop(image, None)

    def words(self) -> dict[str, str]:
        """By image; of some, where there are very many."""
        return dict(list(self._words.items())[:_MOST])


# ---- ownthread ----
#
# Work that may take as long as somebody elsewhere likes, in a thread of its own: those of the event loop are few, and
# for what this machine does by itself.

T = TypeVar("T")

_LET_GO = 2.0  # seconds


async def in_dedicated_thread(work: Callable[[threading.Event], T], name: str) -> T:
    """What the work gives. On a cancellation it is told to end, and waited for a moment: a registry that is silent
    must not keep a server from stopping, and what is half-made then is removed by whoever opens the store next."""
    gone, loop = threading.Event(), asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def fail(error: BaseException) -> None:
        if not future.cancelled():
            future.set_exception(error)

    def succeed(made: T) -> None:
        if not future.cancelled():
            future.set_result(made)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                made = work(gone)
            except BaseException as raised:
                loop.call_soon_threadsafe(fail, raised)
            else:
                loop.call_soon_threadsafe(succeed, made)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        gone.set()
        await asyncio.wait({future}, timeout=_LET_GO)
        future.cancel()
        raise
