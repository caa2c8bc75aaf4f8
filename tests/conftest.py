"""Real servers for the tests, each with a home of its own, and the leak check that runs after every test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from rock.sync import Client, Sandbox, SandboxConfig
from tests.leaks import Inventory, take_inventory

IMAGE = "python:3.11"

# A background job of a shell starts with these ignored, and would hand that on to all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Servers are started by the hundred: what each has to compile anew is half of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No database of examples: the checkout may be read-only. No deadline for one example: the machine may be loaded.
settings.register_profile("rock", database=None, deadline=None)
settings.load_profile("rock")


# The default depends on the CPUs of the machine: with ROCK_PROCESSES=2 the servers of the tests have two processes.
os.environ.setdefault("ROCK_PROCESSES", "1")

# Files that take the longest, or wait the longest.
FIRST = ("tests/test_rootless.py", "tests/envs/test_gem.py", "tests/e2e/test_commit.py", "tests/cli/test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that others run beside them; without the ones of `make long`."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(FIRST)))
    if not os.environ.get("ROCK_TEST_LONG"):
        skip = pytest.mark.skip(reason="as others are, but longer: `make long`, or ROCK_TEST_LONG=1")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
    if os.environ["ROCK_PROCESSES"] != "1":
        for item in items:
            if (marker := item.get_closest_marker("one_process")) is not None:
                (reason,) = marker.args
                item.add_marker(pytest.mark.skip(reason=f"for one rocklet process: {reason}"))


class _Instant:
    """Prints each failure when it happens, and not only in the summary at the end of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.getplugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"FAILED NOW {report.nodeid} ({report.when})")
            terminal.write_line("\n".join(report.longreprtext.splitlines()[-30:]))


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("ROCK_TEST_INSTANT") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Instant(config), "rock-instant")


class RunningServer:
    """A server process of the tests. `url` is its address. prefix: of its command line."""

    prefix: tuple[str, ...] = ()

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.environment = environment
        self.prefix: list[str] = []  # a program that runs the server's command line in its own place
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.pid = 0
        self.front: subprocess.Popen[str] | None = None

    def __str__(self) -> str:
        return self.url

    def start(self, port: int = 0, seconds: float = 100.0) -> None:
        """Start it and wait until it serves; its log is told when it does not."""
        environ = {
            **os.environ, "ROCK_POOL_SIZE": "0", **self.environment, "ROCK_HOME": str(self.home),
        }  # fmt: skip
        with open(self.home / "output.log", "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *self.command(port)], env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.pid = self.process.pid
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                note = json.loads((self.home / "server.json").read_text())
            except (OSError, ValueError):
                note = {}
            if note.get("pid") == self.pid:
                self.url = self.reached_at(int(note["port"]))
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"the server did not start:\n{self.log()}")

    def command(self, port: int) -> list[str]:
        """Its command line."""
        return [sys.executable, "-W", "error::ResourceWarning", "-m", "rock.cli.server", "--host", "127.0.0.1",
                "--port", str(port)]  # fmt: skip

    def reached_at(self, port: int) -> str:
        """Its address, when it listens on that port."""
        return f"http://127.0.0.1:{port}"

    def fronted(self, url: str) -> str:
        """With ROCK_TEST_FRONT=1 what is asked goes through another server."""
        self.drop_front()
        if not os.environ.get("ROCK_TEST_FRONT"):
            return url
        command = [sys.executable, str(Path(__file__).parent / "wire" / "front.py"), url]
        self.front = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.front.stdout is not None
        return self.front.stdout.readline().strip()

    def drop_front(self) -> None:
        if self.front is not None:
            self.front.communicate()
            self.front = None

    def log(self) -> str:
        logs = self.home / "logs"
        parts = [self.home / "output.log", logs / "server.log", *sorted(logs.glob("process-*.log"))]
        return "\n".join(p.read_text(errors="replace")[-4000:] for p in parts if p.exists())

    def kill(self) -> None:
        """kill -9."""
        self.drop_front()
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop every sandbox, remove what is kept, then stop the server."""
        if self.process is None or self.process.poll() is not None:
            return
        with Client(self.url, self.environment.get("ROCK_API_KEY")) as client:
            for info in client.list_sandboxes(states="pending,running,stopping"):
                client.stop_sandbox(info.sandbox_id)
            for info in client.list_sandboxes(states="stopped,archived"):
                if info.kept or info.archive:
                    client.delete_sandbox(info.sandbox_id)
            for snapshot in client.list_snapshots():
                client.delete_snapshot(snapshot.snapshot_id)
        self.drop_front()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(100) == 0, self.log()

    def inventory(self) -> Inventory:
        return take_inventory(self.home, self.pid)

    def assert_clean(self, before: Inventory, seconds: float = 5.0) -> None:
        """Nothing is left that was not there before; what is being removed gets `seconds`."""
        end = time.monotonic() + seconds
        while (left := self.inventory() - before) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, f"left behind: {left}"


_looked_through: list[bytes] = []  # what root's first store found private below /usr, which takes a second of work


def give_image(home: Path) -> None:
    """This machine's own system as IMAGE, for a server with that home."""
    from rock.images.store import ImageStore

    found = home / "images" / "private.json"
    if _looked_through and not found.exists():
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_bytes(_looked_through[0])  # the store looks itself whether that still holds
    ImageStore(home / "images").from_host(IMAGE)
    if not _looked_through and found.exists():
        _looked_through.append(found.read_bytes())


@pytest.fixture(scope="session")
def session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for most tests, without a warm pool, so that the leak check can count."""
    running = RunningServer(tmp_path_factory.mktemp("home"))
    give_image(running.home)
    running.start()
    yield running
    empty = Inventory()
    running.stop()
    running.assert_clean(empty)


@pytest.fixture
def server(session_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """The shared server, as ROCK_BASE_URL; after the test nothing of it may be left."""
    monkeypatch.setenv("ROCK_BASE_URL", session_server.url)
    before = session_server.inventory()
    yield session_server
    session_server.assert_clean(before)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Servers of a test's own, which it may kill and start again: `own_server(ROCK_POOL_SIZE="2")`."""
    made: list[RunningServer] = []

    def make(home: Path | None = None, **environment: str) -> RunningServer:
        home = home or tmp_path / f"home{len(made)}"
        home.mkdir(exist_ok=True)
        running = RunningServer(home, **environment)
        made.append(running)
        give_image(home)
        running.start()
        return running

    yield make
    for running in made:
        if running.process is not None and running.process.poll() is not None:
            running.start()  # a killed one: what it left has to be found and removed
        running.stop()
        running.assert_clean(Inventory())


def running(sandbox: Sandbox, command: str) -> int:
    """How many processes inside have exactly this command line."""
    program = (
        "import glob, sys\n"
        "print(sum(open(f, 'rb').read().replace(b'\\0', b' ').decode().strip() == sys.argv[1]"
        " for f in glob.glob('/proc/[0-9]*/cmdline')))"
    )
    return int(sandbox.execute(["python3", "-c", program, command]).stdout)


@pytest.fixture
def sandbox(server: RunningServer) -> Iterator[Sandbox]:
    """A running sandbox, stopped after the test."""
    with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="512m", cpus=1.0)) as made:
        yield made


@pytest.fixture(scope="session")
def env_images() -> Path:
    """An image store that is kept between runs of the tests, with the packages of environments."""
    images = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "images"
    images.mkdir(parents=True, exist_ok=True)
    return images


@contextlib.contextmanager
def hosting(home: Path, images: Path, **environment: str) -> Iterator[RunningServer]:
    """A server that can host environments, with the package images of `images`."""
    (home / "images").symlink_to(images)
    running = RunningServer(home, **environment)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


@pytest.fixture(scope="session")
def env_server(tmp_path_factory: pytest.TempPathFactory, env_images: Path) -> Iterator[RunningServer]:
    """A server that can host environments."""
    with hosting(tmp_path_factory.mktemp("env-home"), env_images) as running:
        yield running


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A port that nobody listens on now."""
    import socket

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3 server (moto), from a virtual environment of its own, with the bucket rock-test."""
    if not os.environ.get("ROCK_TEST_S3"):
        pytest.skip("installs an S3 server (moto) with pip: set ROCK_TEST_S3=1")
    import socket
    import urllib.request

    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests")
    folder = cache / "moto"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-q", "moto[server,s3]"], check=True)
        (folder / "ready").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with subprocess.Popen([str(folder / "bin/moto_server"), "-H", "127.0.0.1", "-p", str(port)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:  # fmt: skip
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/rock-test", method="PUT"), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.1)
        yield url
        server.terminate()
