"""A change of the configuration reaches all roles within two seconds, and no request under load fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.cluster.machines import KEY
from tests.cluster.test_roles import Site
from tests.waiting import until

from rock.protocol.configuration import Configuration
from rock.sync import Client, Sandbox

LIMIT = 2.0  # seconds


def test_a_change_under_load_reaches_all_roles(tmp_path: Path) -> None:
    site = Site(tmp_path, str(tmp_path / "shared.sqlite"))
    problems: list[BaseException] = []
    counts = [0, 0]
    stopping = threading.Event()

    def commands() -> None:
        try:
            with Sandbox(site.config()) as sandbox:
                while not stopping.is_set():
                    assert sandbox.arun("echo $((6 * 7))").output.strip() == "42"
                    counts[0] += 1
        except BaseException as error:
            problems.append(error)

    def creates() -> None:
        try:
            while not stopping.is_set():
                with Sandbox(site.config()) as sandbox:
                    assert sandbox.execute("true").exit_code == 0
                counts[1] += 1
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for work in (commands, commands, creates)]
    try:
        for thread in threads:
            thread.start()
        until(lambda: counts[0] > 5 and counts[1] > 0)
        slowest = 0.0
        with Client(site.writer.url, KEY) as writer, Client(site.readers[0].url, KEY) as reader:
            for size in range(1, 6):
                wanted = Configuration.model_validate({"pools": {"size": size}, "log": {"level": "info"}})
                began = time.monotonic()
                version = writer.set_configuration(wanted).version
                until(lambda version=version: reader.get_configuration().version == version)  # type: ignore[misc]
                until(lambda version=version: [(found.worker, found.version)  # type: ignore[misc]
                                               for found in writer.get_configuration().workers] == [("one", version)])
                slowest = max(slowest, time.monotonic() - began)
            assert "version 5" in site.worker.log()
            # A worker that starts again has its version before the admin sends one.
            site.worker.kill()
            site.worker.start()
            until(lambda: [(found.worker, found.version) for found in writer.get_configuration().workers]
                  == [("one", version)])  # fmt: skip
        before = list(counts)
        until(lambda: counts[0] > before[0] and counts[1] > before[1])
        stopping.set()
        for thread in threads:
            thread.join(60)
        print(f"slowest change {slowest:.2f} s; {counts[0]} commands and {counts[1]} sandboxes meanwhile")
        assert not problems, problems
        assert slowest < LIMIT
    finally:
        stopping.set()
        for thread in threads:
            thread.join(60)
        site.end()
