"""An admin killed under load: `python bench/recovery.py [--kills 30] [--sandboxes 1000]`.

A server with sandboxes, each with a session that was used, and 8 clients that run commands all the time. It is
killed with SIGKILL and started again as `rock admin start` does, again and again. Prints, in seconds, minimum, median
and 95th percentile of the time from the kill until it serves and every sandbox is told to run, and until the first
command of every client that was in the middle of one is answered; the CPU time of the server until it serves; and how
many sandboxes, sessions and commands were lost, which must be none. The floor is what a Python with the same imports
takes to start, of the same run.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import rock
from rock.errors import RockError
from rock.settings import child_environment
from rock.sync import Client, Sandbox, SandboxConfig


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """The server process."""

    def __init__(self, home: str, port: int) -> None:
        self.home, self.port = home, port
        self.url = f"http://127.0.0.1:{port}"
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(f"{self.home}/output.log", "ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "rock.cli.server", "--host", "127.0.0.1", "--port", str(self.port)],
                env=child_environment(ROCK_HOME=self.home, ROCK_POOL_SIZE="0"), stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self, running: int) -> None:
        """Until it serves, and tells of so many sandboxes that they run."""
        assert self.child is not None
        with Client(self.url) as client:
            while True:
                try:
                    if len(client.list_sandboxes(states="running")) == running:
                        return
                except RockError:
                    pass
                if self.child.poll() is not None:
                    raise SystemExit(Path(self.home, "output.log").read_text()[-2000:])
                time.sleep(0.005)

    def cpu(self) -> float:
        """Seconds of CPU of the process until now."""
        assert self.child is not None
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait()


class Load:
    """Clients that run commands one after the other, and look at what each answers."""

    def __init__(self, sandboxes: list[Sandbox], clients: int) -> None:
        self.done = [0] * clients
        self.wrong: list[str] = []
        self._going_on = True
        share = len(sandboxes) // clients
        self._threads = [
            threading.Thread(target=self._run, args=(n, sandboxes[n * share : (n + 1) * share])) for n in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, sandboxes: list[Sandbox]) -> None:
        count = 0
        while self._going_on:
            count += 1
            try:
                seen = sandboxes[count % len(sandboxes)].arun(f"echo {count}; (exit {count % 100})")
            except RockError as error:
                self.wrong.append(repr(error))
                continue
            if (seen.output, seen.exit_code) != (f"{count}\n", count % 100):
                self.wrong.append(f"{count}: {seen.output!r}, {seen.exit_code}")
            self.done[number] += 1

    def all_answered(self) -> None:
        """Until every client has had an answer since now."""
        before = list(self.done)
        while any(now == was for now, was in zip(self.done, before, strict=True)):
            time.sleep(0.002)

    def stop(self) -> None:
        self._going_on = False
        for thread in self._threads:
            thread.join()


def spread(values: list[float]) -> str:
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    middle = statistics.median(ordered)
    return f"{ordered[0]:.2f} / {middle:.2f} / {last:.2f} (most {ordered[-1]:.2f}, n={len(ordered)})"


def floor() -> tuple[float, float]:
    """Seconds, and of CPU, of a Python that imports what a server imports, and ends."""
    began, before = time.perf_counter(), os.times()
    imports = "import rock.cli.serve.serve, rock.runtime.namespace.runtime, uvloop"
    subprocess.run([sys.executable, "-c", imports], check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


def started(config: SandboxConfig, number: int) -> Sandbox:
    """A sandbox whose session has the number."""
    sandbox = Sandbox(config)
    sandbox.start()
    sandbox.arun(f"mark={number}")
    return sandbox


def keeps(sandbox: Sandbox, number: int) -> bool:
    """Whether its session still has what was set before the first kill."""
    try:
        return sandbox.arun("echo $mark").output == f"{number}\n"
    except RockError as error:
        print(repr(error))
        return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--sandboxes", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    # As an installation has it; else each start would compile all of it again where Python must not write bytecode.
    compileall.compile_dir(str(Path(str(rock.__file__)).parent), quiet=2)
    serving: list[float] = []
    answered: list[float] = []
    used: list[float] = []
    floors: list[float] = []
    floors_used: list[float] = []
    with tempfile.TemporaryDirectory(prefix="rock-bench-") as home:
        server = Served(home, free_port())
        server.start()
        server.wait(0)
        config = SandboxConfig(base_url=server.url, image="host", memory="64m", cpus=0.5)
        lost, load = 0, None
        try:
            with ThreadPoolExecutor(given.clients) as threads:
                sandboxes = list(threads.map(partial(started, config), range(given.sandboxes)))
            load = Load(sandboxes, given.clients)
            end = time.monotonic() + given.minutes * 60
            while len(serving) < given.kills and time.monotonic() < end:
                load.all_answered()
                began = time.perf_counter()
                server.kill()
                server.start()
                server.wait(given.sandboxes)
                serving.append(time.perf_counter() - began)
                used.append(server.cpu())
                load.all_answered()
                answered.append(time.perf_counter() - began)
                for times, seconds in zip((floors, floors_used), floor(), strict=True):
                    times.append(seconds)
            load.stop()
            lost = sum(not keeps(sandbox, number) for number, sandbox in enumerate(sandboxes))
        finally:
            if load is not None:
                load.stop()
            with Client(server.url) as client:
                for info in client.list_sandboxes(states="pending,running,stopping"):
                    client.stop_sandbox(info.sandbox_id)
            assert server.child is not None
            server.child.send_signal(signal.SIGTERM)
            server.child.wait(60)
    if given.json:
        print(json.dumps({"serving": serving, "answered": answered, "used": used, "floor": floors,
                          "floor_used": floors_used, "lost": lost,
                          "commands": sum(load.done), "wrong": load.wrong}))  # fmt: skip
    else:
        print(f"killed -9 -> serving, {given.sandboxes} listed    {spread(serving)} s, target <= 1.5x floor")
        print(f"CPU of the server until then           {spread(used)} s")
        print(f"killed -9 -> each client answered      {spread(answered)} s")
        print(f"floor: such a Python starts            {spread(floors)} s")
        print(f"its CPU                                {spread(floors_used)} s")
        print(f"sandboxes and sessions lost: {lost}; commands: {sum(load.done)}, wrong or lost: {len(load.wrong)}; "
              f"load {os.getloadavg()[0]:.1f}")
        for text in load.wrong[:5]:
            print(" ", text)
    return 1 if lost or load.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
