"""The screens of runs: the list and its filters, calls as a conversation, budget, reward, exports, the end of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.gateway.conftest import chat, chat_body
from tests.ui.browser import Watched, frame_time, until
from tests.ui.conftest import OWNER, not_attacked, sign_in

from rock.sync import Client

Open = Callable[[], Watched]
ATTACK = "<img src=x onerror=\"window.attacked=1;alert('xss')\"><script>window.attacked=1</script>"
full = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="drives a browser for minutes: `make ui`")


def response(text: Any, *, reasoning: str | None = None, tool: tuple[str, str] | None = None) -> dict[str, Any]:
    """A recorded response of a model."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if tool is not None:
        function = {"name": tool[0], "arguments": tool[1]}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    return {"response": {"id": "r", "object": "chat.completion", "created": 1, "model": "policy",
                         "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                         "usage": {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}}}  # fmt: skip


def recorded(client: Client, records: list[dict[str, Any]], bodies: list[dict[str, Any]], **spec: Any) -> Any:
    """A run whose agent has sent `bodies`, and received `records`."""
    run = client.runs.create(replay={"records": records}, **spec)
    for body in bodies:
        status, reply, _ = chat({"base_url": run.base_url, "api_key": run.api_key}, body)
        assert status == 200, reply
    return run


def branching(client: Client, **spec: Any) -> Any:
    """Two answers with a tool, then another continuation of the first call."""
    tool = {"id": "call_1", "type": "function", "function": {"name": "shell", "arguments": '{"command": "ls"}'}}
    asked = [{"role": "system", "content": "You sort files."}, {"role": "user", "content": "Sort the files."}]
    called = [*asked, {"role": "assistant", "content": "I list them.", "tool_calls": [tool]}]
    done = [*called, {"role": "tool", "tool_call_id": "call_1", "content": "b.txt a.txt"}]
    other = [*called, {"role": "tool", "tool_call_id": "call_1", "content": "nothing found"}]
    records = [response("I list them.", tool=("shell", '{"command": "ls"}')),
               response("They are sorted.", reasoning="Two files only."), response("There are no files.")]
    return recorded(client, records, [{"model": "small", "messages": each} for each in (asked, done, other)], **spec)


def test_a_run_from_the_list_to_its_end(web: RunningServer, open_page: Open) -> None:
    with Client(web.url, OWNER) as client:
        run = branching(client, name="sorter", tags={"task": "sort", "group": "g1"}, budget={"calls": 10})
        client.runs.create(pull=True, name="another", tags={"task": "else"})
        page = sign_in(open_page(), web, path="/ui/runs?tag=task%3Dsort&state=active")
        page.get_by_role("row").filter(has_text="sorter").wait_for()
        assert page.get_by_text("another").count() == 0
        page.reload()  # the filters are in the URL
        page.get_by_role("row").filter(has_text="sorter").wait_for()
        assert page.get_by_label("tag").input_value() == "task=sort"
        page.get_by_role("link", name="sorter").click()
        page.get_by_role("heading", name="sorter").wait_for()
        page.locator(".budget").get_by_text("7 of 10 calls").wait_for()
        calls = page.get_by_role("table", name="Calls")
        calls.get_by_role("row").nth(3).wait_for()
        rows = [row.split("\n") for row in calls.get_by_role("row").all_inner_texts()[1:]]
        assert [row[:2] for row in rows] == [["1", "1"], ["2", "1"], ["3", "2"]]
        assert all("1 (branches)" in row for row in rows[1:])
        words = page.locator(".conversation")
        words.get_by_text("There are no files.").wait_for()
        assert words.get_by_text("nothing found").count() == 1 and words.get_by_text("b.txt").count() == 0
        page.get_by_role("button", name="Earlier call 1").click()
        page.get_by_role("button", name="Later call 2").click()
        words.get_by_text("Two files only.").wait_for()
        words.get_by_text("tool call shell").wait_for()
        assert "call=2" in page.url
        page.get_by_label("Reasoning").uncheck()
        page.get_by_label("Tool calls and results").uncheck()
        assert words.get_by_text("Two files only.").count() == 0 and words.get_by_text("b.txt").count() == 0
        page.get_by_role("button", name="Show the raw JSON").click()
        page.locator("pre.raw").get_by_text('"choices"').wait_for()

        page.get_by_role("button", name="End the run").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Reward (optional)").fill("0.5")
        dialog.get_by_label("Reason (optional)").fill("from the page")
        dialog.get_by_role("button", name="End the run").click()
        page.get_by_text("Ended because: from the page").wait_for()
        assert page.locator(".reward").inner_text() == "0.5"
        ended = client.runs.get(run.id).info
        assert (ended.state, ended.reward, ended.reason) == ("ended", 0.5, "from the page")
        for name, check in (("ATIF", "steps"), ("messages", "role"), ("chains", "the response has no token ids")):
            with page.expect_download() as waiting:
                page.get_by_role("button", name=name, exact=True).click()
            text = Path(waiting.value.path()).read_text()
            assert json.loads(text) and check in text


@full
def test_an_invalid_reward_is_not_zero(web: RunningServer, open_page: Open) -> None:
    with Client(web.url, OWNER) as client:
        run = branching(client)
    page = sign_in(open_page(), web, path=f"/ui/run/{run.id}")
    page.get_by_role("button", name="End the run").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("An infrastructure error prevented a reward").check()
    dialog.get_by_role("button", name="End the run").click()
    page.get_by_text("no: an infrastructure error").wait_for()
    assert page.locator(".reward").inner_text() == "not valid"


def test_text_of_models_and_agents_is_only_text(web: RunningServer, open_page: Open) -> None:
    """Messages, reasoning, tool names and arguments, tool results, tags, names, reasons."""
    with Client(web.url, OWNER) as client:
        body = {"model": ATTACK[:100], "messages": [
            {"role": "system", "content": ATTACK}, {"role": "user", "content": [{"type": "text", "text": ATTACK}]},
            {"role": "assistant", "content": ATTACK, "tool_calls": [
                {"id": ATTACK, "type": "function", "function": {"name": ATTACK, "arguments": ATTACK}}]},
            {"role": "tool", "tool_call_id": ATTACK, "content": ATTACK + "\u202e\x1b[2J"}]}  # fmt: skip
        records = [response(ATTACK, reasoning=ATTACK, tool=(ATTACK, json.dumps({ATTACK: ATTACK})))]
        run = recorded(client, records, [body], name=ATTACK, tags={ATTACK: ATTACK}, weight_version=ATTACK)
        page = sign_in(open_page(), web, path="/ui/runs")
        page.get_by_role("link", name=ATTACK, exact=True).wait_for()
        not_attacked(page)
        page.goto(f"{web.url}/ui/run/{run.id}")
        page.locator(".answer").get_by_text("onerror").first.wait_for()
        assert page.locator(".conversation").get_by_text("onerror").count() >= 7
        page.get_by_role("button", name="Show the raw JSON").click()
        page.locator("pre.raw").get_by_text("onerror").wait_for()
        not_attacked(page)
        run.end(1.0, reason=ATTACK)
        page.get_by_text("Ended because").get_by_text("onerror").wait_for()
        not_attacked(page)


@full
def test_a_run_of_a_thousand_large_calls_is_fluid(web: RunningServer, open_page: Open) -> None:
    """1,000 calls of 80 kB: only the body of the shown call is loaded, and a window of the table is in the DOM."""
    large = "word " * 16_000
    with Client(web.url, OWNER) as client:
        run = recorded(client, [response(f"answer {n}") for n in range(1000)],
                       [chat_body(f"{n} {large}") for n in range(1000)])  # fmt: skip
    page = sign_in(open_page(), web, path="/ui/runs")
    sizes: list[int] = []
    page.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
    page.goto(f"{web.url}/ui/run/{run.id}")
    page.locator(".conversation").get_by_text("answer 999").wait_for()
    print(f"{sum(sizes)} bytes loaded, {page.evaluate('document.querySelectorAll(`*`).length')} nodes")
    assert sum(sizes) < 1_500_000
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
    assert frame_time(page, 50) <= 50
    page.evaluate("document.querySelector('.rows').scrollTop = 0")
    page.get_by_role("link", name="3", exact=True).click()
    until(page, "document.querySelector('.conversation')?.textContent.includes('answer 2')")
