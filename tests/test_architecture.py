"""The names in docs/architecture.md exist.

- Each `path/file.py` on the page, in prose, tables and drawings, is a file of src/rock or of the repository; a path
  without its folder is one that some file ends with.
- Each `file.py::name` is a module-level name, a class's member (`file.py::Class.member`) or a method in that file.
- Each dotted name between backticks (`module.name`, `Class.member`, `rock.name`) is defined in src/rock, where its
  first part is a module, a class, or a variable called like a class (`sandbox.arun` for `Sandbox`).
- Each line of a drawing of folders begins with files and folders that are in the folder above it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rock"
PAGE = ROOT / "docs" / "architecture.md"
_FILE = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.(?:py|pyi|c))(?:::([\w.]+))?(?![\w/])")
_DOTTED = re.compile(r"`(?:await )?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
_FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
ENTRY_POINTS = {"rock.runtimes"}
_SUFFIXES = ("py", "pyi", "c", "md", "json", "toml", "sqlite", "svg")
Problem = tuple[int, str]


@cache
def paths() -> list[str]:
    """Files of the repository; those of src/rock by their path in there too."""
    folders = ("src/rock", "native", "tests", "tools", "bench", "examples", "docs")
    found = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    return found + [path.removeprefix("src/rock/") for path in found if path.startswith("src/rock/")]


def matches(name: str) -> list[Path]:
    """The files that a name on the page may be: exactly that path, else every path that ends with it."""
    exact = [path for path in paths() if path == name]
    found = exact or [path for path in paths() if path.endswith(f"/{name}")]
    return sorted({ROOT / path if (ROOT / path).exists() else SOURCE / path for path in found})


@cache
def members(path: Path) -> frozenset[str]:
    """What a module defines: `name`, `Class.member`, and methods and attributes by their own name too."""
    if path.suffix == ".c":
        return frozenset(re.findall(r"\b(\w+)\s*\(", path.read_text()))
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        found.update(_names(node))
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                inside = set(_names(part)) if part in node.body else set()
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and _is_self(part.value):
                    inside.add(part.attr)
                found |= inside | {f"{node.name}.{name}" for name in inside}
    return frozenset(found)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.If | ast.Try):
        for child in ast.iter_child_nodes(node):
            yield from _names(child)


@cache
def modules() -> dict[str, list[Path]]:
    """Modules of src/rock by their last name, packages too."""
    found: dict[str, list[Path]] = {}
    for path in SOURCE.rglob("*.py"):
        name = path.parent.name if path.name == "__init__.py" else path.stem
        found.setdefault(name, []).append(path)
    return found


@cache
def classes() -> dict[str, list[tuple[Path, tuple[str, ...]]]]:
    """The classes of src/rock by name: where each is defined, and the last names of its bases."""
    found: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
    for path in SOURCE.rglob("*.py"):
        for name, bases in re.findall(r"^\s*class (\w+)(?:\(([^)]*)\))?", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append((path, tuple(re.findall(r"(\w+)\s*(?:\[[^]]*\])?(?:,|$)", bases))))
    return found


def has_member(name: str, member: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a class of src/rock, or a base class of it there, has that member."""
    return name not in seen and any(
        f"{name}.{member}" in members(path) or any(has_member(base, member, seen | {name}) for base in bases)
        for path, bases in classes().get(name, ())
    )


def is_defined(dotted: str) -> bool:
    """Whether a dotted name is of src/rock."""
    parts = dotted.split(".")
    if dotted in ENTRY_POINTS:
        return True
    if parts[0] == "rock":
        place = SOURCE.joinpath(*parts[1:])
        if place.is_dir() or place.with_suffix(".py").exists():
            return True
        top = SOURCE.joinpath(*parts[1:-1])
        own = [path for path in (top / "__init__.py", top.with_suffix(".py")) if path.exists()]
        return any(parts[-1] in members(path) or f'"{parts[-1]}"' in path.read_text() for path in own)
    if any(has_member(name, parts[-1]) for name in (parts[-2], parts[-2][:1].upper() + parts[-2][1:])):
        return True
    return any(parts[-1] in members(path) for path in modules().get(parts[-2], []))


def wrong_names(text: str) -> list[Problem]:
    """(line, name) of what is on a page and does not exist."""
    found: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        for name, member in _FILE.findall(line):
            files = matches(name)
            if not files:
                found.append((number, name))
            elif member and not any(member in members(path) for path in files):
                found.append((number, f"{name}::{member}"))
        for name in _FOLDER.findall(line):
            if not any((top / name).is_dir() for top in (ROOT, SOURCE, ROOT / "docs")):
                found.append((number, name))
        for name in _DOTTED.findall(line):
            if name.rpartition(".")[2] not in _SUFFIXES and not is_defined(name):
                found.append((number, name))
    return found


def wrong_drawings(text: str) -> list[Problem]:
    """(line, path) of the entries of drawings of folders that are not there."""
    found: list[Problem] = []
    above: list[tuple[int, Path]] = []
    drawing = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            drawing, above = not drawing, []
        indent = len(line) - len(line.lstrip())
        entries = _entries(line) if drawing else []
        if entries and not above and entries[0].endswith("/"):
            above = [(indent, ROOT / entries[0])]
            if not above[0][1].is_dir():
                found.append((number, entries[0]))
            continue
        if not entries or not above or indent > above[-1][0] + 2 + 2 * (above[-1][1].suffix == ""):
            continue  # a line that goes on with the text of the one before
        while len(above) > 1 and above[-1][0] >= indent:
            above.pop()
        for entry in entries:
            if not (above[-1][1] / entry).exists():
                found.append((number, (above[-1][1] / entry).relative_to(ROOT).as_posix()))
        if entries[-1].endswith("/"):
            above.append((indent, above[-1][1] / entries[-1]))
    return found


def _entries(line: str) -> list[str]:
    """The files and folders at the start of a line."""
    entries = []
    for word in line.split():
        if not re.fullmatch(r"(?:[\w.-]+/)*(?:[\w-]+\.\w+|[\w.-]+/),?", word):
            break
        entries.append(word.rstrip(","))
    return entries


def test_names_exist() -> None:
    assert not wrong_names(PAGE.read_text())


def test_drawings_are_of_what_is_there() -> None:
    assert not wrong_drawings(PAGE.read_text())


def test_the_page_has_names() -> None:
    text = PAGE.read_text()
    assert len(_FILE.findall(text)) > 50 and len(_DOTTED.findall(text)) >= 3


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`errors.py`, `sdk/client.py::Client.stop_sandbox`, `src/rock/errors.py::RockError`", []),
        ("no such errorz.py, nor sdk/errors.py", ["errorz.py", "sdk/errors.py"]),
        ("`sdk/client.py::Client.stopp`, client.py::Clientele",
         ["sdk/client.py::Client.stopp", "client.py::Clientele"]),
        ("`errors.from_wire`, `RockError.to_wire`, `await sandbox.arun(\"x\")`, `rock.make`, `rock.errors`", []),
        ("`errors.from_wires`, `RockError.from_wire`, `rock.nothing`, `rock.errors.Nothing`",
         ["errors.from_wires", "RockError.from_wire", "rock.nothing", "rock.errors.Nothing"]),
        ("`sdk/`, `sdk/nothing/`", ["sdk/nothing/"]),
    ],
)  # fmt: skip
def test_wrong_names_are_found(text: str, wrong: list[str]) -> None:
    assert [name for _, name in wrong_names(text)] == wrong


def test_wrong_drawings_are_found() -> None:
    text = "```text\nsrc/rock/\n  sdk/      the client; about.py is text\n    client.py nothing.py   two\n"
    text += "                server.py text\n"
    more = "    sandbox/\n      files.py\n      here.py\n  gone.py\n  errors.py settings.py\n```\n"
    assert wrong_drawings(text + more) == [(4, "src/rock/sdk/nothing.py"), (8, "src/rock/sdk/sandbox/here.py"),
                                           (9, "src/rock/gone.py")]  # fmt: skip
