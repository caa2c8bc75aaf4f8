"""What the suite has to know of a runtime: how to make it, whether it can be had here, and what it declares."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rock.guest.init import process_tree
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.base import Handle, Runtime, Trait

# The modules of this folder that may have SUBJECTS; what is not there yet is passed over.
MODULES = ("fake", "process", "namespace", "docker", "gvisor")
MORE = "ROCK_TEST_SUBJECTS"  # further modules with SUBJECTS, comma-separated: of runtimes from elsewhere
CHOSEN = "ROCK_TEST_CONFORM"  # which of MODULES; all unless it is set

Need = Trait | type


def needs(*wanted: Need) -> pytest.MarkDecorator:
    """Mark a test: with a runtime that does not declare all of it, it is skipped."""
    return pytest.mark.needs.with_args(*wanted)


class Subject:
    """One runtime at one isolation level. Subclasses say what is their own.

    The image has /bin/sh, bash and coreutils, and python3 at `python`; root, and where `Trait.USERS` is declared alice
    (1000:1000, also in group staff, 50) and nobody (65534). `home(handle)` is a folder of the sandbox's own that is
    empty at first and the working folder of its programs, seen as they see it.
    """

    name = ""
    isolation = Isolation.NONE
    image = "host"
    sample: tuple[str, ...] | None = None  # modules that are enough in a short run; None is all of them
    known: dict[str, str] = {}  # tests that fail here for reasons that are not ours to mend, and the reason
    python = "/usr/bin/python3"
    resets_reserved = True  # programs do not inherit that signal 32 is ignored, which Linux's C library keeps to itself

    def missing(self) -> str | None:
        """Why the runtime cannot be had on this machine, as a sentence; None when it can. May install what it needs."""
        return None

    def make(self, folder: Path) -> Runtime:
        """The runtime, not yet opened, with all its state below folder/run; again for the same folder is the runtime
        after a restart of the server."""
        raise NotImplementedError

    def home(self, handle: Handle) -> Path:
        return Path("/work")

    def config(self, **values: Any) -> SandboxConfig:
        return SandboxConfig(**{"image": self.image, "memory": "256m", "cpus": 1, "pids": 256, **values})

    def leftovers(self, folder: Path) -> dict[str, list[str]]:
        """What is on the machine because of the sandboxes of `folder`. It is the same before the first and after the
        last."""
        run_dir = folder / "run"
        children = process_tree.descendants(process_tree.scan(), os.getpid())
        return {
            "folders": sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else [],
            "processes": [str(entry.pid) for entry in children if entry.alive],
            "descriptors": sorted(descriptors()),
        }

    # ---- what the suite asks ----

    def lacks(self, wanted: tuple[Need, ...], folder: Path) -> list[str]:
        """What of it the runtime does not declare."""
        runtime = self.make(folder)
        traits = runtime.traits[self.isolation]
        return [
            need.value if isinstance(need, Trait) else need.__name__
            for need in wanted
            if not (need in traits if isinstance(need, Trait) else isinstance(runtime, need))
        ]


def descriptors() -> Iterator[str]:
    """Kinds of what is open in this process."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}").split(":")[0]
        except OSError:  # that of the listing itself
            continue


@cache
def here() -> dict[str, str | None]:
    """Why each subject is missing, None when it can be had; found out once."""
    return {name: subject.missing() for name, subject in subjects().items()}


@cache
def subjects() -> dict[str, Subject]:
    """All, by name, whether they can be had here or not."""
    chosen = os.environ.get(CHOSEN)
    names = [f"{__package__}.{name}" for name in MODULES if not chosen or name in chosen.split(",")]
    names = [name for name in names if importlib.util.find_spec(name) is not None]
    names += [name for name in os.environ.get(MORE, "").split(",") if name]
    return {subject.name: subject for name in names for subject in importlib.import_module(name).SUBJECTS}
