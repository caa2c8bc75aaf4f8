"""Capabilities of runtimes that create sandboxes before they are requested (warm pools), and that move snapshots."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from rock.protocol.sandbox import ArchivedFiles, SandboxConfig
from rock.runtime.base import Capability, Handle, Process, Program


class Prepared(Protocol):
    """The processes started in a pooled sandbox that is not yet claimed."""

    async def discard(self) -> None:
        """Release its resources: the sandbox is being removed."""
        ...


@runtime_checkable
class Resizes(Protocol, metaclass=Capability):
    """The runtime has a warm pool of a size that can change."""

    def resize_pool(self, size: int | None) -> None:
        """Set the number of warm sandboxes for each recently used image; None is that of the settings."""
        ...


@runtime_checkable
class MovesSnapshots(Protocol, metaclass=Capability):
    """The runtime exports snapshots as layers, and imports them (decision 60)."""

    def layer_count(self, snapshot_id: str) -> int:
        """The number of layers of a snapshot above its image. NotFound."""
        ...

    def export_layer(self, snapshot_id: str, number: int) -> AsyncGenerator[bytes | ArchivedFiles]:
        """The tar of a layer, and at the end its summary; number 0 is the oldest one. InvalidConfig."""
        ...

    async def import_layers(self, snapshot_id: str, sandbox_id: str, image: str, image_digest: str,
                            layers: Sequence[ArchivedFiles], data: Callable[[int], AsyncIterator[bytes]]) -> int | None:
        """Create a snapshot of layers, the oldest first; returns the size of the newest. data: the tar of a layer by
        its number, asked for in order. ImageError for another image, InvalidConfig for what no layer can be."""
        ...


class PoolTarget(NamedTuple):
    """A defined pool. config: of its members. minimum, maximum: between them its size follows the demand."""

    name: str
    config: SandboxConfig
    minimum: int
    maximum: int


class PoolState(NamedTuple):
    """A defined pool now. ready: unclaimed members. target: the size that it should have. hits, misses: claims since
    it was defined. error: why the last member was not made."""

    ready: int = 0
    target: int = 0
    hits: int = 0
    misses: int = 0
    error: str = ""


@runtime_checkable
class DefinesPools(Protocol, metaclass=Capability):
    """The runtime has warm pools of images and snapshots that are defined by name (decision 57)."""

    async def define_pools(self, targets: Sequence[PoolTarget], budget: int) -> Mapping[str, PoolState]:
        """Set all defined pools, which together have at most `budget` members. Returns the state of each, by name."""
        ...

    def pool_states(self) -> Mapping[str, PoolState]:
        """The defined pools, by name."""
        ...


@runtime_checkable
class Pools(Protocol, metaclass=Capability):
    """The runtime creates sandboxes in advance, and its user prepares them."""

    prepare: Callable[[Handle], Awaitable[Prepared | None]] | None
    """Called with each sandbox that is made ahead, under a handle that ends with its claim.

    A RockError says that nothing was started."""

    def prepared(self, handle: Handle) -> Prepared | None:
        """The result of `prepare` for the sandbox with this handle. The caller owns it afterwards."""
        ...


@runtime_checkable
class TakesFiles(Protocol, metaclass=Capability):
    """The runtime reads files of a sandbox without its pid 1."""

    def take_file(self, handle: Handle, path: str, most: int) -> bytes | None:
        """Read at most that many bytes of a file that a program of the sandbox has just written, and remove it. None
        where that is not possible; the file may still be there then."""
        ...


class FirstProgram(NamedTuple):
    """A program that a runtime starts together with each new sandbox. paths: the first of them that the image has is
    its path, argv[0] and SHELL. data: a file of this content is open in it, at descriptor FIRST_DATA."""

    paths: Sequence[str]
    program: Program
    data: bytes | None = None


@runtime_checkable
class StartsFirst(Protocol, metaclass=Capability):
    """The runtime can start a program together with a sandbox, before its user asks for it."""

    first: FirstProgram | None
    """The program; it is kept, and runs as the user of the sandbox, in its environment and its working directory."""

    first_of: Callable[[str, SandboxConfig], FirstProgram | None]
    """The program of a sandbox that starts from a snapshot without processes, by the id of the snapshot and the config
    of the sandbox; None starts none."""

    def started(self, handle: Handle) -> tuple[str, Process] | None:
        """The path and the process of the first program of a sandbox, once. None where it was not started: the user
        starts it. The caller owns the process."""
        ...

    def first_path(self, handle: Handle) -> str | None:
        """The path of the first program of a sandbox of an earlier server, once its `processes` are known; None where
        that program no longer runs, or was not started."""
        ...
