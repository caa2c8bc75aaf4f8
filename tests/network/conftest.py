"""A server on a machine with an internet of its own, see world.py."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.leaks import Inventory

from rock.sync import Sandbox, SandboxConfig

HERE = Path(__file__).parent
WAYS = 16
NAMES = {
    "allowed.test": ["203.0.113.10", "2001:db8:1::10"],
    "other.test": ["203.0.113.11"],
    "twin.test": ["203.0.113.10"],
    "deep.wild.test": ["203.0.113.10"],
    "wild.test": ["203.0.113.10"],
    "private.test": ["10.9.9.9"],
    "loop.test": ["127.0.0.1", "::1"],
    "meta.test": ["169.254.169.254"],
    "mixed.test": ["10.9.9.9", "203.0.113.10"],
    "own.test": ["203.0.113.77"],
    "many.test": [f"203.0.113.{number}" for number in range(10, 200)],
}


class World:
    """The world of a test, and what happened in it."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(WAYS)]
        self._used = 0
        cert = _certificate(folder)
        fds = [theirs.fileno(), *(listener.fileno() for listener in self._listeners)]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "world.py"), ",".join(map(str, fds)), *map(str, cert)], pass_fds=fds)
        theirs.close()
        self.certificate = cert[0] if cert else None
        self._control = ours
        self._reader = ours.makefile("r")
        if self._reader.readline() != "ready\n":
            self.close()
            pytest.skip("this machine does not allow network namespaces with a link between them")
        self.ask({"zone": NAMES})

    def new_way(self) -> int:
        """One more port of this machine that can lead to a server in the world."""
        self._used += 1
        return self._used - 1

    def turn(self, way: int, port: int) -> str:
        """Have it lead to that port in the world; the address of its end here."""
        self.ask({"relay": [way, port]})
        return f"http://127.0.0.1:{self._listeners[way].getsockname()[1]}"

    def ask(self, spec: dict[str, Any]) -> Any:
        self._control.sendall(json.dumps(spec).encode() + b"\n")
        return json.loads(self._reader.readline())

    def seen(self, *, clear: bool = True) -> list[dict[str, Any]]:
        """Who was reached since the last time."""
        return list(self.ask({"seen": 1, "clear": clear}))

    def close(self) -> None:
        self._reader.close()
        self._control.close()
        for listener in self._listeners:
            listener.close()
        self.process.wait(20)


def _certificate(folder: Path) -> list[Path]:
    if not shutil.which("openssl"):
        return []
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=world",
         "-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in NAMES), "-keyout", str(key),
         "-out", str(cert)], check=True, capture_output=True)  # fmt: skip
    return [cert, key]


class WorldServer(RunningServer):
    """A server in the world. `prefix` goes before its command line."""

    def __init__(self, world: World, home: Path, prefix: tuple[str, ...] = (), **environment: str) -> None:
        super().__init__(home, **{"ROCK_NETWORK_RESOLVERS": "10.77.0.2", **environment})
        self.world = world
        self._way = world.new_way()
        self.prefix = (sys.executable, str(HERE / "enter.py"), str(world.process.pid), *prefix)

    def reached_at(self, port: int) -> str:
        return self.world.turn(self._way, port)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.close()


@pytest.fixture
def make_server(world: World, tmp_path: Path) -> Iterator[Callable[..., WorldServer]]:
    """Servers of a test's own in the world, one at a time: `make_server(ROCK_POOL_SIZE="2")`."""
    made: list[WorldServer] = []

    def make(prefix: tuple[str, ...] = (), **environment: str) -> WorldServer:
        running = WorldServer(world, tmp_path / f"home{len(made)}", prefix, **environment)
        running.home.mkdir()
        made.append(running)
        give_image(running.home)
        running.start()
        return running

    yield make
    for running in made:
        if running.process is not None and running.process.poll() is not None:
            running.start()
        running.stop()
        running.assert_clean(Inventory())


@pytest.fixture(scope="session")
def world_server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorldServer]:
    running = WorldServer(world, tmp_path_factory.mktemp("world-home"))
    give_image(running.home)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


Opener = Callable[..., Sandbox]


@pytest.fixture
def opened(world_server: WorldServer, world: World) -> Iterator[Opener]:
    """Sandboxes with a network: `opened(egress=["example.com"])`."""
    made: list[Sandbox] = []

    def open_one(**fields: Any) -> Sandbox:
        config = SandboxConfig(base_url=world_server.url, image=IMAGE, memory="512m", cpus=1.0,
                               **{"network": "nat", **fields})
        made.append(Sandbox(config))
        made[-1].start()
        return made[-1]

    world.seen()
    yield open_one
    for sandbox in made:
        sandbox.stop()
