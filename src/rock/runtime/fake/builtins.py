"""Builtin commands of a fake sandbox's shell, and the programs that are a shell with them: `sh`, `echo`, ..."""

from __future__ import annotations

import re

from rock import errors
from rock.runtime.fake import printing
from rock.runtime.fake.programs import Call, Program
from rock.runtime.fake.shell import Builtin, Exit, Leave, Return, Shell
from rock.runtime.fake.syntax import Parser, SyntaxFault

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


async def _say(shell: Shell, text: str) -> int:
    stream = shell.process.fds.get(1)
    if stream is not None:
        await stream.write(text.encode("utf-8", "surrogateescape"))
    return 0


async def _fail(shell: Shell, text: str, code: int = 1) -> int:
    await shell.complain(text)
    return code


async def do_true(shell: Shell, argv: list[str]) -> int:
    return 0


async def do_false(shell: Shell, argv: list[str]) -> int:
    return 1


async def do_echo(shell: Shell, argv: list[str]) -> int:
    words, end = argv[1:], "\n"
    while words and words[0] in ("-n", "-e", "-ne", "-en"):
        option = words.pop(0)
        end = "" if "n" in option else end
        if "e" in option:
            words = [printing.escaped(word) for word in words]
    return await _say(shell, " ".join(words) + end)


async def do_printf(shell: Shell, argv: list[str]) -> int:
    if len(argv) < 2:
        return await _fail(shell, "printf: a format is missing", 2)
    try:
        return await _say(shell, printing.formatted(argv[1], argv[2:]))
    except ValueError as error:
        return await _fail(shell, f"printf: {error}")


async def do_cd(shell: Shell, argv: list[str]) -> int:
    words = [word for word in argv[1:] if word not in ("--", "-L", "-P")]
    target = words[0] if words else shell.value("HOME") or "/"
    back = target == "-"
    if back:
        target = shell.value("OLDPWD") or "/"
    path = target if target.startswith("/") else f"{shell.process.cwd.rstrip('/')}/{target}"
    try:
        shell.process.sandbox.files.folder(path)
        real = shell.process.sandbox.files.real(path)
    except errors.RockError as error:
        return await _fail(shell, f"cd: {error.message}", 2)
    shell.assign("OLDPWD", shell.process.cwd)
    shell.process.cwd = real
    shell.assign("PWD", real)
    return await _say(shell, real + "\n") if back else 0


async def do_pwd(shell: Shell, argv: list[str]) -> int:
    return await _say(shell, shell.process.cwd + "\n")


def _code(shell: Shell, argv: list[str]) -> int:
    if len(argv) > 1 and not re.fullmatch(r"-?\d+", argv[1]):
        return 2
    return int(argv[1]) & 255 if len(argv) > 1 else shell.status


async def do_exit(shell: Shell, argv: list[str]) -> int:
    raise Exit(_code(shell, argv))


async def do_return(shell: Shell, argv: list[str]) -> int:
    raise Return(_code(shell, argv))


async def do_leave(shell: Shell, argv: list[str]) -> int:
    levels = int(argv[1]) if len(argv) > 1 and argv[1].isdigit() else 1
    raise Leave(max(1, levels), argv[0] == "continue")


async def do_export(shell: Shell, argv: list[str]) -> int:
    for word in argv[1:]:
        name, equals, value = word.partition("=")
        if word == "-p" or not _NAME.fullmatch(name):
            continue
        if equals:
            shell.assign(name, value)
        shell.exported.add(name)
    return 0


async def do_unset(shell: Shell, argv: list[str]) -> int:
    for name in argv[1:]:
        shell.variables.pop(name, None)
        shell.exported.discard(name)
        shell.functions.pop(name, None)
    return 0


async def do_set(shell: Shell, argv: list[str]) -> int:
    words = argv[1:]
    while words and words[0][:1] in ("-", "+"):
        word = words.pop(0)
        if word == "--":
            shell.arguments = words
            return 0
        given = {words.pop(0)} if word[1:] == "o" and words else set(word[1:])
        long = {"errexit": "e", "nounset": "u", "allexport": "a", "xtrace": "x"}
        given = {long.get(option, option) for option in given} - {"o"}
        shell.options = shell.options | given if word[0] == "-" else shell.options - given
    if words:
        shell.arguments = words
    return 0


async def do_shift(shell: Shell, argv: list[str]) -> int:
    count = int(argv[1]) if len(argv) > 1 and argv[1].isdigit() else 1
    if count > len(shell.arguments):
        return 1
    shell.arguments = shell.arguments[count:]
    return 0


async def do_read(shell: Shell, argv: list[str]) -> int:
    names = [word for word in argv[1:] if not word.startswith("-")] or ["REPLY"]
    stream = shell.process.fds.get(0)
    line = bytearray()
    end = False
    while stream is not None:
        piece = await stream.read(1)
        if not piece:
            end = True
            break
        if piece == b"\n":
            break
        line += piece
    words = line.decode("utf-8", "surrogateescape").split(None, len(names) - 1) if len(names) > 1 else [
        line.decode("utf-8", "surrogateescape").strip(" \t")]
    for index, name in enumerate(names):
        shell.assign(name, words[index].strip() if index < len(words) else "")
    return int(end or stream is None)


async def do_test(shell: Shell, argv: list[str]) -> int:
    words = argv[1:]
    if argv[0] == "[":
        if not words or words[-1] != "]":
            return await _fail(shell, "[: ] is missing", 2)
        words = words[:-1]
    try:
        return int(not printing.Test(words, shell.process.sandbox.files, shell.process.cwd).value())
    except ValueError as error:
        return await _fail(shell, f"{argv[0]}: {error}", 2)


async def do_eval(shell: Shell, argv: list[str]) -> int:
    await shell.evaluate(" ".join(argv[1:]))
    return shell.status


async def do_source(shell: Shell, argv: list[str]) -> int:
    if len(argv) < 2:
        return await _fail(shell, f"{argv[0]}: a file is missing", 2)
    path = argv[1] if argv[1].startswith("/") else f"{shell.process.cwd.rstrip('/')}/{argv[1]}"
    await shell.evaluate(shell.process.sandbox.files.read(path).decode("utf-8", "surrogateescape"))
    return shell.status


async def do_command(shell: Shell, argv: list[str]) -> int:
    words = argv[1:]
    if words[:1] in (["-v"], ["-V"]):
        return await _where(shell, words[1:])
    if not words:
        return 0
    await shell.invoke(words, [], {}, functions=False)
    return shell.status


async def do_type(shell: Shell, argv: list[str]) -> int:
    return await _where(shell, argv[1:])


async def _where(shell: Shell, names: list[str]) -> int:
    missing = 0
    for name in names:
        if name in shell.functions or name in shell.builtins:
            await _say(shell, name + "\n")
            continue
        try:
            shell.process.sandbox.program([name], shell.environment, shell.process.cwd)
            await _say(shell, (name if "/" in name else f"/bin/{name}") + "\n")
        except errors.RockError:
            missing = 1
    return missing


async def do_trap(shell: Shell, argv: list[str]) -> int:
    words = [word for word in argv[1:] if word != "--"]
    if len(words) < 2:
        return 0
    text = None if words[0] == "-" else words[0]
    for name in words[1:]:
        number = printing.signal_number(name)
        if number is None:
            return await _fail(shell, f"trap: no signal {name!r}")
        shell.trap(number, text)
    return 0


async def do_wait(shell: Shell, argv: list[str]) -> int:
    wanted = [job for job in shell.jobs if str(job.pid) in argv[1:]] if len(argv) > 1 else list(shell.jobs)
    if len(argv) > 1 and not wanted:
        return 127
    code = 0
    for job in wanted:
        code = (await job.wait()).shell_code or 0
    return code if len(argv) > 1 else 0


async def do_jobs(shell: Shell, argv: list[str]) -> int:
    running = [job for job in shell.jobs if job.status is None]
    return await _say(shell, "".join(f"[{index + 1}] Running {job.pid}\n" for index, job in enumerate(running)))


async def do_kill(shell: Shell, argv: list[str]) -> int:
    words, number = argv[1:], 15
    if words and words[0].startswith("-") and len(words[0]) > 1:
        first = words.pop(0)
        name = words.pop(0) if first == "-s" and words else first[1:]
        found = printing.signal_number(name)
        if found is None:
            return await _fail(shell, f"kill: no signal {name!r}", 2)
        number = found
    code = 0
    for word in words:
        pid = shell.last_job if word == "%1" else word
        process = shell.process.sandbox.processes.get(int(pid)) if pid.isdigit() else None
        if process is None:
            code = await _fail(shell, f"kill: ({word}): no such process")
        elif number:
            process.deliver(number)
    return code


async def do_local(shell: Shell, argv: list[str]) -> int:
    """Variables of functions are those of the shell: `local` assigns."""
    for word in argv[1:]:
        name, equals, value = word.partition("=")
        if equals and _NAME.fullmatch(name):
            shell.assign(name, value)
    return 0


async def do_exec(shell: Shell, argv: list[str]) -> int:
    raise AssertionError("the shell does it: its descriptors stay")


BUILTINS: dict[str, Builtin] = {
    ":": do_true, "true": do_true, "false": do_false, "echo": do_echo, "printf": do_printf, "cd": do_cd, "pwd": do_pwd,
    "exit": do_exit, "return": do_return, "break": do_leave, "continue": do_leave, "export": do_export,
    "readonly": do_export, "unset": do_unset, "set": do_set, "shift": do_shift, "read": do_read, "test": do_test,
    "[": do_test, "eval": do_eval, ".": do_source, "source": do_source, "command": do_command, "builtin": do_command,
    "type": do_type, "trap": do_trap, "wait": do_wait, "jobs": do_jobs, "kill": do_kill, "local": do_local,
    "umask": do_true, "exec": do_exec, "shopt": do_true, "ulimit": do_true,
}  # fmt: skip


# ---- the program `sh`, and builtins as programs ----

async def sh(call: Call) -> int:
    """The program `sh`: -c SCRIPT [NAME ARGUMENT...], a file, or standard input."""
    words = call.argv[1:]
    options: set[str] = set()
    while words and words[0].startswith("-") and words[0] not in ("-c", "--"):
        option = words.pop(0)
        if not option.startswith("--"):
            options |= set(option[1:]) & set("eufx")
            if "c" in option:
                words.insert(0, "-c")
                break
        if option == "-s":
            break
    name, work = call.argv[0], ""
    script: str | None = None
    if words[:1] == ["-c"]:
        if len(words) < 2:
            call.err(f"{name}: -c requires an argument\n")
            return 2
        script, name, words = words[1], words[2] if len(words) > 2 else name, words[3:]
    elif words:
        work = words.pop(0)
        try:
            script = call.files.read(call.path(work)).decode("utf-8", "surrogateescape")
        except errors.RockError as error:
            call.err(f"{name}: {error.message}\n")
            return 127
        name = work
    shell = Shell(call.process, call.env, name, words, BUILTINS)
    shell.options |= options
    if script is None:
        return await shell.main(shell.read_script)
    return await shell.main(lambda: _whole(shell, script))


async def alone(call: Call) -> int:
    """A builtin as a program: echo, printf, test."""
    shell = Shell(call.process, call.env, call.argv[0], [], BUILTINS)
    return await shell.main(lambda: shell.invoke(call.argv, [], {}))


async def _whole(shell: Shell, text: str) -> None:
    """Parse a script line by line, so that commands before a syntax error run."""
    parser = Parser(text)
    try:
        while (line := parser.line()) is not None:
            await shell.script(line, last=not text[parser.at :].strip())
    except SyntaxFault as fault:
        await shell.complain(f"syntax error: {fault}")
        raise Exit(2) from None


_ALONE = ("[", "echo", "kill", "printf", "pwd", "test")
PROGRAMS: dict[str, Program] = {**dict.fromkeys(_ALONE, alone), "sh": sh, "bash": sh, "dash": sh}
