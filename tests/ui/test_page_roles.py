"""Sessions of the web page on a writer and a reader that share a store: both accept them, forwarded requests too."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

from tests.conftest import RunningServer

KEY = "owner-key-of-the-roles"


def _ask(server: RunningServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, str]:
    """(status, cookie, body)."""
    made = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    made.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = made.getresponse()
    found = reply.status, (reply.getheader("set-cookie") or "").partition(";")[0], reply.read().decode()
    made.close()
    return found


def test_a_session_is_valid_on_both_roles(tmp_path: Path) -> None:
    common = {"ROCK_API_KEY": KEY, "ROCK_WORKERS": "none", "ROCK_STORE": str(tmp_path / "shared.sqlite")}
    homes = tmp_path / "writer", tmp_path / "reader"
    for home in homes:
        home.mkdir()
    writer = RunningServer(homes[0], ROCK_ROLE="write", **common)
    writer.start()
    reader = RunningServer(homes[1], ROCK_ROLE="read", ROCK_WRITER=writer.url, **common)
    try:
        reader.start()
        status, cookie, body = _ask(reader, "POST", "/ui/api/login", json.dumps({"key": KEY}).encode())
        assert status == 200, body
        csrf = json.loads(body)["csrf"]
        for server in (writer, reader):
            assert _ask(server, "GET", "/ui/v1/sandboxes", Cookie=cookie)[0] == 200
            assert _ask(server, "GET", "/ui/v1/sandboxes")[0] == 401
            # a writer serves this; a reader forwards it
            assert _ask(server, "POST", "/ui/v1/sandboxes/absent/stop", Cookie=cookie, x_rock_csrf=csrf)[0] == 404
            assert _ask(server, "POST", "/ui/v1/sandboxes/absent/stop", Cookie=cookie)[0] == 403
        assert _ask(reader, "POST", "/ui/api/logout", Cookie=cookie, x_rock_csrf=csrf)[0] == 200
        assert _ask(writer, "GET", "/ui/api/session", Cookie=cookie)[2].startswith('{"signed_in":false')
    finally:
        for server in (reader, writer):
            if server.process is not None:
                server.kill()
