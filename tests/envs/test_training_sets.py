"""Whole training sets, which install hundreds of megabytes and take minutes: `make training`.

Every task of a set is solved by its own solution, and rewards nothing for an agent that says nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import RunningServer

from rock import errors
from rock.training import TrainingSandbox

WANTED = "ROCK_TEST_TRAINING"
HERE = Path(__file__).parent
PYTHON, SITE = "/opt/rock/envs/current/python", "/opt/rock/envs/current/site"
LIBRARIES = "/opt/rock/python/lib"

pytestmark = [
    pytest.mark.skipif(not os.environ.get(WANTED), reason=f"installs large packages: `make training`, or {WANTED}=1"),
    pytest.mark.timeout(1800),
]


@pytest.mark.parametrize(("name", "more"), [
    ("bfcl", ()), ("humaneval", ()), ("webshop", ()), ("reasoning-gym", ()), ("textworld", ("--each", "10")),
])  # fmt: skip
def test_every_task(env_server: RunningServer, name: str, more: tuple[str, ...]) -> None:
    script = HERE.parent.parent / "bench" / "training.py"
    done = subprocess.run([sys.executable, script, name, *more], timeout=1700, capture_output=True, text=True,
                          env={**os.environ, "ROCK_BASE_URL": env_server.url})  # fmt: skip
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_reasoning_gym_has_all_its_data_sets(env_server: RunningServer) -> None:
    with TrainingSandbox(base_url=env_server.url, box_type="reasoning_gym") as box:
        tasks = box.get_env_profile("reasoning-gym")
        assert len(tasks) == 106
        seeded = [box.create_instance("reasoning-gym", "chain_sum-0", params={"seed": 5})["state"] for _ in range(2)]
        assert seeded[0] == seeded[1]
        with pytest.raises(errors.NotFound):
            box.create_instance("reasoning-gym", "no_such_set-0")
        with pytest.raises(errors.InvalidConfig, match="does not take this config"):
            box.create_instance("reasoning-gym", "chain_sum-0", params={"config": {"nonsense": 1}})


def test_appworld_says_how_to_get_its_data(env_server: RunningServer) -> None:
    with TrainingSandbox(base_url=env_server.url) as box:
        with pytest.raises(errors.Unsupported, match="appworld download data"):
            box.get_env_profile(env_type="appworld", split="train")


def test_appworld_with_a_small_folder_of_its_shape(env_server: RunningServer) -> None:
    with TrainingSandbox(base_url=env_server.url, box_type="appworld") as box:
        box.sandbox.fs.write("/tmp/make.py", (HERE / "small_appworld.py").read_bytes())
        made = box.sandbox.execute([PYTHON, "-s", "-P", "-B", "/tmp/make.py", "/tmp/rock-dataset"],
                                   env={"PYTHONPATH": SITE, "HOME": "/tmp", "LD_LIBRARY_PATH": LIBRARIES})  # fmt: skip
        assert made.exit_code == 0, made.stderr
        assert box.get_env_profile("appworld") == ["abc1234_1"] and box.get_env_profile("appworld", "dev") == []
        first, second = (box.create_instance("appworld", "abc1234_1") for _ in range(2))
        assert first["state"][1]["content"] == "What is six times seven?"
        right, wrong = (one["info"]["instance_id"] for one in (first, second))

        def run(instance: str, code: str) -> dict[str, object]:
            return box.step(instance, {"role": "assistant", "content": f"```python\n{code}\n```"})

        assert run(right, "x = 6 * 7; print(x)")["state"][0]["content"] == "Output:\n```\n42\n\n```"
        assert box.step(right, {"role": "assistant", "content": "Hm."})["info"]["failure"] == "bad_action"
        done = run(right, "apis.supervisor.complete_task(answer=x)")
        assert done["is_terminated"] and done["reward"] == 1.0
        assert box.evaluate(right, params={"sparse": True}) == 1.0
        assert run(wrong, "apis.supervisor.complete_task(answer=1)")["reward"] == 0.5
        assert box.evaluate(wrong, params={"sparse": True}) == 0.0
        with pytest.raises(errors.NotFound):
            box.create_instance("appworld", "../../etc")
