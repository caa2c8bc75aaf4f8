"""The program `sh` of fake sandboxes, and what the shell does itself as programs."""

from __future__ import annotations

from rock import errors
from rock.runtime.fake.programs import Call
from rock.runtime.fake.shell import Exit, Shell
from rock.runtime.fake.syntax import Parser, SyntaxFault


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
    shell = Shell(call.process, call.env, name, words)
    shell.options |= options
    if script is None:
        return await shell.main(shell.read_script)
    return await shell.main(lambda: _whole(shell, script))


async def alone(call: Call) -> int:
    """What the shell does itself, as a program: echo, printf, test."""
    shell = Shell(call.process, call.env, call.argv[0], [])
    return await shell.main(lambda: shell.invoke(call.argv, [], {}))


async def _whole(shell: Shell, text: str) -> None:
    """A script, line after line, so that what comes before a fault in it is run."""
    parser = Parser(text)
    try:
        while (line := parser.line()) is not None:
            await shell.script(line, last=not text[parser.at :].strip())
    except SyntaxFault as fault:
        await shell.complain(f"syntax error: {fault}")
        raise Exit(2) from None
