"""`sandbox.network`: mirrors for what is installed inside."""

from __future__ import annotations

from rock import errors
from rock.protocol.action import BashObservation
from rock.sdk.sandbox import speedup
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.processes import Processes
from rock.sdk.sandbox.speedup import SpeedupType

BACKUP = ".backup"


class Network:
    """Which mirrors the tools inside use. Whether there is a network is `SandboxConfig.network`."""

    def __init__(self, files: Files, processes: Processes) -> None:
        self._files = files
        self._processes = processes

    async def speedup(
        self, speedup_type: SpeedupType | str, speedup_value: str, timeout: float = 300
    ) -> BashObservation:
        """Turn a tool to a mirror, by its configuration files.

        PIP: the URL of a mirror, for root and for every user with a home in /home. APT: the same; the old sources.list
        is kept beside the new one. GITHUB: the IP address for github.com in /etc/hosts. `timeout`: seconds for the look
        at what the image has. When it cannot be done `exit_code` is 1, and `failure_reason` tells why.
        """
        try:
            kind = SpeedupType(speedup_type)
        except ValueError:
            return _refused(f"Unsupported speedup type: {speedup_type}", "Invalid speedup type")
        try:
            if kind is SpeedupType.PIP:
                return await self._pip(speedup_value, timeout)
            if kind is SpeedupType.APT:
                return await self._apt(speedup_value)
            return await self._github(speedup_value)
        except errors.ClientError as error:
            return _refused(str(error), str(error))

    async def _pip(self, value: str, timeout: float) -> BashObservation:
        text = speedup.pip_config(value)
        found = await self._processes.run("command -v pip3 || command -v pip", timeout=timeout)
        if found.exit_code != 0:
            return _refused("pip is not installed, PIP speedup is not supported", "Precheck failed")
        fs = self._files
        await fs.write(f"/root/{speedup.PIP_CONFIG}", text)
        users = ["root"]
        homes = await fs.list("/home") if await fs.exists("/home") else []
        for home in homes:
            if home.kind != "directory":
                continue
            try:
                # Written by the user: what is in a home may be a link to somewhere, which root would follow.
                await fs.write(f"{home.path}/{speedup.PIP_CONFIG}", text, user=str(home.uid))
                users.append(home.name)
            except errors.ClientError:
                continue  # its user may not write there
        return BashObservation(output=f"pip uses {value} for {', '.join(users)}", exit_code=0)

    async def _apt(self, value: str) -> BashObservation:
        fs = self._files
        if not await fs.exists("/etc/debian_version"):
            return _refused("This is not a Debian/Ubuntu system, APT speedup is not supported", "Precheck failed")
        text = speedup.apt_list(value, await fs.read_text("/etc/os-release", errors="replace"))
        await self._keep(speedup.APT_LIST)
        await fs.write(speedup.APT_LIST, text)
        if await fs.exists(speedup.APT_FOLDER):
            await fs.remove(speedup.APT_FOLDER, recursive=True)  # other sources would be asked beside the mirror
        return BashObservation(output=f"apt uses:\n{text}", exit_code=0)

    async def _github(self, value: str) -> BashObservation:
        fs = self._files
        old = await fs.read_text(speedup.HOSTS, errors="surrogateescape")
        text = speedup.hosts_with(old, value)
        await self._keep(speedup.HOSTS)
        # By the shell, and in place: /etc/hosts may be mounted by itself, and cannot be replaced then.
        done = await self._processes.run(["sh", "-c", "cat > /etc/hosts"], stdin=text, timeout=60.0)
        if done.exit_code != 0:
            return _refused(done.stderr, "/etc/hosts is not writable")
        return BashObservation(output=f"{value} {speedup.GITHUB}", exit_code=0)

    async def _keep(self, path: str) -> None:
        """Keep a file as it was before the first change, beside it."""
        fs = self._files
        if await fs.exists(path) and not await fs.exists(path + BACKUP):
            await fs.write(path + BACKUP, await fs.read(path))


def _refused(output: str, reason: str) -> BashObservation:
    return BashObservation(output=output, exit_code=1, failure_reason=reason)
