"""Code blocks in README and docs are run, in the environment that their page describes.

The words after the language of a block:

    python            a script; a server runs
    sh                a shell script with `rock` on the PATH, a home of its own and the extra `server`
    env               the server of a python block can host environments
    EXTRA             `server`, `gym`: the block needs this extra; the text above it names it
    pytest            the block needs pytest; the text above it names it
    continued         a part of the same script as the sh block before it
    cli, volume       skipped while the command line has no `rock inspect`, no `rock volume`
    file, run         used by another test

By default the modules that the base installation and these extras do not bring are hidden (tests/hiding).
ROCK_TEST_DOCS_INSTALL=1 installs the package into a virtual environment for each set of extras instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from tools import settings_reference

from tests.conftest import RunningServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)
EXTRAS = {"server", "gym"}
WORDS = EXTRAS | {"env", "pytest", "continued", "cli", "volume", "file", "run"}
INSTALL = bool(os.environ.get("ROCK_TEST_DOCS_INSTALL"))
ALWAYS = {"pip", "setuptools", "rock"}


def _blocks() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(*match.groups(), id=f"{page.relative_to(ROOT)}:{line}")


BLOCKS = list(_blocks())


def _scripts() -> Iterator[Any]:
    """The sh blocks; continued ones are joined to the one before."""
    scripts: list[tuple[str, list[tuple[set[str], str]]]] = []
    for block in BLOCKS:
        kind, words, code = block.values
        if kind == "sh":
            if "continued" in words.split():
                scripts[-1][1].append((set(words.split()), code))
            else:
                scripts.append((block.id, [(set(words.split()), code)]))
    for name, parts in scripts:
        yield pytest.param(parts, id=name)


def test_there_are_blocks() -> None:
    kinds = [block.values[0] for block in BLOCKS]
    assert kinds.count("python") >= 4 and kinds.count("sh") >= 1
    assert set(kinds) <= {"python", "sh", "text"}
    for block in BLOCKS:
        words = block.values[1]
        assert "file" in words.split() or set(words.split()) <= WORDS, block.id


def test_every_public_name_has_a_docstring() -> None:
    """The classes and functions of `rock` and `rock.sdk`, with their public methods; the reference lists them."""
    import inspect

    import rock
    import rock.sdk

    names = {name: getattr(rock, name) for name in rock.__all__} | {
        name: getattr(rock.sdk, name) for name in rock.sdk.__all__}  # fmt: skip
    missing = []
    for name, found in names.items():
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            continue
        members = inspect.getmembers(found) if inspect.isclass(found) else []
        own = [(member, value.fget if isinstance(value, property) else value) for member, value in members]
        public = [(f"{name}.{member}", value) for member, value in own if not member.startswith("_")
                  and inspect.isfunction(value) and value.__module__.startswith("rock")]  # fmt: skip
        missing += [label for label, value in [(name, found), *public] if not inspect.getdoc(value)]
    assert missing == []


def test_the_figures_of_the_report_are_those_of_its_data() -> None:
    done = subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extras_are_named_above_their_blocks() -> None:
    """A reader sees what to install before the block that needs it."""
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match[1] != "python":
                continue
            for word in set(match[2].split()) & {*EXTRAS, "pytest"}:
                name = "pip install pytest" if word == "pytest" else f"rock-sandbox[{word}]"
                assert name in text[: match.start()].replace("\n", " "), f"{page.name}: {name}"


@cache
def _hidden(extras: frozenset[str]) -> str:
    """The installed top-level modules that the base installation with these extras does not bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras & set(project["optional-dependencies"]):
        wanted += project["optional-dependencies"][extra]
    if "pytest" in extras:
        wanted.append("pytest")
    found: set[str] = set()
    queue = [(Requirement(text), {""}) for text in wanted]
    while queue:
        requirement, of = queue.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in of):
            continue
        if name in found:
            continue
        found.add(name)
        queue += [(Requirement(text), {"", *requirement.extras}) for text in metadata.requires(name) or ()]
    modules = metadata.packages_distributions()
    hidden = {
        module for module, owners in modules.items()
        if module not in ALWAYS and not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & found
    }  # fmt: skip
    return ",".join(sorted(hidden))


@pytest.fixture(scope="session")
def python_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[frozenset[str]], Path]:
    """The Python of an installation with these extras."""
    made: dict[frozenset[str], Path] = {}

    def find(extras: frozenset[str]) -> Path:
        if not INSTALL:
            return Path(sys.executable)
        if extras not in made:
            folder = tmp_path_factory.mktemp("installed")
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
            names = f"[{','.join(sorted(extras & EXTRAS))}]" if extras & EXTRAS else ""
            more = ["pytest"] if "pytest" in extras else []
            subprocess.run([folder / "bin" / "pip", "install", "-q", "-e", f"{ROOT}{names}", *more], check=True,
                           timeout=900)  # fmt: skip
            made[extras] = folder / "bin" / "python"
        return made[extras]

    return find


def _run(arguments: list[str], python: Path, extras: frozenset[str], **environment: str) -> None:
    path = f"{python.parent}:{os.environ['PATH']}"
    more = {} if INSTALL else {"PYTHONPATH": str(ROOT / "tests" / "hiding"), "ROCK_TEST_HIDDEN": _hidden(extras)}
    done = subprocess.run(arguments, env={**os.environ, "PATH": path, **more, **environment}, cwd=ROOT, text=True,
                          timeout=1100, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_hidden_modules_are_not_found(python_of: Callable[[frozenset[str]], Path]) -> None:
    base, server, gym = frozenset[str](), frozenset({"server"}), frozenset({"gym"})
    missing = "import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in sys.argv[1:]))"
    for extras, names in ((base, ["fastapi", "uvicorn", "numpy", "gymnasium", "pytest"]), (server, ["numpy", "pytest"]),
                          (gym, ["fastapi", "pytest"])):  # fmt: skip
        python = python_of(extras)
        _run([str(python), "-c", missing, *names], python, extras)
    _run([str(python_of(server)), "-c", "import fastapi, uvicorn, pydantic, orjson"], python_of(server), server)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "words", "code"), [b for b in BLOCKS if b.values[0] == "python"])
def test_python_block(
    request: pytest.FixtureRequest, kind: str, words: str, code: str, python_of: Callable[[frozenset[str]], Path]
) -> None:
    server: RunningServer = request.getfixturevalue("env_server" if "env" in words.split() else "server")
    extras = frozenset(words.split()) & {*EXTRAS, "pytest"}
    python = python_of(extras)
    _run([str(python), "-W", "error", "-c", code], python, extras, ROCK_BASE_URL=server.url)


@cache
def _has(command: str) -> bool:
    """Whether `rock` has a command."""
    done = subprocess.run([sys.executable, "-m", "rock.cli.main", command, "--help"], capture_output=True, timeout=60)
    return done.returncode == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parts", list(_scripts()))
def test_sh_block(
    tmp_path: Path, parts: list[tuple[set[str], str]], free_port: Callable[[], int],
    python_of: Callable[[frozenset[str]], Path],
) -> None:  # fmt: skip
    enabled = [code for words, code in parts
               if not ("cli" in words and not _has("inspect")) and not ("volume" in words and not _has("volume"))]
    if not enabled:
        pytest.skip("the command line has no such commands yet")
    port, extras = str(free_port()), frozenset({"server"})
    script = "\n".join(line for code in enabled for line in code.splitlines() if not line.startswith(". .venv"))
    if "rock admin start" in script:
        script = f"trap 'rock admin stop || :' EXIT\n{script}"
    _run(["sh", "-euxc", script], python_of(extras), extras, ROCK_HOME=str(tmp_path / "home"), ROCK_PORT=port,
         ROCK_BASE_URL=f"http://127.0.0.1:{port}")  # fmt: skip


def test_the_table_of_runtimes_is_what_they_declare() -> None:
    subprocess.run([sys.executable, "tools/runtimes.py", "--check"], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("tool", ["settings_reference", "errors_reference"])
def test_generated_references_are_current(tool: str) -> None:
    subprocess.run([sys.executable, f"tools/{tool}.py", "--check"], cwd=ROOT, check=True, timeout=300)


def test_the_configuration_reference_has_every_setting_of_a_server() -> None:
    page = settings_reference.PAGE.read_text()
    assert sorted(name for name in settings_reference.fields() if f"`{name}`" not in page) == []


def test_the_index_of_decisions_is_complete() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for page in folder.glob("0*.md"):
        title = page.read_text().splitlines()[0].lstrip("# ").partition(". ")[2]
        assert f"| {int(page.name[:4])} | [{title}]({page.name}) |" in index, page.name


def test_the_site_has_every_page() -> None:
    """`make docs` builds the site; decisions are below their index."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        if not name.startswith("decisions/0") and name != "README.md":
            assert f"- {name}\n" in navigation, name


def test_commands_in_pages_exist() -> None:
    """Each `rock COMMAND` in the guides is a command of the table."""
    from rock.cli.main import ENTRIES

    known = {entry.name for entry in ENTRIES}
    for page in [*(ROOT / "docs" / "guides").glob("*.md"), ROOT / "README.md", ROOT / "docs" / "comparisons.md"]:
        for name in re.findall(r"`rock ([a-z][a-z-]*)", page.read_text()):
            assert name in known, f"{page.name}: rock {name}"


def test_the_index_has_every_guide_and_reference() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [*(ROOT / "docs" / "guides").glob("*.md"), *(ROOT / "docs" / "reference").glob("*.md"),
             *(ROOT / "docs").glob("*.md")]  # fmt: skip
    for page in pages:
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"({name})" in index, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
