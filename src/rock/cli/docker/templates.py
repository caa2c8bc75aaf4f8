"""The subset of Go's templates that `--format` of Docker commands takes.

Fields (`.State.Status`), the variable `$`, `json`, `index`, `len`, `join`, `split`, `upper`, `lower`, `title`,
`println`, `printf`, `eq`, `ne`, `lt`, `gt`, `not`, `and`, `or`, pipelines, parentheses, `if`, `else`, `range`, `with`,
`end`, and trim marks. Any other text in braces is InvalidConfig.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rock.cli.output import lines_of, printable
from rock.errors import InvalidConfig

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'\s+|(?P<text>"(?:[^"\\]|\\.)*"|`[^`]*`)|(?P<number>-?\d+)|(?P<mark>[|()])'
                    r"|(?P<field>\$?(?:\.[A-Za-z_]\w*)+|\$|\.)|(?P<word>[A-Za-z_]\w*)")  # fmt: skip
_DEEPEST = 40


@dataclass
class Block:
    """Parts of a template. A part is a text, or (keyword, expression, block, block of else)."""

    parts: list[Any] = field(default_factory=list)


def compiled(text: str) -> Callable[[Any], str]:
    """A function that applies a template to a value. InvalidConfig, also for a field that does not exist."""
    pieces: list[tuple[bool, str]] = []
    end, trim = 0, False
    for match in _ACTION.finditer(text):
        plain = text[end : match.start()]
        plain = plain.lstrip() if trim else plain
        pieces += [(False, plain.rstrip() if match[1] else plain), (True, match[2].strip())]
        end, trim = match.end(), bool(match[3])
    pieces.append((False, text[end:].lstrip() if trim else text[end:]))
    if any("{{" in piece for action, piece in pieces if not action):
        raise _wrong("unclosed action", text)
    rest = pieces[::-1]
    block, closed = _block(rest, 0)
    if closed:
        raise _wrong(f"unexpected {{{{{closed}}}}}", text)
    return lambda value: _apply(block, value, value)


def _wrong(why: str, what: str) -> InvalidConfig:
    return InvalidConfig(f"template parsing error: {why}: {what[:200]}",
                         hint="docs/integrations/docker.md lists the supported templates")


def _block(rest: list[tuple[bool, str]], depth: int) -> tuple[Block, str]:
    """The parts until `end` or `else`, and the word that ends them; "" is the end of the text."""
    block = Block()
    if depth > _DEEPEST:
        raise _wrong("too deep", "")
    while rest:
        action, text = rest.pop()
        word, _, expression = text.partition(" ")
        if not action:
            block.parts.append(text)
        elif text.startswith("/*"):
            continue
        elif text in ("end", "else") or text.startswith("else if "):
            return block, text
        elif word in ("if", "range", "with"):
            block.parts.append(_branch(word, expression, rest, depth))
        else:
            block.parts.append(("value", _expression(text), None, None))
    return block, ""


def _branch(word: str, expression: str, rest: list[tuple[bool, str]], depth: int) -> tuple[Any, ...]:
    body, closed = _block(rest, depth + 1)
    other = Block()
    if closed.startswith("else if "):
        other.parts.append(_branch("if", closed.removeprefix("else if "), rest, depth + 1))
        closed = "end"
    elif closed == "else":
        other, closed = _block(rest, depth + 1)
    if closed != "end":
        raise _wrong("an action has no {{end}}", word)
    return (word, _expression(expression), body, other)


def _expression(text: str) -> list[Any]:
    """A pipeline: a list of commands; a command is a list of terms."""
    tokens: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _wrong("unsupported expression", text)
        place = match.end()
        if match.lastgroup:
            tokens.append((match.lastgroup, match[0]))
    stack: list[list[Any]] = [[[]]]
    for kind, token in tokens:
        if token == "(" and kind == "mark":
            stack.append([[]])
            if len(stack) > _DEEPEST:
                raise _wrong("too deep", text)
        elif token == ")" and kind == "mark":
            inner = stack.pop()
            if not stack:
                raise _wrong("unbalanced parentheses", text)
            stack[-1][-1].append(("pipeline", inner))
        elif token == "|" and kind == "mark":
            stack[-1].append([])
        else:
            stack[-1][-1].append((kind, token))
    if len(stack) != 1 or not all(stack[0]):
        raise _wrong("missing value", text)
    return stack[0]


def _apply(block: Block, value: Any, root: Any) -> str:
    out = []
    for part in block.parts:
        if isinstance(part, str):
            out.append(part)
            continue
        word, expression, body, other = part
        found = _value(expression, value, root)
        if word == "value":
            out.append(_shown(found))
        elif word == "range" and found:
            items = found.values() if isinstance(found, dict) else found
            if not isinstance(found, dict | list):
                raise _wrong("range over a single value", _shown(found))
            out += [_apply(body, item, root) for item in items]
        elif found:
            out.append(_apply(body, found if word == "with" else value, root))
        else:
            out.append(_apply(other, value, root))
    return "".join(out)


def _value(pipeline: list[Any], value: Any, root: Any) -> Any:
    piped: list[Any] = []
    for command in pipeline:
        kind, token = command[0]
        terms = [_term(term, value, root) for term in command[1:]]
        if kind == "word" and token not in ("true", "false", "nil"):
            function = _FUNCTIONS.get(token)
            if function is None:
                raise _wrong("function not defined", token)
            try:
                piped = [function(*terms, *piped)]
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                raise _wrong(f"error calling {token}", str(error)) from None
        elif terms or piped:
            raise _wrong("this value takes no argument", str(token))
        else:
            piped = [_term(command[0], value, root)]
    return piped[0]


def _term(term: tuple[str, Any], value: Any, root: Any) -> Any:
    kind, token = term
    if kind == "pipeline":
        return _value(token, value, root)
    if kind == "text":
        try:
            return token[1:-1] if token[0] == "`" else json.loads(token, strict=False)
        except ValueError:
            raise _wrong("unsupported escape sequence", token) from None
    if kind == "number":
        return int(token)
    if kind == "word":
        if token not in ("true", "false", "nil"):
            raise _wrong("function not defined", token)
        return {"true": True, "false": False, "nil": None}[token]
    found = root if token.startswith("$") else value
    for name in filter(None, token.removeprefix("$").split(".")):
        if not isinstance(found, dict) or name not in found:
            raise InvalidConfig(f"template: map has no entry for key \"{name}\" in {token}",
                                hint="`docker inspect NAME`, or --format '{{json .}}', shows the fields")
        found = found[name]
    return found


def _shown(value: Any) -> str:
    """A value as Go prints it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "<no value>"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{name}:{_shown(value[name])}' for name in sorted(value))}]"
    if isinstance(value, list):
        return f"[{' '.join(map(_shown, value))}]"
    return str(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key, "")
        elif isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(value):
            value = value[key]
        else:
            raise LookupError(f"index out of range: {key}")
    return value


def _printf(form: str, *values: Any) -> str:
    """printf with %s, %v, %d, %q and %%, without widths."""
    rest = list(values)

    def one(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        if match[0][-1] not in "svdq" or not rest:
            raise ValueError(f"unsupported {match[0]}")
        value = rest.pop(0)
        return json.dumps(value) if match[0] == "%q" else _shown(value)

    return re.sub(r"%.?", one, form)


def _any(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


def _all(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False),
    "index": _index,
    "len": lambda value: len(value),
    "join": lambda values, mark: str(mark).join(map(str, values)),
    "split": lambda value, mark: str(value).split(mark),
    "upper": lambda value: str(value).upper(),
    "lower": lambda value: str(value).lower(),
    "title": lambda value: str(value).title(),
    "println": lambda *values: " ".join(map(_shown, values)) + "\n",
    "print": lambda *values: "".join(map(_shown, values)),
    "printf": _printf,
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, other: first != other,
    "lt": lambda first, other: first < other,
    "gt": lambda first, other: first > other,
    "not": lambda value: not value,
    "and": _all,
    "or": _any,
}


def expanded(text: str) -> str:
    r"""A template of the command line: `\t` and `\n` are a tab and a line feed."""
    return text.replace("\\t", "\t").replace("\\n", "\n")


def print_rows(rows: list[dict[str, Any]], columns: dict[str, str], template: str | None) -> None:
    """Rows as a table, as JSON lines, or with a template."""
    text = expanded(template or "table")
    if text == "json":
        text = "{{json .}}"
    if text == "table":
        cells = [[one[name] for name in columns.values()] for one in rows]
        print("\n".join(lines_of(list(columns), cells, None)))
        return
    if not text.startswith("table "):
        apply = compiled(text)
        for one in rows:
            print(safe(apply(one)))
        return
    apply = compiled(text.removeprefix("table "))
    names = {field: title for title, field in columns.items()}
    titles = {field: names.get(field, field.upper()) for field in (rows[0] if rows else names)}
    lines = [apply(one).split("\t") for one in rows]
    head = apply(titles).split("\t")
    print("\n".join(lines_of(head, [(line + [""] * len(head))[: len(head)] for line in lines], None)))


def safe(text: str) -> str:
    return "\n".join(printable(part) if "\t" not in part else "\t".join(map(printable, part.split("\t")))
                     for part in text.split("\n"))  # fmt: skip
