"""Memory (total, available, pressure) and GPUs of this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from rock.errors import NoCapacity, Unsupported
from rock.protocol.sandbox import SandboxConfig

_FRESH = 0.02  # cache lifetime in seconds: a read takes 40 us, and creates come in bursts
MEMORY_EACH, _FILES_EACH = 4 << 20, 2  # of an idle sandbox with a session, and a reserve
ACTIVE_FILES = 4  # one of so many descriptors is for sandboxes that are in use and for clients
_UNKNOWN = 2000
_known = (float("-inf"), 0, 0)


def read() -> tuple[int, int]:
    """Total and available memory in bytes; zeros where the machine does not report them."""
    global _known
    now = time.monotonic()
    if now - _known[0] > _FRESH:
        text = _meminfo()
        total = _value(text, b"MemTotal:") or 0
        available = _value(text, b"MemAvailable:")
        _known = now, total, total if available is None else available
    return _known[1], _known[2]


def _meminfo() -> bytes:
    """The first lines of /proc/meminfo; without a file object, which takes longer than the rest."""
    try:
        fd = os.open("/proc/meminfo", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(fd, 1024)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _value(text: bytes, name: bytes) -> int | None:
    """Bytes of a line "name: NUMBER kB"."""
    at = text.find(name)
    return None if at < 0 else int(text[at + len(name) :].split(None, 1)[0]) << 10


def sandboxes(share: int = 1) -> tuple[int, str]:
    """How many sandboxes with a session this process holds at most, and the reason: the memory and the file descriptors
    of an idle one, as `bench/growth.py` measures them. share: number of processes that share the memory."""
    memory = read()[0] // share
    of = f" of each of {share} processes" if share > 1 else ""
    files = open_files()
    each = MEMORY_EACH >> 20
    limits = [] if not memory else [(memory // MEMORY_EACH, f"{memory >> 20} MB of memory{of}, {each} each")]
    if files is not None:
        limits.append((within(files), f"{files} file descriptors (ulimit -n), {_FILES_EACH} each for idle ones"))
    return min(limits, default=(_UNKNOWN, "this machine reports no memory"))


def within(files: int) -> int:
    """How many sandboxes with a session a server holds that may open so many files."""
    return (files - files // ACTIVE_FILES) // _FILES_EACH


def open_files(*, hard: bool = False) -> int | None:
    """The number of files that this process may open; None without a limit. hard: that it could permit itself."""
    try:
        import resource
    except ImportError:  # the platform has no such limits
        return None
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[int(hard)]
    return None if files == resource.RLIM_INFINITY else files


def pressure() -> float | None:
    """Percent of the last ten seconds in which a program waited for memory; None where the kernel does not report it.
    Uses this process's control group if it reports the value: a container is short of memory before its machine is."""
    for path in ("/sys/fs/cgroup/memory.pressure", "/proc/pressure/memory"):
        try:
            with open(path, encoding="ascii") as lines:
                for line in lines:
                    kind, _, rest = line.partition(" ")
                    if kind == "some":
                        return float(rest.partition("avg10=")[2].partition(" ")[0])
        except (OSError, ValueError):
            continue
    return None


# ---- GPUs, as NVIDIA's driver reports them, and their assignment to sandboxes ----

_DRIVER = Path("/proc/driver/nvidia/gpus")
_MOST = 64


@dataclass(frozen=True)
class Gpu:
    """One GPU. uuid: as the container engine takes it. model: as the driver reports it."""

    uuid: str
    model: str

    @property
    def kind(self) -> str:
        """The accelerator type: "NVIDIA A100-SXM4-40GB" is an A100."""
        words = self.model.replace("-", " ").split()
        known = [word for word in words if any(c.isdigit() for c in word) and word[:1].isalpha()]
        return known[0] if known else self.model


def found(folder: Path = _DRIVER) -> list[Gpu]:
    """The GPUs that the driver reports; empty without a driver."""
    gpus: list[Gpu] = []
    try:
        entries = sorted(folder.iterdir())[:_MOST]
    except OSError:
        return gpus
    for entry in entries:
        try:
            lines = (entry / "information").read_text(errors="replace").splitlines()
        except OSError:
            continue
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if fields.get("GPU UUID", "").startswith("GPU-"):
            gpus.append(Gpu(fields["GPU UUID"], fields.get("Model", "GPU")))
    return gpus


@dataclass
class Gpus:
    """The assignment of GPUs: whole ones, each to one sandbox at a time."""

    all: list[Gpu] = field(default_factory=found)
    _given: dict[str, tuple[str, ...]] = field(default_factory=dict)  # uuids by owner

    def kinds(self) -> list[str]:
        return [gpu.kind for gpu in self.all]

    @property
    def free(self) -> list[Gpu]:
        given = {uuid for uuids in self._given.values() for uuid in uuids}
        return [gpu for gpu in self.all if gpu.uuid not in given]

    def refuse(self, config: SandboxConfig) -> None:
        """Raise Unsupported for a request that this machine can never satisfy."""
        count, kind = _spec(config)
        fit = [gpu for gpu in self.all if kind in (None, gpu.kind)]
        if count > len(fit):
            there = ", ".join(self.kinds()) or "none"
            raise Unsupported(f"{count} accelerators of type {kind or 'GPU'} were asked for; this machine has {there}",
                              hint="leave gpus and gpu_type unset")

    def take(self, owner: str, config: SandboxConfig) -> tuple[str, ...]:
        """Assign GPUs to a sandbox; returns their UUIDs. NoCapacity, Unsupported."""
        self.refuse(config)
        count, kind = _spec(config)
        fit = [gpu.uuid for gpu in self.free if kind in (None, gpu.kind)]
        if count > len(fit):
            raise NoCapacity(f"{count} GPUs were asked for; {len(fit)} of this machine are free",
                             hint="stop some sandboxes, or retry later")
        if count:
            self._given[owner] = tuple(fit[:count])
        return self._given.get(owner, ())

    def of(self, owner: str) -> list[str]:
        """UUIDs of its GPUs."""
        return list(self._given.get(owner, ()))

    def taken(self, owner: str, uuids: tuple[str, ...]) -> None:
        """Record the GPUs of a recovered sandbox."""
        if uuids:
            self._given[owner] = uuids

    def give_back(self, owner: str) -> None:
        self._given.pop(owner, None)


def _spec(config: SandboxConfig) -> tuple[int, str | None]:
    """Parse number and type. Unsupported for a fraction of a GPU."""
    wanted = config.num_gpus if config.num_gpus is not None else 1.0 if config.accelerator_type else 0.0
    if wanted != int(wanted):
        raise Unsupported(f"num_gpus={wanted:g}: a container has whole GPUs", hint="num_gpus=1")
    return int(wanted), config.accelerator_type
