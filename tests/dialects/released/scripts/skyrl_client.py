"""Environments of SkyRL-gym, made by its registry."""

from __future__ import annotations

import skyrl_gym
from checks import check, raises
from skyrl_gym.envs.base_text_env import BaseTextEnv

import rock.integrations.skyrl_gym as adapter
from rock.errors import InvalidConfig
from rock.sync import Sandbox

PROMPT = [{"role": "user", "content": "Write 42 to /tmp/answer."}]
CONFIG = {"image": "host", "reward": "grep -q 42 /tmp/answer", "sandbox": {"memory": "512m"}}
adapter.register()


def bash(text: str) -> str:
    return f"I run this.\n```bash\n{text}\n```\n"


def running() -> int:
    return len(Sandbox.list(states="running", labels=adapter.LABELS))


with check("a trajectory of commands, with the reward of a command"):
    env = skyrl_gym.make("rock_bash", env_config=CONFIG, extras={"rock": {"setup": "echo ready > /tmp/state"}})
    prompt, info = env.init(PROMPT)
    assert prompt == PROMPT and info["sandbox_id"] and running() == 1
    step = env.step(bash("cat /tmp/state; exit 3"))
    assert step["observations"] == [{"role": "user", "content": "ready\n\n[exit code 3]"}]
    assert (step["reward"], step["done"], step["metadata"]["exit_code"]) == (0.0, False, 3)
    env.step(bash("echo 42 > /tmp/answer"))
    step = env.step("It is done.")
    assert (step["observations"], step["reward"], step["done"]) == ([], 1.0, True)
    assert env.get_metrics() == {"turns": 3, "failed": 0.0}
    env.close()
    env.close()
    assert running() == 0
with check("the last turn is judged"):
    env = skyrl_gym.make("rock_bash", env_config={**CONFIG, "max_turns": 1})
    env.init(PROMPT)
    step = env.step(bash("true"))
    assert step["done"] and step["reward"] == 0.0
    env.close()
with check("a sandbox that ended is a failed rollout"):
    env = skyrl_gym.make("rock_bash", env_config=CONFIG)
    env.init(PROMPT)
    env._sandbox.stop()
    step = env.step(bash("true"))
    assert step["done"] and step["metadata"]["failed"] and env.get_metrics()["failed"] == 1.0
    env.close()
with check("a command that takes too long"):
    env = skyrl_gym.make("rock_bash", env_config={**CONFIG, "timeout": 1})
    env.init(PROMPT)
    step = env.step(bash("sleep 4321"))
    assert "killed" in step["observations"][0]["content"] and step["metadata"]["timed_out"]
    env.close()
with check("an environment of the server"):
    env = skyrl_gym.make("rock_env", env_config={"env_id": "game:GuessTheNumber-v0-easy"},
                         extras={"extra_info": {"rock": {"seed": 3, "max_turns": 20}}})  # fmt: skip
    assert isinstance(env, BaseTextEnv)
    prompt, _ = env.init([])
    low, high, done, steps = 1, 20, False, 0
    while not done and steps < 20:
        guess = (low + high) // 2
        step = env.step(f"\\boxed{{{guess}}}")
        done, steps = step["done"], steps + 1
        text = step["observations"][0]["content"] if step["observations"] else ""
        low, high = (guess + 1, high) if "higher" in text else (low, guess - 1) if "lower" in text else (low, high)
    assert done and step["reward"] > 0 and env.get_metrics() == {"turns": steps}, step
    env.close()
with check("options are rejected by name"):
    with raises(InvalidConfig, "no_such_option"):
        adapter.BashEnv({**CONFIG, "no_such_option": 1})
    with raises(InvalidConfig, "template"):
        adapter.BashEnv({**CONFIG, "sandbox": {"template": "x"}})
    with raises(InvalidConfig, "reward"):
        adapter.BashEnv({"image": "host"})
    with raises(InvalidConfig, "env_id"):
        adapter.ServerEnv({})
    assert running() == 0
