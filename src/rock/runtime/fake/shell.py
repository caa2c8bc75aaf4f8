"""The shell of fake sandboxes: runs the commands of syntax.py. `sh`, `bash` and `dash` are this one program."""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import Awaitable, Callable, Iterable, Mapping

from rock import errors
from rock.runtime.fake import syntax
from rock.runtime.fake.expand import Expander, ExpansionFault
from rock.runtime.fake.programs import Appended, Collected, FakeProcess, Null, Open, Text, pipe, placed
from rock.runtime.fake.syntax import AndOr, Command, Incomplete, Parser, Pipeline, Redirect, Script, SyntaxFault

_PORTION = 64 << 10
_DEEPEST = 200  # maximum depth of nested function calls


class Exit(Exception):
    """The shell ends with `code`."""

    def __init__(self, code: int) -> None:
        self.code = code


class Return(Exit):
    """The function ends."""


class Leave(Exception):
    """break and continue, of `levels` loops."""

    def __init__(self, levels: int, again: bool) -> None:
        self.levels = levels
        self.again = again


Builtin = Callable[["Shell", list[str]], Awaitable[int]]


class Shell:
    """One shell, in a process. A subshell is another instance with copies of its variables. builtins: the builtin
    commands by name; the shell itself executes `exec`."""

    def __init__(self, process: FakeProcess, env: Mapping[str, str], name: str, arguments: list[str],
                 builtins: Mapping[str, Builtin]) -> None:  # fmt: skip
        self.process = process
        self.builtins = builtins
        self.variables = dict(env)
        self.exported = set(env)
        self.functions: dict[str, Command] = {}
        self.options: set[str] = set()
        self.name = name
        self.arguments = arguments
        self.status = 0
        self.jobs: list[FakeProcess] = []
        self.last_job = ""
        self.traps: dict[int, str] = {}  # 0 is EXIT
        self.main_pid = process.pid
        self._caught: list[int] = []
        self._unchecked = 0  # depth of constructs that `set -e` ignores
        self._depth = 0
        self._substituted: int | None = None
        self.expander = Expander(self.value, self.assign, self._output, lambda: self.arguments,
                                 lambda: (process.sandbox.files, process.cwd))

    def subshell(self, process: FakeProcess) -> Shell:
        made = Shell(process, {}, self.name, self.arguments, self.builtins)
        made.variables, made.exported = dict(self.variables), set(self.exported)
        made.functions, made.options = dict(self.functions), set(self.options)
        made.status, made.main_pid, made.last_job = self.status, self.main_pid, self.last_job
        made.jobs = list(self.jobs)
        made._depth, made._unchecked = self._depth, self._unchecked
        for number, text in self.traps.items():
            if text == "" and number:
                made.trap(number, "")
        return made

    # ---- variables ----

    def value(self, name: str) -> str | None:
        if name in self.variables:
            return self.variables[name]
        if name.isdigit():
            index = int(name)
            if index == 0:
                return self.name
            return self.arguments[index - 1] if index <= len(self.arguments) else None
        special: dict[str, Callable[[], str]] = {
            "?": lambda: str(self.status), "$": lambda: str(self.main_pid), "!": lambda: self.last_job,
            "#": lambda: str(len(self.arguments)), "-": lambda: "".join(sorted(self.options)),
            "*": lambda: " ".join(self.arguments), "@": lambda: " ".join(self.arguments),
            "PWD": lambda: self.process.cwd,
        }  # fmt: skip
        return special[name]() if name in special else None

    def assign(self, name: str, value: str) -> None:
        self.variables[name] = value
        if "a" in self.options:
            self.exported.add(name)

    @property
    def environment(self) -> dict[str, str]:
        return {name: self.variables[name] for name in self.exported if name in self.variables}

    async def complain(self, text: str) -> None:
        stream = self.process.fds.get(2)
        if stream is not None:
            await stream.write(f"{self.name.rsplit('/', 1)[-1]}: {text}\n".encode("utf-8", "surrogateescape"))

    # ---- traps ----

    def trap(self, number: int, text: str | None) -> None:
        """Set the action of a signal (0: at exit): None is the default, "" ignores it."""
        self.process.traps.pop(number, None)
        self.traps.pop(number, None)
        if text is None:
            return
        self.traps[number] = text
        if number:
            self.process.traps[number] = (lambda: self._caught.append(number)) if text else None

    async def _run_traps(self) -> None:
        while self._caught:
            text = self.traps.get(self._caught.pop(0), "")
            status = self.status
            await self.evaluate(text)
            self.status = status

    # ---- scripts ----

    async def main(self, work: Callable[[], Awaitable[None]]) -> int:
        """Run a complete shell; returns the exit status."""
        try:
            await work()
            code = self.status
        except Exit as end:
            code = end.code
        except Leave:
            code = self.status
        if 0 in self.traps:
            text = self.traps.pop(0)
            self.status = code
            try:
                await self.evaluate(text)
            except Exit as end:
                code = end.code
        return code

    async def read_script(self) -> None:
        """Run standard input line by line as it arrives."""
        text = ""
        while True:
            piece = await self.process.fds[0].read(_PORTION) if 0 in self.process.fds else b""
            text += piece.decode("utf-8", "surrogateescape")
            parser = Parser(text, final=not piece)
            at = 0
            try:
                while (line := parser.line()) is not None:
                    at = parser.at
                    await self.script(line)
            except Incomplete as fault:
                if not piece:
                    await self._fault(fault)
                    return
            except SyntaxFault as fault:
                await self._fault(fault)
                raise Exit(2) from None
            text = text[at:]
            if not piece:
                return

    async def evaluate(self, text: str) -> None:
        """Run a text; a syntax error is printed, with status 2."""
        try:
            parsed = Parser(text).all()
        except SyntaxFault as fault:
            await self._fault(fault)
            return
        if not parsed:
            self.status = 0
        await self.script(parsed)

    async def _fault(self, fault: SyntaxFault) -> None:
        await self.complain(f"syntax error: {fault}")
        self.status = 2

    async def script(self, script: Script, *, last: bool = False) -> None:
        """Run commands. last: no command follows in this process, so a program may replace it."""
        for item in script:
            await asyncio.sleep(0)  # lets other tasks run during a loop of commands that never wait
            await self._run_traps()
            await self._and_or(item, last=last and len(script) == 1)
        await self._run_traps()

    async def _and_or(self, item: AndOr, *, last: bool = False) -> None:
        if item.background:
            rest = AndOr(item.first, item.rest)
            null: dict[int, Open] = {0: Null()}
            job = self.process.child(lambda child: self._in_subshell(child, [rest]), null)
            self.jobs = [known for known in self.jobs if known.status is None] + [job]
            self.last_job = str(job.pid)
            self.status = 0
            return
        checked = not item.rest
        self._unchecked += not checked
        try:
            await self._pipeline(item.first, last=last and checked)
            for index, (operator, pipeline) in enumerate(item.rest):
                if (operator == "&&") == (self.status == 0):
                    final = index == len(item.rest) - 1
                    self._unchecked -= final
                    try:
                        await self._pipeline(pipeline)
                    finally:
                        self._unchecked += final
        finally:
            self._unchecked -= not checked

    async def _in_subshell(self, child: FakeProcess, script: Script) -> int:
        shell = self.subshell(child)
        return await shell.main(lambda: shell.script(script, last=True))

    async def _pipeline(self, pipeline: Pipeline, *, last: bool = False) -> None:
        self._unchecked += pipeline.negated
        try:
            if len(pipeline.commands) == 1:
                await self._command(pipeline.commands[0], last=last and not pipeline.negated)
            else:
                await self._piped(pipeline.commands)
        finally:
            self._unchecked -= pipeline.negated
        if pipeline.negated:
            self.status = int(self.status == 0)
        elif self.status and "e" in self.options and not self._unchecked:
            raise Exit(self.status)

    async def _piped(self, commands: list[Command]) -> None:
        children: list[FakeProcess] = []
        source: Open | None = None
        for index, command in enumerate(commands):
            changes: dict[int, Open] = {}
            if source is not None:
                changes[0] = source
            source = None
            if index < len(commands) - 1:
                source, changes[1] = pipe()
            script = [AndOr(Pipeline([command]))]
            children.append(self.process.child(lambda child, s=script: self._in_subshell(child, s), changes))  # type: ignore[misc]
        statuses = [await child.wait() for child in children]
        codes = [status.shell_code or 0 for status in statuses]
        self.status = next((code for code in reversed(codes) if code), 0) if "pipefail" in self.options else codes[-1]

    # ---- commands ----

    async def _command(self, command: Command, *, last: bool = False) -> None:
        try:
            changes = await self._redirects(command.redirects)
        except (errors.RockError, ExpansionFault, OSError) as error:
            await self.complain(str(getattr(error, "message", error)))
            self.status = 1
            return
        what = command.what
        if isinstance(what, syntax.Simple):
            await self._simple(what, changes, last=last)
            return
        with placed(self.process, changes):
            if isinstance(what, syntax.Group):
                await self._group(what)
            elif isinstance(what, syntax.If):
                await self._if(what)
            elif isinstance(what, syntax.Loop):
                await self._loop(what)
            elif isinstance(what, syntax.For):
                await self._for(what)
            elif isinstance(what, syntax.Case):
                await self._case(what)
            else:
                self.functions[what.name] = what.body
                self.status = 0

    async def _redirects(self, redirects: list[Redirect]) -> dict[int, Open | None]:
        changes: dict[int, Open | None] = {}
        files = self.process.sandbox.files
        try:
            for redirect in redirects:
                target = await self.expander.text(redirect.target)
                old = changes.pop(redirect.fd, None)
                stream: Open | None
                if redirect.kind == "<<":
                    stream = Text(target.encode("utf-8", "surrogateescape"))
                elif redirect.kind in ("<&", ">&"):
                    stream = None if target == "-" else self._copied(target, changes)
                else:
                    path = target if target.startswith("/") else f"{self.process.cwd.rstrip('/')}/{target}"
                    if files.get(path) is not None and files.find(path).kind == "device":
                        stream = Null()
                    elif redirect.kind == "<":
                        stream = Text(files.read(path))
                    else:
                        stream = Appended(files, path, keep=redirect.kind == ">>")
                if old is not None:
                    old.close()
                changes[redirect.fd] = stream
        except BaseException:
            for opened in changes.values():
                if opened is not None:
                    opened.close()
            raise
        return changes

    def _copied(self, target: str, changes: Mapping[int, Open | None]) -> Open:
        number = int(target) if target.isdigit() else -1
        source = changes[number] if number in changes else self.process.fds.get(number)
        if source is None:
            raise OSError(f"{target}: bad file descriptor")
        return source.copy()

    async def _group(self, group: syntax.Group) -> None:
        if not group.subshell:
            await self.script(group.body)
            return
        child = self.process.child(lambda child: self._in_subshell(child, group.body))
        self.status = (await child.wait()).shell_code or 0

    async def _tested(self, script: Script) -> bool:
        self._unchecked += 1
        try:
            await self.script(script)
        finally:
            self._unchecked -= 1
        return self.status == 0

    async def _if(self, what: syntax.If) -> None:
        for condition, body in what.branches:
            if await self._tested(condition):
                await self.script(body)
                return
        self.status = 0
        if what.otherwise is not None:
            await self.script(what.otherwise)

    async def _looped(self, body: Script) -> bool:
        """One loop iteration; False when the loop is left."""
        try:
            await self.script(body)
        except Leave as leave:
            if leave.levels > 1:
                raise Leave(leave.levels - 1, leave.again) from None
            return leave.again
        return True

    async def _loop(self, what: syntax.Loop) -> None:
        status = 0
        while await self._tested(what.condition) != what.until:
            if not await self._looped(what.body):
                status = 0
                break
            status = self.status
        self.status = status

    async def _for(self, what: syntax.For) -> None:
        words = list(self.arguments) if what.words is None else await self.expander.fields(what.words)
        self.status = 0
        for word in words:
            self.assign(what.name, word)
            if not await self._looped(what.body):
                break

    async def _case(self, what: syntax.Case) -> None:
        text = await self.expander.text(what.word)
        self.status = 0
        for patterns, body in what.items:
            for pattern in patterns:
                if fnmatch.fnmatchcase(text, await self.expander.pattern(pattern)):
                    await self.script(body)
                    return

    # ---- simple commands ----

    async def _simple(self, simple: syntax.Simple, changes: dict[int, Open | None], *, last: bool) -> None:
        self._substituted = None
        try:
            argv = await self.expander.fields(simple.words)
            assigns = [(name, await self.expander.text(word)) for name, word in simple.assigns]
        except ExpansionFault as fault:
            _close(changes.values())
            await self.complain(str(fault))
            raise Exit(1) from None
        except BaseException:
            _close(changes.values())
            raise
        if not argv:
            _close(changes.values())
            for name, value in assigns:
                self.assign(name, value)
            self.status = self._substituted or 0
            return
        await self.invoke(argv, assigns, changes, last=last)

    async def invoke(self, argv: list[str], assigns: list[tuple[str, str]], changes: dict[int, Open | None], *,
                     last: bool = False, functions: bool = True) -> None:
        """Run a function, a builtin or a program."""
        builtin = self.builtins.get(argv[0])
        if (argv[0] in self.functions and functions) or builtin is not None:
            before = {name: self.variables.get(name) for name, _ in assigns}
            for name, value in assigns:
                self.variables[name] = value
            try:
                await self._inside(argv, builtin if argv[0] not in self.functions or not functions else None, changes)
            finally:
                for name, old in before.items():
                    if old is None:
                        self.variables.pop(name, None)
                    else:
                        self.variables[name] = old
            return
        env = {**self.environment, **dict(assigns)}
        if last and 0 not in self.traps:
            for number, stream in changes.items():
                self._place(number, stream)
            raise Exit(await self.replace(argv, env))
        opened = {number: stream for number, stream in changes.items() if stream is not None}
        child = self.process.child(lambda child: self.subshell(child).replace(argv, env), opened)
        for number in changes.keys() - opened.keys():
            if (unwanted := child.fds.pop(number, None)) is not None:
                unwanted.close()
        self.status = (await child.wait()).shell_code or 0

    def _place(self, number: int, stream: Open | None) -> None:
        """Replace a descriptor permanently."""
        old = self.process.fds.pop(number, None)
        if old is not None:
            old.close()
        if stream is not None:
            self.process.fds[number] = stream

    async def replace(self, argv: list[str], env: Mapping[str, str]) -> int:
        """Replace this shell by another program; returns its status."""
        for number in [number for number, trap in self.process.traps.items() if trap is not None]:
            del self.process.traps[number]
        try:
            program, words = self.process.sandbox.program(argv, env, self.process.cwd)
        except errors.RockError as error:
            await self.complain(error.message)
            return 127 if isinstance(error, errors.NotFound) else 126
        return await self.process.play(program, words, env)

    async def _inside(self, argv: list[str], builtin: Builtin | None, changes: dict[int, Open | None]) -> None:
        if builtin is not None and argv[0] == "exec":
            for number, stream in changes.items():
                self._place(number, stream)
            self.status = 0
            if len(argv) > 1:
                raise Exit(await self.replace(argv[1:], self.environment))
            return
        with placed(self.process, changes):
            if builtin is not None:
                try:
                    self.status = await builtin(self, argv)
                except errors.RockError as error:
                    await self.complain(f"{argv[0]}: {error.message}")
                    self.status = 1
                return
            await self._function(argv)

    async def _function(self, argv: list[str]) -> None:
        if self._depth >= _DEEPEST:
            await self.complain(f"{argv[0]}: functions call each other too deeply")
            raise Exit(2)
        before, self.arguments = self.arguments, argv[1:]
        self._depth += 1
        try:
            await self._command(self.functions[argv[0]])
        except Return as end:
            self.status = end.code
        finally:
            self._depth -= 1
            self.arguments = before

    async def _output(self, script: Script) -> str:
        collected = Collected()
        child = self.process.child(lambda child: self._in_subshell(child, script), {1: collected})
        self._substituted = self.status = (await child.wait()).shell_code or 0
        return collected.data.decode("utf-8", "surrogateescape").replace("\0", "")


def _close(streams: Iterable[Open | None]) -> None:
    for stream in streams:
        if stream is not None:
            stream.close()
