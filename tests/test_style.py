"""Errors of one shape, and the words of the field: ratchets over src/rock, tests and docs.

    python -m tests.test_style                   print every figure next to its ceiling
    python -m tests.test_style errors [CLASS]    print the raise sites that break the rule, of one class or all
    python -m tests.test_style words [WORD]      print the places of the words to avoid, of one word or all
    python -m tests.test_style write             lower the ceilings (style_ceilings.json) to the figures; none is raised

Error texts. Every constructor call of a subclass of RockError in src/rock has a message that says what happened and
why: a fragment of at least two words, without a capital at its start and a full stop at its end. Errors of the classes
in HINTED also say what to do, as `hint=`: whoever gets one can change the request, the settings or the host, or try
again. The others need none: Lost, Expired, Exited, OutOfMemory and DiskFull report the end of a sandbox; the errors of
commands, ports and environments report what a program inside did; ServerError is a fault of the server; NotHere and
ClientError travel between parts of the server or are a base class. A site whose class has a fixed hint passes `hint=`
on all the same. Texts that clients of other projects match (FOREIGN) keep their form.

Every site complies, except in the folders of FALLING: the ceilings count the sites there that do not comply yet, by
class.

Words. WORDS and PHRASES are counted in every file, NAMES in the names of modules and classes.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rock"
CEILINGS = Path(__file__).parent / "style_ceilings.json"

HINTED = {
    "Conflict", "Forbidden", "ImageError", "InvalidConfig", "NoCapacity", "NotFound", "QuotaExceeded", "SessionClosed",
    "StartFailed", "StorageFull", "Unauthorized", "Unavailable", "Unsupported", "WrongRole",
}  # fmt: skip

FALLING = ("src/rock/cli/", "src/rock/sdk/")
# Texts of ROCK, GEM and AgentScope, which their clients match; `{}` for what is computed.
FOREIGN = re.compile(
    r"Sandbox \{\} (?:not found|already exists|cannot be .*)|Requested (?:CPUs|memory) \{\} .*|"
    r"Environment \{\} not found in registry\.|Instance \{\} not found!"
)

# Words to avoid wherever they are part of an identifier or of a sentence, singular or plural.
WORDS = {
    "desk": "tenant-scoped service",
    "dialled": "port connection",
    "door": "gateway; local socket",
    "envdoor": "local environment socket",
    "envexchange": "environment exchange",
    "envlending": "local environment socket",
    "envlink": "environment client",
    "envpipes": "local transport",
    "envwire": "environment pipes",
    "nobody": "no one, none; state who can",
    "outlet": "egress gateway",
    "ownsystem": "host image",
    "ownthread": "dedicated thread",
    "shelf": "state directory",
    "somebody": "the client, the user",
    "standstill": "freeze",
    "tombstone": "record of an ended sandbox",
    "told": "reported, returned, passed",
    "warden": "supervisor process",
    "whoever": "the client, the caller",
    "wholefile": "atomic file",
    "wish": "request, spec",
}
# Phrases to avoid, as regular expressions over text whose line breaks are spaces; upper and lower case are the same.
PHRASES = {
    r"asked for by name": "explicitly requested",
    r"\bdata bases?\b": "database",
    r"\bhands? on\b": "forwards",
    r"\b(?:is|are|was|were|be) told\b": "is reported, is passed",
    r"\bits files went with\b": "its files were deleted when",
    r"\btaken? for lost\b": "marked lost",
    r"\btime-outs?\b": "timeout",
    r"\bwhat of\b": "name the subject first",
    r"\bwho (?:asks|asked|calls|called|waits|waited)\b": "the caller, the client",
    r"\blets? go\b": "releases, detaches",
}
# Names of modules and classes to avoid; a leading underscore does not count.
NAMES = {
    "Desk": "tenant-scoped service", "Fence": "FencingToken", "Intake": "back-pressure", "Kept": "retained sandboxes",
    "Once": "idempotency", "Outlets": "egress gateway", "Pace": "StartQueue", "Resting": "stopped sandboxes",
    "Shelf": "state directory", "Turns": "FairQueue",
    "adding": "import", "begin": "child setup", "birth": "child setup", "boxed": "container init", "bulk": "batching",
    "carried": "stream multiplexer", "carrier": "stream multiplexer", "deriving": "build", "dial": "container init",
    "fence": "fencing", "infos": "projections", "intake": "back_pressure", "kept": "retained",
    "launches": "start operations", "losses": "lost workers", "once": "idempotency", "pace": "start_queue",
    "placing": "placement", "player": "environment worker", "releases": "cleanup operations", "resting": "stopped",
    "room": "garbage_collection", "turns": "fair_queue",
}  # fmt: skip
# Files that list such words on purpose.
SKIPPED = {"tests/test_style.py", "tests/style_ceilings.json", "docs/glossary.md", "CHANGELOG.md"}
AREAS = {"src": ("src/rock", "*.py"), "tests": ("tests", "*.py"), "docs": ("docs", "*.md")}


# ---- error texts


@dataclass(frozen=True)
class Site:
    """A constructor call of an error. message: its literal text, `{}` for what is computed in it; None where all of it
    is. problems: which rules it breaks."""

    path: str
    line: int
    kind: str
    message: str | None
    problems: tuple[str, ...]


@cache
def nodes() -> dict[Path, list[ast.Call | ast.ClassDef]]:
    """The calls and classes of each module of src/rock; rock.sync is generated."""
    return {path: calls_and_classes(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))
            if path.relative_to(SOURCE).parts[0] != "sync"}  # fmt: skip


def calls_and_classes(text: str) -> list[ast.Call | ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call | ast.ClassDef)]


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


@cache
def error_classes() -> dict[str, str]:
    """Every subclass of RockError with the nearest one that errors.py defines, which its rule is that of."""
    found = {"RockError": "RockError"}
    for node in ast.parse((SOURCE / "errors.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and any(_last_name(base) in found for base in node.bases):
            found[node.name] = node.name
        if isinstance(node, ast.Assign) and _last_name(node.value) in found:
            found[_last_name(node.targets[0])] = _last_name(node.value)
    classes = [node for found in nodes().values() for node in found if isinstance(node, ast.ClassDef)]
    before = 0
    while len(found) > before:
        before = len(found)
        for node in classes:
            for base in node.bases:
                if _last_name(base) in found:
                    found.setdefault(node.name, found[_last_name(base)])
    return found


def literal(node: ast.expr | None) -> str | None:
    """The literal text of an expression, `{}` for what is computed in it; None where nothing is literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = literal(node.left), literal(node.right)
        return None if sides == (None, None) else "".join("{}" if side is None else side for side in sides)
    if isinstance(node, ast.Subscript):  # a text that is cut
        return literal(node.value)
    return None


def texts(node: ast.expr | None) -> list[str | None]:
    """The texts that an expression may be."""
    if isinstance(node, ast.IfExp):
        return [*texts(node.body), *texts(node.orelse)]
    return [literal(node)]


# A text may begin with these: names that are written so.
_CAPITALS = re.compile(r"(?:[A-Z][a-z]*[A-Z0-9_]|[A-Z]{2,}|Docker|Debian|Python|Linux|Landlock|Git|Ray|Kata|Node|Ctrl)")


def shape(text: str) -> list[str]:
    """What is wrong with a literal text of an error."""
    found = []
    words = re.findall(r"[A-Za-z][A-Za-z'_=.-]*", text.replace("{}", " "))
    if not text.strip():
        return ["empty"]
    if FOREIGN.fullmatch(text):
        return []
    if len(words) < 2:
        found.append("fewer than two words")
    if text != text.strip() or "\n" in text:
        found.append("space at an end, or a line break")
    if text.rstrip().endswith((".", "!")) and not text.endswith("..."):
        found.append("full stop")
    if text[0].isupper() and not _CAPITALS.match(text):
        found.append("capital at its start")
    return found


def sites_of(path: str, found: list[ast.Call | ast.ClassDef], classes: dict[str, str]) -> Iterator[Site]:
    """The constructor calls of errors in a module."""
    for node in found:
        if not isinstance(node, ast.Call) or _last_name(node.func) not in classes:
            continue
        kind = classes[_last_name(node.func)]
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        first = node.args[0] if node.args else keywords.get("message")
        problems = ["no message"] if first is None else []
        for text in texts(first):
            problems += [] if text is None else shape(text)
        hint = keywords.get("hint")
        missing = hint is None or (isinstance(hint, ast.Constant) and hint.value is None)
        if kind in HINTED and missing and None not in keywords:
            problems.append("no hint")
        for text in texts(hint):
            problems += [f"hint: {wrong}" for wrong in shape(text) if wrong != "fewer than two words"] if text else []
        yield Site(path, node.lineno, kind, texts(first)[0], tuple(problems))


@cache
def sites() -> list[Site]:
    found: list[Site] = []
    for path, calls in nodes().items():
        found += sites_of(path.relative_to(ROOT).as_posix(), calls, error_classes())
    return found


def error_figures() -> dict[str, int]:
    """The sites of FALLING that break a rule: of each class those without a hint, and those whose text has another
    shape."""
    falling = [site for site in sites() if site.path.startswith(FALLING)]
    hints = Counter(f"no hint: {site.kind}" for site in falling if "no hint" in site.problems)
    shapes = sum(any(problem != "no hint" for problem in site.problems) for site in falling)
    return {**{f"no hint: {kind}": hints[f"no hint: {kind}"] for kind in sorted(HINTED)}, "other shape": shapes}


# ---- words


@cache
def files(area: str) -> dict[str, str]:
    """The texts of an area, by path."""
    folder, pattern = AREAS[area]
    found = {}
    for path in sorted((ROOT / folder).rglob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        if name not in SKIPPED and not name.startswith("src/rock/sync/"):
            found[name] = path.read_text()
    if area == "docs":
        found["README.md"] = (ROOT / "README.md").read_text()
    return found


def parts_of(text: str) -> Counter[str]:
    """The words of a text, in lower case: identifiers are taken apart at `_` and at capitals."""
    return Counter(part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text))


def forms(word: str) -> tuple[str, ...]:
    return word, f"{word}s", f"{word}es", f"{word}ed"


def prose(text: str) -> str:
    """A text whose line breaks, with the comment signs after them, are spaces."""
    return re.sub(r"\s*\n\s*(?:# ?)?", " ", text)


def names_of(path: str, text: str) -> Iterator[tuple[str, int]]:
    """The names of a module and of its classes, with their lines."""
    yield Path(path).stem, 1
    for match in re.finditer(r"^\s*class _*(\w+)", text, re.MULTILINE):
        yield match[1], text.count("\n", 0, match.start(1)) + 1


@cache
def word_figures() -> dict[str, dict[str, int]]:
    """How often each word, phrase and name occurs in each area."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for area in AREAS:
        texts_here = files(area)
        counts: Counter[str] = Counter()
        for text in texts_here.values():
            counts += parts_of(text)
        for word in WORDS:
            found[word][area] = sum(counts[form] for form in forms(word))
        whole = "\n\n".join(map(prose, texts_here.values()))
        for phrase in PHRASES:
            found[phrase][area] = len(re.findall(phrase, whole, re.IGNORECASE))
        names: Counter[str] = Counter()
        if area != "docs":
            names = Counter(name for path, text in texts_here.items() for name, _ in names_of(path, text))
        for name in NAMES:
            found[f"name {name}"][area] = names[name]
    return dict(found)


def places(word: str) -> Iterator[str]:
    """The lines of a word, a phrase or a name: of a phrase over two lines the second."""
    for area in AREAS:
        for path, text in files(area).items():
            if word in NAMES and area != "docs":
                yield from (f"{path}:{line} {name}" for name, line in names_of(path, text) if name == word)
            lines = text.splitlines()
            for number, line in enumerate(lines, 1):
                if word in WORDS and any(form in parts_of(line) for form in forms(word)):
                    yield f"{path}:{number} {line.strip()}"
                if word in PHRASES:
                    both = prose("\n".join(lines[max(0, number - 2) : number]))
                    before = prose(lines[number - 2]) if number > 1 else ""
                    count = [len(re.findall(word, one, re.IGNORECASE)) for one in (both, before)]
                    yield from (f"{path}:{number} {line.strip()}" for _ in range(count[0] - count[1]))


# ---- ceilings


def figures() -> dict[str, int]:
    """Every figure by the name of its ceiling."""
    words = {f"{word} in {area}": count for word, areas in word_figures().items() for area, count in areas.items()}
    return {**{f"errors, {name}": count for name, count in error_figures().items()}, **words}


def ceilings() -> dict[str, int]:
    """No ceiling is 0."""
    found: dict[str, int] = json.loads(CEILINGS.read_text())
    return found


def _above(prefix: str) -> list[str]:
    limits = ceilings()
    return [f"{name}: {count}, at most {limits.get(name, 0)}" for name, count in figures().items()
            if name.startswith("errors, ") == (prefix == "errors") and count > limits.get(name, 0)]  # fmt: skip


def listed(site: Site) -> str:
    return f"{site.path}:{site.line} {site.kind} [{', '.join(site.problems)}] {site.message or '(computed)'}"


def test_error_texts() -> None:
    wrong = [listed(site) for site in sites() if site.problems and not site.path.startswith(FALLING)]
    assert not wrong, "\n".join([f"see the docstring of {__name__}:", *wrong])


def test_error_texts_of_the_sdk_and_the_cli() -> None:
    above = _above("errors")
    assert not above, f"{above}: see `python -m tests.test_style errors`, and the docstring of {__name__}"


def test_words() -> None:
    above = _above("words")
    assert not above, f"{above}: see `python -m tests.test_style words`, and the tables in {__name__}"


def test_ceilings_are_of_figures() -> None:
    assert not ceilings().keys() - figures().keys()


@pytest.mark.parametrize(
    ("call", "problems"),
    [
        ('Conflict("the session is open already", hint="close it first")', ()),
        ('Conflict("the session is open already")', ("no hint",)),
        ('errors.Conflict(f"{name} is there", hint=None)', ("no hint",)),
        ('Conflict("the session is open", **more)', ()),
        ('Lost("its machine went away")', ()),
        ("Lost()", ("no message",)),
        ('Lost("")', ("empty",)),
        ('Lost(f"{name}: {error}")', ("fewer than two words",)),
        ('Lost("Its machine went away.")', ("full stop", "capital at its start")),
        ('Lost("it went" if gone else "It was lost")', ("capital at its start",)),
        ('Lost("HTTP is not what it speaks")', ()),
        ('Lost(f"Sandbox {name} not found")', ()),
        ('Lost(f"Sandbox {name} was not found")', ("capital at its start",)),
        ('Conflict(str(error), hint="Close it.")', ("hint: full stop", "hint: capital at its start")),
        ('Ours("it is taken")', ("no hint",)),
        ('ValueError("")', None),
    ],
)
def test_a_site_is_judged(call: str, problems: tuple[str, ...] | None) -> None:
    classes = {"Conflict": "Conflict", "Lost": "Lost", "Ours": "Conflict"}
    found = list(sites_of("x.py", calls_and_classes(call), classes))
    assert [site.problems for site in found] == ([] if problems is None else [problems])


def test_subclasses_have_the_rule_of_their_base() -> None:
    classes = error_classes()
    assert classes["BadRequestRockError"] == "ClientError" and classes["ImageError"] == "ImageError"
    assert set(classes.values()) >= HINTED
    assert len(sites()) > 500


def test_words_are_found_in_identifiers_and_over_lines() -> None:
    assert parts_of("CreateWish wish_list _wishes WISH") == Counter({"wish": 3, "create": 1, "list": 1, "wishes": 1})
    assert "desk" not in parts_of("a desktop")
    assert re.search(r"\bwho asks\b", prose("those who\n    # asks come"))
    assert list(names_of("a/kept.py", "x = 1\n\nclass _Kept:\n    pass\n")) == [("kept", 1), ("Kept", 3)]


def main(words: list[str]) -> None:
    chosen, more = (words or ["figures"])[0], words[1:]
    if chosen == "errors":
        for site in sites():
            if site.problems and (not more or site.kind in more):
                print(listed(site))
    elif chosen == "words":
        tables = {**WORDS, **PHRASES, **NAMES}
        for word in more or tables:
            print(f"-- {word} -> {tables[word]}")
            print(*places(word), sep="\n")
    elif chosen == "write":
        old = ceilings() if CEILINGS.exists() else figures()
        new = {name: min(count, old.get(name, 0)) for name, count in figures().items()}
        CEILINGS.write_text(json.dumps({name: count for name, count in new.items() if count}, indent=1) + "\n")
    else:
        limits = ceilings()
        print(f"{len(sites())} raise sites, {sum(bool(site.problems) for site in sites())} that break a rule")
        for name, count in figures().items():
            if count or name in limits:
                print(f"{count:5} of at most {limits.get(name, 0):5}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
