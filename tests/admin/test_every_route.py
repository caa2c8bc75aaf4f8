"""Every route of the server, with no key, a wrong one, one that may only read, and another tenant's.

The routes are those of the OpenAPI page, of the wire table (for WebSockets), of the dialects of ROCK and E2B, and of
training sets.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.admin.conftest import OWNER
from tests.conftest import IMAGE, RunningServer
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rock.admin.api import agentscope
from rock.admin.api.rock_v1 import GEM, ROCKLET, SANDBOXES, commands, environments, files, rocklet, sandboxes
from rock.dialects.e2b import PREFIX as E2B
from rock.dialects.e2b.builds import Builds
from rock.dialects.e2b.control import Control
from rock.protocol.keys import Access, CreateKey
from rock.protocol.routes import METHODS, ROUTES
from rock.sync import Client, Sandbox, SandboxConfig

# Routes that are about no sandbox that is named: they make one, or change what all share.
_MAKES = {"/v1/sandboxes", "/v1/groups", "/v1/envs", "/v1/envs/add", "/v1/envs/build", f"{SANDBOXES}/start",
          f"{SANDBOXES}/start_async", f"{GEM}/make", f"{E2B}/v2/sandboxes", f"{E2B}/sandboxes",
          "/env/register", "/env/delete", "/v1/keys", "/v1/keys/{key_id}", "/v1/volumes",
          "/v1/pools/{pool}", "/v1/snapshots/import", "/v1/workers", "/v1/workers/{worker}/beat"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    method: str
    path: str
    access: Access

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def dialect() -> Iterator[Row]:
    nothing: Any = None
    for prefix, routes in (
        (SANDBOXES, sandboxes.Sandboxes(nothing, "none").routes()), (SANDBOXES, sandboxes.Commits(nothing).routes()),
        (SANDBOXES, commands.Commands(nothing).routes()), (SANDBOXES, files.Files(nothing).routes()),
        (ROCKLET, rocklet.Rocklet(sandboxes.Sandboxes(nothing, "none"), commands.Commands(nothing),
                                  files.Files(nothing), nothing).routes()),
        (GEM, environments.Gem(nothing, nothing).routes()), ("", environments.EnvHub(nothing).routes()),
    ):  # fmt: skip
        yield from (Row(method, prefix + path, access) for method, path, _, access in routes)
    builds = Builds(Path(), nothing, nothing, nothing)
    yield from (Row(method, E2B + path, access)
                for method, path, _, access in Control(nothing, nothing, nothing, builds, nothing).rows())  # fmt: skip
    yield Row("GET", f"{agentscope.PREFIX}/healthz", Access.READ)
    for name in ("get_env_profile", "create", "step", "evaluate", "get_info", "release"):
        yield Row("POST", f"{agentscope.PREFIX}/{name}", Access.RUN)
    for path in ("proxy", "proxy/port/8000/x", "vnc/x"):
        yield Row("GET", f"{SANDBOXES}/sandboxes/{{sandbox_id}}/{path}", Access.RUN)


def native(server: RunningServer) -> list[Row]:
    """The rows of the OpenAPI page; each of them has to be in the table."""
    status, page = ask(server, OWNER, "GET", "/openapi.json")
    assert status == 200
    access = {}
    for route in ROUTES.values():
        for method in METHODS if route.method == "ANY" else (route.method,):
            access[method, route.path] = route.access
    rows = [(method.upper(), path) for path, methods in json.loads(page)["paths"].items() for method in methods]
    return [Row(method, path, access[method, path]) for method, path in rows]


def ask(server: RunningServer, key: str | None, method: str, path: str, body: Any = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode("utf-8", "replace")
    finally:
        connection.close()


def request(server: RunningServer, key: str | None, row: Row, sandbox_id: str) -> tuple[int, str]:
    """What a row answers of a sandbox."""
    path = row.path.format(sandbox_id=sandbox_id, box=sandbox_id, session="default", process_id="1", port="8000",
                           rest="x", env="1", owner="x" * 16, key_id="x", worker="x", group_id=sandbox_id,
                           volume=sandbox_id, upstream="x", run="x", snapshot="x", job_id="0" * 16,
                           number="1", template="x", alias="x", hash="x", build="x", secret="x", pool="x")  # fmt: skip
    named = f"{sandbox_id}/1/game:Sokoban-v0-easy" if row.path.startswith(GEM) else sandbox_id
    body: dict[str, Any] = {
        "sandbox_id": named, "sandbox_ids": [sandbox_id], "command": "touch /tmp/was-here", "path": "/tmp/was-here",
        "content": "x", "target_path": "/tmp/was-here", "file_path": "/tmp/was-here", "action": "x", "instance_id": "x",
        "image_tag": "x:1", "username": "", "password": "", "session": "default", "env_name": "nothing",
        "name": "was-here",
    }  # fmt: skip
    if "/apis/" not in row.path and "/env/" not in row.path:
        last = row.path.rpartition("/")[2]
        body["wait"], body["snapshot"] = 1, "x"
        name = "image_tag" if "commit" in row.path else "name" if row.method == "PATCH" else "command"
        name = {"checkpoint": "wait", "fork": "wait", "rollback": "snapshot"}.get(last, name)
        body = {name: body[name]}
    if row.path.startswith(E2B):
        body = {}
    query = "?path=/tmp/was-here"
    if row.method == "GET":
        query += f"&sandbox_id={sandbox_id}&id=game:Sokoban-v0-easy"
    if row.path == "/v1/sandboxes":
        query = ""
    return ask(server, key, row.method, path + query, None if row.method in ("GET", "HEAD") else body)


@pytest.fixture(scope="module")
def keys(guarded: RunningServer) -> dict[str, str]:
    mine = [Access.READ, Access.RUN, Access.CREATE, Access.IMAGES]
    with Client(guarded.url, OWNER) as owner:
        return {
            "mine": owner.create_key(CreateKey(name="x", tenant="mine", scopes=mine)).key,
            "reader": owner.create_key(CreateKey(name="x", tenant="mine", scopes=[Access.READ])).key,
            "other": owner.create_key(CreateKey(name="x", tenant="other", scopes=mine)).key,
        }


@pytest.fixture(scope="module")
def victim(guarded: RunningServer, keys: dict[str, str]) -> Iterator[Sandbox]:
    config = SandboxConfig(base_url=guarded.url, api_key=keys["mine"], image=IMAGE, memory="128m", cpus=0.5)
    with Sandbox(config) as sandbox, Client(guarded.url, keys["mine"]) as client:
        client.create_volume(str(sandbox.sandbox_id))
        yield sandbox
        client.delete_volume(str(sandbox.sandbox_id))
        for one in client.list_snapshots():
            client.delete_snapshot(one.snapshot_id)


def all_rows(server: RunningServer) -> list[Row]:
    rows = [*native(server), *dialect()]
    assert len(rows) > 90 and len({str(row) for row in rows}) == len(rows)
    return rows


def test_without_a_key_and_with_a_wrong_one(guarded: RunningServer, keys: dict[str, str], victim: Sandbox) -> None:
    wrong = keys["mine"][:-1] + ("A" if keys["mine"][-1] != "A" else "B")
    for row in all_rows(guarded):
        for key in (None, wrong, "x", OWNER + "x"):
            status, told = request(guarded, key, row, str(victim.sandbox_id))
            assert status == (200 if row.access is Access.OPEN else 401), f"{row} with {key}: {status} {told}"


def test_a_key_that_may_only_read(guarded: RunningServer, keys: dict[str, str], victim: Sandbox) -> None:
    for row in all_rows(guarded):
        status, told = request(guarded, keys["reader"], row, str(victim.sandbox_id))
        if row.access in (Access.READ, Access.OPEN):
            assert status not in (401, 403, 500), f"{row}: {status} {told}"
        elif row.path.startswith(f"{SANDBOXES}/sandboxes/{{sandbox_id}}/") and status == 200:
            assert "it has read" in told, f"{row}: {told}"  # a port's error, in the dialect's envelope
        else:
            assert status == 403, f"{row}: {status} {told}"
    assert victim.execute("test -e /tmp/was-here").exit_code == 1


def test_another_tenants_key(guarded: RunningServer, keys: dict[str, str], victim: Sandbox) -> None:
    there = str(victim.sandbox_id)
    nowhere = "mine-" + "0" * (len(there) - 5)
    for row in all_rows(guarded):
        if row.path in _MAKES:
            continue
        found, missing = (request(guarded, keys["other"], row, name) for name in (there, nowhere))
        refused = found[0] < 500 or (found[0] == 511 and row.path.startswith(ROCKLET))  # as ROCK's rocklet does
        assert found[0] == missing[0] and refused, f"{row}: {found} {missing}"
        if row.path in ("/v1/server", "/v1/envs"):
            continue
        assert found[1].replace(there, "ID") == missing[1].replace(nowhere, "ID"), f"{row}: {found} {missing}"
        if row.path.startswith("/v1/sandboxes/"):
            assert found[0] == 404, f"{row}: {found}"
    assert victim.execute("test -e /tmp/was-here").exit_code == 1


def test_what_is_the_owners_alone(guarded: RunningServer, keys: dict[str, str], victim: Sandbox) -> None:
    for method, path in (("POST", "/v1/keys"), ("GET", "/v1/keys"), ("DELETE", "/v1/keys/x")):
        assert ask(guarded, keys["mine"], method, path, {"name": "x"})[0] == 403, path
    for path in ("/node/v1/sandboxes", "/node/v1/status", "/v1/nothing", "/docs/x"):
        for key in (keys["mine"], OWNER):
            assert ask(guarded, key, "GET", path)[0] == 404, path


def test_websockets(guarded: RunningServer, keys: dict[str, str], victim: Sandbox) -> None:
    there = str(victim.sandbox_id)
    rows = [route.path for route in ROUTES.values() if route.method == "WEBSOCKET" and route.name != "worker_tunnel"]
    assert len(rows) == 3  # tests/cluster/test_tunnels.py has the other
    ways = ("proxy/x", "vnc/x", "portforward?port=8000")
    dialect_rows = [f"{SANDBOXES}/sandboxes/{{sandbox_id}}/{way}" for way in ways]

    def refused(path: str, key: str | None, sandbox_id: str) -> Any:
        url = guarded.url.replace("http", "ws") + path.format(sandbox_id=sandbox_id, port="8000", rest="x")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            with connect(url, additional_headers=headers, proxy=None, open_timeout=60) as socket:
                socket.recv(60)
        except InvalidStatus as error:
            return error.response.status_code, (error.response.body or b"").replace(sandbox_id.encode(), b"ID")
        except ConnectionClosed as error:
            assert error.rcvd is not None
            return error.rcvd.code, error.rcvd.reason.replace(sandbox_id, "ID")
        raise AssertionError(f"{path} is open")

    for path in (*rows, *dialect_rows):
        assert refused(path, None, there)[0] == 401, path
        assert refused(path, "x", there)[0] == 401, path
        other = refused(path, keys["other"], there)
        assert other == refused(path, keys["other"], "mine-" + "0" * (len(there) - 5)), path
        assert other[0] in (404, 1011), path
        reader = refused(path, keys["reader"], there)
        assert reader[0] == 403 or (reader[0] == 1011 and "it has read" in reader[1]), (path, reader)
