"""The web page in a real browser: the main path of a user. `make ui` runs the other files too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.ui.browser import Watched
from tests.ui.conftest import OWNER, sign_in, tenant_key

from rock.sync import Client, Sandbox, SandboxConfig

Open = Callable[[], Watched]


@pytest.fixture(scope="module")
def box(web: RunningServer) -> Iterator[Sandbox]:
    """A sandbox for tests that do not end it."""
    config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="512m", cpus=1.0, name="shared")
    with Sandbox(config) as made:
        yield made


def test_sign_in_and_out(web: RunningServer, open_page: Open, context: Any) -> None:
    watched = open_page()
    watched.allowed = {"401"}
    page = watched.page
    page.goto(f"{web.url}/")
    page.get_by_label("API key").fill("rock_unknown_wrong")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("alert").get_by_text("the key is unknown").wait_for()
    page.get_by_label("API key").fill(OWNER)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Sandboxes").wait_for()
    (cookie,) = [cookie for cookie in context.cookies(f"{web.url}/ui/") if cookie["name"] == "rock_session"]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["path"] == "/ui"
    assert page.evaluate("document.cookie") == ""
    page.reload()
    page.get_by_role("heading", name="Sandboxes").wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key").wait_for()
    context.add_cookies([cookie])  # a stolen cookie has no effect after the sign-out
    page.wait_for_timeout(100)
    page.reload()
    page.get_by_label("API key").wait_for()


def test_a_sandbox_from_the_form_to_the_stop(web: RunningServer, open_page: Open) -> None:
    page = sign_in(open_page(), web)
    page.get_by_text("There are no sandboxes").or_(page.get_by_role("table", name="Sandboxes")).first.wait_for()
    page.get_by_role("button", name="Start a sandbox").click()
    page.get_by_label("Image", exact=True).fill(IMAGE)
    page.get_by_label("Name (optional)").fill("from-form")
    page.get_by_label("Memory").fill("256m")
    page.get_by_label("Labels").fill("task=first")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("heading", name="from-form").wait_for()
    page.locator(".title .state-running").wait_for()
    with Client(web.url, OWNER) as client:
        (info,) = client.list_sandboxes(name="from-form", states="running")
    assert (info.memory, info.labels) == ("256m", {"task": "first"})

    page.get_by_role("link", name="Open the terminal").click()
    page.get_by_text("connected", exact=True).wait_for()
    page.keyboard.type("echo terminal-$((40+2))\n")
    page.locator(".terminal").get_by_text("terminal-42").first.wait_for()
    page.keyboard.type("stty size\n")
    page.locator(".terminal").get_by_text(re.compile(r"^\d+ \d+")).first.wait_for()

    page.get_by_role("link", name=info.sandbox_id).click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    page.locator(".title .state-stopped").wait_for()
    page.get_by_text("stopped_by_user").wait_for()


def test_files_go_in_and_out(web: RunningServer, box: Sandbox, open_page: Open, tmp_path: Path) -> None:
    page = sign_in(open_page(), web, path=f"/ui/sandbox/{box.sandbox_id}?tab=files&path=/tmp")
    data = bytes(range(256)) * 300
    (tmp_path / "up.bin").write_bytes(data)
    (tmp_path / "note.txt").write_text("hello from outside")
    page.get_by_label("Upload files").set_input_files([tmp_path / "up.bin", tmp_path / "note.txt"])
    page.get_by_text("2 uploaded").wait_for()
    assert box.files.read("/tmp/up.bin") == data
    page.get_by_role("button", name="note.txt", exact=True).click()
    page.locator("pre.file").get_by_text("hello from outside").wait_for()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download up.bin").click()
    assert Path(waiting.value.path()).read_bytes() == data


def test_a_filter_is_in_the_url(web: RunningServer, box: Sandbox, open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/sandboxes")
    page.get_by_label("Search").fill("shared")
    page.get_by_label("state", exact=True).select_option("running")
    page.get_by_role("row").filter(has_text="shared").wait_for()
    assert "q=shared" in page.url and "state=running" in page.url
    page.reload()
    page.get_by_role("row").filter(has_text="shared").wait_for()
    assert page.get_by_label("Search").input_value() == "shared"
    page.get_by_label("Search").fill("no such sandbox")
    page.get_by_text("No sandbox matches").wait_for()


def test_rows_change_live(web: RunningServer, open_page: Open) -> None:
    page = sign_in(open_page(), web, path="/ui/sandboxes")
    page.get_by_text("live", exact=True).wait_for()
    config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="256m", name="appears")
    with Sandbox(config):
        row = page.get_by_role("row").filter(has_text="appears")
        row.filter(has_text="running").wait_for()
    row.filter(has_text="stopped").wait_for()


def test_a_revoked_key_signs_out(web: RunningServer, open_page: Open) -> None:
    key_id, key = tenant_key(web, "revoked")
    watched = open_page()
    page = sign_in(watched, web, key)
    page.get_by_text("There are no sandboxes").wait_for()
    watched.allowed = {"401"}
    with Client(web.url, OWNER) as client:
        client.revoke_key(key_id)
    page.get_by_text("You are signed out").wait_for()
    page.reload()
    page.get_by_label("API key").wait_for()
