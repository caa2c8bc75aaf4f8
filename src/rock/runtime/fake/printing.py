"""printf, test and signal names for the shell and the tools of fake sandboxes. Pure functions."""

from __future__ import annotations

import re
import signal as signals

from rock.runtime.fake.tree import Tree

_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "e": "\x1b", "\\": "\\", '"': '"',
}  # fmt: skip
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|0?[0-7]{1,3}|.)", re.S)
_FORMAT = re.compile(r"%(%|[-+ 0#]*(?:\*|\d+)?(?:\.\d+)?[a-zA-Z])", re.S)
_WIDEST = 100_000


def escaped(text: str) -> str:
    """Resolve backslash escapes in a text."""

    def one(match: re.Match[str]) -> str:
        word = match[1]
        if word[0] == "x" and len(word) > 1:
            return chr(int(word[1:], 16))
        if word[0] in "01234567":
            return chr(int(word, 8) & 255)
        return _ESCAPES.get(word, "\\" + word)

    return _ESCAPE.sub(one, text)


def formatted(form: str, arguments: list[str]) -> str:
    """printf: repeats the format until all arguments are used. ValueError."""
    rest = list(arguments)
    form = escaped(form)
    out: list[str] = []
    while True:
        before = len(rest)
        out.append(_FORMAT.sub(lambda match: _one(match[1], rest), form))
        if not rest or len(rest) == before:
            return "".join(out)


def _one(spec: str, rest: list[str]) -> str:
    if spec == "%":
        return "%"
    kind = spec[-1]
    flags = spec[:-1].replace("*", rest.pop(0) if "*" in spec and rest else "")
    width = re.search(r"\d+", flags)
    if width and int(width[0]) > _WIDEST:
        raise ValueError(f"{spec}: too wide")
    text = rest.pop(0) if rest else ""
    if kind == "s":
        return f"%{flags}s" % text
    if kind == "b":
        return escaped(text)
    if kind == "q":
        return "'" + text.replace("'", "'\\''") + "'" if not re.fullmatch(r"[\w/.,:=@%+-]+", text) else text
    if kind == "c":
        return text[:1]
    if kind in "diouxX":
        return f"%{flags}{'d' if kind in 'iu' else kind}" % int(text or "0", 0)
    if kind in "eEfFgG":
        return f"%{flags}{kind}" % float(text or "0")
    raise ValueError(f"%{spec}: no such format")


def signal_number(name: str) -> int | None:
    """15 of "TERM", "SIGTERM" and "15"; 0 of "EXIT"."""
    if name.isdigit():
        return int(name) if int(name) < signals.NSIG else None
    bare = name.upper().removeprefix("SIG")
    if bare == "EXIT":
        return 0
    found = getattr(signals, f"SIG{bare}", None)
    return int(found) if isinstance(found, signals.Signals) else None


class Test:
    """The words of `test`. ValueError for an invalid expression."""

    def __init__(self, words: list[str], files: Tree, cwd: str) -> None:
        self._words = words
        self._at = 0
        self._files = files
        self._cwd = cwd

    def value(self) -> bool:
        if not self._words:
            return False
        value = self._either()
        if self._at < len(self._words):
            raise ValueError(f"unexpected {self._words[self._at]!r}")
        return value

    def _next(self) -> str:
        if self._at >= len(self._words):
            raise ValueError("an argument is missing")
        self._at += 1
        return self._words[self._at - 1]

    def _ahead(self, offset: int = 0) -> str | None:
        return self._words[self._at + offset] if self._at + offset < len(self._words) else None

    def _either(self) -> bool:
        value = self._both()
        while self._ahead() == "-o":
            self._at += 1
            value = self._both() or value
        return value

    def _both(self) -> bool:
        value = self._single()
        while self._ahead() == "-a":
            self._at += 1
            value = self._single() and value
        return value

    def _single(self) -> bool:
        word = self._next()
        operator = self._ahead()
        if operator in _COMPARE and self._ahead(1) is not None:
            self._at += 1
            return self._compare(word, operator, self._next())
        if word == "!" and operator is not None:
            return not self._single()
        if word == "(" and operator is not None:
            value = self._either()
            if self._next() != ")":
                raise ValueError(") is missing")
            return value
        if word == "-n" and operator is not None:
            return self._next() != ""
        if word == "-z" and operator is not None:
            return self._next() == ""
        if len(word) == 2 and word[0] == "-" and word[1] in "efdrwxsLhpSt" and operator is not None:
            return self._file(word[1], self._next())
        return word != ""

    def _compare(self, left: str, operator: str, right: str) -> bool:
        if operator in ("=", "=="):
            return left == right
        if operator == "!=":
            return left != right
        a, b = int(left), int(right)
        return {"-eq": a == b, "-ne": a != b, "-lt": a < b, "-le": a <= b, "-gt": a > b, "-ge": a >= b}[operator]

    def _file(self, kind: str, path: str) -> bool:
        path = path if path.startswith("/") else f"{self._cwd.rstrip('/')}/{path}"
        node = self._files.get(path, follow=kind not in "Lh")
        if node is None or kind in "pSt":
            return False
        if kind in "efdLh":
            return kind == "e" or node.kind == {"f": "file", "d": "directory"}.get(kind, "symlink")
        return bool(node.data) if kind == "s" else bool(kind in "rw" or node.mode & 0o111)


_COMPARE = ("=", "==", "!=", "-eq", "-ne", "-lt", "-le", "-gt", "-ge")
