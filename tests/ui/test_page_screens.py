"""All screens of the web page: restart of the server, comparison, charts, environments, accessibility, screenshots.

`make ui` runs this file; the screenshots go to docs/images with ROCK_TEST_SCREENSHOTS=1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer, hosting
from tests.ui.browser import Missing, Watched, axe, until
from tests.ui.conftest import OWNER, sign_in, tenant_key
from tests.ui.test_page_jobs import finish
from tests.ui.test_page_runs import branching

from rock.protocol.jobs import JobTask
from rock.sync import Client, Sandbox, SandboxConfig

pytestmark = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="drives a browser for minutes: `make ui`")
Open = Callable[[], Watched]
IMAGES = Path(__file__).parents[2] / "docs" / "images"
SCREENS = ("sandboxes", "snapshots", "runs", "jobs", "environments", "training", "images", "workers", "keys", "audit",
           "cluster")  # fmt: skip


@pytest.fixture(scope="module")
def boxes(web: RunningServer) -> Iterator[list[Sandbox]]:
    """Two sandboxes that ran the same command with different output, and one that ended."""
    made = []
    for number in range(3):
        config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="512m", cpus=1.0,
                               name=f"run-{number}", experiment_id="exp-7",
                               labels={"attempt": str(number)})  # fmt: skip
        sandbox = Sandbox(config)
        sandbox.start()
        made.append(sandbox)
        sandbox.processes.start(["echo", "same"]).wait()
        sandbox.processes.start(["sh", "-c", f"echo result {min(number, 1)}; exit {min(number, 1)}"]).wait()
    made[2].stop()
    yield made
    for sandbox in made[:2]:
        sandbox.stop()


@pytest.fixture(scope="module")
def trajectory(web: RunningServer) -> tuple[str, str]:
    """Ids of a run with branches and of a job with failed trials."""
    with Client(web.url, OWNER) as client:
        run = branching(client, name="sort-files", tags={"task": "sort", "group": "g1"},
                        budget={"calls": 40, "tokens": 100_000})  # fmt: skip
        run.end(0.5, rewards={"tests": 1.0, "style": 0.0}, reason="the tests of the task passed")
        job = client.jobs.create("nightly", [JobTask(name=f"sort-{n}") for n in range(12)], 4,
                                 labels={"suite": "nightly"})  # fmt: skip
        finish(client, job.job_id, 40, lambda number: None if number % 9 == 4 else float(number % 3 != 0),
               sandbox_id=f"job-{job.job_id}-1-0", run_id=run.id)  # fmt: skip
    return run.id, job.job_id


def test_screens_of_runs_and_jobs(web: RunningServer, trajectory: tuple[str, str], open_page: Open) -> None:
    run, job = trajectory
    page = sign_in(open_page(), web, path=f"/ui/run/{run}?call=2")
    page.locator(".conversation").get_by_text("Two files only.").wait_for()
    _shot(page, "page-run")
    page.goto(f"{web.url}/ui/job/{job}")
    page.locator(".progress").get_by_text("40 of 48").wait_for()
    page.get_by_role("table", name="Trials").get_by_text("sort-0").first.wait_for()
    page.wait_for_timeout(300)
    _shot(page, "page-job")


def _shot(page: Any, name: str) -> None:
    """Keep a screenshot for the documentation."""
    if os.environ.get("ROCK_TEST_SCREENSHOTS"):
        IMAGES.mkdir(exist_ok=True)
        page.screenshot(path=IMAGES / f"{name}.png")


def test_two_sandboxes_are_compared(web: RunningServer, boxes: list[Sandbox], open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/sandboxes?state=running")
    for name in ("run-0", "run-1"):
        page.get_by_label(f"Select {name}").check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("The first difference is event").wait_for()
    marked = page.locator("li.difference")
    assert marked.count() == 2
    texts = marked.all_inner_texts()
    assert sorted(text.partition("result ")[2][0] for text in texts) == ["0", "1"], texts
    _shot(page, "page-compare")


def test_exports_are_complete(web: RunningServer, boxes: list[Sandbox], open_page: Open, context: Any) -> None:
    page = sign_in(open_page(), web, path=f"/ui/sandbox/{boxes[1].sandbox_id}?tab=timeline")
    page.get_by_text("exit 1").first.wait_for()
    _shot(page, "page-timeline")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export JSONL").click()
    lines = [json.loads(line) for line in Path(waiting.value.path()).read_text().splitlines()]
    assert lines[0]["type"] == "sandbox" and lines[0]["sandbox_id"] == boxes[1].sandbox_id
    assert any("result 1" in line.get("text", "") for line in lines[1:])
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export HTML").click()
    text = Path(waiting.value.path()).read_text()
    other = Watched(context.new_page())  # the file shows the same without the server
    other.page.set_content(text)
    other.page.get_by_text("result 1").first.wait_for()
    assert other.problems == []


def test_a_chart_changes(web: RunningServer, boxes: list[Sandbox], open_page: Open) -> None:
    page = sign_in(open_page(), web, path=f"/ui/sandbox/{boxes[0].sandbox_id}")
    chart = page.get_by_role("img", name="Chart of Memory")
    until(page, "!!document.querySelector('[aria-label^=\"Chart of Memory, 2 points\"]')")
    before, pixels = chart.get_attribute("aria-label"), chart.screenshot()
    boxes[0].processes.start(["python3", "-c", "x = bytearray(150 << 20); import time; time.sleep(8)"])
    until(page, "/now 1\\d\\d MiB/.test(document.querySelector('[aria-label^=\"Chart of Memory\"]')"
                ".getAttribute('aria-label'))")  # fmt: skip
    assert chart.get_attribute("aria-label") != before
    assert chart.screenshot() != pixels
    _shot(page, "page-sandbox")


def test_many_are_stopped_at_once(web: RunningServer, open_page: Open) -> None:
    made = [Sandbox(SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="256m", name=f"bulk-{n}"))
            for n in range(3)]  # fmt: skip
    for sandbox in made:
        sandbox.start()
    page = sign_in(open_page(), web, path="/ui/sandboxes?q=bulk-&state=running")
    page.get_by_role("row").filter(has_text="bulk-2").wait_for()
    page.get_by_label("Select all sandboxes").check()
    page.get_by_role("group", name="Actions").get_by_role("button", name="Stop").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(made[0].sandbox_id).first.wait_for()
    dialog.get_by_role("button", name="Stop").click()
    dialog.wait_for(state="hidden")
    with Client(web.url, OWNER) as client:
        assert not [info for info in client.list_sandboxes(states="running") if (info.name or "").startswith("bulk-")]
    page.get_by_text("No sandbox matches").wait_for()


def test_logs_are_read_by_range(web: RunningServer, boxes: list[Sandbox], open_page: Open) -> None:
    process = boxes[0].processes.start(["python3", "-c", "for n in range(40000): print('line', n)"])
    process.wait()
    page = sign_in(open_page(), web, path=f"/ui/sandbox/{boxes[0].sandbox_id}?tab=processes&process={process.id}")
    log = page.locator('pre[aria-label="Log"]')
    log.get_by_text("line 39999").wait_for()
    assert len(log.inner_text()) < 70_000
    page.get_by_role("button", name="Earlier").click()
    until(page, "document.querySelector('pre[aria-label=\"Log\"]')?.textContent.includes('line 39999') === false")
    assert "offset=" in page.url


def test_the_page_recovers_from_a_restart(web: RunningServer, boxes: list[Sandbox], open_page: Open) -> None:
    watched = open_page()
    page = sign_in(watched, web, path="/ui/sandboxes?state=running")
    page.get_by_text("live", exact=True).wait_for()
    page.evaluate("window.notReloaded = true")
    watched.allowed = {"net", "503"}
    port = int(web.url.rpartition(":")[2])
    web.kill()
    page.get_by_text("reconnecting").wait_for()
    web.start(port)
    page.get_by_text("live", exact=True).wait_for(timeout=40_000)
    config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="256m", name="after-restart")
    with Sandbox(config):
        page.get_by_role("row").filter(has_text="after-restart").wait_for()
    assert page.evaluate("window.notReloaded")


def test_keys_are_made_and_revoked(web: RunningServer, open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/keys")
    page.get_by_role("button", name="Create a key").click()
    page.get_by_label("Name", exact=True).fill("from-page")
    page.get_by_label("Tenant (new when empty)").fill("pagetenant")
    page.get_by_role("button", name="Create", exact=True).click()
    key = page.get_by_label("API key").input_value()
    assert key.startswith("rock_pagetenant_")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Revoke from-page").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    page.get_by_role("row").filter(has_text="from-page").get_by_text("revoked").wait_for()
    page.goto(f"{web.url}/ui/audit?action=revoke_key")
    page.get_by_role("row").filter(has_text="revoke_key").first.wait_for()
    _shot(page, "page-audit")


# ---- accessibility ----


def _violations(page: Any, source: str) -> list[str]:
    page.evaluate(source)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{v['id']}: {v['nodes'][0]['html'][:150]} {v['nodes'][0].get('failureSummary', '')[:300]}"
            for v in found["violations"]]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(theme: str, web: RunningServer, boxes: list[Sandbox], trajectory: tuple[str, str],
                           chrome: Any) -> None:  # fmt: skip
    try:
        source = axe()
    except Missing as reason:
        pytest.skip(str(reason))
    tenant_key(web, "axe")
    context = chrome.new_context(viewport={"width": 1280, "height": 800}, color_scheme=theme, reduced_motion="reduce")
    watched = Watched(context.new_page())
    page = watched.page
    page.goto(f"{web.url}/ui/")
    page.get_by_label("API key").wait_for()
    found = {"login": _violations(page, source)}
    sign_in(watched, web)
    box = boxes[0].sandbox_id
    run, job = trajectory
    paths = [*SCREENS, "sandboxes?group_by=image", "sandboxes?q=nothing-matches", f"sandbox/{boxes[2].sandbox_id}",
             *(f"sandbox/{box}?tab={tab}" for tab in ("overview", "processes", "files", "network", "timeline")),
             f"run/{run}", f"run/{run}?call=2", f"job/{job}?trial=4", f"job/{job}?against={job}", "runs?state=active",
             "jobs?q=nothing-matches", f"watch/{box}?process={boxes[0].processes.list()[0].id}",
             f"compare?a={box}&b={boxes[1].sandbox_id}", f"terminal/{box}", "environments?env=game:GuessTheNumber-v0",
             "nothing"]  # fmt: skip
    for path in paths:
        page.goto(f"{web.url}/ui/{path}")
        page.get_by_role("heading", level=1).wait_for()
        page.wait_for_timeout(1200)
        found[path] = _violations(page, source)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    page.goto(f"{web.url}/ui/sandboxes")
    page.get_by_role("button", name="Start a sandbox").click()
    found["dialog"] = _violations(page, source)
    context.close()
    assert {path: problems for path, problems in found.items() if problems} == {}
    assert watched.problems == []


@pytest.mark.parametrize(("width", "height", "scale"), [(390, 844, 1.0), (640, 400, 2.0)], ids=["phone", "zoom-200"])
def test_small_widths(width: int, height: int, scale: float, web: RunningServer, boxes: list[Sandbox],
                      trajectory: tuple[str, str], chrome: Any) -> None:  # fmt: skip
    """A phone; and 200 % zoom of 1280 pixels, which is half of the width at twice the density. Nothing scrolls
    sideways but tables."""
    context = chrome.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
    watched = Watched(context.new_page())
    page = sign_in(watched, web)
    for path in (*SCREENS, f"sandbox/{boxes[0].sandbox_id}", f"sandbox/{boxes[0].sandbox_id}?tab=files",
                 f"run/{trajectory[0]}", f"job/{trajectory[1]}", f"terminal/{boxes[0].sandbox_id}"):  # fmt: skip
        page.goto(f"{web.url}/ui/{path}")
        page.get_by_role("heading", level=1).wait_for()
        page.wait_for_timeout(700)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        if scale == 1.0 and path == "sandboxes":
            _shot(page, "page-phone")
    assert watched.problems == []
    context.close()


def test_the_keyboard_is_enough(web: RunningServer, boxes: list[Sandbox], open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/sandboxes")
    page.get_by_role("button", name="Start a sandbox").focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.textContent") == "Start a sandbox"
    page.locator("body").press("Home")
    page.goto(f"{web.url}/ui/sandboxes")
    page.get_by_role("row").filter(has_text="run-0").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "run-1":
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="run-1").wait_for()
    page.goto(f"{web.url}/ui/terminal/{boxes[0].sandbox_id}")
    page.get_by_text("connected", exact=True).wait_for()
    page.keyboard.press("F6")
    assert page.evaluate("document.activeElement.id") == "after-terminal"
    page.get_by_text("connected", exact=True).wait_for()
    _shot(page, "page-terminal")


def test_both_themes(web: RunningServer, boxes: list[Sandbox], open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/sandboxes")
    page.get_by_role("row").filter(has_text="run-0").wait_for()
    _shot(page, "page-sandboxes")
    page.get_by_label("Theme").select_option("dark")
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.reload()
    page.get_by_role("row").filter(has_text="run-0").wait_for()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == dark == "rgb(20, 23, 27)"
    _shot(page, "page-sandboxes-dark")


# ---- environments ----


def test_an_environment_is_played(
    tmp_path_factory: pytest.TempPathFactory, env_images: Path, open_page: Open
) -> None:
    with hosting(tmp_path_factory.mktemp("web-env"), env_images, ROCK_API_KEY=OWNER) as server:
        page = sign_in(open_page(), server, path="/ui/environments?env=gym:CartPole-v1")
        page.get_by_label("Seed").fill("1")
        page.get_by_role("button", name="Make").click()
        page.get_by_label("Action").wait_for(timeout=300_000)
        for number in (1, 2, 3):
            page.get_by_label("Action").fill("1")
            page.get_by_role("button", name="Step", exact=True).click()
            page.get_by_text(f"Step {number},").wait_for()
        assert page.locator(".total").inner_text() == "3"
        assert page.locator(".reward").inner_text() == "1"
        page.get_by_role("heading", level=1).scroll_into_view_if_needed()
        _shot(page, "page-environment")
        for number in range(4, 30):
            page.get_by_role("button", name="Step", exact=True).click()
            page.get_by_text(f"Step {number},").wait_for()
            page.wait_for_timeout(50)
            if page.get_by_text("The episode has ended").count():
                break
        page.get_by_text("The episode has ended").wait_for()
        page.get_by_role("button", name="Reset").click()
        page.get_by_text("Step 0,").wait_for()
