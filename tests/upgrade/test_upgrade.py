"""The server opens what the release before wrote: a home with SQLite, and one whose store is PostgreSQL.

The fixtures are written by `make.py` with the last commit before the code base got its present layout (`written_by`).
Their servers were killed with SIGKILL while sandboxes ran.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rock.sync import Sandbox, SandboxConfig
from tests.conftest import RunningServer
from tests.leaks import Inventory
from tests.store.postgres_server import postgres
from tests.upgrade.homes import HERE, unpack
from tests.upgrade.make import COMMITTED, IMAGE, SETTINGS, call, done

LOST = ("alive-process", "alive-namespace")  # ran when the server was killed, on a machine that is no longer there
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the fixture is the home of a server that ran as root")


@dataclass
class Opened:
    """A server on an unpacked home. first: each sandbox as the server reported it right after its start."""

    server: RunningServer
    manifest: dict[str, Any]
    findings: list[dict[str, Any]]
    first: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.server.url

    def key(self, name: str) -> str:
        return str(self.manifest["keys"][name])

    def box(self, name: str, key: str = "") -> Sandbox:
        key = key or self.manifest["owner_key"]
        return Sandbox(SandboxConfig(base_url=self.url, api_key=key)).attach(name)


def rock(home: Path, *words: str) -> tuple[int, str]:
    """Exit status and output of a command of the CLI."""
    ended = subprocess.run([sys.executable, "-m", "rock.cli.main", *words], capture_output=True, text=True, timeout=120,
                           env={**os.environ, **SETTINGS, "ROCK_HOME": str(home)})  # fmt: skip
    return ended.returncode, ended.stdout


def opened(name: str, home: Path, **environment: str) -> Iterator[Opened]:
    manifest = json.loads((HERE / f"{name}.json").read_text())
    unpack(HERE / f"{name}.tar.gz", home)
    findings = json.loads(rock(home, "doctor", "store", "--json")[1])["findings"]
    # The server starts five minutes after the fixture was written: a day later it deletes records of ended sandboxes.
    written = max(create["created_at"] for create in manifest["sandboxes"].values())
    clock = f"clock={written + 300 - time.time():.0f}"
    found = Opened(RunningServer(home, **SETTINGS, **environment, ROCK_FAULTS=clock), manifest, findings)
    found.server.start()
    try:
        found.first = first_look(found.url)
        yield found
    finally:
        found.server.stop()
    found.server.assert_clean(Inventory())


def first_look(url: str) -> dict[str, dict[str, Any]]:
    """Every sandbox by its id, once the worker has reported what it lost."""
    end = time.monotonic() + 60
    while True:
        states = "pending,running,stopping,stopped,archiving,archived,deleted"
        listed = done(url, "GET", f"/v1/sandboxes?limit=500&history=1&state={states}")["items"]
        first = {info["sandbox_id"]: info for info in listed}
        if all(first[lost]["state"] == "stopped" for lost in LOST):
            return first
        assert time.monotonic() < end, first
        time.sleep(0.05)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    home = tmp_path_factory.mktemp(f"upgraded-{request.param}")
    if request.param == "sqlite":
        yield from opened("sqlite", home)
        return
    asyncpg = pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install rock-sandbox[postgres]")
    with postgres() as database:  # skips with the reason where there is none
        url = database()

        async def fill() -> None:
            connection = await asyncpg.connect(url)
            try:
                await connection.execute((HERE / "postgres.sql").read_text())
            finally:
                await connection.close()

        asyncio.run(fill())
        yield from opened("postgres", home, ROCK_STORE=url)


def test_nothing_is_damaged(old: Opened) -> None:
    """`rock doctor store` looked at records, journals and output with their checksums, before the first start."""
    looked = {one["kind"]: one for one in old.findings}
    wrong = [one for one in old.findings if not one["ok"] and one["kind"] != "store"]
    assert not wrong
    assert looked["record"]["detail"] == "3 looked at"
    assert looked["journal"]["detail"] == "2 looked at"


def test_each_record_is_as_it_was(old: Opened) -> None:
    assert old.first.keys() == old.manifest["sandboxes"].keys()
    for name, before in old.manifest["sandboxes"].items():
        if name not in LOST:
            assert {key: value for key, value in old.first[name].items() if key in before} == before


def test_what_ran_is_lost_and_its_record_is_kept(old: Opened) -> None:
    changed = {"state", "is_alive", "version", "cause", "reason", "stopped_at", "auto_stop_at", "state_history",
               "last_activity_at", "error", "usage"}  # fmt: skip
    for name in LOST:
        before, now = old.manifest["sandboxes"][name], old.first[name]
        assert (before["state"], now["state"], now["cause"]) == ("running", "stopped", "lost")
        assert now["state_history"][: len(before["state_history"])] == before["state_history"]
        for key in before.keys() - changed:
            assert now[key] == before[key], (name, key)


def test_each_cause_is_reported(old: Opened) -> None:
    causes = {name: info["cause"] for name, info in old.first.items() if name.startswith("by-")}
    assert causes == {"by-user": "stopped_by_user", "by-idle": "idle", "by-deadline": "deadline", "by-exit": "exited",
                      "by-start": "start_failed", "by-loss": "lost"}  # fmt: skip


def test_records_are_found_by_what_they_are_listed_by(old: Opened) -> None:
    def ids(query: str) -> set[str]:
        return {info["sandbox_id"] for info in done(old.url, "GET", f"/v1/sandboxes?limit=500&{query}")["items"]}

    assert ids("label=case=by-user&state=stopped") == {"by-user"}
    assert ids("user_id=someone&state=stopped") == {"by-user"}
    assert ids("experiment_id=first&namespace=space&state=stopped") == {"by-user"}
    assert ids("label=case=group&state=stopped") == set(old.manifest["group"]["ids"])


def test_a_create_with_its_key_is_the_same_sandbox(old: Opened) -> None:
    for name, create in old.manifest["creates"].items():
        if name in old.manifest["sandboxes"]:
            again = done(old.url, "POST", "/v1/sandboxes", create["body"], create["key"], create["once"])
            assert (again["sandbox_id"], again["created_at"]) == (name, old.first[name]["created_at"])
    group = old.manifest["group"]
    again = done(old.url, "POST", "/v1/groups", group["body"], once=group["once"])
    assert [info["sandbox_id"] for info in again["sandboxes"]] == group["ids"]


def test_a_request_with_its_key_is_not_executed_again(old: Opened) -> None:
    """Its sandbox is lost, and so is the answer; the request neither starts a shell nor another sandbox."""
    for request in old.manifest["journal"]:
        status, answer = call(old.url, "POST", request["path"], request["body"], once=request["once"])
        assert (status, answer["error"]["code"]) == (410, "lost"), request["path"]


def test_keys_and_their_scopes(old: Opened) -> None:
    assert done(old.url, "GET", "/v1/keys")["items"] == old.manifest["key_infos"]
    assert call(old.url, "GET", "/v1/sandboxes", key=old.key("revoked"))[0] == 401
    seen = done(old.url, "GET", "/v1/sandboxes?state=stopped,running", key=old.key("reader"))["items"]
    assert [info["sandbox_id"] for info in seen] == ["alpha-retained"]
    status, answer = call(old.url, "POST", "/v1/sandboxes", {"image": IMAGE}, old.key("reader"))
    assert (status, answer["error"]["code"]) == (403, "forbidden")


def test_a_quota_of_creates_holds(old: Opened) -> None:
    status, answer = call(old.url, "POST", "/v1/sandboxes", {"image": IMAGE}, old.key("beta"))
    assert (status, answer["error"]["code"]) == (429, "quota_exceeded")


def test_a_retained_sandbox_is_restarted_within_its_quota(old: Opened) -> None:
    key = old.key("alpha")
    box = old.box("alpha-retained", key)
    box.restart()
    check_files(old, box, "alpha-retained")
    body = {"image": IMAGE, "memory": "64m", "cpus": 0.5}
    status, answer = call(old.url, "POST", "/v1/sandboxes?wait=60", body, key)
    assert (status, answer["error"]["code"]) == (429, "quota_exceeded")  # one sandbox at once
    box.stop()
    box.delete()


def test_an_archived_sandbox_is_restored(old: Opened) -> None:
    box = old.box("archived")
    box.restart()
    check_files(old, box, "archived")
    box.stop()
    box.delete()


def check_files(old: Opened, box: Sandbox, name: str) -> None:
    for path, text in old.manifest["files"][name].items():
        assert box.read_file(path).content == text


def test_images_are_listed_and_used(old: Opened) -> None:
    status, listed = rock(old.server.home, "image", "ls")
    assert status == 0 and IMAGE in listed and COMMITTED in listed
    for image, path, text in ((IMAGE, "/etc/motd", "from the image\n"), (COMMITTED, "/etc/motd", "changed\n"),
                              (COMMITTED, "/work/note.txt", "written in archived\n")):  # fmt: skip
        with Sandbox(SandboxConfig(base_url=old.url, api_key=old.manifest["owner_key"], image=image, memory="64m",
                                   runtime="namespace")) as box:  # fmt: skip
            assert box.read_file(path).content == text


def test_a_registered_environment_is_known(old: Opened) -> None:
    before = old.manifest["environment"]
    now = done(old.url, "GET", f"/v1/envs/about?id={before['id']}")
    chosen = ("image", "requirements")  # by this version: games have a package set of their own
    assert {key: now[key] for key in before if key not in chosen} == \
        {key: value for key, value in before.items() if key not in chosen}  # fmt: skip
    assert now["versions"] == before["versions"] and now["image"] == "rock.local/env/gem-games"
    assert "kept over an upgrade" in json.dumps(done(old.url, "GET", "/v1/envs")["items"])


def test_new_sandboxes_are_made(old: Opened) -> None:
    config = SandboxConfig(base_url=old.url, api_key=old.manifest["owner_key"], image="host", memory="64m",
                           runtime="process")  # fmt: skip
    with Sandbox(config) as box:
        assert box.arun("echo new; (exit 3)").exit_code == 3
