"""Sandboxes of images that were imported: real layers, which go when nobody needs them any more and not before."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.image.registries import USER, Odd, blobs_of, docker_registry, odd_registry, push
from tests.waiting import until

from rock.errors import ImageError, StartFailed
from rock.images.store import ImageStore
from rock.sync import Client, Sandbox


def small_root(folder: Path, *more: str) -> Path:
    """A root folder with bash, cat, ls and `more` programs, and the libraries that they need."""
    for name in ("bash", "cat", "ls", *more):
        program = shutil.which(name)
        assert program is not None
        libraries = re.findall(r"(/\S+) \(", subprocess.run(["ldd", program], capture_output=True, text=True).stdout)
        for path in (program, *libraries):
            target = folder / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (folder / "bin").mkdir(exist_ok=True)
    if not (folder / "bin" / "bash").exists():
        (folder / "bin" / "bash").symlink_to("/usr/bin/bash")
    (folder / "marker").write_text("from the image\n")
    return folder


@pytest.mark.parametrize("pool", ["0", "1"])
def test_a_removed_image_stays_under_its_sandboxes(
    own_server: Callable[..., RunningServer], tmp_path: Path, pool: str
) -> None:
    server = own_server(ROCK_POOL_SIZE=pool)
    store = ImageStore(server.home / "images")
    store.import_any(small_root(tmp_path / "root"), "small:1")
    (layer,) = (Path(folder) for folder in store.resolve("small:1").layers)
    sandboxes = [Sandbox(base_url=server.url, image="small:1", memory="256m") for _ in range(3)]
    for sandbox in sandboxes:
        sandbox.start()
        assert sandbox.arun("cat /marker; cat /etc/hostname").output == "from the image\nsandbox\n"
    assert store.remove("small:1") == 0
    assert layer.is_dir()
    with pytest.raises(ImageError, match="rock image import"):
        Sandbox(base_url=server.url, image="small:1", memory="256m").start()
    sandboxes[0].stop()
    server.kill()
    assert store.gc() == 0 and layer.is_dir(), "the other two live on, and so does what they have mounted"
    server.start()
    assert Sandbox(base_url=server.url).attach(sandboxes[1].sandbox_id).arun("cat /marker").output == "from the image\n"
    for sandbox in sandboxes[1:]:
        Sandbox(base_url=server.url).attach(sandbox.sandbox_id).stop()
    server.stop()
    assert store.gc() > 0 and not layer.exists()


def test_an_image_is_pulled_when_it_is_first_needed(
    own_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(small_root(root), ".")
    server = own_server()
    with docker_registry(tmp_path, login=True) as address:
        image = f"{address}/team/small:1"
        push(image, [packed.getvalue()], tmp_path, USER, Env=["GREETING=hello"])
        options = {"base_url": server.url, "image": image, "memory": "256m"}
        with pytest.raises(ImageError, match=r"refuses .* without a login"):
            Sandbox(**options).start()
        with pytest.raises(ImageError, match="not on this machine"):
            Sandbox(**options, pull="never").start()
        login = {"registry_username": USER.username, "registry_password": USER.password}
        with Sandbox(**options, **login) as first:
            assert first.arun("cat /marker; echo $GREETING").output == "from the image\nhello\n"
    with Sandbox(**options) as second:  # the registry is gone, and nobody asks it
        assert second.arun("cat /marker").output == "from the image\n"
    with pytest.raises(ImageError, match="cannot be reached"):
        Sandbox(**options, pull="always").start()
    kept = [path for path in server.home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in kept if USER.password.encode() in path.read_bytes()]


def test_how_far_an_image_is(own_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    going = threading.Event()

    class Slow(Odd):
        def answer(self, path: str) -> bool:
            if path.endswith(layer):
                going.wait(60)
            return False

    packed = io.BytesIO()
    (tmp_path / "root").mkdir()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(small_root(tmp_path / "root"), ".")
    server, blobs = own_server(), blobs_of([packed.getvalue()])
    layer = list(blobs)[1]
    with odd_registry(Slow, blobs) as address, Client(server.url) as client:
        options = {"base_url": server.url, "image": f"{address}/team/tool:1.0", "memory": "256m"}
        sandbox, other = Sandbox(**options, sandbox_id="a" * 8), Sandbox(**options, startup_timeout=4.0)
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.submit(sandbox.start), threads.submit(other.start)
            try:
                with pytest.raises(StartFailed, match=r"in phase 'image': 1 of 1 layers to fetch, .* MB"):
                    second.result()
                image = client.get_sandbox("a" * 8).phases["image"]
                assert image.status == "running" and image.message.startswith("1 of 1 layers to fetch, ")
                status = f"{server.url}/apis/envs/sandbox/v1/get_status?sandbox_id={'a' * 8}"
                with urllib.request.urlopen(status, timeout=20) as answer:
                    told = json.load(answer)["result"]["status"]["image_pull"]
                assert (told["status"], told["message"]) == ("running", image.message)
            finally:
                going.set()
            first.result()
        assert client.get_sandbox("a" * 8).phases["image"].message == "on disk"
        until(lambda: client.list_workers()[0].status.fetching == {})  # of each process, by its next report
        sandbox.stop()


def test_silent_registries_hold_up_nobody(own_server: Callable[..., RunningServer]) -> None:
    """A registry may take as long as it likes: many of them at once leave the server's other work alone."""
    server, many = own_server(), (os.cpu_count() or 1) + 8
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, Client(server.url) as client:
        silent.settimeout(30)
        image = f"127.0.0.1:{silent.getsockname()[1]}/team"
        waiting = [Sandbox(base_url=server.url, image=f"{image}/n{number}:1", memory="64m", cpus=0.1)
                   for number in range(many)]  # fmt: skip
        with ThreadPoolExecutor(many) as pool, contextlib.ExitStack() as held:
            starts = [pool.submit(sandbox.start) for sandbox in waiting]
            for _ in range(many):
                held.enter_context(silent.accept()[0])
            with Sandbox(base_url=server.url, image=IMAGE, memory="64m", cpus=0.1) as other:
                other.fs.write("/tmp/a", b"x")
                assert other.arun("cat /tmp/a").output == "x" and len(client.list_sandboxes()) == many + 1
                with pytest.raises(ImageError, match="cannot be reached"):
                    Sandbox(base_url=server.url, image="127.0.0.1:1/no/body:1", memory="64m", cpus=0.1).start()
            silent.close()
            held.close()
            for start in starts:
                with pytest.raises(ImageError):
                    start.result(60)
