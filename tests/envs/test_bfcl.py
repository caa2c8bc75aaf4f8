"""BFCL's multi-turn tasks through a server: their answers are worth 1, nothing is worth 0, and no text is evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.conftest import RunningServer

from rock.errors import Conflict, ImageError, InvalidConfig, NotFound
from rock.training import TrainingSandbox

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
NOTHING = {"role": "assistant", "content": ""}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def box(env_server: RunningServer) -> Iterator[TrainingSandbox]:
    try:
        with TrainingSandbox(base_url=env_server.url, box_type="bfcl") as made:
            yield made
    except ImageError as error:
        pytest.skip(f"bfcl-eval cannot be installed: {error}")


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    text = json.dumps({"name": name, "arguments": arguments})
    return {"role": "assistant", "content": f"<tool_call>\n{text}\n</tool_call>"}


def play(box: TrainingSandbox, task: str, *, known: bool) -> float:
    instance = box.create_instance("bfcl", task)["info"]["instance_id"]
    for message in box.get_solution(instance) if known else [NOTHING] * 20:
        done = box.step(instance, message)
        if done["is_terminated"]:
            assert box.evaluate(instance, params={"sparse": True}) == done["reward"]
            assert box.release_instance(instance)
            return float(done["reward"])
    raise AssertionError("it did not end")


@pytest.mark.parametrize("category", CATEGORIES)
def test_answers_are_worth_one_and_nothing_is_worth_nothing(box: TrainingSandbox, category: str) -> None:
    tasks = box.get_env_profile("bfcl", split=f"multi_turn_{category}")
    assert len(tasks) == 200
    assert {play(box, task, known=True) for task in tasks[::10]} == {1.0}
    assert {play(box, task, known=False) for task in tasks[::10]} == {0.0}


def test_all_of_them(box: TrainingSandbox) -> None:
    tasks = box.get_task_ids("bfcl", "train")
    assert len(set(tasks)) == 800 and tasks == box.get_env_profile("BFCL")


def test_two_instances_of_one_task_do_not_meet(box: TrainingSandbox) -> None:
    """The package keeps its state in globals by the id of the task."""
    first = box.create_instance("bfcl", "multi_turn_base_0")["info"]["instance_id"]
    second = box.create_instance("bfcl", "multi_turn_base_0")["info"]["instance_id"]
    assert "document" in box.step(first, call("ls"))["state"][0]["content"]
    box.step(first, call("mkdir", dir_name="mine"))
    assert "mine" in box.step(first, call("ls"))["state"][0]["content"]
    assert "mine" not in box.step(second, call("ls"))["state"][0]["content"]


def test_many_at_once(box: TrainingSandbox) -> None:
    tasks = box.get_env_profile("bfcl", split="multi_turn_base")[:24]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda task: play(box, task, known=True), tasks)) == {1.0}


def test_the_score_can_be_asked_for_again_and_again(box: TrainingSandbox) -> None:
    instance = box.create_instance("bfcl", "multi_turn_base_1", "mine")["info"]["instance_id"]
    assert instance == "mine"
    solution = box.get_solution("mine")
    for message in solution[:-1]:
        box.step("mine", message)
    first = box.evaluate("mine")
    assert first == box.evaluate("mine")
    assert first["valid"] is True and first["completed"] is False and first["test_category"] == "multi_turn_base"
    assert box.step("mine", solution[-1])["reward"] == 1.0
    assert box.evaluate("mine")["completed"] is True
    with pytest.raises(InvalidConfig, match="the episode is over: completed"):
        box.step("mine", NOTHING)
    assert box.release_instance("mine") is True
    assert box.release_instance("mine") is False
    with pytest.raises(NotFound, match="Instance mine not found!"):
        box.step("mine", NOTHING)


def test_functions_come_when_the_task_says_so(box: TrainingSandbox) -> None:
    made = box.create_instance("bfcl", "multi_turn_miss_func_0")
    instance = made["info"]["instance_id"]
    assert made["state"][0]["role"] == "system"
    assert '"name": "sort"' not in made["state"][0]["content"] and '"name": "grep"' in made["state"][0]["content"]
    assert '"name": "sort"' not in box.get_tools_info(instance)
    for _ in range(3):
        done = box.step(instance, NOTHING)
    assert '"name": "sort"' in done["state"][-1]["content"]
    assert '"name": "sort"' in box.list_tools(instance)


HOSTILE = [
    call("__import__", name="os"),
    call("ls); __import__('os').system('touch /tmp/out'); (", a=True),
    call("ls", **{"a=__import__('os').system('touch /tmp/out'), b": 1}),
    call("ls", **{"class": 1}),
    {"role": "assistant", "content": "<tool_call>\n{not json\n</tool_call>"},
    {"role": "assistant", "content": "<tool_call>" + "[" * 100_000},
    {"role": "assistant", "content": '<tool_call>{"name": "echo", "arguments": {"content": NaN}}</tool_call>'},
    {"role": "assistant", "content": '<tool_call>{"name": "echo", "arguments": [1]}</tool_call>'},
    {"role": "assistant", "content": ["no", "text"]},
    {"role": "assistant", "content": None, "tool_calls": "ls"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "ls", "arguments": "{"}}]},
]


@pytest.mark.parametrize("message", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_call_is_told_to_the_agent(box: TrainingSandbox, message: dict[str, Any]) -> None:
    instance = box.create_instance("bfcl", "multi_turn_base_0")["info"]["instance_id"]
    done = box.step(instance, message)
    assert done["info"]["failure"] == "bad_action" and done["state"][0]["content"] == done["info"]["error"]
    assert done["is_terminated"] is False
    assert not box.sandbox.fs.exists("/tmp/out")
    assert "failure" not in box.step(instance, call("ls", a=True))["info"]
    box.release_instance(instance)


def test_text_in_an_argument_stays_text(box: TrainingSandbox) -> None:
    instance = box.create_instance("bfcl", "multi_turn_base_0")["info"]["instance_id"]
    done = box.step(instance, call("echo", content="') + __import__('os').popen('id').read() + ('"))
    assert "uid=" not in done["state"][0]["content"] and "__import__" in done["state"][0]["content"]


def test_calls_as_a_list(box: TrainingSandbox) -> None:
    instance = box.create_instance("bfcl", "multi_turn_base_0")["info"]["instance_id"]
    calls = [{"id": "1", "type": "function", "function": {"name": "pwd", "arguments": "{}"}},
             {"index": 1, "name": "cd", "arguments": {"folder": "document"}}]  # fmt: skip
    done = box.step(instance, {"role": "assistant", "content": None, "tool_calls": calls})
    assert done["state"][0]["content"].count("<tool_response>") == 2


def test_a_run_of_too_many_steps_is_ended(box: TrainingSandbox) -> None:
    instance = box.create_instance("bfcl", "multi_turn_base_0")["info"]["instance_id"]
    for _ in range(20):
        assert box.step(instance, call("pwd"))["is_terminated"] is False
    done = box.step(instance, call("pwd"))
    assert done["is_terminated"] and done["reward"] == 0.0 and done["info"]["stop_reason"] == "step_limit"


def test_wrong_requests_are_typed(box: TrainingSandbox) -> None:
    with pytest.raises(NotFound, match="no multi-turn task 'multi_turn_base_9999'"):
        box.create_instance("bfcl", "multi_turn_base_9999")
    with pytest.raises(InvalidConfig, match="there is no split 'nonsense'"):
        box.get_env_profile("bfcl", split="nonsense")
    with pytest.raises(InvalidConfig, match="has the set 'bfcl'"):
        box.get_env_profile("webshop")
    box.create_instance("bfcl", "multi_turn_base_0", "twice")
    with pytest.raises(Conflict, match="'twice' exists already"):
        box.create_instance("bfcl", "multi_turn_base_1", "twice")
    with pytest.raises(InvalidConfig):
        box.create_instance("bfcl", "multi_turn_base_1", "a/b")
    with pytest.raises(InvalidConfig, match="judges the calls"):
        box.evaluate("twice", messages=[NOTHING])
