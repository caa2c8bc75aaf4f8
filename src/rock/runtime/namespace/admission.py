"""Admission checks of the namespace runtime, before anything starts, and the kinds of pool members."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, field
from typing import Literal

from rock import errors
from rock.host import resources
from rock.images.records import RootFS
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.refusals import LINUX_ONLY

_RESERVE = 256 << 20  # bytes of memory reserved for the host
_LEAST = 64 << 20  # bytes of free memory that a new sandbox requires, or its limit if that is less
_CORES = os.cpu_count() or 1


def refuse_unsupported(config: SandboxConfig, isolation: Isolation, networks: tuple[str, ...], *,
                       why: str | None = None) -> None:
    """Raise Unsupported for options that this runtime or host lacks. why: the reason for which other networks are
    missing."""
    if config.image_os != "linux":
        raise errors.Unsupported(f"image_os {config.image_os!r}: the namespace runtime runs Linux images only",
                                 hint=LINUX_ONLY)
    if config.use_kata_runtime:
        raise errors.Unsupported("use_kata_runtime: the namespace runtime has no virtual machines",
                                 hint="use a runtime with micro virtual machines")
    if config.oci_runtime is not None:
        raise errors.Unsupported(f'oci_runtime="{config.oci_runtime}": the namespace runtime has no containers',
                                 hint='use runtime="docker"')
    if config.num_gpus or config.accelerator_type:
        raise errors.Unsupported("the namespace runtime gives sandboxes no accelerators", hint="leave gpus unset")
    if config.disk is not None and config.keeps_files:
        raise errors.Unsupported(f"disk={config.disk}: a disk with a limit goes with its sandbox, and cannot be kept",
                                 hint="leave disk, or auto_delete_seconds and auto_archive_seconds, unset")
    if config.network not in networks:
        raise errors.Unsupported(f'network "{config.network}" cannot be given here{f": {why}" if why else ""}',
                                 hint=f"use one of {', '.join(networks)}")
    refuse_nofile(config)
    refuse_level(config, isolation)


def refuse_level(config: SandboxConfig, isolation: Isolation) -> None:
    """Raise Unsupported when the requested isolation differs from the available one."""
    if config.isolation not in (None, isolation):
        raise errors.Unsupported(
            f"isolation {config.isolation}: this runtime gives {isolation.value} here",
            hint="name a runtime that gives it, or ask for minimum_isolation; `rock doctor` tells what there is")
    if config.minimum_isolation.rank > isolation.rank:
        raise errors.Unsupported(
            f"minimum_isolation {config.minimum_isolation.value}: this host gives {isolation.value}",
            hint="`rock doctor` tells what is missing here")


def refuse_nofile(config: SandboxConfig) -> None:
    """Raise Unsupported when nofile exceeds the host's limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if config.nofile is not None and hard != resource.RLIM_INFINITY and config.nofile > hard:
        raise errors.Unsupported(f"nofile={config.nofile}: processes here may have {hard} open files at most",
                                 hint=f"ask for at most {hard}, or raise the server's own limit")


def refuse_too_large(config: SandboxConfig) -> None:
    """Raise InvalidConfig for a sandbox that can never fit, and NoCapacity when there is not enough free memory now.

    Limits may be overcommitted, so the check compares with the free memory and not with the sum of the limits.
    """
    cores = _CORES
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


# ---- kinds of pool members ----

_MOST_SHARED = 2 << 30


@dataclass(frozen=True)
class Kind:
    """The properties that the members of one pool share. snapshot: id, or ""."""

    rootfs: RootFS = field(compare=False, hash=False)
    digest: str
    network: Literal["none", "nat", "bridge", "host"]
    shared: int
    snapshot: str = ""

    @classmethod
    def of(cls, rootfs: RootFS, config: SandboxConfig) -> Kind:
        return cls(rootfs, rootfs.digest, config.network, config.shm_bytes or _shared_memory(config.memory_bytes),
                   config.snapshot or "")


def _shared_memory(memory: int) -> int:
    """Size of /dev/shm and limit of System V shared memory in bytes: the greatest power of two up to a quarter of the
    limit.

    Shared memory belongs to no process. If it could exceed the limit, the kernel could only kill pid 1 to free it.
    """
    return min(_MOST_SHARED, 1 << max(20, (memory // 4).bit_length() - 1))
