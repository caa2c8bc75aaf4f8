"""Archives made by hand, and an ordinary user to be."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import platform
import tarfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rock.images.store import ImageStore

ORDINARY = 54321
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def entry(name: str, data: bytes | None = None, **more: Any) -> tuple[tarfile.TarInfo, bytes | None]:
    info = tarfile.TarInfo(name)
    info.mode = 0o644 if data is not None else 0o755
    for key, value in more.items():
        setattr(info, key, value)
    if data is not None:
        info.size = len(data)
    elif "type" not in more:
        info.type = tarfile.DIRTYPE
    return info, data


def tar(entries: Iterable[tuple[tarfile.TarInfo, bytes | None]], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data) if data is not None else None)
    return out.getvalue()


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config_of(layers: list[bytes], **config: Any) -> bytes:
    return json.dumps({
        "architecture": ARCHITECTURE, "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [sha(layer) for layer in layers]},
    }).encode()  # fmt: skip


def docker_archive(path: Path, layers: list[bytes], tags: list[str], **config: Any) -> Path:
    raw = config_of(layers, **config)
    names = [f"{sha(layer)[7:]}/layer.tar" for layer in layers]
    manifest = [{"Config": f"{sha(raw)[7:]}.json", "RepoTags": tags, "Layers": names}]
    path.write_bytes(tar([
        *(entry(name, layer) for name, layer in zip(names, layers, strict=True)),
        entry(f"{sha(raw)[7:]}.json", raw), entry("manifest.json", json.dumps(manifest).encode()),
    ]))  # fmt: skip
    return path


def oci_files(
    layers: list[bytes], name: str | None = None, pack: Callable[[bytes], bytes] = gzip.compress, **config: Any
) -> dict[str, bytes]:
    raw = config_of(layers, **config)
    blobs = [pack(layer) for layer in layers]
    manifest = json.dumps({
        "schemaVersion": 2, "config": {"digest": sha(raw), "size": len(raw)},
        "layers": [{"digest": sha(b), "size": len(b)} for b in blobs],
    }).encode()  # fmt: skip
    inner = json.dumps({"schemaVersion": 2, "manifests": [
        {"digest": "sha256:" + "0" * 64, "size": 1, "platform": {"os": "linux", "architecture": "s390x"}},
        {"digest": "sha256:" + "1" * 64, "size": 1, "platform": {"os": "unknown", "architecture": "unknown"}},
        {"digest": sha(manifest), "size": len(manifest), "platform": {"os": "linux", "architecture": ARCHITECTURE}},
    ]}).encode()  # fmt: skip
    row: dict[str, Any] = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": sha(inner)}
    if name:
        row["annotations"] = {"io.containerd.image.name": name}
    files = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [row]}).encode(),
    }
    for blob in (raw, manifest, inner, *blobs):
        files[f"blobs/sha256/{sha(blob)[7:]}"] = blob
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def as_ordinary_user(work: Callable[[], Any]) -> Any:
    """Run `work` in a child process without any privilege; what it returns or raises comes back."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(ORDINARY, ORDINARY, ORDINARY)
                os.setresuid(ORDINARY, ORDINARY, ORDINARY)
            answer: tuple[bool, Any] = (True, work())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        good, value = pickle.load(pipe)
    os.waitpid(child, 0)
    assert good, value
    return value


def leftovers(store: ImageStore) -> list[str]:
    """What a failed import left behind: nothing."""
    return [str(p) for name in ("tmp", "layers", "meta", "images") for p in (store.folder / name).iterdir()]
