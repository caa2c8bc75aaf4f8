"""Runtimes of other installed distributions: the entry points `rock.runtimes`.

    [project.entry-points."rock.runtimes"]
    mine = "my_package:make"        # make(context: RuntimeContext) -> Runtime, whose name is "mine"

A runtime that fails to load or open is replaced by a `BrokenRuntime`, which rejects requests with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from rock import errors
from rock.images.store import ImageStore
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.base import Handle, Liveness, Process, Program, Runtime, Trait

GROUP = "rock.runtimes"
OWN = ("docker", "fake", "gvisor", "landlock", "namespace", "process")  # reserved names


@dataclass(frozen=True)
class RuntimeContext:
    """The arguments of a runtime factory.

    run_dir: a folder of its own, to be created on demand; it lives as long as the machine runs. images: the server's
    image store. pool_size: the configured number of warm sandboxes per image.
    """

    run_dir: Path
    images: ImageStore
    pool_size: int = 0


class BrokenRuntime:
    """Replacement of a runtime that failed: it creates nothing, and its errors state the reason.

    Its sandboxes of a former run count as gone. Their files are not touched, so the repaired runtime can sweep them.
    """

    traits: Mapping[Isolation, frozenset[Trait]] = {Isolation.NONE: frozenset()}

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    def _refusal(self) -> errors.Unsupported:
        return errors.Unsupported(f"runtime {self.name!r} cannot be used: {self.reason}",
                                  hint="repair or remove what brings it, and start the server again; "
                                       "`rock doctor` tries it")

    async def open(self) -> None:
        return

    async def close(self) -> None:
        return

    async def check(self, config: SandboxConfig) -> None:
        raise self._refusal()

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        raise self._refusal()

    async def recover(self, handle: Handle) -> Liveness:
        return Liveness.GONE

    async def spawn(self, handle: Handle, program: Program) -> Process:
        raise self._refusal()

    async def attach(self, handle: Handle, key: str) -> Process:
        raise self._refusal()

    async def processes(self, handle: Handle) -> list[str]:
        return []

    async def wait(self, handle: Handle) -> str:
        return "gone"

    async def stop(self, handle: Handle, grace: float) -> None:
        return

    async def destroy(self, handle: Handle) -> None:
        return

    async def sweep(self, known: Sequence[str]) -> list[str]:
        return []


def load(context: Callable[[str], RuntimeContext]) -> dict[str, Runtime]:
    """All installed runtimes, by name, not opened yet."""
    found: dict[str, Runtime] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in OWN:
            found[entry.name] = _made(entry.name, entry.value, entry.load, context)
    return found


def _made(name: str, value: str, load_it: Callable[[], object], context: Callable[[str], RuntimeContext]) -> Runtime:
    try:
        factory = load_it()
        runtime = factory(context(name)) if callable(factory) else factory
    except Exception as error:
        return BrokenRuntime(name, f"{value} raised {error!r}")
    fault = _fault(name, runtime)
    if fault is not None or not isinstance(runtime, Runtime):
        return BrokenRuntime(name, f"{value}: {fault}")
    return runtime


def _fault(name: str, runtime: object) -> str | None:
    if not isinstance(runtime, Runtime):
        missing = [word for word in _METHODS if not hasattr(runtime, word)]
        return f"what it made is no Runtime: it has no {', '.join(missing)}"
    if runtime.name != name:
        return f"the runtime calls itself {runtime.name!r}"
    declared = runtime.traits
    if not isinstance(declared, Mapping) or not declared:
        return "its traits are no mapping of isolation levels"
    for level, traits in declared.items():
        if not isinstance(level, Isolation) or not set(traits) <= set(Trait):
            return f"its traits name what there is not: {level!r}: {traits!r}"
    return None


_METHODS = ("name", "traits", "open", "close", "check", "create", "recover", "spawn", "attach", "processes", "wait",
            "stop", "destroy", "sweep")  # fmt: skip
