"""Programs of fake sandboxes that read text and print text, and how the tools read their options."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rock import errors
from rock.runtime.fake import printing
from rock.runtime.fake.programs import Call


def options_of(call: Call, with_value: str = "") -> tuple[dict[str, str], list[str]]:
    """(short options, operands). with_value: letters that take one."""
    found: dict[str, str] = {}
    words = call.argv[1:]
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = value
            continue
        for index, letter in enumerate(word[1:], 2):
            if letter in with_value:
                found[letter] = word[index:] or (words.pop(0) if words else "")
                break
            found[letter] = ""
    return found, words


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


async def inputs(call: Call, paths: list[str]) -> list[tuple[str, bytes]]:
    if not paths:
        return [("-", await call.read_all())]
    return [(path, await call.read_all() if path == "-" else call.files.read(call.path(path))) for path in paths]


async def _lines(call: Call, paths: list[str]) -> list[str]:
    return [line for _, data in await inputs(call, paths) for line in text_of(data).splitlines(keepends=True)]


async def head(call: Call) -> int:
    options, paths = options_of(call, "nc")
    for _, data in await inputs(call, paths):
        if "c" in options:
            call.out(data[: int(options["c"])])
        else:
            lines = data.splitlines(keepends=True)
            call.out(b"".join(lines[: int(options.get("n", "10"))]))
    return 0


async def tail(call: Call) -> int:
    options, paths = options_of(call, "nc")
    for _, data in await inputs(call, paths):
        lines = data.splitlines(keepends=True)
        count = options.get("n", "10")
        start = int(count[1:]) - 1 if count.startswith("+") else max(0, len(lines) - int(count.lstrip("-")))
        call.out(data[-int(options["c"]) :] if "c" in options else b"".join(lines[start:]))
    return 0


async def wc(call: Call) -> int:
    options, paths = options_of(call)
    for path, data in await inputs(call, paths):
        counts = {"l": data.count(b"\n"), "w": len(data.split()), "c": len(data)}
        wanted = [str(counts[letter]) for letter in "lwc" if letter in options or not options]
        call.out(" ".join([*wanted, *([path] if path != "-" else [])]) + "\n")
    return 0


async def grep(call: Call) -> int:
    options, words = options_of(call, "em")
    pattern = options.get("e") or words.pop(0)
    flags = re.IGNORECASE if "i" in options else 0
    try:
        regular = re.compile(re.escape(pattern) if "F" in options else pattern, flags)
    except re.error as error:
        raise errors.InvalidConfig(f"invalid pattern: {error}") from None
    found = 0
    for path, data in await inputs(call, words):
        count = 0
        for number, line in enumerate(text_of(data).splitlines(), 1):
            match = regular.search(line)
            if (match is not None) != ("v" in options):
                count += 1
                prefix = (f"{path}:" if len(words) > 1 else "") + (f"{number}:" if "n" in options else "")
                if not options.keys() & {"q", "c", "l"}:
                    call.out(f"{prefix}{match[0] if 'o' in options and match else line}\n")
        found += count
        if "c" in options:
            call.out(f"{count}\n")
        if "l" in options and count:
            call.out(f"{path}\n")
    return int(not found)


async def sort(call: Call) -> int:
    options, paths = options_of(call, "kt")
    lines = [line.rstrip("\n") for line in await _lines(call, paths)]

    def number(line: str) -> tuple[float, str]:
        match = re.match(r"\s*(-?\d+(?:\.\d+)?)", line)
        return float(match[1]) if match else 0.0, line

    ordered = sorted(lines, key=number) if "n" in options else sorted(lines)
    ordered = list(dict.fromkeys(ordered)) if "u" in options else ordered
    call.out("".join(line + "\n" for line in (reversed(ordered) if "r" in options else ordered)))
    return 0


async def uniq(call: Call) -> int:
    options, paths = options_of(call)
    groups: list[tuple[str, int]] = []
    for line in await _lines(call, paths):
        if groups and groups[-1][0] == line:
            groups[-1] = line, groups[-1][1] + 1
        else:
            groups.append((line, 1))
    call.out("".join(f"{count:7} {line}" if "c" in options else line for line, count in groups))
    return 0


async def tee(call: Call) -> int:
    options, paths = options_of(call)
    data = await call.read_all()
    for path in paths:
        call.files.write(call.path(path), data, append="a" in options)
    call.out(data)
    return 0


def _ranges(text: str) -> Iterator[tuple[int, int]]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        start = int(first) if first else 1
        yield start - 1, int(last) if last else (1 << 30 if dash else start)


async def cut(call: Call) -> int:
    options, paths = options_of(call, "dfcb")
    letter = "f" if "f" in options else "c"
    ranges = list(_ranges(options.get(letter) or options.get("b", "1")))
    mark = options.get("d", "\t")
    for line in await _lines(call, paths):
        bare = line.rstrip("\n")
        items: list[str] = bare.split(mark) if letter == "f" else list(bare)
        picked = [item for index, item in enumerate(items) if any(a <= index < b for a, b in ranges)]
        call.out((mark if letter == "f" else "").join(picked) + "\n")
    return 0


def _letters(text: str) -> str:
    text = printing.escaped(text)
    return re.sub(r"(.)-(.)", lambda m: "".join(chr(c) for c in range(ord(m[1]), ord(m[2]) + 1)), text, flags=re.S)


async def tr(call: Call) -> int:
    options, words = options_of(call)
    text = text_of(await call.read_all())
    first = _letters(words[0])
    if "d" in options:
        call.out(text.translate({ord(letter): None for letter in first}))
        return 0
    second = _letters(words[1]) if len(words) > 1 else first
    table = {ord(letter): second[min(index, len(second) - 1)] for index, letter in enumerate(first)}
    call.out(text.translate(table))
    return 0
