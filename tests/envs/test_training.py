"""Training sets of other packages, by entry point: what goes wrong is typed, limits hold, and AgentScope's routes."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.leaks import Inventory

from rock import errors
from rock.training import AsyncTrainingSandbox, TrainingSandbox, failure_of

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "adding-a-dataset.md"
FILE = re.compile(r"^```\w+ file (\S+)\n(.*?)^```$", re.M | re.S)
RUN = re.compile(r"^```text run\n(.*?)^```$", re.M | re.S)
ODD = '\nODD = Dataset("odd", "rock_lights.odd:Odd", packages=())\nBAD = 1\n'


def say(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def server_with_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server beside which a distribution with two sets is installed: that of the docs, and an odd one."""
    site = tmp_path_factory.mktemp("site")
    files = dict(FILE.findall(PAGE.read_text()))
    for name in ("rock_lights/adapter.py", "rock_lights/__init__.py"):
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(files[name])
    with open(site / "rock_lights/__init__.py", "a") as file:
        file.write(ODD)
    (site / "rock_lights/odd.py").write_text((HERE / "odd_set.py").read_text())
    info = site / "rock_lights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rock-lights\nVersion: 1.0\n")
    told = files["pyproject.toml"].partition("\n")[2].replace('"', "")
    (info / "entry_points.txt").write_text(f"[rock.datasets]\n{told}odd = rock_lights:ODD\nbfcl = rock_lights:BAD\n"
                                          "bad = rock_lights:BAD\nworse = rock_lights:MISSING\n")
    running = RunningServer(tmp_path_factory.mktemp("home"), PYTHONPATH=":".join([str(site), *sys.path]))
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


@pytest.fixture(scope="module")
def box(server_with_sets: RunningServer) -> Iterator[TrainingSandbox]:
    with TrainingSandbox(base_url=server_with_sets.url, box_type="odd") as made:
        yield made


def instance_of(box: TrainingSandbox, **more: Any) -> str:
    return str(box.create_instance("odd", "one", **more)["info"]["instance_id"])


def test_the_page_about_adding_one(server_with_sets: RunningServer) -> None:
    code = RUN.findall(PAGE.read_text())
    assert len(code) == 1
    done = subprocess.run([sys.executable, "-W", "error", "-c", code[0]], capture_output=True, text=True, timeout=100,
                          env={"ROCK_BASE_URL": server_with_sets.url, "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_unknown_set_is_told_with_what_there_is(server_with_sets: RunningServer) -> None:
    with pytest.raises(errors.NotFound, match="there is no training set 'lihgts'") as caught:
        TrainingSandbox(base_url=server_with_sets.url, box_type="lihgts").start()
    assert "lights" in str(caught.value)
    for name, why in (("bad", "is no Dataset of that name"), ("worse", "cannot be loaded")):
        with pytest.raises(errors.InvalidConfig, match=why):
            TrainingSandbox(base_url=server_with_sets.url, box_type=name).start()


def test_a_fault_of_the_task_is_typed_and_it_goes_on(box: TrainingSandbox) -> None:
    instance = instance_of(box)
    with pytest.raises(errors.EnvironmentRaised, match="RuntimeError: ouch") as caught:
        box.step(instance, say("raise ouch"))
    assert "RuntimeError: ouch" in caught.value.traceback and failure_of(caught.value) == "environment"
    assert box.step(instance, say("hello"))["reward"] == 0.25
    with pytest.raises(errors.EnvironmentRaised, match="made of glass"):
        box.create_instance("odd", "broken")


def test_an_instance_that_dies_takes_nobody_along(box: TrainingSandbox) -> None:
    dying, other = instance_of(box), instance_of(box)
    with pytest.raises(errors.EnvironmentEnded, match="status 3") as caught:
        box.step(dying, say("exit 3"))
    assert failure_of(caught.value) == "environment"
    with pytest.raises(errors.EnvironmentEnded):
        box.step(dying, say("hello"))
    assert box.step(other, say("hello"))["reward"] == 0.25
    assert box.release_instance(dying) is True


def test_forks_of_an_instance(box: TrainingSandbox) -> None:
    """16 instances and the one that they are copies of play the same 20 steps."""
    instance = instance_of(box)
    before = box.step(instance, say("draw"))
    copies = box.fork_instance(instance, 16)
    assert len({instance, *copies}) == 17
    played = [[box.step(each, say("draw")) for _ in range(20)] for each in (instance, *copies)]
    assert all(results == played[0] for results in played)
    assert len({result["reward"] for result in (before, *played[0])}) == 21
    with pytest.raises(errors.EnvironmentEnded, match="status 3"):
        box.step(copies[0], say("exit 3"))
    assert box.evaluate(copies[1], []) == box.evaluate(instance, [])
    (other,) = box.fork_instance(copies[1], 1, reseed=True)
    assert box.step(other, say("draw"))["reward"] != box.step(copies[1], say("draw"))["reward"]
    assert all(box.release_instance(each) for each in (*copies, other))
    assert box.step(instance, say("hello"))["reward"] == 0.25
    box.step(instance, say("thread"))
    with pytest.raises(errors.Unsupported, match="2 threads") as caught:
        box.fork_instance(instance, 2)
    assert failure_of(caught.value) == "request"
    with pytest.raises(errors.NotFound):
        box.fork_instance(copies[0])
    with pytest.raises(errors.InvalidConfig):
        box.fork_instance(instance, 101)


def test_an_agent_cannot_have_its_episode_replayed() -> None:
    """What ends a sandbox from inside is no failure of the infrastructure; what takes its machine away is."""
    for error in (errors.Exited("its pid 1 ended"), errors.OutOfMemory("it ran out of its 64m of memory")):
        assert failure_of(error) == failure_of(errors.from_wire(error.to_wire())) == "environment"
    assert failure_of(errors.Lost("its worker was lost")) == "infrastructure"


def test_requests_that_are_wrong(box: TrainingSandbox) -> None:
    with pytest.raises(errors.NotFound, match="no task three") as missing:
        box.create_instance("odd", "three")
    assert failure_of(missing.value) == "request"
    with pytest.raises(errors.InvalidConfig, match="bad is not taken"):
        box.create_instance("odd", "one", "half-made", {"bad": True})
    assert box.create_instance("odd", "one", "half-made")["info"]["instance_id"] == "half-made"  # nothing was left
    with pytest.raises(errors.InvalidConfig, match="no solution"):
        box.get_solution("half-made")
    assert box.get_tools_info("half-made") is None
    assert box.step("half-made")["info"]["failure"] == "bad_action"
    assert box.evaluate("half-made", [say("x")], {"a": 1}) == {"messages": [say("x")], "params": {"a": 1}}
    assert box.step("half-made", say("x"), {"tail": "y "})["state"][0]["content"].startswith("x y ")
    assert box.get_env_profile("odd", params={"more": ["last"]}) == ["one", "two", "last"]


def test_each_instance_is_a_process(box: TrainingSandbox) -> None:
    seen = {box.step(instance_of(box), say("pid"))["state"][0]["content"] for _ in range(20)}  # more than have pipes
    assert len(seen) == 20


def test_a_step_that_takes_too_long_is_truncated(server_with_sets: RunningServer) -> None:
    with TrainingSandbox(base_url=server_with_sets.url, box_type="odd", step_timeout=2.0) as box:
        slow, other = instance_of(box), instance_of(box)
        done = box.step(slow, say("sleep 600"))
        assert done["is_terminated"] and done["info"]["truncated"] and done["info"]["stop_reason"] == "step_timeout"
        assert done["info"]["failure"] == "timeout" and "took longer than 2 s" in done["info"]["error"]
        assert box.step(other, say("hello"))["reward"] == 0.25
        with pytest.raises(errors.CommandTimeout):
            box.evaluate(slow)


def test_an_episode_that_takes_too_long_is_truncated_and_can_still_be_judged(server_with_sets: RunningServer) -> None:
    with TrainingSandbox(base_url=server_with_sets.url, box_type="odd", episode_timeout=3.0) as box:
        instance = instance_of(box)
        box.step(instance, say("sleep 3.1"))
        done = box.step(instance, say("hello"))
        assert done["is_terminated"] and done["info"]["stop_reason"] == "episode_timeout"
        assert done["info"]["truncated"] is True and done["reward"] == 0.0
        assert box.evaluate(instance)["messages"] is None
        with pytest.raises(errors.InvalidConfig, match="the episode is over: episode_timeout"):
            box.step(instance, say("hello"))


def test_what_nobody_uses_is_released(server_with_sets: RunningServer) -> None:
    with TrainingSandbox(base_url=server_with_sets.url, box_type="odd", idle_timeout=2.0) as box:
        idle = instance_of(box)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(2.5)
            try:
                box.evaluate(idle)
            except errors.NotFound as error:
                assert "released after 2 s without use" in str(error)
                break
        else:
            raise AssertionError("it was never released")
        busy = instance_of(box)
        assert box.step(busy, say("sleep 4"))["reward"] == 0.25  # a step under way is use
        assert box.release_instance(idle) is False


def test_instances_outlive_the_server(server_with_sets: RunningServer) -> None:
    box = TrainingSandbox(base_url=server_with_sets.url, box_type="odd", idle_timeout=8.0)
    try:
        instance = instance_of(box, instance_id="kept")
        port = int(server_with_sets.url.rpartition(":")[2])
        server_with_sets.kill()
        server_with_sets.start(port)
        assert box.step(instance, say("hello"))["reward"] == 0.25
        with pytest.raises(errors.Conflict):
            box.create_instance("odd", "one", "kept")
        time.sleep(10)
        with pytest.raises(errors.NotFound):
            box.step(instance, say("hello"))
    finally:
        box.close()


def test_another_client_finds_the_instance(server_with_sets: RunningServer, box: TrainingSandbox) -> None:
    instance = instance_of(box)
    with TrainingSandbox(box.sandbox_id, server_with_sets.url) as other:
        assert other.step(instance, say("hello"))["reward"] == 0.25
        with pytest.raises(errors.InvalidConfig, match="no training set 'lights'"):
            other.create_instance("lights", "lights-0")
    assert box.step(instance, say("hello"))["reward"] == 0.25  # it was not stopped


def test_without_a_context_and_by_await(server_with_sets: RunningServer) -> None:
    box = TrainingSandbox(base_url=server_with_sets.url)
    assert box.sandbox_id is None
    assert box.get_env_profile(env_type="odd", split="train") == ["one", "two"]
    box.close()

    async def work() -> None:
        async with AsyncTrainingSandbox(base_url=server_with_sets.url, box_type="odd") as there:
            made = await asyncio.gather(*(there.create_instance("odd", "one") for _ in range(8)))
            ids = [one["info"]["instance_id"] for one in made]
            done = await asyncio.gather(*(there.step(id, say("end")) for id in ids))
            assert {one["reward"] for one in done} == {0.5} and all(one["is_terminated"] for one in done)
            assert await there.release_instance(ids[0]) is True

    asyncio.run(work())


# ---- AgentScope's routes


def ask(url: str, path: str, **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode() if path != "healthz" else None,
                                     {"content-type": "application/json"})  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=100) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_agentscope_routes(server_with_sets: RunningServer, box: TrainingSandbox) -> None:
    url = f"{server_with_sets.url}/apis/training/{box.sandbox_id}"
    assert ask(url, "healthz") == (200, "OK")
    assert ask(url, "get_env_profile", env_type="odd", params={"split": "train"}) == (
        200, {"success": True, "data": ["one", "two"]})  # fmt: skip
    status, made = ask(url, "create", env_type="odd", task_id="one", params={})
    assert status == 200 and made["success"] and made["data"]["state"][0]["role"] == "user"
    instance = made["data"]["info"]["instance_id"]
    assert made["data"]["info"]["task_id"] == "one"
    status, done = ask(url, "step", instance_id=instance, messages=say("hi"), params={"tail": "x"})
    assert status == 200 and set(done["data"]) == {"state", "reward", "is_terminated", "info"}
    assert ask(url, "evaluate", instance_id=instance, messages={}, params={"sparse": True}) == (
        200, {"success": True, "data": {"messages": None, "params": {"sparse": True}}})  # fmt: skip
    assert ask(url, "get_info", instance_id=instance) == (200, {"success": True, "data": None})
    assert ask(url, "release", instance_id=instance) == (200, {"success": True, "data": None})
    assert ask(url, "release", instance_id=instance) == (200, {"success": False, "data": None})


def test_agentscope_errors(server_with_sets: RunningServer, box: TrainingSandbox) -> None:
    base = f"{server_with_sets.url}/apis/training"
    url = f"{base}/{box.sandbox_id}"
    assert ask(url, "step", instance_id="X", messages=say("hi")) == (400, {"detail": "Instance X not found!"})
    assert ask(url, "step", messages=say("hi"))[0] == 400
    assert ask(url, "step", instance_id="../x", messages=say("hi"))[0] == 400
    assert ask(url, "create", task_id="three") == (400, {"detail": "no task three"})
    assert ask(url, "create", env_type="odd")[0] == 400
    assert ask(url, "create", env_type="lights", task_id="one")[0] == 400
    assert ask(url, "create", env_type="appworld9", task_id="one")[0] == 400
    assert ask(url, "create", task_id="one", instance_id="same")[0] == 200
    assert ask(url, "create", task_id="one", instance_id="same")[0] == 400
    status, told = ask(url, "step", instance_id="same", messages=say("raise ouch"))
    assert status == 500 and "RuntimeError: ouch" in told["detail"] and "Traceback" not in told["detail"]
    assert ask(url, "step", instance_id="same", messages=say("exit 1"))[0] == 500
    status, told = ask(url, "create", task_id={"not": "text"})
    assert status == 422 and told["detail"][0]["loc"] == ["body", "task_id"]
    assert ask(f"{base}/0123456789abcdef", "healthz")[0] == 404
    assert ask(f"{base}/nonsense", "create", task_id="one")[0] == 404
    request = urllib.request.Request(f"{url}/create", b"{", method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value as error:
        assert error.code == 422


def test_agentscope_by_the_name_of_a_set(server_with_sets: RunningServer) -> None:
    url = f"{server_with_sets.url}/apis/training/lights"
    assert ask(url, "healthz") == (200, "OK")
    status, made = ask(url, "create", task_id="lights-5")
    assert status == 200
    assert ask(url, "step", instance_id=made["data"]["info"]["instance_id"], messages=say("9"))[1]["data"]["info"][
        "failure"] == "bad_action"  # fmt: skip
