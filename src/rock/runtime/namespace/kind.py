"""What can be said of a sandbox before somebody asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rock.protocol.sandbox import SandboxConfig
from rock.runtime.image.rootfs import RootFS

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
