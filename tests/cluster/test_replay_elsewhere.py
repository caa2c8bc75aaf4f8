"""A recorded run outlives its worker: the replay continues it on another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.machines import KEY
from tests.cluster.test_workers_join import Site
from tests.conftest import IMAGE
from tests.waiting import until

from rock.errors import RockError
from rock.protocol.node import WorkerState
from rock.sync import Client, Sandbox


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.long
def test_a_run_continues_after_its_worker_was_killed(site: Site) -> None:
    one = site.join("one")
    until(lambda: IMAGE in site.images("one"))
    config = site.config(record=True, reconnect_timeout=2.0).model_copy(update={"memory": "128m"})
    box = Sandbox(config)
    box.start()
    box.run("cd /tmp; total=0")
    for number in range(3):
        box.run(f"total=$((total + {number})); echo $total >> sums")
    taken = box.checkpoint(memory="session")
    box.run("total=$((total + 10)); echo $total >> sums")
    site.join("two")
    until(lambda: IMAGE in site.images("two"))
    one.kill()
    with pytest.raises(RockError):
        box.run("total=999; echo $total >> sums", timeout=0.5)  # in progress: it is not in the state that is restored
    until(lambda: site.state("one") is WorkerState.LOST)
    again = Sandbox.replay(box.sandbox_id or "", repeat=True, base_url=site.server.url, api_key=KEY)
    try:
        report = again.replayed
        assert report is not None and report.snapshot is None and taken.worker == "one"  # the snapshot was lost too
        assert (report.replayed, report.diverged_at) == (5, None)
        with Client(site.server.url, KEY) as client:
            assert client.get_sandbox(again.sandbox_id or "").worker == "two"
        again.run("cd /tmp; total=0")  # the client begins its program anew, and gets the recorded results
        for number in range(3):
            again.run(f"total=$((total + {number})); echo $total >> sums")
        again.run("total=$((total + 10)); echo $total >> sums")
        assert again.run("cat sums; echo $total").output.split() == ["0", "1", "3", "13", "13"]
    finally:
        again.stop()
        one.start()  # it removes what it had
