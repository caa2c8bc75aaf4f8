"""The image `host`: what is in it, and above all what is not."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from image_archives import as_ordinary_user

from rock.errors import InvalidConfig
from rock.images import host
from rock.images.store import ImageStore

ROOT = os.geteuid() == 0


def test_nothing_private_is_in_it(store: ImageStore) -> None:
    rootfs = store.resolve("host")
    (layer,) = (Path(folder) for folder in rootfs.layers)
    there = {str(p.relative_to(layer)) for p in layer.rglob("*")}
    for name in ("etc/shadow", "etc/gshadow", "etc/sudoers", "etc/ssh", "etc/ssl/private", "etc/npmrc",
                 "etc/environment", "etc/gitconfig", "etc/apt/auth.conf", "etc/apt/auth.conf.d", "etc/cloud",
                 "etc/passwd-"):  # fmt: skip
        assert name not in there
    for name in ("etc/apt/sources.list", "etc/apt/sources.list.d", "etc/pip.conf"):  # where packages come from
        host_has = os.path.lexists(f"/{name}") and (os.path.isdir(f"/{name}") or host._public(f"/{name}") is not None)
        assert (name in there) == host_has, name
    for name in ("root", "home", "tmp", "mnt", "srv", "media", "opt/rock/envs", "var/lib", "var/log", "usr", "proc"):
        assert list((layer / name).iterdir()) == []
    for path in layer.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"PRIVATE KEY" not in path.read_bytes(), path
    assert (layer / "etc/machine-id").read_bytes() == b""
    users = [line.split(":") for line in (layer / "etc/passwd").read_text().splitlines()]
    assert users[0][0] == "root"
    assert all(int(u[2]) < 1000 or int(u[2]) == 65534 for u in users)
    assert {u[1] for u in users} == {"*"}
    assert {bind.source for bind in rootfs.binds if bind.source == bind.target} >= {"/usr"}
    assert not any(bind.writable or bind.idmap for bind in rootfs.binds)
    private = ("/", "/root", "/home", "/var", "/run", "/etc", "/opt", "/tmp")
    assert not any(bind.source in private for bind in rootfs.binds)
    for bind in rootfs.binds:
        assert os.path.isdir(layer / bind.target.lstrip("/"))


def test_its_private_files_are_left_out(tmp_path: Path) -> None:
    key, token, good = tmp_path / "key.pem", tmp_path / "conf", tmp_path / "cert.pem"
    key.write_text("-----BEGIN RSA PRIVATE KEY-----\nabc\n")
    token.write_text("proxy = http://me:secret@proxy:3128/\n")
    good.write_text("-----BEGIN CERTIFICATE-----\n")
    assert (host._public(str(key)), host._public(str(token))) == (None, None)
    assert host._public(str(good)) == good.read_bytes()
    good.chmod(0o640)
    assert list(host._copied(str(good))) == []


def test_it_runs_programs(store: ImageStore, tmp_path: Path) -> None:
    """Mounted by hand, without the runtime: bash, python3, python and a certificate bundle work."""
    _run_in(store, tmp_path)


def test_it_runs_programs_for_an_ordinary_user(open_folder: Path) -> None:
    as_ordinary_user(lambda: _run_in(ImageStore(open_folder / "images"), open_folder))


def _run_in(store: ImageStore, folder: Path) -> None:
    rootfs = store.resolve("host")
    lines = [f'cd "{folder}"; mkdir up work root', f'mount -t overlay overlay -o lowerdir="{rootfs.layers[0]}",'
             "upperdir=up,workdir=work,userxattr root"]  # fmt: skip
    lines += [f'mount --rbind "{b.source}" "root{b.target}"' for b in rootfs.binds]
    check = "id -u; python3 -c 'import ssl, sys; print(sys.version_info >= (3, 11))'; python -c 'print(1)'"
    if python := host.rock_python():
        check += f"; {python} -c 'import zlib, ctypes; print(3)'"
    lines.append(f'exec chroot root /bin/sh -ec "{check}"')
    command = ["unshare", "-Urm", "sh", "-ec", "\n".join(lines)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(rootfs.env))
    if "unshare" in run.stderr:
        pytest.skip(f"no user namespaces here: {run.stderr.strip()}")
    assert run.stdout.split()[:3] == ["0", "True", "1"], run.stderr
    if python:
        assert run.stdout.split()[-1] == "3"


def test_it_is_remembered(store: ImageStore) -> None:
    first = store.resolve("host")
    begin = time.perf_counter()
    for _ in range(100):
        assert store.resolve("host") == first
    assert (time.perf_counter() - begin) / 100 < 0.05
    assert ImageStore(store.folder).resolve("host") == first
    assert store.gc() == 0
    assert os.path.isdir(first.layers[0])


def test_it_is_made_anew_when_the_machine_changes(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.resolve("host")
    monkeypatch.setitem(host._MADE, "etc/motd", "changed\n")
    later = ImageStore(store.folder)
    assert later.resolve("host").layers != first.layers
    later.gc()
    assert not os.path.exists(first.layers[0])


def test_from_host(store: ImageStore) -> None:
    record = store.from_host("python:3.11")
    assert record.by_reference and "changes of the machine show" in record.note
    rootfs, plain = store.resolve("docker.io/library/python:3.11"), store.resolve("host")
    assert rootfs.name == "python:3.11"
    assert rootfs.layers == plain.layers
    usr = next(bind for bind in rootfs.binds if bind.target == "/usr")
    assert usr.writable == usr.idmap == ROOT
    if ROOT:
        assert rootfs.digest != plain.digest
    assert [r.name for r in store.list()] == ["host", "python:3.11"]
    store.remove("python:3.11")
    assert [r.name for r in store.list()] == ["host"]
    with pytest.raises(InvalidConfig, match="built in"):
        store.from_host("host")
    with pytest.raises(InvalidConfig, match="built in"):
        store.remove("host")
