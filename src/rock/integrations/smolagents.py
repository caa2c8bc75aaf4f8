"""The Python executor of smolagents: an interpreter with state in a sandbox.

    from rock.integrations.smolagents import RockPythonExecutor

    with RockPythonExecutor(image="python:3.11") as executor:
        CodeAgent(tools=[], model=model, executor=executor).run("...")

The image needs python3; nothing is installed in it.
"""

from __future__ import annotations

import ast
import base64
import functools
import io
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import PIL.Image  # a dependency of smolagents
from smolagents.local_python_executor import CodeOutput
from smolagents.monitoring import AgentLogger, LogLevel
from smolagents.remote_executors import RemotePythonExecutor
from smolagents.tools import get_tools_definition_code
from smolagents.utils import AgentError

from rock import errors
from rock.guest import interpreter
from rock.sync import Sandbox
from rock.sync.sandbox.processes import Process

LABELS = {"rock.integration": "smolagents"}  # of all sandboxes of this class
_LONGEST_LINE = 32 << 20  # bytes of one event
_POLL = 20.0  # seconds
_GRACE = 10.0  # seconds in which interrupted code ends
_SIGINT = 2
_OPTIONAL = {"numpy", "PIL"}  # modules that the tool of final answers uses where they exist
_FORMATS = ("chart", "data", "html", "javascript", "json", "latex", "markdown", "pdf", "svg", "text")


@functools.cache
def _command() -> list[str]:
    """The command line of the interpreter, which has its source."""
    return ["python3", "-u", "-c", Path(interpreter.__file__).read_text()]


class RockPythonExecutor(RemotePythonExecutor):  # type: ignore[misc]
    """Runs the code of a CodeAgent in a sandbox. sandbox: the sandbox, which is running.

    image: one with python3. additional_imports: packages that pip installs before, which needs a network. timeout:
    seconds of one execution, after which it is interrupted; the state remains. max_output: characters of its logs.
    allow_pickle: of smolagents; code in the sandbox could then run code here. options: of `rock.Sandbox`.
    """

    def __init__(
        self,
        image: str = "python:3.11",
        *,
        additional_imports: list[str] | None = None,
        logger: Any = None,
        allow_pickle: bool = False,
        timeout: float = 600.0,
        max_output: int = 1_000_000,
        cwd: str | None = None,
        user: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(additional_imports or [], logger or AgentLogger(level=LogLevel.ERROR), allow_pickle)
        self._timeout = timeout
        self._max_output = max_output
        self._cwd, self._user = cwd, user
        self._interpreter: Process | None = None
        self._offset = 0
        options["labels"] = {**LABELS, **options.get("labels", {})}
        options.setdefault("idle_timeout", 3600)
        self.sandbox = Sandbox(image, **options)
        self.sandbox.start()
        try:
            self.installed_packages = self.install_packages(self.additional_imports)
        except BaseException:
            self.sandbox.stop()
            raise

    # ---- code

    def run_code_raise_errors(self, code: str) -> CodeOutput:
        """Run code: its logs, and the value of its last expression or the final answer. AgentError: it raised, took too
        long, or ended the interpreter, whose state is then lost."""
        logs: list[str] = []
        size, main, failed = 0, None, None
        for event in self._events(code):
            kind = event["type"]
            if kind in ("stdout", "stderr"):
                text = str(event.get("text", ""))
                if size < self._max_output:
                    logs.append(text[: self._max_output - size])
                size += len(text)
            elif kind == "result" and event.get("is_main_result"):
                main = event
            elif kind == "error":
                failed = event
        if size > self._max_output:
            logs.append(f"\n[{size - self._max_output} characters are left out]\n")
        output = "".join(logs)
        if failed is not None:
            if failed.get("name") == self.FINAL_ANSWER_EXCEPTION:
                answer = self._deserialize_final_answer(str(failed.get("value", "")), self.allow_pickle)
                return CodeOutput(output=answer, logs=output, is_final_answer=True)
            what = "\n".join(str(failed.get(part, "")) for part in ("name", "value", "traceback"))
            raise AgentError(f"{output}\nExecuting code yielded an error:\n{what}", self.logger)
        return CodeOutput(output=_value(main), logs=output, is_final_answer=False)

    def _events(self, code: str) -> Iterator[dict[str, Any]]:
        """The events of one cell. What code itself writes to the descriptor of events has not their id."""
        process = self._started()
        request = secrets.token_hex(8)
        line = json.dumps({"id": request, "code": code, "env": {}}) + "\n"
        interrupted = False
        process.write_stdin(line)
        for text in self._lines(process):
            if text is None:
                if interrupted:
                    self._end()
                    yield _error("TimeoutError", "the code ignores interrupts; the interpreter was ended, and its "
                                                 "variables are lost")  # fmt: skip
                    return
                interrupted = True
                process.signal(_SIGINT, tree=False)
                continue
            event = _parsed(text, request)
            if event is not None and event["type"] == "done":
                if interrupted:
                    yield _error("TimeoutError", f"the code took longer than {self._timeout:g} s and was interrupted")
                return
            if event is not None:
                yield event
        self._end()
        yield _error("InterpreterEnded", "the interpreter ended: its code ended it, or it ran out of memory. Its "
                                         "variables are lost")  # fmt: skip

    def _started(self) -> Process:
        if self._interpreter is None:
            try:
                self._interpreter = self.sandbox.processes.start(_command(), cwd=self._cwd, user=self._user)
            except errors.NotFound as error:
                raise errors.Unsupported(f"the interpreter cannot start: {error.message}",
                                         hint="use an image with python3, and a cwd that exists") from error
            self._offset = 0
        return self._interpreter

    def _lines(self, process: Process) -> Iterator[bytes | None]:
        """Lines of the output, until the interpreter ends. None when the time is over, and again _GRACE later."""
        held = bytearray()
        deadline = time.monotonic() + self._timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                deadline = time.monotonic() + _GRACE
                yield None
                continue
            part = process.logs("stdout", self._offset + len(held), wait=min(_POLL, left))
            held += part.data
            while (end := held.find(b"\n")) >= 0:
                line = bytes(held[:end])
                del held[: end + 1]
                self._offset += end + 1
                yield line
            if len(held) > _LONGEST_LINE:
                self._end()
                raise errors.ServerError(f"an event of the interpreter is over {_LONGEST_LINE} bytes")
            if not part.data and not part.running:
                return

    def _end(self) -> None:
        process, self._interpreter = self._interpreter, None
        if process is not None:
            process.forget()

    # ---- tools and packages

    def send_tools(self, tools: dict[str, Any]) -> None:
        """Define the tools in the interpreter, and install the packages that they need and the image lacks."""
        if "final_answer" in tools:
            self._patch_final_answer_with_exception(tools["final_answer"])
        modules: set[str] = set()
        for name, tool in tools.items():
            modules |= set(tool.to_dict()["requirements"]) - (_OPTIONAL if name == "final_answer" else set())
        modules -= {"smolagents"}
        if modules:
            code = f"import importlib.util as _util\n[m for m in {sorted(modules)!r} if _util.find_spec(m) is None]"
            missing = str(self.run_code_raise_errors(code).output)
            self.installed_packages += self.install_packages(
                ["pillow" if name == "PIL" else name for name in sorted(modules) if repr(name) in missing])
        self.run_code_raise_errors(_tolerant(get_tools_definition_code(tools)))

    def install_packages(self, additional_imports: list[str]) -> list[str]:
        """Install packages with pip. CommandFailed."""
        if additional_imports:
            command = ["python3", "-m", "pip", "install", "--", *additional_imports]
            done = self.sandbox.exec(command, timeout=self._timeout, user=self._user)
            if done.exit_code != 0:
                raise errors.CommandFailed(
                    f"cannot install {', '.join(additional_imports)}: {done.output[-2000:]}",
                    hint="use an image with these packages, or a sandbox with a network: network=\"nat\"")
        return additional_imports

    # ---- life

    def cleanup(self) -> None:
        """Stop the sandbox. No effect when that was done."""
        self._interpreter = None
        self.sandbox.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def _tolerant(code: str) -> str:
    """The code, whose imports of optional modules at the top may fail."""
    tree = ast.parse(code)
    for at, node in enumerate(tree.body):
        if isinstance(node, ast.Import) and all(alias.name.partition(".")[0] in _OPTIONAL for alias in node.names):
            tree.body[at : at + 1] = ast.parse(f"try:\n    {ast.unparse(node)}\nexcept ImportError:\n    pass").body
    return ast.unparse(tree)


def _error(name: str, value: str) -> dict[str, Any]:
    return {"type": "error", "name": name, "value": value, "traceback": ""}


def _parsed(line: bytes, request: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("id") != request or not isinstance(value.get("type"), str):
        return None
    return value


def _value(main: dict[str, Any] | None) -> Any:
    """The value of the last expression: an image, or the first of its formats."""
    if main is None:
        return None
    for name in ("jpeg", "png"):
        if isinstance(main.get(name), str):
            return PIL.Image.open(io.BytesIO(base64.b64decode(main[name])))
    return next((main[name] for name in _FORMATS if main.get(name) is not None), None)
