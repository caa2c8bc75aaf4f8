"""Guests that change their programs, rights and states while they are copied: each copy succeeds or is refused.

Afterwards the guest continues, and no process of it is stopped or traced.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from rock import errors
from rock.guest.init import process_tree
from tests.runtime.boxes import Box, put, run
from tests.runtime.test_copied_processes import child, end
from tests.runtime.test_frozen_files import LIVE, forking

pytestmark = pytest.mark.skipif(not LIVE, reason="processes are copied by root on x86_64 only")

START = """import ctypes as C, os, signal, sys, threading, time
libc = C.CDLL(None, use_errno=True)
log = os.open("/work/beats", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def beat(): os.write(log, b".")
"""
GUESTS = {
    # A process executes itself again and again: its memory is another one each time.
    "execve": "beat()\nos.execv('/usr/bin/bash', ['bash', '-c', 'while :; do printf . >> /work/beats; exec bash -c "
              "\"$BASH_EXECUTION_STRING\"; done'])",
    "execve in threads": "def go():\n while 1: os.waitpid(os.posix_spawn('/usr/bin/true', ['true'], {}), 0); beat()\n"
                         "for _ in range(3): threading.Thread(target=go).start()",
    "vfork": "while 1:\n pid = os.posix_spawn('/usr/bin/sleep', ['sleep', '0.002'], {}); os.waitpid(pid, 0); beat()",
    "fork and exit": "while 1:\n pid = os.fork()\n if not pid: os._exit(0)\n os.waitpid(pid, 0); beat()",
    "stop and continue": "pid = os.fork()\nif not pid:\n while 1: beat(); time.sleep(0.001)\n"
                         "while 1: os.kill(pid, signal.SIGSTOP); os.kill(pid, signal.SIGCONT); time.sleep(0.0005)",
    "rights": "while 1:\n libc.prctl(4, 0); libc.prctl(4, 1); libc.personality(0x40000); libc.personality(0)\n"
              " libc.prctl(15, b') R 1 (\\nTracerPid: 1'); beat()",
    "setuid program": "while 1:\n pid = os.posix_spawn('/work/id', ['id', '-u'], {}, setsid=False,\n"
                      "  file_actions=[(os.POSIX_SPAWN_OPEN, 1, '/dev/null', 1, 0)]); os.waitpid(pid, 0); beat()",
}  # fmt: skip
TRIES = 5
MARGIN = 15.0  # seconds for one attempt


def states(box: Box) -> list[tuple[str, str]]:
    """State and tracer of each process of a sandbox."""
    found = []
    for entry in process_tree.descendants(process_tree.scan(), box.handle.data["pid"]):
        try:
            text = Path(f"/proc/{entry.pid}/status").read_text()
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":\t", 1) for line in text.splitlines() if line.startswith(("State", "TracerPid")))
        found.append((fields["State"][0], fields["TracerPid"]))
    return found


async def goes_on(box: Box) -> None:
    """Wait until the guest has written more."""
    script = "was=$(stat -c %s /work/beats); until [ $(stat -c %s /work/beats) -gt $((was + 3)) ]; do sleep 0.01; done"
    async with asyncio.timeout(20):
        await box.sh(script)


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_that_changes_is_copied_or_refused(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with forking(tmp_path) as (runtime, box):
            await box.sh("cp /usr/bin/id /work/id; chmod 4755 /work/id; : > /work/beats")
            await put(box, "/work/guest.py", (START + GUESTS[name]).encode())
            await box.spawn("python3", "/work/guest.py", key="process:guest", keep=True)
            await goes_on(box)
            launcher = runtime._slots.launcher.pid
            taken = []
            for number in range(TRIES):
                snapshot = f"{number}" * 32
                began = time.monotonic()
                try:
                    await runtime.checkpoint(box.handle, snapshot, "auto", processes=True)
                    taken.append(snapshot)
                except (errors.Unsupported, errors.Conflict) as error:
                    assert error.message
                assert time.monotonic() - began < MARGIN
                await goes_on(box)
            assert runtime._slots.launcher.pid == launcher and os.path.exists(f"/proc/{launcher}")
            assert all(tracer == "0" for _, tracer in states(box))
            if name != "stop and continue":
                assert all(state not in "tT" for state, _ in states(box))
            for snapshot in taken[:1]:
                one = await child(runtime, "copy", snapshot)
                await goes_on(one)
                await end(one)
            print(name, "copied", len(taken), "of", TRIES)

    run(main(), 110)


def test_a_guest_traces_no_process(tmp_path: Path) -> None:
    """A process that a guest traces could not be copied; its filter refuses ptrace."""

    async def main() -> None:
        async with forking(tmp_path) as (_, box):
            script = "import ctypes as C; print(C.CDLL(None, use_errno=True).ptrace(0, 0, 0, 0), C.get_errno())"
            assert (await box.python(script)).strip() == "-1 1"

    run(main())
