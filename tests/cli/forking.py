"""The `rock` command in forks of one process that has it imported: a tenth of the time of a new interpreter.

Each call is a process of its own with its arguments, environment, working directory and standard input. Tests of
signals, terminals and start-up use `python -m rock.cli.main` instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import json, os, sys
import rock.cli.main
from rock.cli.commands import context, copy, logs, observe, run, sandbox
out = sys.stdout.buffer
for line in sys.stdin.buffer:
    call = json.loads(line)
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        out.write(b"%d\\n" % os.waitstatus_to_exitcode(status))
        out.flush()
        continue
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["env"])
    for number, (name, flags) in enumerate(zip(call["files"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        fd = os.open(name, flags)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    sys.argv = ["rock", *call["words"]]
    status = 1
    try:
        rock.cli.main.main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


class Forking:
    """Runs commands, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="rock-cli-") as folder:
            files = [os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")]
            for name, content in zip(files, (stdin, b"", b""), strict=True):
                Path(name).write_bytes(content)
            call = {"words": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd()),
                    "files": files}  # fmt: skip
            self._process.stdin.write(json.dumps(call).encode() + b"\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            output, errors = (Path(name).read_bytes() for name in files[1:])
        return subprocess.CompletedProcess(words, status, output, errors)

    def close(self) -> None:
        self._process.communicate(timeout=30)
