"""What a sandbox's package tools read to use a mirror: the files, and their texts."""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from urllib.parse import urlsplit

from rock.errors import InvalidConfig

HOSTS = "/etc/hosts"
GITHUB = "github.com"
APT_LIST = "/etc/apt/sources.list"
APT_FOLDER = "/etc/apt/sources.list.d"
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
