"""One try of a trial: its sandboxes, its programs and its phases.

The ids of sandboxes and the tags of programs follow from the record of the trial. A runner that takes over finds both
on the server, and continues to wait for programs that run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rock import errors
from rock.jobs.plan import AgentPlan, Plan, TrialFailed
from rock.protocol.action import Command, ProcessInfo
from rock.protocol.jobs import JobDetail, JobTask, TrialInfo
from rock.protocol.keys import tenant_of
from rock.protocol.sandbox import SandboxConfig, State
from rock.sdk.http import query_string
from rock.sdk.job.agents import AgentResult
from rock.sdk.sandbox.link import end_of, parse
from rock.sdk.sandbox.processes import Process, wire
from rock.sdk.sandbox.sandbox import Sandbox

SHOWN = 20_000  # bytes of output in a result
KEPT = 4 << 20  # bytes of output in a log file, and of tests that are graded
_POLL = 20.0
_TAG = "rock-job:"
_RUNS = "/v1/runs"  # of the model gateway


class Stopped(Exception):
    """The runner no longer runs this trial. reason: "cancelled" or "lost"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Attempt:
    """A try of a trial. folder: local folder of its logs; None keeps none. result: what is stored with the trial."""

    def __init__(
        self, job: JobDetail, plan: Plan, trial: TrialInfo, reach: dict[str, Any], folder: Path | None = None
    ) -> None:
        self.job = job
        self.plan = plan
        self.trial = trial
        self.task: JobTask = job.task_list[trial.task_index]
        self.agent: AgentPlan = plan.agents[int(self.task.spec.get("agent", 0))]
        self.folder = folder
        self.result: dict[str, Any] = {"phases": {}}
        self.built: set[str] = set()  # images that this runner has built
        self.stopped = ""
        self.pid: int | str | None = None
        self.reach = reach
        self._opened: list[Sandbox] = []
        self._run: str | None = None
        self._found: dict[str, dict[str, Process]] = {}

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox that was opened last."""
        if not self._opened:
            raise errors.InvalidConfig("the trial has no sandbox yet", hint="wait for on_sandbox_ready")
        return self._opened[-1]

    @property
    def has_sandbox(self) -> bool:
        return bool(self._opened)

    def check(self) -> None:
        """Stopped, if the trial was cancelled or lost."""
        if self.stopped:
            raise Stopped(self.stopped)

    @asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        """Record begin and end of a phase."""
        self.check()
        began = time.time()
        try:
            yield
        finally:
            self.result["phases"][name] = [began, time.time()]

    # ---- sandboxes

    def sandbox_id(self, suffix: str = "") -> str:
        """The id of a sandbox of this try."""
        key = str(self.reach.get("api_key") or "")
        tenant = tenant_of(key.encode("utf-8", "replace"))
        name = f"job-{self.job.job_id}-{self.trial.number}-{self.trial.tries}{suffix}"
        return f"{tenant}-{name}" if tenant else name

    async def open(self, suffix: str = "", **fields: Any) -> Sandbox:
        """The sandbox of this try with that suffix: the existing one, or a new one. fields: of SandboxConfig."""
        self.check()
        labels = {"rock_run_id": self.job.job_id, **self.plan.environment.get("labels", {}), **self.plan.labels,
                  "rock_job_id": self.job.job_id, "rock_task_id": self.trial.task[:200],
                  "rock_trial": str(self.trial.number)}  # fmt: skip
        given = {**self.plan.environment, **{name: value for name, value in fields.items() if value is not None}}
        given["env"] = {**self.plan.environment.get("env", {}), **(fields.get("env") or {})}
        config = SandboxConfig(**{**given, **self.reach, "labels": labels, "sandbox_id": self.sandbox_id(suffix)})
        if "auto_clear_seconds" not in given:
            config = config.model_copy(update={"auto_clear_seconds": 1800})
            config.__pydantic_fields_set__.add("auto_clear_seconds")
        sandbox = Sandbox(config)
        if self.trial.token > 1:
            sandbox.sandbox_id = config.sandbox_id
            try:
                info = await sandbox.info(wait=_POLL)
            except errors.NotFound:
                sandbox.sandbox_id = None
            else:
                deadline = time.monotonic() + config.startup_timeout
                while info.state is State.PENDING and time.monotonic() < deadline:
                    info = await sandbox.info(wait=_POLL)
                if info.state is not State.RUNNING:
                    ended = end_of(info)
                    raise TrialFailed(f"an earlier runner's sandbox has ended: {ended.message}", "infrastructure",
                                      hint="the trial is repeated in a new sandbox")  # fmt: skip
                self.result["reattached"] = True
        if sandbox.sandbox_id is None:
            await sandbox.start()
        self._opened.append(sandbox)
        self.result["sandbox_id"] = sandbox.sandbox_id
        self.check()
        return sandbox

    async def halt(self, reason: str) -> None:
        """Stop to run this trial. A cancelled one loses its sandboxes, so that all its requests end."""
        self.stopped = self.stopped or reason
        if reason == "cancelled":
            await self.close()

    async def close(self) -> None:
        """Stop the sandboxes. Errors are dropped: the idle timeout ends a sandbox that is left."""
        if self.plan.keep_sandboxes and self.stopped != "cancelled":
            return
        for sandbox in self._opened:
            try:
                await sandbox.stop()
            except errors.RockError:
                continue

    # ---- the gateway

    async def open_run(self) -> dict[str, Any] | None:
        """The gateway run of this try: a new one, or the active one of an earlier runner, without its secret. None: the
        plan has no `model`."""
        if self.plan.model is None:
            return None
        transport, place = self.sandbox._transport, str(self.sandbox.sandbox_id)
        if self.trial.token > 1:
            found = await transport.json("GET", _RUNS + query_string({"sandbox": place, "state": "active"}))
            if found["items"]:
                self._run = str(found["items"][0]["id"])
                self.result["run_id"] = self._run
                return dict(found["items"][0])
        tags = {"rock_job_id": self.job.job_id, "rock_trial": str(self.trial.number), "rock_task_id": self.trial.task}
        key = hashlib.sha256(f"{place}/{self.trial.token}/run".encode()).hexdigest()[:32]
        body = {"sandbox": place, "tags": tags, **self.plan.model}
        made = dict(await transport.json("POST", _RUNS, body, timeout=120.0, key=key))
        self._run = str(made["id"])
        self.result["run_id"] = self._run
        return made

    async def usage(self) -> dict[str, Any]:
        """Tokens and cost of the gateway run, with the names of Harbor's agent_result."""
        if self._run is None:
            return {}
        counts = (await self.sandbox._transport.json("GET", f"{_RUNS}/{self._run}")).get("counts", {})
        return {
            "n_input_tokens": counts.get("prompt_tokens"), "n_cache_tokens": counts.get("cached_tokens"),
            "n_output_tokens": counts.get("completion_tokens"), "cost_usd": counts.get("cost"),
            "metadata": {"run_id": self._run, "calls": counts.get("calls")},
        }  # fmt: skip

    async def end_run(self, rewards: dict[str, float] | None) -> None:
        """Freeze the gateway run with the rewards; without valid ones it has none."""
        if self._run is None:
            return
        body = {"rewards": rewards, "valid": True} if rewards else {"valid": False}
        if rewards and "reward" in rewards:
            body = {"reward": rewards["reward"], **body}
        try:
            await self.sandbox._transport.json("POST", f"{_RUNS}/{self._run}/end", body)
        except errors.RockError:
            return  # the run ends with its sandbox

    # ---- programs

    async def _known(self) -> dict[str, Process]:
        """Programs of this trial in the current sandbox, by name."""
        sandbox = self.sandbox
        place = str(sandbox.sandbox_id)
        if place not in self._found:
            found: dict[str, Process] = {}
            if self.trial.token > 1:
                for process in await sandbox.processes.list():
                    words = process.info.command
                    if isinstance(words, list) and words and words[-1].startswith(_TAG):
                        found[words[-1].removeprefix(_TAG)] = process
            self._found[place] = found
        return self._found[place]

    async def is_started(self, name: str) -> bool:
        """Whether the program of this name was started in the current sandbox."""
        return name in await self._known()

    async def program(
        self,
        name: str,
        script: str,
        timeout: float,
        *,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        shown: int = SHOWN,
    ) -> AgentResult:
        """Run a script of /bin/sh, or wait for the one that an earlier runner started. shown: bytes of its output."""
        self.check()
        known = await self._known()
        process = known.get(name)
        deadline = time.monotonic() + timeout
        if process is None:
            process = await self._start(name, script, env, cwd)
            known[name] = process
        elif process.info.started_at:
            deadline -= max(0.0, time.time() - process.info.started_at)
        self.pid = process.info.pid or process.id
        timed_out = False
        while True:
            self.check()
            left = deadline - time.monotonic()
            info = await process.wait(max(0.0, min(_POLL, left)))
            if not info.running:
                break
            if time.monotonic() >= deadline:
                timed_out = True
                await process.kill()
                info = await process.wait(_POLL)
                break
        self.check()
        output = await self._output(process, shown)
        return AgentResult(None if timed_out else info.exit_code, timed_out, output)

    async def _start(self, name: str, script: str, env: dict[str, str] | None, cwd: str | None) -> Process:
        link: Any = self.sandbox
        words = ["/bin/sh", "-c", script, _TAG + name]
        command = Command(command=words, env=env or None, cwd=cwd, stdin="", timeout=None)
        seed = f"{self.job.job_id}/{self.trial.number}/{self.trial.tries}/{link.sandbox_id}/{name}"
        key = hashlib.sha256(seed.encode()).hexdigest()[:32]
        raw = await link._call("start_process", link._path("start_process"), wire(command), key=key)
        return Process(link, parse(ProcessInfo, raw))

    async def _output(self, process: Process, shown: int) -> str:
        """The end of its standard output and errors, and the beginning of a long one."""
        parts = []
        for stream, size in (("stdout", process.info.stdout_size), ("stderr", process.info.stderr_size)):
            half = shown // 2
            data = b""
            if size > shown:
                head = await self._bytes(process, stream, 0, half)
                tail = await self._bytes(process, stream, size - half, half)
                data = head + b"\n[%d bytes left out]\n" % (size - 2 * half) + tail
            elif size:
                data = await self._bytes(process, stream, 0, size)
            parts.append(data.decode("utf-8", "replace"))
        return parts[0] + (("\n" if parts[0] and not parts[0].endswith("\n") else "") + parts[1] if parts[1] else "")

    async def _bytes(self, process: Process, stream: Any, offset: int, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = await process.logs(stream, offset + len(found), min(size - len(found), 1 << 20))
            if not part.data:
                break
            found += part.data
        return found

    def log(self, name: str, text: str) -> None:
        """Write a log file of the trial. name: of this program's own files, never from a sandbox."""
        if self.folder is None:
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text[-KEPT:], encoding="utf-8", errors="replace")
