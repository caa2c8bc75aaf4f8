"""Files of a server that are damaged while it is down: no command is run twice, and nothing is lost in silence."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.world import Server, World
from tests.leaks import Inventory, home_of, homes, members_of, rocklet_process, take_inventory

from rock.errors import Conflict, Lost, NotFound
from rock.sync import Client, Sandbox, SandboxConfig

SEED = 20_261
SECONDS = 4.0  # that a command runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World("namespace", tmp_path_factory.mktemp("world"))
    yield made
    made.close()
    assert not take_inventory(made.server.home, -1) - Inventory()


@pytest.fixture
def server(world: World) -> Server:
    return world.server


def config(server: Server) -> SandboxConfig:
    return SandboxConfig(base_url=server.url, image="host", memory="256m", cpus=0.5)


def spools(server: Server, box: Sandbox) -> Path:
    home = home_of(server.home, box.sandbox_id)
    record = json.loads((home / "run" / "records" / (box.sandbox_id or "")).read_text())
    return home / "run" / "spools" / str(record["spools"])


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def all_files(folder: Path, pattern: str, work: Callable[[Path], Any]) -> None:
    found = list(folder.glob(pattern))
    assert found, pattern
    for path in found:
        work(path)


RANDOM = random.Random(SEED)
JOURNALS: dict[str, Callable[[Path], Any]] = {
    "flip begin": lambda folder: flip(folder / "journal", 0.3),
    "flip end": lambda folder: flip(folder / "journal", 0.9),
    "flip any": lambda folder: flip(folder / "journal", RANDOM.random()),
    "cut": lambda folder: cut(folder / "journal", RANDOM.random()),
    "cut one byte": lambda folder: cut(folder / "journal", 0.999),
    "emptied": lambda folder: cut(folder / "journal", 0),
    "removed": lambda folder: (folder / "journal").unlink(),
    "marks": lambda folder: flip(folder / "marks", 0.001),
    "folder": lambda folder: shutil.rmtree(folder),
}


class Calls:
    """Calls in threads, and what came of them."""

    def __init__(self) -> None:
        self.results: dict[Any, Any] = {}
        self._threads: list[threading.Thread] = []

    def begin(self, name: Any, call: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self.results[name] = call()
            except Exception as error:
                self.results[name] = error

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)

    def join(self) -> dict[Any, Any]:
        for thread in self._threads:
            thread.join(60)
        return self.results


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


SCRIPT = f"echo x >> /tmp/count; echo first; sleep {SECONDS}; echo last; exit 5"


def started(box: Sandbox) -> bool:
    return box.execute(["sh", "-c", "wc -l < /tmp/count || true"]).stdout.strip() == "2"


def test_no_command_is_run_twice(server: Server) -> None:
    """Each way to damage a journal, with a session command and a program under way: the answer is the true one or a
    Conflict, and the command ran once."""
    boxes = {name: Sandbox(config(server)) for name in JOURNALS}
    calls = Calls()
    for name, box in boxes.items():
        box.start()
        calls.begin((name, "arun"), lambda box=box: box.arun(f"({SCRIPT})"))
        calls.begin((name, "execute"), lambda box=box: box.execute(["sh", "-c", SCRIPT]))
    for box in boxes.values():
        until(lambda box=box: started(box))
    server.kill()
    for name, box in boxes.items():
        JOURNALS[name](spools(server, box))
    server.start()
    results = calls.join()
    for (name, kind), seen in results.items():
        if isinstance(seen, Exception):
            assert isinstance(seen, Conflict) and ("damaged" in str(seen) or seen.details), (name, kind, seen)
            continue
        output = seen.output if kind == "arun" else seen.stdout
        assert (output, seen.exit_code) == ("first\nlast\n", 5), (name, kind, seen)
    refused = {name for (name, _), seen in results.items() if isinstance(seen, Conflict)}
    assert {"emptied", "removed", "folder"} <= refused and "marks" not in refused
    for name, box in boxes.items():
        if name == "folder":
            continue  # no key is taken for a while
        after = box.arun("echo after; cat /tmp/count")
        assert after.output == "after\nx\nx\n", name  # neither joined with what ran, nor run twice
    assert any((home / "damaged").is_dir() for home in homes(server.home))
    for box in boxes.values():
        box.close()


OUTPUTS: dict[str, Callable[[Path], Any]] = {
    "flip": lambda path: flip(path, 0.999),
    "cut": lambda path: cut(path, 0.6),
    "emptied": lambda path: cut(path, 0),
    "removed": Path.unlink,
}


def test_missing_output_is_told_with_its_size(server: Server) -> None:
    boxes = {name: Sandbox(config(server)) for name in OUTPUTS}
    calls = Calls()
    for name, box in boxes.items():
        box.start()
        box.arun("seq 100 > /dev/null; echo of another command")
        calls.begin((name, "arun"), lambda box=box: box.arun(f"({SCRIPT})"))
        calls.begin((name, "execute"), lambda box=box: box.execute(["sh", "-c", SCRIPT]))
    for box in boxes.values():
        until(lambda box=box: started(box))
    server.kill()
    for name, box in boxes.items():
        all_files(spools(server, box), "*.out", OUTPUTS[name])
        for path in spools(server, box).glob("x*"):
            if path.stat().st_size > 32:
                OUTPUTS[name](path)
    server.start()
    for (name, kind), seen in calls.join().items():
        assert not isinstance(seen, Exception), (name, kind, seen)
        output, dropped = (seen.output, seen.dropped_bytes) if kind == "arun" else (seen.stdout, seen.stdout_dropped)
        assert (output, seen.exit_code, dropped) == ("last\n", 5, len("first\n")), (name, kind, seen)
        assert "6 bytes of its output" in seen.failure_reason, (name, kind, seen)
    for box in boxes.values():
        assert box.arun("cat /tmp/count").output == "x\nx\n"
        box.close()


def test_an_end_whose_file_is_damaged_is_not_invented(server: Server) -> None:
    """The file of what the shell reports is removed: the true status, or a Conflict; never another run."""
    with Sandbox(config(server)) as running, Sandbox(config(server)) as ended:
        calls = Calls()
        for box in (running, ended):
            box.arun("true")
        server.faults("run.ended=stall:30")  # of the first that ends
        calls.begin("running", lambda: running.arun(f"({SCRIPT})"))
        calls.begin("ended", lambda: ended.arun("(echo x >> /tmp/count; sleep 1; exit 5)"))
        until(lambda: "x" in running.execute(["sh", "-c", "cat /tmp/count || true"]).stdout)
        time.sleep(1.5)
        server.kill()
        server.faults("")
        for box in (running, ended):
            all_files(spools(server, box), "*.status", Path.unlink)
        server.start()
        results = calls.join()
        assert results["running"].exit_code == 5 and isinstance(results["ended"], Conflict), results
        assert "how it ended is not known" in str(results["ended"])
        for box in (running, ended):
            assert box.arun("cat /tmp/count").output == "x\n"


RECORDS: dict[str, Callable[[Path], Any]] = {
    "flip": lambda path: flip(path, 0.4),
    "cut": lambda path: cut(path, 0.5),
    "emptied": lambda path: cut(path, 0),
    "garbage": lambda path: path.write_bytes(RANDOM.randbytes(500)),
}


def test_a_damaged_record_does_not_end_its_sandbox(server: Server) -> None:
    boxes = {name: Sandbox(config(server)) for name in RECORDS}
    pids, at = {}, {}
    for name, box in boxes.items():
        box.start()
        box.processes.start(["sleep", "600"])
        at[name] = home_of(server.home, box.sandbox_id)
        for path in (at[name] / "run" / "namespace").glob("*/record.json"):
            data = json.loads(path.read_text())
            if data["id"] == box.sandbox_id:
                pids[name] = data["pid"]
    server.kill()
    for name, box in boxes.items():
        RECORDS[name](at[name] / "run" / "records" / (box.sandbox_id or ""))
    for _ in range(2):  # over another restart too
        server.start()
        for name, box in boxes.items():
            with pytest.raises(Lost) as told:
                box.arun("true")
            assert "its record on the server's disk is damaged" in str(told.value), name
            assert "its processes still run" in str(told.value)
            os.kill(pids[name], 0)
        with Client(server.url) as client:
            states = {item.sandbox_id: item.state for item in client.list_sandboxes()}
            assert all(states[box.sandbox_id] == "running" for box in boxes.values())
        server.kill()
    server.start()
    for name, box in boxes.items():
        box.close()
        until(lambda name=name: not lives(pids[name]))
        assert not list((at[name] / "run" / "records").glob(box.sandbox_id or ""))
        assert (at[name] / "damaged" / f"record-{box.sandbox_id}").exists(), name


def test_output_of_a_process_that_is_removed(server: Server) -> None:
    """Under a running server and under one that is down: told with its size, and the process goes on."""
    text = "echo first; sleep 2; echo second; sleep 5; echo third"
    with Sandbox(config(server)) as box:
        process = box.processes.start(text)

        def output(offset: int) -> str:
            return process.logs(offset=offset).data.decode()

        def size() -> int:
            return process.status().stdout_size

        logs = home_of(server.home, box.sandbox_id) / "run" / "logs" / (box.sandbox_id or "")
        until(lambda: size() == 6)
        shutil.rmtree(logs)
        until(lambda: size() == 13)
        with pytest.raises(NotFound) as told:
            output(0)
        assert "6 bytes of stdout" in str(told.value)
        assert output(6) == "second\n"
        server.kill()
        shutil.rmtree(logs)
        server.start()
        until(lambda: size() == 19)
        with pytest.raises(NotFound) as told:
            output(6)
        assert "7 bytes of stdout" in str(told.value)
        assert output(13) == "third\n"


def pid_with(server: Server, logs: Path) -> int:
    """The pid of the process with these logs: the server, or one of its rocklet processes."""
    if not members_of(server.pid):
        return server.pid
    home = logs.parents[2]
    number = 0 if home == server.home else int(home.name)
    return rocklet_process(server.pid, server.home, number)


def test_a_stop_that_was_killed_leaves_no_output(server: Server) -> None:
    """The record was removed before the output of processes, which then stayed for ever."""
    for point in ("node.destroy.begun", "node.destroy.gone", "node.destroy.forgotten"):
        box = Sandbox(config(server))
        box.start()
        box.processes.start("echo text").wait()
        logs = home_of(server.home, box.sandbox_id) / "run" / "logs" / (box.sandbox_id or "")
        holder = pid_with(server, logs)
        server.faults(f"{point}=kill@1")
        calls = Calls()
        calls.begin("stop", box.close)
        until(lambda pid=holder: not lives(pid))
        server.faults("")
        if not server.alive:  # the holder was the server itself
            server.start()
        calls.join()
        until(lambda logs=logs: not logs.exists())
    stray = server.home / "run" / "logs" / "of-nobody" / "process"
    stray.mkdir(parents=True)
    (stray / "stdout").write_text("left by a version that removed the record first")
    server.kill()
    server.start()
    assert not stray.parent.exists()
