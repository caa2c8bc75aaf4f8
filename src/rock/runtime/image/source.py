"""What a runtime needs of the images on this machine."""

from __future__ import annotations

from typing import Protocol

from rock.runtime.image.leases import Lease
from rock.runtime.image.rootfs import RootFS


class Images(Protocol):
    """Where root file systems come from."""

    def resolve(self, name: str) -> RootFS:
        """The image, ready to be mounted. ImageError when it is not on this machine."""
        ...

    def lease(self, rootfs: RootFS) -> Lease | None:
        """Hold its layers on disk, for as long as a copy of the lease's descriptor is open; None if nothing has to be.
        ImageError when they were removed since."""
        ...
