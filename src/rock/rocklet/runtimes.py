"""The runtimes of this machine: selection for a sandbox config, availability, and their resources."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

from rock.errors import InvalidConfig, RockError, Unsupported
from rock.protocol.action import ConnectionList
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.rocklet.commands.registry import open_ahead
from rock.rocklet.commands.session import DEFAULT
from rock.rocklet.commands.shell_process import first_program
from rock.rocklet.images.store import Fetching, Images
from rock.runtime.base import (
    Accelerates,
    Connects,
    Forks,
    Keeps,
    Mounts,
    MountSource,
    OwnImages,
    Pauses,
    Runtime,
    Trait,
)
from rock.runtime.plugins import BrokenRuntime
from rock.runtime.pools import FirstProgram, Pools, StartsFirst

log = logging.getLogger("rock.node")


class Runtimes:
    """Runtimes by name; `default` is the name of the one for configs that name none."""

    def __init__(self, by_name: dict[str, Runtime], default: str, images: Images) -> None:
        self._by_name = by_name
        self.default = default
        self._images = images
        self.fetching = Fetching()
        self.mount_source: MountSource | None = None
        self.first_of: Callable[[str, SandboxConfig], FirstProgram | None] = lambda snapshot_id, config: None

    def __getitem__(self, name: str) -> Runtime:
        return self._by_name[name]

    def names(self) -> list[str]:
        return list(self._by_name)

    # ---- start and stop ----

    async def open(self) -> None:
        """Open all runtimes; one that cannot be opened rejects requests from then on. Raises when the default one
        fails."""
        for runtime in list(self._by_name.values()):
            await self._open(runtime)

    async def _open(self, runtime: Runtime) -> None:
        if isinstance(runtime, Pools):
            runtime.prepare = functools.partial(open_ahead, runtime)
        if isinstance(runtime, StartsFirst):
            runtime.first = first_program(DEFAULT)
            runtime.first_of = self.first_of
        if isinstance(runtime, Mounts):
            runtime.mount_source = self.mount_source
        try:
            await runtime.open()
        except Exception as error:
            if runtime.name == self.default and isinstance(error, RockError):
                raise
            log.warning("runtime %s cannot be used: %r", runtime.name, error)
            self._by_name = {**self._by_name, runtime.name: BrokenRuntime(runtime.name, _told(error))}

    async def sweep(self, known: dict[str, list[str]]) -> None:
        """Remove resources without a record. known: ids of sandboxes with a record, by runtime."""
        for name, runtime in self._by_name.items():
            await self._sweep(runtime, known[name])

    @staticmethod
    async def _sweep(runtime: Runtime, known: list[str]) -> None:
        try:
            swept = await runtime.sweep(known)
        except RockError as error:
            log.warning("runtime %s cannot look for what has no record: %s", runtime.name, error)
        except Exception:  # an error of a third-party runtime must not affect the others
            log.exception("runtime %s fails when it looks for what has no record", runtime.name)
        else:
            if swept:
                log.warning("removed %d sandboxes of %s that had no record: %s", len(swept), runtime.name, swept)

    async def close(self) -> None:
        for runtime in self._by_name.values():
            await runtime.close()

    # ---- selection ----

    def of(self, config: SandboxConfig) -> Runtime:
        """The runtime for a config. InvalidConfig or Unsupported when there is none."""
        name = config.runtime or self.having(config.snapshot) or self._giving(config.isolation)
        try:
            runtime = self._by_name[name]
        except KeyError:
            names = ", ".join(sorted(self._by_name))
            raise InvalidConfig(f"there is no runtime {name!r} on this machine",
                                hint=f"use one of {names}, or leave runtime unset") from None
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
        if config.has_mounts and not isinstance(runtime, Mounts):
            raise Unsupported(
                f"runtime {name!r} cannot mount volumes, folders and agents",
                hint="use the namespace runtime, or leave volumes, mounts and agents unset",
            )
        if config.snapshot is not None and not isinstance(runtime, Forks):
            raise Unsupported(f"runtime {name!r} cannot start from a snapshot",
                              hint="use the namespace runtime, or leave snapshot unset")
        return runtime

    def having(self, snapshot_id: str | None) -> str | None:
        """The runtime that has a snapshot, if there is one."""
        for name, runtime in self._by_name.items() if snapshot_id is not None else ():
            if isinstance(runtime, Forks) and snapshot_id in runtime.snapshots():
                return name
        return None

    def _giving(self, isolation: Isolation | None) -> str:
        """The runtime for a config with an isolation level and no runtime: the default if it provides that level, else
        another one."""
        if isolation is None or getattr(self._by_name[self.default], "isolation", None) == isolation:
            return self.default
        for name, runtime in self._by_name.items():
            if getattr(runtime, "isolation", None) == isolation:
                return name
        given = ", ".join(sorted(str(getattr(r, "isolation", "")) for r in self._by_name.values()))
        raise Unsupported(f"isolation {isolation}: no runtime on this machine gives it (there are: {given})",
                          hint="`rock doctor` tells what is missing here")

    async def check(self, config: SandboxConfig) -> None:
        """Raise the errors that a create would raise at once; starts nothing."""
        runtime = self.of(config)
        if config.on_timeout == "pause" and not isinstance(runtime, Pauses):
            raise Unsupported(f'on_timeout="pause": runtime {runtime.name!r} has no pause',
                              hint="leave out on_timeout, or use another runtime")
        if config.auto_pause is not None and not isinstance(runtime, Pauses):
            raise Unsupported(f"auto_pause: runtime {runtime.name!r} has no pause",
                              hint="leave out auto_pause, or use another runtime")
        # Prerequisites that are installed on first use are checked at that time.
        if await self.has_image(runtime, config):
            await runtime.check(config)

    # ---- images ----

    async def has_image(self, runtime: Runtime, config: SandboxConfig) -> bool:
        """Whether `prepare_image` has nothing to do."""
        if config.snapshot is not None:
            return True
        if isinstance(runtime, OwnImages):
            return await runtime.has_image(config)
        return not _mounts_images(runtime) or self._images.is_ready(config)

    async def prepare_image(self, runtime: Runtime, config: SandboxConfig) -> None:
        """Prepare the image of a sandbox for its runtime; `fetching` reports the progress."""
        if config.snapshot is not None:
            return  # it has its layers, also when the name means another image now
        with self.fetching.of(config.image) as tell:
            if isinstance(runtime, OwnImages):
                await runtime.prepare_image(config, tell)
            elif _mounts_images(runtime):
                await self._images.prepare(config, tell)

    # ---- reports ----

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """The connections of a sandbox, for as long as they are remembered."""
        for runtime in self._by_name.values():
            if isinstance(runtime, Connects) and (found := await runtime.connections(sandbox_id)).total:
                return found
        return ConnectionList()

    def gpus(self) -> tuple[Sequence[str], int]:
        """The kinds of all GPUs, one entry each, and the number of unused ones."""
        return next((r.gpus() for r in self._by_name.values() if isinstance(r, Accelerates)), ([], 0))


def _mounts_images(runtime: Runtime) -> bool:
    """Whether the server's store needs the image before a sandbox of it is created."""
    return any(Trait.IMAGES in traits for traits in runtime.traits.values())


def _told(error: Exception) -> str:
    return error.message if isinstance(error, RockError) else repr(error)
