"""Leases of environments: this process tells servers that it is alive, so that they keep its environments.

One daemon thread renews the leases of all environments that this process made. At the interpreter's exit they are
released at once; a process that is killed stops renewing, and the server releases them after the lease. A child of a
fork has an id of its own. It renews its parent's leases too once it uses an environment that it inherited.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import threading
import time
from dataclasses import dataclass

from rock import errors
from rock.protocol.routes import ROUTES
from rock.sync.transport import Transport

_RENEWALS = 5  # in one lease
_TIMEOUT = 5.0  # seconds of one renewal
_EXIT_TIMEOUT = 2.0  # seconds of one release at the exit
_Key = tuple[str, str, str]  # server, sandbox, owner


@dataclass
class _Lease:
    transport: Transport
    seconds: float
    environments: int = 0


class Leases:
    """The leases of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[_Key, _Lease] = {}
        self._wake = threading.Event()
        self._begin()

    def _begin(self) -> None:
        self.owner = secrets.token_urlsafe(16)
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

    def forked(self) -> None:
        """In the child of a fork: no thread of the parent runs here, and locks may be held by nobody."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._begin()

    def hold(self, transport: Transport, sandbox_id: str, seconds: float) -> str:
        """An environment was made in that sandbox under a lease of `seconds`. Returns its owner, for `drop`."""
        with self._lock:
            key = (transport.url, sandbox_id, self.owner)
            lease = self._held.setdefault(key, _Lease(transport, seconds))
            lease.environments += 1
            lease.seconds = min(lease.seconds, seconds)
            self._start()
        return self.owner

    def drop(self, transport: Transport, sandbox_id: str, owner: str) -> None:
        """One of them was closed. Idempotent for sandboxes without any."""
        with self._lock:
            key = (transport.url, sandbox_id, owner)
            lease = self._held.get(key)
            if lease is not None:
                lease.environments -= 1
                if lease.environments <= 0:
                    del self._held[key]

    def used(self) -> None:
        """An environment is used: renewals run in this process too, which may be a child of a fork."""
        if self._thread is None and self._held:
            with self._lock:
                self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rock-env-lease", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                shortest = min((lease.seconds for lease in self._held.values()), default=60.0)
            self._wake.wait(shortest / _RENEWALS)
            self._wake.clear()
            self.renew()
            time.sleep(min(1.0, shortest / _RENEWALS / 2))  # environments that are made together are renewed together

    def renew(self) -> None:
        """Renew all leases. A server that does not answer is tried again the next time."""
        with self._lock:
            held = list(self._held.items())
        silent: set[str] = set()
        for key, lease in held:
            url, sandbox_id, owner = key
            if url in silent:
                continue
            target = ROUTES["renew_envs"].url(sandbox_id=sandbox_id, owner=owner)
            try:
                lease.transport.json("POST", target, timeout=_TIMEOUT, deadline=0.0)
            except (errors.NotFound, errors.SandboxError):
                with self._lock:
                    self._held.pop(key, None)
            except errors.RockError:
                silent.add(url)

    def release(self) -> None:
        """Close the environments that this process made and did not close. For its exit."""
        if self._process != os.getpid():
            return
        with self._lock:
            held = [(key, lease) for key, lease in self._held.items() if key[2] == self.owner]
            self._held.clear()
        silent: set[str] = set()
        for (url, sandbox_id, owner), lease in held:
            if url in silent:
                continue
            target = ROUTES["release_envs"].url(sandbox_id=sandbox_id, owner=owner)
            try:
                lease.transport.json("DELETE", target, timeout=_EXIT_TIMEOUT, deadline=0.0)
            except (errors.NotFound, errors.SandboxError):
                continue
            except errors.RockError:
                silent.add(url)


LEASES = Leases()
os.register_at_fork(after_in_child=LEASES.forked)


def _at_exit() -> None:
    with contextlib.suppress(Exception):  # the process ends; the server releases them after the lease
        LEASES.release()


atexit.register(_at_exit)
