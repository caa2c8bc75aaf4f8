"""Games of several agents with PettingZoo: its own API tests, and the same episodes as games of this process."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from checks import check, raises
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test, seed_test

from rock.errors import Conflict, EnvironmentRaised, RockError
from rock.integrations.pettingzoo import SandboxAECEnv, SandboxParallelEnv

warnings.simplefilter("ignore")
ENV = Path(__file__).with_name("pettingzoo_games.py").read_text()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(np.array_equal(one, other))


def folder(text: str = ENV) -> str:
    place = Path(tempfile.mkdtemp())
    (place / "env.py").write_text(text)
    (place / "requirements.txt").write_text("pettingzoo\n")
    return str(place)


GAMES = folder()
TRUST = {"trust_remote_code": True}
local: dict[str, Any] = {}
exec(compile(ENV, "env.py", "exec"), local)

with check("parallel: the API test of PettingZoo"):
    env = SandboxParallelEnv(GAMES, **TRUST)
    parallel_api_test(env, num_cycles=60)
    env.close()
with check("parallel: the seed test of PettingZoo"):
    parallel_seed_test(lambda: SandboxParallelEnv(GAMES, **TRUST), num_cycles=10)
with check("parallel: the same episode as the game in this process"):
    env, game = SandboxParallelEnv(GAMES, **TRUST), local["make_env"]()
    assert env.possible_agents == game.possible_agents and env.metadata["name"] == "harvest_v0"
    assert all(env.observation_space(agent) == game.observation_space(agent) for agent in env.possible_agents)
    assert equal(env.reset(seed=4), game.reset(seed=4))
    draw = np.random.default_rng(1)
    ended = 0
    for _ in range(60):
        if not game.agents:
            ended += 1
            assert equal(env.reset(seed=ended), game.reset(seed=ended))
        actions = {agent: int(draw.integers(3)) for agent in game.agents}
        assert equal(env.step(actions), game.step(actions))
        assert env.agents == game.agents and equal(env.state(), game.state())
    assert ended > 1 and equal(env.state_space.sample().shape, game.state().shape)
    env.close()
    env.close()
with check("AEC: the API test of PettingZoo, with a game that is converted"):
    env = SandboxAECEnv(GAMES, **TRUST)
    api_test(env, num_cycles=40)
    env.close()
with check("AEC: the seed test of PettingZoo"):
    seed_test(lambda: SandboxAECEnv(GAMES, **TRUST), num_cycles=10)
with check("AEC: tictactoe of PettingZoo, by its module"):
    env = SandboxAECEnv("pettingzoo.classic.tictactoe_v3", packages=["pettingzoo", "pygame"], render_mode="rgb_array")
    api_test(env, num_cycles=20)
    env.reset(seed=1)
    moves = iter((0, 1, 3, 4, 6))  # the first player has the first column
    for agent in env.agent_iter():
        observation, reward, terminated, truncated, info = env.last()
        if terminated or truncated:
            assert reward == (1 if agent == "player_1" else -1)
            env.step(None)
        else:
            assert observation["action_mask"].shape == (9,) and agent == env.agent_selection
            env.step(next(moves))
    assert env.agents == [] and env.render().shape[2] == 3
    env.close()
with check("an illegal move and an error of the game"):
    env = SandboxParallelEnv(GAMES, **TRUST)
    env.reset(seed=1)
    with raises(EnvironmentRaised, "KeyError"):
        env.step({"reaper_9": 1})
    assert len(env.step(dict.fromkeys(env.agents, 0))) == 5
    assert env.get_attr("size") == 5 and env.call("score", "reaper_0") >= 0
    env.close()
    with raises(Conflict, "closed"):
        env.reset()
with check("arguments of the game"):
    env = SandboxParallelEnv(GAMES, size=7, **TRUST)
    assert env.get_attr("size") == 7
    env.close()
with check("a module without that interface, and a make_env of something else"):
    with raises(RockError, "parallel"):
        SandboxParallelEnv("pettingzoo.classic.tictactoe_v3", packages=["pettingzoo", "pygame"])
    with raises(RockError, "possible_agents"):
        SandboxParallelEnv(folder("def make_env():\n    return 1\n"), **TRUST)
