"""The web page with hostile text and other tenants: no script runs, and nothing of one tenant is shown to another."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.ui.browser import Watched
from tests.ui.conftest import OWNER, not_attacked, sign_in, tenant_key

from rock.errors import RockError
from rock.sync import Sandbox, SandboxConfig

Open = Callable[[], Watched]
ATTACK = "<img src=x onerror=\"window.attacked=1;alert('xss')\"><script>window.attacked=1</script>"
full = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="drives a browser for minutes: `make ui`")


def test_hostile_text_is_only_text(web: RunningServer, open_page: Open) -> None:
    """Labels, image names, file names, file contents, output, session names."""
    config = SandboxConfig(base_url=web.url, api_key=OWNER, image=IMAGE, memory="256m",
                           labels={ATTACK: ATTACK}, user_id=ATTACK, experiment_id=ATTACK)
    with Sandbox(config) as box:
        box.files.write("/tmp/" + ATTACK.replace("/", "-"), ATTACK)
        process = box.processes.start(["echo", ATTACK, "\x1b]0;title\x07\u202e"])
        process.wait()
        with pytest.raises(RockError):
            Sandbox(config.model_copy(update={"image": "x" + ATTACK, "pull": "never"})).start()
        watched = open_page()
        page = sign_in(watched, web, path="/ui/sandboxes")
        page.get_by_role("row").filter(has_text=ATTACK[:20]).first.wait_for()
        not_attacked(page)
        page.goto(f"{web.url}/ui/sandboxes?group_by=experiment_id&q={quote(ATTACK)}&image={quote(ATTACK)}")
        page.get_by_role("link", name="Remove the filters").wait_for()
        not_attacked(page)
        page.goto(f"{web.url}/ui/sandbox/{box.sandbox_id}")
        page.get_by_text(ATTACK).first.wait_for()
        not_attacked(page)
        page.goto(f"{web.url}/ui/sandbox/{box.sandbox_id}?tab=processes&process={process.id}")
        page.locator("pre.output").get_by_text("onerror").wait_for()
        not_attacked(page)
        page.get_by_label("Command", exact=True).fill("printf '%s' '<img src=x onerror=alert(1)>'")
        page.get_by_role("button", name="Run", exact=True).click()
        page.locator("pre.output").first.get_by_text("<img").wait_for()
        not_attacked(page)
        page.goto(f"{web.url}/ui/sandbox/{box.sandbox_id}?tab=files&path=/tmp")
        page.get_by_role("button", name=ATTACK.replace("/", "-"), exact=True).click()
        page.locator("pre.file").get_by_text("onerror").wait_for()
        not_attacked(page)
        page.goto(f"{web.url}/ui/sandbox/{box.sandbox_id}?tab=timeline")
        page.get_by_text("exit 0").wait_for()
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Export HTML").click()
        text = waiting.value.path().read_text()
        assert "<script" not in text and "<img" not in text and "&#60;img" in text
        page.goto(f"{web.url}/ui/{quote(ATTACK)}/{quote(ATTACK)}")
        page.get_by_text("There is no screen").wait_for()
        not_attacked(page)
        # A file opened as a document has no scripts and not the origin of the page.
        box.files.write("/tmp/page.html", "<script>parent.attacked=1;document.title='ran'</script><p>text")
        watched.allowed = {"net"}
        reply = page.request.get(f"{web.url}/ui/v1/sandboxes/{box.sandbox_id}/files/content?path=/tmp/page.html")
        assert reply.status == 200
        assert reply.headers["content-security-policy"].startswith("sandbox")
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_tenant_sees_nothing_of_another(web: RunningServer, open_page: Open) -> None:
    (_, first), (_, second) = tenant_key(web, "alpha"), tenant_key(web, "beta")
    config = SandboxConfig(base_url=web.url, api_key=first, image=IMAGE, memory="256m", name="secret-of-alpha",
                           minimum_isolation="none" if os.geteuid() else "landlock")
    watched = open_page()
    page = sign_in(watched, web, second, "/ui/sandboxes")
    received: list[str] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: received.append(str(frame))))
    page.reload()
    page.get_by_text("live", exact=True).wait_for()
    with Sandbox(config) as box:
        mine = config.model_copy(update={"api_key": second, "name": "own-of-beta"})
        with Sandbox(mine):
            page.get_by_role("row").filter(has_text="own-of-beta").wait_for()
            assert page.get_by_text("secret-of-alpha").count() == 0
            watched.allowed = {"404", "403"}
            page.goto(f"{web.url}/ui/sandbox/{box.sandbox_id}")
            page.get_by_role("alert").first.wait_for()
            assert page.get_by_text("secret-of-alpha").count() == 0
            page.goto(f"{web.url}/ui/terminal/{box.sandbox_id}")
            page.locator(".terminal-state").get_by_text("disconnected").wait_for()
            watched.problems.clear()  # the refused WebSocket
            for screen in ("audit", "images", "cluster"):
                page.goto(f"{web.url}/ui/{screen}")
                page.get_by_role("heading", level=1).wait_for()
                page.wait_for_timeout(500)
                assert box.sandbox_id not in page.content() and "secret-of-alpha" not in page.content()
            names = page.get_by_role("navigation", name="Screens").inner_text()
            assert "Workers" not in names and "Tenants" not in names
            page.goto(f"{web.url}/ui/audit?tenant=alpha")
            page.wait_for_timeout(500)
            assert box.sandbox_id not in page.content()
    assert received
    assert not any(box.sandbox_id in frame or "secret-of-alpha" in frame for frame in received)


# ---- without a browser: what it would not send ----


def _login(server: RunningServer, key: str = OWNER) -> tuple[str, str]:
    """(cookie, CSRF token)."""
    status, headers, body = _ask(server, "POST", "/ui/api/login", json.dumps({"key": key}).encode())
    assert status == 200, body
    return headers["set-cookie"].partition(";")[0], str(json.loads(body)["csrf"])


def _ask(
    server: RunningServer, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    made = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    made.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = made.getresponse()
    found = reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    made.close()
    return found


def test_a_change_needs_the_csrf_token(web: RunningServer) -> None:
    cookie, csrf = _login(web)
    for headers in ({}, {"x_rock_csrf": "0" * 64}, {"x_rock_csrf": csrf, "Origin": "http://evil.example"},
                    {"x_rock_csrf": csrf, "Sec_Fetch_Site": "cross-site"}):  # fmt: skip
        status, _, body = _ask(web, "POST", "/ui/v1/sandboxes", b'{"image":"x"}', Cookie=cookie, **headers)
        assert status in (401, 403), (headers, status, body)
    status, _, _ = _ask(web, "POST", "/ui/v1/sandboxes/none/stop", b"", Cookie=cookie, x_rock_csrf=csrf)
    assert status == 404
    # a page of another origin reads nothing
    status, _, _ = _ask(web, "GET", "/ui/v1/sandboxes", b"", Cookie=cookie, Sec_Fetch_Site="cross-site")
    assert status == 401


def test_the_cookie_is_no_key_elsewhere(web: RunningServer) -> None:
    cookie, csrf = _login(web)
    for path in ("/v1/sandboxes", "/v1/server", "/metrics", "/docs"):
        assert _ask(web, "GET", path, b"", Cookie=cookie, x_rock_csrf=csrf)[0] == 401, path
    status, _, body = _ask(web, "GET", "/ui/v1/sandboxes/x/ports/80/", b"", Cookie=cookie)
    assert status == 501 or status == 400 or status == 422, body
    assert _ask(web, "GET", "/ui/v1/sandboxes", b"", Cookie=cookie)[0] == 200


def test_limits_come_before_parsing(web: RunningServer) -> None:
    status, _, body = _ask(web, "POST", "/ui/api/login", b"[" * 200_000)
    assert status == 422 and b"over 4096 bytes" in body
    for bad in (b"", b"[]", b'{"key": 1}', b'{"key": ""}', b"\xff\xfe", b'{"link": 5}'):
        assert _ask(web, "POST", "/ui/api/login", bad)[0] == 422, bad
    assert _ask(web, "POST", "/ui/api/login", b"{}", Origin="http://evil.example")[0] == 401
    for path in ("/ui/static/x/../../page.py", "/ui/static/x/..%2f..%2fpage.py", "/ui/static/x//etc/passwd",
                 "/ui/static/x/vendor", "/ui/static/"):  # fmt: skip
        assert _ask(web, "GET", path)[0] == 404, path
    assert _ask(web, "GET", "/ui/v1/sandboxes?" + "x" * 20_000)[0] == 422
    for cookie in ("rock_session=" + "a" * 5000, "rock_session=\x01", "rock_session=; ;=", "=" * 9000):
        status, _, body = _ask(web, "GET", "/ui/api/session", b"", Cookie=cookie)
        assert status == 400 or (status == 200 and b'"signed_in":false' in body), cookie
    cookie, _ = _login(web)
    for text in ("state=nonsense", "label=%00", "unknown=1", "after=x"):
        assert _ask(web, "GET", f"/ui/api/rows?{text}", b"", Cookie=cookie)[0] in (200, 422), text


def test_a_link_signs_in_once(web: RunningServer) -> None:
    _, key = tenant_key(web, "linked")
    status, _, body = _ask(web, "POST", "/ui/api/link", b"", x_rock_api_key=key)
    assert status == 200
    token = json.loads(body)["path"].partition("#link=")[2]
    status, _, body = _ask(web, "POST", "/ui/api/login", json.dumps({"link": token}).encode())
    assert status == 200 and json.loads(body)["tenant"] == "linked"
    assert _ask(web, "POST", "/ui/api/login", json.dumps({"link": token}).encode())[0] == 401
    assert _ask(web, "POST", "/ui/api/link")[0] == 401


def test_without_the_page(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_UI="off")
    for path in ("/ui", "/ui/", "/ui/api/session", "/ui/v1/sandboxes"):
        assert _ask(server, "GET", path)[0] == 404, path


def test_policy_and_caching(web: RunningServer) -> None:
    status, headers, body = _ask(web, "GET", "/ui/sandboxes", Accept_Encoding="gzip")
    assert status == 200 and headers["content-encoding"] == "gzip" and headers["cache-control"] == "no-store"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    _, _, body = _ask(web, "GET", "/ui/sandboxes")
    assert b"<script>" not in body and b"style=" not in body
    path = body.partition(b'src="')[2].partition(b'"')[0].decode()
    status, headers, _ = _ask(web, "GET", path)
    assert status == 200 and "immutable" in headers["cache-control"]
    status, headers, _ = _ask(web, "GET", path.replace(path.split("/")[3], "0" * 16))
    assert status == 200 and headers["cache-control"] == "no-store"


def test_the_audit_log_names_the_key(web: RunningServer) -> None:
    key_id, key = tenant_key(web, "audited")
    _, other = tenant_key(web, "bystander")
    cookie, csrf = _login(web, key)
    _ask(web, "POST", "/ui/v1/sandboxes/absent/stop", b"", Cookie=cookie, x_rock_csrf=csrf)

    def entries(holder: str, query: str = "") -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{web.url}/v1/audit?{query}", headers={"X-ROCK-API-Key": holder})
        with urllib.request.urlopen(request, timeout=20) as reply:
            return list(json.load(reply)["items"])

    found = entries(key)
    assert [(e["action"], e["target"], e["status"], e["key_id"]) for e in found] == [
        ("stop_sandbox", "absent", 404, key_id), ("login", "", 200, key_id)]  # fmt: skip
    assert entries(other) == [] and entries(other, "tenant=audited") == []
    assert any(e["action"] == "create_key" and e["key_id"] == "" for e in entries(OWNER, "action=create_key"))
    assert entries(OWNER, f"key_id={key_id}&target=absent") == entries(key, "action=stop_sandbox")
    assert entries(OWNER, f"key_id={key_id}&since={time.time() + 60}") == []
    with pytest.raises(urllib.error.HTTPError, match="422"):
        entries(OWNER, "nonsense=1")


def test_the_commands(web: RunningServer) -> None:
    """`rock ui --print` prints a link that signs in; `rock audit` finds the sign-in."""
    key_id, key = tenant_key(web, "commands")
    environ = {**os.environ, "ROCK_BASE_URL": web.url, "ROCK_API_KEY": key}

    def rock(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "rock", *words], env=environ, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    link = rock("ui", "--print").strip()
    assert link.startswith(f"{web.url}/ui/#link=")
    body = json.dumps({"link": link.partition("#link=")[2]}).encode()
    assert _ask(web, "POST", "/ui/api/login", body)[0] == 200
    (entry,) = json.loads(rock("audit", "--key", key_id, "--since", "600", "--json"))
    assert (entry["action"], entry["tenant"], entry["key_id"]) == ("login", "commands", key_id)
    assert "login" in rock("audit")
