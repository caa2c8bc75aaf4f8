"""Live environments of a process for others: equal episodes, objects with other interfaces, errors, hostile clients."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.env_checker import check_env
from tests.waiting import until

from rock import errors
from rock.gym import EnvServer, RemoteEnv, RemoteVectorEnv


class Old:
    """The interface of gym before 0.26, of no base class. Its seed is set by a method."""

    observation_space = Box(0, 100, (1,), np.float64)
    action_space = Discrete(3)

    def seed(self, seed: int) -> None:
        self.at = float(seed)

    def reset(self) -> Any:
        return np.array([self.at])

    def step(self, action: int) -> Any:
        if action == 2:
            raise RuntimeError("an old error")
        self.at += action
        return np.array([self.at]), 0.5, self.at > 5, {"TimeLimit.truncated": self.at > 6}


class Duck:
    """The members of a vector, of no base class."""

    num_envs = 2
    single_observation_space = Box(0, 1, (1,), np.float32)
    single_action_space = Discrete(2)
    observation_space = Box(0, 1, (2, 1), np.float32)
    action_space = Discrete(2)
    render_mode = None

    def reset(self, seed: Any = None, options: Any = None) -> Any:
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions: Any) -> Any:
        return np.ones((2, 1), np.float32), np.array([1.0, 2.0]), np.array([True, False]), np.zeros(2, bool), {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def cart() -> Iterator[EnvServer]:
    with EnvServer(gymnasium.make("CartPole-v1")) as server:
        yield server


def connect(server: EnvServer) -> socket.socket:
    host, port = re.fullmatch(r"tcp://(.*):(\d+)/.*", server.address).groups()  # type: ignore[union-attr]
    return socket.create_connection((host, int(port)), timeout=10)


def test_the_same_episode(cart: EnvServer) -> None:
    local = gymnasium.make("CartPole-v1")
    with RemoteEnv(cart.address) as env:
        assert env.observation_space == local.observation_space and env.action_space == local.action_space
        assert np.array_equal(env.reset(seed=3)[0], local.reset(seed=3)[0])
        ended = False
        while not ended:
            found, wanted = env.step(1), local.step(1)
            assert np.array_equal(found[0], wanted[0]) and found[1:] == wanted[1:]
            ended = found[2]
        assert env.get_attr("gravity") == 9.8
        assert env.env_contract.id == "CartPole-v1" and "TOKEN" not in repr(env) and cart.address not in repr(env)


def test_frames() -> None:
    with EnvServer(gymnasium.make("FrozenLake-v1", render_mode="ansi")) as server, RemoteEnv(server.address) as env:
        env.reset(seed=1)
        frame = env.render()
        assert "FHFH" in frame and frame == env.render(env_index=0) and env.render_mode == "ansi"


@pytest.mark.filterwarnings("ignore")  # of the bounds of its spaces
def test_the_check_of_gymnasium(cart: EnvServer) -> None:
    with RemoteEnv(cart.address) as env:
        check_env(env, skip_render_check=True)


def test_the_next_client_has_the_same_object() -> None:
    local = gymnasium.make("CartPole-v1")
    with EnvServer(local) as server:
        with RemoteEnv(server.address) as env:
            first, _ = env.reset(seed=1)
            with pytest.raises(errors.Conflict, match="another client"):
                RemoteEnv(server.address)
        until(lambda: not server._busy.locked(), 10)
        with RemoteEnv(server.address) as env:
            env.set_attr("gravity", 1.0)
            assert local.unwrapped.gravity == 1.0 and np.allclose(local.unwrapped.state, first)


def test_the_older_interface() -> None:
    with EnvServer(Old()) as server, RemoteEnv(server.address) as env:
        observation, info = env.reset(seed=4)
        assert observation == [4.0] and info == {}
        assert env.step(1)[1:] == (0.5, False, False, {"TimeLimit.truncated": False})
        with pytest.raises(errors.EnvironmentRaised, match="an old error"):
            env.step(2)
        assert env.step(1)[2] is True and env.step(1)[2:4] == (False, True)


def test_vectors() -> None:
    envs = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="sync")
    with EnvServer(envs) as server:
        with pytest.raises(errors.InvalidConfig, match="a vector"):
            RemoteEnv(server.address)
        until(lambda: not server._busy.locked(), 10)
        remote = RemoteVectorEnv(server.address)
        assert remote.num_envs == 3 and remote.observation_space.shape == (3, 4)
        assert remote.reset(seed=1)[0].shape == (3, 4) and remote.step(np.array([0, 1, 0]))[1].tolist() == [1.0] * 3
        assert remote.get_attr("gravity") == (9.8,) * 3
        remote.close()
    duck = Duck()
    with EnvServer(duck) as server:
        remote = RemoteVectorEnv(server.address)
        assert remote.reset()[0].shape == (2, 1) and remote.step([0, 1])[2].tolist() == [True, False]
        remote.close()
    assert duck.closed


def test_what_is_no_environment() -> None:
    with pytest.raises(TypeError, match="action_space"):
        EnvServer(object())


def test_the_token(cart: EnvServer) -> None:
    wrong = cart.address[:-32] + "0" * 32
    with pytest.raises(errors.Unauthorized):
        RemoteEnv(wrong)
    for address in ("tcp://127.0.0.1:1/x", "http://127.0.0.1", cart.address + "0"):
        with pytest.raises(errors.InvalidConfig, match="address"):
            RemoteEnv(address)
    with RemoteEnv(cart.address):
        pass


@pytest.mark.parametrize("sent", [b"x" * 200, b"", struct.pack(">BI", 1, 0xFFFFFFFF), b"\0" * 64])
def test_hostile_bytes(cart: EnvServer, sent: bytes) -> None:
    with connect(cart) as link, contextlib.suppress(OSError):  # a reset is an end too
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        assert link.recv(100) == b""  # without the token nothing is answered
    with connect(cart) as link, contextlib.suppress(OSError):
        link.sendall(cart.address[-32:].encode())
        assert len(link.recv(5)) == 5
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        while link.recv(1 << 16):
            pass
    until(lambda: not cart._busy.locked(), 10)
    with RemoteEnv(cart.address) as env:
        env.reset(seed=1)


def test_the_end_of_the_server(cart: EnvServer) -> None:
    env = RemoteEnv(cart.address)
    env.reset()
    assert cart.wait(0) is False
    cart.shutdown()
    cart.shutdown()
    assert cart.wait(0) is True
    with pytest.raises(errors.Unavailable, match="gone"):
        env.step(0)
    env.close()
    with pytest.raises(errors.Conflict, match="closed"):
        env.step(0)
    with pytest.raises(errors.Conflict, match="shut down"):
        cart.start()
    with pytest.raises(errors.Unavailable):
        RemoteEnv(cart.address)
