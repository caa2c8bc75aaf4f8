"""Environments that are played by their own pipes, and what happens when somebody does not keep to the rules."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

gymnasium = pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import numpy as np
from tests.conftest import RunningServer

import rock
from rock import errors
from rock.envs.client import EnvironmentHandle
from rock.gym import SandboxEnv, SandboxVectorEnv
from rock.protocol.env import PIPED
from rock.protocol.sandbox import SandboxConfig

WORLDS = Path(__file__).parent / "worlds"
pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes

PLAY = """
import os, sys
from rock.gym import SandboxEnv
env = SandboxEnv("CartPole-v1")
env.reset(seed=1)
env.step(0)
print(env.sandbox_id, env._player.number, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def url(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    return env_server.url


@pytest.fixture
def env(url: str) -> Iterator[SandboxEnv]:
    with SandboxEnv("CartPole-v1") as made:
        yield made


def held(env: SandboxEnv) -> Any:
    return env._player.link.ways[env._player.number]


def over_http(env: SandboxEnv) -> EnvironmentHandle:
    """The same environment for somebody who has no pipes."""
    player = EnvironmentHandle(env._player.link, env._player.number)
    player.link = type(env._player.link)(base_url=os.environ["ROCK_BASE_URL"])
    player.link.sandbox_id = env.sandbox_id
    player.link._target = env._player.link._target
    player.index = env._player.index
    return player


def test_nobody_else_plays_it_meanwhile(env: SandboxEnv) -> None:
    env.reset(seed=1)
    other = over_http(env)
    with pytest.raises(errors.Conflict, match="holds its pipes"):
        other.step(0)
    first = env.step(0)
    held(env).close()
    again = other.step(0)  # the same number: the same answer, by the other way
    assert (again[0] == first[0]).all()
    assert env.step(1)[0].shape == (4,) and not env._player.link.ways
    env.reset(seed=1)
    assert (env.step(0)[0] == first[0]).all()


def test_threads_take_turns(env: SandboxEnv) -> None:
    env.reset(seed=1)
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(50):
                assert env.get_attr("gravity") == 9.8
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and env._player.link.ways


def test_a_child_of_a_fork_keeps_off_its_parent_s_pipes(env: SandboxEnv) -> None:
    env.reset(seed=1)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            env.step(0)
        except errors.Conflict:
            status = 7
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    env.step(0)
    assert env._player.link.ways


def test_a_client_that_was_killed_gives_them_back(env: SandboxEnv) -> None:
    child = subprocess.Popen([sys.executable, "-c", PLAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    sandbox_id, number = child.stdout.readline().split()
    player = over_http(env)
    player.link.sandbox_id = sandbox_id
    player.link._target = player.link._target.replace(env.sandbox_id, sandbox_id)
    player.number, player.index = int(number), 1
    with pytest.raises(errors.Conflict):
        player.step(0)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert player.step(0)[1] == 1.0
    player.link.close_env(player.number)


def test_the_server_dies_while_it_is_played(own_server: Callable[..., RunningServer], env_images: Path,
                                            tmp_path: Path) -> None:  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    (home / "images").symlink_to(env_images)
    server = RunningServer(home)
    server.start()
    port = int(server.url.rpartition(":")[2])
    here = gymnasium.make("CartPole-v1")
    try:
        with SandboxEnv("CartPole-v1", base_url=server.url) as env:
            assert (env.reset(seed=3)[0] == here.reset(seed=3)[0]).all()
            assert (env.step(1)[0] == here.step(1)[0]).all()
            server.kill()
            with pytest.raises(errors.Unavailable):
                env.step(1)
            server.start(port)
            assert (env.step(1)[0] == here.step(1)[0]).all()
            link = env._player.link
            other = link.make({"env_id": "CartPole-v1", "protocol": "gym", "kwargs": {}}, 60)
            assert link.ways[other]._memory is not None  # what was there before the crash is lent again
            link.close_env(other)
    finally:
        server.stop()


def test_large_frames_go_both_ways(url: str) -> None:
    with SandboxEnv(str(WORLDS), trust_remote_code=True, world="World", kind="picture") as env:
        env.reset(seed=1)
        picture = np.arange(3_000_000, dtype=np.uint8)
        assert env.call("add", picture, picture[:1]).nbytes == picture.nbytes
        assert env.step(1)[0].shape == (210, 160, 3)
        assert env._player.link.ways


def test_large_answers_come_by_memory_that_is_only_ours_to_read(url: str) -> None:
    with SandboxEnv(str(WORLDS), trust_remote_code=True, world="World", kind="picture") as env:
        first, _ = env.reset(seed=1)
        kept = first.copy()
        pipes = held(env)
        assert pipes._memory[: 4] != bytes(4) and kept.tobytes() in pipes._memory[: 1 << 17]
        first[:] = 0  # the client's own
        second = env.step(1)[0]
        assert not (second == kept).all() and (first == 0).all()
        pipes.close()
        assert env.step(1)[0].shape == (210, 160, 3) and not env._player.link.ways  # over HTTP, without the memory


@pytest.mark.parametrize("length", [0, 1, 60, 1 << 17, (16 << 20) + 1, 1 << 62])
@pytest.mark.parametrize("reader", ["client", "rocklet"])
def test_lies_about_the_memory(url: str, reader: str, length: int) -> None:
    with SandboxEnv(str(WORLDS), trust_remote_code=True, world="Bad") as env:
        env.reset(seed=1)
        if reader == "rocklet":
            held(env).close()
            with pytest.raises(errors.RockError, match=r"malformed|makes no sense"):
                env.step(f"length {length}")
            return
        with pytest.raises(errors.RockError):
            env.step(f"memory {length}")
            env.step("fine")
    with SandboxEnv(str(WORLDS), trust_remote_code=True, world="Bad") as env:
        env.reset(seed=1)
        assert env.step("fine")[0].shape == (2,)


def test_the_memory_cannot_be_cut_off(url: str) -> None:
    with SandboxEnv(str(WORLDS), trust_remote_code=True, world="Bad") as env:
        env.reset(seed=1)
        with pytest.raises(errors.RockError, match="not permitted"):
            env.step("cut")
        assert env.step("fine")[0].shape == (2,)


def test_more_environments_than_pipes(url: str) -> None:
    """In a sandbox of one's own, that takes any number: those without pipes are played through the server."""
    with rock.make("game:GuessTheNumber-v0-easy", exclusive=True) as env:
        link = env.player.link
        made = {"env_id": "game:GuessTheNumber-v0-easy", "kwargs": {}}
        players = [env.player, *(EnvironmentHandle(link, link.make(made, 60)) for _ in range(PIPED + 2))]
        assert len(link.ways) == PIPED
        for player in players:
            player.reset(seed=5)
        found = link.ask_all([player.ask_step("\\boxed{3}") for player in players])
        assert len({player.was_stepped(one)[1] for player, one in zip(players, found, strict=True)}) == 1
        for player in players[1:]:
            link.close_env(player.number)
            link.close()


def test_a_vector_of_it(url: str) -> None:
    env = SandboxVectorEnv("CartPole-v1", 4)
    env.reset(seed=1)
    assert env.step(np.zeros(4, np.int64))[0].shape == (4, 4)
    assert env._player.link.ways
    env.close()


def test_what_is_played_is_not_idle_and_what_is_only_held_is(url: str) -> None:
    config = SandboxConfig(image="host", auto_clear_seconds=7)
    with SandboxEnv("CartPole-v1", config=config, base_url=url) as env:
        env.reset(seed=1)
        end = time.monotonic() + 14
        while time.monotonic() < end:
            if env.step(0)[2]:
                env.reset()
            time.sleep(0.05)
        assert env._player.link.ways
        end = time.monotonic() + 60
        with pytest.raises(errors.RockError):
            while time.monotonic() < end:
                time.sleep(15)
                env.step(0)


# ---- the door


def knock(server: RunningServer, data: bytes) -> dict[str, Any]:
    """What the door answers to a packet; empty when it closes."""
    folder = os.open(server.home / "run", os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(20)
            client.connect(f"/proc/self/fd/{folder}/environments.sock")
            client.send(data)
            told, fds, _, _ = socket.recv_fds(client, 65536, 2)
            assert not fds
            return json.loads(told) if told else {}
    finally:
        os.close(folder)


def test_the_door_is_its_owner_s(env_server: RunningServer) -> None:
    assert (env_server.home / "run" / "environments.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "packet",
    [b"", b"x", b"[]", b"{}", b'{"sandbox": 1}', b'{"sandbox": "no", "env": 1, "token": "x"}', b"\xff" * 4000,
     b'{"sandbox": "no", "env": true, "token": "x"}', b'{"sandbox": "../..", "env": 1, "token": ""}', b"[" * 4000],
)  # fmt: skip
def test_nonsense_at_the_door(env: SandboxEnv, env_server: RunningServer, packet: bytes) -> None:
    told = knock(env_server, packet)
    assert not told or told["error"]["code"] in ("invalid_config", "not_found", "not_here")
    env.reset()


@pytest.mark.parametrize("token", ["", "wrong", "ö" * 10])
def test_the_wrong_token(env: SandboxEnv, env_server: RunningServer, token: str) -> None:
    spec = {"sandbox": env.sandbox_id, "env": env._player.number, "token": token}
    assert knock(env_server, json.dumps(spec).encode())["error"]["code"] == "not_found"
    env.reset()


def test_a_holder_who_says_nonsense_loses_the_pipes(env: SandboxEnv) -> None:
    env.reset(seed=1)
    held(env)._door.send(b"garbage")
    time.sleep(1)
    with pytest.raises(errors.InvalidConfig, match="packet"):
        env.step(0)
    assert env.step(0)[1] == 1.0
    assert not env._player.link.ways
