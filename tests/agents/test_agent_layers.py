"""Layers of agents: installed once, mounted read-only, with a Python of their own, and removed only when unused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rock.agents.recipe import Recipe, parse
from rock.errors import Conflict, ImageError, InvalidConfig, NotFound, Unsupported
from rock.images.agents import AgentLayers, suitable_python
from rock.images.store import ImageStore
from rock.sync import Sandbox, SandboxConfig
from tests.conftest import IMAGE, RunningServer, give_image
from tests.e2e.test_images import small_root
from tests.leaks import Inventory

# No packages of a registry: its layer is a copy of a Python of this machine.
SNAKE = parse('name = "snake"\ncommand = "snake ${prompt}"\n[packages]\npython = ">=3.10"\n'
              '[bin]\nsnake = "python/bin/python3"\ntool = "json.tool:main"\n')  # fmt: skip
NEVER = parse('name = "never"\ncommand = "never ${prompt}"\n[packages]\npython = ">3.90"\n')
UNNAMED = parse('name = "plain"\ncommand = "echo ${prompt}"\n')
SHARED = pytest.mark.skipif(os.geteuid() != 0, reason="a second image needs root")


@pytest.fixture(scope="module")
def snake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose owner has added the recipes; the layer of `snake` is installed."""
    running = RunningServer(tmp_path_factory.mktemp("agents"))
    give_image(running.home)
    layers = AgentLayers(running.home / "images" / "agents")
    for recipe in (SNAKE, NEVER, UNNAMED):
        layers.keep_recipe(recipe)
    layers.ensure(SNAKE)
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


def layers_of(server: RunningServer) -> AgentLayers:
    return AgentLayers(server.home / "images" / "agents")


def made(server: RunningServer, *agents: str, image: str = IMAGE, **more: object) -> Sandbox:
    return Sandbox(SandboxConfig(base_url=server.url, image=image, memory="512m", agents=list(agents), **more))


def test_an_agent_is_mounted_read_only(snake_server: RunningServer) -> None:
    with made(snake_server, "snake", "plain") as sandbox:
        code = "import sys, ssl, sqlite3, ctypes; print(sys.executable, sys.prefix)"
        program = "/opt/rock/agents/snake/bin/snake"
        seen = sandbox.exec([program, "-c", code], env={"PYTHONPATH": "/nothing"}, check=True)
        assert seen.stdout.split() == ["/opt/rock/agents/snake/python/bin/python3", "/opt/rock/agents/snake/python"]
        tool = sandbox.exec(["/opt/rock/agents/snake/bin/tool", "--compact"], stdin='{"a": [1]}')
        assert tool.stdout.strip() == '{"a":[1]}', tool.stderr
        for command in ("touch /opt/rock/agents/snake/x", "rm -rf /opt/rock/agents/snake/bin",
                        "mount -o remount,rw /opt/rock/agents/snake"):  # fmt: skip
            assert sandbox.exec(command).exit_code != 0
        assert sandbox.exec("ls -A /opt/rock/agents").stdout.split() == ["snake"]  # `plain` has no packages
    layer = layers_of(snake_server).find(SNAKE)
    assert layer is not None and (layer.tree / "bin" / "snake").exists()


@SHARED
def test_its_python_needs_nothing_of_the_image(snake_server: RunningServer, tmp_path: Path) -> None:
    """An image with a shell and its libraries, and no Python."""
    store = ImageStore(snake_server.home / "images")
    root = small_root(tmp_path / "root", "sh")
    if not (root / "bin" / "sh").exists():
        (root / "bin" / "sh").symlink_to("/usr/bin/sh")
    store.import_any(root, "team/small:1")
    shutil.rmtree(tmp_path / "root")
    try:
        with made(snake_server, "snake", image="team/small:1") as sandbox:
            assert sandbox.exec("ls /usr/bin").stdout.count("python") == 0
            code = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(6 * 7)'], " \
                   "capture_output=True, text=True).stdout)"  # fmt: skip
            seen = sandbox.exec(["/opt/rock/agents/snake/bin/snake", "-c", code])
            assert seen.stdout.split() == ["42"], seen.stderr
    finally:
        store.remove("team/small:1")


def test_a_used_agent_is_not_removed(snake_server: RunningServer) -> None:
    layers = layers_of(snake_server)
    with made(snake_server, "snake") as sandbox:
        with pytest.raises(Conflict, match="a sandbox uses agent snake"):
            layers.remove("snake")
        assert sandbox.exec(["/opt/rock/agents/snake/bin/snake", "-c", "print(1)"]).stdout == "1\n"
    with made(snake_server, "snake") as sandbox:  # it is still found
        assert sandbox.exec("ls /opt/rock/agents/snake/bin").stdout.split() == ["snake", "tool"]


def test_agents_are_refused_before_the_start(snake_server: RunningServer) -> None:
    for agents, kind, words in ((["absent"], InvalidConfig, "no recipe for agent 'absent'"),
                                (["never"], ImageError, "needs Python >3.90"),
                                (["snake", "snake"], InvalidConfig, "separate folders")):  # fmt: skip
        with pytest.raises(kind, match=words):
            made(snake_server, *agents).start()
    with pytest.raises(InvalidConfig):
        SandboxConfig(agents=["../x"])
    with pytest.raises(Unsupported, match="cannot mount volumes, folders and agents"):
        made(snake_server, "snake", runtime="fake").start()


def test_a_restart_has_the_agent_again(snake_server: RunningServer) -> None:
    sandbox = made(snake_server, "snake", auto_delete_seconds=600)
    sandbox.start()
    try:
        sandbox.stop()
        sandbox.restart()
        assert sandbox.exec(["/opt/rock/agents/snake/bin/snake", "-c", "print(1)"]).stdout == "1\n"
    finally:
        sandbox.delete()


def test_callers_share_one_installation(tmp_path: Path) -> None:
    layers, messages = AgentLayers(tmp_path), list[str]()
    threads = [threading.Thread(target=lambda: layers.ensure(SNAKE, messages.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert messages.count("compiling packages") == 1
    assert [(layer.name, layer.size > 10 << 20) for layer in layers.installed()] == [("snake", True)]
    assert layers.ensure(UNNAMED) is None
    assert layers.remove("snake") > 10 << 20 and not list(layers.installed())
    with pytest.raises(NotFound):
        layers.remove("snake")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locks"]


def test_an_interrupted_installation_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rock.images.agents import AgentLayers; "
        "from tests.agents.test_agent_layers import SNAKE; import os, signal; "
        "AgentLayers(Path(sys.argv[1])).ensure(SNAKE, lambda t: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert [path.name[:11] for path in tmp_path.glob(".new-*")] == [".new-snake-"]
    layers = AgentLayers(tmp_path)
    assert layers.find(SNAKE) is None and layers.ensure(SNAKE) is not None
    assert not list(tmp_path.glob(".new-*"))


def test_an_added_recipe_is_checked_when_it_is_used(tmp_path: Path) -> None:
    layers = AgentLayers(tmp_path)
    own = Recipe("codex", "echo ${prompt}", text='name = "codex"\ncommand = "echo ${prompt}"\n')
    layers.keep_recipe(own)
    assert layers.recipe("codex").command == "echo ${prompt}"
    (tmp_path / "recipes" / "codex.toml").write_text("name = ")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        layers.recipe("codex")
    layers.remove("codex")
    assert layers.recipe("codex").version  # ROCK's
    with pytest.raises(InvalidConfig, match="no recipe"):
        layers.recipe("../codex")


def test_a_failed_installation_names_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    layers = AgentLayers(tmp_path / "agents")
    recipe = parse('name = "gone"\ncommand = "x ${prompt}"\n[packages]\nnpm = ["left-pad@1.3.0"]\n')
    if shutil.which("npm") is None:
        with pytest.raises(ImageError, match="no npm"):
            layers.ensure(recipe)
    else:
        with pytest.raises(ImageError, match="installing agent gone failed: npm error"):
            layers.ensure(recipe)
    assert not list(layers.installed()) and not list((tmp_path / "agents").glob(".new-*"))


def test_the_versions_of_python() -> None:
    here = f"3.{sys.version_info.minor}"
    assert suitable_python(f"=={here}", sys.executable).short == here
    assert suitable_python(f">={here},<3.{sys.version_info.minor + 1}", sys.executable).short == here
    with pytest.raises(ImageError, match=f"needs Python <{here}"):
        suitable_python(f"<{here}", sys.executable)
    with pytest.raises(ImageError, match="/no/python"):
        suitable_python(">=3.10", "/no/python")


