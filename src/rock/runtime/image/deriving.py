"""Images that are made here of others: their layers with one more on top, under a new name."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from rock.runtime.image.adding import EMPTY, unpack
from rock.runtime.image.blobs import Blob
from rock.runtime.image.importer import this_architecture
from rock.runtime.image.layers import Fill, LayerInfo, LayerStore
from rock.runtime.image.locks import locked
from rock.runtime.image.ownsystem import OwnSystem
from rock.runtime.image.packing import HoledWriter
from rock.runtime.image.records import ImageRecord, Records
from rock.runtime.image.reference import HOST, free_name, parse
from rock.runtime.image.rootfs import RootFS

_NOT_CONTENT = ("owner", "made")


class Deriving:
    """gate: the store's lock, shared while an image is added. See `ImageStore` for what the methods are for."""

    def __init__(self, layers: LayerStore, records: Records, own: OwnSystem, gate: Path) -> None:
        self._layers = layers
        self._records = records
        self._own = own
        self._gate = gate

    def commit(self, name: str, base: RootFS, tar: Path, diff_id: str, owner: str) -> ImageRecord:
        with locked(self._gate, shared=True):
            made = self._layers.add(
                "unpacking what was written", lambda writer: unpack(Blob.of(tar), None, writer), diff_id, HoledWriter)
            return self._over(name, base, made, owner)

    def extend(
        self, name: str, base: RootFS, fill: Fill | None, what: str, diff_id: str | None, owner: str
    ) -> ImageRecord:
        with locked(self._gate, shared=True):
            made: LayerInfo | None
            if fill is not None:
                made = self._layers.add(what, fill, diff_id)
            else:
                plain = len(base.layers) == bool(base.binds)  # of nothing, or of this machine and nothing else
                made = self._layers.add("making an empty layer", lambda _: EMPTY, EMPTY) if plain else None
            return self._over(name, base, made, owner)

    def from_host(self, name: str) -> ImageRecord:
        free_name(name)
        with locked(self._gate, shared=True):
            return self._records.save(self._own.record(parse(name).familiar, time.time()))

    def host_with(self, name: str, what: str, fill: Fill, diff_id: str) -> ImageRecord:
        free_name(name)
        with locked(self._gate, shared=True):
            info = self._layers.add(what, fill, diff_id)
            record = self._own.record(parse(name).familiar, time.time())
            old = self._records.find(name)
            if old is not None and old.layers[1:] == (diff_id,):
                return old
            return self._records.save(replace(record, layers=(*record.layers, diff_id), size=info.size, env={}))

    def _over(self, name: str, base: RootFS, made: LayerInfo | None, owner: str) -> ImageRecord:
        host = bool(base.binds)
        infos = [self._layers.info_of(folder) for folder in reversed(base.layers[:-1] if host else base.layers)]
        infos += [made] if made is not None else []
        record = ImageRecord(
            name=parse(name).familiar, kind="image", digest="", id="", layers=tuple(info.diff_id for info in infos),
            size=sum(info.size for info in infos), created=time.time(), architecture=this_architecture(),
            env=dict(base.env), cwd=base.cwd, user=base.user, entrypoint=base.entrypoint, cmd=base.cmd,
            labels=dict(base.labels), other=dict(base.other),
        )  # fmt: skip
        if host:
            shown = self._own.record(record.name, record.created)
            record = replace(
                record, kind=HOST, layers=(*shown.layers, *record.layers), by_reference=True, note=shown.note)
        body = json.dumps([{key: value for key, value in asdict(replace(record, name="", created=0.0)).items()
                            if key not in _NOT_CONTENT}])
        digest = f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"
        return self._records.save(replace(record, digest=digest, id=digest, owner=owner, made=True))
