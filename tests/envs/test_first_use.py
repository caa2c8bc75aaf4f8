"""The first use of environments: from many threads at once, from event loops of threads, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import RunningServer

pytestmark = pytest.mark.timeout(600)

# numpy is imported by the first array that comes; the other threads meet it half-imported.
CODEC = """
import struct, sys, threading
from rock.guest.environments import values

assert "numpy" not in sys.modules
text = b'{"$a":["<f4",[4],0]}'
data = struct.pack(">I", len(text)) + text + struct.pack("<4f", 1, 2, 3, 4)
barrier, failed = threading.Barrier(300), []

def work(number):
    barrier.wait()
    try:
        for _ in range(2000 if number % 2 else 0):  # what a reset sends, without an array in it
            values.encode({"seed": number})
            values.encode(number)
        for _ in range(20):
            found = values.decode(data)
            assert list(found) == [1, 2, 3, 4]
            assert values.decode(b"".join(bytes(part) for part in values.encode([found, 1.0, {}])))[1] == 1.0
            assert values.encode_result([found, 1.0, True, False], {})
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work, args=(number,)) for number in range(300)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(f"{len(failed)} of 300 failed: {failed[:2]}" if failed else 0)
"""

THREADS = """
import asyncio, sys, threading
import rock

assert "numpy" not in sys.modules
count = int(sys.argv[1])
barrier, failed = threading.Barrier(count), []

def work(number):
    async def episode():
        env = rock.make("game:GuessTheNumber-v0-easy")
        env.reset(seed=number)
        for guess in range(3):
            env.step(f"\\\\boxed{{{guess}}}")
        env.close()
    barrier.wait()
    try:
        asyncio.run(episode())
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(f"{len(failed)} of {count} failed: {failed[:2]}" if failed else 0)
"""

FORK = """
import os, sys
import rock

parent = rock.make("game:GuessTheNumber-v0-easy")
parent.reset(seed=1)
pids = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            own = rock.make("game:GuessTheNumber-v0-easy")  # a connection of its own
            own.reset(seed=number)
            own.step("\\\\boxed{3}")
            own.close()
            status = 0
        finally:
            os._exit(status)
    pids.append(pid)
for guess in range(20):  # the parent goes on meanwhile, by its own connection
    parent.step(f"\\\\boxed{{{guess}}}")
found = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
parent.close()
sys.exit(0 if found == [0] * 4 else f"children ended with {found}")
"""


def run(program: str, url: str = "", *words: str) -> None:
    environment = {**os.environ, "ROCK_BASE_URL": url, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True,
                          timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_three_hundred_threads_read_their_first_array() -> None:
    for _ in range(3):
        run(CODEC)


def test_threads_with_loops_of_their_own_make_their_first_environment(env_server: RunningServer) -> None:
    run(THREADS, env_server.url, "24")


@pytest.mark.long
def test_three_hundred_threads_make_their_first_environment(env_server: RunningServer) -> None:
    run(THREADS, env_server.url, "300")


def test_children_of_a_fork_make_their_own(env_server: RunningServer) -> None:
    run(FORK, env_server.url)
