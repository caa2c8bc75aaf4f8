"""Images between the store and registries, or files: pulled, pushed, exported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rock.errors import ImageError
from rock.runtime.image.adding import Adding
from rock.runtime.image.layers import LayerStore
from rock.runtime.image.locks import locked, storing
from rock.runtime.image.logins import Login, Logins
from rock.runtime.image.pull import Progress, Pull
from rock.runtime.image.push import Push, ToLayout, ToRegistry, refuse_by_reference
from rock.runtime.image.records import ImageRecord, Records
from rock.runtime.image.reference import Reference, parse
from rock.settings import registry_mirrors

if TYPE_CHECKING:
    from rock.runtime.image.registry import Registry


class Transfers:
    """locks: the store's folder of them. See `ImageStore` for what the methods are for."""

    def __init__(self, layers: LayerStore, records: Records, adding: Adding, logins: Logins, locks: Path) -> None:
        self._layers = layers
        self._records = records
        self._adding = adding
        self._logins = logins
        self._locks = locks
        self._gate = locks / "store"

    def pull(self, name: str, reference: Reference, login: Login | None, progress: Progress | None) -> ImageRecord:
        pulls = self._locks / f"pull-{hashlib.sha256(reference.full.encode()).hexdigest()[:16]}"
        with locked(pulls), locked(self._gate, shared=True), self._layers.scratch() as scratch:
            registries = self._registries(reference, login)
            with storing(f"pulling {name}"), Pull(
                reference, registries, scratch, self._layers.has, progress, self._layers.bounds()
            ) as pull:
                image = pull.begin()
                found = self._records.find(name)
                if found is None or found.digest != image.digest:
                    repository = f"{reference.domain}/{reference.repository}"
                    found = self._adding.add(image, [name], progress, pull.wait, repository)[0]
        return found

    def _registries(self, reference: Reference, login: Login | None) -> Sequence[Registry]:
        """Where to ask for an image: mirrors, each with a login of its own, and the registry itself last."""
        from rock.runtime.image.registry import Registry  # urllib3, which images that are here do without

        mirrors = [Registry(reference, self._logins.of(mirror), mirror)
                   for mirror in registry_mirrors().get(reference.domain, ())]  # fmt: skip
        return [*mirrors, Registry(reference, login or self._logins.of(reference.domain))]

    def push(
        self, record: ImageRecord, login: Login | None, progress: Progress | None, ready: Mapping[str, Path],
        public_only: bool,
    ) -> str:  # fmt: skip
        refuse_by_reference(record)
        reference = replace(parse(record.name), public_only=public_only)
        target = ToRegistry(reference, login or self._logins.of(reference.domain))
        return self._send(record, target, progress, ready)

    def export(self, record: ImageRecord, path: Path | str, progress: Progress | None) -> str:
        refuse_by_reference(record)
        with storing(f"writing {path}"):
            target = ToLayout(Path(path), record.name if "/" in record.name else f"docker.io/library/{record.name}")
        try:
            return self._send(record, target, progress, {})
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    def _send(
        self, record: ImageRecord, target: ToRegistry | ToLayout, progress: Progress | None, ready: Mapping[str, Path]
    ) -> str:
        with closing(target), storing(f"sending {record.name}"), locked(self._gate, shared=True):
            for diff in record.layers:  # with the gate held none of them goes
                if not self._layers.has(diff):
                    raise ImageError(f"image {record.name} was removed")
            with self._layers.scratch() as scratch:
                return Push(record, self._layers, target, scratch, progress, ready).run()
