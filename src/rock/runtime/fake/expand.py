"""Word expansion of a fake sandbox's shell: variables, substitutions, arithmetic, fields, patterns."""

from __future__ import annotations

import ast
import fnmatch
import operator
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any

from rock.runtime.fake.syntax import Literal, Part, Substitution, Variable, Word
from rock.runtime.fake.tree import Tree

Segment = tuple[str, bool]  # text, and whether it was quoted
_MAGIC = re.compile(r"[*?\[]")


class ExpansionFault(Exception):
    """A word has no value: ${name:?text}, bad arithmetic, an unset variable under `set -u`."""


class Expander:
    """Words of one shell.

    variable: the value of a name, or None. assign: for ${name:=word}. run: the output of a script. arguments: $@.
    """

    def __init__(
        self,
        variable: Callable[[str], str | None],
        assign: Callable[[str, str], None],
        run: Callable[[Any], Any],
        arguments: Callable[[], list[str]],
        files: Callable[[], tuple[Tree, str]],
    ) -> None:
        self._variable = variable
        self._assign = assign
        self._run = run
        self._arguments = arguments
        self._files = files

    async def text(self, word: Word) -> str:
        """One string, without splitting."""
        parts = self._tilde(word)
        return "".join([" ".join(self._arguments()) if _is_all(part) else await self._value(part) for part in parts])

    async def pattern(self, word: Word) -> str:
        """A pattern for fnmatch, whose quoted characters stand for themselves."""
        segments = [(await self._value(part), part.quoted) for part in self._tilde(word)]
        return _pattern(segments)

    async def fields(self, words: list[Word]) -> list[str]:
        """The arguments that words expand to."""
        out: list[str] = []
        for word in words:
            for field in await self._fields(word):
                out += self._glob(field)
        return out

    def _tilde(self, word: Word) -> Word:
        first = word[0] if word else None
        if isinstance(first, Literal) and not first.quoted and (first.text == "~" or first.text.startswith("~/")):
            return (Literal((self._variable("HOME") or "") + first.text[1:], False), *word[1:])
        return word

    async def _value(self, part: Part) -> str:
        if isinstance(part, Literal):
            return part.text
        if isinstance(part, Variable):
            return await self._variable_value(part)
        if isinstance(part, Substitution):
            return str(await self._run(part.script)).rstrip("\n")
        return str(_calculate(await self.text(part.word), self._variable))

    async def _variable_value(self, part: Variable) -> str:
        if part.modifier.lstrip(":") in ("#", "##", "%", "%%"):
            return _trimmed(self._variable(part.name) or "", part.modifier, await self.pattern(part.word))
        value = self._variable(part.name)
        if part.modifier == "length":
            return str(len(value or ""))
        missing = value is None or (part.modifier.startswith(":") and value == "")
        kind = part.modifier.lstrip(":")
        if kind == "+":
            return "" if missing else await self.text(part.word)
        if missing and kind in ("-", "=", "?"):
            text = await self.text(part.word)
            if kind == "?":
                raise ExpansionFault(f"{part.name}: {text or 'parameter not set'}")
            if kind == "=":
                self._assign(part.name, text)
            return text
        if value is None and "u" in (self._variable("-") or "") and part.name not in "@*-":
            raise ExpansionFault(f"{part.name}: parameter not set")
        return value or ""

    async def _fields(self, word: Word) -> list[list[Segment]]:
        separators = self._variable("IFS")
        separators = " \t\n" if separators is None else separators
        done: list[list[Segment]] = []
        current: list[Segment] | None = None
        for part in self._tilde(word):
            if _is_all(part):
                for index, argument in enumerate(self._arguments()):
                    if index:
                        done.append(current or [])
                        current = None
                    current = [*(current or []), (argument, True)]
                continue
            value = await self._value(part)
            if part.quoted or isinstance(part, Literal):
                current = [*(current or []), (value, part.quoted)]
                continue
            pieces = _split(value, separators)
            for index, (piece, ends) in enumerate(pieces):
                if piece or index < len(pieces) - 1:
                    current = [*(current or []), (piece, False)] if piece else current
                if ends and current is not None:
                    done.append(current)
                    current = None
        return [*done, current] if current is not None else done

    def _glob(self, field: list[Segment]) -> list[str]:
        plain = "".join(text for text, _ in field)
        if not any(not quoted and _MAGIC.search(text) for text, quoted in field):
            return [plain]
        tree, cwd = self._files()
        pattern = _pattern(field)
        start = ["/"] if plain.startswith("/") else [""]
        for part in (part for part in pattern.split("/") if part):
            found = []
            for at in start:
                node = tree.get(posixpath.join(cwd, at))
                names = sorted(node.children) if node is not None else []
                shown = [name for name in names if not name.startswith(".") or part.startswith(".")]
                found += [posixpath.join(at, name) for name in shown if fnmatch.fnmatchcase(name, part)]
            start = found
        return start or [plain]


def _is_all(part: Part) -> bool:
    return isinstance(part, Variable) and part.name == "@" and not part.modifier and part.quoted


def _split(value: str, separators: str) -> list[tuple[str, bool]]:
    """(text, whether a field ends after it)."""
    out: list[tuple[str, bool]] = []
    current = ""
    for character in value:
        if character in separators:
            out.append((current, True))
            current = ""
        else:
            current += character
    return [*out, (current, False)]


def _pattern(segments: list[Segment]) -> str:
    return "".join(
        re.sub(r"([*?\[])", r"[\1]", text) if quoted else text for text, quoted in segments
    )


def _trimmed(value: str, modifier: str, pattern: str) -> str:
    cuts = range(len(value) + 1)
    if modifier in ("##", "%"):
        cuts = range(len(value), -1, -1)
    for cut in cuts:
        if modifier.startswith("#") and fnmatch.fnmatchcase(value[:cut], pattern):
            return value[cut:]
        if modifier.startswith("%") and fnmatch.fnmatchcase(value[cut:], pattern):
            return value[:cut]
    return value


_BINARY: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.Eq: lambda a, b: int(a == b),
    ast.NotEq: lambda a, b: int(a != b), ast.Lt: lambda a, b: int(a < b), ast.LtE: lambda a, b: int(a <= b),
    ast.Gt: lambda a, b: int(a > b), ast.GtE: lambda a, b: int(a >= b),
}  # fmt: skip
_LONGEST = 1000


def _calculate(text: str, variable: Callable[[str], str | None]) -> int:
    """The value of an arithmetic expression: numbers, variables, + - * / %, comparisons, && || !, ( )."""
    if len(text) > _LONGEST:
        raise ExpansionFault("an arithmetic expression is too long")
    source = re.sub(r"!(?!=)", " not ", text.replace("&&", " and ").replace("||", " or ")).strip() or "0"
    try:
        return _evaluate(ast.parse(source, mode="eval").body, variable)
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError) as error:
        raise ExpansionFault(f"arithmetic: {text.strip()!r}: {error}") from None


def _evaluate(node: ast.AST, variable: Callable[[str], str | None]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return int(node.value)
    if isinstance(node, ast.Name):
        return int(variable(node.id) or "0")
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, variable)
        kinds = {ast.USub: -value, ast.UAdd: value, ast.Not: int(not value), ast.Invert: ~value}
        return kinds[type(node.op)]
    if isinstance(node, ast.BoolOp):
        values = [_evaluate(value, variable) for value in node.values]
        return int(all(values) if isinstance(node.op, ast.And) else any(values))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _evaluate(node.left, variable), _evaluate(node.comparators[0], variable)
        kind = _BINARY.get(type(node.ops[0]))
        if kind is not None:
            return kind(left, right)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, variable), _evaluate(node.right, variable)
        if isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
            quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
            return left - quotient * right if isinstance(node.op, ast.Mod) else quotient
        kind = _BINARY.get(type(node.op))
        if kind is not None:
            return kind(left, right)
    raise ValueError("it has what this shell does not know")


