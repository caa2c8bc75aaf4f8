"""Wheels, fetched on this machine by its own pip, for a sandbox that may have no network.

Only wheels are taken: to build a package would run its code here. Blocking; for both faces of the SDK.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rock.errors import InvalidConfig, Unsupported

_MACHINE = re.compile(r"[a-z0-9_]{1,20}")
_LIBC = re.compile(r"(glibc|musl)-(\d)\.(\d{1,2})")
_VERSION = re.compile(r"3\.\d{1,2}")
_OLDEST = {"glibc": 5, "musl": 1}
_OLD_NAMES = {"manylinux_2_17": "manylinux2014", "manylinux_2_12": "manylinux2010", "manylinux_2_5": "manylinux1"}


@dataclass(frozen=True)
class Target:
    """Which wheels fit: `python` like "3.11", `machine` like "x86_64", `libc` like "glibc-2.36" or "musl-1.2"."""

    python: str
    machine: str
    libc: str

    def options(self) -> list[str]:
        """pip's options for it. Unsupported when these are not words that a Linux would say of itself."""
        libc = _LIBC.fullmatch(self.libc)
        if not libc or not _MACHINE.fullmatch(self.machine) or not _VERSION.fullmatch(self.python):
            raise Unsupported(
                f"no wheels are known for Python {self.python!r}, {self.machine!r}, {self.libc!r}",
                hint="use an image with CPython on glibc or musl",
            )
        family, major, minor = libc[1], libc[2], int(libc[3])
        name = "manylinux" if family == "glibc" else "musllinux"
        platforms = [f"{name}_{major}_{step}" for step in range(minor, _OLDEST[family] - 1, -1)]
        platforms += [_OLD_NAMES[name] for name in platforms if name in _OLD_NAMES]
        abi = "cp" + self.python.replace(".", "")
        return [
            "--python-version", self.python, "--implementation", "cp", "--abi", abi, "--abi", "abi3", "--abi", "none",
            *(word for name in platforms for word in ("--platform", f"{name}_{self.machine}")),
        ]  # fmt: skip


def fetch(
    requirements: Sequence[str], folder: Path, target: Target, *, index: str | None = None, timeout: float,
    dependencies: bool = True,
) -> list[Path]:  # fmt: skip
    """The wheels of requirements, and of all that these need, in a folder here.

    InvalidConfig has pip's own words when it does not find them; Unsupported: this Python has no pip.
    """
    if find_spec("pip") is None:
        raise Unsupported(
            "packages cannot be fetched for the sandbox: the Python that runs this has no pip",
            hint=f"run `{sys.executable} -m ensurepip`, or give the sandbox a network",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
               "--only-binary=:all:", "--dest", str(folder), *target.options()]  # fmt: skip
    command += [] if dependencies else ["--no-deps"]
    command += ["--index-url", index] if index else []
    try:
        done = subprocess.run(
            [*command, "--", *requirements], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise InvalidConfig(
            f"pip did not fetch {', '.join(requirements)} within {timeout:g} seconds", hint="check the package index"
        ) from None
    if done.returncode != 0:
        raise InvalidConfig(
            f"pip cannot fetch {', '.join(requirements)}: {_reason(done.stderr)}", hint="check the names"
        )
    return sorted(folder.glob("*.whl"))


def requirements_of(path: Path) -> list[str]:
    """The requirements in a file: a name and versions a line. InvalidConfig for options, which are pip's own."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if text.startswith("-"):
            raise InvalidConfig(f"{path}: {text!r} is an option of pip", hint="give names and versions alone")
        if text:
            found.append(text)
    return found


def unpack(wheel: Path, folder: Path, inner: str, parts: Sequence[str]) -> None:
    """What a wheel has in the folders `parts` of its folder `inner`, with modes, as `folder`/part."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename
            if not any(name.startswith(f"{inner}/{part}/") for part in parts):
                continue
            place = Path(archive.extract(member, folder))  # never outside the folder: zipfile drops what leads out
            mode = member.external_attr >> 16 & 0o777
            if mode and not member.is_dir():
                place.chmod(mode)


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("ERROR:")]
    return (wrong or lines or ["it ended without a word"])[0][:500]
