"""Backup, restore and `rock doctor store` of the gateway's folder, with a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rock.sync import Client
from tests.conftest import RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body

KEY = "sk-key-of-the-upstream"


def rock(home: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "rock.cli.main", *words], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "ROCK_HOME": str(home)})  # fmt: skip
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return done.stdout


def doctor(home: Path, *words: str, status: int = 0) -> list[dict[str, Any]]:
    found = json.loads(rock(home, "doctor", "store", "--json", *words, status=status))["findings"]
    return [one for one in found if not one["ok"]]


def test_a_backup_has_the_runs(
    own_server: Callable[..., RunningServer], upstream: FakeUpstream, tmp_path: Path
) -> None:
    """Runs, their secrets, rewards, calls and upstreams are as they were; an active run continues."""
    server, file = own_server(), tmp_path / "backup"
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url, key=KEY)
        ended, active = client.runs.create(upstream="fake"), client.runs.create(upstream="fake")
        where = [{"base_url": run.base_url, "api_key": run.api_key} for run in (ended, active)]
        assert chat(where[0], chat_body("a"))[0] == chat(where[1], chat_body("b"))[0] == 200
        ended.end(0.25)
        summary = json.loads(rock(server.home, "admin", "backup", str(file), "--json"))
        assert summary["runs"] == 2 and file.stat().st_mode & 0o777 == 0o600
        ended.delete()
        assert chat(where[1], chat_body("later"))[0] == 200
        client.upstreams.delete("fake")
    server.kill()
    rock(server.home, "admin", "restore", str(file), "--force")
    assert list(server.home.glob("gateway.replaced-*")) and (server.home / "gateway").stat().st_mode & 0o777 == 0o700
    assert {one["kind"] for one in doctor(server.home, status=1)} == {"identity"}  # until the next start
    server.start()
    with Client(server.url) as client:
        assert client.runs.get(ended.id).info.reward == 0.25
        assert [call.request for call in client.runs.get(ended.id).calls()] == [chat_body("a")]
        assert client.runs.get(active.id).info.counts.done == 1
        again = {"base_url": f"{server.url}/gateway", "api_key": active.api_key}
        assert chat(again, chat_body("b", "x", "c"))[0] == 200  # with the same secret, key and upstream
        assert upstream.seen()[-1]["headers"]["authorization"] == f"Bearer {KEY}"
        assert doctor(server.home) == []  # while the server works


def test_damage_is_found(own_server: Callable[..., RunningServer], upstream: FakeUpstream) -> None:
    server = own_server()
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url)
        runs = [client.runs.create(upstream="fake") for _ in range(3)]
        for run in runs:
            assert chat({"base_url": run.base_url, "api_key": run.api_key}, chat_body("a"))[0] == 200
            run.end(1.0)
    server.kill()
    folder = server.home / "gateway"
    torn, stateless, intact = (folder / "runs" / run.id for run in runs)
    with (torn / "calls").open("ab") as file:
        file.write(b"\0\0\0\x09torn")
    (stateless / "run.json").write_text("")  # as after a crash of the machine
    (folder / "upstreams.json").write_text("{")
    found = doctor(server.home, status=1)
    assert {(one["kind"], one["path"]) for one in found} == {
        ("gateway", str(torn / "calls")), ("gateway", str(stateless)), ("gateway", str(folder / "upstreams.json"))}
    assert "8 of " in next(one["detail"] for one in found if one["path"] == str(torn / "calls"))
    assert (stateless / "calls").exists()  # nothing was moved without --repair
    moved = [one["repaired"] for one in doctor(server.home, "--repair", status=1) if one["repaired"]]
    assert len(moved) == 2 and any((Path(path) / "calls").exists() for path in moved)
    server.start()
    with Client(server.url) as client:
        assert {run.id for run in client.runs.list()} == {torn.name, intact.name}
        assert [call.request for call in client.runs.get(torn.name).calls()] == [chat_body("a")]
