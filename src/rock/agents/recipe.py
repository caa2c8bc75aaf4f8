"""Recipes of agents: one TOML file each (docs/guides/agents.md describes the format).

    name = "qwen-code"          of the layer, the mount point and the command line of `rock agent`
    version = "0.15.10"         for people and trajectories
    about = "..."               one line
    dialect = "openai-chat"     the dialect in which it calls the model
    model = "qwen3-coder"       the model name that it is given unless the caller names one
    command = "qwen -p ${prompt}"
    timeout = 1800              seconds of one run
    [packages]                  npm, pypi: requirements with versions; python: versions of Python, as ">=3.12"; build:
                                packages of PyPI without a wheel, whose set-up code then runs on the worker
    [bin]                       program = path in the layer, or "module:function" of a Python package
    [env]                       variables of the agent
    [files]                     path below its home folder = content
    [log]                       where its output has the result: file, format, text, input_tokens, output_tokens

Values of `command`, `env` and `files` contain ${base_url}, ${api_key}, ${model}, ${prompt} and ${home}. In `command`
they are quoted for the shell, in `files` escaped as in a JSON string. Packages and paths of programs contain ${arch}
("x64", "arm64") and ${machine} ("x86_64", "aarch64").
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

DIALECTS = ("openai-chat", "openai-responses", "anthropic", "gemini")
MOUNTS = "/opt/rock/agents"  # inside a sandbox, one folder for each agent
FORMATS = ("text", "json", "jsonl")
FOLDER = Path(__file__).parent / "recipes"
LARGEST = 256 << 10  # bytes of a file

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_PLACE = re.compile(r"\$\{([a-z_]+)\}")
_PLACES = frozenset({"base_url", "api_key", "model", "prompt", "home"})
_NPM = re.compile(r"(@[a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*@[0-9][\w.+-]*")
_PYPI = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w.,-]+\])?((==|~=|>=|<=|!=|<|>)[\w.*+!]+(,(?=[=~<>!])|$))*")
_PYTHON = re.compile(r"((==|>=|<=|<|>)3\.[0-9]{1,2}(,(?=[=<>])|$))+")
_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_TEXTS = ("name", "version", "about", "dialect", "model", "command")
_ARCHS = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


class RecipeError(ValueError):
    """A recipe is wrong: the message names the field and the file."""


@dataclass(frozen=True)
class Packages:
    """What a layer is made of. npm, pypi: requirements with versions. python: versions of Python that the packages run
    on, "" without Python. build: names of packages that may be built. bin: programs by name, see the module."""

    npm: tuple[str, ...] = ()
    pypi: tuple[str, ...] = ()
    python: str = ""
    build: tuple[str, ...] = ()
    bin: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.npm or self.pypi or self.python)

    @property
    def digest(self) -> str:
        """A digest of the packages and the platform."""
        parts = [1, platform.machine(), sorted(self.npm), sorted(self.pypi), self.python, sorted(self.build),
                 sorted(self.bin.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Log:
    """Where the output has the result. file: below the home folder; "" is the standard output. format: "text" (the
    whole output is the text), "json" (one document) or "jsonl" (a document per line; the last line that has a field
    gives its value). The others are paths such as "usage.input_tokens"; a number selects an element of a list."""

    file: str = ""
    format: str = "text"
    text: str = ""
    input_tokens: str = ""
    output_tokens: str = ""


@dataclass(frozen=True)
class Command:
    """A recipe with all values. line: for `sh -c`. env: variables. files: content by absolute path."""

    line: str
    env: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """How one agent is installed and run."""

    name: str
    command: str
    version: str = ""
    about: str = ""
    dialect: str = "openai-chat"
    model: str = "default"
    timeout: float = 1800.0
    packages: Packages = field(default_factory=Packages)
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    text: str = field(default="", repr=False, compare=False)  # of the file

    @property
    def mount(self) -> str:
        """The folder of the layer in a sandbox."""
        return f"{MOUNTS}/{self.name}"

    def render(self, prompt: str, *, base_url: str, api_key: str, home: str, model: str | None = None,
               path: str = "") -> Command:  # fmt: skip
        """The command of one run. base_url: of the gateway, without "/v1". home: the agent's home folder. path: the
        PATH of the sandbox; programs of the layer come first."""
        values = {"base_url": base_url, "api_key": api_key, "model": model or self.model, "prompt": prompt,
                  "home": home}  # fmt: skip
        env = {name: _filled(value, values, str) for name, value in self.env.items()}
        if self.packages:
            env["PATH"] = f"{self.mount}/bin:{path or '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}"
        files = {f"{home}/{name}": _filled(text, values, _escaped) for name, text in self.files.items()}
        return Command(_filled(self.command, values, shlex.quote), {"HOME": home, **env}, files)


def _filled(text: str, values: Mapping[str, str], quote: Callable[[str], str]) -> str:
    return _PLACE.sub(lambda found: quote(values[found[1]]) if found[1] in values else found[0], text)


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def _placed(text: str) -> str:
    """A package or a path with the names of this machine."""
    machine = platform.machine().lower()
    return text.replace("${arch}", _ARCHS.get(machine, machine)).replace("${machine}", machine)


@cache
def names() -> tuple[str, ...]:
    """The names of ROCK's recipes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@cache
def builtin(name: str) -> Recipe | None:
    """ROCK's recipe of that name."""
    if name not in names():
        return None
    return parse((FOLDER / f"{name}.toml").read_text(), name)


def load(path: str | Path) -> Recipe:
    """The recipe in a file. RecipeError: it is not a recipe. OSError."""
    data = Path(path).read_bytes()
    if len(data) > LARGEST:
        raise RecipeError(f"{path}: a recipe has at most {LARGEST >> 10} KiB")
    try:
        return parse(data.decode(), str(path))
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: it is not UTF-8") from None


def parse(text: str, where: str = "recipe") -> Recipe:
    """A recipe from its text. RecipeError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: it is not TOML: {error}") from None
    return _Reader(document, where).recipe(text)


class _Reader:
    """Checks one document."""

    def __init__(self, document: dict[str, Any], where: str) -> None:
        self._document = document
        self._where = where

    def recipe(self, text: str) -> Recipe:
        known = {*_TEXTS, "timeout", "packages", "bin", "env", "files", "log"}
        self._only(self._document, known, "a recipe")
        texts = {name: self._text(self._document, name) for name in _TEXTS if name in self._document}
        if not _NAME.fullmatch(texts.get("name", "")):
            self._wrong("name", "1 to 63 lower-case letters, digits, - and _, as in my-agent")
        if not texts.get("command"):
            self._wrong("command", "the command line that runs the agent, with ${prompt}")
        if texts.get("dialect", DIALECTS[0]) not in DIALECTS:
            self._wrong("dialect", f"one of {', '.join(DIALECTS)}")
        timeout = self._document.get("timeout", 1800)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 604_800:
            self._wrong("timeout", "seconds above 0")
        env, files = self._table("env"), self._table("files")
        for name in env:
            if not _VARIABLE.fullmatch(name):
                self._wrong(f"env.{name}", "a name of a variable")
        for name in files:
            self._path(f"files.{name}", name)
        for where, value in (("command", texts["command"]), *env.items(), *files.items()):
            for place in _PLACE.findall(value):
                if place not in _PLACES:
                    self._wrong(where, f"${{{place}}} is unknown; there are {', '.join(sorted(_PLACES))}")
        return Recipe(packages=self._packages(), env=env, files=files, log=self._log(), timeout=float(timeout),
                      text=text, **texts)  # fmt: skip

    def _packages(self) -> Packages:
        table = self._document.get("packages", {})
        self._only(table, {"npm", "pypi", "python", "build"}, "packages")
        npm, pypi = self._list(table, "npm", _NPM), self._list(table, "pypi", _PYPI)
        build = self._list(table, "build", _PROGRAM)
        python = table.get("python", ">=3.10" if pypi else "")
        if not isinstance(python, str) or (python and not _PYTHON.fullmatch(python.replace(" ", ""))):
            self._wrong("packages.python", 'versions of Python, as ">=3.11,<3.14"')
        programs = {}
        for name, value in self._table("bin").items():
            value = _placed(value)
            if not _PROGRAM.fullmatch(name):
                self._wrong(f"bin.{name}", "a name of a program")
            if ":" in value:
                if not _ENTRY.fullmatch(value) or not python:
                    self._wrong(f"bin.{name}", '"module:function" of a Python package, or a path in the layer')
            else:
                self._path(f"bin.{name}", value)
            programs[name] = value
        if programs and not (npm or pypi or python):
            self._wrong("bin", "programs of packages: list the packages too")
        return Packages(npm, pypi, python.replace(" ", ""), build, programs)

    def _log(self) -> Log:
        table = self._table("log")
        self._only(table, {"file", "format", "text", "input_tokens", "output_tokens"}, "log")
        if table.get("format", "text") not in FORMATS:
            self._wrong("log.format", f"one of {', '.join(FORMATS)}")
        if table.get("file"):
            self._path("log.file", table["file"])
        return Log(**table)

    def _list(self, table: dict[str, Any], name: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
        value = table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._wrong(f"packages.{name}", "a list of requirements")
        found = tuple(_placed(item).replace(" ", "") for item in value)
        for item in found:
            if not pattern.fullmatch(item):
                self._wrong(f"packages.{name}", f"{item!r} is no name with a version")
        return found

    def _table(self, name: str) -> dict[str, str]:
        value = self._document.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            self._wrong(name, "a table of strings")
        return dict(value)

    def _text(self, table: dict[str, Any], name: str) -> str:
        value = table[name]
        if not isinstance(value, str) or "\0" in value:
            self._wrong(name, "a string")
        return str(value)

    def _path(self, where: str, path: str) -> None:
        parts = path.split("/")
        if not path or "\0" in path or "" in parts or "." in parts or ".." in parts:
            self._wrong(where, "a relative path without . and .. parts")

    def _only(self, table: Any, known: set[str], what: str) -> None:
        if not isinstance(table, dict):
            self._wrong(what, "a table")
        for name in sorted(set(table) - known):
            raise RecipeError(f"{self._where}: {what} has no field {name!r}; there are {', '.join(sorted(known))}")

    def _wrong(self, name: str, must: str) -> None:
        raise RecipeError(f"{self._where}: {name}: {must}")
