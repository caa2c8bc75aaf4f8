"""`sandbox.remote_user`: users inside, for sessions and programs that are not to run as root."""

from __future__ import annotations

from rock import errors
from rock.protocol.action import CommandResponse
from rock.sdk.sandbox.processes import Processes

TIMEOUT = 60.0  # seconds

# Its argument: the name. Images made on busybox have adduser alone.
CREATE = """
shell=/bin/sh
[ -x /bin/bash ] && shell=/bin/bash
if command -v useradd > /dev/null 2>&1; then exec useradd -m -s "$shell" -- "$1"; fi
exec adduser -D -s "$shell" -- "$1"
"""


class RemoteUser:
    """Users of the sandbox's own system. `create_session(remote_user=...)` and `execute(user=...)` run as one."""

    def __init__(self, processes: Processes) -> None:
        self.current_user = "root"
        self._processes = processes

    async def create_remote_user(self, user_name: str) -> bool:
        """Make a user with a home folder; True when it is there. False: its name is none, the image has neither
        useradd nor adduser, or the sandbox has one user id alone (isolation "userns")."""
        if not await self.is_user_exist(user_name):
            done = await self._run(["sh", "-c", CREATE, "sh", user_name])
            if done.exit_code != 0:
                return False
        try:
            await self._processes.run(["true"], user=user_name, timeout=TIMEOUT)
        except errors.Unsupported:
            return False  # an entry in /etc/passwd, that nobody can become
        return True

    async def is_user_exist(self, user_name: str) -> bool:
        """Whether the sandbox knows a user of this name."""
        return (await self._run(["id", user_name])).exit_code == 0

    async def _run(self, argv: list[str]) -> CommandResponse:
        return await self._processes.run(argv, timeout=TIMEOUT)


LinuxRemoteUser = RemoteUser  # ROCK's name
