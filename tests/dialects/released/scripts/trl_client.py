"""Classes for `environment_factory` of TRL."""

from __future__ import annotations

import gc
import inspect
from functools import partial
from typing import Any

from checks import check, raises
from transformers.utils import get_json_schema

from rock.errors import CommandFailed, InvalidConfig
from rock.integrations.trl import LABELS, CodingEnvironment, GameEnvironment, ToolEnvironment
from rock.sync import Sandbox


def running() -> int:
    return len(Sandbox.list(states="running", labels=LABELS))


def tools(kind: type) -> list[str]:
    """The tools that TRL finds in a class."""
    names = [name for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction)]
    return [name for name in names if name not in ("reset", "get_reward") and not name.startswith("_")]


with check("the tools have schemas"):
    assert tools(ToolEnvironment) == tools(CodingEnvironment) == ["read_file", "run", "write_file"]
    assert tools(GameEnvironment) == ["act"] and not hasattr(ToolEnvironment, "get_reward")
    for kind in (CodingEnvironment, GameEnvironment):
        for name in tools(kind):
            schema = get_json_schema(getattr(kind, name))["function"]
            assert schema["description"] and schema["parameters"]["required"], schema
env: Any = partial(CodingEnvironment, "host", reward="grep -q 42 /tmp/answer", memory="512m", timeout=5)()
with check("a rollout: tools, and the reward of a command"):
    row = {"files": {"/work/f.py": "print(6 * 7)", "/x": None}, "prompt": [{"role": "user", "content": "x"}]}
    assert env.reset(setup="mkdir -p /work && echo ready > /work/state", **row) is None
    assert env.run("cat /work/state; exit 3") == "ready\n\n[exit code 3]"
    assert env.read_file("/work/f.py") == "print(6 * 7)" and "no/such" in env.read_file("/no/such")
    assert env.write_file("/work/g.py", "print(43)") == "[wrote /work/g.py]" and "[" in env.write_file("relative", "")
    assert "killed" in env.run("sleep 4321")
    assert env.run("python3 /work/f.py > /tmp/answer") == "" and env.get_reward() == 1.0 and running() == 0
with check("the next rollout has a new sandbox"):
    env.reset()
    assert "No such file" in env.run("cat /work/state") and env.get_reward() == 0.0
with check("the reward command and its files of a row"):
    env.reset(reward="sh /tests/check.sh", reward_files={"/tests/check.sh": "test -e /tmp/done"})
    assert "No such file" in env.run("ls /tests")
    env.run("touch /tmp/done")
    assert env.get_reward() == 1.0
with check("a sandbox that ended has no reward"):
    env.reset()
    env._sandbox.stop()
    assert env.get_reward() is None
with check("a setup that fails raises"), raises(CommandFailed, "exit code 7"):
    env.reset(setup="exit 7")
with check("the end of the object stops its sandbox"):
    env.reset()
    assert running() == 1
    del env
    gc.collect()  # an exception refers to it
    assert running() == 0
with check("an environment of the server"):
    game = GameEnvironment("game:GuessTheNumber-v0-easy")
    first = game.reset(seed=3, prompt=[])
    assert first == GameEnvironment("game:GuessTheNumber-v0-easy").reset(seed=3)
    for guess in range(1, 21):
        if "ended" in game.act(f"\\boxed{{{guess}}}"):
            break
    assert "ended" in game.act("\\boxed{1}") and isinstance(game.get_reward(), float)
with check("an unknown option is rejected by its name"), raises(InvalidConfig, "template"):
    CodingEnvironment("host", template="x")
with check("the constructor of GRPOTrainer takes the class"):
    from trl import GRPOTrainer

    assert "environment_factory" in inspect.signature(GRPOTrainer.__init__).parameters
