"""Parser of the fake sandboxes' shell: text to a syntax tree. Most of a POSIX shell; the rest raises SyntaxFault.

A script arrives in portions: `Parser.line` raises Incomplete where it needs more of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGN = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")
_RESERVED = re.compile(r"(if|then|else|elif|fi|do|done|while|until|for|case|esac|in|\{|\}|!)(?=[\s;&|()<>]|$)")
_REDIRECT = re.compile(r"(\d*)(<<-|<<|<&|>&|>>|>\||<|>)")
_FUNCTION = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)[ \t]*\([ \t]*\)")
_MODIFIER = re.compile(r":[-=+?]|[-=+?]|##|#|%%|%")
_META = frozenset(" \t\n;&|<>()")
_DEEPEST = 100


class SyntaxFault(Exception):
    """The text is not a command that this shell supports."""


class Incomplete(SyntaxFault):
    """The text ends within a command."""


class Parser:
    """Parses a text from `at` on. `final`: no more text follows."""

    def __init__(self, text: str, *, final: bool = True) -> None:
        self.text = text
        self.at = 0
        self._final = final
        self._pending: list[tuple[Redirect, str, bool, bool]] = []
        self._depth = 0

    # ---- lists ----

    def all(self) -> Script:
        script: Script = []
        while (line := self.line()) is not None:
            script += line
        return script

    def line(self) -> Script | None:
        """The commands up to the end of a line; None when nothing is left."""
        while self._blank() == "\n":
            self._newline()
        if self.at >= len(self.text):
            return None
        script: Script = []
        while True:
            if self._blank() == "\n":
                self._newline()
                return script
            if self.at >= len(self.text):
                if not self._final:
                    raise Incomplete("the line has no end")
                return script
            script.append(self._and_or())
            self._separator(script[-1])

    def _separator(self, item: AndOr) -> None:
        if self._blank() == ";" and not self.text.startswith(";;", self.at):
            self.at += 1
        elif self._blank() == "&":
            self.at += 1
            item.background = True
        elif self._blank() not in ("\n", "", ")") and not self.text.startswith(";;", self.at):
            raise SyntaxFault(f"unexpected {self.text[self.at : self.at + 10]!r}")

    def _body(self, *ends: str) -> Script:
        """Commands up to one of these words, which is not consumed."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise SyntaxFault("nested too deeply")
        script: Script = []
        while True:
            while self._blank() == "\n":
                self._newline()
            if self.at >= len(self.text):
                raise Incomplete(f"no {ends[0]!r} up to the end")
            if any(self._stands(end) for end in ends):
                self._depth -= 1
                return script
            script.append(self._and_or())
            self._separator(script[-1])

    def _stands(self, word: str) -> bool:
        if word in (")", ";;"):
            return self.text.startswith(word, self.at)
        match = _RESERVED.match(self.text, self.at)
        return match is not None and match[1] == word

    def _take(self, word: str) -> None:
        while self._blank() == "\n":
            self._newline()
        if not self._stands(word):
            if self.at >= len(self.text):
                raise Incomplete(f"no {word!r} up to the end")
            raise SyntaxFault(f"{word!r} expected, not {self.text[self.at : self.at + 10]!r}")
        self.at += len(word)

    def _blank(self) -> str:
        """Skip blanks and a comment; returns the next character, or ""."""
        while self.at < len(self.text):
            if self.text[self.at] in " \t":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return self.text[self.at]
        return ""

    def _newline(self) -> None:
        self.at += 1
        pending, self._pending = self._pending, []
        for redirect, end, strip, raw in pending:
            lines = []
            while True:
                if self.at >= len(self.text):
                    raise Incomplete(f"no {end!r} up to the end")
                stop = self.text.find("\n", self.at)
                if stop < 0 and not self._final:
                    raise Incomplete(f"no {end!r} up to the end")
                stop = len(self.text) if stop < 0 else stop
                line = self.text[self.at : stop]
                self.at = min(stop + 1, len(self.text))
                line = line.lstrip("\t") if strip else line
                if line == end:
                    break
                lines.append(line + "\n")
            text = "".join(lines)
            redirect.target = (Literal(text, True),) if raw else Parser(text)._quoted("")

    # ---- commands ----

    def _and_or(self) -> AndOr:
        item = AndOr(self._pipeline())
        while self._blank() and self.text.startswith(("&&", "||"), self.at):
            operator = self.text[self.at : self.at + 2]
            self.at += 2
            while self._blank() == "\n":
                self._newline()
            if self.at >= len(self.text):
                raise Incomplete(f"nothing after {operator}")
            item.rest.append((operator, self._pipeline()))
        return item

    def _pipeline(self) -> Pipeline:
        negated = False
        self._blank()
        while self._stands("!"):
            negated = not negated
            self.at += 1
            self._blank()
        commands = [self._command()]
        while self._blank() == "|" and not self.text.startswith("||", self.at):
            self.at += 1
            while self._blank() == "\n":
                self._newline()
            if self.at >= len(self.text):
                raise Incomplete("nothing after |")
            commands.append(self._command())
        return Pipeline(commands, negated)

    def _command(self) -> Command:
        self._blank()
        if self.text.startswith("(", self.at):
            self.at += 1
            body = self._body(")")
            self.at += 1
            return self._redirected(Command(Group(body, subshell=True)))
        match = _RESERVED.match(self.text, self.at)
        if match is not None:
            kinds: dict[str, Callable[[], Command]] = {
                "{": self._group, "if": self._if, "while": self._loop, "until": self._loop, "for": self._for,
                "case": self._case,
            }
            if match[1] not in kinds:
                raise SyntaxFault(f"unexpected {match[1]!r}")
            self.at += len(match[1])
            if match[1] in ("while", "until"):
                return self._redirected(self._loop(until=match[1] == "until"))
            return self._redirected(kinds[match[1]]())
        function = _FUNCTION.match(self.text, self.at)
        if function is None and self.text.startswith((":()", ":(")):
            function = re.compile(r"(:)\(\)").match(self.text, self.at)
        if function is not None:
            self.at = function.end()
            while self._blank() == "\n":
                self._newline()
            return Command(Function(function[1], self._command()))
        return self._simple()

    def _redirected(self, command: Command) -> Command:
        self._blank()
        while (found := self._redirect()) is not None:
            command.redirects.append(found)
            self._blank()
        return command

    def _group(self) -> Command:
        body = self._body("}")
        self.at += 1
        return Command(Group(body))

    def _if(self) -> Command:
        branches: list[tuple[Script, Script]] = []
        otherwise = None
        while True:
            condition = self._body("then")
            self._take("then")
            branches.append((condition, self._body("elif", "else", "fi")))
            if self._stands("elif"):
                self._take("elif")
                continue
            if self._stands("else"):
                self._take("else")
                otherwise = self._body("fi")
            self._take("fi")
            return Command(If(branches, otherwise))

    def _loop(self, *, until: bool = False) -> Command:
        condition = self._body("do")
        self._take("do")
        body = self._body("done")
        self._take("done")
        return Command(Loop(condition, body, until))

    def _for(self) -> Command:
        self._blank()
        name = _NAME.match(self.text, self.at)
        if name is None:
            raise SyntaxFault("for has no name")
        self.at = name.end()
        words: list[Word] | None = None
        while self._blank() == "\n":
            self._newline()
        if self._stands("in"):
            self._take("in")
            words = []
            while self._blank() not in ("", "\n", ";"):
                words.append(self._word())
        if self._blank() == ";":
            self.at += 1
        self._take("do")
        body = self._body("done")
        self._take("done")
        return Command(For(name[0], words, body))

    def _case(self) -> Command:
        self._blank()
        word = self._word()
        self._take("in")
        items: list[tuple[list[Word], Script]] = []
        while True:
            while self._blank() == "\n":
                self._newline()
            if self._stands("esac"):
                self._take("esac")
                return Command(Case(word, items))
            if self._blank() == "(":
                self.at += 1
            patterns = []
            while True:
                self._blank()
                patterns.append(self._word())
                if self._blank() != "|":
                    break
                self.at += 1
            if self._blank() != ")":
                if self.at >= len(self.text):
                    raise Incomplete("no ) of a case")
                raise SyntaxFault("a pattern of case ends with )")
            self.at += 1
            items.append((patterns, self._body(";;", "esac")))
            if self._stands(";;"):
                self.at += 2

    def _simple(self) -> Command:
        simple, command = Simple(), Command(Simple())
        command.what = simple
        while True:
            following = self._blank()
            redirect = self._redirect()
            if redirect is not None:
                command.redirects.append(redirect)
                continue
            if following == "" or following in _META:
                break
            assign = _ASSIGN.match(self.text, self.at) if not simple.words else None
            if assign is not None:
                self.at = assign.end()
                simple.assigns.append((assign[1], self._word(empty=True)))
            else:
                simple.words.append(self._word())
        if not simple.words and not simple.assigns and not command.redirects:
            if self.at >= len(self.text):
                raise Incomplete("a command is missing")
            raise SyntaxFault(f"unexpected {self.text[self.at : self.at + 10]!r}")
        return command

    def _redirect(self) -> Redirect | None:
        match = _REDIRECT.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        kind = ">" if match[2] == ">|" else match[2]
        redirect = Redirect(int(match[1]) if match[1] else (0 if kind[0] == "<" else 1), kind)
        self._blank()
        if kind in ("<<", "<<-"):
            start = self.at
            word = self._word()
            end = "".join(part.text for part in word if isinstance(part, Literal))
            raw = any(character in self.text[start : self.at] for character in "'\"\\")
            redirect.kind = "<<"
            self._pending.append((redirect, end, kind == "<<-", raw))
        else:
            redirect.target = self._word()
        return redirect

    # ---- words ----

    def _word(self, *, empty: bool = False) -> Word:
        parts: list[Part] = []
        plain: list[str] = []

        def flush() -> None:
            if plain:
                parts.append(Literal("".join(plain), False))
                plain.clear()

        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in _META:
            character = self.text[self.at]
            if character in "'\"$`\\":
                flush()
                parts += self._special(character)
            else:
                plain.append(character)
                self.at += 1
        flush()
        if self.at == start and not empty:
            if self.at >= len(self.text):
                raise Incomplete("a word is missing")
            raise SyntaxFault(f"unexpected {self.text[self.at : self.at + 10]!r}")
        return tuple(parts)

    def _special(self, character: str) -> Word:
        if character == "'":
            end = self._find("'", self.at + 1)
            text = self.text[self.at + 1 : end]
            self.at = end + 1
            return (Literal(text, True),)
        if character == '"':
            self.at += 1
            found = self._quoted('"')
            self.at += 1
            return found or (Literal("", True),)
        if character == "\\":
            if self.at + 1 >= len(self.text):
                raise Incomplete("nothing after a backslash")
            text = self.text[self.at + 1]
            self.at += 2
            return () if text == "\n" else (Literal(text, True),)
        return (self._dollar(quoted=False) if character == "$" else self._backtick(quoted=False),)

    def _quoted(self, end: str) -> Word:
        """The content of double quotes, up to `end`, which is not consumed; "" is the end of the text."""
        parts: list[Part] = []
        plain: list[str] = []
        while True:
            if self.at >= len(self.text):
                if end:
                    raise Incomplete(f"no {end} up to the end")
                break
            character = self.text[self.at]
            if character == end:
                break
            if character == "\\" and self.at + 1 < len(self.text) and self.text[self.at + 1] in '$`"\\\n':
                plain.append("" if self.text[self.at + 1] == "\n" else self.text[self.at + 1])
                self.at += 2
            elif character in "$`":
                if plain:
                    parts.append(Literal("".join(plain), True))
                    plain.clear()
                parts.append(self._dollar(quoted=True) if character == "$" else self._backtick(quoted=True))
            else:
                plain.append(character)
                self.at += 1
        if plain:
            parts.append(Literal("".join(plain), True))
        return tuple(parts)

    def _find(self, text: str, start: int) -> int:
        end = self.text.find(text, start)
        if end < 0:
            raise Incomplete(f"no {text} up to the end")
        return end

    def _backtick(self, *, quoted: bool) -> Part:
        end = self._find("`", self.at + 1)
        inner = self.text[self.at + 1 : end]
        self.at = end + 1
        return Substitution(Parser(inner.replace("\\`", "`")).all(), quoted)

    def _dollar(self, *, quoted: bool) -> Part:
        self.at += 1
        if self.text.startswith("((", self.at):
            depth, at = 0, self.at
            while at < len(self.text):
                depth += {"(": 1, ")": -1}.get(self.text[at], 0)
                at += 1
                if depth == 0:
                    break
            else:
                raise Incomplete("no )) up to the end")
            inner = self.text[self.at + 2 : at - 2]
            self.at = at
            return Arithmetic(Parser(inner)._quoted(""), quoted)
        if self.text.startswith("(", self.at):
            self.at += 1
            script = self._body(")")
            self.at += 1
            return Substitution(script, quoted)
        if self.text.startswith("{", self.at):
            return self._braced(quoted)
        match = _NAME.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
            return Variable(match[0], quoted)
        if self.at < len(self.text) and self.text[self.at] in "?$!#@*-0123456789":
            self.at += 1
            return Variable(self.text[self.at - 1], quoted)
        return Literal("$", quoted)

    def _braced(self, quoted: bool) -> Variable:
        self.at += 1
        length = self.text.startswith("#", self.at) and not self.text.startswith("#}", self.at)
        self.at += length
        match = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[?$!#@*-]|\d+").match(self.text, self.at)
        if match is None:
            if self.at >= len(self.text):
                raise Incomplete("no } up to the end")
            raise SyntaxFault(f"bad substitution: {self.text[self.at - 2 : self.at + 10]!r}")
        self.at = match.end()
        modifier = "length" if length else ""
        word: Word = ()
        found = _MODIFIER.match(self.text, self.at)
        if found is not None and not length:
            modifier = found[0]
            self.at = found.end()
            word = self._until_brace(quoted)
        if not self.text.startswith("}", self.at):
            if self.at >= len(self.text):
                raise Incomplete("no } up to the end")
            raise SyntaxFault(f"bad substitution near {self.text[self.at : self.at + 10]!r}")
        self.at += 1
        return Variable(match[0], quoted, modifier, word)

    def _until_brace(self, quoted: bool) -> Word:
        parts: list[Part] = []
        while not self.text.startswith("}", self.at):
            if self.at >= len(self.text):
                raise Incomplete("no } up to the end")
            character = self.text[self.at]
            if character in ("$`\\\"" if quoted else "'\"$`\\"):
                parts += self._special(character)
            else:
                parts.append(Literal(character, quoted))
                self.at += 1
        return tuple(parts)


# ---- syntax tree: words and commands ----

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
