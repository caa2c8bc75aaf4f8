"""Global options of ROCK's own command: --auth-token, --config, --extra-header, --cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class _Listener(BaseHTTPRequestHandler):
    seen: dict[str, str] = {}

    def do_GET(self) -> None:
        type(self).seen = {name.lower(): value for name, value in self.headers.items()}
        body = b'{"items": [], "next": null}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    """An address that notes the headers of the last request and lists no sandboxes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def rock(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCK_")}
    return subprocess.run([sys.executable, "-m", "rock.cli.main", *words], env={**kept, **environment}, text=True,
                          capture_output=True, timeout=60)  # fmt: skip


def test_a_token_and_headers(url: str) -> None:
    headers = ("--extra-header", "X-Team=a=b", "--extra-header", "X-Other=1", "--cluster", "east")
    done = rock("--base-url", url, "--auth-token", "secret", *headers, "ps")
    assert done.returncode == 0, done.stderr
    seen = _Listener.seen
    assert seen["authorization"] == "Bearer secret"
    assert (seen["x-team"], seen["x-other"], seen["x-cluster"]) == ("a=b", "1", "east")


def test_a_client_configuration(url: str, tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text(f"[rock]\nbase_url = {url}\n[rock.extra_headers]\nX-From-File = 50%\nX-Both = file\n")
    done = rock("--config", str(path), "--extra-header", "X-Both=option", "ps")
    assert done.returncode == 0, done.stderr
    assert (_Listener.seen["x-from-file"], _Listener.seen["x-both"]) == ("50%", "option")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--extra-header", "none", "ps"), "is not NAME=VALUE"),
        (("--config", "/no/such/file", "ps"), "is not a configuration file"),
        (("--api-key", "a", "--auth-token", "b", "ps"), "two names of one key"),
    ],
)
def test_wrong_options(words: tuple[str, ...], why: str) -> None:
    done = rock(*words)
    assert done.returncode == 1 and why in done.stderr and "Traceback" not in done.stderr


def test_headers_of_the_environment(url: str) -> None:
    done = rock("--base-url", url, "ps", ROCK_EXTRA_HEADERS='{"X-Env": "yes"}')
    assert done.returncode == 0 and _Listener.seen["x-env"] == "yes"
    done = rock("--base-url", url, "ps", ROCK_EXTRA_HEADERS="[1]")
    assert done.returncode == 1 and "is not a JSON object" in done.stderr
