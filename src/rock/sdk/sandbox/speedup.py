"""`sandbox.network`: mirrors of package managers, and the configuration files that select them."""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from urllib.parse import urlsplit

from rock import errors
from rock.errors import InvalidConfig
from rock.protocol.action import BashObservation
from rock.sdk.sandbox.files import Files
from rock.sdk.sandbox.processes import Processes

HOSTS = "/etc/hosts"
GITHUB = "github.com"
APT_LIST = "/etc/apt/sources.list"
APT_FOLDER = "/etc/apt/sources.list.d"
BACKUP = ".backup"  # ending of the copy of a file from before the first change
PIP_CONFIG = ".pip/pip.conf"  # in a home

_MIRROR = re.compile(r"https?://[A-Za-z0-9.\-:\[\]]+(/[A-Za-z0-9._~/%+\-]*)?")
_CODENAME = re.compile(r"[a-z][a-z0-9-]*")


class SpeedupType(StrEnum):
    """What is to use a mirror."""

    APT = "apt"
    PIP = "pip"
    GITHUB = "github"


def mirror(value: str) -> str:
    """The base URL of a mirror, without a slash at its end. InvalidConfig when it is no plain http or https URL."""
    if not _MIRROR.fullmatch(value):
        raise InvalidConfig(f"{value!r} is not the http or https URL of a mirror", hint="use a URL like https://mirror")
    return value.rstrip("/")


def pip_config(value: str) -> str:
    """The pip.conf for a mirror that has its index at /pypi/simple/, or whose URL ends with /simple itself."""
    base = mirror(value)
    index = f"{base}/" if base.endswith("/simple") else f"{base}/pypi/simple/"
    lines = ["[global]", f"index-url = {index}", "timeout = 120"]
    if base.startswith("http://"):  # pip refuses such a host otherwise; one with a certificate has to show it
        lines.append(f"trusted-host = {urlsplit(base).hostname}")
    return "\n".join(lines) + "\n"


def apt_list(value: str, os_release: str) -> str:
    """The sources.list of a Debian or Ubuntu whose /etc/os-release is given. InvalidConfig for any other system."""
    base = mirror(value)
    pairs = (line.partition("=") for line in os_release.splitlines() if "=" in line)
    known = {name: text.strip("\"'") for name, _, text in pairs}
    system, codename = known.get("ID", ""), known.get("VERSION_CODENAME", "")
    if not _CODENAME.fullmatch(codename) or system not in ("debian", "ubuntu"):
        raise InvalidConfig(f"the image is not a Debian or Ubuntu with a code name (ID={system!r}, {codename!r})",
                            hint="use an image of Debian or Ubuntu")  # fmt: skip
    if system == "debian":
        parts = "main contrib non-free non-free-firmware"
        suites = [("debian", "", parts), ("debian-security", "-security", "main"), ("debian", "-updates", parts)]
    else:
        parts = "main restricted universe multiverse"
        suites = [("ubuntu", suffix, parts) for suffix in ("", "-security", "-updates", "-backports")]
    return "".join(f"deb {base}/{path}/ {codename}{suffix} {names}\n" for path, suffix, names in suites)


def hosts_with(text: str, address: str) -> str:
    """The text of /etc/hosts with this address for github.com alone. InvalidConfig: it is no IP address."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise InvalidConfig(
            f"{address!r} is not an IP address", hint="use the address of a mirror of github.com"
        ) from None
    lines = []
    for line in text.splitlines():
        entry, mark, comment = line.partition("#")
        words = entry.split()
        if GITHUB in words[1:]:
            words = [word for word in words if word != GITHUB]
            if len(words) < 2:
                continue
            line = " ".join(words) + (f" {mark}{comment}" if mark else "")
        lines.append(line)
    return "\n".join([*lines, f"{address} {GITHUB}"]) + "\n"


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
        text = pip_config(value)
        found = await self._processes.run("command -v pip3 || command -v pip", timeout=timeout)
        if found.exit_code != 0:
            return _refused("pip is not installed, PIP speedup is not supported", "Precheck failed")
        fs = self._files
        await fs.write(f"/root/{PIP_CONFIG}", text)
        users = ["root"]
        homes = await fs.list("/home") if await fs.exists("/home") else []
        for home in homes:
            if home.kind != "directory":
                continue
            try:
                # Written by the user: what is in a home may be a link to somewhere, which root would follow.
                await fs.write(f"{home.path}/{PIP_CONFIG}", text, user=str(home.uid))
                users.append(home.name)
            except errors.ClientError:
                continue  # its user may not write there
        return BashObservation(output=f"pip uses {value} for {', '.join(users)}", exit_code=0)

    async def _apt(self, value: str) -> BashObservation:
        fs = self._files
        if not await fs.exists("/etc/debian_version"):
            return _refused("This is not a Debian/Ubuntu system, APT speedup is not supported", "Precheck failed")
        text = apt_list(value, await fs.read_text("/etc/os-release", errors="replace"))
        await self._keep(APT_LIST)
        await fs.write(APT_LIST, text)
        if await fs.exists(APT_FOLDER):
            await fs.remove(APT_FOLDER, recursive=True)  # other sources would be asked beside the mirror
        return BashObservation(output=f"apt uses:\n{text}", exit_code=0)

    async def _github(self, value: str) -> BashObservation:
        fs = self._files
        old = await fs.read_text(HOSTS, errors="surrogateescape")
        text = hosts_with(old, value)
        await self._keep(HOSTS)
        # By the shell, and in place: /etc/hosts may be mounted by itself, and cannot be replaced then.
        done = await self._processes.run(["sh", "-c", "cat > /etc/hosts"], stdin=text, timeout=60.0)
        if done.exit_code != 0:
            return _refused(done.stderr, "/etc/hosts is not writable")
        return BashObservation(output=f"{value} {GITHUB}", exit_code=0)

    async def _keep(self, path: str) -> None:
        """Keep a file as it was before the first change, beside it."""
        fs = self._files
        if await fs.exists(path) and not await fs.exists(path + BACKUP):
            await fs.write(path + BACKUP, await fs.read(path))


def _refused(output: str, reason: str) -> BashObservation:
    return BashObservation(output=output, exit_code=1, failure_reason=reason)
