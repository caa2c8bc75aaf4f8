"""Bytes that no honest peer sends, for the parsers that read them: a typed refusal or a value, never anything else.

`make test` tries some; ROCK_TEST_FUZZ=N tries N of each (`make fuzz`). Parsers with tests of their own elsewhere:
values, pieces and frames of environments (tests/envs), a session's framing (tests/rocklet), layers (test_layers.py),
multipart bodies (tests/admin), HTTP answers (tests/sdk)."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.image.image_archives import ARCHITECTURE, config_of, entry, sha, tar

from rock.errors import ImageError, InvalidConfig
from rock.guest.environments import frames
from rock.images.layers.blobs import Archive, Bounds
from rock.images.layers.importer import choose, read_docker, read_oci
from rock.images.layers.tar_reader import ByteStream, TarReader
from rock.images.registry.reference import parse
from rock.protocol.keys import digest_of, tenant_of
from rock.protocol.routes import Frame, FrameParser, pack_frame
from rock.protocol.sandbox import parse_size

fuzz = settings(
    max_examples=int(os.environ.get("ROCK_TEST_FUZZ", "60")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
pytestmark = pytest.mark.timeout(0 if "ROCK_TEST_FUZZ" in os.environ else 120)

LAYER = tar([entry("f", b"x")])
CONFIG = config_of([LAYER])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something could stand otherwise in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, honest: Any) -> Any:
    """An honest description with one to three things in it that are something else, or missing."""
    value = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        there = places(value)
        if not there:
            break
        *way, last = draw(st.sampled_from(there))
        at = value
        for key in way:
            at = at[key]
        if draw(st.booleans()):
            at[last] = draw(any_json)
        else:
            del at[last]
    return value


def row(data: bytes, **more: Any) -> dict[str, Any]:
    return {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": sha(data), "size": len(data), **more}


MANIFEST = {"schemaVersion": 2, "config": row(CONFIG), "layers": [row(LAYER)]}
INDEX = {"schemaVersion": 2, "manifests": [
    row(json.dumps(MANIFEST).encode(), platform={"os": "linux", "architecture": ARCHITECTURE},
        annotations={"org.opencontainers.image.ref.name": "a/b:1"})]}  # fmt: skip


@fuzz
@given(
    index=mutated(INDEX) | st.just(INDEX), manifest=mutated(MANIFEST) | st.just(MANIFEST),
    config=mutated(json.loads(CONFIG)) | any_json,
)  # fmt: skip
def test_image_layouts(tmp_path: Path, index: Any, manifest: Any, config: Any) -> None:
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    config_bytes = json.dumps(config).encode()
    if isinstance(manifest, dict) and isinstance(manifest.get("config"), dict):
        manifest["config"]["digest"] = sha(config_bytes)
    raw = json.dumps(manifest).encode()
    try:
        index["manifests"][0]["digest"] = sha(raw)
    except (TypeError, KeyError, IndexError):
        pass
    for data in (config_bytes, raw, LAYER):
        (blobs / sha(data)[7:]).write_bytes(data)
    (tmp_path / "index.json").write_text(json.dumps(index))
    try:
        for image in read_oci(Archive(tmp_path, tmp_path, Bounds())):
            assert image.digest.startswith("sha256:") and isinstance(image.config.env, dict)
    except (ImageError, InvalidConfig):
        pass


@fuzz
@given(rows=mutated([{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["l.tar"]}]) | any_json,
       config=mutated(json.loads(CONFIG)))  # fmt: skip
def test_docker_archives(tmp_path: Path, rows: Any, config: Any) -> None:
    for name, data in (("manifest.json", json.dumps(rows)), ("c.json", json.dumps(config)), ("l.tar", "x")):
        (tmp_path / name).write_text(data)
    try:
        read_docker(Archive(tmp_path, tmp_path, Bounds()))
    except (ImageError, InvalidConfig):
        pass


@fuzz
@given(mutated(INDEX["manifests"]) | any_json)
def test_indexes_of_registries(rows: Any) -> None:
    try:
        assert choose("x", rows).startswith("sha256:")
    except ImageError:
        pass


def read(data: bytes, cuts: list[int]) -> list[Any]:
    view = memoryview(data)
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    reader = TarReader(ByteStream(bytes(view[a:b]) for a, b in itertools.pairwise(bounds)))
    found = []
    while (item := reader.next()) is not None:
        found.append((item.path, item.size, sum(len(part) for part in reader.data())))
    return found


@fuzz
@given(data=st.binary(max_size=2048), cuts=st.lists(st.integers(0, 4096), max_size=4))
def test_tars_of_noise(data: bytes, cuts: list[int]) -> None:
    try:
        read(data, cuts)
    except ImageError:
        pass


@fuzz
@given(
    headers=st.dictionaries(
        st.sampled_from(["path", "linkpath", "size", "mtime", "uid", "gid", "SCHILY.xattr.user.x", "GNU.sparse.major"]),
        st.text(st.characters(blacklist_categories=["Cs"]), max_size=30) | st.integers().map(str), max_size=4,
    ),
    patch=st.lists(st.tuples(st.integers(0, 8191), st.integers(0, 255)), max_size=5), cut=st.integers(0, 8192),
)  # fmt: skip
def test_tars_with_odd_headers(headers: dict[str, str], patch: list[tuple[int, int]], cut: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("name" * 30)
        info.size, info.pax_headers = 600, headers
        archive.addfile(info, io.BytesIO(b"x" * 600))
    data = bytearray(out.getvalue())
    for at, byte in patch:
        data[at % len(data)] = byte
    for whole in (bytes(data), bytes(data[:cut])):
        try:
            read(whole, [cut])
        except ImageError:
            pass


def test_an_archive_is_not_read_into_memory_for_its_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 1 << 40)
    with pytest.raises(ImageError, match="header of the archive has 1099511627776 bytes"):
        Archive(path, tmp_path, Bounds())


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 65_536, 200_000])
def test_the_files_of_an_archive(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    made = tar([entry("a", content[:size]), entry("n" * 200, b"long"), entry("d/b", content[: size + 3])])
    path = tmp_path / "a.tar"
    path.write_bytes(made)
    files = Archive(path, tmp_path, Bounds())
    assert [b"".join(files[name].chunks()) for name in ("a", "./" + "n" * 200, "/d/b")] == [
        content[:size], b"long", content[: size + 3]]  # fmt: skip
    path.write_bytes(made[: made.index(b"d/b") + 512 + size])  # within the last file
    with pytest.raises(ImageError, match="in the middle of a file"):
        Archive(path, tmp_path, Bounds())


@fuzz
@given(data=st.binary(max_size=300), step=st.integers(1, 40))
def test_frames_of_streams(data: bytes, step: int) -> None:
    parser = FrameParser(limit=1000)
    try:
        for at in range(0, len(data), step):
            for kind, payload in parser.feed(data[at : at + step]):
                assert kind in Frame and len(payload) <= 1000
    except ValueError:
        pass
    assert list(FrameParser().feed(pack_frame(Frame.STDOUT, data))) == [(Frame.STDOUT, data)]


@fuzz
@given(data=st.binary(max_size=300), step=st.integers(1, 40))
def test_frames_of_steps(data: bytes, step: int) -> None:
    for parser in (lambda: list(frames.split(data)), lambda: frames.unpack(data)):
        try:
            parser()
        except ValueError:
            pass
    joiner, joined = frames.Joiner(), 0
    for at in range(0, len(data), step):
        joined += sum(len(message) for _, message in joiner.feed(data[at : at + step]))
    assert joined <= len(data)


@fuzz
@given(st.text(max_size=80) | st.from_regex(r"[a-z0-9./:@_\-]{0,80}"))
def test_names(text: str) -> None:
    try:
        reference = parse(text)
        assert parse(reference.full) == reference
    except InvalidConfig:
        pass
    try:
        assert 1 <= parse_size(text) < 1 << 60
    except ValueError:
        pass
    key = text.encode("utf-8", "replace")
    assert digest_of(key) is None or tenant_of(key) is not None
