"""The programs that every fake sandbox has: the most used options of the usual text and file tools."""

from __future__ import annotations

import asyncio
import posixpath
import re
import time
from collections.abc import Callable, Iterator

from rock.runtime.fake import printing
from rock.runtime.fake.programs import Call, Program, ToolFailed

# ---- option parsing and text tools ----

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
        raise ToolFailed(f"invalid pattern: {error}") from None
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


# ---- file and system tools ----


_MOST_LINES = 1_000_000


async def cat(call: Call) -> int:
    _, paths = options_of(call)
    for path in paths or ["-"]:
        if path != "-":
            call.out(call.files.read(call.path(path)) if not _is_null(call, path) else b"")
            continue
        while piece := await call.read():
            call.out(piece)
            await call.flush()
    return 0


def _is_null(call: Call, path: str) -> bool:
    return call.files.find(call.path(path)).kind == "device"


def ls(call: Call) -> int:
    options, paths = options_of(call)
    several = len(paths) > 1
    code = 0
    for index, path in enumerate(paths or ["."]):
        found = call.files.get(call.path(path))
        if found is None:
            call.err(f"ls: cannot access '{path}': No such file or directory\n")
            code = 2
            continue
        if found.kind != "directory" or "d" in options:
            call.out(_listed(path, call, options))
            continue
        if several:
            call.out(f"{chr(10) if index else ''}{path}:\n")
        for entry in call.files.list(call.path(path)):
            if not entry.name.startswith(".") or options.keys() & {"a", "A"}:
                call.out(_listed(posixpath.join(path, entry.name), call, options, entry.name))
    return code


def _listed(path: str, call: Call, options: dict[str, str], name: str | None = None) -> str:
    if "l" not in options:
        return f"{name or path}\n"
    found = call.files.stat(call.path(path), follow=False)
    kind = {"directory": "d", "symlink": "l", "device": "c"}.get(found.kind, "-")
    mode = "".join(letter if found.mode >> 8 - index & 1 else "-" for index, letter in enumerate("rwx" * 3))
    arrow = f" -> {found.target}" if found.target else ""
    return f"{kind}{mode} 1 root root {found.size} {name or path}{arrow}\n"


def mkdir(call: Call) -> int:
    options, paths = options_of(call, "m")
    for path in paths:
        call.files.make_dir(call.path(path), parents="p" in options, mode=int(options.get("m", "755"), 8))
    return 0


def rm(call: Call) -> int:
    options, paths = options_of(call)
    recursive = bool(options.keys() & {"r", "R"})
    for path in paths:
        found = call.files.get(call.path(path), follow=False)
        if found is None:
            if "f" not in options:
                raise ToolFailed(f"cannot remove '{path}': No such file or directory")
        elif found.kind == "directory" and not recursive:
            raise ToolFailed(f"cannot remove '{path}': Is a directory")
        else:
            call.files.remove(call.path(path), recursive=recursive)
    return 0


def rmdir(call: Call) -> int:
    for path in options_of(call)[1]:
        call.files.folder(call.path(path))
        call.files.remove(call.path(path))
    return 0


def _into(call: Call, source: str, target: str) -> str:
    found = call.files.get(call.path(target))
    inside = found is not None and found.kind == "directory"
    return posixpath.join(call.path(target), posixpath.basename(source.rstrip("/"))) if inside else call.path(target)


def cp(call: Call) -> int:
    options, paths = options_of(call)
    *sources, target = paths
    for source in sources:
        _copy(call, call.path(source), _into(call, source, target), bool(options.keys() & {"r", "R", "a"}))
    return 0


def _copy(call: Call, source: str, target: str, recursive: bool) -> None:
    found = call.files.find(source)
    if found.kind != "directory":
        call.files.write(target, call.files.read(source), found.mode)
        return
    if not recursive:
        raise ToolFailed(f"-r not specified; omitting directory '{source}'")
    if f"{target}/".startswith(f"{source}/"):
        raise ToolFailed(f"cannot copy '{source}' into itself")
    call.files.make_dir(target, mode=found.mode)
    for name in list(found.children):
        _copy(call, f"{source}/{name}", f"{target}/{name}", recursive)


def mv(call: Call) -> int:
    *sources, target = options_of(call)[1]
    for source in sources:
        call.files.move(call.path(source), _into(call, source, target))
    return 0


def ln(call: Call) -> int:
    options, paths = options_of(call)
    if "s" not in options or not paths:
        raise ToolFailed("only symbolic links (-s)")
    target = paths[0]
    path = _into(call, target, paths[1] if len(paths) > 1 else ".")
    if "f" in options and call.files.get(path, follow=False) is not None:
        call.files.remove(path)
    call.files.symlink(target, path)
    return 0


def touch(call: Call) -> int:
    for path in options_of(call)[1]:
        if call.files.get(call.path(path)) is None:
            call.files.write(call.path(path), b"")
        else:
            call.files.find(call.path(path)).mtime = time.time()
    return 0


def chmod(call: Call) -> int:
    options, words = options_of(call)
    for path in words[1:]:
        mode = words[0]
        old = call.files.find(call.path(path)).mode
        if mode.isdigit():
            new = int(mode, 8)
        elif (match := re.fullmatch(r"[ugoa]*([+-])([rwx]+)", mode)) is not None:
            bits = sum({"r": 0o444, "w": 0o222, "x": 0o111}[letter] for letter in match[2])
            new = old | bits if match[1] == "+" else old & ~bits
        else:
            raise ToolFailed(f"invalid mode: '{mode}'")
        call.files.chmod(call.path(path), new, recursive="R" in options)
    return 0


def seq(call: Call) -> int:
    options, words = options_of(call, "fs")
    numbers = [float(word) for word in words]
    first, step, last = {1: (1.0, 1.0), 2: (numbers[0], 1.0), 3: (numbers[0], numbers[min(1, len(numbers) - 1)])}[
        len(numbers)] + (numbers[-1],)
    if step == 0 or (last - first) / step > _MOST_LINES:
        raise ToolFailed("too many numbers")
    values = (first + index * step for index in range(max(0, int((last - first) / step) + 1)))
    form = options.get("f", "%g" if abs(last) < 1e5 else "%.10g")
    out = [form % value for value in values]
    end = options.get("s", "\n")
    call.out(end.join(out) + ("\n" if out else ""))
    return 0


async def sleep(call: Call) -> int:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    total = 0.0
    for word in call.argv[1:]:
        match = re.fullmatch(r"(\d*\.?\d+)([smhd]?)", word)
        if match is None and word != "infinity":
            raise ToolFailed(f"invalid time interval '{word}'")
        total += float(match[1]) * units[match[2] or "s"] if match else 1e9
    await asyncio.sleep(total)
    return 0


async def env(call: Call) -> int:
    words, variables = call.argv[1:], dict(call.env)
    while words and (words[0] == "-i" or "=" in words[0]):
        name, equals, value = words.pop(0).partition("=")
        if equals:
            variables[name] = value
        else:
            variables.clear()
    if words:
        return await call.become(words, variables)
    call.out("".join(f"{name}={value}\n" for name, value in variables.items()))
    return 0


async def xargs(call: Call) -> int:
    options, words = options_of(call, "nI")
    given = text_of(await call.read_all()).split()
    size = int(options.get("n", "5000"))
    code = 0
    for start in range(0, max(1, len(given)), size):
        status = await call.child([*(words or ["echo"]), *given[start : start + size]])
        code = 123 if status.shell_code else code
    return code


async def becoming(call: Call) -> int:
    """setsid, nohup, nice: they have no effect here and run the given program."""
    words = call.argv[1:]
    while words and words[0].startswith("-"):
        words = words[1:]
    return await call.become(words) if words else 0


async def timeout(call: Call) -> int:
    words = call.argv[1:]
    child = call.process.child(lambda child: child.play(_run, words[1:], call.env))
    try:
        async with asyncio.timeout(float(words[0].rstrip("s"))):
            return (await child.wait()).shell_code or 0
    except TimeoutError:
        child.deliver(15)
        await child.wait()
        return 124


async def _run(call: Call) -> int:
    return await call.become(call.argv)


def stat(call: Call) -> int:
    options, paths = options_of(call, "c")
    for path in paths:
        found = call.files.stat(call.path(path), follow="L" in options)
        values = {"%a": f"{found.mode:o}", "%s": str(found.size), "%u": str(found.uid), "%g": str(found.gid),
                  "%n": path, "%Y": str(int(found.mtime)), "%F": found.kind}  # fmt: skip
        words = re.split(r"(%[a-zA-Z])", options.get("c", "%n %s"))
        call.out("".join(values.get(word, word) for word in words) + "\n")
    return 0


def readlink(call: Call) -> int:
    options, paths = options_of(call)
    for path in paths:
        found = call.files.find(call.path(path), follow=False)
        if "f" in options:
            call.out(call.files.real(call.path(path)) + "\n")
        elif found.target is None:
            return 1
        else:
            call.out(found.target + "\n")
    return 0


def _say(text: Callable[[Call], str]) -> Program:
    def program(call: Call) -> int:
        call.out(text(call) + "\n")
        return 0

    return program


def basename(call: Call) -> int:
    name = posixpath.basename(call.argv[1].rstrip("/")) or "/"
    call.out((name.removesuffix(call.argv[2]) if len(call.argv) > 2 else name) + "\n")
    return 0


def printenv(call: Call) -> int:
    names = call.argv[1:]
    call.out("".join(f"{call.env[name]}\n" for name in names if name in call.env))
    return int(any(name not in call.env for name in names))


def date(call: Call) -> int:
    form = next((word[1:] for word in call.argv[1:] if word.startswith("+")), "%a %b %d %H:%M:%S UTC %Y")
    now = time.time()
    form = form.replace("%s", str(int(now))).replace("%N", f"{int(now % 1 * 1e9):09}")
    call.out(time.strftime(form, time.gmtime(now)) + "\n")
    return 0


TOOLS: dict[str, Program] = {
    "cat": cat, "ls": ls, "mkdir": mkdir, "rm": rm, "rmdir": rmdir, "cp": cp, "mv": mv, "ln": ln, "touch": touch,
    "chmod": chmod, "head": head, "tail": tail, "wc": wc, "grep": grep, "sort": sort, "uniq": uniq, "seq": seq,
    "sleep": sleep, "env": env, "xargs": xargs, "setsid": becoming, "nohup": becoming, "nice": becoming,
    "timeout": timeout, "tee": tee, "cut": cut, "tr": tr, "stat": stat, "readlink": readlink, "realpath": readlink,
    "basename": basename, "printenv": printenv, "date": date, "true": lambda call: 0, "false": lambda call: 1,
    "dirname": _say(lambda call: posixpath.dirname(call.argv[1]) or "."), "hostname": _say(lambda call: "fake"),
    "whoami": _say(lambda call: "root"), "id": _say(lambda call: "0" if "-u" in call.argv else "uid=0(root)"),
    "uname": _say(lambda call: "Linux"), "nproc": _say(lambda call: "1"), "sync": lambda call: 0,
}  # fmt: skip
