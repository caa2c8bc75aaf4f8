"""What an image is to a runtime: folders of this machine that are stacked, and a few settings.

    top layer  ──┐
    ...          ├── overlay lowerdir="top:...:bottom"   +   binds on top of it, in order   +   env, cwd, user
    bottom layer ┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Bind:
    """A folder or file of the host that is shown at `target` (absolute, inside).

    writable: the sandbox may write at `target`, and its writes must never reach `source`: a runtime that can, puts an
        overlay over `source`; one that cannot, mounts it read-only.
        With an id mapping too, only what everybody may read of `source` is shown.
    idmap: mount it with the sandbox's user mapping. False (always so for the folders of the host) keeps the host's
        owners, which inside are nobody: a file of the host that only its owner can read stays unreadable.
    """

    source: str
    target: str
    writable: bool = False
    idmap: bool = False


@dataclass(frozen=True)
class RootFS:
    """An image on disk, ready to be mounted.

    digest: of the whole: equal digests are equal contents, so it is the key of a warm pool.
    layers: host folders, the top layer first, in the order of overlay's `lowerdir`. Never written to.
    binds: mounted after the overlay, in order; their mount points exist in the layers.
    env: the image's environment, PATH included. cwd: absolute. user: "name", "uid", "name:group" or "uid:gid".
    entrypoint, cmd: what the image would run; ROCK runs neither by itself. other: see ImageRecord.
    """

    digest: str
    layers: tuple[str, ...]
    binds: tuple[Bind, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "root"
    name: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    def with_layers(self, extra: Sequence[str]) -> RootFS:
        """The same with further read-only folders on top, the topmost first."""
        if not extra:
            return self
        return replace(self, digest="+".join((self.digest, *extra)), layers=(*extra, *self.layers))
