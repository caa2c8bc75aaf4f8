"""The programs that every fake sandbox has: the most used options of the usual ones."""

from __future__ import annotations

import asyncio
import posixpath
import re
import time
from collections.abc import Callable

from rock import errors
from rock.runtime.fake.programs import Call, Program
from rock.runtime.fake.texttools import cut, grep, head, options_of, sort, tail, tee, text_of, tr, uniq, wc

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
                raise errors.NotFound(f"cannot remove '{path}': No such file or directory")
        elif found.kind == "directory" and not recursive:
            raise errors.Conflict(f"cannot remove '{path}': Is a directory")
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
        raise errors.Conflict(f"-r not specified; omitting directory '{source}'")
    if f"{target}/".startswith(f"{source}/"):
        raise errors.InvalidConfig(f"cannot copy '{source}' into itself")
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
        raise errors.Unsupported("only symbolic links (-s)")
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
            raise errors.InvalidConfig(f"invalid mode: '{mode}'")
        call.files.chmod(call.path(path), new, recursive="R" in options)
    return 0


def seq(call: Call) -> int:
    options, words = options_of(call, "fs")
    numbers = [float(word) for word in words]
    first, step, last = {1: (1.0, 1.0), 2: (numbers[0], 1.0), 3: (numbers[0], numbers[min(1, len(numbers) - 1)])}[
        len(numbers)] + (numbers[-1],)
    if step == 0 or (last - first) / step > _MOST_LINES:
        raise errors.InvalidConfig("too many numbers")
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
            raise errors.InvalidConfig(f"invalid time interval '{word}'")
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
    """setsid, nohup, nice: what they are about does not exist here; they are the program that they are given."""
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
