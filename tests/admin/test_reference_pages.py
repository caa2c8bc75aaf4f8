"""The pages /docs and /redoc work without any other server: in a real browser, and by what they link to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
import urllib3
from tests.conftest import RunningServer
from tests.packages import CannotBeHad, tree

PAGES = {"/docs": "swagger-ui-bundle.js", "/redoc": "redoc.standalone.js"}
HTTP = urllib3.PoolManager(retries=False, timeout=30)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_to_its_own_server_only(server: RunningServer, page: str) -> None:
    answer = HTTP.request("GET", server.url + page)
    assert answer.status == 200
    text = answer.data.decode()
    links = re.findall(r"""(?:src|href|spec-url)=["']([^"']+)""", text)
    assert any(link.endswith(PAGES[page]) for link in links), links
    for link in links:
        assert link.startswith("/") and not link.startswith("//"), link
        linked = HTTP.request("GET", server.url + link)
        assert linked.status == 200 and len(linked.data) > 1000, link
    assert "http://" not in text.replace("http://127.0.0.1", "") and "https://" not in text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in re.findall("script-src[^;]*", policy)[0]


@pytest.mark.parametrize("name", ["..%2f__init__.py", "%2e%2e/core.py", "core.py", "", "a" * 5000])
def test_nothing_else_of_the_package_is_served(server: RunningServer, name: str) -> None:
    assert HTTP.request("GET", f"{server.url}/docs/assets/{name}").status in (404, 414)


@pytest.mark.parametrize("page", PAGES)
def test_a_browser_shows_the_routes(server: RunningServer, page: str, tmp_path: Path) -> None:
    if not os.environ.get("ROCK_TEST_BROWSER"):
        pytest.skip("downloads a browser from Debian's packages: set ROCK_TEST_BROWSER=1")
    try:
        programs = tree("programs-chromium", ["chromium"]) / "opt/programs/usr"
    except CannotBeHad as error:
        pytest.skip(str(error))
    libraries = programs / "lib" / f"{platform.machine()}-linux-gnu"
    shown = subprocess.run(
        [programs / "lib/chromium/chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000", server.url + page],
        env={"LD_LIBRARY_PATH": f"{libraries}:{libraries}/pulseaudio", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=180, check=True,
    ).stdout  # fmt: skip
    assert "/v1/sandboxes/{sandbox_id}" in re.sub("<[^>]+>|\u200b", "", shown)
    assert "Create a sandbox; ?wait= until it runs or failed" in re.sub("<[^>]+>", "", shown)
