"""Runs every attempt at one level, in a process of its own: `python -m tests.escape.runner LEVEL FOLDER [PATTERN ...]`.

A pattern is a part of the names of the attempts to run; without one all of them run.
Prints JSON: {"level", "isolation", "source", "results": {key: [word, detail]}, "left": ...}; source is the package
under test. The words: blocked, open, absent
(the level does not have what is attacked), inside (see gvisor.py), skipped, and broken, when a program did not tell how
it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import rock
from rock import errors
from rock.egress import netlink
from rock.runtime.base import Runtime
from rock.runtime.namespace.launcher import kernel
from tests.escape import gvisor
from tests.escape.attempt import PRELUDE, Attempt, Host, box_of
from tests.escape.catalogue import ATTEMPTS
from tests.packages import CannotBeHad, runsc
from tests.runtime.boxes import Box, leftovers, read_all

PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")
AT_ONCE = 4


class Services:
    """What of the host may not be reached: listeners that count who called."""

    def __init__(self, folder: Path) -> None:
        self.calls = 0
        self.sockets: list[socket.socket] = []
        self.abstract = f"rock-escape-{secrets.token_hex(6)}"
        self.port = self._listen(socket.AF_INET, ("127.0.0.1", 0))
        try:
            self.port6 = self._listen(socket.AF_INET6, ("::1", 0))
        except OSError:
            self.port6 = self.port
        self._listen(socket.AF_UNIX, "\0" + self.abstract)
        self.unix = str(folder / "service")
        self._listen(socket.AF_UNIX, self.unix)
        os.chmod(self.unix, 0o777)
        self.address = _address()
        try:  # an address of this machine, which is not in use elsewhere
            self.address_port = self._listen(socket.AF_INET, (self.address, 0))
        except OSError:
            self.address_port = self.port
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        self.udp = udp.getsockname()[1]
        self.sockets.append(udp)
        threading.Thread(target=self._echo, args=(udp,), daemon=True).start()

    def _listen(self, family: int, address: Any) -> int:
        listener = socket.socket(family)
        listener.bind(address)
        listener.listen(64)
        self.sockets.append(listener)
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return int(listener.getsockname()[1]) if family != socket.AF_UNIX else 0

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = listener.accept()
                self.calls += 1
                one.close()

    def _echo(self, udp: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, whence = udp.recvfrom(100)
                if whence is None:
                    return
                self.calls += 1
                udp.sendto(b"pong", whence)

    def close(self) -> None:
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class SharedNames:
    """A System V segment and a message queue of the host that anybody may open."""

    def __init__(self, token: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.shmat.restype = ctypes.c_void_p
        self.key = int(token[:7], 16)
        self.queue = f"/rock-escape-{token[:12]}"
        self._segment = self._libc.shmget(self.key, 4096, 0o1666)
        if self._segment < 0:
            raise OSError(ctypes.get_errno(), "shmget")
        place = ctypes.c_void_p(self._libc.shmat(self._segment, None, 0))
        ctypes.memmove(place, token[:12].encode(), 12)
        self._libc.shmdt(place)
        mask = os.umask(0)
        queue = self._libc.mq_open(self.queue.encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
        os.umask(mask)
        if queue < 0:
            raise OSError(ctypes.get_errno(), "mq_open")
        os.close(queue)

    def close(self) -> None:
        self._libc.shmctl(self._segment, 0, None)
        self._libc.mq_unlink(self.queue.encode())


def _private(folder: Path, token: str) -> tuple[str, Path | None]:
    """A file of the host's /usr that root alone may read: its path, and the folder to remove; "" when not root, or in a
    pod, whose root does not own /usr."""
    if os.geteuid() != 0 or not os.access("/usr/local/share", os.W_OK):
        return "", None
    place = Path("/usr/local/share") / f"rock-escape-{token[:12]}"
    place.mkdir(mode=0o755, parents=True)
    (place / "secret").write_text(token)
    (place / "secret").chmod(0o600)
    return str(place / "secret"), place


def _counters() -> dict[str, int]:
    names = ("max_inotify_instances", "max_inotify_watches")
    return {name: int(Path(f"/proc/sys/user/{name}").read_text()) for name in names
            if os.path.exists(f"/proc/sys/user/{name}")}


def _paths(folder: Path) -> list[str]:
    """Paths of the host that a sandbox has no reason to know: the server's home, its Python, its source."""
    found = {str(folder), os.path.realpath(folder), sys.prefix, sys.base_prefix, os.path.dirname(rock.__file__)}
    return sorted(path for path in found if not path.startswith("/usr"))


@contextlib.contextmanager
def host_facts(folder: Path, level: str) -> Iterator[dict[str, Any]]:
    """A secret, a process and services of the host, which belong to nobody but this test."""
    token = secrets.token_hex(16)
    outside = folder / "outside"
    outside.mkdir(mode=0o755)
    (outside / "secret").write_text(token)
    (outside / "secret").chmod(0o644)
    services = Services(outside)
    word = f"rock-victim-{secrets.token_hex(4)}"
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", word], env={"TOKEN": token},
                              stdin=subprocess.DEVNULL)
    program = os.stat("/usr/bin/env")
    shared = SharedNames(token)
    private, place = _private(folder, token)

    def calls() -> int:
        count, services.calls = services.calls, 0
        return count

    try:
        yield {"token": token, "secret": str(outside / "secret"), "folder": str(outside), "victim": victim.pid,
               "victim_word": word, "port": services.port, "port6": services.port6, "udp": services.udp,
               "unix": services.unix, "abstract": services.abstract, "address": services.address,
               "address_port": services.address_port, "calls": calls, "ipc_key": shared.key, "queue": shared.queue,
               "private": private, "hostname": socket.gethostname(), "level": level, "paths": _paths(folder),
               "counters": _counters(),
               "run_dir": str(folder / "run"), "home": str(folder), "pid_of_runner": os.getpid(),
               "interpreter": "/usr/bin/env", "interpreter_stat": [program.st_size, program.st_mtime_ns],
               "disk": os.stat("/").st_dev, "init": 1, "control": str(folder / "run" / "s")}
    finally:
        victim.kill()
        victim.wait()
        services.close()
        shared.close()
        if place is not None:
            shutil.rmtree(place)


def _address() -> str:
    """An address of this host that is not loopback's, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with contextlib.suppress(OSError):
            sock.connect(("192.0.2.1", 9))
            return str(sock.getsockname()[0])
    return "192.0.2.1"


@contextlib.asynccontextmanager
async def runtime_of(level: str, folder: Path) -> AsyncIterator[tuple[Runtime, dict[str, Any]]]:
    """The runtime of a level, open, and what its configs need."""
    if level == "none":
        from rock.runtime.process.runtime import ProcessRuntime

        runtime: Any = ProcessRuntime(folder / "run")
        common: dict[str, Any] = {"image": "host"}
    elif level == "landlock":
        from rock.runtime.landlock.runtime import LandlockRuntime

        runtime = LandlockRuntime(folder / "run")
        common = {"image": "host", "memory": "512m", "cpus": 1, "pids": 256}
    elif level == "gvisor":
        from rock.images.store import ImageStore
        from rock.runtime.gvisor.runtime import GvisorRuntime

        images = ImageStore(folder / "images")
        images.from_host("escape:1")
        runtime = GvisorRuntime(folder / "run", folder / "guest-python", images, str(runsc()))
        common = {"image": "escape:1", "memory": "512m", "cpus": 1, "pids": 256}
    else:
        from rock.images.store import ImageStore
        from rock.runtime.namespace.runtime import NamespaceRuntime

        images = ImageStore(folder / "images")
        images.from_host("escape:1")
        runtime = NamespaceRuntime(folder / "run", 0, images)
        common = {"image": "escape:1", "memory": "512m", "cpus": 1, "pids": 256}
    await runtime.open()
    try:
        yield runtime, common
    finally:
        await runtime.close()


async def program(host: Host, attempt: Attempt, box: Box) -> tuple[str, str]:
    """Run an attempt's program inside; its last word."""
    facts = {name: value for name, value in host.facts.items() if not callable(value)}
    facts["init"] = await _init_of(box)
    options: dict[str, Any] = {"pty": (24, 80)} if attempt.pty else {"stderr": "stdout"}
    process = await box.spawn(*PYTHON, PRELUDE + attempt.program, json.dumps(facts), user=attempt.user,
                              cwd=str(box.root), **options)
    assert process.stdout is not None
    out = (await read_all(process.stdout)).decode(errors="replace")
    status = await process.wait()
    process.close()
    for line in reversed(out.splitlines()):
        word, _, detail = line.partition(":")
        if word in ("blocked", "open"):
            return word, detail.strip()[:160]
    if attempt.quiet and not out.strip():
        return "blocked", "told by the look from outside"
    return "broken", f"status {status.shell_code}: {out[-400:]}"


async def _init_of(box: Box) -> int:
    """pid 1's number, as it is seen inside."""
    reply, _ = await (await box.runtime.linked(box.handle)).request("hello")
    return int(reply["pid"])


async def one(level: str, host: Host, attempt: Attempt, runtime: Runtime, common: dict[str, Any]) -> tuple[str, str]:
    if level in attempt.absent:
        return "absent", attempt.absent[level]
    if level == "gvisor" and attempt.key in gvisor.ABSENT:
        return "absent", gvisor.ABSENT[attempt.key]
    if level == "none" and not attempt.control:
        return "skipped", "not tried where it could do harm"
    if attempt.x86_only and os.uname().machine != "x86_64":
        return "skipped", "the numbers are those of x86_64"
    if attempt.root and os.geteuid() != 0:
        return "absent", "an ordinary user cannot look at it from outside"
    config = {**common, **(attempt.config if level != "none" else {})}
    if attempt.shared and not attempt.config:
        async with asyncio.timeout(110):
            assert host.shared is not None
            word, detail = await _try(host, attempt, host.shared)
        return word, detail.strip()[:160]
    async with box_of(runtime, config) as box, asyncio.timeout(110):
        try:
            word, detail = await _try(host, attempt, box)
        except errors.Lost:
            word, detail = "open", "the sandbox ended by it"
        if level == "gvisor" and word == "open" and attempt.key in gvisor.INSIDE:
            word = "inside"
        if attempt.look is not None and (told := attempt.look(host, box)) is not None:
            word, detail = "open", told
    return word, detail.strip()[:160]


async def _try(host: Host, attempt: Attempt, box: Box) -> tuple[str, str]:
    word, detail = "blocked", ""
    if attempt.program:
        word, detail = await program(host, attempt, box)
    if attempt.act is not None and word != "broken":
        word, _, detail = (await attempt.act(host, box)).partition(":")
    if "pid 1" in attempt.name and await box.sh("echo alive") != "alive\n":
        word, detail = "open", "pid 1 does not answer any more"
    return word, detail


async def run_all(level: str, folder: Path, patterns: Sequence[str] = ()) -> dict[str, Any]:
    """A theme after the other's start, each by itself in order, as the services of the host count who called; of the
    resources, which mostly wait, a few at once."""
    before = leftovers(folder)
    results: dict[str, tuple[str, str]] = {}
    isolation = ""
    with host_facts(folder, level) as facts:
        async with (runtime_of(level, folder) as (runtime, common), box_of(runtime, common) as neighbour,
                    box_of(runtime, common) as shared):
            host = Host(facts, neighbour, level, common, shared)
            isolation = neighbour.handle.isolation.value
            todo: dict[str, list[Attempt]] = {}
            for attempt in ATTEMPTS:
                if not patterns or any(pattern in attempt.key for pattern in patterns):
                    todo.setdefault(attempt.theme, []).append(attempt)

            async def work(attempts: list[Attempt]) -> None:
                while attempts:
                    attempt = attempts.pop(0)
                    try:
                        results[attempt.key] = await one(level, host, attempt, runtime, common)
                    except Exception as error:  # one that breaks must not hide the others
                        results[attempt.key] = "broken", f"{error!r}"[:400]

            await asyncio.gather(*(work(attempts) for theme, attempts in todo.items()
                                   for _ in range(AT_ONCE if theme == "resources" else 1)))
    ordered = {attempt.key: results[attempt.key] for attempt in ATTEMPTS if attempt.key in results}
    return {"level": level, "isolation": isolation, "source": os.path.dirname(rock.__file__), "results": ordered,
            "left": await _left(folder, before)}


async def _left(folder: Path, before: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is there now that was not; a thread that was just reading /proc gets a moment to close what it read."""
    end = time.monotonic() + 10.0
    while True:
        left = {name: [item for item in items if item not in before[name]] for name, items in leftovers(folder).items()}
        if not any(left.values()) or time.monotonic() > end:
            return left
        await asyncio.sleep(0.1)


def _own_address() -> None:
    """In a network namespace of its own: loopback up, with an address of this machine."""
    if Path("/proc/self/net/route").read_text().count("\n") <= 1 and os.geteuid() == 0 and os.getpid() == 1:
        kernel.loopback_up()
        with netlink.routing() as link:
            netlink.add_address(link, 1, "192.0.2.1")


def main() -> None:
    level, folder = sys.argv[1], Path(sys.argv[2])
    _own_address()
    try:
        told = asyncio.run(run_all(level, folder, sys.argv[3:]))
    except (errors.Unsupported, CannotBeHad) as error:
        told = {"level": level, "unsupported": str(error)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
