"""Sources of a hub, `hf://org/repo@rev`, from a real git server; some of its repositories mean harm."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="install the development extra: pip install -e .[dev]")
if shutil.which("git") is None:
    pytest.skip("git is not installed", allow_module_level=True)

from git_server import Hub, serve
from tests.conftest import RunningServer

from rock import errors
from rock.gym import SandboxEnv, SandboxVectorEnv, hub
from rock.gym.arguments import Arguments
from rock.gym.source import Source, find

pytestmark = pytest.mark.timeout(1200)  # the first run installs gymnasium for the sandboxes

ENV = """
import gymnasium as gym
import numpy as np
from parts.answer import ANSWER

class Env(gym.Env):
    def __init__(self, answer):
        self.observation_space = gym.spaces.Box(-100, 100, (1,), np.float64)
        self.action_space = gym.spaces.Discrete(2)
        self.answer = answer

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([self.answer]), {}

    def step(self, action):
        return np.array([self.answer]), 0.0, False, False, {}

def make_env(n_envs=None, plus=0, config=None):
    more = (config or {}).get("plus", 0) + plus
    kinds = {"one": lambda: Env(ANSWER + more), "two": lambda: Env(2.0)}
    if n_envs is not None:
        return {"suite": {name: gym.vector.SyncVectorEnv([kind] * n_envs) for name, kind in kinds.items()}}
    return {"suite": {name: kind() for name, kind in kinds.items()}}
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub")) as made:
        yield made


@pytest.fixture
def git_hub(repositories: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_ENDPOINT", repositories.url + "/")
    before = set(glob.glob(f"{tempfile.gettempdir()}/rock-hub-*"))
    yield repositories
    assert set(glob.glob(f"{tempfile.gettempdir()}/rock-hub-*")) <= before, "nothing is left of what was fetched"


def found(source: str, **options: object) -> Source:
    return find(Arguments(source, {}, **{"trust_remote_code": True, "allow_unpinned_hf": True, **options}))  # type: ignore[arg-type]


def answer_of(source: Source) -> str | None:
    assert source.files is not None
    return source.files.text_of("parts/answer.py", 100)


def test_it_is_played(env_server: RunningServer, git_hub: Hub) -> None:
    commit = git_hub.commit("org/played", {"env.py": ENV, "parts/answer.py": "ANSWER = 41.0\n"})
    source = f"hf://org/played@{commit}:suite/one"
    with SandboxEnv(source, trust_remote_code=True, base_url=env_server.url, plus=1) as env:
        assert env.reset()[0].tolist() == [42.0]
        assert env.sandbox.requested_source == env.source == source == env.sandbox.resolved_source
    envs = SandboxVectorEnv(f"hf://org/played@{commit}", 2, task="suite/two", trust_remote_code=True,
                            base_url=env_server.url)  # fmt: skip
    assert envs.reset()[0].tolist() == [[2.0], [2.0]]
    envs.close()
    with pytest.raises(errors.EnvironmentRaised, match="there are one, two"):
        SandboxEnv(f"hf://org/played@{commit}", trust_remote_code=True, base_url=env_server.url)


def test_revisions(git_hub: Hub) -> None:
    files: dict[str, str | bytes | Path] = {"env.py": ENV, "parts/answer.py": "1"}
    first = git_hub.commit("org/many", files)
    git_hub.git("org/many", "tag", "-a", "v1", "-m", "x")
    git_hub.git("org/many", "branch", "feature/x")
    second = git_hub.commit("org/many", {"parts/answer.py": "2"})
    git_hub.git("org/many", "branch", "v1")  # a tag comes before a branch of its name
    for revision, commit, text in (("@v1", first, "1"), ("@feature/x", first, "1"), ("@main", second, "2"),
                                   ("", second, "2"), (f"@{first}", first, "1")):  # fmt: skip
        source = found(f"hf://org/many{revision}:a")
        assert (source.resolved, answer_of(source), source.task) == (f"hf://org/many@{commit}:a", text, "a")


def test_what_is_agreed_on(git_hub: Hub) -> None:
    source = f"hf://org/none@{'0' * 40}"
    with pytest.raises(errors.InvalidConfig, match="trust_remote_code=True"):
        found(source, trust_remote_code=False)
    asked = len(git_hub.asked)
    for revision in ("", "@main", "@0123abc"):
        with pytest.raises(errors.InvalidConfig, match="40 digits of a commit, or pass allow_unpinned_hf=True"):
            found(f"hf://org/none{revision}", allow_unpinned_hf=False)
    assert len(git_hub.asked) == asked, "nobody was asked"
    with pytest.raises(errors.NotFound, match="no public repository"):
        found(source, allow_unpinned_hf=False)


@pytest.mark.parametrize(
    "rest",
    ["org", "org/", "/repo", "org/repo/more", "-org/repo", "org/..", "org/a..b", "org/repo.git", "org/re po",
     "org/repo@", "org/repo@--upload-pack=x", "org/repo@a..b", "org/repo@refs/*", "org/repo@a b", "org/repo@a^{}",
     "org/repo@a\n", "org/repo:", "o" * 97 + "/r", "org/repo@" + "a" * 300, "org/\u0440epo", "org/repo@x.lock"],
)  # fmt: skip
def test_names_that_are_none(git_hub: Hub, rest: str) -> None:
    asked = len(git_hub.asked)
    with pytest.raises(errors.InvalidConfig):
        found(f"hf://{rest}")
    assert len(git_hub.asked) == asked


def test_what_is_not_there(git_hub: Hub) -> None:
    git_hub.commit("org/short", {"README": "x"})
    for revision, what in ((f"@{'1' * 40}", "no such commit"), ("@none", "no tag or branch 'none'")):
        with pytest.raises(errors.NotFound, match=what):
            found(f"hf://org/short{revision}")
    with pytest.raises(errors.InvalidConfig, match=r"no env\.py"):
        found("hf://org/short@main")


def test_arguments(git_hub: Hub, tmp_path: Path) -> None:
    git_hub.commit("org/deep", {"envs/a/env.py": ENV, "requirements.txt": "ale-py>=0.11  # x\n\n# y\n"})
    source = found("hf://org/deep@main", cwd="envs/a", packages=["pandas"])
    assert (source.folder, source.root) == ("/tmp/rock-environment/envs/a", "/tmp/rock-environment")
    assert source.packages == ("pandas", "ale-py>=0.11")
    (tmp_path / "envs/a").mkdir(parents=True)
    (tmp_path / "envs/a/env.py").write_text("other\n")
    laid = found("hf://org/deep@main", cwd="envs/a", override=tmp_path)
    assert laid.files is not None and laid.files.text_of("envs/a/env.py", 100) == "other\n"
    for more in ({"cwd": "../x"}, {"cwd": "/envs"}, {"repo_root": "/"},
                 {"override": tmp_path / "none", "cwd": "envs/a"}, {"base_image": "x", "packages": ["y"]},
                 {"task": "a", "cwd": "none"}):  # fmt: skip
        with pytest.raises(errors.InvalidConfig):
            found("hf://org/deep@main", **more)
    with pytest.raises(errors.InvalidConfig, match="give one of them"):
        found("hf://org/deep@main:a", task="b")


# ---- repositories that mean harm


def test_a_link_is_not_followed(git_hub: Hub) -> None:
    git_hub.commit("evil/link", {"env.py": Path("/etc/passwd")})
    with pytest.raises(errors.InvalidConfig, match=r"env\.py in hf://evil/link is a link"):
        found("hf://evil/link@main")
    git_hub.commit("evil/words", {"env.py": ENV, "requirements.txt": Path("/etc/passwd")})
    with pytest.raises(errors.InvalidConfig, match=r"requirements\.txt in hf://evil/words is a link"):
        found("hf://evil/words@main")


def test_options_of_pip_are_none(git_hub: Hub, env_server: RunningServer) -> None:
    git_hub.commit("evil/pip", {"env.py": ENV, "requirements.txt": "--index-url=http://127.0.0.1:1/\n"})
    with pytest.raises(errors.InvalidConfig, match="not a package name with versions"):
        SandboxEnv("hf://evil/pip", trust_remote_code=True, allow_unpinned_hf=True, base_url=env_server.url)


def test_large_files(git_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    large = git_hub.folder / "evil/large"
    git_hub.commit("evil/large", {"env.py": ENV})
    with open(large / "zeros", "wb") as file:
        file.truncate(200 << 20)  # which packs into almost nothing
    git_hub.commit("evil/large", {})
    with pytest.raises(errors.InvalidConfig, match="larger than 64 MiB"):
        found("hf://evil/large@main")
    monkeypatch.setattr(hub, "_LARGEST_PACK", 1 << 20)
    git_hub.commit("evil/noise", {"env.py": ENV, "noise": os.urandom(3 << 20)})
    with pytest.raises(errors.InvalidConfig, match="larger than 64 MiB"):
        found("hf://evil/noise@main")


def test_submodules_are_left_out(git_hub: Hub) -> None:
    modules = f'[submodule "sub"]\n\tpath = sub\n\turl = {git_hub.url}/evil/other\n'
    commit = git_hub.commit("evil/sub", {"env.py": ENV, ".gitmodules": modules})
    git_hub.git("evil/sub", "update-index", "--add", "--cacheinfo", f"160000,{commit},sub")
    git_hub.git("evil/sub", "commit", "--quiet", "-m", "x")
    assert found("hf://evil/sub@main").files is not None
    assert not any("other" in path for path in git_hub.asked)


def test_nothing_of_a_user_s_configuration_takes_part(git_hub: Hub, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    mark = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    (tmp_path / ".gitconfig").write_text(
        f'[filter "evil"]\n\tsmudge = {program}\n[credential]\n\thelper = !{program}\n'
        f'[tar "tar"]\n\tcommand = {program}\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / ".gitconfig"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    git_hub.commit("evil/filter", {"env.py": ENV, ".gitattributes": "* filter=evil\n", "parts/answer.py": "7"})
    assert answer_of(found("hf://evil/filter@main")) == "7"
    assert not mark.exists()


# ---- when it cannot be fetched


def test_without_git(git_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.Unsupported, match=r"not installed here.*install git"):
        found("hf://org/any")


def test_endpoints(git_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("file:///tmp", "ssh://x", "https://", "http://x y", "ext::sh -c x", "http://x/?y"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(errors.InvalidConfig, match="HF_ENDPOINT"):
            found("hf://org/any")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(errors.Unavailable, match="cannot be fetched"):
        found("hf://org/any")


def test_a_hub_that_says_nothing(git_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(errors.Unavailable, match="longer than 1 seconds"):
            found("hf://org/any")
