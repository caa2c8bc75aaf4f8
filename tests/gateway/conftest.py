"""A model server of its own, and runs over plain HTTP as agents see them."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest


def http_json(
    method: str, url: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60.0
) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or text, headers) of one request, as a plain client of HTTP sends it."""
    status, data, given = http_raw(method, url, None if body is None else json.dumps(body).encode(), headers, timeout)
    try:
        return status, json.loads(data), given
    except ValueError:
        return status, data.decode("utf-8", "replace"), given


def http_raw(
    method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 60.0
) -> tuple[int, bytes, dict[str, str]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


class FakeUpstream:
    """The program fake_upstream.py."""

    def __init__(self) -> None:
        program = Path(__file__).parent / "fake_upstream.py"
        self._process = subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def plan(self, *plans: dict[str, Any]) -> None:
        http_json("POST", f"{self.url}/_plan", list(plans))

    def seen(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = http_json("GET", f"{self.url}/_seen")[1]
        return found

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    made = FakeUpstream()
    yield made
    made.close()


def chat_body(*texts: str, stream: bool = False, **more: Any) -> dict[str, Any]:
    """A chat request whose messages are from user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"model": "small", "messages": messages, "stream": stream, **more}


def chat(run: dict[str, Any], body: dict[str, Any], **headers: str) -> tuple[int, Any, dict[str, str]]:
    """One chat completion as an agent sends it."""
    given = {"authorization": f"Bearer {run['api_key']}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return http_json("POST", f"{run['base_url']}/v1/chat/completions", body, given)
