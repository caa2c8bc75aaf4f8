"""Where sandboxes go: by what workers report and what was placed since."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from rock.errors import InvalidConfig, NoCapacity, RockError, Unsupported
from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.scheduler.local import LocalScheduler

GIB = 1 << 30


def worker(**fields: Any) -> NodeStatus:
    usual: dict[str, Any] = {
        "host_name": "h", "host_ip": "10.0.0.1", "runtime": "fake", "isolation": Isolation.NONE, "cpus": 8,
        "memory_total": 32 * GIB, "memory_free": 30 * GIB, "sandboxes": 0, "sandbox_limit": 100,
    }  # fmt: skip
    return NodeStatus(**{**usual, **fields})


def spec(**fields: Any) -> SandboxConfig:
    return SandboxConfig(**{"image": "x:1", "memory": "1g", "cpus": 1.0, **fields})


def worker_registry(**workers: NodeStatus) -> LocalScheduler:
    scheduler = LocalScheduler()
    scheduler.report(workers)
    return scheduler


def test_a_burst_between_two_reports_is_spread() -> None:
    scheduler = worker_registry(**{f"w{number}": worker() for number in range(10)})
    placed = Counter(scheduler.place(spec()) for _ in range(500))
    assert len(placed) == 10 and max(placed.values()) - min(placed.values()) <= 1


def test_limits_hold_between_two_reports() -> None:
    scheduler = worker_registry(a=worker(sandbox_limit=3), b=worker(sandbox_limit=2, sandboxes=1))
    assert Counter(scheduler.place(spec()) for _ in range(4)) == {"a": 3, "b": 1}
    with pytest.raises(NoCapacity, match="limit of sandboxes"):
        scheduler.place(spec())
    for _ in range(3):
        scheduler.landed("a")  # they run, and no report tells of them yet
    with pytest.raises(NoCapacity):
        scheduler.place(spec())
    scheduler.report({"a": worker(sandbox_limit=3, sandboxes=1), "b": worker(sandbox_limit=2, sandboxes=1)})
    assert Counter(scheduler.place(spec()) for _ in range(2)) == {"a": 2}  # b's one has not landed


def test_measured_use_counts() -> None:
    scheduler = worker_registry(full=worker(memory_free=GIB // 4), empty=worker(sandboxes=50))
    assert {scheduler.place(spec()) for _ in range(20)} == {"empty"}
    with pytest.raises(NoCapacity, match="memory"):
        worker_registry(full=worker(memory_free=GIB // 4)).place(spec())


def test_a_worker_under_pressure_takes_nothing_new() -> None:
    pressed = {"memory_free": 3 * GIB, "memory_pressure": 60.0}
    scheduler = worker_registry(pressed=worker(**pressed), calm=worker(memory_free=2 * GIB, memory_pressure=1.0))
    assert {scheduler.place(spec()) for _ in range(20)} == {"calm"}
    with pytest.raises(NoCapacity, match="memory"):
        worker_registry(pressed=worker(**pressed)).place(spec())


def test_a_sandbox_at_its_own_limit_keeps_no_others_out() -> None:
    """What it waits for shows in the machine's pressure: memory that is free says that it is nobody else's matter."""
    assert worker_registry(one=worker(memory_free=10 * GIB, memory_pressure=99.0)).place(spec()) == "one"


def test_the_image_that_is_there_counts() -> None:
    has = worker(images=["x:1"], sandboxes=2)
    others = {f"w{number}": worker() for number in range(50)}
    scheduler = worker_registry(has=has, **others)
    assert scheduler.place(spec()) == "has"
    assert scheduler.place(spec(image="y:1")) != "has"
    assert len({scheduler.place(spec()) for _ in range(300)}) > 10  # but not at any price
    full = has.model_copy(update={"sandboxes": 100})
    assert worker_registry(has=full, **others).place(spec()) != "has"


def test_workers_come_and_go() -> None:
    scheduler = worker_registry(a=worker())
    scheduler.report({"b": worker()})
    assert scheduler.place(spec()) == "b"
    scheduler.landed("a")
    scheduler.report({})
    with pytest.raises(NoCapacity, match="no worker"):
        scheduler.place(spec())


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [({"cpus": 9}, InvalidConfig, "CPUs"), ({"memory": "64g"}, InvalidConfig, "memory"),
     ({"num_gpus": 1}, Unsupported, "no GPUs"), ({"accelerator_type": "A100"}, Unsupported, "A100")],
)  # fmt: skip
def test_what_nobody_could_ever_give_is_refused(fields: dict[str, Any], kind: type[RockError], words: str) -> None:
    scheduler = worker_registry(a=worker(), b=worker())
    for ask in (scheduler.place, lambda config: scheduler.place_group(config, 2, "spread", False)):
        with pytest.raises(kind, match=words):
            ask(spec(**fields))


def test_gpus() -> None:
    gpu = worker(gpus=4, gpus_free=4, accelerators=["A100"])
    scheduler = worker_registry(plain=worker(), gpu=gpu)
    assert [scheduler.place(spec(num_gpus=2, accelerator_type="A100")) for _ in range(2)] == ["gpu", "gpu"]
    with pytest.raises(NoCapacity, match="GPU"):
        scheduler.place(spec(num_gpus=1))
    with pytest.raises(Unsupported, match="H100"):
        scheduler.place(spec(num_gpus=1, accelerator_type="H100"))
    assert scheduler.place(spec()) == "plain"


# ---- groups ----


def test_a_gpu_that_was_given_back_is_free_while_others_start() -> None:
    def report() -> dict[str, NodeStatus]:
        return {"a": worker(gpus=2.0, gpus_free=2.0)}

    scheduler = worker_registry(**report())
    scheduler.place(spec())  # and it starts for long
    for _ in range(5):
        scheduler.place(spec(num_gpus=1.0))
        scheduler.landed("a", 1.0)
        scheduler.report(report())


@pytest.mark.parametrize("fields", [{"cpus": 1e-310}, {"num_gpus": 1e-310}], ids=str)
def test_next_to_nothing_is_no_error(fields: dict[str, Any]) -> None:
    for placement in ("spread", "pack"):
        assert (
            len(worker_registry(a=worker(gpus=1.0, gpus_free=1.0)).place_group(spec(**fields), 2, placement, True)) == 2
        )


def test_spread_and_pack() -> None:
    workers = {f"w{number}": worker() for number in range(4)}
    spread = Counter(worker_registry(**workers).place_group(spec(), 10, "spread", True))
    assert sorted(spread.values()) == [2, 2, 3, 3]
    packed = Counter(worker_registry(**workers).place_group(spec(), 10, "pack", True))
    assert sorted(packed.values()) == [2, 8]  # eight cores each
    # beyond what they promise
    assert Counter(worker_registry(**workers).place_group(spec(), 60, "pack", True)).total() == 60
    has = worker(images=["x:1"])
    assert set(worker_registry(**workers, has=has).place_group(spec(), 4, "pack", True)) == {"has"}
    assert "has" in worker_registry(**workers, has=has).place_group(spec(), 1, "spread", True)


def test_all_or_as_many_as_fit() -> None:
    scheduler = worker_registry(a=worker(sandbox_limit=3), b=worker(sandbox_limit=4))
    with pytest.raises(NoCapacity, match="room for 7 of the 8"):
        scheduler.place_group(spec(), 8, "spread", True)
    assert Counter(scheduler.place_group(spec(), 8, "spread", False)) == {"a": 3, "b": 4}
    with pytest.raises(NoCapacity):
        scheduler.place_group(spec(), 1, "pack", False)


def test_a_large_fleet_is_no_slower_to_place_in() -> None:
    def taken(size: int) -> float:
        scheduler = worker_registry(**{f"w{number}": worker(sandbox_limit=1000) for number in range(size)})
        began = time.perf_counter()
        for _ in range(3000):
            scheduler.place(spec())
        return time.perf_counter() - began

    small, large = min(taken(10) for _ in range(3)), min(taken(2000) for _ in range(3))
    assert large < 10 * small  # it would be 200 times as many to compare
