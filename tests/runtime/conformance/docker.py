"""The runtime "docker" in the suite, over an engine that is started for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Literal

from rock.guest.init import process_tree
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.docker.links import InitTransport, StreamTransport
from rock.runtime.docker.runtime import DockerRuntime
from rock.runtime.docker.spec import Oci
from tests.runtime.conformance.subject import Subject
from tests.runtime.docker import engines

ALL = bool(os.environ.get("ROCK_TEST_DOCKER"))


_CARRIED = {
    "test_kept_programs_are_attached_again": "what one reader was sent and did not read, the next one does not get",
}
_GVISOR = {
    "test_programs_inherit_nothing_of_the_server": "its /proc/self/fd cannot be listed by ls",
    "test_fifty_at_once": "at times ls cannot list a folder: it asks for more than that kernel tells",
    "test_programs_start_with_clean_signals_and_descriptors": "its /proc/self/status tells no signals",
}


class Carried(DockerRuntime):
    """runc's containers as if it were another kernel: what the carrier does, without what gVisor lacks."""

    def way(self, oci: Oci, folder: Path) -> InitTransport:
        return StreamTransport(self.engine, folder)


class OfDocker(Subject):
    image = "rock-test/hand:1"
    # What programs and files do is pid 1's, which is the same in all of them.
    sample = None if ALL else ("test_conform_life", "test_conform_isolation")

    def __init__(self, name: str, oci: Literal["runsc"] | None, isolation: Isolation, *, carried: bool = False) -> None:
        self.name = name
        self.oci = oci
        self.isolation = isolation
        self.carried = carried
        self.known = {**(_CARRIED if carried or oci else {}), **(_GVISOR if oci else {})}

    def missing(self) -> str | None:
        if not ALL and (self.oci or self.carried):
            return "takes minutes: set ROCK_TEST_DOCKER=1, as `make docker` does"
        try:
            engines.shared()
        except engines.CannotBeHad as error:
            return str(error)
        return None

    def make(self, folder: Path) -> DockerRuntime:
        kind = Carried if self.carried else DockerRuntime
        return kind(folder / "run", engines.guest_python(), engines.shared().host)

    def config(self, **values: Any) -> SandboxConfig:
        oci = None if values.get("use_kata_runtime") else self.oci
        return super().config(**{"oci_runtime": oci, "runtime": "docker", **values})

    def leftovers(self, folder: Path) -> dict[str, list[str]]:
        found = super().leftovers(folder)
        own = {entry.pid for entry in process_tree.descendants(process_tree.scan(), engines.pid())} | {engines.pid()}
        found["processes"] = [pid for pid in found["processes"] if int(pid) not in own]
        found["containers"] = [container["Id"] for container in engines.shared().containers()]
        with contextlib.suppress(OSError):
            found["folders"] = sorted(os.listdir(folder / "run"))
        return found


SUBJECTS = [
    OfDocker("docker", None, Isolation.CONTAINER),
    OfDocker("docker-carried", None, Isolation.CONTAINER, carried=True),
    OfDocker("docker-runsc", "runsc", Isolation.GVISOR),
]
