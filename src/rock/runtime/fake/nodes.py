"""What a script of a fake sandbox's shell is made of: words and commands."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Literal:
    text: str
    quoted: bool


@dataclass(frozen=True)
class Variable:
    """$name; `modifier` and `word` of ${name:-word}, or modifier "length" of ${#name}."""

    name: str
    quoted: bool
    modifier: str = ""
    word: Word = ()


@dataclass(frozen=True)
class Substitution:
    """$(script)."""

    script: Script
    quoted: bool


@dataclass(frozen=True)
class Arithmetic:
    """$((words))."""

    word: Word
    quoted: bool


Part = Literal | Variable | Substitution | Arithmetic
Word = tuple[Part, ...]


@dataclass
class Redirect:
    """`kind`: <, >, >>, <&, >& or <<, whose target is the text itself."""

    fd: int
    kind: str
    target: Word = ()


@dataclass
class Simple:
    assigns: list[tuple[str, Word]] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)


@dataclass
class Group:
    body: Script
    subshell: bool = False


@dataclass
class If:
    branches: list[tuple[Script, Script]]
    otherwise: Script | None = None


@dataclass
class Loop:
    condition: Script
    body: Script
    until: bool = False


@dataclass
class For:
    name: str
    words: list[Word] | None
    body: Script


@dataclass
class Case:
    word: Word
    items: list[tuple[list[Word], Script]]


@dataclass
class Function:
    name: str
    body: Command


@dataclass
class Command:
    what: Simple | Group | If | Loop | For | Case | Function
    redirects: list[Redirect] = field(default_factory=list)


@dataclass
class Pipeline:
    commands: list[Command]
    negated: bool = False


@dataclass
class AndOr:
    first: Pipeline
    rest: list[tuple[str, Pipeline]] = field(default_factory=list)
    background: bool = False


Script = list[AndOr]
