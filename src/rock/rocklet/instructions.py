"""What the instructions of a Dockerfile that make no layer change: the settings of the image."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rock.runtime.image.dockerfile import Instruction, Words, bounded, pairs, parse_array, refuse, unsupported
from rock.runtime.image.rootfs import RootFS

SHELL = ("/bin/sh", "-c")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", re.ASCII)
_NANOSECONDS = {"ns": 1, "us": 1000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_MOST_PORTS = 1000


@dataclass(frozen=True)
class Settings:
    """What an image says about how to run it; see RootFS. own_cmd: CMD was set by this Dockerfile."""

    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "root"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    own_cmd: bool = False

    @classmethod
    def of(cls, rootfs: RootFS) -> Settings:
        return cls(dict(rootfs.env), rootfs.cwd or "/", rootfs.user, rootfs.entrypoint, rootfs.cmd, dict(rootfs.labels),
                   dict(rootfs.other))  # fmt: skip

    def over(self, rootfs: RootFS) -> RootFS:
        """The same layers with these settings."""
        return replace(rootfs, env=self.env, cwd=self.cwd, user=self.user, entrypoint=self.entrypoint, cmd=self.cmd,
                       labels=self.labels, other=self.other)  # fmt: skip

    @property
    def shell(self) -> tuple[str, ...]:
        found = self.other.get("Shell")
        return tuple(map(str, found)) if isinstance(found, list) and found else SHELL


@dataclass(frozen=True)
class Place:
    """Where an instruction stands: the arguments and the environment there."""

    args: Mapping[str, str]
    env: Mapping[str, str]
    escape: str

    def words(self, line: int) -> Words:
        """An environment variable hides an argument of its name."""
        return Words({**self.args, **self.env}, self.escape, line)


def apply(instruction: Instruction, settings: Settings, place: Place) -> tuple[Settings, str]:
    """(the settings after an instruction, a warning or ""). InvalidConfig and Unsupported, with the line."""
    words = place.words(instruction.line)
    keyword = instruction.keyword
    if keyword == "ENV":
        env = bounded({**settings.env, **_env(instruction, words)}, instruction.line)
        return replace(settings, env=env), ""
    if keyword == "LABEL":
        labels = bounded({**settings.labels, **dict(pairs(instruction, words))}, instruction.line)
        return replace(settings, labels=labels), ""
    if keyword == "WORKDIR":
        path = words.one(instruction.text)
        return replace(settings, cwd=_joined(settings.cwd, path, instruction.line)), ""
    if keyword == "USER":
        return replace(settings, user=_user(words.one(instruction.text), instruction.line)), ""
    if keyword == "CMD":
        return replace(settings, cmd=_argv(instruction, settings), own_cmd=True), ""
    if keyword == "ENTRYPOINT":
        cmd = settings.cmd if settings.own_cmd else ()  # that of the image below is for its own entry point
        return replace(settings, entrypoint=_argv(instruction, settings), cmd=cmd), ""
    if keyword == "MAINTAINER":
        return replace(settings, labels={**settings.labels, "maintainer": instruction.text}), ""
    if keyword == "ONBUILD":
        raise unsupported(instruction.line, "ONBUILD is not supported", "write it in what is built on this image")
    name, value, warning = _kept(instruction, settings, words)
    return replace(settings, other={**settings.other, name: value}), warning


def _kept(instruction: Instruction, settings: Settings, words: Words) -> tuple[str, Any, str]:
    """(key, value, warning) of what an image says to others and ROCK does not act on."""
    keyword, line = instruction.keyword, instruction.line
    if keyword == "SHELL":
        if not instruction.array:
            raise refuse(line, 'SHELL is not of the form SHELL ["PROGRAM", "ARGUMENT"]')
        return "Shell", list(instruction.array), ""
    if keyword == "EXPOSE":
        ports = _ports(words.split(instruction.text), line)
        return "ExposedPorts", {**settings.other.get("ExposedPorts", {}), **ports}, ""
    if keyword == "VOLUME":
        named = instruction.array if instruction.array is not None else words.split(instruction.text)
        volumes = {**settings.other.get("Volumes", {}), **{name: {} for name in named}}
        return "Volumes", volumes, "VOLUME is kept in the image, and ROCK makes none: it is a folder like any other"
    if keyword == "STOPSIGNAL":
        return "StopSignal", words.one(instruction.text), "STOPSIGNAL is kept in the image; ROCK stops with SIGTERM"
    return "Healthcheck", _health(instruction), "HEALTHCHECK is kept in the image; ROCK does not run it"


def _env(instruction: Instruction, words: Words) -> dict[str, str]:
    found = dict(pairs(instruction, words))
    for name, value in found.items():
        if "=" in name or "\0" in name + value:
            raise refuse(instruction.line, f"{name!r} is no name of a variable")
    return found


def _joined(cwd: str, path: str, line: int) -> str:
    if not path or "\0" in path:
        raise refuse(line, "WORKDIR is nothing", "give its variable a value")
    joined = os.path.normpath(os.path.join(cwd, path))
    return "/" + joined.lstrip("/")


def _user(text: str, line: int) -> str:
    if not text or len(text.split()) != 1 or text.count(":") > 1:
        raise refuse(line, f"USER {text[:60]!r} is not of the form USER[:GROUP]")
    return text


def _argv(instruction: Instruction, settings: Settings) -> tuple[str, ...]:
    if instruction.array is not None:
        return instruction.array
    return (*settings.shell, instruction.text)


def _ports(words: list[str], line: int) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for word in words:
        match = _PORT.fullmatch(word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if match is None or not 0 < first <= last <= 65535 or last - first > _MOST_PORTS:
            raise refuse(line, f"EXPOSE {word[:60]!r} is no port")
        found |= {f"{port}/{match[3] or 'tcp'}": {} for port in range(first, last + 1)}
    return found


def _health(instruction: Instruction) -> dict[str, Any]:
    kind, _, rest = instruction.text.partition(" ")
    if kind.upper() == "NONE" and not rest:
        return {"Test": ["NONE"]}
    if kind.upper() != "CMD" or not rest.strip():
        raise refuse(instruction.line, "HEALTHCHECK is neither HEALTHCHECK NONE nor HEALTHCHECK [FLAGS] CMD ...")
    array = parse_array(rest.strip())
    found: dict[str, Any] = {"Test": ["CMD", *array] if array is not None else ["CMD-SHELL", rest.strip()]}
    for flag, key in (("interval", "Interval"), ("timeout", "Timeout"), ("start-period", "StartPeriod"),
                      ("start-interval", "StartInterval")):  # fmt: skip
        if flag in instruction.flags:
            found[key] = _nanoseconds(instruction.flags[flag], instruction.line)
    if "retries" in instruction.flags:
        retries = instruction.flags["retries"]
        if not re.fullmatch(r"\d{1,6}", retries, re.ASCII):
            raise refuse(instruction.line, f"--retries={retries[:40]} is no number")
        found["Retries"] = int(retries)
    return found


def _nanoseconds(text: str, line: int) -> int:
    if len(text) > 40 or not re.fullmatch(rf"(?:{_DURATION.pattern})+", text, re.ASCII):
        raise refuse(line, f"{text[:40]!r} is no duration", "write it like 30s or 1m30s")
    return int(sum(float(number) * _NANOSECONDS[unit] for number, unit in _DURATION.findall(text)))
