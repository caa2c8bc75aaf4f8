"""Live data of the web page: the read-only view of a process, disk and network charts, measured rows, model calls and
rewards on the timeline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.ui.browser import Watched, until
from tests.ui.conftest import OWNER, not_attacked, sign_in
from tests.ui.test_page_runs import ATTACK, recorded, response

from rock.sync import Client, Sandbox, SandboxConfig

pytestmark = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="drives a browser for minutes: `make ui`")
Open = Callable[[], Watched]


@pytest.fixture(scope="module")
def box(web: RunningServer) -> Iterator[Sandbox]:
    config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="512m", cpus=1.0, name="watched")
    with Sandbox(config) as made:
        yield made


def test_a_process_is_watched_without_the_right_to_type(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    """The view shows output while the program runs, and sends nothing, also when output has queries and links."""
    hostile = "\x1b]0;title\x07\x1b]8;;https://example.test/\x07link\x1b]8;;\x07\x1b[c\x1b[6n" + ATTACK
    box.files.write("/tmp/hostile", hostile)
    script = ("cat /tmp/hostile; echo; echo begin; while ! [ -e /tmp/go ]; do sleep 0.1; done; timeout 1 cat; "
              "echo end; exit 3")  # fmt: skip
    process = box.processes.start(["sh", "-c", script])
    page = sign_in(open_page(), web, path=f"/ui/sandbox/{box.sandbox_id}?tab=processes")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.method))
    sockets: list[Any] = []
    page.on("websocket", lambda socket: sockets.append(socket.url))
    page.get_by_role("link", name=f"Watch {process.id}").click()
    page.locator(".badge").get_by_text("read-only").wait_for()
    screen = page.locator("div.terminal").first
    screen.get_by_text("begin").first.wait_for()
    page.locator(".terminal-state").get_by_text("live").wait_for()
    screen.click()
    page.keyboard.type("typed text\n")
    screen.get_by_text("link", exact=False).first.click(force=True)
    box.files.write("/tmp/go", "")
    screen.get_by_text("end", exact=True).first.wait_for()
    page.locator(".terminal-state").get_by_text("exit status 3").wait_for()
    assert "typed text" not in screen.inner_text()
    assert set(requests) == {"GET"} and sockets == []
    not_attacked(page)


def test_disk_and_network_charts(web: RunningServer, open_page: Open) -> None:
    config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="256m", network="nat",
                           egress=["127.0.0.1"])  # fmt: skip
    with Sandbox(config) as box:
        page = sign_in(open_page(), web, path=f"/ui/sandbox/{box.sandbox_id}")
        page.get_by_role("img", name="Chart of Network").wait_for()
        page.get_by_role("img", name="Chart of Disk").wait_for()
        box.execute("head -c 20000000 /dev/zero > /root/large 2>/dev/null || head -c 20000000 /dev/zero > /opt/large")
        until(page, "/now (19|[2-9]\\d) MiB/.test(document.querySelector('[aria-label^=\"Chart of Disk\"]')"
                    ".getAttribute('aria-label'))")  # fmt: skip


def test_shown_rows_are_measured(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/sandboxes?q=watched")
    row = page.get_by_role("row").filter(has_text="watched")
    row.wait_for()
    assert row.locator(".measured").count() == 0
    page.get_by_label("Measure the shown rows").check()
    assert "measure=1" in page.url
    row.get_by_text("MiB of 512 MiB").wait_for()
    row.locator(".measured").get_by_text("of 1", exact=False).first.wait_for()


def test_model_calls_and_rewards_are_on_the_timeline(web: RunningServer, open_page: Open) -> None:
    made = []
    with Client(web.url, OWNER) as client:
        for place in range(2):
            config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="256m", name=f"group-{place}")
            box = Sandbox(config)
            box.start()
            made.append(box)
            records = [response("same"), response("other", tool=("sh", "{}") if place else None)]
            bodies = [{"model": ATTACK[:60], "messages": [{"role": "user", "content": str(n)}]} for n in range(2)]
            # The endpoint of agents also serves clients outside: the address of the server with the secret of the run.
            run = client.runs.create(sandbox=box.sandbox_id, replay={"records": records})
            for body in bodies:
                box.files.write("/tmp/body", json.dumps(body))
                code = ("import urllib.request as u; print(u.urlopen(u.Request("
                        f"'{run.base_url}/v1/chat/completions', open('/tmp/body','rb').read(), "
                        f"{{'authorization': 'Bearer {run.api_key}', 'content-type': 'application/json'}})).status)")
                done = box.execute(["python3", "-c", code])
                assert done.stdout.strip() == "200", done
            run.end(float(place), reason="graded")
    try:
        page = sign_in(open_page(), web, path=f"/ui/sandbox/{made[1].sandbox_id}?tab=timeline")
        page.locator("li.kind-model").get_by_text("model call 2").wait_for()
        page.locator("li.kind-reward").get_by_text("reward 1").wait_for()
        not_attacked(page)
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Export JSONL").click()
        lines = [json.loads(line) for line in Path(waiting.value.path()).read_text().splitlines()]
        kinds = [line["kind"] for line in lines[1:]]
        assert kinds.count("model") == 2 and kinds.count("reward") == 1
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Export HTML").click()
        text = Path(waiting.value.path()).read_text()
        assert "reward 1" in text and "model call 2" in text and "<img" not in text
        page.goto(f"{web.url}/ui/compare?a={made[0].sandbox_id}&b={made[1].sandbox_id}")
        marked = page.locator("li.difference")
        marked.first.wait_for()
        texts = marked.all_inner_texts()
        assert all("model call 2" in one for one in texts) and any("tool_calls" in one for one in texts), texts
    finally:
        for box in made:
            box.stop()


def test_a_replayed_run_without_a_sandbox_has_no_timeline(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    with Client(web.url, OWNER) as client:
        recorded(client, [response("x")], [{"model": "m", "messages": [{"role": "user", "content": "x"}]}])
    page = sign_in(open_page(), web, path=f"/ui/sandbox/{box.sandbox_id}?tab=timeline")
    page.get_by_text("created").first.wait_for()
    assert page.locator("li.kind-model").count() == 0
