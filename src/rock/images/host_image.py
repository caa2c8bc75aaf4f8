"""This machine's own system as an image: the built-in `host`, aliases of it, and images derived from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

from rock.images.host import HostImage
from rock.images.layers.importer import this_architecture
from rock.images.layers.store import LayerStore
from rock.images.records import Bind, ImageRecord, RootFS
from rock.images.registry.reference import HOST

_BY_REFERENCE = "shows this machine's own system: changes of the machine show in it"


class HostImages:
    """layers: those of the store."""

    def __init__(self, layers: LayerStore) -> None:
        self._layers = layers
        self._host = HostImage(layers)

    def diff_id(self) -> str:
        """Digest of its own layer for the current state of the machine, without building it."""
        return self._host.diff_id()

    def record(self, name: str, created: float) -> ImageRecord:
        """Its record under a name; created: seconds since the epoch."""
        host = self._host.current()
        return ImageRecord(
            name=name, kind=HOST, digest=host.diff_id, id=host.diff_id, layers=(host.diff_id,), size=0, created=created,
            by_reference=True, architecture=this_architecture(), env=host.env, note=_BY_REFERENCE,
        )  # fmt: skip

    def rootfs(self, name: str = HOST, *, writable: bool = False) -> RootFS:
        """Its root file system, ready to be mounted. writable: each sandbox may write anywhere, in its own overlay."""
        host = self._host.current()
        binds: tuple[Bind, ...] = host.binds
        if writable:
            binds = tuple(_opened(bind) for bind in binds)
        digest = host.diff_id if binds is host.binds else f"{host.diff_id}-{_hash_of(binds)}"
        return RootFS(digest=digest, layers=(self._layers.path(host.diff_id),), binds=binds, env=host.env, name=name)

    def named(self, record: ImageRecord) -> RootFS:
        """The root file system of a record that includes this machine's system."""
        extra = [self._layers.path(diff) for diff in reversed(record.layers[1:])]
        rootfs = self.rootfs(record.name, writable=os.geteuid() == 0 and not extra)
        if not extra:
            return rootfs
        # Derived from an image of this machine's system: its changed settings are its own.
        made = replace(
            rootfs, env={**rootfs.env, **record.env}, cwd=record.cwd, user=record.user, labels=record.labels,
            entrypoint=record.entrypoint, cmd=record.cmd, other=record.other,
        )  # fmt: skip
        said = (sorted(made.env.items()), made.cwd, made.user, made.entrypoint, made.cmd)
        return replace(made, digest=f"{rootfs.digest}-{_hash_of(said)}").with_layers(extra)


def _hash_of(value: object) -> str:
    """A short digest of a value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _opened(bind: Bind) -> Bind:
    """Binds of the machine's folders as writable; its Python may be in a user's home and stays read-only."""
    return replace(bind, writable=True, idmap=True) if bind.source == bind.target else bind
