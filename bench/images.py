"""A pull and the first start of an image, and a second start, beside a Docker of this machine, in turns.

    python bench/images.py [--rounds 3] [--megabytes 300] [--out FILE]

The image is made here, with several layers, and pushed to Debian's docker-registry on the loopback. ROCK's server gets
an empty home each round, and Docker forgets all its images; then both pull it and run true in it. Docker is a
dockerd of its own, with its own folders and socket, ended by its pid; without one, ROCK's times are told alone. Needs
root for that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.conftest import RunningServer
from tests.e2e.test_images import small_root
from tests.image.registries import docker_registry

from rock.images.layers.views import copy_tree
from rock.images.store import ImageStore
from rock.sync import Sandbox

_LAYERS = 5


def make_image(store: ImageStore, folder: Path, name: str, megabytes: int) -> int:
    """An image of several layers: a small system, this machine's files, and bytes that do not compress. Its size."""
    store.import_folder(small_root(folder / "root", "true", "sh"), name)
    room = megabytes * 1_000_000 // (_LAYERS - 1)
    files = _real_files()
    for number in range(1, _LAYERS):
        part = folder / f"layer{number}"
        left = room
        for path in files:
            info = os.lstat(path)
            target = part / str(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            left -= info.st_size
            if left <= room // 4:
                break
        source = random.Random(number)
        (part / "data").mkdir(parents=True)
        for piece in range(max(1, left // 5_000_000)):
            (part / "data" / f"{number}-{piece}").write_bytes(source.randbytes(5_000_000))
        store.extend(name, store.resolve(name), lambda writer, part=part: copy_tree(part, writer), f"layer {number}")
    return store.inspect(name).size


def _real_files() -> Iterator[Path]:
    """Files of this machine that everybody may read, none of them large."""
    for root in ("/usr/lib/python3", "/usr/lib/python3.11", "/usr/share", "/usr/include", "/usr/lib/x86_64-linux-gnu"):
        for base, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(base, name)
                if path.is_file() and not path.is_symlink() and 0 < path.stat().st_size < 4_000_000:
                    yield path


class Docker:
    """A dockerd of one's own, of this machine or unpacked from Debian's packages into the tests' cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "docker-engine"
        libraries = ":".join(map(str, (*cache.glob("usr/lib/*-linux-gnu"), *cache.glob("lib/*-linux-gnu"))))
        path = f"{cache}/usr/bin:{cache}/usr/sbin:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._environ = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries, "HOME": str(folder)}
        self._host = f"unix://{folder}/sock"
        program = shutil.which("dockerd", path=path)
        if program is None:
            raise RuntimeError("there is no dockerd: apt-get install docker.io")
        self._log = open(folder / "log", "wb")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [program, "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid", "-H",
             self._host, "--bridge=none", "--iptables=false", "--ip6tables=false"],
            stdout=self._log, stderr=self._log, env=self._environ, cwd="/", start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        while self("info", check=False).returncode != 0:
            if time.monotonic() > end or self._process.poll() is not None:
                self.close()
                raise RuntimeError(f"dockerd does not start here: {(folder / 'log').read_text()[-300:]}")
            time.sleep(0.1)

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        program = shutil.which("docker", path=self._environ["PATH"])
        assert program is not None
        run = subprocess.run([program, "-H", self._host, *words], env=self._environ, capture_output=True, timeout=600)
        if check and run.returncode != 0:
            raise RuntimeError(f"docker {' '.join(words)}: {run.stderr.decode()[-300:]}")
        return run

    @property
    def about(self) -> str:
        return self("info", "--format", "{{.ServerVersion}} {{.Driver}}").stdout.decode().strip()

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


@contextlib.contextmanager
def rock(folder: Path) -> Iterator[RunningServer]:
    """A server with an empty home."""
    folder.mkdir()
    server = RunningServer(folder)
    server.start(seconds=60)
    try:
        yield server
    finally:
        server.stop()


def rock_run(server: RunningServer, image: str) -> None:
    with Sandbox(base_url=server.url, image=image, memory="512m", startup_timeout=600) as sandbox:
        assert sandbox.execute(["/usr/bin/true"]).exit_code == 0


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--megabytes", type=int, default=300)
    options.add_argument("--out")
    chosen = options.parse_args()
    names = ("rock pull+start", "docker pull+start", "rock again", "docker again")
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as top, contextlib.ExitStack() as stack:
        folder = Path(top)
        registry = contextlib.ExitStack()
        (folder / "registry").mkdir()
        image = registry.enter_context(docker_registry(folder / "registry")) + "/bench/image:1"
        stack.enter_context(registry)
        store = ImageStore(folder / "made")
        size = make_image(store, folder, image, chosen.megabytes)
        store.push(image)
        packed = sum(path.stat().st_size for path in (folder / "registry").rglob("data"))
        about = f"{size / 1e6:.0f} MB of files in {_LAYERS} layers, {packed / 1e6:.0f} MB packed"
        try:
            docker = Docker(folder / "docker")
            stack.callback(docker.close)
            peer = docker.about
        except RuntimeError as error:
            docker, peer = None, f"no Docker: {error}"
        print(f"{about}; Docker {peer}; {os.cpu_count()} CPUs, {platform.release()}", flush=True)
        for number in range(chosen.rounds):
            one = contextlib.ExitStack()
            stack.enter_context(one)
            server = one.enter_context(rock(folder / f"home{number}"))
            times["rock pull+start"].append(timed(lambda server=server: rock_run(server, image)))
            if docker is not None:
                run = ("run", "--rm", "--network", "none", image, "/usr/bin/true")
                times["docker pull+start"].append(timed(lambda run=run: (docker("pull", image), docker(*run))))
                times["docker again"].append(timed(lambda run=run: docker(*run)))
            if number == chosen.rounds - 1:
                registry.close()  # a second start asks nobody
            times["rock again"].append(timed(lambda server=server: rock_run(server, image)))
            one.close()
            if docker is not None and number < chosen.rounds - 1:
                docker("rmi", "--force", image)
            print({name: round(values[-1], 3) for name, values in times.items() if values}, flush=True)
    middle = {name: statistics.median(values) for name, values in times.items() if values}
    for name, value in middle.items():
        print(f"{name:20} {value:7.3f} s")
    if "docker pull+start" in middle:
        print(f"ROCK / Docker: {middle['rock pull+start'] / middle['docker pull+start']:.2f} for pull and start, "
              f"{middle['rock again'] / middle['docker again']:.2f} again")  # fmt: skip
    if chosen.out:
        Path(chosen.out).write_text(json.dumps({"image": about, "docker": peer, "times": times}, indent=1))


if __name__ == "__main__":
    main()
