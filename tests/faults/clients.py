"""Clients that work in one sandbox at the same time, over the SDK and its retries, while servers are killed, stopped
and cut off. What each asked and observed goes into a History."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from rock.errors import Conflict, NoCapacity, NotFound, StorageFull, Unavailable
from rock.sync import Sandbox, SandboxConfig
from rock.sync.sandbox import Process
from tests.faults.history import NEVER, History, Operation, executions
from tests.faults.world import World

WORK = ("append", "append", "read", "next", "next", "get", "write", "load", "start", "status", "kill")
PATIENCE = 45.0  # seconds for which a client goes on while a server is away: more than any restart takes
# After these a client does not know what was done. Conflict: a key whose work may have been done, and cannot be told.
UNKNOWN = (Unavailable, StorageFull, NoCapacity, Conflict)


def attached(world: World, sandbox_id: str) -> Sandbox:
    """A sandbox as a client has it that retries. Unavailable."""
    config = SandboxConfig(base_url=world.server.url, api_key=world.key, reconnect_timeout=PATIENCE, memory="128m")
    box = Sandbox(config)
    box.attach(sandbox_id)
    return box


class Client(threading.Thread):
    """Does `work`, one after another. `problems`: what no fault explains. name: the ids of its commands begin with it,
    and nobody else has it."""

    def __init__(self, world: World, history: History, sandbox_id: str, name: str, work: Sequence[str]) -> None:
        super().__init__(name=name)
        self.problems: list[BaseException] = []
        self.unknown = 0
        self._world = world
        self._history = history
        self._id = sandbox_id
        self._work = work
        self._programs: list[tuple[str, Process | None]] = []

    def run(self) -> None:
        try:
            box = attached(self._world, self._id)
        except UNKNOWN:
            return
        except BaseException as error:
            self.problems.append(error)
            return
        for number, name in enumerate(self._work):
            try:
                self._one(box, name, f"{self.name}.{number}")
            except BaseException as error:
                self.problems.append(error)
                return

    def _begin(self, thing: str, name: str, argument: Any = None) -> Operation:
        return self._history.begin(self.name, f"{self._id}/{thing}", name, argument)

    def _one(self, box: Sandbox, name: str, mark: str) -> None:
        if name in ("status", "kill"):
            self._process(name)
            return
        thing = {"append": "log", "read": "log", "next": "counter", "get": "counter", "write": "register",
                 "load": "register", "start": f"{mark}/process"}[name]  # fmt: skip
        told = {"load": "read"}.get(name, name)
        done = self._begin(thing, told, mark if name in ("append", "write", "start") else None)
        try:
            result = self._do(box, name, mark)
        except UNKNOWN:
            self.unknown += 1
            return
        self._history.end(done, result)

    def _do(self, box: Sandbox, name: str, mark: str) -> Any:
        if name == "append":
            assert box.execute(["sh", "-c", f"echo {mark} >> $HOME/log"], timeout=40).exit_code == 0
        elif name == "read":
            return read_log(box)
        elif name in ("next", "get"):
            seen = box.arun(f"n=$((n+{int(name == 'next')})); echo $n", wait_timeout=40)
            if seen.exit_code is None:  # nobody saw its end
                raise Unavailable(seen.failure_reason or "the exit status is unknown")
            return int(seen.output)
        elif name == "write":
            box.fs.write(f"{home_of(box)}/register", mark)
        elif name == "load":
            try:
                return box.fs.read(f"{home_of(box)}/register").decode()
            except NotFound:
                return ""
        else:
            command = f"echo {mark} >> $HOME/started; exec sleep 300"
            try:
                self._programs.append((mark, box.processes.start(["sh", "-c", command])))
            except UNKNOWN:
                self._programs.append((mark, None))
                raise
        return None

    def _process(self, name: str) -> None:
        if not self._programs:
            return
        mark, process = self._programs[-1]
        if process is None:
            return
        done = self._begin(f"{mark}/process", name)
        try:
            if name == "kill":
                process.kill()
                assert not process.wait(30).running
                self._history.end(done, None)
            else:
                self._history.end(done, "running" if process.status().running else "ended")
        except UNKNOWN:
            self.unknown += 1


def home_of(box: Sandbox) -> str:
    return box.execute(["sh", "-c", "echo $HOME"], timeout=40).stdout.strip()


def read_log(box: Sandbox, name: str = "log") -> list[str]:
    return box.execute(["sh", "-c", f"cat $HOME/{name} 2>/dev/null || true"], timeout=40).stdout.split()


def final_look(world: World, history: History, sandbox_id: str) -> list[str]:
    """Read all of a sandbox once more, into its history; what is wrong with how often its commands were executed."""
    box = attached(world, sandbox_id)
    last = Client(world, history, sandbox_id, "last", ("read", "get", "load"))
    last.run()
    if last.problems:
        raise last.problems[0]
    objects = history.objects()
    wrong = executions(objects.get(f"{sandbox_id}/log", ()), read_log(box))
    begun = []
    for name, operations in objects.items():
        if not (name.startswith(f"{sandbox_id}/") and name.endswith("/process")):
            continue
        # A process that is killed may end before it writes its id.
        killed = any(one.name == "kill" for one in operations)
        begun += [
            Operation(one.client, one.object, "append", one.argument, one.invoked, NEVER if killed else one.completed)
            for one in operations if one.name == "start"
        ]  # fmt: skip
    # A start is complete before its process writes: wait for the ids of those that run.
    end = time.monotonic() + PATIENCE
    while (found := executions(begun, read_log(box, "started"))) and time.monotonic() < end:
        time.sleep(0.05)
    return wrong + found
