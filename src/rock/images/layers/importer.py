"""Reads image archives: `docker save` in its old and new form, OCI layouts, as a tar or a folder.

    docker-archive   manifest.json -> config, layers (plain tars)
    OCI layout       index.json -> [index ->]* manifest -> config, layers (tar, gzip, zstd), all by digest

The result is an `Archived`: a name, a config and the layers' blobs; the store unpacks it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rock.errors import ImageError
from rock.images.layers.blobs import Archive, Blob, Bounds, first_name
from rock.images.layers.tar_reader import DAMAGED

P = ParamSpec("P")
T = TypeVar("T")

_DIGEST = re.compile(r"sha256:[a-f0-9]{64}", re.ASCII)
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "loongarch64": "loong64"}
_ARCHIVE_NAME = re.compile(r"blobs|oci-layout|index\.json|manifest\.json|repositories|[0-9a-f]{64}(\.json)?", re.ASCII)
_DEEPEST_INDEX = 4
SHA256 = "build or save the image again with a current tool; only sha256 digests are supported"
# Fields of an image's config that are preserved for other tools and have no effect here
OTHER = ("ExposedPorts", "Volumes", "StopSignal", "Healthcheck", "Shell", "OnBuild")


@dataclass(frozen=True)
class LayerBlob:
    """One layer: its archived bytes, their digest (None: unknown), and the digest of the plain tar."""

    blob: Blob
    digest: str | None
    diff_id: str


@dataclass(frozen=True)
class Config:
    """An image's settings for running it."""

    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "root"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    created: str = ""
    architecture: str = ""
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Archived:
    """One image of an archive. `names` as the archive has them; `digest` of its manifest, `id` of its config."""

    names: tuple[str, ...]
    digest: str
    id: str
    config: Config
    layers: tuple[LayerBlob, ...]  # bottom first


def this_architecture() -> str:
    """This machine's architecture in the naming of images."""
    return _MACHINES.get(platform.machine(), platform.machine())


def kind_of(path: Path, bounds: Bounds) -> str:
    """The type of `path`: a folder is "oci", "docker" or "folder", a file is "archive" (of images) or "tar"."""
    if path.is_dir():
        if (path / "oci-layout").is_file() or (path / "index.json").is_file():
            return "oci"
        return "docker" if (path / "manifest.json").is_file() else "folder"
    if not path.is_file():
        raise ImageError(f"{path} does not exist" if not path.exists() else f"{path} is neither a file nor a folder",
                         hint="give the path of an image archive, an OCI layout or a root folder")
    first = first_name(path, bounds)
    return "archive" if _ARCHIVE_NAME.fullmatch(first.split("/")[0]) else "tar"


def _described(read: Callable[P, T]) -> Callable[P, T]:
    """Wraps the parsing of untrusted metadata: malformed data raises ImageError."""

    @functools.wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (AttributeError, TypeError, KeyError, IndexError, ValueError, RecursionError) as error:
            raise ImageError(f"the image's description has an unexpected form: {error!r}"[:300],
                             hint=DAMAGED) from error

    return reading


@_described
def read_docker(archive: Archive) -> list[Archived]:
    """The images of a `docker save` archive."""
    images = []
    for row in _list(_json(archive["manifest.json"]), "manifest.json"):
        raw = archive[_text(row, "Config")].read()
        config, diff_ids = _config(raw)
        blobs = [archive[str(name)] for name in _list(row.get("Layers"), "Layers")]
        if len(blobs) != len(diff_ids):
            raise ImageError(f"{archive.path}: the archive has {len(blobs)} layers, but its config has {len(diff_ids)}",
                             hint=DAMAGED)
        images.append(Archived(
            names=tuple(str(t) for t in row.get("RepoTags") or ()), digest=_sha256(raw), id=_sha256(raw), config=config,
            layers=tuple(LayerBlob(blob, None, diff) for blob, diff in zip(blobs, diff_ids, strict=True)),
        ))  # fmt: skip
    return images


@_described
def read_oci(archive: Archive) -> list[Archived]:
    """The images of an OCI layout, each for this machine's architecture."""
    index = _object(_json(archive["index.json"]), "index.json")
    found: dict[str, Archived] = {}
    for row in _list(index.get("manifests"), "manifests"):
        if not _runnable(row):
            continue
        names = _names(row)
        image = _resolve(archive, row, 0)
        old = found.get(image.digest)
        merged = (*old.names, *names) if old else tuple(names)
        found[image.digest] = Archived(tuple(dict.fromkeys(merged)), image.digest, image.id, image.config, image.layers)
    return list(found.values())


def _resolve(archive: Archive, row: dict[str, Any], depth: int) -> Archived:
    raw = _checked(archive, row)
    body = _object(json.loads(raw), "a manifest")
    if "manifests" in body or row.get("mediaType") in _INDEXES:
        if depth >= _DEEPEST_INDEX:
            raise ImageError(f"{archive.path}: the indexes are nested more than {_DEEPEST_INDEX} levels deep",
                             hint="save the image for one platform, as in `docker save --platform linux/amd64`")
        return _resolve(archive, _choose(archive, _list(body.get("manifests"), "manifests")), depth + 1)
    config_row = _object(body.get("config"), "config")
    config, diff_ids = _config(_checked(archive, config_row))
    rows = _list(body.get("layers"), "layers")
    if len(rows) != len(diff_ids):
        raise ImageError(f"{archive.path}: the manifest has {len(rows)} layers, but the config has {len(diff_ids)}",
                         hint=DAMAGED)
    return Archived(
        names=(), digest=_text(row, "digest"), id=_text(config_row, "digest"), config=config,
        layers=tuple(LayerBlob(_blob(archive, r), _text(r, "digest"), d) for r, d in zip(rows, diff_ids, strict=True)),
    )  # fmt: skip


def _choose(archive: Archive, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest for this machine; when several fit (arm variants), the one that is in the archive."""
    for row in _fitting(rows):
        if archive.get(_path(_text(row, "digest"))) is not None:
            return row
    raise _no_image(str(archive.path), rows)


@_described
def choose(name: str, rows: Any) -> str:
    """The digest of the manifest for this machine, in an index of a registry."""
    rows = _list(rows, "manifests")
    for row in _fitting(rows):
        digest = _text(row, "digest")
        if not _DIGEST.fullmatch(digest):
            raise ImageError(f"{name}: the index has a digest that is not sha256", hint=SHA256)
        return digest
    raise _no_image(name, rows)


def _fitting(rows: list[Any]) -> list[dict[str, Any]]:
    mine = this_architecture()
    return [r for r in rows if isinstance(r, dict) and _runnable(r)
            and (r.get("platform") or {}).get("architecture", mine) == mine
            and (r.get("platform") or {}).get("os", "linux") == "linux"]  # fmt: skip


def _no_image(name: str, rows: list[Any]) -> ImageError:
    mine = this_architecture()
    platforms = [r["platform"] for r in rows if isinstance(r, dict) and isinstance(r.get("platform"), dict)]
    there = ", ".join(sorted({f"{p.get('os')}/{p.get('architecture')}" for p in platforms}))
    return ImageError(f"{name} has no image for linux/{mine}; it is for {there or 'nothing'}",
                      hint=f"an image for linux/{mine} is needed")  # fmt: skip


def _runnable(row: dict[str, Any]) -> bool:
    """Whether it is an image, and not an attestation or a signature in the same index."""
    return (row.get("platform") or {}).get("os") != "unknown" and not row.get("artifactType")


def _names(row: dict[str, Any]) -> Iterator[str]:
    notes = row.get("annotations") or {}
    full = notes.get("io.containerd.image.name")
    if full:
        yield str(full)
    elif "/" in (name := str(notes.get("org.opencontainers.image.ref.name", ""))) or ":" in name:
        yield name


def _config(raw: bytes) -> tuple[Config, list[str]]:
    body = _object(json.loads(raw), "an image's config")
    run = body.get("config") or {}
    diff_ids = [str(d) for d in (body.get("rootfs") or {}).get("diff_ids") or ()]
    if not all(_DIGEST.fullmatch(d) for d in diff_ids):
        raise ImageError("the image's config has a layer digest that is not sha256", hint=SHA256)
    if body.get("os", "linux") != "linux":
        raise ImageError(f"the image is for {body['os']}, and only Linux images run here",
                         hint="use the Linux variant of the image")
    architecture = str(body.get("architecture", ""))
    if architecture not in ("", this_architecture()):
        raise ImageError(f"the image is for {architecture}, but this machine is {this_architecture()}",
                         hint=f"use an image for linux/{this_architecture()}, as in `docker pull --platform "
                              f"linux/{this_architecture()}`")
    env = dict(str(item).partition("=")[::2] for item in run.get("Env") or ())
    cwd = str(run.get("WorkingDir") or "/")
    return Config(
        env=env, cwd=cwd if cwd.startswith("/") else f"/{cwd}", user=str(run.get("User") or "root"),
        entrypoint=tuple(run.get("Entrypoint") or ()), cmd=tuple(run.get("Cmd") or ()),
        labels={str(k): str(v) for k, v in (run.get("Labels") or {}).items()},
        created=str(body.get("created") or ""), architecture=architecture,
        other={key: run[key] for key in OTHER if run.get(key)},
    ), diff_ids  # fmt: skip


def _checked(archive: Archive, row: dict[str, Any]) -> bytes:
    raw = _blob(archive, row).read()
    if _sha256(raw) != row["digest"]:
        raise ImageError(f"{archive.path}: the content of {row['digest']} does not match its digest", hint=DAMAGED)
    return raw


def _blob(archive: Archive, row: dict[str, Any]) -> Blob:
    digest = _text(row, "digest")
    if row.get("urls") and archive.get(_path(digest)) is None:
        raise ImageError(f"{archive.path}: layer {digest} is stored elsewhere and not in the archive",
                         hint="pull the image from its registry with `rock image pull`")
    return archive[_path(digest)]


def _path(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ImageError(f"the archive has a digest that is not sha256: {digest[:80]!r}", hint=SHA256)
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _sha256(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _json(blob: Blob) -> Any:
    try:
        return json.loads(blob.read())
    except ValueError as error:
        raise ImageError(f"{blob.path} has a description that is not JSON: {error}", hint=DAMAGED) from None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ImageError(f"the archive's {what} is not a JSON object", hint=DAMAGED)
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImageError(f"the archive's {what} is not a JSON list", hint=DAMAGED)
    return value


def _text(row: dict[str, Any], key: str) -> str:
    value = _object(row, "manifest").get(key)
    if not isinstance(value, str):
        raise ImageError(f"the archive's manifest has no text field {key!r}", hint=DAMAGED)
    return value
