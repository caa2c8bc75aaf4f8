"""The grammar of Docker's command line: long and short flags, joined short flags, values after a space or `=`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

REFUSED = 125  # a wrong or unsupported flag, as in Docker
TRUE = ("1", "t", "T", "true", "TRUE", "True")
FALSE = ("0", "f", "F", "false", "FALSE", "False")


class Refused(Exception):
    """A call that does not start anything. code: the exit code. usage: print the usage of the command too."""

    def __init__(self, message: str, code: int = REFUSED, *, usage: bool = False, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.usage, self.hint = code, usage, hint


@dataclass(frozen=True)
class Flag:
    """A flag. kind: bool, text, list. reason: not empty for a flag of Docker that ROCK does not support."""

    name: str
    short: str = ""
    kind: str = "text"
    help: str = ""
    reason: str = ""

    @property
    def shown(self) -> str:
        return f"-{self.short}, --{self.name}" if self.short else f"--{self.name}"


@dataclass(frozen=True)
class Spec:
    """A command. interspersed: flags may follow arguments. most: largest number of arguments; None is any."""

    name: str
    usage: str
    flags: tuple[Flag, ...]
    least: int = 0
    most: int | None = None
    interspersed: bool = True
    summary: str = ""


@dataclass
class Call:
    """A parsed call. texts, lists, switches: the flags by name, where they are given."""

    spec: Spec
    words: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        return self.texts.get(name)

    def many(self, name: str) -> list[str]:
        return self.lists.get(name, [])

    def on(self, name: str) -> bool:
        return self.switches.get(name, False)

    def number(self, name: str, kind: type[int] | type[float]) -> int | float | None:
        """The value of a flag as a number. Refused."""
        text = self.texts.get(name)
        if text is None:
            return None
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not 0 <= value < 1 << 40:
            raise Refused(f'invalid argument "{text}" for "--{name}" flag: not a number in the range', usage=True)
        return value


def parse(spec: Spec, given: Sequence[str]) -> Call:
    """The flags and the arguments of a call. Refused."""
    call, rest = Call(spec), list(given)
    while rest:
        word = rest.pop(0)
        if word == "--":
            call.words += rest
            break
        if not word.startswith("-") or word == "-":
            call.words.append(word)
            if not spec.interspersed:
                call.words += rest
                break
        elif word.startswith("--"):
            _long(call, word, rest)
        else:
            _short(call, word, rest)
    count = len(call.words)
    if count < spec.least or (spec.most is not None and count > spec.most):
        raise Refused(f"docker: 'docker {spec.name}' {_wanted(spec)}", 1, usage=True)
    return call


def _wanted(spec: Spec) -> str:
    if spec.least == spec.most == 0:
        return "accepts no arguments"
    kind = "" if spec.least == spec.most else "at least " if spec.most is None else "at most "
    number = spec.most if spec.most is not None else spec.least
    return f"requires {kind}{number} argument{'s' * (number != 1)}"


def _long(call: Call, word: str, rest: list[str]) -> None:
    name, equals, value = word[2:].partition("=")
    flag = next((one for one in call.spec.flags if one.name == name), None)
    if name == "help":
        raise Refused("", 0, usage=True)
    if flag is None:
        close = get_close_matches(name, [one.name for one in call.spec.flags if not one.reason], n=1)
        raise Refused(f"unknown flag: --{name}", usage=True, hint=f"did you mean --{close[0]}?" if close else "")
    _check(call, flag)
    if flag.kind == "bool":
        _switch(call, flag, value if equals else "true")
        return
    if not equals:
        if not rest:
            raise Refused(f"flag needs an argument: --{name}", usage=True)
        value = rest.pop(0)
    _set(call, flag, value)


def _short(call: Call, word: str, rest: list[str]) -> None:
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        flag = next((one for one in call.spec.flags if one.short == letter), None)
        if flag is None:
            if letter == "h":
                raise Refused("", 0, usage=True)
            raise Refused(f"unknown shorthand flag: '{letter}' in {word}", usage=True)
        _check(call, flag)
        if flag.kind == "bool":
            value = "true"
            if letters.startswith("="):
                value, letters = letters[1:], ""
            _switch(call, flag, value)
            continue
        if letters:
            _set(call, flag, letters.removeprefix("="))
        elif rest:
            _set(call, flag, rest.pop(0))
        else:
            raise Refused(f"flag needs an argument: '{letter}' in {word}", usage=True)
        return


def _check(call: Call, flag: Flag) -> None:
    if flag.reason:
        raise Refused(f"docker: ROCK does not support --{flag.name} of `docker {call.spec.name}`", hint=flag.reason)


def _switch(call: Call, flag: Flag, value: str) -> None:
    if value not in TRUE + FALSE:
        raise Refused(f'invalid argument "{value}" for "{flag.shown}" flag: strconv.ParseBool: parsing "{value}": '
                      "invalid syntax", usage=True)  # fmt: skip
    call.switches[flag.name] = value in TRUE


def _set(call: Call, flag: Flag, value: str) -> None:
    if flag.kind == "list":
        call.lists.setdefault(flag.name, []).append(value)
    else:
        call.texts[flag.name] = value


def usage(spec: Spec) -> str:
    return f"Usage:  docker {spec.name} {spec.usage}".rstrip()


def help_of(spec: Spec) -> str:
    """The help of a command: usage and supported flags."""
    lines = [usage(spec), "", spec.summary, "", "Options:"]
    for flag in spec.flags:
        if not flag.reason:
            lead = f"  -{flag.short}, " if flag.short else "      "
            kind = "" if flag.kind == "bool" else f" {'list' if flag.kind == 'list' else 'string'}"
            lines.append(f"{lead}--{flag.name}{kind}".ljust(30) + flag.help)
    return "\n".join(lines)
