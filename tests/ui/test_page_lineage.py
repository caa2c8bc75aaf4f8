"""The screen of snapshots: lineage as a tree, filters, the actions on a sandbox, hostile text, thousands of rows."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunningServer
from tests.ui.browser import Missing, Watched, axe, frame_time, until
from tests.ui.conftest import OWNER, not_attacked, sign_in, tenant_key
from tests.ui.test_page_runs import ATTACK

from rock.protocol.snapshots import SnapshotInfo
from rock.store.sqlite import SqliteStore
from rock.sync import Client, Sandbox

pytestmark = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="drives a browser for minutes: `make ui`")
Open = Callable[[], Watched]
IMAGES = Path(__file__).parents[2] / "docs" / "images"
CHAIN, ROOTS = 40, 100


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with 4,000 snapshots of a worker that is gone, and one whose text is hostile."""
    server = RunningServer(tmp_path_factory.mktemp("lineage-large"), ROCK_RUNTIME="fake", ROCK_API_KEY=OWNER)
    filling = threading.Thread(target=lambda: asyncio.run(_fill(server.home / "rock.sqlite")))
    filling.start()  # this thread has playwright's event loop
    filling.join()
    server.start()
    yield server
    server.kill()


async def _fill(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    now = time.time()

    def row(number: int, parent: str | None, **fields: Any) -> SnapshotInfo:
        spec = {"snapshot_id": f"{number:032x}", "parent": parent, "worker": "gone", "sandbox_id": f"box-{number % 7}",
                "image": "python:3.11", "created_at": now - 9000 + number, "used_at": now, "ttl_seconds": 1e6}
        return SnapshotInfo.model_validate(spec | fields)

    for root in range(ROOTS):
        rows = [row(number, f"{number - 1:032x}" if number % CHAIN else None)
                for number in range(root * CHAIN, (root + 1) * CHAIN)]  # fmt: skip
        await asyncio.gather(*map(store.snapshots.add, rows))
    await store.snapshots.add(row(ROOTS * CHAIN, "f" * 32, name=ATTACK, sandbox_id=ATTACK, image=ATTACK,
                                  left_out=[ATTACK, "\u202egnp.exe"], tenant="alpha"))  # fmt: skip
    await store.close()


@pytest.fixture
def box(web: RunningServer) -> Iterator[Sandbox]:
    with Sandbox("host", memory="256m", cpus=1.0, base_url=web.url, api_key=OWNER) as made:
        yield made
    with Client(web.url, OWNER) as client:
        for one in reversed(client.list_snapshots()):
            client.delete_snapshot(one.snapshot_id)


def items(page: Any) -> Any:
    return page.get_by_role("tree", name="Lineage of snapshots").get_by_role("treeitem")


def same(scope: Any) -> list[str]:
    """The texts of "Command and HTTP call"."""
    scope.locator("summary").last.click()
    return [text.strip() for text in scope.locator(".same").last.locator("dd code").all_inner_texts()]


def test_take_roll_back_fork_and_delete(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    box_id = str(box.sandbox_id)
    with Client(web.url, OWNER) as client:
        page = sign_in(open_page(), web, path=f"/ui/sandbox/{box_id}?tab=snapshots")
        page.get_by_text("There are no snapshots of this sandbox.").wait_for()
        page.get_by_role("button", name="Take a snapshot").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Name of the snapshot").fill("first")
        call = f'POST /v1/sandboxes/{box_id}/checkpoint {{"memory":"auto","name":"first"}}'
        assert same(dialog) == [f"rock checkpoint {box_id} --name first", call]
        dialog.get_by_role("button", name="Take the snapshot").click()
        page.get_by_role("dialog", name="The snapshot was taken").wait_for()
        page.get_by_role("button", name="Done").click()
        items(page).filter(has_text="first").wait_for()
        (first,) = client.list_snapshots()
        assert (first.name, first.sandbox_id) == ("first", box_id)

        page.get_by_role("button", name="Take a snapshot").click()
        dialog.get_by_label("Name of the snapshot").fill("second")
        dialog.get_by_role("button", name="Take the snapshot").click()
        page.get_by_role("button", name="Done").click()
        items(page).filter(has_text="second").wait_for()
        assert [item.get_attribute("aria-level") for item in items(page).all()] == ["1", "2"]

        items(page).filter(has_text="first").click()
        assert f"snapshot={first.snapshot_id}" in page.url
        page.get_by_role("button", name="Roll back to it").click()
        assert same(dialog)[0] == f"rock rollback {box_id} {first.snapshot_id}"
        dialog.get_by_role("button", name="Roll back", exact=True).click()
        dialog.wait_for(state="detached")
        page.get_by_role("button", name="Show the sandboxes that run on it").click()
        page.get_by_label("Chosen snapshot").get_by_role("status").get_by_text(box_id).wait_for()

        page.get_by_role("button", name="Fork").click()
        dialog.get_by_label("Number of sandboxes").fill("3")
        assert same(dialog)[0] == f"rock fork {box_id} -n 3"
        dialog.get_by_role("button", name="Fork").click()
        page.get_by_text("3 sandboxes started from").wait_for()
        until(page, "document.querySelectorAll('[role=treeitem]').length === 3")
        children = [one.sandbox_id for one in client.list_sandboxes() if one.group]
        assert len(children) == 3
        second, third = (one for one in client.list_snapshots() if one.name != "first")
        assert second.parent == third.parent == first.snapshot_id
        for one in children:
            client.stop_sandbox(one)

        items(page).filter(has_text="second").click()
        page.get_by_role("button", name="Delete").click()
        assert same(dialog) == [f"rock snapshot rm {second.snapshot_id}", f"DELETE /v1/snapshots/{second.snapshot_id}"]
        dialog.get_by_role("button", name="Delete").click()
        page.get_by_text("The chosen snapshot is not in this list").wait_for()
        assert second.snapshot_id not in [one.snapshot_id for one in client.list_snapshots()]


def test_an_error_says_what_to_do(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    box.checkpoint(name="taken")
    watched = open_page()
    watched.allowed.add("409")
    page = sign_in(watched, web, path=f"/ui/sandbox/{box.sandbox_id}?tab=snapshots")
    page.get_by_role("button", name="Take a snapshot").click()
    page.get_by_label("Name of the snapshot").fill("taken")
    page.get_by_role("button", name="Take the snapshot").click()
    page.get_by_role("alert").get_by_text("choose another name").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.goto(f"{web.url}/ui/snapshots?sandbox=none")
    page.get_by_text("There are no snapshots of the sandbox none.").wait_for()


def test_a_tenant_sees_its_own_and_a_reader_has_no_actions(stored: RunningServer, chrome: Any) -> None:
    path = f"/ui/snapshots?snapshot={ROOTS * CHAIN:032x}"
    for scopes, actions in ((["read"], 0), (["read", "create"], 1)):
        _, key = tenant_key(stored, "alpha", scopes)
        context = chrome.new_context()
        page = sign_in(Watched(context.new_page()), stored, key, path)
        page.get_by_label("Chosen snapshot").wait_for()
        assert items(page).count() == 1
        assert page.get_by_role("button", name="Delete").count() == actions
        context.close()


def test_text_is_only_text(stored: RunningServer, open_page: Open) -> None:
    page = sign_in(open_page(), stored, path=f"/ui/snapshots?q=onerror&snapshot={ROOTS * CHAIN:032x}")
    page.get_by_role("status").get_by_text(f"1 of {ROOTS * CHAIN + 1} snapshots match").wait_for()
    assert items(page).get_by_text("onerror").count() == 3
    assert items(page).first.get_attribute("aria-level") == "1"  # its parent is gone
    page.get_by_role("list").filter(has_text="onerror").wait_for()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_text("onerror").wait_for()
    assert same(page.get_by_role("dialog"))[0].endswith("--tenant alpha")
    not_attacked(page)


def test_the_tree_by_keyboard_and_its_filters(stored: RunningServer, open_page: Open) -> None:
    page = sign_in(open_page(), stored, path="/ui/snapshots")
    tree = page.get_by_role("tree")
    tree.wait_for()

    def active() -> str:
        return str(page.evaluate("document.activeElement.getAttribute('aria-activedescendant')"))[9:].lstrip("0") or "0"

    tree.focus()
    assert active() == "0"
    for key, expected in (("ArrowDown", "1"), ("ArrowRight", "2"), ("ArrowLeft", "2"), ("ArrowLeft", "1"),
                          ("Home", "0"), ("ArrowLeft", "0"), ("ArrowDown", f"{CHAIN:x}"), ("ArrowUp", "0"),
                          ("ArrowRight", "0"), ("ArrowDown", "1"), ("End", f"{ROOTS * CHAIN:x}")):  # fmt: skip
        page.keyboard.press(key)
        page.wait_for_timeout(60)
        assert active() == expected, key
    shown = page.evaluate("""(() => { const box = document.querySelector('.rows').getBoundingClientRect();
        const row = document.querySelector('.tr.active').getBoundingClientRect();
        return row.top >= box.top && row.bottom <= box.bottom; })()""")
    assert shown
    page.keyboard.press("Enter")
    page.get_by_label("Chosen snapshot").wait_for()
    page.reload()
    page.get_by_label("Chosen snapshot").wait_for()
    page.goto(f"{stored.url}/ui/snapshots?sandbox=box-3&q={17:032x}")
    page.get_by_role("status").get_by_text("1 of").wait_for()
    page.get_by_label("Search").fill("matches-nothing")
    page.get_by_text("No snapshot matches.").wait_for()
    assert "q=matches-nothing" in page.url and "sandbox=box-3" in page.url
    page.get_by_role("link", name="Remove the filters").click()
    page.get_by_text(f"{ROOTS * CHAIN + 1} snapshots").wait_for()


def test_thousands_are_fluid(stored: RunningServer, open_page: Open) -> None:
    page = sign_in(open_page(), stored, path="/ui/snapshots")
    page.get_by_role("tree").wait_for()
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
    assert frame_time(page, 50) <= 50


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_the_lineage(theme: str, stored: RunningServer, web: RunningServer, box: Sandbox,
                                          chrome: Any) -> None:  # fmt: skip
    try:
        source = axe()
    except Missing as reason:
        pytest.skip(str(reason))
    context = chrome.new_context(viewport={"width": 1280, "height": 900}, color_scheme=theme, reduced_motion="reduce")
    first, second = Watched(context.new_page()), Watched(chrome.new_context(color_scheme=theme).new_page())
    found: dict[str, list[str]] = {}

    def check(page: Any, name: str) -> None:
        page.evaluate(source)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found[name] = [f"{v['id']}: {v['nodes'][0]['html'][:150]} {v['nodes'][0].get('failureSummary', '')[:300]}"
                       for v in result["violations"]]  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name

    page = sign_in(first, stored, path=f"/ui/snapshots?snapshot={ROOTS * CHAIN:032x}")
    page.get_by_label("Chosen snapshot").wait_for()
    check(page, "chosen")
    page.goto(f"{stored.url}/ui/snapshots?q=matches-nothing")
    page.get_by_text("No snapshot matches.").wait_for()
    check(page, "no match")
    page = sign_in(second, web, path="/ui/snapshots")
    page.get_by_text("There are no snapshots.").wait_for()
    check(page, "none")
    page.goto(f"{web.url}/ui/sandbox/{box.sandbox_id}?tab=snapshots")
    page.get_by_role("button", name="Fork").click()
    check(page, "fork")
    second.page.context.close()
    context.close()
    assert {name: problems for name, problems in found.items() if problems} == {}
    assert first.problems == second.problems == []


def test_screenshot(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    """The picture of the guide: two attempts after a common first state."""
    for name in ("installed", "attempt-1", "attempt-1-tests", "installed", "attempt-2"):
        if name in {one.name for one in _snapshots(web)}:
            box.rollback(name)
        else:
            box.checkpoint(name=name)
    page = sign_in(open_page(), web, path="/ui/snapshots")
    items(page).nth(3).wait_for()
    assert [item.get_attribute("aria-level") for item in items(page).all()] == ["1", "2", "3", "2"]
    items(page).nth(1).click()
    page.get_by_label("Chosen snapshot").wait_for()
    if os.environ.get("ROCK_TEST_SCREENSHOTS"):
        page.screenshot(path=IMAGES / "page-snapshots.png")


def _snapshots(web: RunningServer) -> list[SnapshotInfo]:
    with Client(web.url, OWNER) as client:
        return list(client.list_snapshots())
