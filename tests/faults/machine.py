"""The fault suite: a state machine over the public API, and a model of what a client may rely on.

What a client was told is the model; everything else may be either way. Rules are requests, the same requests again
with their keys, and faults: kill -9 of each process, at a random moment or at a named point, replies that are dropped,
a store that stalls, is full or does not answer, a wall clock that jumps. Each run ends with a look at everything: see
`settle`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from rock.errors import Conflict, Lost, NotFound, RockError, SandboxError, StorageFull, Unavailable
from tests.faults.clients import WORK, Client, final_look
from tests.faults.damage import damage
from tests.faults.history import History, violations
from tests.faults.world import Server, World

# Seconds in which everything has to come to rest: an event of a worker that nobody heard is made good by a look every
# 30 s, perhaps by the second one.
PATIENCE = 120.0
RANK = {"pending": 0, "running": 1, "stopping": 2, "stopped": 3, "archiving": 4, "archived": 5, "deleted": 6}
POINTS = (
    "create.saved", "launch.begun", "launch.made", "store.insert", "store.inserted", "store.put", "store.saved",
    "store.list", "store.get", "node.create.begun", "node.create.made", "node.create.saved", "process.born",
    "namespace.placed", "namespace.born", "stop.saved", "stop.released", "node.destroy.begun", "node.destroy.gone",
    "node.destroy.forgotten", "session.spawned", "session.opened", "run.begun", "run.written", "run.ended",
    "process.started", "process.saved", "execute.started", "execute.ended", "reply.create_sandbox",
    "reply.stop_sandbox", "reply.run", "reply.create_session", "reply.execute", "reply.start_process",
)  # fmt: skip
# What a request may end in when a fault is about: the client then knows nothing, and asks again.
FAILED = (Unavailable, StorageFull)
WHICH = st.integers(0, 11)
FAULTS = ("kill admin", "kill admin", "kill worker", "kill worker", "kill launcher", "kill zygote", "stop admin",
          "stop worker", "store away")  # fmt: skip


def _seconds(seed: int) -> float:
    """How long a server is away: mostly for a moment, sometimes for as long as a restart of a large machine takes. The
    generator prefers small numbers, so the seed is mixed."""
    number = random.Random(seed).randrange(1000)
    for most, seconds in ((1, 30.0), (4, 10.0), (16, 3.0), (60, 1.0), (150, 0.3)):
        if number < most:
            return seconds
    return 0.1


PAUSES = st.integers(0, 1 << 32).map(_seconds)
CLIENTS = st.lists(st.lists(st.sampled_from(WORK), min_size=2, max_size=5), min_size=2, max_size=3)
FAULT_PLAN = st.lists(st.tuples(st.sampled_from(FAULTS), st.floats(0, 0.3), PAUSES), max_size=2)
MOST = 6  # sandboxes of one run
_numbers = itertools.count(1)


@dataclass
class Effect:
    """A request with a key that changes something once: what it was answered."""

    key: str
    answer: Any = None  # (status, ...) once it is known
    name: str = ""
    slow: bool = False  # it takes a while, so that a fault meets it in the middle


@dataclass
class Model:
    """A sandbox as its client knows it. id: once that was told."""

    key: str
    id: str = ""
    failed: str = ""  # it was told that it did not start, and why
    stop_asked: bool = False
    stopped: bool = False  # and told so
    life: int = 0  # of what holds it in its memory
    damaged: bool = False  # a file that tells of it was damaged: it may be lost, and its answers, but nothing is twice
    shared: bool = False  # several clients worked in it at the same time
    branch: bool = False  # of a tree: see branches.py
    effects: list[Effect] = field(default_factory=list)


class Broken(AssertionError):
    """An invariant does not hold."""


class FaultMachine(RuleBasedStateMachine):
    """One run. `world` is shared by all runs, so that each begins with whatever servers the one before left."""

    world: World
    counts: Counter[str] = Counter()
    longest = 30.0  # seconds that a server is away

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Model] = []
        self.seen: dict[str, int] = {}
        self.history = History()
        self.requests: list[str] = []  # of this run, for the report of a problem
        self.damaged_records: set[str] = set()  # ids of sandboxes whose record was damaged: they cannot be used

    @initialize(which=WHICH, work=CLIENTS, faults=FAULT_PLAN)
    def begin(self, which: int, work: list[list[str]], faults: list[tuple[str, float, float]]) -> None:
        """Each run has a history of concurrent clients."""
        self.world.calm()
        self.counts["runs"] += 1
        self._together(which, work, faults)

    # ---- requests ----

    def _ask(self, name: str, body: object = None, key: str | None = None, query: str = "", **path: str) -> Any:
        self.counts["requests"] += 1
        began = time.monotonic()
        outcome = "no answer"
        try:
            answer = self.world.ask(name, body, key, query, **path)
            outcome = repr(answer)[:300]
        except BaseException as error:
            outcome = repr(error)[:300]
            raise
        finally:
            self.requests.append(f"{began:.2f} {name} {key or ''} {body if name == 'execute' else ''} -> {outcome}")
        if isinstance(answer, dict) and answer.get("state") in RANK and "sandbox_id" in answer:
            self._observe(answer)
        return answer

    def _observe(self, info: dict[str, Any]) -> None:
        rank = RANK[info["state"]]
        if rank < self.seen.get(info["sandbox_id"], 0):
            raise Broken(f"{info['sandbox_id']} went back to {info['state']}")
        self.seen[info["sandbox_id"]] = rank

    def _step(self, name: str) -> None:
        self.counts["steps"] += 1
        self.counts[f"rule {name}"] += 1
        self.requests.append(f"{time.monotonic():.2f} step {name}")
        self._revive()

    def _revive(self) -> None:
        dead = [server for server in self.world.servers if not server.alive]
        for _ in dead:
            self._died()
        if dead:
            self.world.ensure()

    def _died(self) -> None:
        self.counts["kills"] += 1

    def _holder(self, which: int) -> Server:
        return self.world.holders[which % len(self.world.holders)]

    def _may_be_lost(self, model: Model) -> bool:
        return model.damaged or model.life != self.world.lives

    def _explained(self, model: Model, error: RockError) -> bool:
        """Whether damage explains an error: the record of this sandbox, or a file with what it was asked."""
        if isinstance(error, Lost):
            return model.id in self.damaged_records
        return model.damaged and isinstance(error, Conflict)

    def _create(self, model: Model) -> None:
        config = self.world.config(labels={"fault": model.key})
        try:
            info = self._ask("create_sandbox", config, model.key, "wait=20")
        except FAILED:
            return
        except SandboxError as error:
            model.failed = str(error)
            return
        if model.id and info["sandbox_id"] != model.id:
            raise Broken(f"key {model.key} made {model.id} and {info['sandbox_id']}")
        if not model.id and info["state"] != "pending":
            model.id = info["sandbox_id"]

    def _told(self, model: Model, effect: Effect, answer: Any) -> None:
        if effect.answer is not None and effect.answer != answer:
            raise Broken(f"{effect.name} {effect.key} answered {effect.answer}, then {answer}")
        effect.answer = answer

    def _do(self, model: Model, effect: Effect) -> None:
        number = int(effect.key[1:])
        status = number % 100
        wait = "sleep 0.6; " if effect.slow else ""
        text = f"echo {effect.key} >> $HOME/fault; {wait}echo said {effect.key}; (exit {status})"
        path = {"sandbox_id": model.id}
        try:
            if effect.name == "run":
                seen = self._ask("run", {"command": text, "timeout": 30}, effect.key, session="default", **path)
                answer = (seen["exit_code"], seen["output"])
            else:
                seen = self._ask("execute", {"command": ["sh", "-c", text], "timeout": 30}, effect.key, **path)
                answer = (seen["exit_code"], seen["stdout"])
        except FAILED:
            return
        except RockError as error:
            if model.stop_asked or model.life != self.world.lives or self._explained(model, error):
                return
            raise Broken(f"{effect.name} in {model.id}: {error!r}") from error
        if answer != (status, f"said {effect.key}\n"):
            if model.damaged and (seen.get("failure_reason") or seen.get("dropped_bytes")):
                return  # what is missing was told
            raise Broken(f"{effect.name} {effect.key} answered {answer}: {seen}")
        self._told(model, effect, answer)

    def _stop(self, model: Model) -> None:
        model.stop_asked = True
        try:
            info = self._ask("stop_sandbox", sandbox_id=model.id)
        except FAILED:
            return
        if info["state"] != "stopped":
            raise Broken(f"{model.id} was stopped and is {info['state']}")
        model.stopped = True

    def _live(self) -> list[Model]:
        return [model for model in self.models if model.id and not model.stop_asked]

    def _pick(self, models: list[Model], which: int) -> Model | None:
        # By a number that was drawn before: what is drawn must not depend on what servers answered.
        return models[which % len(models)] if models else None

    def _pick_or_make(self, which: int, models: list[Model]) -> Model | None:
        """One of them, or a new one where there is none; None when that could not be made."""
        if not models and len(self.models) < MOST:
            self.models.append(Model(f"c{next(_numbers)}", life=self.world.lives))
            self._create(self.models[-1])
            models = [model for model in self.models[-1:] if model.id]
        return self._pick(models, which)

    # ---- rules: what clients do ----

    @rule()
    def create(self) -> None:
        self._step("create")
        if len(self.models) < MOST:
            self.models.append(Model(f"c{next(_numbers)}", life=self.world.lives))
            self._create(self.models[-1])

    @rule(which=WHICH)
    def create_again(self, which: int) -> None:
        self._step("create again")
        if (model := self._pick(self.models, which)) is not None:
            self._create(model)

    @rule(which=WHICH, name=st.sampled_from(["run", "run", "execute"]))
    def do(self, which: int, name: str) -> None:
        self._step(name)
        if (model := self._pick_or_make(which, self._live())) is not None:
            model.effects.append(Effect(f"e{next(_numbers)}", name=name))
            self._do(model, model.effects[-1])

    @rule(which=WHICH)
    def do_again(self, which: int) -> None:
        self._step("do again")
        if (model := self._pick([model for model in self._live() if model.effects], which)) is not None:
            self._do(model, model.effects[-1])

    @rule(which=WHICH)
    def stop(self, which: int) -> None:
        self._step("stop")
        if (model := self._pick(self._live(), which)) is not None:
            self._stop(model)

    @rule()
    def look(self) -> None:
        self._step("look")
        with contextlib.suppress(*FAILED):
            for info in self._ask("list_sandboxes", query="limit=500")["items"]:
                if any(model.id == info["sandbox_id"] for model in self.models):
                    self._observe(info)

    # ---- rules: faults ----

    @rule(point=st.sampled_from(POINTS), at=st.integers(1, 3))
    def kill_at(self, point: str, at: int) -> None:
        """The next one that comes to that point is killed."""
        self._step("kill at a point")
        for server in filter(None, (self.world.server, self.world.worker)):
            server.faults(f"{point}=kill@{at}")

    @rule(name=st.sampled_from([name for name in POINTS if name.startswith("reply.")]))
    def drop(self, name: str) -> None:
        self._step("drop a reply")
        self.world.server.faults(f"{name}=drop@1")

    @rule(point=st.sampled_from(["store.insert", "store.put", "store.get", "store.list", "store.saved"]),
          action=st.sampled_from(["full", "error", "stall:0.2"]), at=st.sampled_from(["", "@1", "@2"]))  # fmt: skip
    def store_fails(self, point: str, action: str, at: str) -> None:
        self._step("store fails")
        self.world.server.faults(f"{point}={action}{at}")

    @rule(seconds=st.sampled_from([-7200, -60, 60, 7000]))
    def clock_jumps(self, seconds: int) -> None:
        self._step("clock jumps")
        self.world.server.faults(f"clock={seconds:+d}")

    @rule()
    def calm(self) -> None:
        self._step("calm")
        self.world.calm()

    @rule(which=WHICH, pause=PAUSES)
    def kill(self, which: int, pause: float) -> None:
        self._step("kill")
        server = self.world.servers[which % len(self.world.servers)]
        server.kill()
        self._died()
        time.sleep(min(pause, self.longest))
        self.world.ensure()

    @rule(delay=st.floats(0, 0.06), work=st.sampled_from(["create", "do", "stop"]), which=WHICH)
    def kill_meanwhile(self, delay: float, work: str, which: int) -> None:
        """kill -9 while something is under way."""
        self._step("kill meanwhile")
        model = self._pick(self._live(), which) if work != "create" else None
        if model is None:
            work, model = "create", Model(f"c{next(_numbers)}", life=self.world.lives)
            self.models.append(model)
        problems: list[BaseException] = []

        def call() -> None:
            try:
                if work == "create":
                    self._create(model)
                elif work == "stop":
                    self._stop(model)
                else:
                    model.effects.append(Effect(f"e{next(_numbers)}", name="run"))
                    self._do(model, model.effects[-1])
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(delay)
        self.world.server.kill()
        thread.join()
        self._died()
        self.world.ensure()
        if problems:
            raise problems[0]

    @precondition(lambda self: self.world.runtime == "namespace")
    @rule(which=WHICH, zygote=st.booleans())
    def kill_launcher(self, which: int, zygote: bool) -> None:
        """The child that makes namespaces, or the one that pid 1 of each sandbox is forked of."""
        self._step("kill zygote" if zygote else "kill launcher")
        holder = self._holder(which)
        self._kill_all(self.world.zygotes(holder) if zygote else self.world.launchers(holder))

    def _kill_all(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.counts["kills"] += bool(pids)

    @precondition(lambda self: self.world.database is not None)
    @rule(pause=PAUSES)
    def database_fails_over(self, pause: float) -> None:
        """PostgreSQL is stopped at once, and started again."""
        self._step("store away")
        assert self.world.database is not None
        self.world.database.away(min(pause, 10.0, self.longest))
        self.counts["failovers"] += 1

    @precondition(lambda self: self.world.kind == "damage")
    @rule(which=WHICH, seed=st.integers(0, 1 << 30), kind=st.sampled_from(["flip", "cut", "zeros", "empty"]),
          name=st.sampled_from(["run", "execute"]))  # fmt: skip
    def damage(self, which: int, seed: int, kind: str, name: str) -> None:
        """A file of the rocklet is damaged while the server is away, in the middle of a command."""
        self._step(f"damage {kind}")
        model = self._pick_or_make(which, self._live())
        if model is None:
            return
        effect = Effect(f"e{next(_numbers)}", name=name, slow=True)
        model.effects.append(effect)
        problems: list[BaseException] = []

        def call() -> None:
            try:
                self._do(model, effect)
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(0.2)
        self.world.server.kill()
        self._died()
        thread.join()
        if file := damage(self.world.holder.home / "run", seed, kind):
            self.counts["damaged files"] += 1
            self.counts[f"damaged {file.parent.name if file.parent.name == 'records' else file.name}"] += 1
            self.damaged_records |= {part for part in file.parts if part in self.world.records}
            for each in self.models:
                each.damaged = True
        self.world.ensure()
        if problems:
            raise problems[0]

    # ---- several clients at once ----

    @rule(which=WHICH, work=CLIENTS, faults=FAULT_PLAN)
    def together(self, which: int, work: list[list[str]], faults: list[tuple[str, float, float]]) -> None:
        self._step("together")
        self._together(which, work, faults)

    def _together(self, which: int, work: list[list[str]], faults: list[tuple[str, float, float]]) -> None:
        """Clients that retry work in one sandbox, while servers are killed, stopped and cut off from their store."""
        model = self._pick_or_make(which, [model for model in self._live() if not self._may_be_lost(model)])
        if model is None:
            return
        if self.world.runtime == "fake":
            faults = [fault for fault in faults if fault[0] in ("kill admin", "stop admin")]
        model.shared = True
        clients = [Client(self.world, self.history, model.id, f"k{next(_numbers)}", each) for each in work]
        for client in clients:
            client.start()
        for name, delay, pause in faults:
            time.sleep(delay)
            self._fault(name, which, min(pause, self.longest))
        end = time.monotonic() + PATIENCE
        while any(client.is_alive() for client in clients):
            self._revive()  # a point at which one is killed may still be set
            for client in clients:
                client.join(0.05)
            if time.monotonic() > end:
                raise Broken(f"clients in {model.id} do not end")
        self.counts["concurrent operations"] += sum(map(len, work))
        for client in clients:
            self.counts["unknown outcomes"] += client.unknown
            for error in client.problems:
                if not self._may_be_lost(model):
                    raise Broken(f"{client.name} in {model.id}: {error!r}") from error

    def _fault(self, name: str, which: int, pause: float) -> None:
        self.counts[f"fault {name}"] += 1
        what, who = name.split()  # "store away" is the third form
        server = self._holder(which) if who == "worker" else self.world.server
        if name == "store away":
            if self.world.database is not None:
                self.world.database.away(min(pause, 10.0))
                self.counts["failovers"] += 1
        elif who in ("launcher", "zygote"):
            if self.world.runtime == "namespace":
                holder = self._holder(which)
                self._kill_all(self.world.zygotes(holder) if who == "zygote" else self.world.launchers(holder))
        elif what == "kill":
            server.kill()
            self._died()
            time.sleep(pause)
            self.world.ensure()
        elif server.alive:
            os.kill(server.pid, signal.SIGSTOP)
            time.sleep(pause)
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGCONT)
            self.counts["stops"] += 1

    # ---- the look at everything ----

    def teardown(self) -> None:
        if not self.counts["runs"]:
            return
        try:
            self._revive()
            self.world.calm()
            self.settle()
        except BaseException as error:
            error.add_note("\n".join([f"models: {[(m.id, [(e.key, e.name) for e in m.effects]) for m in self.models]}",
                                      *self.requests]))
            raise
        finally:
            self.clean()

    def settle(self) -> None:
        """Without faults: all that is under way comes to its end, and what clients were told holds."""
        mine = self._at_rest()
        for model in self.models:
            infos = [info for info in mine.values() if info["labels"].get("fault") == model.key]
            if len(infos) > 1:
                raise Broken(f"key {model.key} made {[info['sandbox_id'] for info in infos]}")
            if model.id and not infos:
                raise Broken(f"{model.id} was told of and is not known")
            if infos:
                self._check(model, infos[0])
        if wrong := violations(self.history):
            raise Broken("\n".join(wrong))
        self.counts["histories"] += bool(self.history.operations)
        running = {name for name, info in mine.items() if info["state"] == "running"}
        end = time.monotonic() + PATIENCE  # what is killed may take a moment to be gone
        while self.world.outlives and (pids := self.world.pids) != len(running):
            if time.monotonic() > end:
                raise Broken(f"{len(running)} run, and there are {pids} on the machine")
            time.sleep(0.05)

    def _at_rest(self) -> dict[str, dict[str, Any]]:
        end = time.monotonic() + PATIENCE
        keys = {model.key for model in self.models}
        while True:
            items = self._ask("list_sandboxes", query="limit=500")["items"]
            mine = {i["sandbox_id"]: i for i in items if i["labels"].get("fault") in keys}
            passing = {name: i["state"] for name, i in mine.items() if i["state"] in ("pending", "stopping")}
            running = {name for name, i in mine.items() if i["state"] == "running"}
            if not passing and self.world.records == running:
                return mine
            if time.monotonic() > end:
                raise Broken(f"not at rest: {passing}; running: {running}; on the worker: {self.world.records}")
            time.sleep(0.02)

    def _check(self, model: Model, info: dict[str, Any]) -> None:
        state = info["state"]
        self._observe(info)
        if model.stopped and state != "stopped":
            raise Broken(f"{model.id} was told to be stopped and is {state}")
        if model.id and not model.stop_asked and state != "running":
            if self._may_be_lost(model) and info["cause"] == "lost":
                return
            raise Broken(f"{model.id} was told to run and is {state}: {info['cause']}: {info['reason']}")
        model.id = model.id or info["sandbox_id"]
        if state != "running" or model.stop_asked:
            return
        for effect in model.effects:
            self._do(model, effect)
            if effect.answer is None and not model.damaged:
                raise Broken(f"{effect.name} {effect.key}: no answer without faults")
        try:
            found = Counter(self.world.look(model.id, "cat $HOME/fault || true").split())
        except Lost as error:
            if self._explained(model, error):
                return  # no request can check it
            raise
        asked = Counter(effect.key for effect in model.effects)
        if model.damaged:
            # Answers may be missing and what was asked may not have been done; nothing was done twice.
            others = Counter(self.world.look(model.id, "cat $HOME/log $HOME/started 2>/dev/null || true").split())
            if again := {name: count for name, count in (found + others).items() if count > 1}:
                raise Broken(f"{model.id} is damaged, and executed again: {again}")
            if not found <= asked:
                raise Broken(f"effects of {model.id}: {found}, asked for: {[e.key for e in model.effects]}")
            return
        if model.shared and (wrong := final_look(self.world, self.history, model.id)):
            raise Broken(f"{model.id}: {wrong}")
        if found != asked:
            raise Broken(f"effects of {model.id}: {found}, asked for: {[e.key for e in model.effects]}")

    def clean(self) -> None:
        """Nothing is left for the next run."""
        self.world.calm()
        for item in self.world.ask("list_sandboxes", query="state=pending,running,stopping&limit=500")["items"]:
            with contextlib.suppress(NotFound, Conflict):
                self.world.ask("stop_sandbox", sandbox_id=item["sandbox_id"])
        for item in self.world.ask("list_sandboxes", query="limit=500")["items"]:
            with contextlib.suppress(NotFound, Conflict):
                self.world.ask("delete_sandbox", sandbox_id=item["sandbox_id"])
