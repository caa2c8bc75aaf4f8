"""A mixed workload for a while: `python bench/mixed.py 10` minutes. Prints what the server holds, ten times on the way.

Each of eight clients makes a sandbox, runs commands in a session, programs, a background process, streams, files, and
destroys it, again and again, by a key of its own; errors are counted by their code.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import Counter
from pathlib import Path

from hosted import IMAGE, memory, percentiles, raise_file_limit, server

from rock.errors import RockError
from rock.protocol.keys import CreateKey
from rock.sync import Client, Sandbox, SandboxConfig

OWNER = "bench-owner"
CLIENTS = 8


class Workload:
    """What the clients did until now."""

    def __init__(self, url: str, end: float) -> None:
        self.url = url
        self.end = end
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.times: list[float] = []

    def play(self, key: str) -> None:
        while time.monotonic() < self.end:
            try:
                self.life(key)
                self.done["sandboxes"] += 1
            except RockError as error:
                self.errors[error.code] += 1

    def life(self, key: str) -> None:
        config = SandboxConfig(base_url=self.url, api_key=key, image=IMAGE, memory="128m", auto_clear_seconds=300)
        with Sandbox(config) as sandbox:
            for number in range(20):
                began = time.perf_counter()
                assert sandbox.arun(f"echo {number}").output.strip() == str(number)
                self.times.append(time.perf_counter() - began)
                self.done["commands"] += 1
            for number in range(5):
                assert sandbox.execute(["sh", "-c", f"exit {number}"]).exit_code == number
                self.done["programs"] += 1
            sandbox.fs.write("/tmp/x", os.urandom(1 << 20))
            assert len(sandbox.fs.read("/tmp/x")) == 1 << 20
            assert sum(len(part.text) for part in sandbox.stream("head -c 500000 /dev/zero | tr '\\0' x")) == 500_000
            process = sandbox.processes.start("sleep 0.1; echo done")
            assert process.wait(60).exit_code == 0
            self.done["files, streams, processes"] += 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=10.0)
    minutes = parser.parse_args().minutes
    raise_file_limit()
    with server(ROCK_API_KEY=OWNER, ROCK_POOL_SIZE="2") as (url, pid, _):
        with Client(url, OWNER) as owner:
            keys = [owner.create_key(CreateKey(name="soak", tenant=f"t{n}")).key for n in range(CLIENTS)]
        began = time.monotonic()
        load = Workload(url, began + minutes * 60)
        threads = [threading.Thread(target=load.play, args=(key,)) for key in keys]
        for thread in threads:
            thread.start()
        for part in range(1, 11):
            time.sleep(max(0.0, began + part * minutes * 6 - time.monotonic()))
            last, load.times = load.times, []
            files = len(os.listdir(f"/proc/{pid}/fd"))
            tasks = len(os.listdir(Path(f"/proc/{pid}/task")))
            print(f"{part * minutes / 10:.1f} min: {dict(load.done)}, errors {dict(load.errors)}; server "
                  f"{memory(pid) / 1e6:.1f} MB, {files} descriptors, {tasks} threads; a command, ms "
                  f"{percentiles(last or [0.0])}", flush=True)  # fmt: skip
        for thread in threads:
            thread.join()
        time.sleep(3)
        print(f"at rest: server {memory(pid) / 1e6:.1f} MB, {len(os.listdir(f'/proc/{pid}/fd'))} descriptors")


if __name__ == "__main__":
    main()
