"""The console script `envhub`: the registry of environments as a process of its own, and the SDK's client of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.envhub_process import SCRIPT, envhub

from rock import errors
from rock.sdk.envhub.client import EnvHubClient as Asynchronous
from rock.sync.envhub.client import EnvHubClient, EnvHubClientConfig, EnvHubError


def client_of(url: str) -> EnvHubClient:
    return EnvHubClient(EnvHubClientConfig(base_url=url))


def test_environments_are_kept_in_the_file_that_was_named(tmp_path: Path) -> None:
    with envhub(tmp_path, "--db-url", "sqlite:///envs.db") as url:
        hub = client_of(url)
        assert hub.health_check() == {"status": "ok"}
        made = hub.register("maze", "a:1", owner="me", description="d", tags=["x", "y"], extra_spec={"n": [1]})
        assert (made.env_name, made.image, made.tags, made.extra_spec) == ("maze", "a:1", ["x", "y"], {"n": [1]})
        assert made.create_at and made.create_at == made.update_at
        hub.register("other", "b:1", owner="you")
        assert hub.get_env("maze") == made
        assert [env.env_name for env in hub.list_envs()] == ["EnvhubDefaultDockerImage", "maze", "other"]
        assert [env.env_name for env in hub.list_envs(owner="you")] == ["other"]
        assert [env.env_name for env in hub.list_envs(tags=["y", "z"])] == ["maze"]
    assert (tmp_path / "envs.db").exists()
    with envhub(tmp_path, "--db-url", f"sqlite:///{tmp_path}/envs.db") as url:
        hub = client_of(url)
        again = hub.register("maze", "a:2")
        assert (again.image, again.tags, again.create_at) == ("a:2", [], made.create_at)
        assert hub.delete_env("maze") is True and hub.delete_env("maze") is False
        with pytest.raises(EnvHubError, match=r"Failed to get environment maze: .*not registered"):
            hub.get_env("maze")


def test_the_asynchronous_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> list[str]:
        hub = Asynchronous()  # of ROCK_ENVHUB_BASE_URL
        await hub.register("a", "i")
        return [env.env_name for env in await hub.list_envs()]

    with envhub(tmp_path, ROCK_ENVHUB_DB_URL="sqlite:///by-variable.db") as url:
        monkeypatch.setenv("ROCK_ENVHUB_BASE_URL", url)
        assert asyncio.run(work()) == ["EnvhubDefaultDockerImage", "a"]
    assert (tmp_path / "by-variable.db").exists()


def test_every_server_is_a_registry_too(server: RunningServer) -> None:
    hub = client_of(server.url)
    hub.register("here", "i")
    assert hub.get_env("here").image == "i" and hub.delete_env("here")


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def post(url: str, body: bytes) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            assert json.loads(error.read())
            return int(error.code)

    monkeypatch.setenv("ROCK_API_KEY", "open sesame")
    with envhub(tmp_path) as url:
        assert client_of(url).list_envs()
        assert (tmp_path / "home" / "envhub.sqlite").exists()
        monkeypatch.delenv("ROCK_API_KEY")
        with pytest.raises(EnvHubError, match="API key") as told:
            client_of(url).list_envs()
        assert isinstance(told.value.__cause__, errors.Unauthorized)
    with envhub(tmp_path) as url:
        bodies = (b"", b"{", b"[]", b'{"env_name": ""}', b'{"env_name": 3, "image": "i"}', b'{"env_name": "x"}')
        assert {post(f"{url}/env/register", body) for body in bodies} == {422}
        assert post(f"{url}/v1/sandboxes", b"{}") == 404  # it is nothing else
        hub = client_of(url)
    with pytest.raises(EnvHubError, match="Failed to health check") as told:
        hub.health_check()
    assert isinstance(told.value.__cause__, errors.Unavailable)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "without an API key"),
        (["--db-url", "postgresql://db/envs"], "postgresql"),
        (["--db-url", "sqlite://"], "names no file"),
        (["--db-url", "sqlite:///:memory:"], "names no file"),
        (["--db-url", "sqlite:////proc/none/envs.db"], "catalogue"),
    ],
)
def test_one_that_cannot_start_says_why(tmp_path: Path, arguments: list[str], words: str) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "ROCK_API_KEY"} | {"ROCK_HOME": str(tmp_path)}
    done = subprocess.run(
        [*SCRIPT, "--port", "0", *arguments], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
