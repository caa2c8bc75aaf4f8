"""A server with an owner's key for the tests of all dialects, keys of two tenants, and raw HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.conftest import RunningServer, hosting

from rock.protocol.keys import Access, CreateKey, Quota
from rock.sync import Client

OWNER = "the owner's key of the dialects"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    url: str, method: str, path: str, body: Any = b"", key: str | None = None, timeout: float = 120.0, **headers: str
) -> Reply:
    """One request. body: bytes, or plain data. headers: names with `_` for `-`."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        given["authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request(method, path, data or None, given)
        reply = connection.getresponse()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    finally:
        connection.close()


@pytest.fixture(scope="session")
def dialect_server(tmp_path_factory: pytest.TempPathFactory, env_images: Any) -> Iterator[RunningServer]:
    """Its key is OWNER. It can host environments."""
    with hosting(tmp_path_factory.mktemp("dialects"), env_images, ROCK_API_KEY=OWNER) as server:
        yield server


@pytest.fixture(scope="session")
def dialect_keys(dialect_server: RunningServer) -> dict[str, str]:
    """Keys: mine and reader of one tenant, other of another, small of a tenant that may have one sandbox."""
    usual = [Access.READ, Access.RUN, Access.CREATE]
    with Client(dialect_server.url, OWNER) as owner:
        return {
            "mine": owner.create_key(CreateKey(name="x", tenant="mine", scopes=usual)).key,
            "reader": owner.create_key(CreateKey(name="x", tenant="mine", scopes=[Access.READ])).key,
            "other": owner.create_key(CreateKey(name="x", tenant="other", scopes=usual)).key,
            "small": owner.create_key(
                CreateKey(name="x", tenant="small", scopes=usual, quota=Quota(sandboxes=1))).key,
        }


@pytest.fixture
def clean(dialect_server: RunningServer) -> Iterator[None]:
    """After the test there is no sandbox more than before."""
    before = dialect_server.inventory()
    yield
    dialect_server.assert_clean(before)


__all__ = ["OWNER", "Reply", "send"]
