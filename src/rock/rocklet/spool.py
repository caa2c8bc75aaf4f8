"""What of a running command has to outlive this process: who asked for it, what it wrote, how it ended.

    Journal      a file a sandbox: a line when a request with a key begins, one with its answer when it has ended
    SpoolFile    a file a stream: what a program wrote goes from its pipe to the file by one system call (splice), so
                 that kill -9 finds each byte in the one or in the other, never in neither and never in both

Both are written to the page cache and not synced: sandboxes do not outlive the machine either. See
docs/decisions/0018-spool.md.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import logging
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from rock.errors import Conflict, from_wire
from rock.rocklet.streams import Capped
from rock.wire.asgi import Answer, failure

log = logging.getLogger("rock.node")

_PORTION = 64 << 10
_JOURNAL = 1 << 20  # bytes of a journal after which what nobody will ask for is dropped
_KEPT = 256 << 10  # bytes of answers that stay then
_LARGEST = 4 << 20  # bytes of an answer that is kept for whoever asks again after a crash
_OF_PROGRAM = "x"  # what the names of programs' spool files begin with; those of sessions are hexadecimal
_FREE = 4  # spool files of a sandbox that are kept for its next programs
_HEAD = struct.Struct("<qqqq")  # token, bytes of the head, bytes dropped after it, bytes in all
_SLACK = 1 << 20
_IDLE = 1 << 20  # bytes of a spool file that is begun anew for the next command


class SpoolFile:
    """What one stream gave, of the command that runs and of some before it.

    The file has a head: of which command it is, once it had to be shortened, and what was left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = False  # the disk is full: what comes is not kept
        self._splices = True
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.end = max(_HEAD.size, os.fstat(self._fd).st_size)
        self.start = self.end
        self._short = any(os.pread(self._fd, _HEAD.size, 0))

    def begin(self, held: bytes = b"") -> int:
        """A command begins, with what came before it; answers where."""
        if self.end > _IDLE or self._short:
            self._short = False
            os.ftruncate(self._fd, 0)
            self.end = _HEAD.size
        self.broken = False
        self.start = self.end
        if held:
            self._add(held)
        return self.start

    def take(self, fd: int, limit: int) -> bytes:
        """Move what a descriptor has to the file, and answer it: what os.read does, beside."""
        if self.broken:
            return os.read(fd, min(limit, _PORTION))
        if self._splices:
            try:
                count = os.splice(fd, self._fd, min(limit, _PORTION), offset_dst=self.end)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EIO):
                    raise
                # Not a pipe, a file system that cannot, or no room for it. Nothing was taken.
                self._splices = error.errno in (errno.ENOSPC, errno.EDQUOT)
            else:
                data = os.pread(self._fd, count, self.end)
                self.end += count
                return data
        data = os.read(fd, min(limit, _PORTION))
        self._add(data)
        return data

    def _add(self, data: bytes) -> None:
        try:
            done = os.pwrite(self._fd, data, self.end)
        except OSError as error:
            done = -1
            log.warning("output is not kept for a restart: %s", error)
        if done != len(data):
            self.broken = True
        else:
            self.end += len(data)

    def keep_short(self, token: int, kept: Capped) -> None:
        """Bound the file, by what is kept of an output that is longer than that."""
        if self.size > kept.limit * 2 + _SLACK and not self.broken:
            self.shorten(token, kept)

    def shorten(self, token: int, kept: Capped) -> None:
        """Put what is kept of a long output in the place of all of it, at once."""
        head, tail = kept.parts()
        beside = self.path.with_name(f".new-{self.path.name}")
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for part in (_HEAD.pack(token, len(head), kept.total - len(head) - len(tail), kept.total), head, tail):
                if part and os.write(fd, part) != len(part):
                    raise OSError(errno.ENOSPC, "no space left")
            os.rename(beside, self.path)
        except OSError as error:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(beside)
            self.broken = True
            log.warning("output is not kept for a restart: %s", error)
            return
        os.close(self._fd)
        self._fd, self.start, self._short = fd, _HEAD.size, True
        self.end = _HEAD.size + len(head) + len(tail)

    @property
    def size(self) -> int:
        """Bytes of the command that runs."""
        return self.end - self.start

    def load(self, token: int, start: int, into: Capped) -> None:
        """Give what was kept of a command to `into`; what it writes from now on comes after that."""
        self.start = start
        head = os.pread(self._fd, _HEAD.size, 0)
        if self._short and _HEAD.unpack(head)[0] == token:
            _, first, dropped, _ = _HEAD.unpack(head)
            self.start = _HEAD.size
            data = self.read()
            into.resume(data[:first], dropped, data[first:])
        else:
            into.add(self.read())

    def read(self) -> bytes:
        """All that there is of the command that runs."""
        parts, at = [], self.start
        while part := os.pread(self._fd, min(_PORTION << 4, self.end - at), at):
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


class Journal:
    """What was asked of a sandbox with keys. `begun`: without an answer yet, by place.

    Nothing is in memory of what has an answer: that is `Once`'s, until a crash. `found` is what a former rocklet left.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun: dict[str, dict[str, Any]] = {}
        self._found: OrderedDict[str, Answer] = OrderedDict()
        self._resumed: dict[str, asyncio.Task[Answer | None]] = {}
        self._free: list[SpoolFile] = []
        self._fd = -1
        self._size = 0
        self._most = _JOURNAL  # bytes above which it is made shorter
        self._closed = False

    @property
    def _path(self) -> Path:
        return self.folder / "journal"

    def _open(self) -> int:
        if self._closed:
            raise OSError(errno.EBADF, "the journal is closed")
        if self._fd < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
        return self._fd

    def file(self, name: str) -> SpoolFile:
        """A spool file beside the journal. OSError."""
        self._open()
        return SpoolFile(self.folder / name)

    # ---- writing ----

    def begin(self, place: str | None, **entry: Any) -> None:
        """A request is about to be carried out. Without a key there is nobody to come back for it."""
        if place is not None:
            self.begun[place] = entry
            self._append({"begin": place, **entry})

    def written(self, place: str) -> None:
        """The program has all of its input."""
        if place in self.begun:
            self.begun[place]["written"] = True
            self._append({"written": place})

    def forget(self, place: str) -> None:
        """It was not carried out after all."""
        if self.begun.pop(place, None) is not None:
            self._append({"forget": place})

    def finish(self, place: str | None, reply: Answer) -> None:
        """It has an answer."""
        if place is None or self.begun.pop(place, None) is None:
            return
        line: dict[str, Any] = {"end": place, "status": reply.status}
        if len(reply.body) > _LARGEST:
            line["size"] = len(reply.body)
        else:
            line["body"] = _text(reply.body)
        self._append(line)
        if self._size > self._most and not self._closed:
            self._drop_old()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._closed:
            return  # of a sandbox that is gone
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        try:
            if os.write(self._open(), data) != len(data):
                os.write(self._fd, b"\n")
        except OSError as error:
            log.warning("%s: %s; its requests may be done twice if the server is killed now", self._path, error)
        self._size += len(data)

    def _drop_old(self) -> None:
        """Keep what is begun, and the newest answers."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            log.warning("%s: %s", self._path, error)
            self._size = 0
            return
        kept: list[bytes] = []
        size = 0
        for line in reversed(lines):
            if not line.startswith(b'{"end"'):
                continue
            size += len(line)
            if kept and size > _KEPT:
                break
            kept.append(line)
        begun = [orjson.dumps({"begin": p, **e}, option=orjson.OPT_APPEND_NEWLINE) for p, e in self.begun.items()]
        data = b"".join([*reversed(kept), *begun])
        beside = self._path.with_name(".new-journal")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
            os.rename(beside, self._path)
        except OSError as error:
            log.warning("%s: %s", self._path, error)
            self._size = 0  # tried again after as much
            return
        os.close(self._fd)
        self._fd = -1
        with contextlib.suppress(OSError):  # `_append` tells of it
            self._open()
        self._most = max(_JOURNAL, 2 * len(data))  # what is begun may be large, and is not written anew each time

    # ---- after a restart ----

    def load(self) -> None:
        """Read what a former rocklet left."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for text in lines:
            try:
                line = orjson.loads(text)
            except orjson.JSONDecodeError:
                continue  # half a line: what it was about to say did not happen
            if (place := line.pop("begin", None)) is not None:
                self.begun[place] = line
            elif (place := line.get("written")) in self.begun:
                self.begun[place]["written"] = True
            elif (place := line.get("forget")) is not None:
                self.begun.pop(place, None)
            elif (place := line.get("end")) is not None:
                self.begun.pop(place, None)
                self._found[place] = _answer_of(line)

    def read_again(self) -> None:
        """Answers that were found since `load`: of what a former rocklet had done and not said."""
        begun = dict(self.begun)
        self.load()
        self.begun = begun

    def resume(self, place: str, task: asyncio.Task[Answer | None]) -> None:
        """A request of a former rocklet is being brought to its end. None: it was never begun."""
        self._resumed[place] = task

    async def known(self, place: str | None) -> Answer | None:
        """The answer to a request that a former rocklet began; None for one that has to be carried out."""
        if place is None:
            return None
        task = self._resumed.get(place)
        if task is not None:
            return await asyncio.shield(task)
        return self._found.get(place)

    async def let_go(self) -> None:
        """What is being brought to its end is left to the rocklet after this one."""
        for task in self._resumed.values():
            task.cancel()
        await asyncio.gather(*self._resumed.values(), return_exceptions=True)

    async def close(self) -> None:
        """Nothing is written any more, whoever asks."""
        await self.let_go()
        self._closed = True
        for spool in self._free:
            spool.close()
        self._free.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- spool files of programs that have one for themselves, used again ----

    def borrow(self) -> SpoolFile:
        """A spool file that nobody uses. OSError."""
        return self._free.pop() if self._free else self.file(f"{_OF_PROGRAM}{os.urandom(6).hex()}")

    def give_back(self, spool: SpoolFile) -> None:
        if len(self._free) < _FREE and not spool.broken and not self._closed:
            self._free.append(spool)
            return
        spool.remove()

    def sweep(self) -> None:
        """Remove the spool files of programs that a former rocklet left, and of which nothing is begun."""
        named = {name for entry in self.begun.values() for name, _ in entry.get("spools", ())}
        named |= {spool.path.name for spool in self._free}
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                if name.startswith((_OF_PROGRAM, ".new-")) and name not in named:
                    (self.folder / name).unlink()


def _text(body: bytes) -> Any:
    """Bytes as JSON: an answer mostly is text already."""
    try:
        return body.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(body).decode()}


def _answer_of(line: Mapping[str, Any]) -> Answer:
    body, status = line.get("body"), int(line["status"])
    if body is None:
        return failure(Conflict(
            f"this was done before the server was started again; its answer of {line.get('size')} bytes was not kept",
            hint="look what it did; write large output to a file"))  # fmt: skip
    data = base64.b64decode(body["b64"]) if isinstance(body, dict) else body.encode()
    if status >= 400:
        return failure(from_wire(orjson.loads(data), status))
    return Answer(data, status)
