"""Names, archives of all kinds, several processes at once, crashes, a full disk."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_archives import docker_archive, entry, leftovers, oci_files, tar, write_files

from rock.errors import ImageError, InvalidConfig, NotFound
from rock.images.store import ImageStore

BASE = tar([entry("etc", None), entry("etc/name", b"base")])
TOP = tar([entry("etc/more", b"top")])
RUN = {"Env": ["PATH=/x:/bin", "A=b=c"], "WorkingDir": "/w", "User": "app", "Entrypoint": ["/e"], "Cmd": ["c"],
       "Labels": {"l": "1"}}  # fmt: skip


def _check(store: ImageStore, name: str) -> None:
    rootfs = store.resolve(name)
    top, base = (Path(layer) for layer in rootfs.layers)
    assert ((top / "etc/more").read_text(), (base / "etc/name").read_text()) == ("top", "base")
    assert (rootfs.cwd, rootfs.user, rootfs.entrypoint, rootfs.cmd) == ("/w", "app", ("/e",), ("c",))
    assert rootfs.env == {"PATH": "/x:/bin", "A": "b=c"}
    assert rootfs.labels == {"l": "1"}


def test_docker_save(store: ImageStore, tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "a.tar", [BASE, TOP], ["demo:1", "docker.io/library/demo:2"], **RUN)
    told: list[str] = []
    assert [r.name for r in store.import_any(path, progress=told.append)] == ["demo:1", "demo:2"]
    assert told == [f"layer {n} of 2, 0.0 MB" for n in (1, 2)]
    _check(store, "demo:1")
    _check(store, "index.docker.io/library/demo:2")
    (again,) = store.import_any(path, "me/other")
    _check(store, "docker.io/me/other:latest")
    _check(store, f"demo@{again.id}")
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    store.import_any(packed, "packed")
    _check(store, "packed")


@pytest.mark.parametrize("pack", ["none", "gzip", "two gzip members", "zstd"])
def test_oci_layout(store: ImageStore, tmp_path: Path, pack: str) -> None:
    if pack == "zstd" and not shutil.which("zstd"):
        pytest.skip("the program zstd is not on this machine")
    how = {
        "none": lambda b: b, "gzip": gzip.compress,
        "two gzip members": lambda b: gzip.compress(b[:700]) + gzip.compress(b[700:]),
        "zstd": lambda b: subprocess.run(["zstd", "-qc"], input=b, stdout=subprocess.PIPE, check=True).stdout,
    }[pack]  # fmt: skip
    files = oci_files([BASE, TOP], "quay.example/team/demo:3", pack=how, **RUN)
    folder = write_files(tmp_path / "oci", files)
    assert [r.name for r in store.import_any(folder)] == ["quay.example/team/demo:3"]
    _check(store, "quay.example/team/demo:3")
    (tmp_path / "oci.tar").write_bytes(tar([entry(n, d) for n, d in files.items()]))
    store.import_any(tmp_path / "oci.tar", "from-tar")
    _check(store, "from-tar")


def test_layers_are_shared_and_go_with_their_last_name(store: ImageStore, tmp_path: Path) -> None:
    store.import_any(docker_archive(tmp_path / "a.tar", [BASE, TOP], ["a:1"]))
    store.import_any(docker_archive(tmp_path / "b.tar", [BASE], ["b:1"]))
    assert store.resolve("a:1").layers[1] == store.resolve("b:1").layers[0]
    layers = store.resolve("a:1").layers
    assert store.remove("a:1") == 3
    assert [os.path.isdir(layer) for layer in layers] == [False, True]
    with pytest.raises(ImageError, match="rock image import"):
        store.resolve("a:1")
    assert store.remove("b:1") == 4
    with pytest.raises(NotFound):
        store.remove("b:1")


def test_a_mounted_layer_stays(store: ImageStore, tmp_path: Path) -> None:
    store.import_any(docker_archive(tmp_path / "a.tar", [BASE], ["a:1"]))
    rootfs = store.resolve("a:1")
    lease = store.lease(rootfs)
    sandbox = subprocess.Popen(["sleep", "60"], pass_fds=[lease.fd])  # as a sandbox's pid 1 does
    try:
        lease.close()
        assert store.remove("a:1") == 0
        assert os.path.isdir(rootfs.layers[0])
    finally:
        sandbox.kill()
        sandbox.wait()
    assert store.gc() == 4
    assert not os.path.exists(rootfs.layers[0])
    with pytest.raises(ImageError, match="was removed"):
        store.lease(rootfs)


def test_what_a_caller_names_as_used_stays(store: ImageStore, tmp_path: Path) -> None:
    store.import_any(docker_archive(tmp_path / "a.tar", [BASE], ["a:1"]))
    layers = store.resolve("a:1").layers
    assert store.remove("a:1", in_use=layers) == 0
    assert os.path.isdir(layers[0])


def test_a_folder(store: ImageStore, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/tool").write_bytes(b"#!" * 50_000)
    (root / "bin/tool").chmod(0o755)
    os.link(root / "bin/tool", root / "bin/same")
    (root / "link").symlink_to("/outside")
    with pytest.raises(InvalidConfig, match="no image name"):
        store.import_any(root)
    first = store.import_any(root, "me/root:1")[0]
    layer = Path(store.resolve("me/root:1").layers[0])
    assert (layer / "bin/tool").read_bytes() == b"#!" * 50_000
    assert (layer / "bin/same").samefile(layer / "bin/tool")
    assert os.readlink(layer / "link") == "/outside"
    assert store.import_folder(root, "me/root:2").digest == first.digest
    (root / "bin/tool").write_bytes(b"changed")
    assert (layer / "bin/tool").read_bytes() == b"#!" * 50_000
    assert store.import_folder(root, "me/root:3").digest != first.digest


def test_an_unknown_image_names_the_commands(store: ImageStore) -> None:
    with pytest.raises(ImageError) as caught:
        store.resolve("nobody/has:this")
    for word in ("nobody/has:this", "rock image pull", "rock image import", "rock image from-host"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["", "UPPER", "a//b", "a:b:c", "a/../b", "/a", "a@sha256:12", "a:" + "t" * 129,
                                  "x" * 300, "a b", "a\n", "-a", "a:-t", "é", "../a", "a\0b"])  # fmt: skip
def test_bad_names(store: ImageStore, name: str) -> None:
    with pytest.raises(InvalidConfig, match="invalid image name"):
        store.resolve(name)


def test_digests_are_checked(store: ImageStore, tmp_path: Path) -> None:
    files = oci_files([BASE], "demo:1")
    blob = max(files, key=lambda n: files[n].startswith(b"\x1f\x8b"))
    for change in (gzip.compress(BASE + b"\0" * 512), files[blob][:-5], b"\x1f\x8b nonsense"):
        folder = write_files(tmp_path / f"oci{len(change)}", {**files, blob: change})
        with pytest.raises(ImageError):
            store.import_any(folder)
    wrong = docker_archive(tmp_path / "a.tar", [BASE], ["demo:1"])
    wrong.write_bytes(wrong.read_bytes().replace(b"base", b"evil"))
    with pytest.raises(ImageError, match="digest"):
        store.import_any(wrong)
    assert leftovers(store) == []


def test_other_machines_images_are_refused(store: ImageStore, tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "a.tar", [BASE], ["demo:1"])
    body = path.read_bytes()
    for mine in (b'"amd64"', b'"arm64"'):
        body = body.replace(mine, b'"s390x"')
    path.write_bytes(body)
    with pytest.raises(ImageError, match="s390x"):
        store.import_any(path)
    files = oci_files([BASE], "demo:1")
    missing = write_files(tmp_path / "missing", {k: v for k, v in files.items() if not v.startswith(b"\x1f\x8b")})
    with pytest.raises(ImageError, match="incomplete"):
        store.import_any(missing)


def _import_slowly(folder: str, path: str, started: float) -> float:
    while time.time() < started:
        pass
    begin = time.perf_counter()
    ImageStore(Path(folder)).import_any(path, f"p{os.getpid()}")
    return time.perf_counter() - begin


def test_many_processes_import_one_layer_once(tmp_path: Path) -> None:
    layer = tar([entry(f"f{n}", os.urandom(2000)) for n in range(2000)])
    path = docker_archive(tmp_path / "a.tar", [layer], ["a:1"])
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        begin = time.time() + 1.5
        pool.starmap(_import_slowly, [(str(tmp_path / "images"), str(path), begin)] * 4)
    store = ImageStore(tmp_path / "images")
    assert len(store.layers.ids()) == 1
    assert len({store.resolve(r.name).layers for r in store.list() if r.kind == "image"}) == 1
    assert len(store.list()) == 5
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_killed_import_leaves_nothing(tmp_path: Path) -> None:
    layer = tar([entry(f"f{n}", os.urandom(500)) for n in range(20_000)])
    path = docker_archive(tmp_path / "a.tar", [layer], ["a:1"])
    code = (
        f"from pathlib import Path; from rock.images.store import ImageStore as S;"
        f"S(Path({str(tmp_path / 'images')!r})).import_any({str(path)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    temporary = tmp_path / "images/tmp"
    deadline = time.monotonic() + 60
    while not (temporary.is_dir() and any(p.name.startswith("f") for p in temporary.glob("*/layer/*"))):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.002)
    ImageStore(tmp_path / "images")  # opening it does not disturb a living import
    assert any(temporary.iterdir())
    child.send_signal(signal.SIGKILL)
    child.wait()
    store = ImageStore(tmp_path / "images")
    assert leftovers(store) == []
    store.import_any(path)
    assert len(list(Path(store.resolve("a:1").layers[0]).iterdir())) == 20_000


def test_a_layer_that_was_not_finished_is_made_again(store: ImageStore, tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "a.tar", [BASE], ["a:1"])
    store.import_any(path)
    layer = Path(store.resolve("a:1").layers[0])
    (store.folder / "meta" / f"{layer.name}.json").unlink()  # a power cut between its two last steps
    ImageStore(store.folder)
    assert not layer.exists()
    store.import_any(path)
    assert (layer / "etc/name").read_text() == "base"


FULL = """
set -e
mount -t tmpfs -o size=1m tmpfs "$1"
exec "$2" -c '
import sys; from pathlib import Path
from rock.errors import StorageFull
from rock.images.store import ImageStore
store = ImageStore(Path(sys.argv[1]))
try:
    store.import_any(sys.argv[2])
except StorageFull as error:
    left = [p.name for n in ("tmp", "layers", "meta", "images") for p in (store.folder / n).iterdir()]
    print("full", left, error)
' "$1" "$3"
"""


def test_a_full_disk(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "a.tar", [tar([entry(f"f{n}", os.urandom(9000)) for n in range(400)])], ["a:1"])
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-Urm", "sh", "-c", FULL, "sh", str(tmp_path / "disk"), sys.executable, str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in run.stderr:
        pytest.skip(f"no user namespaces here: {run.stderr.strip()}")
    assert run.stdout.startswith("full []"), run.stderr + run.stdout
    assert "nothing half-made" in run.stdout


def test_records_of_another_version_are_told(store: ImageStore, tmp_path: Path) -> None:
    store.import_any(docker_archive(tmp_path / "a.tar", [BASE], ["a:1"]))
    (file,) = (store.folder / "images").iterdir()
    file.write_text(json.dumps({"name": "a:1", "future": 1}))
    with pytest.raises(ImageError, match="another version"):
        store.inspect("a:1")
