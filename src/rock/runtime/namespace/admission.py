"""What a host can take: refusals that are told before anything is started."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, field
from typing import Literal

from rock import errors
from rock.host import resources
from rock.images.records import RootFS
from rock.protocol.sandbox import Isolation, SandboxConfig

_RESERVE = 256 << 20  # bytes of memory that stay with the host
_LEAST = 64 << 20  # bytes that a new sandbox should find free, or its limit if that is less


def refuse_unsupported(config: SandboxConfig, isolation: Isolation, networks: tuple[str, ...], *,
                       why: str | None = None) -> None:
    """Raise Unsupported for what this runtime, or this host, cannot give. why: what other networks lack."""
    if config.image_os != "linux":
        raise errors.Unsupported(f"image_os {config.image_os!r}: the namespace runtime runs Linux images only")
    if config.use_kata_runtime:
        raise errors.Unsupported("use_kata_runtime: the namespace runtime has no virtual machines",
                                 hint="use a runtime with micro virtual machines")
    if config.oci_runtime is not None:
        raise errors.Unsupported(f'oci_runtime="{config.oci_runtime}": the namespace runtime has no containers',
                                 hint='use runtime="docker"')
    if config.num_gpus or config.accelerator_type:
        raise errors.Unsupported("the namespace runtime gives sandboxes no accelerators", hint="leave num_gpus unset")
    if config.disk is not None and config.keeps_files:
        raise errors.Unsupported(f"disk={config.disk}: a disk with a limit goes with its sandbox, and cannot be kept",
                                 hint="leave disk, or auto_delete_seconds and auto_archive_seconds, unset")
    if config.network not in networks:
        raise errors.Unsupported(f'network "{config.network}" cannot be given here{f": {why}" if why else ""}',
                                 hint=f"use one of {', '.join(networks)}")
    refuse_nofile(config)
    refuse_level(config, isolation)


def refuse_level(config: SandboxConfig, isolation: Isolation) -> None:
    """Raise Unsupported where another isolation was asked for than there is."""
    if config.isolation not in (None, isolation):
        raise errors.Unsupported(
            f"isolation {config.isolation}: this runtime gives {isolation.value} here",
            hint="name a runtime that gives it, or ask for minimum_isolation; `rock doctor` tells what there is")
    if config.minimum_isolation.rank > isolation.rank:
        raise errors.Unsupported(
            f"minimum_isolation {config.minimum_isolation.value}: this host gives {isolation.value}",
            hint="`rock doctor` tells what is missing here")


def refuse_nofile(config: SandboxConfig) -> None:
    """Raise Unsupported for more open files than this host lets a process have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if config.nofile is not None and hard != resource.RLIM_INFINITY and config.nofile > hard:
        raise errors.Unsupported(f"nofile={config.nofile}: processes here may have {hard} open files at most",
                                 hint=f"ask for at most {hard}, or raise the server's own limit")


def refuse_too_large(config: SandboxConfig) -> None:
    """Raise InvalidConfig for a sandbox that could never fit, and NoCapacity when there is no memory free now.

    Limits may be overcommitted, so what counts is what is really free and not the sum of the limits.
    """
    cores = os.cpu_count() or 1
    wanted = max(config.cpus, config.limit_cpus or 0.0)
    if wanted > cores:
        raise errors.InvalidConfig(f"Requested CPUs {wanted} exceed the {cores} of this machine",
                                   hint=f"ask for at most {cores}")
    total, available = resources.read()
    if config.memory_bytes > total:
        raise errors.InvalidConfig(
            f"Requested memory {config.memory} ({config.memory_bytes} bytes) exceeds the {total} bytes of this machine",
            hint=f"ask for at most {total >> 20}m")
    if available < _RESERVE + min(_LEAST, config.memory_bytes):
        raise errors.NoCapacity(f"{available >> 20} MB of memory are available on this machine; "
                                f"{(_RESERVE + _LEAST) >> 20} MB are needed to start a sandbox",
                                hint="stop some sandboxes, or try again")


# ---- kind ----
#
# What can be said of a sandbox before somebody asks for it.

_MOST_SHARED = 2 << 30


@dataclass(frozen=True)
class Kind:
    """What pool members have in common."""

    rootfs: RootFS = field(compare=False, hash=False)
    digest: str
    network: Literal["none", "nat", "bridge", "host"]
    shared: int

    @classmethod
    def of(cls, rootfs: RootFS, config: SandboxConfig) -> Kind:
        return cls(rootfs, rootfs.digest, config.network, config.shm_bytes or _shared_memory(config.memory_bytes))


def _shared_memory(memory: int) -> int:
    """Bytes of /dev/shm, and of System V shared memory, for a memory limit: the greatest power of two up to a quarter.

    What lies there belongs to no process, so with more of it than the limit the kernel would find only pid 1 to kill.
    """
    return min(_MOST_SHARED, 1 << max(20, (memory // 4).bit_length() - 1))
