"""A server to be killed: a process that opens a subject's runtime, makes a sandbox with a kept program, and waits.

    python -m tests.runtime.conformance.server SUBJECT FOLDER

It prints one line, the handle as JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from rock.runtime.base import Program
from tests.runtime.conformance.subject import subjects


async def main(name: str, folder: Path) -> None:
    subject = subjects()[name]
    runtime = subject.make(folder)
    await runtime.open()
    handle = await runtime.create("kept", subject.config())
    script = "read a; echo got $a > out; echo $a; read b; echo $b; exit 5"
    await runtime.spawn(handle, Program(["sh", "-c", script], stdin="pipe", keep=True, key="k"))
    await runtime.spawn(handle, Program(["sleep", "1000"]))
    print(json.dumps(dataclasses.asdict(handle)), flush=True)
    await asyncio.sleep(1000)


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
