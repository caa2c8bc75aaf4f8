"""What running sandboxes have mounted.

    use/<hash>.json   the layer folders of one image; locked (shared) by every sandbox that has it mounted

The lock is a descriptor that the sandbox's pid 1 inherits, so it holds as long as the sandbox lives, whatever happens
to the rocklet, and is gone with it; after a restart of the machine nothing is held.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

from rock.errors import ImageError
from rock.runtime.image.locks import locked, storing, try_lock, write_atomic
from rock.runtime.image.rootfs import RootFS


class Lease:
    """Keeps an image's layers on disk while `fd` or a copy of it, inherited for one, is open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close our copy. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Leases:
    """The leases below `folder`; `gate` is the lock that collecting garbage takes alone."""

    def __init__(self, folder: Path, gate: Path) -> None:
        self._folder = folder
        self._gate = gate
        folder.mkdir(exist_ok=True)

    def take(self, rootfs: RootFS) -> Lease:
        """Hold the layers of an image; ImageError when one of them has been removed since it was resolved."""
        body = json.dumps(list(rootfs.layers)).encode()
        path = self._folder / f"{hashlib.sha256(body).hexdigest()[:32]}.json"
        with storing("taking an image into use"), locked(self._gate, shared=True):
            for layer in rootfs.layers:
                if not os.path.isdir(layer):
                    raise ImageError(f"image {rootfs.name} was removed while it was about to be used")
            if not path.exists():
                write_atomic(path, body)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)
        return Lease(fd)

    def folders(self) -> set[str]:
        """Layer folders that are held. Forgets files that nobody holds, so the caller has the gate for itself."""
        held: set[str] = set()
        for path in self._folder.glob("*.json"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if try_lock(fd):
                    path.unlink()
                else:
                    held.update(json.loads(path.read_bytes()))
            finally:
                os.close(fd)
        return held
