"""Data sets in a folder or a bucket, in ROCK's layout: ORG/NAME/SPLIT/TASK/... or ORG/NAME/SPLIT/TASK.json.

A data set is a collection of files. Names are checked, symbolic links are not followed, and nothing is written outside
the target folder of a download: a bucket may contain any names.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rock.errors import Conflict, InvalidConfig, NotFound
from rock.store.s3 import Bucket, Request, S3Blobs, _encoded, _tag, _xml

MOST_TASKS = 20_000
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,199}")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DatasetSpec:
    """A data set. id: "ORG/NAME". task_ids: sorted, 20,000 at most."""

    id: str
    split: str
    task_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class UploadResult:
    """Numbers of tasks of an upload. skipped: they exist already, and `overwrite` was not set."""

    id: str
    split: str
    uploaded: int = 0
    skipped: int = 0
    failed: int = 0


class Files(Protocol):
    """Files by path, with "/" between its parts."""

    async def names(self, prefix: str, depth: int) -> list[str]:
        """The different first `depth` parts of the paths below a prefix; with "/" at the end for folders."""
        ...

    async def paths(self, prefix: str) -> list[str]: ...

    async def store(self, path: str, source: Path) -> None: ...

    def load(self, path: str) -> AsyncIterator[bytes]: ...


class FolderFiles:
    """Files of a local folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def names(self, prefix: str, depth: int) -> list[str]:
        return _first(await self.paths(prefix), depth)

    async def paths(self, prefix: str) -> list[str]:
        return await asyncio.to_thread(_files, self._root / prefix)

    async def store(self, path: str, source: Path) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(_copy, source, target)

    async def load(self, path: str) -> AsyncIterator[bytes]:
        with open(self._root / path, "rb") as file:
            while data := file.read(_CHUNK):
                yield data


class BucketFiles(S3Blobs):
    """Files of a bucket."""

    def _key(self, name: str) -> str:
        return f"{self._root}/{_encoded(self.place.prefix + name, '/')}"

    async def names(self, prefix: str, depth: int) -> list[str]:
        if depth > 1:
            found: list[str] = []
            for name in await self.names(prefix, 1):
                below = await self.names(prefix + name, depth - 1) if name.endswith("/") else []
                found += [name + one for one in below] or [name]
            return found
        return _first(await self._listed(prefix, "/"), 1)

    async def paths(self, prefix: str) -> list[str]:
        return await self._listed(prefix, "")

    async def _listed(self, prefix: str, delimiter: str) -> list[str]:
        place = self.place.prefix + prefix
        found: list[str] = []
        token = ""
        while True:
            query = [("list-type", "2"), ("prefix", place)]
            query += [("delimiter", delimiter)] if delimiter else []
            query += [("continuation-token", token)] if token else []
            page = _xml(await self._ask(Request("GET", self._root, tuple(query))))
            token = ""
            for item in page.iter():
                text = item.text or ""
                if _tag(item) == "Key" or (_tag(item) == "Prefix" and item not in list(page) and text):
                    if text.startswith(place) and text != place:
                        found.append(text.removeprefix(place))
                elif _tag(item) == "NextContinuationToken":
                    token = text
            if not token:
                return found

    async def store(self, path: str, source: Path) -> None:
        await self._send(path, source)

    async def _send(self, path: str, source: Path) -> None:
        async def data() -> AsyncIterator[bytes]:
            with open(source, "rb") as file:
                while part := file.read(_CHUNK):
                    yield part

        await self.put(path, data())

    async def load(self, path: str) -> AsyncIterator[bytes]:
        async for data in self.get(path):
            yield data


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        while data := read.read(_CHUNK):
            write.write(data)


def _files(folder: Path) -> list[str]:
    """Relative paths of regular files below a folder."""
    found = []
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            if not path.is_symlink() and path.is_file():
                found.append(path.relative_to(folder).as_posix())
    return found


def _first(paths: Sequence[str], depth: int) -> list[str]:
    """The different first parts of paths, folders with "/" at the end."""
    made = set()
    for path in paths:
        parts = path.split("/")
        made.add("/".join(parts[:depth]) + ("/" if len(parts) > depth else ""))
    return sorted(made)


def checked(path: str) -> list[str]:
    """The parts of a path in a data set. InvalidConfig: a part is not a plain name."""
    parts = path.split("/")
    if not all(_PART.fullmatch(part) for part in parts):
        raise InvalidConfig(f"{path[:200]!r} is not a name in a data set", hint="use letters, digits and _.+=@-")
    return parts


class Datasets:
    """Data sets at a root. files: its files."""

    def __init__(self, files: Files) -> None:
        self._files = files

    @classmethod
    def at(cls, root: str, endpoint: str = "", region: str = "", key: str = "", secret: str = "") -> Datasets:
        """Data sets of a folder, or of "s3://BUCKET/PREFIX". InvalidConfig."""
        if root.startswith("s3://"):
            return cls(BucketFiles(Bucket.parse(root, endpoint, region or "us-east-1", key, secret)))
        return cls(FolderFiles(Path(root).expanduser()))

    async def all(self) -> list[tuple[str, str]]:
        """(ORG/NAME, SPLIT) of all data sets."""
        found = [name.rstrip("/").split("/") for name in await self._files.names("", 3) if name.endswith("/")]
        return [(f"{parts[0]}/{parts[1]}", parts[2]) for parts in found if len(parts) == 3]

    async def show(self, dataset: str, split: str) -> DatasetSpec:
        """The task ids of a data set: folders, and files without their suffix. NotFound."""
        prefix = _prefix(dataset, split)
        names = await self._files.names(prefix, 1)
        ids = sorted({name.rstrip("/") if name.endswith("/") else name.rpartition(".")[0] or name for name in names})
        if not ids:
            raise NotFound(f"there is no data set {dataset} with split {split}", hint="rock dataset ls")
        return DatasetSpec(dataset, split, ids[:MOST_TASKS])

    async def upload(self, folder: Path, dataset: str, split: str, overwrite: bool = False) -> UploadResult:
        """Upload the tasks of a folder: its folders and files. InvalidConfig, StorageFull, Unavailable."""
        if not folder.is_dir():
            raise NotFound(f"there is no folder {folder}", hint="pass a folder of tasks")
        prefix = _prefix(dataset, split)
        existing = {name.rstrip("/") for name in await self._files.names(prefix, 1)}
        uploaded = skipped = 0
        for entry in sorted(folder.iterdir()):
            if entry.is_symlink() or entry.name.startswith("."):
                continue
            if entry.name in existing and not overwrite:
                skipped += 1
                continue
            paths = [entry.name] if entry.is_file() else [f"{entry.name}/{path}" for path in _files(entry)]
            for path in paths:
                checked(path)
            for path in paths:
                await self._files.store(prefix + path, folder / path)
            uploaded += 1
        return UploadResult(dataset, split, uploaded, skipped)

    async def download(self, dataset: str, split: str, target: Path, tasks: Sequence[str] | None = None) -> list[str]:
        """Download tasks into a folder, which becomes a local data set; returns their ids. NotFound; Conflict: the
        folder has files."""
        if target.exists() and any(target.iterdir()):
            raise Conflict(f"{target} is not empty", hint="choose another folder")
        prefix = _prefix(dataset, split)
        found = set()
        for path in await self._files.paths(prefix):
            parts = checked(path)
            if tasks is not None and parts[0] not in tasks and parts[0].rpartition(".")[0] not in tasks:
                continue
            place = target.joinpath(*parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as file:
                async for data in self._files.load(prefix + path):
                    file.write(data)
            found.add(parts[0])
        if not found:
            raise NotFound(f"there is no data set {dataset} with split {split}", hint="rock dataset ls")
        return sorted(found)


def _prefix(dataset: str, split: str) -> str:
    parts = checked(dataset)
    if len(parts) != 2:
        raise InvalidConfig(f"{dataset!r} is not the id of a data set", hint="write ORG/NAME")
    return "/".join([*parts, *checked(split)]) + "/"
