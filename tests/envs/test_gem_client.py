"""GEM's ways in, against GEM itself: vectors, wrappers, and `gem.make` with ids on a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer

np = pytest.importorskip("numpy", reason="install the development extra: pip install -e .[dev]")

# ruff: noqa: E402
import rock
from rock import errors
from rock.envs.vector import AutoresetMode, RockVectorEnv
from rock.sync import Client

pytestmark = pytest.mark.timeout(1200)
GUESS = "game:GuessTheNumber-v0-easy"

PLAY = """
import contextlib, json, os, sys
sys.path.insert(0, sys.argv[1])
with contextlib.redirect_stdout(sys.stderr):
    import gem
    from functools import partial
    from gem.wrappers.episode_tracking_wrapper import EpisodeTrackingWrapper
    from gem.wrappers.observation_wrapper import ObservationWrapper
    REMOTE = sys.argv[2] == "remote"
    if REMOTE:
        import rock
        rock.register_gem(["game:Sokoban-v0-easy", "rg:chain_sum", "game:GuessTheNumber-v0-easy"])
    results = []

    def episode(env, actions, seed=3):
        results.append(env.reset(seed=seed))
        for action in actions:
            results.append(env.step(action))
        return env

    episode(gem.make("game:Sokoban-v0-easy", max_turns=7), ["\\\\boxed{up}", "left", "\\\\boxed{left}"])
    episode(gem.make("rg:chain_sum"), ["\\\\boxed{1}"])
    plain = partial(ObservationWrapper, include_chat_template=False)
    for wrap in (EpisodeTrackingWrapper, plain, partial(plain, include_action=False, max_history_length=1)):
        env = wrap(gem.make("game:GuessTheNumber-v0-easy"))
        episode(env, ["\\\\boxed{5}", "\\\\boxed{6}"])
    vec = gem.make_vec(["game:GuessTheNumber-v0-easy"] * 3, seed=5)
    results.append(vec.reset(seed=[1, 3, 4]))  # none of these is over soon
    for actions in (["\\\\boxed{1}"] * 3, {2: "\\\\boxed{9}", 0: "\\\\boxed{4}"}):
        observations, *arrays, infos = vec.step(actions)
        results.append([observations, *(a.tolist() for a in arrays), infos])
    results.append(type(gem.make("rg:chain_sum")).__module__)
print(json.dumps(results))
"""


def played(folder: Path, how: str, url: str) -> Any:
    path = f"{Path(rock.__file__).parent.parent}"
    run = subprocess.run(
        [sys.executable, "-c", PLAY, str(folder / "site"), how], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "ROCK_BASE_URL": url, "PYTHONHASHSEED": "0", "MPLCONFIGDIR": "/tmp"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_code_for_gem_works_unchanged(env_server: RunningServer, gem_folder: Path) -> None:
    here, there = (played(gem_folder, how, env_server.url) for how in ("local", "remote"))
    assert there[:-1] == here[:-1]
    assert (here[-1], there[-1]) == ("gem.envs.reasoning_gym", "rock.envs.vector")


@pytest.fixture
def guess(env_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ROCK_BASE_URL", env_server.url)
    return GUESS


def test_same_step(guess: str) -> None:
    with rock.make_vec([guess] * 2, seed=4) as vec:
        assert isinstance(vec, RockVectorEnv) and vec.num_envs == 2
        first, _ = vec.reset(seed=1)
        observations, rewards, terminations, truncations, _ = vec.step({1: "no number"})
        assert rewards.tolist() == [-0.1] and terminations.tolist() == [True] and rewards.dtype == np.float64
        assert observations[0].startswith("You are playing")  # of the new episode
        assert not truncations.any()
        observations, *_ = vec.step(["\\boxed{3}", "\\boxed{3}"])
        assert len(observations) == 2 and observations[0] != first[0]
        for wrong in (["one"], {7: "x"}, "ab"):
            with pytest.raises(errors.InvalidConfig):
                vec.step(wrong)


def test_next_step(guess: str) -> None:
    with rock.make_vec([guess] * 2, autoreset_mode=AutoresetMode.NEXT_STEP) as vec:
        vec.reset(seed=[1, 2])
        ended, rewards, terminations, _, _ = vec.step(["no number", "\\boxed{3}"])
        assert terminations.tolist() == [True, False] and not ended[0].startswith("You are playing")
        observations, rewards, terminations, _, _ = vec.step(["left out", "\\boxed{4}"])
        assert observations[0].startswith("You are playing") and rewards[0] == 0.0 and not terminations[0]
    with pytest.raises(errors.InvalidConfig, match="autoreset mode"):
        rock.make_vec([guess], autoreset_mode="never")


def test_all_or_none_are_made(guess: str) -> None:
    with pytest.raises(errors.NotFound, match="game:Nothing"):
        rock.make_vec([guess, "game:Nothing"])


def test_what_else_an_environment_has(guess: str) -> None:
    with rock.make(guess) as env:
        env.reset(seed=1)
        assert "boxed" in env.sample_random_action()
        assert env.get_attr("turn_count") == 0
        with pytest.raises(errors.EnvironmentRaised, match="AttributeError"):
            env.get_state()
    with rock.make("rg:chain_sum") as env:
        question, _ = env.reset(seed=5)
        state = env.get_state()
        assert env.reset(seed=6)[0] != question
        env.set_state(state)
        assert env.get_state() == state


def test_ids_of_older_releases(guess: str) -> None:
    rows = {row["id"]: row for row in rock.list_envs()}
    assert len(rows) >= 172 and "game:Sokoban-v0" in rows["game:Sokoban-v0-easy"]["aliases"]
    with rock.make("game:GuessTheNumber-v0") as env:
        assert env.reset(seed=1)[0]


def test_spawn(guess: str) -> None:
    """As GEM's: another environment of the same arguments, with the same state where that is asked for."""
    with rock.make("rg:chain_sum") as env:
        env.reset(seed=5)
        with env.spawn(same_state=True) as child, env.spawn(seed=7) as other:
            assert (child.env_id, other.env_id) == (env.env_id, env.env_id) and child.env_number != env.env_number
            assert child.get_state() == env.get_state()
            assert child.step("\\boxed{1}")[:4] == env.step("\\boxed{1}")[:4]
            assert other.reset()[0]
    with pytest.raises(errors.Conflict, match="is closed"):
        env.spawn()


def test_open_environments_prevent_a_pause(guess: str, env_server: RunningServer) -> None:
    env = rock.make(guess)
    client = Client(env_server.url)
    hosts = [info.sandbox_id for info in client.list_sandboxes("running")]
    assert hosts
    refused = []
    for sandbox_id in hosts:
        try:
            client.pause_sandbox(sandbox_id)
            client.resume_sandbox(sandbox_id)
        except errors.Conflict as error:
            refused.append(str(error))
    assert any("open environments" in text for text in refused), refused
    env.reset()
    env.close()
