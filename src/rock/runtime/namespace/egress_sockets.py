"""Egress sockets of sandboxes: passes them from pid 1 to the egress proxy, and again after the proxy restarted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rock import errors
from rock.egress.log import read
from rock.host.child_process import PATIENCE, ChildLink
from rock.protocol.action import ConnectionList
from rock.runtime.init.link import InitLink

log = logging.getLogger(__name__)

FOLDER = "connections"
_KEPT = 25 * 3600.0  # retention in seconds of the log of an ended sandbox: longer than its record
_MOST_FILES = 5000
_TIDY_EVERY = 600.0
_AGAIN_AFTER = 0.2
_AT_ONCE = 64  # sandboxes that are passed to a new proxy concurrently


@dataclass(frozen=True)
class _Gateway:
    sandbox_id: str
    link: Callable[[], InitLink]
    egress: list[str] | None


class EgressSockets:
    """The egress sockets of one runtime. The key is the sandbox's slot; readers of the log use the sandbox id."""

    def __init__(self, run_dir: Path, resolvers: Sequence[str]) -> None:
        self._folder = run_dir / FOLDER
        self._known: dict[str, _Gateway] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._removing: dict[str, asyncio.Task[None]] = {}  # by sandbox id
        self._proxy = ProxyLink(resolvers, run_dir / "proxy.log", self._lost)
        self._tidied_at = float("-inf")
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self.missing: str | None = "not looked for yet"

    @property
    def networks(self) -> tuple[str, ...]:
        """The supported network modes."""
        return ("none", "host") if self.missing else ("none", "nat", "host")

    def found(self, reply: dict[str, Any]) -> None:
        """Record the result of the launcher's probe."""
        self.missing = f"{reply['error']}" if "error" in reply else None

    async def connect(self, slot: str, sandbox_id: str, link: Callable[[], InitLink], egress: list[str] | None, *,
                      fresh: bool) -> None:
        """Serve the connections of a sandbox. Lost, Unavailable. fresh: the sandbox has no history."""
        self._known[slot] = _Gateway(sandbox_id, link, egress)
        try:
            await self._give(slot, fresh)
        except BaseException:
            self.drop(slot)
            raise

    def adopt(self, slot: str, sandbox_id: str, link: Callable[[], InitLink], egress: list[str] | None) -> None:
        """Serve a sandbox of a former server in the background; its connections wait until then."""
        self._known[slot] = _Gateway(sandbox_id, link, egress)
        self._spawn(self._again([slot]))

    async def _give(self, slot: str, fresh: bool) -> None:
        gateway = self._known[slot]
        _, fds = await gateway.link().request("sockets")
        try:
            if not _as_made(fds):
                raise errors.Lost("its sockets are not there", sandbox_id=gateway.sandbox_id)
            self._tidy()
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_TRUNC if fresh else 0)
            file = os.open(self._folder / gateway.sandbox_id, flags, 0o600)
            fds.append(file)
            reply = await self._proxy.request("add", {"sandbox": slot, "egress": gateway.egress}, fds)
        except OSError as error:
            raise errors.Unavailable(f"the journal of the sandbox's connections cannot be written: {error}",
                                     sandbox_id=gateway.sandbox_id,
                                     hint="check the disk and the permissions of ROCK_HOME on the worker, then try "
                                          "again") from None
        finally:
            for fd in fds:
                os.close(fd)
        if "error" in reply:
            raise errors.Unavailable(f"the network proxy rejected the sandbox: {reply['error']}",
                                     sandbox_id=gateway.sandbox_id,
                                     hint="try again; the log of the worker has the cause")
        if slot not in self._known:  # dropped meanwhile
            self._remove(slot, gateway.sandbox_id)

    def drop(self, slot: str) -> None:
        """Stop serving an ended sandbox."""
        gateway = self._known.pop(slot, None)
        if gateway is not None:
            self._remove(slot, gateway.sandbox_id)

    def _remove(self, slot: str, sandbox_id: str) -> None:
        async def remove() -> None:
            try:
                with contextlib.suppress(errors.RockError):
                    await self._proxy.request("remove", {"sandbox": slot})
            finally:
                self._removing.pop(sandbox_id, None)

        if self._proxy.pid is not None:
            self._removing[sandbox_id] = self._spawn(remove())

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """The connection log of a running or ended sandbox."""
        if sandbox_id in self._removing:  # open connections are being written to the log
            await asyncio.wait({self._removing[sandbox_id]}, timeout=5)
        slot = next((slot for slot, gateway in self._known.items() if gateway.sandbox_id == sandbox_id), None)
        found = None
        if slot is not None:
            found = (await self._proxy.request("list", {"sandbox": slot})).get("connections")
        if found is None:
            found = await asyncio.to_thread(read, str(self._folder / sandbox_id))
        return ConnectionList.model_validate(found)

    def _lost(self) -> None:
        """The proxy died: its connections are broken, and new ones wait for the next proxy."""
        log.warning("the network proxy ended; starting another for %d sandboxes", len(self._known))
        self._spawn(self._again(list(self._known)))

    async def _again(self, slots: list[str]) -> None:
        await asyncio.gather(*(self._give_surely(slot) for slot in slots))

    async def _give_surely(self, slot: str) -> None:
        """Retry until the sandbox is served or gone; each sandbox has its own task, so one does not delay the
        others."""
        while (gateway := self._known.get(slot)) is not None:
            try:
                async with self._gate:
                    if slot in self._known:
                        await self._give(slot, fresh=False)
                return
            except errors.Lost:
                return  # the waiter of the sandbox reports its end
            except errors.RockError as error:
                log.warning("network of %s: %s; trying again", gateway.sandbox_id, error)
                await asyncio.sleep(_AGAIN_AFTER)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tidy(self) -> None:
        """Remove the oldest logs, periodically."""
        now = time.monotonic()
        if now - self._tidied_at < _TIDY_EVERY:
            return
        self._tidied_at = now
        self._folder.mkdir(mode=0o700, exist_ok=True)
        known = {gateway.sandbox_id for gateway in self._known.values()}
        with os.scandir(self._folder) as entries:
            found = sorted((entry.stat(follow_symlinks=False).st_mtime, entry.path) for entry in entries
                           if entry.name not in known)
        limit = time.time() - _KEPT
        for index, (changed, path) in enumerate(found):
            if changed < limit or index < len(found) - _MOST_FILES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    async def close(self) -> None:
        """Disconnect from all sandboxes, which continue to run; their connections wait for the next server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._known.clear()
        self._proxy.close()


def _as_made(fds: list[int]) -> bool:
    """Whether pid 1 passed the expected sockets: one listening TCP socket and one UDP socket. Others are not
    forwarded."""
    if len(fds) != 2:
        return False
    try:
        with socket.socket(fileno=os.dup(fds[0])) as tcp, socket.socket(fileno=os.dup(fds[1])) as udp:
            inet = {tcp.family, udp.family} <= {socket.AF_INET, socket.AF_INET6}
            listens = tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
            return inet and listens and (tcp.type, udp.type) == (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    except OSError:
        return False


# ---- egress proxy ----
#
# The rocklet's client of the egress proxy: starts it, sends requests, and reports its death.

_PROXY = Path(__file__).parents[2] / "egress" / "proxy.py"


class ProxyLink(ChildLink):
    """One proxy at a time. Its end closes all connections; the sandboxes continue to run without egress.

    resolvers: see dns.py. lost: called when the proxy died.
    """

    what = "the network proxy"
    again = "try again"

    def __init__(self, resolvers: Sequence[str], log: Path, lost: Callable[[], None]) -> None:
        super().__init__(_PROXY, {"resolvers": list(resolvers)}, log)
        self._when_lost = lost

    def _greeted(self, data: bytes) -> None:
        if not data:
            raise OSError("it ended at once")

    def _not_started(self, error: OSError | TimeoutError) -> errors.RockError:
        return errors.Unavailable(f"the network proxy did not start: {error!r}", hint=f"see {self._log}")

    async def request(self, op: str, fields: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request to the proxy, with copies of `fds`. Unavailable when it dies meanwhile, or on a timeout."""
        return await self.ask(op, fields, fds, PATIENCE)

    def _lost(self) -> None:
        if self._sock is not None:
            self.close()
            self._when_lost()
