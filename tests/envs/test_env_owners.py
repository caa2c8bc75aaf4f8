"""Environments belong to the client process that made them, and are spread over sandboxes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer, hosting
from tests.waiting import until

import rock
from rock.envs.client import LEASES
from rock.guest.environments import host
from rock.protocol.env import PIPED
from rock.sync import Client, Sandbox, SandboxConfig

pytestmark = pytest.mark.timeout(600)
GUESS = "game:GuessTheNumber-v0-easy"
LEASE = 3.0

TRAINER = """
import os, sys
import rock

count, how = int(sys.argv[1]), sys.argv[2]
envs = [rock.make("game:GuessTheNumber-v0-easy") for _ in range(count)]
for env in envs:
    env.reset(seed=1)
print(*{env.sandbox_id for env in envs}, flush=True)
if how == "exit":
    sys.exit()  # without close()
if how == "fork":
    if os.fork():
        os._exit(0)  # the child goes on with what it inherited
    env = envs[0]
    while sys.stdin.readline():
        print(env.step("\\\\boxed{1}")[1], flush=True)
    os._exit(0)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, env_images: Path) -> Iterator[RunningServer]:
    """A server with short leases."""
    with hosting(tmp_path_factory.mktemp("owners"), env_images, ROCK_ENV_LEASE=str(LEASE)) as running:
        yield running


@pytest.fixture(params=["pipes", "http"])
def url(request: pytest.FixtureRequest, short: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROCK_BASE_URL", short.url)
    monkeypatch.setenv("ROCK_ENV_PIPES", "1" if request.param == "pipes" else "0")
    return short.url


@pytest.fixture
def trainer() -> Iterator[Callable[[int, str], Any]]:
    made: list[Any] = []

    def start(count: int, how: str) -> Any:
        made.append(_trainer(count, how))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _trainer(count: int, how: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen([sys.executable, "-c", TRAINER, str(count), how], env=environment, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


COUNT = """
import glob
found = 0
for folder in glob.glob("/proc/[0-9]*"):
    try:
        line = open(folder + "/cmdline", "rb").read().rstrip(b"\\0")
        parent = open(folder + "/stat").read().rpartition(")")[2].split()[1]
        above = open("/proc/" + parent + "/cmdline", "rb").read().rstrip(b"\\0")
    except OSError:
        continue
    found += line.endswith(b"/opt/rock/envs/current/site") and above == line
print(found)
"""


def players(server: RunningServer) -> int:
    """Processes of environments in all sandboxes of the server: children of the hosts."""
    with Client(server.url) as client:
        ids = [info.sandbox_id for info in client.list_sandboxes(states="running")]
    found = 0
    for sandbox_id in ids:
        sandbox = Sandbox(SandboxConfig(base_url=server.url))
        sandbox.attach(sandbox_id)
        found += int(sandbox.execute(["python3", "-c", COUNT]).stdout)
    return found


def test_a_killed_trainer_leaves_nothing_though_another_uses_its_sandbox(
    url: str, short: RunningServer, trainer: Callable[[int, str], Any]
) -> None:
    with rock.make(GUESS) as other:
        other.reset(seed=1)
        before = players(short)
        with trainer(3, "wait") as process:
            assert other.sandbox_id in process.stdout.readline().split()
            assert players(short) == before + 3
            process.send_signal(signal.SIGKILL)
        end = time.monotonic() + 10 * LEASE
        while players(short) > before and time.monotonic() < end:
            other.step("\\boxed{2}")
            time.sleep(0.1)
        assert players(short) == before
        assert other.step("\\boxed{3}")[0]


def test_an_exit_without_close_releases_at_once(
    url: str, short: RunningServer, trainer: Callable[[int, str], Any]
) -> None:
    with rock.make(GUESS) as other:
        before = players(short)
        process = trainer(2, "exit")
        process.communicate(timeout=60)
        assert process.returncode == 0
        until(lambda: players(short) == before, seconds=LEASE * 0.7)
        assert other.reset(seed=1)


def test_a_quiet_trainer_keeps_its_environments(url: str, short: RunningServer) -> None:
    """It computes for longer than the lease, and makes no request."""
    with rock.make(GUESS) as env, rock.make(GUESS) as other:
        first = env.reset(seed=5)
        time.sleep(2 * LEASE)
        assert env.step("\\boxed{1}")[0] and env.reset(seed=5) == first
        other.reset(seed=1)


def test_a_child_goes_on_with_what_it_inherited(
    url: str, short: RunningServer, trainer: Callable[[int, str], Any]
) -> None:
    before = players(short)
    process = trainer(1, "fork")
    process.stdout.readline()
    for _ in range(3):
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline()
        time.sleep(LEASE)
    assert players(short) == before + 1
    process.communicate(timeout=30)
    until(lambda: players(short) == before, seconds=10 * LEASE)


def test_a_collected_environment_is_closed(url: str, short: RunningServer) -> None:
    before = players(short)
    env = rock.make(GUESS)
    assert players(short) == before + 1
    del env
    until(lambda: players(short) == before, seconds=LEASE * 0.7)


def test_owners_over_http(url: str) -> None:
    with rock.make(GUESS) as env, Client(url) as client:
        path = f"/v1/sandboxes/{env.sandbox_id}/envs/owners/"
        assert client.transport.json("POST", path + LEASES.owner)["environments"] == 1
        assert client.transport.json("POST", path + "x" * 16)["environments"] == 0
        assert client.transport.json("DELETE", path + "x" * 16)["environments"] == 0
        for wrong in ("short", "x" * 65, "a%20b" * 8):
            with pytest.raises(rock.errors.InvalidConfig, match="16 to 64"):
                client.transport.json("POST", path + wrong)
        assert client.transport.json("DELETE", path + LEASES.owner)["environments"] == 1
        with pytest.raises(rock.errors.NotFound):
            env.reset()


def test_every_environment_has_pipes(url: str, short: RunningServer) -> None:
    """More environments than one sandbox has pipes for are spread, evenly and without a limit of the client's."""
    assert len(host.PIPES) == PIPED
    if os.environ["ROCK_ENV_PIPES"] == "0":
        pytest.skip("about pipes")
    envs = [rock.make(GUESS) for _ in range(PIPED + 8)]
    try:
        assert all(env.player.link.ways for env in envs)
        assert len({env.sandbox_id for env in envs}) >= 2
        for env in envs:
            env.reset(seed=3)
    finally:
        for env in envs:
            env.close()
