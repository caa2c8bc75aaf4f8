"""Tasks in Harbor's format: the oracle gets the reward, an agent that does nothing gets none, and faults are typed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer

from rock import errors
from rock.images.store import ImageStore
from rock.training import HarborTask, HarborTasks

FOLDER = Path(__file__).parent / "harbor"


def bash(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": f"```bash\n{text}\n```"}


DONE = {"role": "assistant", "content": "It is done."}


def task_with(tmp_path: Path, test: str, **files: str) -> Path:
    """The task of the tests with other tests, and other files."""
    folder = tmp_path / "changed"
    shutil.copytree(FOLDER / "greet", folder)
    (folder / "tests/test.sh").write_text(test)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_oracle_and_null(server: RunningServer) -> None:
    with HarborTasks(FOLDER, base_url=server.url) as tasks:
        assert tasks.get_env_profile() == ["greet"]
        made = tasks.create_instance("harbor", "greet", "solved")
        assert "greeting.txt" in made["state"][1]["content"] and made["info"]["instance_id"] == "solved"
        tasks.solve("solved")
        assert tasks.evaluate("solved") == 1.0 == tasks.evaluate("solved")
        tasks.create_instance("harbor", "greet", "nothing")
        done = tasks.step("nothing", DONE)
        assert done == {"state": [], "reward": 0.0, "is_terminated": True, "info": {"stop_reason": "completed"}}
        assert tasks.release_instance("nothing") is True and tasks.release_instance("nothing") is False


def test_an_agent_works_in_it(server: RunningServer) -> None:
    with HarborTasks(FOLDER / "greet", base_url=server.url) as tasks:
        tasks.create_instance("harbor", "greet", "a")
        assert tasks.step("a", {"content": 5})["info"]["failure"] == "bad_action"
        seen = tasks.step("a", bash("mkdir /tmp/app && cd /tmp/app && ls /tests /solution"))
        assert seen["info"]["exit_code"] != 0 and "No such file" in seen["state"][0]["content"]  # it cannot see them
        seen = tasks.step("a", bash('echo "$GREETING, world" > greeting.txt; pwd'))
        assert "/tmp/app" in seen["state"][0]["content"] and seen["info"]["exit_code"] == 0
        assert tasks.step("a", DONE)["reward"] == 1.0
        with pytest.raises(errors.InvalidConfig, match="the episode has ended"):
            tasks.step("a", bash("true"))


def test_a_reward_that_was_there_before_does_not_count(server: RunningServer, tmp_path: Path) -> None:
    folder = task_with(tmp_path, "exit 3\n")
    with HarborTasks(folder, base_url=server.url) as tasks:
        tasks.create_instance("harbor", "changed", "a")
        plant = "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; mkdir /tests; ln -s / /tests/x"
        tasks.step("a", bash(plant))
        with pytest.raises(errors.EnvironmentRaised, match="they wrote no reward"):
            tasks.step("a", DONE)


@pytest.mark.parametrize("reward", ["nan", "1e999", "many words", "", "\\xff", "[1]"])
def test_what_is_no_reward(server: RunningServer, tmp_path: Path, reward: str) -> None:
    folder = task_with(tmp_path, f"printf '{reward}' > /logs/verifier/reward.txt; echo oops >&2\n")
    with HarborTasks(folder, base_url=server.url) as tasks:
        tasks.create_instance("harbor", "changed", "a")
        with pytest.raises(errors.EnvironmentRaised, match=r"reward\.txt is no reward") as caught:
            tasks.evaluate("a")
        assert "oops" in caught.value.traceback


@pytest.mark.parametrize("make", ["ln -s /dev/zero reward.txt", "mkfifo reward.txt", "mkdir reward.txt",
                                  "ln -s reward.txt reward.txt", "printf '%0100000d' 1 > reward.txt"])
def test_odd_files_in_place_of_a_reward(server: RunningServer, tmp_path: Path, make: str) -> None:
    with HarborTasks(task_with(tmp_path, f"cd /logs/verifier && {make}\n"), base_url=server.url) as tasks:
        tasks.create_instance("harbor", "changed", "a")
        try:
            assert tasks.evaluate("a") in (0.0, 1.0)  # a number with many zeros before it is one
        except errors.EnvironmentRaised as error:
            assert "gave no reward" in str(error)


def test_several_rewards(server: RunningServer, tmp_path: Path) -> None:
    folder = task_with(tmp_path, """echo '{"speed": 0.5, "style": 1}' > /logs/verifier/reward.json\n""")
    with HarborTasks(folder, base_url=server.url) as tasks:
        tasks.create_instance("harbor", "changed", "a")
        assert tasks.evaluate("a") == 0.75 and tasks.rewards("a") == {"speed": 0.5, "style": 1.0}


def test_times(server: RunningServer, tmp_path: Path) -> None:
    toml = "[agent]\ntimeout_sec = 2\n[verifier]\ntimeout_sec = 2\n[environment]\ndocker_image = 'python:3.11'\n"
    with HarborTasks(task_with(tmp_path, "sleep 600\n", task_toml=toml), base_url=server.url) as tasks:
        tasks.create_instance("harbor", "changed", "a")
        assert tasks.step("a", bash("sleep 600"))["info"] == {"timed_out": True}
        with pytest.raises(errors.CommandTimeout, match="longer than 2 s"):
            tasks.evaluate("a")


def test_the_image_is_built_of_its_dockerfile(server: RunningServer, tmp_path: Path) -> None:
    """Once, and again where it changed; a RUN that fails is told with its line."""
    folder = task_with(tmp_path, "cat /made > /logs/verifier/reward.txt\n", task_toml="version = '1.0'\n")
    made = "FROM python:3.11\nCOPY given /given\nRUN cat /given > /made\n"
    (folder / "environment/Dockerfile").write_text(made)
    (folder / "environment/given").write_text("0.25")
    with HarborTasks(folder, base_url=server.url) as tasks:
        for name in ("a", "b"):
            tasks.create_instance("harbor", "changed", name)
            assert tasks.step(name, DONE)["reward"] == 0.25
        image = tasks.tasks["changed"].built_image
    (folder / "environment/given").write_text("0.75")
    with HarborTasks(folder, base_url=server.url) as tasks:
        tasks.create_instance("harbor", "changed", "a")
        assert tasks.evaluate("a") == 0.75
    (folder / "environment/Dockerfile").write_text(made + "RUN exit 3\n")
    with HarborTasks(folder, base_url=server.url) as tasks:
        with pytest.raises(errors.CommandFailed, match="Dockerfile line 4: RUN ended with status 3"):
            tasks.create_instance("harbor", "changed")
    store = ImageStore(server.home / "images")
    store.remove(image)
    store.prune(steps=True)


def test_what_cannot_be_run_is_refused_before_the_start(server: RunningServer, tmp_path: Path) -> None:
    folder = task_with(tmp_path, "exit 0\n", task_toml="version = '1.0'\n")
    (folder / "environment/Dockerfile").unlink()
    with HarborTasks(folder, base_url=server.url) as tasks:
        with pytest.raises(errors.InvalidConfig, match="has no image"):
            tasks.create_instance("harbor", "changed")
        with pytest.raises(errors.NotFound, match="no task 'other'"):
            tasks.create_instance("harbor", "other")
    with HarborTasks(folder, image="python:3.11", base_url=server.url) as tasks:
        assert tasks.create_instance("harbor", "changed")["info"]["sandbox_id"]
    with pytest.raises(errors.InvalidConfig, match="there is no task"):
        HarborTasks(tmp_path / "nowhere")
    for toml in ("no toml", "environment = 1", "[environment]\ncpus = 'many'", "[environment]\nenv = 3"):
        (folder / "task.toml").write_text(toml)
        with pytest.raises(errors.InvalidConfig):
            HarborTask.load(folder)
