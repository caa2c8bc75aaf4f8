"""Pushes an image's layers as tar archives, its config and its manifest, to a registry or into an OCI layout.

A layer is packed from its folder once: digest and size of the result are stored with it (`PackedLayer`), as are those
of imported blobs. A blob that the registry has is neither packed nor sent again, and one in another repository of the
same registry is mounted from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rock.errors import Unsupported
from rock.images.layers.importer import this_architecture
from rock.images.layers.store import LayerStore, PackedLayer
from rock.images.layers.tar_reader import Entry, Kind
from rock.images.layers.tar_writer import Packer, Part, TarWriter
from rock.images.records import ImageRecord
from rock.images.registry.logins import Login
from rock.images.registry.reference import HOST, Reference

Progress = Callable[[str], None]

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LEVEL = 4  # of gzip: half the time of the default 6, and a twentieth more bytes
_CHUNK = 1 << 20
_LARGEST = 1 << 50  # bytes of a layer's files: they are on the disk already
_STEP = 64 << 20


class Target(Protocol):
    """The destination of an image."""

    def find(self, known: Iterable[PackedLayer]) -> PackedLayer | None:
        """The blobs that it already has."""
        ...

    def blob(self, digest: str, size: int, path: Path) -> None:
        """Store a blob, unless present."""
        ...

    def manifest(self, body: bytes) -> None:
        """Complete the image with its manifest."""
        ...


class ToRegistry:
    """The repository of a reference, under its tag."""

    def __init__(self, reference: Reference, login: Login | None) -> None:
        if reference.digest is not None:
            raise Unsupported(f"{reference.familiar} is named by a digest: that of what is pushed may be another one",
                              hint="give it a tag")  # fmt: skip
        from rock.images.registry.client import Registry  # urllib3

        self._registry = Registry(reference, login)
        self.repository = f"{reference.domain}/{reference.repository}"
        self._tag = reference.tag or "latest"

    def close(self) -> None:
        self._registry.close()

    def find(self, known: Iterable[PackedLayer]) -> PackedLayer | None:
        domain = self._registry.reference.domain
        for row in known:
            if self._registry.has(row.digest):
                return row
            for other in row.repositories:
                if other != self.repository and other.startswith(f"{domain}/") \
                        and self._registry.mount(row.digest, other.removeprefix(f"{domain}/")):
                    return row
        return None

    def blob(self, digest: str, size: int, path: Path) -> None:
        self._registry.upload(digest, size, path)

    def manifest(self, body: bytes) -> None:
        self._registry.put_manifest(self._tag, body, _MANIFEST)


class ToLayout:
    """A file: an OCI layout as a tar with the image's name."""

    repository = ""

    def __init__(self, path: Path, name: str) -> None:
        self._file = open(path, "xb")  # noqa: SIM115, closed by `close`
        self._tar = TarWriter(self._write)
        self._name = name
        self._there: set[str] = set()
        self._small("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')

    def close(self) -> None:
        self._file.close()

    def find(self, known: Iterable[PackedLayer]) -> PackedLayer | None:
        return next((row for row in known if row.digest in self._there), None)

    def blob(self, digest: str, size: int, path: Path) -> None:
        if digest in self._there:
            return
        self._there.add(digest)
        self._tar.header(Entry(_place(digest), Kind.FILE, size=size))
        with open(path, "rb") as file:
            while piece := file.read(_CHUNK):
                self._tar.data(piece)

    def manifest(self, body: bytes) -> None:
        digest = _sha256(body)
        self._small(_place(digest).decode(), body)
        row = {"mediaType": _MANIFEST, "digest": digest, "size": len(body),
               "platform": {"os": "linux", "architecture": this_architecture()},
               "annotations": {"io.containerd.image.name": self._name}}  # fmt: skip
        self._small("index.json", json.dumps({"schemaVersion": 2, "manifests": [row]}).encode())
        self._tar.finish()

    def _write(self, data: bytes) -> None:
        self._file.write(data)

    def _small(self, name: str, data: bytes) -> None:
        self._tar.header(Entry(name.encode(), Kind.FILE, size=len(data)))
        self._tar.data(data)


class Push:
    """One push of `record`, whose layers are in `layers`. ready: original tars of layers, by their digest."""

    def __init__(
        self, record: ImageRecord, layers: LayerStore, target: ToRegistry | ToLayout, scratch: Path,
        progress: Progress | None, ready: Mapping[str, Path],
    ) -> None:  # fmt: skip
        refuse_by_reference(record)
        self._record = record
        self._layers = layers
        self._target = target
        self._scratch = scratch
        self._tell = progress or (lambda _: None)
        self._ready = ready

    def run(self) -> str:
        """Send everything; returns the digest of the manifest."""
        sent = []
        for number, diff in enumerate(self._record.layers, 1):
            self._what = f"layer {number} of {len(self._record.layers)}"
            sent.append(self._layer(diff))
        config = json.dumps(_config(self._record, [row.diff_id for row in sent])).encode()
        path = self._scratch / "config"
        path.write_bytes(config)
        self._target.blob(_sha256(config), len(config), path)
        manifest = json.dumps({
            "schemaVersion": 2, "mediaType": _MANIFEST,
            "config": {"mediaType": CONFIG_TYPE, "digest": _sha256(config), "size": len(config)},
            "layers": [{"mediaType": row.media_type, "digest": row.digest, "size": row.size} for row in sent],
        }).encode()  # fmt: skip
        self._target.manifest(manifest)
        return _sha256(manifest)

    def _layer(self, diff: str) -> PackedLayer:
        found = self._target.find(self._layers.packed(diff))
        if found is None:
            self._tell(f"{self._what}: packing")
            path = self._scratch / "layer"
            found = self._compressed(diff, path) if diff in self._ready else self._pack(diff, path)
            self._tell(f"{self._what}: {found.size / 1e6:.1f} MB to send")
            self._target.blob(found.digest, found.size, path)
            path.unlink()
        else:
            self._tell(f"{self._what}: is there")
        if self._target.repository:
            self._layers.remember(diff, found.seen_in(self._target.repository))
        return found

    def _pack(self, diff: str, path: Path) -> PackedLayer:
        with _Gzip(path, self._came) as out:
            # Layers have overlay's attribute in its `user.` form in every case.
            Packer(_tar_of(out), "user.overlay.", _LARGEST).pack([Part(self._layers.path(diff))])
        return out.done()

    def _compressed(self, diff: str, path: Path) -> PackedLayer:
        with _Gzip(path, self._came) as out, open(self._ready[diff], "rb") as plain:
            while piece := plain.read(_CHUNK):
                out.write(piece)
        packed = out.done()
        assert packed.diff_id == diff, "it is what the layer was made of"
        return packed

    def _came(self, size: int) -> None:
        self._tell(f"{self._what}: {size / 1e6:.0f} MB packed")


def refuse_by_reference(record: ImageRecord) -> None:
    """Raise Unsupported for an image that includes this machine's own files."""
    if record.kind == HOST or record.by_reference:
        raise Unsupported(
            f"image {record.name} shows this machine's own system, which no registry can hold",
            hint="push images that were imported or pulled, or were made of sandboxes of such an image",
        )


class _Gzip:
    """Compresses a stream into a file and computes its digests."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        self._file = open(path, "wb")  # noqa: SIM115, closed by `__exit__`
        self._progress = progress
        self._packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
        self._inner, self._outer = hashlib.sha256(), hashlib.sha256()
        self._came = self._reported = self._size = 0
        self._buffer = bytearray()

    def __enter__(self) -> _Gzip:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
                self._put(self._packer.flush())

    def write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        data = bytes(self._buffer)
        self._buffer.clear()
        self._inner.update(data)
        self._put(self._packer.compress(data))
        self._came += len(data)
        if self._came - self._reported >= _STEP:
            self._reported = self._came
            self._progress(self._came)

    def _put(self, data: bytes) -> None:
        self._outer.update(data)
        self._size += len(data)
        self._file.write(data)

    def done(self) -> PackedLayer:
        """The written blob; after the end."""
        return PackedLayer(f"sha256:{self._inner.hexdigest()}", f"sha256:{self._outer.hexdigest()}", self._size,
                           GZIP_LAYER)  # fmt: skip


class _Owned(TarWriter):
    """Assigns root as the owner: layers in an ordinary user's store have one user, who is root inside."""

    def header(self, entry: Entry) -> None:
        entry.uid = entry.gid = 0
        super().header(entry)


def _tar_of(out: _Gzip) -> TarWriter:
    return TarWriter(out.write) if os.geteuid() == 0 else _Owned(out.write)


def _config(record: ImageRecord, diff_ids: list[str]) -> dict[str, Any]:
    env = [f"{name}={value}" for name, value in record.env.items()]
    run: dict[str, Any] = {**record.other, "Env": env, "WorkingDir": record.cwd}
    for name, value in (("User", record.user if record.user != "root" else ""), ("Entrypoint", list(record.entrypoint)),
                        ("Cmd", list(record.cmd)), ("Labels", record.labels)):  # fmt: skip
        if value:
            run[name] = value
    created = datetime.fromtimestamp(record.created, UTC).isoformat()  # constant: a repeated push is the same image
    return {"created": created, "architecture": record.architecture or this_architecture(), "os": "linux",
            "config": run, "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created": created, "created_by": "rock"} for _ in diff_ids]}  # fmt: skip


def _place(digest: str) -> bytes:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}".encode()


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
