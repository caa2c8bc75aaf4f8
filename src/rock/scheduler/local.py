"""Filter and score over what the workers report, and over what was placed since. See docs/decisions/0020-scheduling.md.

    reported: memory free, sandboxes, pressure, images      ┐
    counted here: placed and not started, started since     ┘─► score = memory free for each sandbox

A heap holds the workers by score, so that a placement looks at a few of them however many there are.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rock.errors import InvalidConfig, NoCapacity, RockError, Unsupported
from rock.protocol.node import NodeStatus
from rock.protocol.sandbox import SandboxConfig
from rock.scheduler.base import Placement

LEAST_FREE = 0.02  # of a worker's memory: with less it takes nothing new
MOST_PRESSURE = 25.0  # percent of the last ten seconds in which something waited for memory
SCARCE = 0.1  # of a worker's memory: with more free, who waits is a sandbox at its own limit, which is its own matter
_MANY = 1e9
_ASSUMED = 32 << 20  # bytes that one takes which is not measured yet, at most its limit
_LOOKED_AT = 4  # workers that are compared for one sandbox
_LONGEST_RUN = 8  # sandboxes that one worker gets in a row,
_UNEVEN = 10  # of so many times as many that it has: a tenth more or less is even
_HAS_IMAGE = 4.0  # how much more a worker counts that need not pull


@dataclass
class _Machine:
    """A worker. starting: placed and not landed; since: landed since it reported last."""

    name: str
    status: NodeStatus
    images: frozenset[str] = frozenset()
    starting: int = 0
    since: int = 0
    gpus: float = 0.0  # of those that start
    gpus_since: float = 0.0  # of those that landed since it reported last
    turn: int = 0  # of its newest place in the heap

    @property
    def sandboxes(self) -> int:
        return self.status.sandboxes + self.starting + self.since

    @property
    def memory_free(self) -> int:
        return self.status.memory_free - (self.starting + self.since) * _ASSUMED

    @property
    def gpus_free(self) -> float:
        return self.status.gpus_free - self.gpus - self.gpus_since

    @property
    def score(self) -> float:
        return self.memory_free / (1 + self.sandboxes)

    def could_ever(self, spec: _Request) -> bool:
        status = self.status
        return (
            spec.memory <= status.memory_total and spec.cpus <= status.cpus and spec.gpus <= status.gpus
            and (not spec.accelerator or spec.accelerator in status.accelerators)
        )  # fmt: skip

    def room(self, spec: _Request) -> int:
        """How many more it takes now."""
        status = self.status
        scarce = self.memory_free < status.memory_total * SCARCE
        pressed = scarce and status.memory_pressure is not None and status.memory_pressure > MOST_PRESSURE
        spare = self.memory_free - round(status.memory_total * LEAST_FREE)
        if pressed or (status.memory_total and spare <= 0):
            return 0
        room = status.sandbox_limit - self.sandboxes
        if status.memory_total:
            room = min(room, spare // min(_ASSUMED, spec.memory) + 1)
        if spec.gpus:
            room = min(room, int(min(self.gpus_free // spec.gpus, _MANY)))
        return max(0, room)

    def wholly(self, spec: _Request) -> int:
        """How many more it takes without promising memory or cores that it does not have."""
        taken = self.starting + self.since
        by_memory = (self.status.memory_free - taken * spec.memory) // spec.memory
        by_cpus = int(min((self.status.cpus - self.sandboxes * spec.cpus) // spec.cpus, _MANY))
        return max(0, min(by_memory, by_cpus, self.room(spec)))


@dataclass(frozen=True)
class _Request:
    """What of a config matters here, read once."""

    memory: int
    cpus: float
    gpus: float
    accelerator: str
    image: str

    @classmethod
    def of(cls, config: SandboxConfig) -> _Request:
        return cls(config.memory_bytes, config.cpus, config.num_gpus or 0.0, config.accelerator_type or "",
                   config.image)  # fmt: skip


class LocalScheduler:
    """Places where most memory is free for each sandbox, where the image is already if there is room. Limits may be
    overcommitted: only what is measured counts. A sandbox larger than any machine is refused."""

    def __init__(self) -> None:
        self._machines: dict[str, _Machine] = {}
        self._heap: list[tuple[float, int, str]] = []  # (minus the score, turn, name); older turns are void
        self._turn = 0
        self._run: tuple[_Request, _Machine, int] | None = None  # the request, its machine, and how many more fit
        self._last: tuple[SandboxConfig, _Request] | None = None
        self._holders: dict[str, set[str]] = {}  # workers by the images that they have

    # ---- what is known ----

    def report(self, workers: Mapping[str, NodeStatus]) -> None:
        for name in self._machines.keys() - workers.keys():
            self._hold(self._machines.pop(name), frozenset())
        for name, status in workers.items():
            machine = self._machines.get(name)
            if machine is None:
                machine = self._machines[name] = _Machine(name, status)
            elif machine.status is status:
                continue
            else:
                machine.status, machine.since, machine.gpus_since = status, 0, 0.0
            self._hold(machine, frozenset(status.images))
            self._queue(machine)
        if len(self._heap) > 64 + 4 * len(self._machines):
            self._heap = [entry for entry in self._heap if self._valid(entry)]
            heapq.heapify(self._heap)

    def _hold(self, machine: _Machine, images: frozenset[str]) -> None:
        if images == machine.images:
            return
        for image in machine.images - images:
            self._holders[image].discard(machine.name)
            if not self._holders[image]:
                del self._holders[image]
        for image in images - machine.images:
            self._holders.setdefault(image, set()).add(machine.name)
        machine.images = images

    def landed(self, worker: str, gpus: float = 0.0) -> None:
        machine = self._machines.get(worker)
        if machine is not None and machine.starting:
            machine.starting -= 1
            machine.since += 1
            moved = min(gpus, machine.gpus)
            machine.gpus -= moved
            machine.gpus_since += moved

    def _queue(self, machine: _Machine) -> None:
        self._turn += 1
        machine.turn = self._turn
        heapq.heappush(self._heap, (-machine.score, self._turn, machine.name))

    def _valid(self, entry: tuple[float, int, str]) -> bool:
        machine = self._machines.get(entry[2])
        return machine is not None and machine.turn == entry[1]

    def _take(self, machine: _Machine, spec: _Request) -> str:
        machine.starting += 1
        machine.gpus += spec.gpus
        self._queue(machine)
        return machine.name

    # ---- one ----

    def place(self, config: SandboxConfig) -> str:
        spec = self._spec(config)
        again = self._again(spec)
        if again is not None:
            return self._take(again, spec)
        top = self._top(spec)
        if top is not None:
            self._run = spec, top, min(_LONGEST_RUN, top.sandboxes // _UNEVEN)
            return self._take(top, spec)
        best = max(self._candidates(spec), default=None,
                   key=lambda m: (m.score * (_HAS_IMAGE if spec.image in m.images else 1.0), m.name))  # fmt: skip
        if best is None:
            raise self._refusal(config, spec)
        return self._take(best, spec)

    def _top(self, spec: _Request) -> _Machine | None:
        """The best of all, where it fits and none of the others could have the image before it."""
        while self._heap and not self._valid(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        machine = self._machines[self._heap[0][2]]
        ahead = spec.image in machine.images or spec.image not in self._holders
        return machine if ahead and machine.could_ever(spec) and machine.room(spec) else None

    def _again(self, spec: _Request) -> _Machine | None:
        """The same as for the last one, where it has so many already that a few more make no difference: what comes
        close together for one worker goes there in one request."""
        if self._run is None:
            return None
        what, machine, left = self._run
        self._run = (what, machine, left - 1) if left > 1 else None
        fits = left > 0 and what is spec and self._machines.get(machine.name) is machine
        return machine if fits and machine.room(spec) else None

    def _spec(self, config: SandboxConfig) -> _Request:
        """What of it matters; a burst asks for the same again and again."""
        if self._last is None or self._last[0] is not config:
            self._last = config, _Request.of(config)
        return self._last[1]

    def _candidates(self, spec: _Request) -> list[_Machine]:
        """The best few of all that fit, and some of those that have the image."""
        found: list[_Machine] = []
        seen: list[tuple[float, int, str]] = []
        while self._heap and len(found) < _LOOKED_AT:
            entry = heapq.heappop(self._heap)
            if self._valid(entry):
                seen.append(entry)
                machine = self._machines[entry[2]]
                if machine.could_ever(spec) and machine.room(spec):
                    found.append(machine)
        for entry in seen:
            heapq.heappush(self._heap, entry)
        if not any(spec.image in machine.images for machine in found):
            for number, name in enumerate(self._holders.get(spec.image, ())):
                machine = self._machines[name]
                if machine.could_ever(spec) and machine.room(spec):
                    found.append(machine)
                if number >= 4 * _LOOKED_AT:
                    break
        return found

    def _refusal(self, config: SandboxConfig, spec: _Request) -> RockError:
        """The error when no worker has the capacity."""
        machines = list(self._machines.values())
        if not machines:
            return NoCapacity("no worker is known", hint="start one with: rocklet --join")
        fit = [machine for machine in machines if machine.could_ever(spec)]
        if not fit:
            return _never(config, [machine.status for machine in machines])
        if spec.gpus and not any(machine.gpus_free >= spec.gpus for machine in fit):
            return NoCapacity("every GPU is in use", hint="stop some sandboxes, or retry later")
        if any(machine.sandboxes < machine.status.sandbox_limit for machine in fit):
            return NoCapacity("every worker is short of memory", hint="stop some sandboxes, or retry later")
        limits = sum(machine.status.sandbox_limit for machine in fit)
        return NoCapacity(f"every worker is at its limit of sandboxes: {limits} on {len(fit)}",
                          hint="stop some, retry later, or set ROCK_SANDBOX_LIMIT of a worker to a higher number")

    # ---- many ----

    def place_group(self, config: SandboxConfig, size: int, placement: Placement, whole: bool) -> list[str]:
        spec = _Request.of(config)
        fit = [(m, room) for m in self._machines.values() if m.could_ever(spec) and (room := m.room(spec))]
        fit.sort(key=lambda pair: (spec.image in pair[0].images, pair[0].score, pair[0].name), reverse=True)
        there = sum(room for _, room in fit)
        if not there or (whole and there < size):
            refusal = self._refusal(config, spec)
            if there:
                refusal = NoCapacity(f"there is room for {there} of the {size} sandboxes of this group",
                                     hint='stop some, ask for less, or mode="best_effort"')  # fmt: skip
            raise refusal
        counts: Counter[str] = Counter()
        if placement == "pack":
            self._fill(fit, counts, size, lambda machine: machine.wholly(spec))
            self._fill(fit, counts, size, lambda machine: machine.room(spec))
        else:
            _deal(fit, counts, size)
        return [self._take(machine, spec) for machine, _ in fit for _ in range(counts[machine.name])]

    @staticmethod
    def _fill(fit: Iterable[tuple[_Machine, int]], counts: Counter[str], size: int,
              room: Callable[[_Machine], int]) -> None:  # fmt: skip
        """One worker after the other, the roomiest first, up to what `room` says of each."""
        left = size - counts.total()
        for machine, _ in sorted(fit, key=lambda pair: room(pair[0]), reverse=True):
            more = min(left, max(0, room(machine) - counts[machine.name]))
            counts[machine.name] += more
            left -= more


def _deal(fit: list[tuple[_Machine, int]], counts: Counter[str], size: int) -> None:
    """One each in turn, to those that have room."""
    left, hands = size, fit
    while left and hands:
        for machine, _ in hands[:left]:
            counts[machine.name] += 1
        left -= min(left, len(hands))
        hands = [(machine, room) for machine, room in hands if counts[machine.name] < room]


def _never(config: SandboxConfig, statuses: list[NodeStatus]) -> RockError:
    cpus = max(status.cpus for status in statuses)
    total = max(status.memory_total for status in statuses)
    if config.cpus > cpus:
        return InvalidConfig(f"Requested CPUs {config.cpus} exceed the maximum allowed {cpus}",
                             hint="request fewer CPUs, or add a larger worker")
    if config.memory_bytes > total:
        return InvalidConfig(f"Requested memory {config.memory} exceeds the largest machine's {total / (1 << 30):.1f}g",
                             hint="request less memory, or add a larger worker")
    if config.num_gpus or config.accelerator_type:
        kinds = sorted({kind for status in statuses for kind in status.accelerators})
        return Unsupported(
            f"no worker has {config.num_gpus or 1:g} {config.accelerator_type or 'GPU'}: the workers have "
            f"{', '.join(kinds) or 'no GPUs'}", hint="leave gpus and gpu_type unset",
        )  # fmt: skip
    return InvalidConfig(f"no worker has both {config.cpus:g} CPUs and {config.memory} of memory",
                         hint="request fewer CPUs or less memory, or add a larger worker")
