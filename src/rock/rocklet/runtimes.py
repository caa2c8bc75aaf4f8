"""The runtimes of this machine: which of them a sandbox is made with, and whether it could be."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from rock.errors import InvalidConfig, RockError, Unsupported
from rock.protocol.action import ConnectionList
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.rocklet.commands.registry import open_ahead
from rock.rocklet.images.store import Fetching, Images
from rock.runtime.base import Accelerates, Connects, Keeps, OwnImages, Pools, Runtime, Trait
from rock.runtime.plugins import BrokenRuntime

log = logging.getLogger("rock.node")


class Runtimes:
    """By name; `default` is the name of the one for configs that name none."""

    def __init__(self, by_name: dict[str, Runtime], default: str, images: Images) -> None:
        self._by_name = by_name
        self.default = default
        self._images = images
        self.fetching = Fetching()

    def __getitem__(self, name: str) -> Runtime:
        return self._by_name[name]

    def names(self) -> list[str]:
        return list(self._by_name)

    # ---- life ----

    async def open(self) -> None:
        """Open all; one that cannot be opened refuses from then on. Raises when the default one says why."""
        for runtime in list(self._by_name.values()):
            await self._open(runtime)

    async def _open(self, runtime: Runtime) -> None:
        if isinstance(runtime, Pools):
            runtime.prepare = functools.partial(open_ahead, runtime)
        try:
            await runtime.open()
        except Exception as error:
            if runtime.name == self.default and isinstance(error, RockError):
                raise
            log.warning("runtime %s cannot be used: %r", runtime.name, error)
            self._by_name = {**self._by_name, runtime.name: BrokenRuntime(runtime.name, _told(error))}

    async def sweep(self, known: dict[str, list[str]]) -> None:
        """Remove what has no record. known: the ids of what has one, by runtime."""
        for name, runtime in self._by_name.items():
            await self._sweep(runtime, known[name])

    @staticmethod
    async def _sweep(runtime: Runtime, known: list[str]) -> None:
        try:
            swept = await runtime.sweep(known)
        except RockError as error:
            log.warning("runtime %s cannot look for what has no record: %s", runtime.name, error)
        except Exception:  # of a runtime from elsewhere: the others are none the worse
            log.exception("runtime %s fails when it looks for what has no record", runtime.name)
        else:
            if swept:
                log.warning("removed %d sandboxes of %s that had no record: %s", len(swept), runtime.name, swept)

    async def close(self) -> None:
        for runtime in self._by_name.values():
            await runtime.close()

    # ---- which ----

    def of(self, config: SandboxConfig) -> Runtime:
        """The one for a config. InvalidConfig or Unsupported when there is none."""
        name = config.runtime or self._giving(config.isolation)
        try:
            runtime = self._by_name[name]
        except KeyError:
            names = ", ".join(sorted(self._by_name))
            raise InvalidConfig(f"no runtime {name!r} on this machine (there are: {names})") from None
        if config.keeps_files and not isinstance(runtime, Keeps):
            raise Unsupported(
                f"runtime {name!r} cannot keep the files of a stopped sandbox",
                hint="leave auto_delete_seconds and auto_archive_seconds unset",
            )
        if config.egress is not None and not isinstance(runtime, Connects):
            raise Unsupported(
                f"runtime {name!r} cannot hold a sandbox to a list of places (egress)",
                hint="use the namespace runtime, or leave egress unset",
            )
        return runtime

    def _giving(self, isolation: Isolation | None) -> str:
        """The runtime for who names a level and no runtime: the default if it gives that, else one that does."""
        if isolation is None or getattr(self._by_name[self.default], "isolation", None) == isolation:
            return self.default
        for name, runtime in self._by_name.items():
            if getattr(runtime, "isolation", None) == isolation:
                return name
        given = ", ".join(sorted(str(getattr(r, "isolation", "")) for r in self._by_name.values()))
        raise Unsupported(f"isolation {isolation}: no runtime on this machine gives it (there are: {given})",
                          hint="`rock doctor` tells what is missing here")

    async def check(self, config: SandboxConfig) -> None:
        """Raise what a create would raise at once; starts nothing."""
        runtime = self.of(config)
        # What has to be installed first is checked when it is.
        if await self._has_image(runtime, config):
            await runtime.check(config)

    # ---- images ----

    async def _has_image(self, runtime: Runtime, config: SandboxConfig) -> bool:
        if isinstance(runtime, OwnImages):
            return await runtime.has_image(config)
        return not _mounts_images(runtime) or self._images.is_ready(config)

    async def prepare_image(self, runtime: Runtime, config: SandboxConfig) -> None:
        """Have the image of a sandbox where its runtime needs it; `fetching` tells how far that is."""
        with self.fetching.of(config.image) as tell:
            if isinstance(runtime, OwnImages):
                await runtime.prepare_image(config, tell)
            elif _mounts_images(runtime):
                await self._images.prepare(config, tell)

    # ---- what they know ----

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """What a sandbox connected to, for as long as that is remembered."""
        for runtime in self._by_name.values():
            if isinstance(runtime, Connects) and (found := await runtime.connections(sandbox_id)).total:
                return found
        return ConnectionList()

    def gpus(self) -> tuple[Sequence[str], int]:
        """The kinds of those that there are, one each, and how many are unused."""
        return next((r.gpus() for r in self._by_name.values() if isinstance(r, Accelerates)), ([], 0))


def _mounts_images(runtime: Runtime) -> bool:
    """Whether the server's store has to have an image before a sandbox is made of it."""
    return any(Trait.IMAGES in traits for traits in runtime.traits.values())


def _told(error: Exception) -> str:
    return error.message if isinstance(error, RockError) else repr(error)
