"""The fault suite with branches: checkpoints, rollbacks, forks and pauses between the other operations.

A tree is a sandbox in whose file each write appends a word. A client repeats each operation with its key until it has
an answer; faults come in between. After each answer, what the sandbox and its children have is known exactly.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from rock.errors import Conflict, NotFound, RockError, SandboxError
from tests.faults.machine import FAILED, PATIENCE, WHICH, Broken, FaultMachine, Model

POINTS = (
    "snapshot.create.saved", "snapshot.create.made", "snapshot.rollback.begun", "snapshot.rollback.done",
    "snapshot.delete.saved", "snapshot.delete.gone", "namespace.checkpoint.switched", "namespace.checkpoint.frozen",
    "namespace.checkpoint.stopped", "namespace.processes.known", "namespace.processes.taken",
    "namespace.processes.finished",
    "namespace.processes.adopted", "namespace.processes.started", "node.checkpoint.taken", "node.checkpoint.saved",
    "node.rollback.saved", "node.sessions.attached", "node.snapshot.delete", "node.snapshot.dropped", "sandbox.pausing",
    "sandbox.resumed", "sandbox.auto_pause.begun", "sandbox.auto_pause.woken", "store.recorded.begin",
    "store.recorded.finish", "proxy.recorded.begun", "proxy.recorded.finished", "reply.checkpoint_sandbox",
    "reply.rollback_sandbox", "reply.fork_sandbox", "reply.pause_sandbox", "reply.resume_sandbox",
)  # fmt: skip
OPERATIONS = ("write", "write", "checkpoint", "checkpoint", "rollback", "rollback", "fork", "pause")
WORK = st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=6)
_numbers = itertools.count(1)


@dataclass
class Tree:
    """A sandbox and its snapshots. words: what its file has. snapshots: the words of each."""

    model: Model
    words: list[str] = field(default_factory=list)
    snapshots: dict[str, list[str]] = field(default_factory=dict)
    failed_forks: int = 0


class BranchMachine(FaultMachine):
    """Runs with branches."""

    def __init__(self) -> None:
        super().__init__()
        self.trees: list[Tree] = []

    def _live(self) -> list[Model]:
        theirs = {tree.model.key for tree in self.trees}
        return [model for model in super()._live() if model.key not in theirs and not model.branch]

    # ---- rules ----

    @initialize(delay=st.floats(0, 0.6), which=WHICH, branch=WORK, memory=st.booleans(),
                fault=st.sampled_from(["kill", "kill", "launcher", "none"]))  # fmt: skip
    def begin(self, delay: float, which: int, branch: list[str], memory: bool, fault: str) -> None:
        """Each run has a tree."""
        self.world.calm()
        self.counts["runs"] += 1
        self.branch_with_a_kill_meanwhile(delay, which, branch, memory, fault)

    @rule(point=st.sampled_from(POINTS), at=st.integers(1, 2), which=WHICH, work=WORK, memory=st.booleans())
    def branch_with_a_kill_at_a_point(self, point: str, at: int, which: int, work: list[str], memory: bool) -> None:
        self._step("branch, kill at a point")
        tree = self._tree(which)
        if tree is None:
            return
        self.world.server.faults(f"{point}=kill@{at}")
        for name in work:
            self._branch(tree, name, which, memory)

    @rule(delay=st.floats(0, 0.6), which=WHICH, work=WORK, memory=st.booleans(),
          fault=st.sampled_from(["kill", "kill", "launcher", "none"]))  # fmt: skip
    def branch_meanwhile(self, delay: float, which: int, work: list[str], memory: bool, fault: str) -> None:
        """A fault comes in the middle of operations."""
        self.branch_with_a_kill_meanwhile(delay, which, work, memory, fault)

    def branch_with_a_kill_meanwhile(self, delay: float, which: int, work: list[str], memory: bool, fault: str) -> None:
        self._step(f"branch, {fault} meanwhile")
        tree = self._tree(which)
        if tree is None:
            return
        problems: list[BaseException] = []

        def play() -> None:
            try:
                for name in work:
                    self._branch(tree, name, which, memory)
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=play)
        thread.start()
        time.sleep(delay)
        if fault == "kill":
            self.world.server.kill()
            self._died()
            self.world.ensure()
        elif fault == "launcher":
            self._kill_all(self.world.launchers())
        end = time.monotonic() + 2 * PATIENCE
        while thread.is_alive():
            self._revive()
            thread.join(0.05)
            if time.monotonic() > end:
                raise Broken(f"{work} in {tree.model.id} does not end")
        if problems:
            raise problems[0]

    # ---- operations ----

    def _tree(self, which: int) -> Tree | None:
        found = [tree for tree in self.trees if not tree.model.stop_asked]
        if found and which % 3:
            return found[which % len(found)]
        if len(self.trees) >= 3:
            return None
        model = Model(f"t{next(_numbers)}", life=self.world.lives, branch=True)
        self.models.append(model)
        options: dict[str, Any] = {"record": True} if which % 2 else {"auto_pause": 0.2} if which % 4 == 0 else {}
        config = self.world.config(labels={"fault": model.key}, **options)
        info = self._surely(lambda: self._ask("create_sandbox", config, model.key, "wait=20"))
        model.id = info["sandbox_id"]
        self.trees.append(Tree(model))
        return self.trees[-1]

    def _surely(self, call: Callable[[], Any], passing: Callable[[RockError], bool] = lambda _: False) -> Any:
        """The answer to a request that is repeated until there is one. passing: errors that are repeated too."""
        end = time.monotonic() + PATIENCE
        calm = time.monotonic() + 5  # a store that always fails is repaired
        while True:
            try:
                return call()
            except RockError as error:
                if not isinstance(error, FAILED) and not passing(error):
                    raise
                if time.monotonic() > end:
                    raise Broken(f"no answer within {PATIENCE:g} s: {error!r}") from error
            if threading.current_thread() is threading.main_thread():
                self._revive()
            if time.monotonic() > calm:
                self.world.server.faults("")
            time.sleep(0.03)

    def _branch(self, tree: Tree, name: str, which: int, memory: bool) -> None:
        """One operation, until it is answered; then a look at the result."""
        self.counts[f"branch {name}"] += 1
        path, key = {"sandbox_id": tree.model.id}, f"b{next(_numbers)}"
        level = "auto" if memory else "files"
        # After a rollback was repeated the answer to the first attempt may say that another one is in progress.
        busy = lambda error: isinstance(error, Conflict) and "quiet" in error.message  # noqa: E731
        if name == "write":
            self._write(tree.model.id, key)
            tree.words.append(key)
        elif name == "checkpoint":
            taken = self._surely(lambda: self._ask("checkpoint_sandbox", {"memory": level}, key, **path), busy)
            tree.snapshots[taken["snapshot_id"]] = list(tree.words)
        elif name == "rollback" and tree.snapshots:
            chosen = sorted(tree.snapshots)[which % len(tree.snapshots)]
            self._surely(lambda: self._ask("rollback_sandbox", {"snapshot": chosen}, key, **path), busy)
            tree.words = list(tree.snapshots[chosen])
        elif name == "fork":
            child = f"{tree.model.key}-{key}"
            body = {"count": 2, "memory": level, "start": 20, "changes": {"labels": {"fault": child}}}
            try:
                made = self._surely(lambda: self._ask("fork_sandbox", body, key, **path), busy)
            except SandboxError:  # a child did not start, and the key has this answer from now on
                self.counts["failed forks"] += 1
                tree.failed_forks += 1
                return
            tree.snapshots[made["snapshot"]["snapshot_id"]] = list(tree.words)
            for number, info in enumerate(made["group"]["sandboxes"]):
                model = Model(f"{child} {number}", id=info["sandbox_id"], life=self.world.lives, branch=True)
                self._same(model.id, tree.words)
                self._surely(lambda id=info["sandbox_id"]: self._ask("stop_sandbox", sandbox_id=id))  # type: ignore[misc]
        elif name == "pause":
            self._surely(lambda: self._ask("pause_sandbox", **path), lambda error: isinstance(error, Conflict))
            self._surely(lambda: self._ask("resume_sandbox", **path))
        self._same(tree.model.id, tree.words)

    def _write(self, sandbox_id: str, word: str) -> None:
        command = ["sh", "-c", f"echo {word} >> $HOME/tree"]
        self._surely(lambda: self._ask("execute", {"command": command, "timeout": 30}, f"w{word}",
                                       sandbox_id=sandbox_id))  # fmt: skip

    def _same(self, sandbox_id: str, words: list[str]) -> None:
        command = ["sh", "-c", "cat $HOME/tree 2>/dev/null || true"]
        body = {"command": command, "timeout": 30}
        pending = lambda error: isinstance(error, Conflict)  # noqa: E731  a key of a request that is in progress
        found = self._surely(lambda: self._ask("execute", body, f"r{next(_numbers)}", sandbox_id=sandbox_id), pending)
        if found["stdout"].split() != words:
            raise Broken(f"{sandbox_id} has {found['stdout'].split()} and not {words}")

    # ---- the look at everything ----

    def settle(self) -> None:
        for tree in self.trees:
            self._same(tree.model.id, tree.words)
        rows = self._ask("list_snapshots")["items"]
        known = {snapshot for tree in self.trees for snapshot in tree.snapshots}
        found = {row["snapshot_id"] for row in rows if row["sandbox_id"] in {tree.model.id for tree in self.trees}}
        failed = sum(tree.failed_forks for tree in self.trees)  # their snapshots exist, and no answer had the id
        if not known <= found or len(found - known) > failed:
            raise Broken(f"snapshots {found}, and clients know {known}")
        if wrong := [row for row in rows if row["state"] != "ready"]:
            raise Broken(f"snapshots that are not complete: {wrong}")
        super().settle()

    def clean(self) -> None:
        super().clean()
        for row in self.world.ask("list_snapshots")["items"]:
            with contextlib.suppress(NotFound):
                self.world.ask("delete_snapshot", snapshot=row["snapshot_id"])
        folder = self.world.holder.home / "run" / "namespace" / "snapshots"
        end = time.monotonic() + PATIENCE
        while folder.exists() and (left := [path.name for path in folder.iterdir()]):
            if time.monotonic() > end:
                raise Broken(f"layers are left without a snapshot: {left}")
            time.sleep(0.05)
