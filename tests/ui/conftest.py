"""A server with a key, and a browser for one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.conftest import RunningServer, give_image
from tests.leaks import Inventory
from tests.ui.browser import FLAGS, Missing, Watched, chromium, playwright

from rock.protocol.keys import CreateKey
from rock.sync import Client

OWNER = "owner-key-of-the-tests"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that requires a key."""
    running = RunningServer(tmp_path_factory.mktemp("web-home"), ROCK_API_KEY=OWNER)
    give_image(running.home)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    try:
        path, start = chromium(), playwright()
    except Missing as reason:
        pytest.skip(str(reason))
    with start() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(chrome: Any) -> Iterator[Any]:
    """A browser context: cookies of its own."""
    made = chrome.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    made.set_default_timeout(20_000)
    yield made
    made.close()


@pytest.fixture
def open_page(context: Any) -> Iterator[Callable[[], Watched]]:
    """Pages whose consoles are free of errors at the end of the test."""
    made: list[Watched] = []

    def open_one() -> Watched:
        made.append(Watched(context.new_page()))
        return made[-1]

    yield open_one
    for watched in made:
        assert watched.problems == []
        assert watched.dialogs == []


def sign_in(watched: Watched, server: RunningServer, key: str = OWNER, path: str = "/ui/") -> Any:
    """The page, signed in."""
    page = watched.page
    page.goto(server.url + path)
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("navigation", name="Screens").wait_for()
    return page


def tenant_key(server: RunningServer, tenant: str, scopes: list[str] | None = None) -> tuple[str, str]:
    """(id, key) of a new key."""
    with Client(server.url, OWNER) as client:
        spec: dict[str, Any] = {"name": f"key of {tenant}", "tenant": tenant}
        made = client.create_key(CreateKey.model_validate(spec | ({"scopes": scopes} if scopes else {})))
    return made.id, made.key


def not_attacked(page: Any) -> None:
    """Text of this page has run no script and made no element."""
    page.wait_for_timeout(300)
    assert page.evaluate("window.attacked") is None
    assert page.locator("main img").count() == 0
    assert page.locator("main script").count() == 0
