"""The state of copied processes as data: what `capture` reads, and `rebuild` makes processes from.

    folder/processes.json   a Tree
          /pages            the pages of all processes, at the places that the runs name; sparse

Standard library only.
"""

from __future__ import annotations

import bisect
import json
import os
import zlib
from collections.abc import Mapping as Dictionary
from collections.abc import Sequence
from typing import Any, NamedTuple

from rock.runtime.namespace.processes.address_space import Mapping

STATE, PAGES = "processes.json", "pages"
_VERSION = 1
_STACK = "[stack]"


class Damaged(Exception):
    """The stored state is incomplete or of another version."""


class Run(NamedTuple):
    """Pages of a process: addresses, and the place of the first one among the pages of all processes."""

    start: int
    end: int
    place: int


class Description(NamedTuple):
    """An open file description.

    kind: "file" (opened again by its path), "stream" (a pipe to pid 1), "pipe", "event", "socket" (one end of a pair)
    or "epoll". stream: the key of a program and the name of its stream. pipe: the index of the pipe or pair, and
    whether this end reads, or is the first of the pair. value: the counter of an event, or the type of a socket.
    watched: by an epoll instance: descriptor, events, data.
    """

    kind: str
    flags: int
    path: str = ""
    offset: int = 0
    stream: tuple[str, str] = ("", "")
    pipe: tuple[int, bool] = (-1, False)
    value: int = 0
    watched: Sequence[tuple[int, int, int]] = ()


class Pipe(NamedTuple):
    """A pipe within the tree, or a stream to pid 1. capacity: in bytes. content: what was not read yet."""

    capacity: int
    content: bytes


class Thread(NamedTuple):
    """A thread other than the first one of its process; the fields are as of Process."""

    tid: int
    name: str
    registers: bytes
    extended: bytes
    blocked: bytes
    rseq: Sequence[int]
    robust_list: Sequence[int]
    alternate_stack: bytes
    tid_address: int


class Process(NamedTuple):
    """One process. Numbers of processes are those inside of the sandbox; parent 1 is pid 1.

    descriptors: number, index of the description, flags of the descriptor. actions: of handled signals. rseq: address,
    size, flags, signature. memory: the fields of prctl_mm_map without auxv. ids: user ids, then group ids, each real,
    effective, saved. capabilities: inheritable, permitted, effective, bounding.
    """

    pid: int
    parent: int
    session: int
    group: int
    name: str
    registers: bytes
    extended: bytes
    blocked: bytes
    rseq: Sequence[int]
    robust_list: Sequence[int]
    mappings: Sequence[Mapping]
    runs: Sequence[Run]
    memory: Sequence[int]
    auxiliary: bytes
    program: str
    folder: str
    umask: int
    ids: Sequence[int]
    groups: Sequence[int]
    capabilities: Sequence[int]
    nice: int
    oom_score: int
    limits: Sequence[tuple[int, int]]
    actions: Sequence[tuple[int, bytes]]
    ignored: int
    alternate_stack: bytes
    timers: Sequence[bytes]
    tid_address: int
    subreaper: bool
    death_signal: int
    dumpable: int
    personality: int
    descriptors: Sequence[tuple[int, int, int]]
    threads: Sequence[Thread] = ()


class Program(NamedTuple):
    """A program that pid 1 started: its key, and whether it reads ("r") or writes ("w") its streams, by name."""

    pid: int
    key: str
    streams: Dictionary[str, str]


class Tree(NamedTuple):
    """All processes of a sandbox, parents first. size: of the range that all places lie in."""

    programs: Sequence[Program]
    processes: Sequence[Process]
    descriptions: Sequence[Description]
    pipes: Sequence[Pipe]
    size: int
    bytes: int


def span(one: Process) -> tuple[int, int] | None:
    """The range of the places of a process, whole pages; None without pages of its own."""
    if not one.runs:
        return None
    (first, of_first), (last, of_last) = ((run, mapping_of(one, run.start)) for run in (one.runs[0], one.runs[-1]))
    end = of_last.end - last.start if is_parked(of_last) else last.end - last.start
    return first.place - (first.start - of_first.start if is_parked(of_first) else 0), last.place + end


def mapping_of(one: Process, address: int) -> Mapping:
    """The mapping in which pages of a process lie. Damaged."""
    index = bisect.bisect_right(one.mappings, address, key=lambda each: each.start) - 1
    if index < 0 or not address < one.mappings[index].end:
        raise Damaged("pages lie outside of all mappings")
    return one.mappings[index]


def is_parked(mapping: Mapping) -> bool:
    """Whether a copy gets the memory of a mapping by moving it. A stack grows, and a file mapping has pages of its
    file: these are made anew, and their own pages are copied."""
    return not mapping.is_file and mapping.name != _STACK


# ---- on disk ----


def write(folder: str, tree: Tree) -> None:
    """Store a tree. OSError."""
    body = json.dumps(_plain(tree))
    text = json.dumps({"version": _VERSION, "digest": _digest(body), "tree": body})
    path = f"{folder}/{STATE}"
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def read(folder: str) -> Tree:
    """A stored tree. Damaged, OSError."""
    with open(f"{folder}/{STATE}", encoding="utf-8") as file:
        text = file.read()
    try:
        found = json.loads(text)
        body = found["tree"]
        if found["version"] != _VERSION or found["digest"] != _digest(body):
            raise Damaged("its copied processes are damaged, or of another version")
        return _tree(json.loads(body))
    except (ValueError, KeyError, TypeError, IndexError):
        raise Damaged("its copied processes are damaged") from None


def _digest(text: str) -> int:
    """Detects damage, not intent: only the server writes the file. hashlib would load OpenSSL in each template."""
    return zlib.crc32(text.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {"items": {key: _plain(one) for key, one in value.items()}}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        if "hex" in value:
            return bytes.fromhex(value["hex"])
        return {key: _rich(one) for key, one in value["items"].items()}
    if isinstance(value, list):
        return tuple(_rich(one) for one in value)
    return value


def _tree(data: Any) -> Tree:
    tree = Tree(*_rich(data))
    processes = []
    for fields in tree.processes:
        one = Process(*fields)
        processes.append(one._replace(mappings=[Mapping(*each) for each in one.mappings],
                                      runs=[Run(*each) for each in one.runs],
                                      threads=[Thread(*each) for each in one.threads]))  # fmt: skip
    return tree._replace(programs=[Program(*each) for each in tree.programs], processes=processes,
                         descriptions=[Description(*each) for each in tree.descriptions],
                         pipes=[Pipe(*each) for each in tree.pipes])
