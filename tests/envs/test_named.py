"""Environments by names of one's own: added, shown, built and made, in versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")

from tests.conftest import RunningServer, hosting

import rock
from rock import errors
from rock.gym import SandboxEnv
from rock.protocol.env import AddEnv, BuildEnv
from rock.sync import Client

pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes


@pytest.fixture(scope="module")
def server_of_names(tmp_path_factory: pytest.TempPathFactory, env_images: Path) -> Iterator[RunningServer]:
    with hosting(tmp_path_factory.mktemp("names-home"), env_images) as running:
        yield running


@pytest.fixture
def names(server_of_names: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("ROCK_BASE_URL", server_of_names.url)
    with Client() as client:
        yield client


def rock_command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "rock.cli.main", *arguments], capture_output=True, text=True,
                          env=dict(os.environ))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_name_is_found(names: Client) -> None:
    assert names.add_env(AddEnv(name="team/Cart", source="CartPole-v1", description="a pole")).version == 1
    with SandboxEnv("team/Cart") as env, SandboxEnv("CartPole-v1") as other:
        assert env.reset(seed=1)[0].tolist() == other.reset(seed=1)[0].tolist()
        assert env.env_contract.id == "CartPole-v1"
        assert (env.sandbox.requested_source, env.sandbox.resolved_source) == ("team/Cart", "gym://CartPole-v1")
        assert env.sandbox_id == other.sandbox_id, "one package set, one sandbox"
    with rock.make("team/Cart") as plain:
        assert plain.reset(seed=1)[0].tolist() == [pytest.approx(value) for value in other_start()]
    row = next(item for item in names.list_envs() if item["id"] == "team/Cart")
    assert (row["protocol"], row["note"]) == ("gym", "a pole")


def other_start() -> list[float]:
    import gymnasium

    with gymnasium.make("CartPole-v1") as home:
        return [float(value) for value in home.reset(seed=1)[0]]


def test_versions(names: Client) -> None:
    request = AddEnv(name="versions", source="CartPole-v1")
    assert [names.add_env(request).version, names.add_env(request).version] == [1, 1]
    assert names.add_env(AddEnv(name="versions", source="Acrobot-v1")).version == 2
    about = names.about_env("versions")
    assert [one["source"] for one in about.versions] == ["CartPole-v1", "Acrobot-v1"]
    for name, found in (("versions", "Acrobot-v1"), ("versions@1", "CartPole-v1"), ("versions@2", "Acrobot-v1")):
        with SandboxEnv(name) as env:
            assert env.env_contract.id == found
    with pytest.raises(errors.NotFound, match=r"no version '7' \(there are 1, 2\)"):
        names.about_env("versions@7")


def test_what_cannot_be_added(names: Client) -> None:
    for name in ("game:Sokoban-v0-easy", "../x", "a/b/c", "x@1", ""):
        with pytest.raises(errors.InvalidConfig, match="name"):
            names.add_env(AddEnv.model_construct(name=name, source="CartPole-v1"))
    for source in ("/a/folder", "./x", "hf://org/repo@main", "hf://org/repo", "docker://x"):
        with pytest.raises(errors.InvalidConfig):
            names.add_env(AddEnv(name="wrong", source=source))
    with pytest.raises(errors.InvalidConfig, match="names no image"):
        names.build_env(BuildEnv(env_id="image:// "))
    with pytest.raises(errors.InvalidConfig, match="not a package name with versions"):
        names.add_env(AddEnv(name="wrong", source="CartPole-v1", packages=["--index-url=x"]))
    with pytest.raises(errors.NotFound, match="not found in registry"):
        names.add_env(AddEnv(name="wrong", source="game:Nothing"))
    with pytest.raises(errors.NotFound):
        names.about_env("wrong")
    with pytest.raises(errors.NotFound, match="wrong"):
        rock.make("wrong")


def test_a_name_that_another_client_wrote(names: Client, server_of_names: RunningServer) -> None:
    """ROCK's own registry takes any extra_spec: nothing in it is believed."""
    for number, spec in enumerate(({"versions": "x"}, {"versions": [{"source": 3}]}, {"versions": [[]]}, None)):
        body = json.dumps({"env_name": f"odd{number}", "image": "no/such:1", "extra_spec": spec}).encode()
        names.transport.call("POST", "/env/register", body)
        about = names.about_env(f"odd{number}")
        assert (about.image, about.version, about.is_ready) == ("no/such:1", None, False)
    assert names.list_envs()


def test_building_ahead(names: Client) -> None:
    about = names.build_env(BuildEnv(env_id="CartPole-v1"))
    assert about.is_ready and about.digest is not None and about.digest.startswith("sha256:")
    assert any(name.startswith("gymnasium ") for name in about.packages)
    assert any(requirement.startswith("gymnasium") for requirement in about.requirements)
    with pytest.raises(errors.NotFound):
        names.build_env(BuildEnv(env_id="game:Nothing"))


def test_the_commands(names: Client) -> None:
    told = rock_command("env", "add", "cli/Cart", "CartPole-v1", "--description", "by hand")
    assert told == "cli/Cart@1  CartPole-v1\n"
    image, digest = rock_command("env", "build", "cli/Cart").split()
    assert image == "rock.local/env/gym" and digest.startswith("sha256:")
    told = rock_command("env", "show", "cli/Cart")
    for text in ("CartPole-v1", "by hand", "kind=Box", "kind=Discrete", "gymnasium 1.", digest):
        assert text in told
    shown = json.loads(rock_command("env", "show", "game:Sokoban-v0", "--json"))
    assert (shown["id"], shown["protocol"], shown["aliases"]) == ("game:Sokoban-v0-easy", "gem", ["game:Sokoban-v0"])
    assert "cli/Cart" in rock_command("env", "list", "cli/")


def test_training_sets_are_environments_too(names: Client) -> None:
    rows = {row["id"]: row for row in names.list_envs()}
    assert rows["task:bfcl"]["protocol"] == "task" and "appworld download" in rows["task:appworld"]["note"]
    about = names.about_env("task:bfcl")
    assert about.id == "task:bfcl" and "mpmath==1.3.0" in about.requirements
    assert names.about_env("task:reasoning_gym").id == "task:reasoning-gym"
    assert names.build_env(BuildEnv(env_id="task:webshop")).is_ready
    with pytest.raises(errors.NotFound, match="no training set"):
        names.about_env("task:nothing-of-that-kind")
    with pytest.raises(errors.InvalidConfig, match="are its own"):
        names.build_env(BuildEnv(env_id="task:webshop", packages=["numpy"]))
