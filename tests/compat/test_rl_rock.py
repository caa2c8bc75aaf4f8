"""ROCK's own client, as it comes from PyPI, against our server: nothing is changed but the address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rl_rock import NEWEST, RlRock
from tests.conftest import IMAGE, RunningServer
from tests.e2e.test_images import small_root
from tests.envhub_process import envhub
from tests.image.registries import USER, docker_registry

from rock.images.store import ImageStore

MIDDLE, OLDEST = "1.4.8", "1.0.0"
ALL = (NEWEST, MIDDLE, OLDEST)

pytestmark = [pytest.mark.compat, pytest.mark.timeout(1200)]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(params=ALL)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(rl_rock: Callable[[str], RlRock], server: RunningServer, version: str, tmp_path: Path) -> Run:
    """Runs a case of client_script.py with the client of this version."""

    def work(case: str) -> dict[str, Any]:
        return rl_rock(version).run(case, server.url, tmp_path)

    return work


def test_life(run: Run) -> None:
    seen = run("life")
    assert seen["started"] < 2.5  # the client sleeps for three seconds when its first look finds nothing
    assert seen["alive"] and seen["status"] == [True, seen["id"]] and all(seen["host"])
    assert seen["image"] == IMAGE and seen["free_port"]
    assert seen["user"] == ["u1", "e1"]
    assert f"Sandbox {seen['id']} not found" in seen["after"][1]
    assert f"sandbox {seen['id']} not started" in seen["run_after"][1]


def test_sessions(run: Run) -> None:
    seen = run("sessions")
    assert seen["created"] == ["", "", ""] and seen["env"] == "me"
    assert seen["kept"] == ["5 /tmp", 0] and seen["codes"] == [3, None]
    assert seen["failed"][0] == seen["missing"][0] == "Exception"
    assert "failed with exit code 1" in seen["failed"][1] and "why" in seen["failed"][1]
    assert "exit code 127" in seen["unknown"][1]
    assert "Error (exit code 2) while checking bash command" in seen["syntax"][1]
    assert "/bin/bash: line 1: " in seen["syntax"][1]
    assert "session 'zz' does not exist" in seen["missing"][1]
    assert seen["lines"] == ["1", "2", "3"]


@pytest.mark.usefixtures("whole")
def test_a_slow_command(run: Run) -> None:
    seen = run("slow")
    assert seen["told"] == "ReadTimeout" and seen["after"] == "in step" and seen["waited"] < 10


@pytest.mark.usefixtures("whole")
def test_nohup(run: Run) -> None:
    seen = run("nohup")
    assert sorted(seen["plain"][0].split()) == ["one", "two"] and seen["plain"][1] == 0
    assert seen["limited"].split() == ["1", "2", "3", "4"]
    assert "Status: completed" in seen["ignored"]
    assert "no-such-program" in seen["missing"][0] and seen["missing"][1] == 0
    assert seen["syntax"][1] == 1 and "syntax error" in seen["syntax"][0]
    assert seen["late"][:2] == ["early", 1] and "did not complete" in seen["late"][2]


def test_execute(run: Run) -> None:
    seen = run("execute")
    assert seen["seen"] == ["out\n/tmp\nb\n", "err\n", 4]
    assert seen["missing"][0] == -1 and "no-such-program" in seen["missing"][1] and seen["late"] == -1


def test_files(run: Run) -> None:
    seen = run("files")
    assert seen["wrote"] and seen["read"] and seen["missing"] == "" and seen["refused"] is False
    assert seen["uploads"] == [True, True, False, False] and seen["same"] == [True, True]
    assert seen["lines"].split() == ["héllo", "héllo"]


def test_group(run: Run) -> None:
    assert run("group") == {"seen": ["0\n", "1\n", "2\n", "3\n"], "ids": 4}


def test_each_call_in_a_loop_of_its_own(run: Run) -> None:
    assert run("loops")["kept"] == "1"


def test_envhub(run: Run) -> None:
    assert run("envhub") == {
        "same": True, "spec": {"n": [1]}, "listed": ["maze"], "deleted": [True, False], "told": True, "status": "ok",
    }  # fmt: skip


@pytest.mark.parametrize("version", [NEWEST])
def test_an_envhub_of_its_own(rl_rock: Callable[[str], RlRock], version: str, tmp_path: Path) -> None:
    with envhub(tmp_path, "--db-url", "sqlite:///envs.db") as url:
        seen = rl_rock(version).run("envhub", url, tmp_path)
    assert seen["same"] and seen["listed"] == ["maze"] and seen["deleted"] == [True, False] and seen["told"]


@pytest.mark.usefixtures("whole")
def test_gem(rl_rock: Callable[[str], RlRock], env_server: RunningServer, version: str, tmp_path: Path) -> None:
    seen = rl_rock(version).run("gem", env_server.url, tmp_path, 1100)
    assert seen["same"] and "Sokoban" in seen["text"]
    observation, reward, terminated, truncated, info = seen["step"]
    assert observation and isinstance(reward, float) and (terminated, truncated) == (False, False) and info["suffix"]
    assert "game:Nothing-v0" in seen["told"]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("version", [NEWEST], indirect=True)
def test_what_came_later(run: Run) -> None:
    seen = run("newer")
    assert seen["alone"] == "42"
    assert "Output file: /tmp/new/out.txt" in seen["kept"][0] and seen["kept"][1] == "1\n2\n3\n"
    assert seen["script"] == ["from a script", 0]
    assert seen["tree"] == [0, "content"]
    assert seen["rights"] == [True, True, True, "700 agent"]
    assert "session 's' does not exist" in seen["closed"][1]


@pytest.mark.parametrize("version", [NEWEST], indirect=True)
def test_errors(run: Run) -> None:
    seen = run("errors")
    kinds = {name: seen[name][0] for name in ("running", "restart", "archive", "image", "memory", "twice")}
    assert kinds == {
        "running": "BadRequestRockError", "restart": "BadRequestRockError", "archive": "BadRequestRockError",
        "image": "InternalServerRockError", "memory": "BadRequestRockError", "twice": "BadRequestRockError",
    }  # fmt: skip
    for name, text in (("running", "must be stopped"), ("restart", "current state is"), ("archive", "current state is"),
                       ("commit", "STATUS_NOT_FOUND"), ("image", "no/such:image"),
                       ("memory", "Invalid memory size: abc"), ("twice", "already exists")):  # fmt: skip
        assert text in seen[name][1], (name, seen[name])
    assert seen["attached"] == "here"
    assert seen["state"] == "deleted" and "not found" in seen["after"][1]


@pytest.mark.parametrize("version", [NEWEST], indirect=True)
def test_commit(run: Run, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(server.home / "images")
    store.import_any(small_root(tmp_path / "root"), "team/base:1")
    folder = tmp_path / "registry"
    folder.mkdir()
    with docker_registry(folder, login=True) as address:
        tag = f"{address}/team/made:1"
        monkeypatch.setenv("TEST_COMMIT", f"team/base:1 {tag} {USER.username} {USER.password}")
        seen = run("commit")
        assert seen["done"] == ["SUCCEEDED", tag, 0] and seen["same"] and seen["read"] == "from a commit\n"
        assert seen["wrong"] == ["FAILED", "login", "LOGIN_FAILED", True] and seen["local"] == "SUCCEEDED"
        assert ImageStore(tmp_path / "other").pull(tag, USER).layers
    for name in (tag, "team/base:1", "team/local:1"):
        store.remove(name)


@pytest.mark.parametrize("version", [MIDDLE, OLDEST], indirect=True)
def test_commit_of_older_clients(run: Run, server: RunningServer) -> None:
    assert run("commit_old")["seen"] == "CommandResponse"
    store = ImageStore(server.home / "images")
    if store.has("team/old:1"):  # else its sandbox was stopped before it was made
        store.remove("team/old:1")


@pytest.mark.parametrize("version", [NEWEST], indirect=True)
def test_kept_files(run: Run) -> None:
    seen = run("kept")
    assert (seen["stopped"], seen["restarted"], seen["restored"]) == ("stopped", "kept\n", "kept\n")
    assert "not found" in seen["after"][1]
