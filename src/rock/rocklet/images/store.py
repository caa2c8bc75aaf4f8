"""Images of a worker: stored, pulled on first use, or built with the packages of environments on first use; and the
layers of agents."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

from rock.envhub.packages import requirements_of, wheels_only, without_dependencies
from rock.errors import Conflict, ImageError, NotFound, Unavailable
from rock.images.agents import AgentLayers
from rock.images.packages import PackageSet, ensure, is_built, packages_folder
from rock.images.registry.logins import Login
from rock.images.store import ImageStore
from rock.protocol.node import ImageState
from rock.protocol.sandbox import SandboxConfig

_AT_ONCE = 64  # concurrent pulls; a registry may be slow or malicious
_MOST_USED = 256  # reported names, for the scheduler
_LONGEST_NAME = 256


class Images:
    """`prepare` may take minutes, once; afterwards `store.resolve` finds the image without network access."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)

    @cached_property
    def agents(self) -> AgentLayers:
        """The layers of agents."""
        return AgentLayers(self.store.folder / "agents")

    def is_ready(self, config: SandboxConfig) -> bool:
        """Whether `prepare` has no work to do. InvalidConfig for an unknown package set or agent."""
        return self._has_image(config) and all(self._has_agent(name) for name in config.agents or ())

    def _has_agent(self, name: str) -> bool:
        recipe = self.agents.recipe(name)
        return not recipe.packages or self.agents.find(recipe) is not None

    def _has_image(self, config: SandboxConfig) -> bool:
        packages = _packages(config.image)
        if packages is not None:
            return is_built(self.store, packages)
        return config.pull == "never" or (config.pull == "missing" and self.store.has(config.image))

    async def prepare(self, config: SandboxConfig, tell: Callable[[str], None] = lambda _: None) -> None:
        """Install the packages that an image is named after, or pull the image, and install the agents; once for all
        concurrent callers.

        tell: called with progress messages, from any thread; only that of the first caller is used.
        """
        for name in config.agents or ():
            if not self._has_agent(name):
                await self._once(f"agent {name}", partial(self._install, name, tell))
        if self._has_image(config):
            return
        key = f"{config.image} {config.public_registries} {config.registry_username or ''}"
        await self._once(key, lambda: self._build(config, tell))

    async def _once(self, key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for the work with that key; begin it when it is not in progress."""
        task = self._preparing.get(key)
        if task is None:
            task = asyncio.create_task(work(), name=f"prepare-{key}")
            self._preparing[key] = task
            task.add_done_callback(lambda _: self._preparing.pop(key, None))
        await asyncio.shield(task)

    async def _install(self, name: str, tell: Callable[[str], None]) -> None:
        recipe = self.agents.recipe(name)
        async with self._gate:
            await in_dedicated_thread(
                lambda gone: self.agents.ensure(recipe, lambda text: tell(f"agent {name}: {text}")), "rock-agents"
            )

    async def look(self, image: str, wait: float) -> ImageState:
        """The state of an image; spends up to `wait` seconds on building or pulling it. ImageError when that fails."""
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
            async with self._gate:  # takes minutes, so it does not use a thread that heartbeats and ends wait for
                await in_dedicated_thread(lambda gone: ensure(self.store, packages, tell), "rock-packages")
            return
        await asyncio.to_thread(self._refuse_replacing, config.image)
        login = None
        if config.registry_username is not None:
            login = Login(config.registry_username, config.registry_password or "")

        def pull(gone: threading.Event) -> None:
            def told(text: str) -> None:
                if gone.is_set():
                    raise Unavailable("the pull was canceled: the server is stopping",
                                      hint="start it again once the server has restarted")
                tell(text)

            self.store.pull(config.image, login, told, public_only=config.public_registries)

        async with self._gate:
            await in_dedicated_thread(pull, "rock-pull")


    def _refuse_replacing(self, image: str) -> None:
        """Conflict for a name of an image that was made here, because registries have no other version of it."""
        if self.store.has(image):
            found = self.store.inspect(image)
            if found.made or found.by_reference:
                raise Conflict(f"the image {found.name} was made on this machine: a pull would replace it for all",
                               hint='use pull="missing"; who runs the server replaces it by `rock image pull`')


class UsedImages:
    """Names of images on this machine, for the scheduler."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()  # the last used last

    def note(self, image: str) -> None:
        """The image exists, and was used just now."""
        if len(image) <= _LONGEST_NAME:
            self._names[image] = None
            self._names.move_to_end(image)
            while len(self._names) > _MOST_USED:
                self._names.popitem(last=False)

    def names(self) -> list[str]:
        """The names, the last used first."""
        return [*reversed(self._names)]


def _packages(image: str) -> PackageSet | None:
    """The package set that an image is named after; None for an ordinary image."""
    requirements = requirements_of(image)
    if requirements is None:
        return None
    return PackageSet(image, requirements, wheels_only(image), without_dependencies(image))


# ---- progress of pulls and builds ----

_MOST = 100  # reported images
_LONGEST = 200  # characters


class Fetching:
    """The latest progress message by image name, for as long as a sandbox waits for the image."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def of(self, image: str) -> Iterator[Callable[[str], None]]:
        """A sandbox waits for the image: the callback for progress messages, which any thread may call."""

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
        """Progress messages by image; at most a fixed number of images."""
        return dict(list(self._words.items())[:_MOST])


# ---- dedicated threads ----
#
# Work whose duration depends on a remote system runs in a thread of its own. The few threads of the event loop are for
# work of this machine.

T = TypeVar("T")

_LET_GO = 2.0  # seconds to wait for canceled work


async def in_dedicated_thread(work: Callable[[threading.Event], T], name: str) -> T:
    """The result of the work. On a cancellation the work is requested to end, and awaited for a moment: a silent
    registry must not delay the stop of a server, and the next open of the store removes partial results."""
    gone, loop = threading.Event(), asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def fail(error: BaseException) -> None:
        if not future.cancelled():
            future.set_exception(error)

    def succeed(made: T) -> None:
        if not future.cancelled():
            future.set_result(made)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
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
