"""Export and import of snapshots: between servers, and what arrives is hostile."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import homes
from tests.waiting import until

from rock.errors import Conflict, ImageError, InvalidConfig, NotFound, RockError
from rock.sync import Client, Sandbox


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    made = Client(server.url)
    yield made
    for one in reversed(made.list_snapshots()):
        made.delete_snapshot(one.snapshot_id)


@pytest.fixture
def exported(server: RunningServer, client: Client, tmp_path: Path) -> Path:
    """A snapshot with two layers."""
    with Sandbox("host", memory="256m", cpus=1.0, base_url=server.url) as box:
        box.run("mkdir /srv/tree; cd /srv/tree; echo old > gone; echo one > kept; ln kept link; x=5")
        box.checkpoint(memory="session")
        box.run("rm gone; echo two > second; head -c 3000000 /dev/urandom > large; chown 1000:1000 second")
        box.checkpoint(name="base", memory="session")
        path = tmp_path / "base.tar"
        client.export_snapshot("base", path)
    return path


LOOK = "cd /srv/tree; ls; cat kept second; stat -c '%h %u' link second; sha256sum large; echo $x"


def test_a_snapshot_moves_to_another_server(exported: Path, client: Client, server: RunningServer,
                                            own_server: Callable[..., RunningServer]) -> None:
    with Sandbox(snapshot="base", memory="256m", cpus=1.0, base_url=server.url) as original:
        expected = original.run(LOOK).output
    assert "gone" not in expected and expected.split()[-1] == "5"
    other = own_server()
    there = Client(other.url)
    taken = there.import_snapshot(exported, name="moved", ttl_seconds=1000)
    assert (taken.files, taken.memory, taken.layers, taken.state, taken.ttl_seconds) == (
        "import", "session", 2, "ready", 1000)
    with Sandbox(snapshot="moved", memory="256m", cpus=1.0, base_url=other.url) as box:
        assert box.run(LOOK).output == expected
        assert box.checkpoint(memory="files").parent == taken.snapshot_id
    other.kill()
    other.start()
    with Sandbox(snapshot="moved", memory="256m", cpus=1.0, base_url=other.url) as box:
        assert box.run(LOOK).output == expected
    rock = [sys.executable, "-m", "rock.cli.main", "--base-url", other.url, "snapshot"]
    again = exported.with_name("again.tar")
    subprocess.run([*rock, "export", "moved", str(again)], check=True, capture_output=True)
    made = json.loads(subprocess.run([*rock, "import", str(again), "--name", "third", "--json"], check=True,
                                     capture_output=True, text=True).stdout)  # fmt: skip
    assert made["layers"] == 2 and made["name"] == "third"
    there = Client(other.url)
    for one in there.list_snapshots():
        there.delete_snapshot(one.snapshot_id)
    folders = [home / "run" / "namespace" / "snapshots" for home in homes(other.home)]
    until(lambda: not any([*layers.glob("*")] for layers in folders))


def rebuilt(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], upto: int = 100) -> Path:
    """The tar with other entries."""
    made = path.with_name("hostile.tar")
    with tarfile.open(path) as source, tarfile.open(made, "w") as target:
        for member in source.getmembers()[:upto]:
            file = source.extractfile(member)
            assert file is not None
            name, data = change(member.name, file.read())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    return made


def in_manifest(**fields: object) -> Callable[[str, bytes], tuple[str, bytes]]:
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return (name, json.dumps({**json.loads(data), **fields}).encode()) if name == "manifest.json" else (name, data)

    return change


def escaping(name: str, data: bytes) -> tuple[str, bytes]:
    return name, (data if name == "manifest.json" else data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def test_what_is_not_such_a_tar_is_refused_and_leaves_nothing(exported: Path, client: Client,
                                                              server: RunningServer, tmp_path: Path) -> None:
    before = {one.snapshot_id for one in client.list_snapshots()}
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"x" * 5000)
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    cut = tmp_path / "cut"
    cut.write_bytes(exported.read_bytes()[:100_000])
    wrong: list[Path] = [garbage, empty, cut]
    for path in wrong:
        with pytest.raises(InvalidConfig):
            client.import_snapshot(path)
    with tarfile.open(exported) as tar:
        manifest = json.load(tar.extractfile("manifest.json") or io.BytesIO())
    first = manifest["layers"][0]
    for change in (in_manifest(format="other"), in_manifest(layers=[]), in_manifest(layers=[first] * 65),
                   in_manifest(surplus=1), in_manifest(memory="processes"), escaping,
                   in_manifest(layers=[{**first, "digest": "sha256:" + "0" * 64}, manifest["layers"][1]]),
                   in_manifest(layers=[{**first, "size": 10}, manifest["layers"][1]]),
                   lambda name, data: (name.replace("layers/", "../layers/"), data)):  # fmt: skip
        with pytest.raises(InvalidConfig):
            client.import_snapshot(rebuilt(exported, change))
    with pytest.raises(ImageError):
        client.import_snapshot(rebuilt(exported, in_manifest(image_digest="sha256:" + "1" * 64)))
    with pytest.raises(ImageError):
        client.import_snapshot(rebuilt(exported, in_manifest(image="there.is/none:1")))
    with pytest.raises(Conflict):
        client.import_snapshot(exported, name="base")
    with pytest.raises(NotFound):
        client.import_snapshot(exported, worker="none")
    with pytest.raises(NotFound):
        client.export_snapshot("none", tmp_path / "none.tar")
    assert {one.snapshot_id for one in client.list_snapshots()} == before and not (tmp_path / "none.tar").exists()
    folders = [home / "run" / "namespace" / "snapshots" for home in homes(server.home)]
    until(lambda: sum(len([*layers.glob("*")]) for layers in folders) == len(before))


@pytest.mark.parametrize("entry", ["symlink", "device", "proc", "climb"])
def test_a_hostile_layer_stays_inside(exported: Path, client: Client, tmp_path: Path, entry: str) -> None:
    """A layer that tries to write elsewhere, or to replace a mount point."""
    outside = tmp_path / "outside"
    outside.mkdir()
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        names = {"symlink": "escape", "proc": "proc", "climb": "../../outside/x", "device": "disk"}
        info = tarfile.TarInfo(names[entry])
        if entry in ("symlink", "proc"):
            info.type, info.linkname = tarfile.SYMTYPE, str(outside)
        if entry == "device":
            info.type, info.devmajor, info.devminor = tarfile.BLKTYPE, 8, 0
        tar.addfile(info)
        if entry == "symlink":
            inner = tarfile.TarInfo("escape/x")
            inner.size = 1
            tar.addfile(inner, io.BytesIO(b"x"))
    import hashlib

    data = layer.getvalue()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with tarfile.open(exported) as tar:
        manifest = json.load(tar.extractfile("manifest.json") or io.BytesIO())
    one = {**manifest["layers"][0], "size": len(data), "digest": digest}

    def change(name: str, old: bytes) -> tuple[str, bytes]:
        return in_manifest(layers=[one])(name, old) if name == "manifest.json" else (name, data)

    try:
        taken = client.import_snapshot(rebuilt(exported, change, upto=2))
    except RockError as error:
        assert not isinstance(error, NotFound) and error.status < 500, error
    else:
        assert entry in ("climb", "symlink", "device")
        with Sandbox(snapshot=taken.snapshot_id, memory="256m", cpus=1.0, base_url=client.transport.url) as box:
            assert box.run("true").exit_code == 0
    assert not list(outside.iterdir())
