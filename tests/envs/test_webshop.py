"""The shop: the generated one, and a small folder in the form of WebShop's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer

from rock.errors import InvalidConfig, NotFound, Unsupported
from rock.training import TrainingSandbox

ITEMS = [
    {"asin": "B01", "name": "Steel kettle", "pricing": "$24.99", "product_category": "Kitchen", "small_description":
     ["boils quickly"], "full_description": "A kettle.", "customization_options": {"Color": [{"value": "Red"},
                                                                                           {"value": "Blue"}]}},
    {"asin": "B02", "name": "Wool rug", "pricing": "", "product_category": "Home", "small_description": [],
     "full_description": None, "customization_options": None},
]  # fmt: skip
SPECS = {
    "B01": [{"instruction": "I need a kettle that is easy to clean.", "instruction_attributes": ["easy clean"],
             "instruction_options": ["blue"]}],
    "B02": [{"instruction": "", "instruction_attributes": ["soft"]}],
}  # fmt: skip


def say(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def box(env_server: RunningServer) -> Iterator[TrainingSandbox]:
    with TrainingSandbox(base_url=env_server.url, box_type="webshop") as made:
        yield made


def begin(box: TrainingSandbox, task: str = "goal-0") -> str:
    return str(box.create_instance("webshop", task)["info"]["instance_id"])


def test_every_goal_can_be_met_and_nothing_is_worth_nothing(box: TrainingSandbox) -> None:
    train, test = (box.get_env_profile("webshop", split) for split in ("train", "test"))
    assert len(train) == 180 and len(test) == 20
    for task in (*train[::6], *test):
        instance = begin(box, task)
        for message in box.get_solution(instance):
            done = box.step(instance, message)
        assert done["reward"] == 1.0 and done["is_terminated"] and box.evaluate(instance) == 1.0
        box.release_instance(instance)
    instance = begin(box)
    for _ in range(49):
        assert box.step(instance, say(""))["info"]["failure"] == "bad_action"
    done = box.step(instance, say(""))
    assert done["is_terminated"] and done["info"] == {"stop_reason": "step_limit", "truncated": True}
    assert box.evaluate(instance) == 0.0


def test_pages(box: TrainingSandbox) -> None:
    instance = begin(box)
    with_rugs = box.step(instance, say("I look for it. search[water resistant rug]"))["state"][0]["content"]
    assert with_rugs.startswith("Page 1 of 5 for: water resistant rug") and "[Next]" in with_rugs
    assert box.step(instance, say("search[again]"))["info"]["failure"] == "bad_action"
    assert "Page 2 of 5" in box.step(instance, say("click[next]"))["state"][0]["content"]
    assert "Page 1 of 5" in box.step(instance, say("click[Prev]"))["state"][0]["content"]
    first = box.get_tools_info(instance)["click"][0]
    shown = box.step(instance, say(f"click[{first}]"))["state"][0]["content"]
    assert "rug" in shown and "[Buy Now]" in shown and "Chosen: nothing" in shown
    assert "Chosen: size: small" in box.step(instance, say("click[small]"))["state"][0]["content"]
    assert box.step(instance, say("click[no such thing]"))["info"]["failure"] == "bad_action"
    assert box.step(instance, say("click[Back to Search]"))["state"][0]["content"].startswith("Search page")


def test_a_part_of_what_was_wanted_is_worth_a_part(box: TrainingSandbox) -> None:
    instance = begin(box)
    search, choose, *_options, buy = box.get_solution(instance)
    for message in (search, choose):
        box.step(instance, message)
    assert 0.0 < box.step(instance, buy)["reward"] < 1.0


def test_wrong_requests(box: TrainingSandbox) -> None:
    for task in ("goal-200", "goal--1", "goal-x", "goal-²"):
        with pytest.raises(NotFound, match="the shop has no task"):
            begin(box, task)
    with pytest.raises(InvalidConfig, match="not messages"):
        box.evaluate(begin(box), [say("x")])


def test_data_of_the_user(env_server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "items_shuffle_1000.json").write_text(json.dumps(ITEMS))
    (tmp_path / "items_human_ins.json").write_text(json.dumps(SPECS))
    with TrainingSandbox(base_url=env_server.url, box_type="webshop", data=tmp_path) as box:
        assert box.get_env_profile("webshop") == ["goal-0"]
        made = box.create_instance("webshop", "goal-0")
        assert "price lower than 30.00 dollars" in made["state"][1]["content"]
        instance = made["info"]["instance_id"]
        for message in box.get_solution(instance):
            done = box.step(instance, message)
        assert done["reward"] == 1.0


def test_a_folder_without_data_is_told(env_server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with TrainingSandbox(base_url=env_server.url, box_type="webshop", data=tmp_path) as box:
        with pytest.raises(Unsupported, match=r"none of items_shuffle\.json"):
            box.get_env_profile("webshop")
