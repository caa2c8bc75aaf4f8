"""Limits of per-user kernel counters, so that one sandbox cannot exhaust those of the host or of another sandbox.

The kernel charges inotify instances and watches, pending signals and POSIX timers, message queues and locked memory to
the user inside and, for each parent user namespace, to its creator. Two mechanisms follow:

    namespaces   the creator of a sandbox's user namespace is the first id of its own range (userns.make), so that no
                 other sandbox, and not root, shares the account
    userns       all sandboxes share one user: the launcher's namespace gets three quarters of the user's limits, and
                 each sandbox an eighth

Standard library only.
"""

from __future__ import annotations

import contextlib
import resource

_SETTINGS = ("max_inotify_instances", "max_inotify_watches")
# The maximum per sandbox, independent of the server's limits.
_MOST = {resource.RLIMIT_SIGPENDING: 32_768, resource.RLIMIT_MSGQUEUE: 819_200, resource.RLIMIT_MEMLOCK: 8 << 20}
_ALL_SANDBOXES, _ONE_SANDBOX = 0.75, 0.125

Rlimits = list[tuple[int, int]]


class Counters:
    """Created by the launcher before it leaves the host's user namespace, whose limits it reads.

    own_account: each sandbox's user namespace has its own creator.
    """

    def __init__(self, *, own_account: bool) -> None:
        self._own_account = own_account
        self._settings = {name: value for name in _SETTINGS if (value := _read(name)) is not None}
        self._limits = {name: min(value, _hard(name)) for name, value in _MOST.items()}

    def limit_launcher(self) -> None:
        """Limit the total of all sandboxes on a shared account; call before the launcher's namespace is created."""
        if not self._own_account:
            for name in self._limits:
                most = _hard(name)
                share = most if most == _INFINITE else int(most * _ALL_SANDBOXES)
                resource.setrlimit(name, (share, share))

    def settings_of_all(self) -> dict[str, int]:
        """Settings of the launcher's user namespace, to be written inside it."""
        return {} if self._own_account else {
            name: int(value * _ALL_SANDBOXES) for name, value in self._settings.items()}

    def settings_of_one(self) -> dict[str, int]:
        """Settings of a sandbox's user namespace, to be written inside it."""
        return {} if self._own_account else {
            name: max(1, int(value * _ONE_SANDBOX)) for name, value in self._settings.items()}

    def rlimits_of_one(self) -> Rlimits:
        """Resource limits of a sandbox's pid 1, which all its programs inherit."""
        if self._own_account:
            return list(self._limits.items())
        return [(name, int(value * _ONE_SANDBOX)) for name, value in self._limits.items()]


_INFINITE = (1 << 63) - 1


def _hard(name: int) -> int:
    most = resource.getrlimit(name)[1]
    return _INFINITE if most == resource.RLIM_INFINITY else most


def _read(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(f"/proc/sys/user/{name}", encoding="ascii") as file:
        return int(file.read())
    return None


def write(settings: dict[str, int]) -> None:
    """Apply them in the user namespace of this process. OSError when the kernel or the host denies it."""
    for name, value in settings.items():
        with open(f"/proc/sys/user/{name}", "w", encoding="ascii") as file:
            file.write(str(value))
