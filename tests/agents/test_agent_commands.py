"""`rock agent add|ls|show|rm|run`, as processes next to a server with the same home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.sync import Client
from tests.agents.scripted_model import COMPLETION, FINAL, KEY, PROMPT, ScriptedModel
from tests.agents.test_agents import COMMAND, SCRIPTED
from tests.conftest import RunningServer, hosting

SNAKE = 'name = "snake"\ncommand = "snake ${prompt}"\n[packages]\npython = ">=3.10"\n' \
        '[bin]\nsnake = "python/bin/python3"\n'  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    images = tmp_path_factory.mktemp("images")
    with hosting(tmp_path_factory.mktemp("home"), images) as running:
        yield running


def rock(server: RunningServer, *words: str, status: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command."""
    done = subprocess.run([sys.executable, "-m", "rock.cli.main", "agent", *words], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "ROCK_HOME": str(server.home),
                                            "ROCK_BASE_URL": server.url})  # fmt: skip
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return done.stdout, done.stderr


def rows(server: RunningServer) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(rock(server, "ls", "--json")[0])}


def test_recipes_and_layers(commands: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "snake.toml").write_text(SNAKE)
    before = rows(commands)
    assert {"claude-code", "codex", "mini-swe-agent", "swe-agent"} <= set(before) and "snake" not in before
    assert rock(commands, "show", "codex")[0].startswith('name = "codex"')
    assert json.loads(rock(commands, "show", "codex", "--json")[0])["dialect"] == "openai-responses"
    assert "snake  " in rock(commands, "add", str(tmp_path / "snake.toml"), "--python", sys.executable)[0]
    added = rows(commands)["snake"]
    assert added["installed"] and added["own"] and added["size"] > 1_000_000
    assert "snake" in rock(commands, "ls")[0] and rock(commands, "show", "snake")[0].strip() == SNAKE.strip()
    assert "freed" in rock(commands, "rm", "snake")[0]
    assert not rows(commands).get("snake", {}).get("installed")
    (tmp_path / "bad.toml").write_text("name = 1")
    for words in (("add", "absent"), ("show", "absent"), ("rm", "absent"), ("add", str(tmp_path / "bad.toml")),
                  ("add", str(tmp_path / "none.toml")), ("run", "absent", "x", "--upstream", "u")):  # fmt: skip
        _, stderr = rock(commands, *words, status=1)
        assert "Traceback" not in stderr and stderr.strip(), words


def test_a_run(commands: RunningServer, tmp_path: Path) -> None:
    """In a new sandbox, with a budget; the exit status is that of the agent."""
    file = tmp_path / "scripted.toml"
    file.write_text(SCRIPTED.text)
    rock(commands, "add", str(file))
    with ScriptedModel(COMMAND) as model, Client(commands.url) as client:
        client.upstreams.put("scripted", model.url, key=KEY)
        options = ("--image", "host", "--upstream", "scripted", "--memory", "1g", "--cwd", "/tmp")
        out, _ = rock(commands, "run", str(file), "write the file", *options, "--json")
        found = json.loads(out)
        assert (found["exit_code"], found["text"], found["calls"]) == (0, FINAL, 2)
        assert (found["input_tokens"], found["output_tokens"]) == (2 * PROMPT, 2 * COMPLETION)
        assert client.runs.get(found["run"]).info.state == "ended"
        out, stderr = rock(commands, "run", str(file), "p", *options)
        assert out.strip() == FINAL and "2 calls" in stderr and KEY not in out + stderr
        _, stderr = rock(commands, "run", str(file), "p", *options, "--calls", "1", status=1)
        assert "budget" in stderr
        _, stderr = rock(commands, "run", str(file), "p", "--image", "host", "--upstream", "absent", status=1)
        assert "absent" in stderr
        assert not client.list_sandboxes(state="running")
        client.upstreams.delete("scripted")
