"""Membership of a worker: a rocklet that joined has a lease for as long as its heartbeats get responses.

    join ──► epoch E, for `seconds`; each acknowledged heartbeat extends the lease: `seconds` from its send time
      │ no response for that time                                      │ the response that epoch E is over
      ▼                                                                ▼
    no new sandboxes; running ones continue; join again ──► E    running ones are ended; join again ──► E + 1
      │ policy "stop": no response for `stop` seconds ────────────────►┘

All times are measured by this machine's clock since boot, which continues while a machine is suspended. A server
declares this worker lost later than that. Commands with an outdated fencing token are rejected.
docs/decisions/0019-workers.md
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from rock import __version__
from rock.errors import ClientError, Conflict, InvalidConfig, NotFound, RockError, Unavailable, from_wire
from rock.host import atomic_file
from rock.http.asgi import App, Receive, Scope, Send, failure
from rock.http.forwarding import RemoteApp
from rock.http.tunnels import Tunnel
from rock.protocol.node import PROCESS, Beat, JoinWorker, NodeStatus, WorkerLease
from rock.protocol.routes import EPOCH, FENCE, OUTAGE, REFUSED, ROUTES
from rock.rocklet.node import Node

log = logging.getLogger("rock.worker")

_RETRY = 1.0  # seconds between attempts to join
_ANSWER = 3.0  # seconds until one server has to respond
_IMAGES_EVERY = 10.0
_MOST_IMAGES = 200
_AGAIN = 2.0  # seconds after which a failed end is repeated
_HEADER = EPOCH.encode()
IDENTITY = "worker.json"  # the file with the identity of a worker
SERVER_DOWN = "check the URLs of --join and the network; the worker tries again by itself"  # hint of errors


def _now() -> float:
    """Seconds since boot, including time in suspension."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


@dataclass(frozen=True)
class Joining:
    """Settings for joining. servers: any of them may respond. keep: sandboxes continue without a lease, until a
    response reports that this worker was declared lost; otherwise they end before it is. tunnel: host and port of this
    rocklet on this machine, when it opens tunnels to the servers. key: of the tunnels."""

    servers: list[RemoteApp]
    name: str
    url: str
    keep: bool = True
    tunnel: tuple[str, int] | None = None
    key: str | None = field(default=None, repr=False)


class Membership:
    """The lease of this rocklet. file: stores its identity and its last epoch."""

    def __init__(self, node: Node, joining: Joining, file: Path) -> None:
        self._node = node
        self._joining = joining
        own = joining.url.startswith(PROCESS)  # a process of the server's own machine
        self._host = "127.0.0.1" if own else urlsplit(joining.url).hostname or ""
        self._servers = list(joining.servers)
        self._file = file
        self._holder, self._epoch = _read(file)
        self._fresh = False
        self._lease: WorkerLease | None = None
        self._until = float("-inf")  # the end of the lease
        self._stop_at = float("inf")  # when the policy "stop" ends the running sandboxes
        self.direct_port = 0  # for direct requests, at another port than commands
        self._leaving = False
        self._evacuate = False
        self._again = asyncio.Event()  # a later epoch is known: send a heartbeat at once
        self._images: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._tunnel: Tunnel | None = None
        if joining.tunnel is not None:
            self._tunnel = Tunnel([server.url for server in joining.servers], joining.key, joining.name,
                                  self._holder, *joining.tunnel)  # fmt: skip

    @property
    def holds(self) -> bool:
        """Whether the lease is valid now."""
        return self._lease is not None and _now() < self._until

    def lease(self) -> tuple[str, int] | None:
        """The name and the epoch of this worker, while its lease is valid."""
        return (self._joining.name, self._epoch) if self.holds else None

    async def open(self) -> None:
        """Join, or retry in the background. Raises errors that require a change of this rocklet's settings."""
        if self._tunnel is not None:
            self._tunnel.open()
        try:
            await self._join()
        except (Conflict, Unavailable) as error:
            log.warning("not joined yet: %s; trying again", error)
        self._tasks = [asyncio.create_task(self._run(), name="membership"),
                       asyncio.create_task(self._guard(), name="lease"),
                       asyncio.create_task(self._look_at_images(), name="images")]  # fmt: skip

    def leave(self) -> None:
        """Accept no further sandboxes, and report that at once: this machine will end. Those that it has continue."""
        log.warning("draining: no new sandboxes; %d continue", len(self._node.supervisors))
        self._leaving = True
        self._node.limit = 0
        self._again.set()

    def evacuate(self) -> None:
        """The same, and the server archives the sandboxes that can be archived."""
        self.leave()
        self._evacuate = True

    async def close(self) -> None:
        """Stop the heartbeats. Sandboxes stay unchanged, for the next rocklet of this machine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tunnel is not None:
            await self._tunnel.close()
        for server in self._servers:
            await server.close()

    # ---- lease ----

    async def _run(self) -> None:
        while True:
            lease = self._lease
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY if lease is None else lease.beat):
                    await self._again.wait()
            self._again.clear()
            try:
                await (self._join() if self._lease is None else self._beat())
            except RockError as error:
                log.warning("heartbeat: %s", error)
            except Exception:
                log.exception("heartbeat")

    async def _guard(self) -> None:
        """End the lease in time, independent of a waiting heartbeat, and with the policy "stop" end the running
        sandboxes."""
        while True:
            due = min(self._stop_at, self._until if self._lease is not None else float("inf"))
            await asyncio.sleep(min(max(due - _now(), 0.02), 0.5))
            if self._lease is not None and not self.holds:
                log.warning("no server answered for %g s: no new sandboxes until one does", self._lease.seconds)
                self._lease = None
            if _now() >= self._stop_at:
                self._give_up("no server answered this worker for too long (ROCK_LEASE_LOST=stop)")

    def _give_up(self, why: str) -> None:
        """End the running sandboxes: this epoch is over, or will be."""
        log.warning("%s", why)
        self._lease, self._stop_at = None, float("inf")
        self._fresh = True
        self._node.lose(why)

    def _leased(self, lease: WorkerLease, asked: float) -> None:
        """A server responded to the request that was sent at `asked`."""
        self._lease, self._until = lease, max(self._until, asked + lease.seconds)
        if not self._joining.keep:
            self._stop_at = asked + max(lease.stop, lease.seconds)

    async def _join(self) -> None:
        await self._stopped()
        spec = JoinWorker(name=self._joining.name, url=self._joining.url, holder=self._holder, epoch=self._epoch,
                          fresh=self._fresh, version=__version__, status=await self._status())  # fmt: skip
        asked = _now()
        row = ROUTES["join_worker"]
        lease = await self._ask(row.method, row.path, spec.model_dump_json().encode())
        if self._epoch not in (0, lease.epoch) and not self._fresh and self._node.has_sandboxes:
            log.warning("this worker was taken for lost in epoch %d", self._epoch)
            self._node.lose("its worker was taken for lost")
            self._fresh = True
            await self._stopped()
        self._epoch, self._fresh = lease.epoch, False
        atomic_file.replace(self._file, json.dumps({"holder": self._holder, "epoch": self._epoch}))
        self._until = float("-inf")
        self._leased(lease, asked)
        log.info("joined as worker %s, epoch %d, lease of %g s", lease.name, lease.epoch, lease.seconds)
        await self._beat()  # this heartbeat shows the server that this worker knows its epoch

    async def _beat(self) -> None:
        beat = Beat(holder=self._holder, epoch=self._epoch, status=await self._status())
        asked, row = _now(), ROUTES["beat_worker"]
        try:
            lease = await self._ask(row.method, row.url(worker=self._joining.name), beat.model_dump_json().encode())
        except (Conflict, NotFound) as error:
            if self._lease is not None:
                self._give_up(f"this worker's epoch is over: {error.message}")
            return
        if not self._fresh:
            self._leased(lease, asked)

    async def _stopped(self) -> None:
        """Wait until all abandoned sandboxes are removed."""
        while self._fresh and self._node.has_sandboxes:
            if await self._node.emptied(_AGAIN):
                return
            for sandbox_id in list(self._node.supervisors):
                try:
                    await self._node.destroy(sandbox_id)
                except RockError as error:
                    log.error("sandbox %s does not end: %s; trying again", sandbox_id, error)

    async def _ask(self, method: str, path: str, body: bytes) -> WorkerLease:
        """The response of the first server that responds; the one that responded last is tried first."""
        last: RockError = Unavailable("no admin server is configured",
                                      hint="start the worker with --join URL of the admin server")
        # Each try has the same timeout, independent of the remaining lease, so the last try is as good as the first.
        each = _ANSWER if self._lease is None else min(_ANSWER, self._lease.seconds / (len(self._servers) + 1))
        for server in list(self._servers):
            try:
                async with asyncio.timeout(each):
                    status, reply = await server.request(method, path, "", body)
            except TimeoutError:
                last = Unavailable(f"the admin server {server.url} did not respond within {each:.1f} s",
                                   hint=SERVER_DOWN)
                continue
            except Unavailable as error:
                last = error
                continue
            told: Any = _decoded(reply)
            if status >= 400:
                refused = from_wire(told, status)
                if isinstance(refused, ClientError):
                    raise refused
                last = refused if isinstance(refused, Unavailable) else Unavailable(
                    f"the admin server {server.url} refused the request: {refused.message}", hint=SERVER_DOWN)
                continue
            self._servers.remove(server)
            self._servers.insert(0, server)
            return WorkerLease.model_validate(told)
        raise last

    async def _status(self) -> NodeStatus:
        status = await self._node.status()
        images = list(dict.fromkeys([*status.images, *self._images]))[:_MOST_IMAGES]
        return status.model_copy(update={"images": images, "host_ip": self._host, "evacuate": self._evacuate,
                                         "direct_port": self.direct_port})  # fmt: skip

    async def _look_at_images(self) -> None:
        """A task apart from the heartbeat, which waits for no thread."""
        while True:
            try:
                self._images = await asyncio.to_thread(self._names)
            except Exception:
                log.exception("which images are here")
            await asyncio.sleep(_IMAGES_EVERY)

    def _names(self) -> list[str]:
        return [name for name in self._node.images.store.names() if len(name) < 1000][:_MOST_IMAGES]

    # ---- node plane ----

    def over(self, app: App) -> App:
        """Wrap `app`: its node plane accepts only commands for this worker in this epoch, and creates no sandboxes
        without a lease."""

        async def held(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/node/"):
                try:
                    self._check(scope)
                except RockError as error:
                    await failure(error).send(send)
                    return
            await app(scope, receive, send)

        return held

    def _check(self, scope: Scope) -> None:
        for header, value in scope["headers"]:
            if header == _HEADER:
                told, own = value.decode("latin-1"), f"{self._joining.name}/{self._epoch}"
                if told != own:
                    self._again.set()
                    raise Unavailable(f"a command for worker {told[:80]}; this one is {own}", hint="retry",
                                      details={**OUTAGE, **REFUSED})  # fmt: skip
        makes = scope["method"] == "PUT" or scope["path"].endswith("/wake")
        if makes and self._leaving:
            raise Unavailable(f"worker {self._joining.name} is being drained", hint="retry",
                              details={**OUTAGE, **REFUSED})  # fmt: skip
        if makes and not self.holds:
            raise Unavailable(f"worker {self._joining.name} has no lease now", hint="retry",
                              details={**OUTAGE, **REFUSED})  # fmt: skip


def _read(file: Path) -> tuple[str, int]:
    """Read the identity of this machine, and its last epoch."""
    try:
        kept = json.loads(file.read_text())
        holder, epoch = str(kept["holder"]), int(kept["epoch"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        holder, epoch = "", 0
    if not 16 <= len(holder) <= 64:
        holder, epoch = secrets.token_urlsafe(24), 0
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_file.replace(file, json.dumps({"holder": holder, "epoch": epoch}))
    return holder, epoch


def _decoded(reply: bytes) -> Any:
    try:
        return orjson.loads(reply) if reply else {}
    except orjson.JSONDecodeError:
        return {}


def servers_of(
    text: str, key: str | None, make: Callable[[str, dict[str, str]], RemoteApp] = RemoteApp
) -> list[RemoteApp]:
    """The servers that `--join URL,URL` names. InvalidConfig."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    found = [make(url.strip(), headers) for url in text.split(",") if url.strip()]
    if not found:
        raise InvalidConfig("--join names no server", hint="--join http://HOST:8080")
    return found


# ---- fencing ----
#
# Each command of an admin has the token of its lease, and tokens only grow. Commands of a former leader are rejected.

fence_log = logging.getLogger("rock.node")

_FENCE_HEADER = FENCE.encode()


class FencingToken:
    """The highest token that was received, in a file, so that the next rocklet process knows it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._highest: int | None = None

    def check(self, text: str) -> None:
        """Conflict for a token below the highest one; InvalidConfig for an invalid one."""
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidConfig(f"invalid fencing token {text[:20]!r}",
                                hint="commands come from an admin server only; use its API")
        token, highest = int(text), self._read()
        if token < highest:
            fence_log.warning("refused a command by lease %d: %d was seen", token, highest)
            raise Conflict(f"the lease {token} of the command has ended: lease {highest} was seen",
                           details={"fence": highest}, hint="another admin server leads now; send the request to it")
        if token > highest:
            atomic_file.replace(self._path, str(token))
            self._highest = token

    def _read(self) -> int:
        if self._highest is None:
            try:
                self._highest = int(self._path.read_text())
            except (FileNotFoundError, ValueError):
                self._highest = 0
        return self._highest

    def over(self, app: App) -> App:
        """Wrap `app`: its node plane rejects commands with an outdated token."""

        async def fenced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/node/"):
                try:
                    for name, value in scope["headers"]:
                        if name == _FENCE_HEADER:
                            self.check(value.decode("latin-1"))
                except ClientError as error:
                    await failure(error).send(send)
                    return
            await app(scope, receive, send)

        return fenced
