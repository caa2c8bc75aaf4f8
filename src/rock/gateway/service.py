"""The gateway of a server: its runs and upstreams, and the model endpoint that agents call.

    agent ── POST /gateway/v1/... with the secret of a run ──► endpoint (endpoint.py) ──► Exchange ──► a source
    owner ── /v1/runs, /v1/gateway ──► api.py ──► Gateway

The state is in the folder of the gateway: secret, upstreams.json, runs/ID/. The secret of a run is derived from the
gateway's own secret and the id, so no run's secret is stored. All calls of a run pass this process.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock.errors import Conflict, InvalidConfig, NotFound, QuotaExceeded, RockError, StorageFull, Unavailable
from rock.gateway.durability import Syncer, sync
from rock.gateway.exchange import Exchange, from_upstream
from rock.gateway.pull import wait_for_answer
from rock.gateway.replay import Recorded, from_recording
from rock.gateway.runs import CALLS_FILE, RUN_FILE, Call, Run, request_of
from rock.gateway.upstreams import Upstreams
from rock.host import atomic_file
from rock.http.client import Headers
from rock.protocol.keys import Access, Caller
from rock.protocol.runs import RUN_PATTERN, EndRun, RunInfo, RunList, RunSpec, UpdateRun
from rock.telemetry.metrics import REGISTRY

log = logging.getLogger("rock.gateway")

RUNS = REGISTRY.gauge("rock_gateway_runs", "Runs by state", "state")
_SECRET = re.compile(r"sk-rock-([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{43})")
_SWEEP_EVERY = 600.0
_ORPHAN_SECONDS = 10.0
_PORT_SECONDS = 20.0  # for which the port of a sandbox stays open after its last run
_REOPEN_WITHIN = 10.0  # seconds for the port of a restarted sandbox
_REOPEN_AT_ONCE = 8
_OPEN_ENDED = 32  # ended runs whose index is in memory


@dataclass(frozen=True)
class Limits:
    """runs: of one tenant, ended ones included. calls: of one run. concurrent: calls of one run at a time. body: bytes
    of a request. retain: seconds for which an ended run is kept. orphan: seconds for which a call without a client
    goes on. sync: seconds within which records are synced."""

    runs: int = 10_000
    calls: int = 100_000
    concurrent: int = 256
    body: int = 32 << 20
    retain: float = 7 * 86_400.0
    orphan: float = _ORPHAN_SECONDS
    sync: float = 0.5


OpenPort = Callable[[str, int | None], Awaitable[int]]
ClosePort = Callable[[str], Awaitable[None]]


class Gateway:
    """open_port, close_port: the loopback port of a sandbox."""

    def __init__(self, folder: Path, limits: Limits, open_port: OpenPort, close_port: ClosePort) -> None:
        self._folder = folder
        self.limits = limits
        self._open_port = open_port
        self._close_port = close_port
        self._syncer = Syncer(limits.sync, self._not_synced)
        self.upstreams = Upstreams(folder / "upstreams.json", self._syncer.changed)
        self.runs: dict[str, Run] = {}
        self._created: dict[tuple[str, str], str] = {}  # runs by tenant and idempotency key
        self._creating: dict[tuple[str, str], asyncio.Future[Run]] = {}
        self._recorded: dict[str, Recorded] = {}  # of active replay runs
        self._exchanges: dict[tuple[str, int], Exchange] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._read: dict[str, None] = {}  # ended runs with an index in memory, the least recent first
        self._freezing: dict[str, asyncio.Task[None]] = {}  # by run
        self._tasks: set[asyncio.Task[Any]] = set()
        self._master = b""
        self.closing = False

    # ---- start and stop ----

    async def open(self) -> None:
        """Read the state of an earlier process. RockError when it cannot be used."""
        try:
            (self._folder / "runs").mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)
            self._master = _secret_of(self._folder / "secret")
            self.upstreams.load()
        except (OSError, ValueError, KeyError) as error:
            raise Unavailable(f"the state of the gateway in {self._folder} is not usable: {error}",
                              hint="restore the folder, or set ROCK_GATEWAY=off") from None
        await asyncio.to_thread(self._load)
        for run in self.runs.values():
            if run.state == "active":
                self._resume(run)
        for work in (self._sweep(), self._reopen_ports(), self._syncer.run()):
            self._spawn(work)

    def _load(self) -> None:
        for name in sorted(os.listdir(self._folder / "runs")):
            folder = self._folder / "runs" / name
            if name.startswith(".") or not (folder / "run.json").exists():  # deleted, or not created completely
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                run = Run.load(folder)
            except Exception as error:
                log.error("run %s is not readable, and is left as it is: %s", name, error)
                continue
            run.changed_file = self._syncer.changed
            self.runs[run.id] = run
            if run.idempotency:
                self._created[run.tenant, run.idempotency] = run.id

    def _resume(self, run: Run) -> None:
        """Continue an active run of an earlier process."""
        self._watch_budget(run)
        for call in run.calls:
            if call.state == "waiting":
                self._begin(run, call, self._exchange_of(run, call), wait_for_answer)

    def _exchange_of(self, run: Run, call: Call) -> Exchange:
        body = run.request(call)
        return Exchange(run, call, request_of(call, body), body)

    def let_go(self) -> None:
        """Prepare for the stop of the server: long polls return, and calls of pull mode wait for the next process."""
        self.closing = True
        for run in self.runs.values():
            run.closing = True
            run.notify()
        for exchange in self._exchanges.values():
            if exchange.run.spec.pull and not exchange.live.complete:
                exchange.live.abort()

    async def close(self) -> None:
        """Stop. Calls in progress are interrupted; those of pull mode wait for the next process."""
        self.closing = True
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.upstreams.close()
        for run in self.runs.values():
            if run.state == "active":
                with contextlib.suppress(OSError):
                    run.save()
            run.release()
        await self._syncer.close()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _sweep(self) -> None:
        """Delete runs whose retention is over."""
        while True:
            now = time.time()
            for run in list(self.runs.values()):
                if run.state == "ended" and now - (run.ended_at or now) > self.limits.retain:
                    self._remove(run)
            await asyncio.sleep(_SWEEP_EVERY)

    # ---- secrets ----

    def secret(self, run_id: str) -> str:
        """The secret of a run."""
        mac = hmac.digest(self._master, run_id.encode(), "sha256")
        return f"sk-rock-{run_id}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

    def authenticated(self, secret: str) -> Run | None:
        """The run with that secret, also an ended one; None for any other text."""
        match = _SECRET.fullmatch(secret)
        if match is None or not hmac.compare_digest(self.secret(match[1]), secret):
            return None
        return self.runs.get(match[1])

    # ---- runs ----

    async def create(self, caller: Caller, spec: RunSpec, key: str | None, address: str) -> RunInfo:
        """Create a run, or return the one of the same idempotency key. address: by which the caller reaches this
        server. The caller's right to the sandbox was checked. NotFound, QuotaExceeded, StorageFull, and the errors of
        the port."""
        owner = caller.owner
        if key:
            known = self._created.get((owner, key))
            if known is not None and known in self.runs:
                return self._with_secret(self.runs[known])
            pending = self._creating.get((owner, key))
            if pending is not None:
                return self._with_secret(await asyncio.shield(pending))
        task: asyncio.Future[Run] = self._spawn(self._create(caller, spec, key or "", address))
        if key:
            self._creating[owner, key] = task
            task.add_done_callback(lambda _: self._creating.pop((owner, key), None))
        return self._with_secret(await asyncio.shield(task))

    async def _create(self, caller: Caller, spec: RunSpec, key: str, address: str) -> Run:
        owner = caller.owner
        self._check_quota(owner)
        if spec.upstream is not None:
            self.upstreams.find(owner, spec.upstream)
        recorded = await asyncio.to_thread(self._recording_of, caller, spec)
        base_url = f"{address}/gateway"
        if spec.sandbox is not None:
            port = await self._open_port(spec.sandbox, spec.port)
            base_url = f"http://127.0.0.1:{port}"
        run_id = f"run-{secrets.token_hex(8)}"
        try:
            run = Run.create(self._folder / "runs" / run_id, run_id, owner, spec, base_url, key)
        except OSError as error:
            await self._close_unused_port(spec.sandbox)
            kind = StorageFull if error.errno in atomic_file.FULL else Unavailable
            raise kind(f"the run could not be recorded: {os.strerror(error.errno or 0)}",
                       hint="check the disk of the server") from None
        run.changed_file = self._syncer.changed
        self._syncer.changed(run.folder / CALLS_FILE, run.folder / RUN_FILE, run.folder, run.folder.parent)
        self.runs[run_id] = run
        if key:
            self._created[owner, key] = run_id
        if recorded is not None:
            self._recorded[run_id] = recorded
        self._watch_budget(run)
        self._count_runs()
        return run

    def _check_quota(self, owner: str) -> None:
        mine = [run for run in self.runs.values() if run.tenant == owner]
        if len(mine) < self.limits.runs:
            return
        ended = [run for run in mine if run.state == "ended"]
        if not ended:
            raise QuotaExceeded(f"there are {len(mine)} active runs, which is the limit of this server",
                                hint="end some: rock runs end ID", details={"retry_after": 10})
        self._remove(min(ended, key=lambda run: run.ended_at or 0))

    def _recording_of(self, caller: Caller, spec: RunSpec) -> Recorded | None:
        replay = spec.replay
        if replay is None:
            return None
        if replay.run is not None:
            return Recorded.of_run(self.find(caller, replay.run), replay.by)
        return Recorded.of_records(replay)

    def recorded(self, run: Run) -> Recorded:
        """The recording that an active replay run uses."""
        found = self._recorded.get(run.id)
        if found is None:
            spec = run.spec.replay
            assert spec is not None
            if spec.run is not None:
                source = self.runs.get(spec.run)
                if source is None:
                    raise NotFound(f"the recorded run {spec.run} was deleted", hint="create the run again")
                found = Recorded.of_run(source, spec.by)
            else:
                found = Recorded.of_records(spec, run.folder)
            self._recorded[run.id] = found
        return found

    def _with_secret(self, run: Run) -> RunInfo:
        secret = self.secret(run.id)
        return run.info.model_copy(update={"api_key": secret, "environ": environ_of(run, secret)})

    def find(self, caller: Caller, run_id: str) -> Run:
        """A run of the caller's tenant. NotFound."""
        run = self.runs.get(run_id) if re.fullmatch(RUN_PATTERN, run_id) else None
        if run is None or (caller.tenant is not None and run.tenant != caller.tenant):
            raise NotFound(f"there is no run {run_id[:100]!r}", hint="rock runs ls")
        if run.state == "ended":
            self._read.pop(run.id, None)
            self._read[run.id] = None
            while len(self._read) > _OPEN_ENDED:
                oldest = next(iter(self._read))
                del self._read[oldest]
                if (other := self.runs.get(oldest)) is not None and other.state == "ended":
                    other.release()
        return run

    def list(self, caller: Caller, *, limit: int, after: str | None, **filters: Any) -> RunList:
        """Runs, newest first. filters: state, sandbox, upstream, name, tags. after: the last id of the page before."""
        tags: dict[str, str] = filters.get("tags") or {}
        mine = [run for run in self.runs.values() if caller.tenant is None or run.tenant == caller.tenant]
        mine.sort(key=lambda run: (run.created_at, run.id), reverse=True)
        if after is not None:
            place = next((i for i, run in enumerate(mine) if run.id == after), None)
            if place is None:
                raise InvalidConfig(f"after={after[:100]!r} is the id of no run", hint="use `after` of the page before")
            mine = mine[place + 1 :]
        found = [
            run for run in mine
            if filters.get("state") in (None, run.state) and filters.get("sandbox") in (None, run.spec.sandbox)
            and filters.get("upstream") in (None, run.spec.upstream)
            and filters.get("name") in (None, run.spec.name)
            and all(run.tags.get(name) == value for name, value in tags.items())
        ]  # fmt: skip
        more = len(found) > limit
        return RunList(items=[run.info for run in found[:limit]], after=found[limit - 1].id if more else None)

    def update(self, run: Run, spec: UpdateRun) -> RunInfo:
        run.update(spec)
        return run.info

    async def end(self, run: Run, spec: EndRun) -> RunInfo:
        """Freeze a run: cancel its calls, and close its port if no other run uses it. The recording is on the disk on
        return. Conflict, StorageFull."""
        while (freezing := self._freezing.get(run.id)) is not None:
            await asyncio.wait({freezing})
        if run.freeze(spec):
            task = self._freezing[run.id] = self._spawn(self._freeze(run))
            task.add_done_callback(lambda _: self._freezing.pop(run.id, None))
            await asyncio.shield(task)
        return run.info

    async def _freeze(self, run: Run) -> None:
        """Record the end of a frozen run. StorageFull: it is active again."""
        text, path = run.text(), run.folder / RUN_FILE
        try:
            await self._syncer.do(lambda: atomic_file.replace(path, text, durable=True))
        except OSError as error:
            run.thaw()
            raise _not_ended(error) from None
        run.cancel_calls()
        await self._ended(run)
        text = run.text()  # with the calls that were cancelled

        def rest() -> None:
            sync(run.folder / CALLS_FILE)
            atomic_file.replace(path, text, durable=True)

        try:
            await self._syncer.do(rest)
        except OSError as error:
            run.incomplete = True
            raise _not_ended(error) from None

    def _not_synced(self, path: Path) -> None:
        """The disk may not have the records of a run."""
        run = self.runs.get(path.parent.name)
        if run is not None:
            run.incomplete = True

    async def _ended(self, run: Run) -> None:
        tasks = []
        for call in run.calls:
            exchange = self._exchanges.pop((run.id, call.number), None)
            if exchange is not None:
                exchange.fail("ended", "the run was ended")
                if call.task is not None:
                    call.task.cancel()
                    tasks.append(call.task)
        await asyncio.gather(*tasks, return_exceptions=True)
        timer = self._timers.pop(run.id, None)
        if timer is not None:
            timer.cancel()
        self._recorded.pop(run.id, None)
        if run.spec.upstream is not None:
            with contextlib.suppress(NotFound):
                self.upstreams.find(run.tenant, run.spec.upstream).forget(run.id)
        run.release()
        self._count_runs()
        if run.spec.sandbox is not None:
            self._spawn(self._close_unused_port(run.spec.sandbox, _PORT_SECONDS))

    async def _close_unused_port(self, sandbox: str | None, after: float = 0.0) -> None:
        """Close the port of a sandbox without an active run. after: seconds in which the agent of an ended run still
        gets an error in its dialect, so that it ends instead of trying to connect."""
        if sandbox is None:
            return
        await asyncio.sleep(after)
        if not any(run.state == "active" and run.spec.sandbox == sandbox for run in self.runs.values()):
            with contextlib.suppress(RockError):  # the sandbox may have ended
                await self._close_port(sandbox)

    async def reopen_port(self, sandbox: str) -> None:
        """Open the port of a sandbox that runs again, with the number that its active runs have. Raises nothing."""
        runs = (run for run in self.runs.values() if run.state == "active" and run.spec.sandbox == sandbox)
        run = max(runs, key=lambda run: run.created_at, default=None)
        if run is None:
            return
        try:
            async with asyncio.timeout(_REOPEN_WITHIN):
                await self._open_port(sandbox, int(run.base_url.rpartition(":")[2]))
        except (RockError, TimeoutError) as error:
            log.warning("the gateway port of sandbox %s is not open: %s", sandbox, error)

    async def _reopen_ports(self) -> None:
        """Open the ports of all active runs: this process may have ended between a restart and its port."""
        slots = asyncio.Semaphore(_REOPEN_AT_ONCE)

        async def reopen(sandbox: str) -> None:
            async with slots:
                await self.reopen_port(sandbox)

        found = {run.spec.sandbox for run in self.runs.values() if run.state == "active"}
        await asyncio.gather(*(reopen(sandbox) for sandbox in found if sandbox is not None))

    async def delete(self, run: Run, force: bool) -> RunInfo:
        """Delete a run and its calls. Conflict for an active one without `force`."""
        if run.state == "active":
            if not force:
                raise Conflict(f"run {run.id} is active", hint="end it first, or use force=1")
            await self.end(run, EndRun(reason="deleted"))
        info = run.info
        self._remove(run)
        return info

    def _remove(self, run: Run) -> None:
        try:
            run.delete()
        except OSError as error:
            log.warning("run %s is not deleted: %s", run.id, error)
            return
        self.runs.pop(run.id, None)
        self._read.pop(run.id, None)
        self._created.pop((run.tenant, run.idempotency), None)
        self._count_runs()

    def _count_runs(self) -> None:
        active = sum(1 for run in self.runs.values() if run.state == "active")
        RUNS.of("active").set(active)
        RUNS.of("ended").set(len(self.runs) - active)

    def _watch_budget(self, run: Run) -> None:
        """Cancel the calls of a run when its seconds are over."""
        seconds = run.spec.budget.seconds
        if seconds is None:
            return

        def over() -> None:
            for call in run.calls:
                exchange = self._exchanges.get((run.id, call.number))
                if exchange is not None:
                    exchange.fail("budget", f"the budget of the run is used up: {seconds:g} seconds", cancelled=True)
                    if call.task is not None:
                        call.task.cancel()

        loop = asyncio.get_running_loop()
        self._timers[run.id] = loop.call_later(max(0.0, seconds - run.age), over)

    # ---- turns ----

    def start(self, run: Run, call: Call, exchange: Exchange, original: bytes, headers: Headers) -> None:
        """Begin to produce the response of a recorded call."""
        if run.spec.pull:
            self._begin(run, call, exchange, wait_for_answer)
        elif run.spec.upstream is not None:
            name = run.spec.upstream

            async def ask(exchange: Exchange) -> None:
                try:
                    upstream = self.upstreams.find(run.tenant, name)
                except NotFound:
                    exchange.fail("upstream", f"upstream {name} was deleted")
                    return
                await from_upstream(exchange, upstream, original, headers)

            self._begin(run, call, exchange, ask)
        else:

            async def replay(exchange: Exchange) -> None:
                await from_recording(exchange, self.recorded(run))

            self._begin(run, call, exchange, replay)

    def _begin(
        self, run: Run, call: Call, exchange: Exchange, produce: Callable[[Exchange], Coroutine[Any, Any, None]]
    ) -> None:
        place = (run.id, call.number)
        self._exchanges[place] = exchange

        async def work() -> None:
            try:
                await produce(exchange)
            except asyncio.CancelledError:
                if not self.closing and not exchange.live.complete:
                    exchange.fail("ended", "the call was cancelled", cancelled=True)
                elif not exchange.live.complete:
                    exchange.live.abort()  # interrupted by the stop of the server; the recording keeps it open
                raise
            except Exception as error:
                log.exception("run %s, call %d", run.id, call.number)
                message = error.message if isinstance(error, RockError) else "an internal error of the gateway"
                exchange.fail("upstream", message)
            finally:
                if not self.closing:
                    self._exchanges.pop(place, None)
                call.task = None
                if call.delivered:
                    call.live = None

        call.task = self._spawn(work())

    def exchange(self, run: Run, call: Call) -> Exchange | None:
        """The exchange of a call in progress."""
        return self._exchanges.get((run.id, call.number))

    def orphaned(self, run: Run, call: Call) -> None:
        """The last client of a call in progress has disconnected: it is cancelled, unless a retry joins it in time."""

        def give_up() -> None:
            exchange = self._exchanges.get((run.id, call.number))
            if exchange is None or exchange.live.followers or not call.pending:
                return
            exchange.fail("upstream", "the agent has disconnected", cancelled=True)
            if call.task is not None:
                call.task.cancel()

        asyncio.get_running_loop().call_later(self.limits.orphan, give_up)


def _not_ended(error: OSError) -> StorageFull:
    return StorageFull(f"the end of the run could not be recorded: {os.strerror(error.errno or 0)}",
                       hint="check the disk of the server, then try again")  # fmt: skip


def _secret_of(file: Path) -> bytes:
    """The gateway's own secret; created when it is missing."""
    try:
        found = file.read_bytes()
    except FileNotFoundError:
        atomic_file.replace(file, secrets.token_hex(32), durable=True)
        found = file.read_bytes()
    if len(found) < 32:
        raise ValueError(f"{file.name} is damaged")
    return found


def environ_of(run: Run, secret: str) -> dict[str, str]:
    """The variables by which common agents find the gateway. The model: of the run, where it has one."""
    base = run.base_url
    found = {
        "OPENAI_BASE_URL": f"{base}/v1", "OPENAI_API_BASE": f"{base}/v1", "OPENAI_API_KEY": secret,
        "ANTHROPIC_BASE_URL": base, "ANTHROPIC_API_KEY": secret,
        "GOOGLE_GEMINI_BASE_URL": base, "GEMINI_API_KEY": secret, "GOOGLE_API_KEY": secret,
        "ROCK_RUN_ID": run.id, "ROCK_RUN_URL": base, "ROCK_RUN_KEY": secret,
    }  # fmt: skip
    if run.spec.model is not None:
        found |= {"OPENAI_MODEL": run.spec.model, "ANTHROPIC_MODEL": run.spec.model, "GEMINI_MODEL": run.spec.model}
    return found


def may_use_private_addresses(caller: Caller) -> bool:
    """Whether the caller may define upstreams on private addresses."""
    return Access.ADMIN in caller.scopes
