"""A run: its state, the index of its calls, and their recording.

    folder/runs/ID/run.json   specification, reward, counts; replaced atomically when the state changes
    folder/runs/ID/calls      the log of recording.py: "begin" and "end" of each call, "delivered", "retry", "update"

Memory holds an index; bodies are read from the log. An ended run releases the index until it is read.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from asyncio import Event, Semaphore, Task
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rock.errors import Conflict, NotFound
from rock.gateway import budget
from rock.gateway.call import ModelRequest, ModelResponse, RecordedCall
from rock.gateway.dialects import DIALECTS
from rock.gateway.live import Live
from rock.gateway.recording import CallLog, Deltas
from rock.gateway.tree import Prefixes
from rock.host import atomic_file
from rock.protocol.runs import (
    CallInfo,
    CallState,
    CallUsage,
    Counts,
    DialectName,
    EndRun,
    Price,
    RunInfo,
    RunSpec,
    RunState,
    Source,
    UpdateRun,
)

log = logging.getLogger("rock.gateway")

_LARGE_AT_ONCE = 2
_CHUNK = 256  # token ids that a delta compares at once
RUN_FILE, CALLS_FILE, REPLAY_FILE = "run.json", "calls", "replay.json"


@dataclass(slots=True)
class Call:
    """The index entry of one call. begin_at, end_at: offsets of its records. hash: of the request's body."""

    number: int
    dialect: str
    model: str
    stream: bool
    hash: str
    started: float
    begin_at: int = 0
    end_at: int = 0
    parent: int | None = None
    state: CallState = "running"
    idempotency: str = ""
    upstream_model: str | None = None
    first_byte: float | None = None
    ended: float | None = None
    finish_reason: str | None = None
    usage: CallUsage = field(default_factory=CallUsage)
    cost: float = 0.0
    error: str | None = None
    error_kind: str | None = None
    attempts: int = 1
    retries: int = 0
    retry_of: int | None = None
    weight_version: str | None = None
    delivered: bool = False
    live: Live | None = None
    task: Task[None] | None = None

    @property
    def pending(self) -> bool:
        return self.state in ("running", "waiting")


class Run:
    """One run. base_url: for its agent. `load` reads the state of an earlier server process."""

    def __init__(self, folder: Path, id: str, tenant: str, spec: RunSpec, base_url: str, created_at: float) -> None:
        self.folder = folder
        self.id = id
        self.tenant = tenant
        self.spec = spec
        self.base_url = base_url
        self.created_at = created_at
        self.state: RunState = "active"
        self.counts = Counts()
        self.tags = dict(spec.tags)
        self.weight_version = spec.weight_version
        self.reward: float | None = None
        self.rewards: dict[str, float] = {}
        self.reward_valid: bool | None = None
        self.reason: str | None = None
        self.ended_at: float | None = None
        self.last_call_at: float | None = None
        self.incomplete = False
        self.idempotency = ""
        self.closing = False  # the server stops: long polls return
        self.large = Semaphore(_LARGE_AT_ONCE)  # for the bodies of large requests
        self.calls: list[Call] = []
        self.changed_file: Callable[[Path], None] = lambda path: None  # called after each record
        self.changed = Event()  # set and replaced whenever a call or the state changes
        self._log: CallLog | None = None
        self._prefixes = Prefixes()
        self._requests = Deltas(lambda number: self._begin(number)["rq"])
        self._tokens = Deltas(lambda number: self._end(number).get("ti", {"set": {}}))

    # ---- persistence ----

    @classmethod
    def create(cls, folder: Path, id: str, tenant: str, spec: RunSpec, base_url: str, idempotency: str) -> Run:
        """A new run, on disk. OSError."""
        folder.mkdir(mode=0o700)
        try:
            if spec.replay is not None and spec.replay.records is not None:
                atomic_file.replace(folder / REPLAY_FILE, json.dumps(spec.replay.records))
                spec = spec.model_copy(update={"replay": spec.replay.model_copy(update={"records": []})})
            run = cls(folder, id, tenant, spec, base_url, time.time())
            run.idempotency = idempotency
            run._log, _, _ = CallLog.open(folder / CALLS_FILE)
            run.save()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return run

    def save(self) -> None:
        """Write run.json. OSError."""
        atomic_file.replace(self.folder / RUN_FILE, self.text())

    def text(self) -> str:
        """The content of run.json."""
        state = {
            "id": self.id, "tenant": self.tenant, "spec": self.spec.model_dump(mode="json"), "base_url": self.base_url,
            "created_at": self.created_at, "state": self.state, "counts": self.counts.model_dump(), "tags": self.tags,
            "weight_version": self.weight_version, "reward": self.reward, "rewards": self.rewards,
            "reward_valid": self.reward_valid, "reason": self.reason, "ended_at": self.ended_at,
            "last_call_at": self.last_call_at, "incomplete": self.incomplete, "idempotency": self.idempotency,
        }  # fmt: skip
        return atomic_file.summed(json.dumps(state))

    @classmethod
    def load(cls, folder: Path) -> Run:
        """A run of an earlier server process. OSError; atomic_file.Damaged; other errors for a newer version's file."""
        row = atomic_file.parsed((folder / RUN_FILE).read_bytes())
        spec = dict(row["spec"])
        run = cls(folder, row["id"], row["tenant"], RunSpec.model_validate(spec), row["base_url"], row["created_at"])
        run.state, run.counts, run.tags = row["state"], Counts.model_validate(row["counts"]), row["tags"]
        run.weight_version, run.reward, run.rewards = row["weight_version"], row["reward"], row["rewards"]
        run.reward_valid, run.reason, run.ended_at = row["reward_valid"], row["reason"], row["ended_at"]
        run.last_call_at, run.incomplete, run.idempotency = row["last_call_at"], row["incomplete"], row["idempotency"]
        if run.state == "active":
            run.open()
            run._interrupt()
        return run

    def open(self) -> None:
        """Read the index of the calls. OSError."""
        if self._log is not None:
            return
        self._log, records, torn = CallLog.open(self.folder / CALLS_FILE)
        self.incomplete |= torn and self.state == "active"
        self.calls = []
        counts = Counts(retried=0, refused=self.counts.refused)
        for offset, record in records:
            self._replay(offset, record, counts)
        for call in self.calls:
            setattr(counts, call.state, getattr(counts, call.state) + 1)
        counts.calls = len(self.calls)
        if self.state == "ended":  # the server ended between the state and the calls
            for call in self.calls:
                if call.pending:
                    call.state, call.error, call.error_kind = "cancelled", "the run was ended during this call", "ended"
        if self.state == "active":
            self.counts = counts
            cache: dict[int, dict[str, Any]] = {}
            for call in self.calls:
                body = self._requests.unpack(call.number, cache)
                self._requests.note(call.number, body)
                self._prefixes.add(call.number, request_of(call, body))
                answer = self.response(call)
                if answer is not None:
                    self._prefixes.answered(call.number, DIALECTS[call.dialect].parse_response(answer))

    def _replay(self, offset: int, record: dict[str, Any], counts: Counts) -> None:
        kind = record["k"]
        if kind == "begin":
            self.calls.append(Call(
                record["n"], record["d"], record["m"], record["s"], record["h"], record["t"], offset,
                parent=record.get("p"), idempotency=record.get("i", ""), upstream_model=record.get("um"),
                retry_of=record.get("ro"), weight_version=record.get("w"), state=record["st"],
            ))  # fmt: skip
            self.last_call_at = record["t"]
        elif kind == "end":
            call = self.calls[record["n"] - 1]
            call.end_at, call.state, call.ended = offset, record["st"], record["t"]
            call.first_byte, call.finish_reason = record.get("fb"), record.get("fr")
            call.usage, call.cost = CallUsage.model_validate(record.get("u", {})), record.get("c", 0.0)
            call.error, call.error_kind = record.get("e"), record.get("ek")
            call.attempts, call.weight_version = record.get("a", 1), record.get("w", call.weight_version)
            _add_usage(counts, call)
        elif kind == "retry":
            self.calls[record["n"] - 1].retries += 1
            counts.retried += 1
        elif kind == "delivered":
            self.calls[record["n"] - 1].delivered = True
        elif kind == "update":
            self.tags, self.weight_version = record["tags"], record["w"]

    def _interrupt(self) -> None:
        """End the calls that a crash of the server interrupted. Those of pull mode still wait for their answer."""
        for call in self.calls:
            if call.state == "running":
                self.fail(call, "upstream", "the server restarted during this call", state="failed")
                self.incomplete = True

    def release(self) -> None:
        """Close the log, and release the memory of an ended run."""
        if self._log is not None:
            self._log.close()
            self._log = None
        self._requests.forget()
        self._tokens.forget()
        self._prefixes = Prefixes()
        if self.state == "ended":
            self.calls = []

    def delete(self) -> None:
        """Remove its files. The run is gone once its folder has another name."""
        self.release()
        gone = self.folder.with_name(f".gone-{self.folder.name}")
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @property
    def _file(self) -> CallLog:
        if self._log is None:
            self.open()
        assert self._log is not None
        return self._log

    def _append(self, record: dict[str, Any]) -> int:
        offset = self._file.append(record)
        self.changed_file(self.folder / CALLS_FILE)
        return offset

    def _begin(self, number: int) -> dict[str, Any]:
        return self._file.read(self.call(number).begin_at)

    def _end(self, number: int) -> dict[str, Any]:
        call = self.call(number)
        return self._file.read(call.end_at) if call.end_at else {}

    # ---- state ----

    def notify(self) -> None:
        """Wake all tasks that wait for a change."""
        changed, self.changed = self.changed, Event()
        changed.set()

    @property
    def source(self) -> Source:
        return "pull" if self.spec.pull else "replay" if self.spec.replay is not None else "upstream"

    @property
    def age(self) -> float:
        return max(0.0, time.time() - self.created_at)

    @property
    def info(self) -> RunInfo:
        return RunInfo(
            id=self.id, state=self.state, source=self.source, sandbox=self.spec.sandbox, base_url=self.base_url,
            upstream=self.spec.upstream, model=self.spec.model, counts=self.counts.model_copy(),
            budget=self.spec.budget, left=budget.left(self.spec.budget, self.counts, self.age), reward=self.reward,
            rewards=self.rewards, reward_valid=self.reward_valid, reason=self.reason, incomplete=self.incomplete,
            tags=self.tags, name=self.spec.name, tenant=self.tenant, weight_version=self.weight_version,
            created_at=self.created_at, ended_at=self.ended_at, last_call_at=self.last_call_at,
        )  # fmt: skip

    def update(self, spec: UpdateRun) -> None:
        """Change tags or the weight version. Conflict for an ended run; StorageFull, Unavailable."""
        if self.state == "ended":
            raise Conflict(f"run {self.id} has ended", hint="an ended run is not changed")
        tags = {**self.tags, **(spec.tags or {})}
        version = self.weight_version if spec.weight_version is None else spec.weight_version
        self._append({"k": "update", "tags": tags, "w": version})
        self.tags, self.weight_version = tags, version
        self.notify()

    def freeze(self, spec: EndRun) -> bool:
        """End the run in memory. False: it had this end before. Conflict: it had another one."""
        if self.state == "ended":
            same = (spec.reward, spec.rewards) == (self.reward, self.rewards) and spec.valid == (self.reward_valid
                                                                                                  is not False)
            if same or (spec.reward is None and not spec.rewards and spec.valid):
                return False
            raise Conflict(f"run {self.id} has ended already, with another reward", hint="an ended run is frozen")
        self.reward, self.rewards, self.reason = spec.reward, dict(spec.rewards), spec.reason
        self.reward_valid = False if not spec.valid else True if spec.reward is not None or spec.rewards else None
        self.ended_at, self.state = time.time(), "ended"
        return True

    def thaw(self) -> None:
        """The end could not be recorded: the run is active, as before."""
        self.reward, self.rewards, self.reward_valid, self.reason = None, {}, None, None
        self.ended_at, self.state = None, "active"

    def cancel_calls(self) -> None:
        """Record the end of the calls that were pending when the run ended."""
        for call in self.calls:
            if call.pending:
                self.fail(call, "ended", "the run was ended during this call", state="cancelled")
        self.notify()

    # ---- calls ----

    def call(self, number: int) -> Call:
        """A call by its number. NotFound."""
        if self._log is None:
            self.open()
        if not 1 <= number <= len(self.calls):
            raise NotFound(f"run {self.id} has no call {number}", hint=f"it has {len(self.calls)} calls, from 1 on")
        return self.calls[number - 1]

    def begin(
        self, request: ModelRequest, body: dict[str, Any], hash: str, *, state: CallState, idempotency: str = "",
        upstream_model: str | None = None, retry_of: int | None = None,
    ) -> Call:  # fmt: skip
        """Record a new call. StorageFull, Unavailable: there is no call."""
        number = len(self.calls) + 1
        parent = self._prefixes.add(number, request)
        call = Call(number, request.dialect, request.model, request.stream, hash, time.time(), parent=parent,
                    state=state, idempotency=idempotency, upstream_model=upstream_model, retry_of=retry_of,
                    weight_version=self.weight_version)  # fmt: skip
        try:
            call.begin_at = self._append({
                "k": "begin", "n": number, "d": call.dialect, "m": call.model, "s": call.stream, "h": hash,
                "t": call.started, "p": parent, "i": idempotency, "um": upstream_model, "ro": retry_of,
                "w": call.weight_version, "st": state, "rq": self._requests.pack(number, body, parent),
            })  # fmt: skip
        except BaseException:
            self._requests.forget()  # a later body must not refer to one that is not on disk
            raise
        self.calls.append(call)
        self.last_call_at = call.started
        self.counts.calls += 1
        self._count(state, 1)
        self.notify()
        return call

    def finish(self, call: Call, response: ModelResponse, body: dict[str, Any], price: Price | None) -> None:
        """Record the response of a call, in the agent's dialect. StorageFull, Unavailable: the call still runs."""
        usage = response.usage
        call.usage = CallUsage(prompt=usage.prompt or 0, completion=usage.completion or 0, cached=usage.cached or 0,
                               reasoning=usage.reasoning or 0)  # fmt: skip
        call.cost = budget.cost(price, call.usage)
        call.finish_reason = response.finish_reason
        call.weight_version = response.weight_version or call.weight_version
        tokens = {
            "prompt": _chunked(response.prompt_token_ids), "ids": _chunked(response.token_ids),
            "logprobs": list(response.logprobs) if response.logprobs is not None else None,
        }  # fmt: skip
        more = {"rs": body, "ti": self._tokens.pack(call.number, {k: v for k, v in tokens.items() if v is not None})}
        self._ended(call, "done", more)
        self._prefixes.answered(call.number, response)
        if call.retry_of is not None:
            self._complete_again()

    def fail(self, call: Call, kind: str, message: str, *, state: CallState = "failed") -> None:
        """Record that a call has no response."""
        call.error, call.error_kind = message[:2000], kind
        try:
            self._ended(call, state, {"e": call.error, "ek": kind})
        except Exception as error:
            log.error("run %s: the end of call %d is not recorded: %s", self.id, call.number, error)
            self.incomplete = True
            self._count(call.state, -1)
            call.state, call.ended = state, time.time()
            self._count(state, 1)
            self.notify()

    def _ended(self, call: Call, state: CallState, more: dict[str, Any]) -> None:
        ended = time.time()
        record = {
            "k": "end", "n": call.number, "st": state, "t": ended, "fb": call.first_byte, "fr": call.finish_reason,
            "u": call.usage.model_dump(), "c": call.cost, "a": call.attempts, "w": call.weight_version, **more,
        }  # fmt: skip
        try:
            call.end_at = self._append(record)
        except BaseException:
            self._tokens.forget()
            raise
        self._count(call.state, -1)
        call.state, call.ended = state, ended
        self._count(state, 1)
        _add_usage(self.counts, call)
        self.notify()

    def _complete_again(self) -> None:
        """The run is complete when each interrupted call was repeated."""
        repeated = {call.retry_of for call in self.calls if call.state == "done" and call.retry_of is not None}
        interrupted = {call.number for call in self.calls if call.state == "failed" and call.error_kind == "upstream"}
        self.incomplete = self.incomplete and not interrupted <= repeated

    def _count(self, state: CallState, amount: int) -> None:
        setattr(self.counts, state, getattr(self.counts, state) + amount)

    def retried(self, call: Call) -> None:
        """A request joined the call."""
        call.retries += 1
        self.counts.retried += 1
        self._append({"k": "retry", "n": call.number})

    def delivered(self, call: Call) -> None:
        """A client received the complete response."""
        if not call.delivered and self._log is not None:
            call.delivered = True
            self._append({"k": "delivered", "n": call.number})

    # ---- reading ----

    def describe(self, call: Call, bodies: bool = False, cache: dict[int, dict[str, Any]] | None = None) -> CallInfo:
        """The call on the wire. bodies: with request, response and tokens. Unavailable."""
        info = CallInfo.made(
            number=call.number, parent=call.parent, dialect=cast(DialectName, call.dialect), state=call.state,
            stream=call.stream, model=call.model, upstream_model=call.upstream_model, finish_reason=call.finish_reason,
            usage=call.usage, cost=call.cost, started=call.started, first_byte=call.first_byte, ended=call.ended,
            weight_version=call.weight_version, error=call.error, error_kind=call.error_kind, attempts=call.attempts,
            retries=call.retries, retry_of=call.retry_of, request=None, response=None, prompt_token_ids=None,
            token_ids=None, logprobs=None,
        )  # fmt: skip
        if bodies:
            values = info.__dict__
            values["request"] = self._requests.unpack(call.number, cache)
            values["response"] = self.response(call)
            tokens = self.tokens(call)
            values["prompt_token_ids"], values["token_ids"] = tokens.get("prompt"), tokens.get("ids")
            values["logprobs"] = tokens.get("logprobs")
        return info

    def request(self, call: Call, cache: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
        """The body of the request, in the agent's dialect."""
        return self._requests.unpack(call.number, cache)

    def response(self, call: Call) -> dict[str, Any] | None:
        """The body of the response, in the agent's dialect."""
        return self._end(call.number).get("rs")

    def tokens(self, call: Call) -> dict[str, Any]:
        """prompt, ids and logprobs, where they are known."""
        if call.state != "done":
            return {}
        packed = self._tokens.unpack(call.number)
        found: dict[str, Any] = {
            name: [number for chunk in packed[name] for number in chunk] for name in ("prompt", "ids") if name in packed
        }
        if "logprobs" in packed:
            found["logprobs"] = packed["logprobs"]
        return found

    def recorded(self) -> Iterator[RecordedCall]:
        """The calls for exports, in order of arrival."""
        self.call(1) if self.counts.calls else None
        cache: dict[int, dict[str, Any]] = {}
        for call in self.calls:
            body = self._requests.unpack(call.number, cache)
            request = request_of(call, body)
            response = None
            raw = self.response(call)
            if raw is not None:
                response = restored(DIALECTS[call.dialect].parse_response(raw), self.tokens(call), call.weight_version)
            yield RecordedCall(
                number=call.number, parent=call.parent, request=request, response=response, started=call.started,
                first_byte=call.first_byte, ended=call.ended, weight_version=call.weight_version, status=call.state,
                error=call.error, retry_of=call.retry_of, tags=dict(self.tags),
            )  # fmt: skip


def restored(response: ModelResponse, tokens: dict[str, Any], weight_version: str | None) -> ModelResponse:
    """A parsed response with its recorded tokens."""
    return replace(response, prompt_token_ids=tokens.get("prompt"), token_ids=tokens.get("ids"),
                   logprobs=tokens.get("logprobs"), weight_version=weight_version)  # fmt: skip


def request_of(call: Call, body: dict[str, Any]) -> ModelRequest:
    found: ModelRequest = DIALECTS[call.dialect].parse_request(body, call.model, call.stream)
    return found


def _chunked(ids: Any) -> list[list[int]] | None:
    if ids is None:
        return None
    return [list(ids[at : at + _CHUNK]) for at in range(0, len(ids), _CHUNK)]


def _add_usage(counts: Counts, call: Call) -> None:
    counts.prompt_tokens += call.usage.prompt
    counts.cached_tokens += call.usage.cached
    counts.completion_tokens += call.usage.completion
    counts.cost += call.cost
