"""Dockerfile parser: text -> stages of instructions. Pure; errors name the line.

    directives     # escape=`   # syntax=docker/dockerfile:1     (comments before anything else)
    instruction    KEYWORD --flag=value ... the rest             (a line that ends with \\ continues)
    here document  RUN, COPY and ADD: <<EOF, <<-EOF, <<"EOF"

`Words` splits words and replaces variables when the instruction is executed, because its variables are known only then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rock.errors import InvalidConfig, RockError, Unsupported

LARGEST = 1 << 20  # maximum characters of a Dockerfile
_MOST = 2000  # maximum instructions
_DEEPEST = 32  # maximum nesting of variables
_MOST_GIVEN = 1 << 20  # maximum characters that variables add to one instruction, and of all variables
KEYWORDS = frozenset({
    "FROM", "RUN", "CMD", "LABEL", "MAINTAINER", "EXPOSE", "ENV", "ADD", "COPY", "ENTRYPOINT", "VOLUME", "USER",
    "WORKDIR", "ARG", "ONBUILD", "STOPSIGNAL", "HEALTHCHECK", "SHELL",
})  # fmt: skip
_FLAGS = {
    "FROM": {"platform"}, "COPY": {"from", "chown", "chmod", "link"}, "ADD": {"chown", "chmod", "link"},
    "RUN": {"network"}, "HEALTHCHECK": {"interval", "timeout", "start-period", "start-interval", "retries"},
}  # fmt: skip
_UNSUPPORTED_FLAGS = {
    "RUN": {"mount": "copy what it needs in, and remove it in the same RUN", "security": "leave it out"},
    "COPY": {"parents": "name the folders", "exclude": "use .dockerignore"},
    "ADD": {"checksum": "copy the file from the context", "keep-git-dir": "copy it from the context",
            "exclude": "use .dockerignore", "unpack": "leave it out"},
}  # fmt: skip
_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9-]*)\s*=(.*)")
_FLAG = re.compile(r"--([a-z][a-z-]*)(?:=(.*))?", re.DOTALL)
_HEREDOC = re.compile(r"(\d*)<<(-?)(.+)", re.DOTALL)
_STAGE = re.compile(r"[a-z][a-z0-9_.-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SYNTAX = re.compile(r"(docker\.io/)?docker/dockerfile(-upstream)?([:@].*)?")


def refuse(line: int, what: str, hint: str | None = None) -> InvalidConfig:
    """The error for an invalid line."""
    return InvalidConfig(f"Dockerfile line {line}: {what}", hint=hint, details={"line": line})


def unsupported(line: int, what: str, hint: str | None = None) -> Unsupported:
    """The error for a valid but unsupported line."""
    return Unsupported(f"Dockerfile line {line}: {what}", hint=hint, details={"line": line})


def at_line(line: int, error: RockError) -> RockError:
    """Add the line to an error."""
    if "line" not in error.details:
        error.details["line"] = line
        error.message = f"Dockerfile line {line}: {error.message}"
        error.args = (error.message,)
    return error


@dataclass(frozen=True)
class Heredoc:
    """A here document: its text, whether variables in it are replaced, and whether leading tabs were removed."""

    name: str
    text: str
    expand: bool


@dataclass(frozen=True)
class Instruction:
    """`text` is the text after keyword and flags, lines joined; `array` its strings, where it is a JSON array of
    strings."""

    line: int
    keyword: str
    text: str
    flags: Mapping[str, str] = field(default_factory=dict)
    array: tuple[str, ...] | None = None
    heredocs: tuple[Heredoc, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A FROM and the instructions after it. `base` as written, before variables; `name` of AS, or ""."""

    line: int
    base: str
    name: str
    platform: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """args: the ARG instructions before the first FROM. escape: the character that escapes."""

    args: tuple[Instruction, ...]
    stages: tuple[Stage, ...]
    escape: str


def parse(text: str) -> Dockerfile:
    """The stages of a Dockerfile. InvalidConfig and Unsupported, each with its line."""
    if len(text) > LARGEST:
        raise InvalidConfig(f"the Dockerfile has {len(text)} characters, more than the limit of {LARGEST}",
                            hint="move its long scripts and data into files and COPY them")
    if "\0" in text:
        raise refuse(text[: text.index("\0")].count("\n") + 1, "it has a NUL character")
    lines = text.removeprefix("\ufeff").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    escape = _directives(lines)
    instructions = list(_instructions(lines, escape))
    if len(instructions) > _MOST:
        raise refuse(instructions[_MOST].line, f"more than {_MOST} instructions")
    first = next((number for number, found in enumerate(instructions) if found.keyword == "FROM"), len(instructions))
    for found in instructions[:first]:
        if found.keyword != "ARG":
            raise refuse(found.line, f"{found.keyword} comes before the first FROM", "only ARG may")
    if first == len(instructions):
        raise InvalidConfig("the Dockerfile has no FROM", hint="it begins with FROM IMAGE")
    return Dockerfile(tuple(instructions[:first]), tuple(_stages(instructions[first:])), escape)


def _directives(lines: list[str]) -> str:
    """The escape character. Only Docker's own syntax is supported."""
    escape = "\\"
    for number, line in enumerate(lines, 1):
        match = _DIRECTIVE.fullmatch(line.strip())
        name = match[1].lower() if match else ""
        if match is None or name not in ("escape", "syntax", "check"):
            break
        value = match[2].strip()
        if name == "escape":
            if value not in ("\\", "`"):
                raise refuse(number, f"escape={value[:40]!r} is neither \\ nor `")
            escape = value
        elif name == "syntax" and not _SYNTAX.fullmatch(value):
            raise unsupported(number, f"syntax {value[:60]} is not that of Dockerfiles", "leave the directive out")
    return escape


def _instructions(lines: list[str], escape: str) -> Iterator[Instruction]:
    goes_on = re.compile(rf"(?:^|[^{re.escape(escape)}]){re.escape(escape)}[ \t]*$")
    number = 0
    while number < len(lines):
        begun = number + 1
        if _is_nothing(lines[number]):
            number += 1
            continue
        parts: list[str] = []
        more = True
        while more and number < len(lines):
            line = lines[number]
            number += 1
            if parts and _is_nothing(line):
                continue
            more = goes_on.search(line) is not None
            parts.append(line.rstrip()[:-1] if more else line)
        instruction = _instruction("".join(parts).strip(), begun, escape)
        if instruction.keyword in ("RUN", "COPY", "ADD") and instruction.array is None:
            heredocs = []
            for tabs, name, expand in _heredocs(instruction, escape):
                text, number = _here(lines, number, name, tabs, begun)
                heredocs.append(Heredoc(name, text, expand))
            instruction = Instruction(begun, instruction.keyword, instruction.text, instruction.flags, None,
                                      tuple(heredocs))  # fmt: skip
        yield instruction


def _is_nothing(line: str) -> bool:
    stripped = line.strip()
    return not stripped or stripped.startswith("#")


def _instruction(text: str, line: int, escape: str) -> Instruction:
    word, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    word, tab, more = word.partition("\t")
    keyword, rest = word.upper(), (more + " " + rest if tab else rest).strip()
    if keyword not in KEYWORDS:
        raise refuse(line, f"{word[:40]!r} is no instruction", "a line that goes on ends with a backslash")
    flags, rest = _flags(keyword, rest, line)
    if not rest:
        raise refuse(line, f"{keyword} says nothing")
    return Instruction(line, keyword, rest, flags, parse_array(rest))


def _flags(keyword: str, rest: str, line: int) -> tuple[dict[str, str], str]:
    found: dict[str, str] = {}
    known = _FLAGS.get(keyword, set())
    refused = _UNSUPPORTED_FLAGS.get(keyword, {})
    while rest.startswith("--") and (known or refused):
        word, _, after = rest.partition(" ")
        match = _FLAG.fullmatch(word)
        name = match[1] if match else word
        if name in refused:
            raise unsupported(line, f"{keyword} --{name} is not supported", refused[name])
        if match is None or name not in known:
            raise refuse(line, f"{keyword} has no flag {word[:60]}")
        if name in found:
            raise refuse(line, f"--{name} is there twice")
        value = match[2]
        if value is None and name != "link":
            raise refuse(line, f"--{name} has no value", f"write --{name}=...")
        found[name] = value or "true"
        rest = after.lstrip()
    return found, rest


def parse_array(text: str) -> tuple[str, ...] | None:
    """The strings of a JSON array of strings; None for other text."""
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _heredocs(instruction: Instruction, escape: str) -> Iterator[tuple[bool, str, bool]]:
    """(remove tabs, name, replace variables) of each here document that an instruction announces."""
    for word in Words({}, escape, instruction.line).raw(instruction.text):
        match = _HEREDOC.fullmatch(word)
        if match is None or match[3].startswith("<"):
            continue
        name = match[3]
        bare = name.strip("\"'")
        if _NAME.fullmatch(bare) and name in (bare, f'"{bare}"', f"'{bare}'"):
            yield bool(match[2]), bare, name == bare


def _here(lines: list[str], number: int, name: str, tabs: bool, begun: int) -> tuple[str, int]:
    """(text, number of the next line)."""
    found: list[str] = []
    while number < len(lines):
        line = lines[number].lstrip("\t") if tabs else lines[number]
        number += 1
        if line == name:
            return "".join(f"{line}\n" for line in found), number
        found.append(line)
    raise refuse(begun, f"its here document {name} does not end", f"end it with a line that is {name}")


def _stages(instructions: list[Instruction]) -> Iterator[Stage]:
    begins = [number for number, found in enumerate(instructions) if found.keyword == "FROM"]
    names: set[str] = set()
    for begin, end in zip(begins, [*begins[1:], len(instructions)], strict=True):
        first = instructions[begin]
        words = first.text.split()
        if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
            raise refuse(first.line, "FROM is not of the form FROM IMAGE [AS NAME]")
        name = words[2].lower() if len(words) == 3 else ""
        if name and (not _STAGE.fullmatch(name) or name in names):
            raise refuse(first.line, f"{words[2]!r} is no name for a stage, or there are two of it")
        names.add(name)
        yield Stage(first.line, words[0], name, first.flags.get("platform", ""), tuple(instructions[begin + 1 : end]))


class Words:
    """Word splitting of an instruction with `variables`. InvalidConfig with the line."""

    def __init__(self, variables: Mapping[str, str], escape: str, line: int) -> None:
        self._variables = variables
        self._escape = escape
        self._line = line
        self._left = _MOST_GIVEN

    def raw(self, text: str) -> list[str]:
        """Words between blanks, with quotes and escapes."""
        words: list[str] = []
        word: list[str] = []
        quote, escaped, inside = "", False, False
        for c in text:
            if escaped:
                escaped = False
            elif c == self._escape and quote != "'":
                escaped = True
            elif quote:
                quote = "" if c == quote else quote
            elif c in "\"'":
                quote = c
            elif c.isspace():
                if inside:
                    words.append("".join(word))
                word, inside = [], False
                continue
            word.append(c)
            inside = True
        if inside:
            words.append("".join(word))
        return words

    def split(self, text: str) -> list[str]:
        """Words with variables replaced and quotes removed."""
        return [self.one(word) for word in self.raw(text)]

    def one(self, text: str) -> str:
        """The whole text as one word."""
        return self._process(text, 0)

    def inner(self, text: str) -> str:
        """A here document: variables are replaced, quotes stay."""
        return self._process(text, 0, quotes=False)

    def _process(self, text: str, depth: int, quotes: bool = True) -> str:
        if depth > _DEEPEST:
            raise refuse(self._line, "its variables are nested too deep")
        out: list[str] = []
        place, quote = 0, ""
        while place < len(text):
            c = text[place]
            if quote == "'":
                quote = "" if c == "'" else quote
                out.append("" if c == "'" else c)
                place += 1
            elif c == self._escape and place + 1 < len(text):
                following = text[place + 1]
                keep = (quote or not quotes) and following not in ('"', "$", self._escape)
                out.append(c + following if keep else following)
                place += 2
            elif quotes and c in "\"'" and (not quote or c == quote):
                quote = "" if quote else c
                place += 1
            elif c == "$":
                value, place = self._variable(text, place + 1, depth)
                self._left -= len(value)  # a variable may refer to itself, line after line
                if self._left < 0:
                    raise refuse(self._line, f"its variables have more than {_MOST_GIVEN} characters")
                out.append(value)
            else:
                out.append(c)
                place += 1
        if quote:
            raise refuse(self._line, f"a quote {quote} is not closed")
        return "".join(out)

    def _variable(self, text: str, place: int, depth: int) -> tuple[str, int]:
        if not text.startswith("{", place):
            match = _NAME.match(text, place)
            if match is None:
                return "$", place
            return self._variables.get(match[0], ""), match.end()
        end, nested = place + 1, 1
        while end < len(text) and nested:
            nested += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if nested:
            raise refuse(self._line, "a ${ is not closed")
        inside = text[place + 1 : end - 1]
        match = _NAME.match(inside)
        if match is None:
            raise refuse(self._line, f"${{{inside[:40]}}} names no variable")
        name, rest = match[0], inside[match.end() :]
        return self._modified(name, rest, depth), end

    def _modified(self, name: str, rest: str, depth: int) -> str:
        value = self._variables.get(name)
        if not rest:
            return value or ""
        colon = rest.startswith(":")
        kind, word = rest[colon : colon + 1], rest[colon + 1 :]
        there = bool(value) if colon else value is not None
        actions: dict[str, Callable[[], str]] = {
            "-": lambda: (value or "") if there else self._process(word, depth + 1),
            "+": lambda: self._process(word, depth + 1) if there else "",
        }
        if kind == "?":
            if not there:
                raise refuse(self._line, f"{name}: {self._process(word, depth + 1) or 'it is not set'}")
            return value or ""
        if kind not in actions:
            raise unsupported(self._line, f"${{{name}{rest[:40]}}} changes a variable in a way that is not supported",
                              "${X:-word}, ${X:+word} and ${X:?word} are")  # fmt: skip
        return actions[kind]()


def bounded(variables: Mapping[str, str], line: int) -> Mapping[str, str]:
    """Check the size. InvalidConfig when it exceeds the limit of a program's arguments."""
    if sum(len(name) + len(value) for name, value in variables.items()) > _MOST_GIVEN:
        raise refuse(line, f"its variables have more than {_MOST_GIVEN} characters")
    return variables


def pairs(instruction: Instruction, words: Words) -> list[tuple[str, str]]:
    """NAME=VALUE ... of an ENV or LABEL, or the old form NAME VALUE."""
    raw = words.raw(instruction.text)
    if "=" not in raw[0]:
        value = instruction.text.removeprefix(raw[0]).strip()
        if not value:
            raise refuse(instruction.line, f"{instruction.keyword} {raw[0]} has no value", "write NAME=VALUE")
        return [(words.one(raw[0]), words.one(value))]
    found = []
    for word in raw:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise refuse(instruction.line, f"{word[:60]!r} is not NAME=VALUE", "put quotes around values with blanks")
        found.append((words.one(name), words.one(value)))
    return found
