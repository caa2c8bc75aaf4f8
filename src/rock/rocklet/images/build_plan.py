"""The plan of a build: its stages, its arguments, and the instructions that change only image settings. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rock.errors import NotFound
from rock.images.dockerfile import (
    Dockerfile,
    Instruction,
    Stage,
    Words,
    bounded,
    pairs,
    parse_array,
    refuse,
    unsupported,
)
from rock.images.layers.importer import this_architecture
from rock.images.records import RootFS


class Plan:
    """A Dockerfile with the arguments of a build. `args_used`: names of the arguments that an ARG declared."""

    def __init__(self, read: Dockerfile, given: Mapping[str, str]) -> None:
        self.stages = read.stages
        self.escape = read.escape
        self.args_used: set[str] = set()
        self._given = given
        self._outside: dict[str, str] = {
            f"{side}{what}": value for side in ("TARGET", "BUILD")
            for what, value in (("PLATFORM", f"linux/{this_architecture()}"), ("OS", "linux"),
                                ("ARCH", this_architecture()))
        }  # fmt: skip
        outside = self._outside
        for instruction in read.args:
            outside = self.arguments(instruction, BuildScope(outside, {}, self.escape))
        self._outside = outside

    def arguments(self, instruction: Instruction, place: BuildScope) -> dict[str, str]:
        """The arguments after an ARG: the given value, else its default, else the value from before the first FROM."""
        args = dict(place.args)
        words = place.words(instruction.line)
        for word in words.raw(instruction.text):
            name, equals, default = word.partition("=")
            self.args_used.add(name)
            if name in self._given:
                args[name] = self._given[name]
            elif equals:
                args[name] = words.one(default)
            elif name in self._outside:
                args[name] = self._outside[name]
        bounded(args, instruction.line)
        return args

    def number(self, name: str, before: int | None = None, by_number: bool = True) -> int | None:
        """The stage with a name, or with a number, among the earlier stages."""
        stages = self.stages[:before]
        for number, stage in enumerate(stages):
            if name and stage.name == name.lower():
                return number
        is_number = by_number and name.isascii() and name.isdigit() and len(name) < 10
        return int(name) if is_number and int(name) < len(stages) else None

    def wanted(self, target: str | None) -> int:
        """The target stage; NotFound."""
        found = len(self.stages) - 1 if target is None else self.number(target)
        if found is None:
            names = ", ".join(stage.name for stage in self.stages if stage.name)
            raise NotFound(f"the Dockerfile has no stage {target!r}", hint=f"it has {names or 'no names'}")
        return found

    def base(self, stage: Stage) -> str:
        """The base of a stage, from its FROM. InvalidConfig, Unsupported for another machine's platform."""
        words = Words(self._outside, self.escape, stage.line)
        base, platform = words.one(stage.base), words.one(stage.platform)
        if not base.strip():
            raise refuse(stage.line, f"FROM {stage.base} is nothing", "give the ARG a value")
        if platform not in ("", f"linux/{this_architecture()}"):
            raise unsupported(stage.line, f"platform {platform}: only linux/{this_architecture()} runs here")
        return base

    def needed(self, wanted: int) -> Sequence[int]:
        """The stages that a stage needs, itself last."""
        found: set[int] = set()
        todo = [wanted]
        while todo:
            number = todo.pop()
            if number in found:
                continue
            found.add(number)
            stage = self.stages[number]
            base = self.number(self.base(stage), number, by_number=False)
            todo += [base] if base is not None else []
            for instruction in stage.instructions:
                source = instruction.flags.get("from", "")
                other = self.number(source, number)
                if other is None and self.number(source) is not None:
                    raise refuse(instruction.line, f"stage {source!r} comes later, or is this one")
                todo += [other] if other is not None else []
        return sorted(found)


# ---- image settings ----
#
# Instructions that make no layer change the settings of the image.

SHELL = ("/bin/sh", "-c")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", re.ASCII)
_NANOSECONDS = {"ns": 1, "us": 1000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_MOST_PORTS = 1000


@dataclass(frozen=True)
class Settings:
    """The settings of an image for running it; see RootFS. own_cmd: CMD was set by this Dockerfile."""

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
class BuildScope:
    """The arguments and the environment at an instruction."""

    args: Mapping[str, str]
    env: Mapping[str, str]
    escape: str

    def words(self, line: int) -> Words:
        """The variables for substitution: an environment variable hides an argument of the same name."""
        return Words({**self.args, **self.env}, self.escape, line)


def apply(instruction: Instruction, settings: Settings, place: BuildScope) -> tuple[Settings, str]:
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
        cmd = settings.cmd if settings.own_cmd else ()  # the CMD of the base image belongs to its own entry point
        return replace(settings, entrypoint=_argv(instruction, settings), cmd=cmd), ""
    if keyword == "MAINTAINER":
        return replace(settings, labels={**settings.labels, "maintainer": instruction.text}), ""
    if keyword == "ONBUILD":
        raise unsupported(instruction.line, "ONBUILD is not supported", "write it in what is built on this image")
    name, value, warning = _kept(instruction, settings, words)
    return replace(settings, other={**settings.other, name: value}), warning


def _kept(instruction: Instruction, settings: Settings, words: Words) -> tuple[str, Any, str]:
    """(key, value, warning) of image settings that other tools read and ROCK ignores."""
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
