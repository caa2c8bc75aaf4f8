"""The two ways to a container's pid 1: a socket of ours, or its standard streams where no descriptor can cross."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rock.runtime import guestpython
from rock.runtime.carrier import Carrier
from rock.runtime.docker.door import Door
from rock.runtime.docker.engine import Engine
from rock.runtime.initlink import InitLink


class Way(Protocol):
    """One attempt to reach a pid 1, made before the container starts or when it was lost. `close` it in any case."""

    folder: str | None  # what has to be mounted for it

    @property
    def options(self) -> dict[str, object]:
        """What pid 1 has to be told."""
        ...

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        """The link to the pid 1 of a container that runs. Unavailable, Lost."""
        ...

    async def close(self) -> None:
        """Release what it holds; the link ends with it where it is carried. Idempotent."""
        ...


class BySocket:
    """The same kernel: descriptors cross, and nothing is between us once pid 1 has connected."""

    options: dict[str, object] = {"socket": f"{guestpython.LINK}/s"}

    def __init__(self, folder: Path) -> None:
        self._door = Door(folder / "link")
        self.folder: str | None = str(folder / "link")

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        return InitLink(await self._door.enter(pid, sandbox_id, patience), sandbox_id)

    async def close(self) -> None:
        self._door.close()


class ByStreams:
    """Another kernel: bytes over the engine's attached streams."""

    options: dict[str, object] = {}
    folder: str | None = None

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._carrier: Carrier | None = None

    async def enter(self, engine_id: str, pid: int, sandbox_id: str, patience: float) -> InitLink:
        self._carrier = Carrier(await self._engine.attach(engine_id), self._folder, sandbox_id)
        link = InitLink(await self._carrier.begin(patience), sandbox_id)
        link.resize = self._carrier.resize
        return link

    async def close(self) -> None:
        if self._carrier is not None:
            self._carrier.close()
            await self._carrier.gone()

