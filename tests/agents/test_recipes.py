"""Recipes: the ones of ROCK, the format, values in commands and files, and results in outputs."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from rock.agents import RecipeError, builtin, load, names
from rock.agents.recipe import FORMATS, Log, parse
from rock.agents.results import Parsed
from rock.agents.results import parse as parse_log

MINIMAL = 'name = "own"\ncommand = "own ${prompt}"\n'
NASTY = """it's "quoted" $HOME `id` \\ new
line ${model}"""


@pytest.mark.parametrize("name", names())
def test_a_recipe_of_rock_is_complete(name: str) -> None:
    recipe = builtin(name)
    assert recipe is not None and recipe.name == name and recipe.about
    assert "${prompt}" in recipe.command and recipe.log.format in FORMATS
    program = recipe.command.split()[0]
    if recipe.packages:
        assert program in recipe.packages.bin
        assert all("==" in one or "@" in one or name in ("langgraph", "mini-swe-agent") for one in
                   (*recipe.packages.npm, *recipe.packages.pypi))  # fmt: skip
    said = json.dumps([recipe.command, dict(recipe.env), dict(recipe.files)])
    assert "${base_url}" in said and "${api_key}" in said


def test_there_is_a_recipe_for_each_agent() -> None:
    assert set(names()) == {"claude-code", "codex", "gemini-cli", "langgraph", "mini-swe-agent", "opencode",
                            "openhands", "qwen-code", "swe-agent"}  # fmt: skip


def test_values_are_quoted_for_the_shell_and_escaped_in_files() -> None:
    recipe = parse(MINIMAL.replace("own ${prompt}", "printf %s ${prompt}") + '[env]\nP = "x ${model}"\n'
                   "[files]\n\".c/a.json\" = '{\"k\": \"${api_key}\"}'\n")  # fmt: skip
    made = recipe.render(NASTY, base_url="http://h", api_key='k"\n', home="/h", model="m")
    done = subprocess.run(["sh", "-c", made.line], capture_output=True, text=True, check=True)
    assert done.stdout == NASTY
    assert made.env == {"HOME": "/h", "P": "x m"}
    assert {name: json.loads(text) for name, text in made.files.items()} == {"/h/.c/a.json": {"k": 'k"\n'}}
    assert shlex.quote(NASTY) in made.line


def test_the_programs_of_a_layer_come_first() -> None:
    recipe = builtin("qwen-code")
    assert recipe is not None
    made = recipe.render("p", base_url="http://127.0.0.1:9", api_key="k", home="/h", path="/usr/bin")
    assert made.env["PATH"] == "/opt/rock/agents/qwen-code/bin:/usr/bin"
    assert made.env["OPENAI_BASE_URL"] == "http://127.0.0.1:9/v1" and made.env["OPENAI_MODEL"] == recipe.model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'own'", "command"),
        (MINIMAL.replace("own\"", "Own\"", 1), "name"),
        (MINIMAL.replace("own\"", "../x\"", 1), "name"),
        (MINIMAL + "shell = 'x'", "no field 'shell'"),
        (MINIMAL + "dialect = 'smoke'", "dialect"),
        (MINIMAL + "timeout = 0", "timeout"),
        (MINIMAL + "timeout = true", "timeout"),
        (MINIMAL + "[env]\n'A=B' = 'x'", "env.A=B"),
        (MINIMAL + "[env]\nA = 1", "env"),
        (MINIMAL + "[env]\nA = '${secret}'", "${secret}"),
        (MINIMAL + "[files]\n'../a' = 'x'", "files.../a"),
        (MINIMAL + "[files]\n'/etc/passwd' = 'x'", "files./etc/passwd"),
        (MINIMAL + "[packages]\nnpm = ['x']", "packages.npm"),
        (MINIMAL + "[packages]\nnpm = ['https://h/x.tgz']", "packages.npm"),
        (MINIMAL + "[packages]\nnpm = ['--registry=http://h']", "packages.npm"),
        (MINIMAL + "[packages]\npypi = ['x @ https://h/x.whl']", "packages.pypi"),
        (MINIMAL + "[packages]\npypi = ['--index-url=http://h']", "packages.pypi"),
        (MINIMAL + "[packages]\npython = '3'", "packages.python"),
        (MINIMAL + "[bin]\na = 'b'", "bin"),
        (MINIMAL + "[packages]\npypi = ['x']\n[bin]\na = '../../etc/x'", "bin.a"),
        (MINIMAL + "[packages]\nnpm = ['x@1']\n[bin]\na = 'm:f'", "bin.a"),
        (MINIMAL + "[log]\nformat = 'xml'", "log.format"),
        (MINIMAL + "[log]\nfile = '../x'", "log.file"),
        ("name = ", "not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse(text, "own.toml")
    assert words in str(raised.value) and str(raised.value).startswith("own.toml")


def test_a_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_text(MINIMAL + "#" * (256 << 10))
    with pytest.raises(RecipeError, match="256 KiB"):
        load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        load(path)


def test_the_digest_changes_with_each_part_of_the_packages() -> None:
    texts = ["npm = ['x@1']", "npm = ['x@2']", "pypi = ['x==1']", "pypi = ['x==1']\npython = '>=3.12'",
             "pypi = ['x==1']\nbuild = ['x']"]  # fmt: skip
    digests = {parse(MINIMAL + "[packages]\n" + text).packages.digest for text in texts}
    assert len(digests) == len(texts)


JSON = Log("", "json", "result", "usage.input_tokens", "usage.output_tokens")
LINES = Log("", "jsonl", "item.text", "usage.input_tokens", "usage.output_tokens")


@pytest.mark.parametrize(
    ("log", "output", "parsed"),
    [
        (Log(), "  done\n", Parsed("done")),
        (Log(), "", Parsed()),
        (JSON, 'warning {\n{"result": "ok", "usage": {"input_tokens": 3, "output_tokens": 4}}', Parsed("ok", 3, 4)),
        (JSON, '{"result": 7, "usage": {"input_tokens": -1, "output_tokens": true}}', Parsed()),
        (JSON, "no JSON", Parsed()),
        (JSON, "{" * 100_000, Parsed()),
        (LINES, '{"item": {"text": "a"}}\nx\n{"usage": {"input_tokens": 1}}\n{"item": {"text": "b"}}\n{',
         Parsed("b", 1)),
        (Log("", "json", "m.-1.t"), '{"m": [{"t": "a"}, {"t": "b"}]}', Parsed("b")),
        (Log("", "json", "m.5.t"), '{"m": []}', Parsed()),
    ],
)
def test_the_result_in_an_output(log: Log, output: str, parsed: Parsed) -> None:
    assert parse_log(log, output) == parsed
