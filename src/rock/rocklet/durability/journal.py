"""The journal of a sandbox: a file with the beginning and the response of each request that has an idempotency key.

A line is written when such a request begins, and another with its response when it has ended. Like spool files, the
journal is written to the page cache and not synced: see docs/decisions/0018-spool.md. Each line ends with its checksum,
and the marks beside the journal (checksums.py) hold its size and the keys that began: docs/decisions/0032-checksums.md.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import orjson

from rock.errors import Conflict, from_wire
from rock.http.asgi import Answer, failure
from rock.rocklet.durability import checksums
from rock.rocklet.durability.spool import SpoolFile, SpoolFolder
from rock.runtime.base import CLOCK
from rock.settings import RECONNECT_TIMEOUT

log = logging.getLogger("rock.node")

_SIZE = 1 << 20  # bytes of a journal above which old entries are dropped
_KEPT = 256 << 10  # bytes of responses that are retained then
_LARGEST = 4 << 20  # largest response in bytes that is stored for a repeated request after a crash
_SUM = b',"crc":"'  # the text before the checksum of a line
_SUM_LENGTH = len(_SUM) + 8 + len(b'"}')
_MOMENT = 0.05  # seconds that a line may wait for the next one, when its content can be found out without it


class Journal:
    """The requests of a sandbox that have keys. `begun`: requests without a response yet, by place.

    Responses are not in memory here; `IdempotentCalls` holds them until a crash. `found` is the content that an earlier
    rocklet process left.
    """

    def __init__(self, folder: SpoolFolder) -> None:
        self._folder = folder
        self.begun: dict[str, dict[str, Any]] = {}
        self._found: OrderedDict[str, Answer] = OrderedDict()
        self._resumed: dict[str, asyncio.Task[Answer | None]] = {}
        self.damage: str | None = None  # the damage of the files of an earlier rocklet process
        self._unknown: set[int] = set()  # requests that began and are not in the journal, see checksums.digest
        self._refused_until = 0.0  # time until which an unknown key may be one that began
        self._settling = False
        self._size = 0
        self._reached = 0  # size of the file in bytes
        self._checksum = 0  # checksum of the whole file
        self._most = _SIZE  # bytes above which the journal is compacted
        self._waiting = b""  # lines that are written with the next one, or after a moment
        self._received: set[str] = set()  # places of requests whose program received its input, after these lines
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # ---- spool files of the folder ----

    def file(self, name: str) -> SpoolFile:
        """Open the spool file of that name. OSError."""
        self._check_open()
        return self._folder.file(name)

    def borrow(self) -> SpoolFile:
        """An unused spool file. OSError."""
        self._check_open()
        return self._folder.borrow()

    def give_back(self, spool: SpoolFile) -> None:
        if self._closed:  # the folder belongs to another sandbox by now
            spool.close()
        else:
            self._folder.give_back(spool)

    def close_files(self) -> None:
        """Close the descriptors of the folder until the next use."""
        if not self._closed:
            self.flush()
            self._folder.rest()

    def sweep(self) -> None:
        """Remove the spool files of programs of an earlier rocklet process that have no request in progress."""
        self._folder.sweep({name for entry in self.begun.values() for name, _ in entry.get("spools", ())})

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the journal is closed")

    # ---- writing ----

    def begin(self, place: str | None, **entry: Any) -> None:
        """A request is about to be executed. Requests without a key are not recorded: no client can ask for them
        again."""
        if place is not None:
            self.begun[place] = entry
            self._append({"begin": place, **entry}, checksums.BEGAN, place)

    def written(self, place: str, *, found: bool = False) -> None:
        """The program has received all of its input. found: its pipe shows the same, for a moment."""
        if place in self.begun:
            self.begun[place]["written"] = True
            if found and not self._closed:
                self._received.add(place)  # its end mostly follows in time, which makes the line redundant
                self._wait()
            else:
                self._append({"written": place})

    def forget(self, place: str) -> None:
        """Drop a request that was not executed after all."""
        if self.begun.pop(place, None) is not None:
            self._append({"forget": place}, checksums.FORGOTTEN, place)

    def not_begun(self, place: str) -> Answer | None:
        """Drop a request of an earlier rocklet process that seems not to have begun. When the journal is damaged, the
        request may have begun; its key is then a Conflict."""
        if self.damage is None:
            self.forget(place)
            return None
        reply = failure(self._unsure())
        self.finish(place, reply)
        return reply

    def finish(self, place: str | None, reply: Answer, *, found: bool = False) -> None:
        """A request has its response. found: the spool files show the same, until the next request begins."""
        if place is None or self.begun.pop(place, None) is None:
            return
        if self._settling:
            self._found[place] = reply
        self._received.discard(place)
        line: dict[str, Any] = {"end": place, "status": reply.status}
        if len(reply.body) > _LARGEST:
            line["size"] = len(reply.body)
        else:
            line["body"] = _text(reply.body)
        self._append(line, wait=found)
        if self._size > self._most and not self._closed:
            self._drop_old()

    def flush(self) -> None:
        """Write the waiting lines. Call this before an operation after which the spool files would mix old and new
        data."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._encode_received()
        if self._waiting:
            data, self._waiting = self._waiting, b""
            self._write(data)

    def _encode_received(self) -> None:
        while self._received:
            data = _encoded({"written": self._received.pop()})
            self._size += len(data)
            self._waiting += data

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_MOMENT, self._moment_over)

    def _append(
        self, line: Mapping[str, Any], what: int = checksums.OTHER, place: str | None = None, *, wait: bool = False
    ) -> None:
        if self._closed:
            return  # the sandbox is gone
        if self._received:
            self._encode_received()
        data = _encoded(line)
        self._size += len(data)
        if wait:
            self._waiting += data
            self._wait()
            return
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        self._write(data, what, 0 if place is None else checksums.digest(place))

    def _moment_over(self) -> None:
        self._timer = None
        self.flush()

    def _write(self, data: bytes, what: int = checksums.OTHER, request: int = 0) -> None:
        try:
            fd = self._folder.journal()
            done = os.write(fd, data)
            if done != len(data):
                data = data[:done] + b"\n"[:os.write(fd, b"\n")]
        except OSError as error:
            data = b""
            log.warning("%s: %s; a retry after a kill of the server now may get a Conflict", self._folder.path, error)
        self._reached += len(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._folder.marks.entry(what, request, self._reached, self._checksum)

    def _drop_old(self) -> None:
        """Compact the journal: requests in progress and the newest responses are retained."""
        self.flush()
        try:
            lines = self._folder.read_journal().splitlines(keepends=True)
        except OSError as error:
            log.warning("%s: %s", self._folder.path, error)
            self._size = 0
            return
        kept: list[bytes] = []
        size = 0
        for line in reversed(lines):
            if not line.startswith(b'{"end"') or (told := _decoded(line.rstrip(b"\n"))) is None:
                continue
            if told[1]:  # the line is of a version without checksums
                line = _encoded(told[0])
            size += len(line)
            if kept and size > _KEPT:
                break
            kept.append(line)
        begun = [_encoded({"begin": p, **e}) for p, e in self.begun.items()]
        refused = [_encoded(self._refusal())] if self._refused_until > time.monotonic() else []
        data = b"".join([*refused, *reversed(kept), *begun])
        try:
            self._folder.replace_journal(data)
        except OSError as error:
            log.warning("%s: %s", self._folder.path, error)
            self._size = 0  # the next attempt follows after the same number of bytes
            return
        self._size = self._reached = len(data)
        self._checksum = zlib.crc32(data)
        self._folder.marks.entry(checksums.OTHER, 0, self._reached, self._checksum)
        self._most = max(_SIZE, 2 * len(data))  # requests in progress may be large, and are not rewritten each time

    # ---- recovery ----

    def load(self, expected: bool = False) -> None:
        """Read the journal of an earlier rocklet process, and compare it with its marks. expected: marks must exist."""
        self._settling = True
        found = data = None
        faults: list[str] = []
        try:
            found = self._folder.read_marks()
            data = self._folder.read_journal()
        except FileNotFoundError:
            pass
        except OSError as error:
            faults.append(f"it cannot be read: {error.strerror}")
        data = data or b""
        known = found is not None and found.exists
        size, checksum = found.journal if found is not None and found.journal is not None else (0, 0)
        if len(data) < size:
            faults.append(f"{size - len(data)} of {size} bytes are missing")
        elif zlib.crc32(data[:size]) != checksum:
            faults.append("its content is not what was written")
        damaged, old = self._read_lines(data, size)
        if damaged:
            faults.append(f"{damaged} entries are damaged")
        torn = bool(faults) or not data
        if known and found is not None and found.damaged:
            faults.append("its marks are damaged")
        if not known and (expected or (data and not old)):
            faults.append("its marks are missing")
        if found is not None:
            self._unknown = found.began - {checksums.digest(place) for place in (*self.begun, *self._found)}
        self._size = self._reached = len(data)
        self._checksum = zlib.crc32(data)
        if faults:
            self.damage = "; ".join(faults)
            log.error("the journal %s is damaged: %s", self._folder.path, self.damage)
            self._folder.set_aside("journal", "marks")
            if torn and (not known or (found is not None and found.damaged)):  # it is unknown which keys began
                self._refused_until = time.monotonic() + RECONNECT_TIMEOUT
                if not data:
                    self._append(self._refusal())
        if data and (faults or old or len(data) > size):
            self._drop_old()  # half a line at its end would spoil the next one
        if not known or (found is not None and found.damaged):
            # The next damage may be the journal's: then the marks have to tell which keys began.
            for place in [*self._found, *self.begun][-checksums.ENTRIES // 2:]:
                self._folder.marks.entry(checksums.BEGAN, checksums.digest(place), self._reached, self._checksum)

    def _read_lines(self, data: bytes, size: int) -> tuple[int, bool]:
        """(number of damaged lines, whether some are of a version without checksums). size: marked bytes."""
        damaged, old, at = 0, False, 0
        for text in data.splitlines(keepends=True):
            at += len(text)
            told = _decoded(text.rstrip(b"\n"))
            if told is None:
                # A partial line after the marked bytes: its request was not begun.
                damaged += text.endswith(b"\n") or at <= size
                continue
            line = told[0]
            old |= told[1]
            if (place := line.pop("begin", None)) is not None:
                if line.get("kind") == "run":
                    self._supersede(line.get("session"))
                self.begun[place] = line
            elif (until := line.get("refused")) is not None:
                left = min(float(until) - time.clock_gettime(CLOCK), RECONNECT_TIMEOUT)
                self._refused_until = time.monotonic() + left if left > 0 else 0.0
            elif (place := line.get("written")) is not None:
                if place in self.begun:
                    self.begun[place]["written"] = True
            elif (place := line.get("forget")) is not None:
                self.begun.pop(place, None)
            elif (place := line.get("end")) is not None:
                self.begun.pop(place, None)
                self._found[place] = _answer_of(line)
        return damaged, old

    def _supersede(self, session: Any) -> None:
        """A session runs one command at a time. When its next one begins, those without an end have ended: their ends
        are damaged, and the output after theirs belongs to others."""
        for entry in self.begun.values():
            if entry.get("kind") == "run" and entry.get("session") == session:
                entry["superseded"] = True

    def settled(self) -> None:
        """What a former rocklet left half done was looked at: from now on answers are those of this one. A request
        that it began and that nobody goes on with is never begun again."""
        for place in [place for place in self.begun if place not in self._resumed]:
            self.finish(place, failure(self._unsure()))
        self._settling = False

    def resume(self, place: str, task: asyncio.Task[Answer | None]) -> None:
        """A request of an earlier rocklet process is being completed. None: it was never begun."""
        self._resumed[place] = task

    async def known(self, place: str | None) -> Answer | None:
        """The response to a request that an earlier rocklet process began; None for one that has to be executed."""
        if place is None:
            return None
        task = self._resumed.get(place)
        if task is not None:
            return await asyncio.shield(task)
        found = self._found.get(place)
        if found is None and (self._unknown or self._refused_until) and self._may_have_begun(place):
            return failure(self._unsure())
        return found

    def _may_have_begun(self, place: str) -> bool:
        """Whether an earlier rocklet process began a request that the journal does not contain."""
        if place in self.begun:
            return False  # it was begun by this process
        return checksums.digest(place) in self._unknown or time.monotonic() < self._refused_until

    def _unsure(self) -> Conflict:
        """For the key of a request that may have been executed: it is never started again."""
        why = f"the journal of its sandbox is damaged ({self.damage})" if self.damage else "its answer was not kept"
        left = self._refused_until - time.monotonic()
        when = f" after {left:.0f} s" if left > 0 else ""
        return Conflict(
            f"a request with this key may have been carried out before the server was started again: {why}",
            hint=f"look what it did; send it with a new key{when} to run it again. rock doctor store tells more",
            details={"damaged": "journal"} if self.damage else None,
        )

    def _refusal(self) -> dict[str, Any]:
        """The line that tells the rocklet after this one how long keys are refused."""
        return {"refused": time.clock_gettime(CLOCK) + self._refused_until - time.monotonic()}

    async def let_go(self) -> None:
        """Leave unfinished requests to the next rocklet process."""
        for task in self._resumed.values():
            task.cancel()
        await asyncio.gather(*self._resumed.values(), return_exceptions=True)

    async def close(self) -> None:
        """Stop all writing. The folder stays open, because it belongs to the caller."""
        await self.let_go()
        self.flush()
        self._closed = True


def _encoded(line: Mapping[str, Any]) -> bytes:
    """A line with its checksum as its last member, so that it stays JSON."""
    data = orjson.dumps(line)
    return b'%b%b%08x"}\n' % (data[:-1], _SUM, zlib.crc32(data))


def _decoded(text: bytes) -> tuple[dict[str, Any], bool] | None:
    """(a line, whether it is of a version without checksums); None for a damaged one."""
    old = text[-_SUM_LENGTH:-10] != _SUM
    try:
        if not old and (text[-2:] != b'"}' or int(text[-10:-2], 16) != zlib.crc32(text[:-_SUM_LENGTH] + b"}")):
            return None
        line = orjson.loads(text if old else text[:-_SUM_LENGTH] + b"}")
    except ValueError:
        return None
    return (line, old) if isinstance(line, dict) and "crc" not in line else None


def verify(data: bytes) -> int:
    """The number of damaged lines of a journal."""
    return sum(_decoded(line.rstrip(b"\n")) is None for line in data.splitlines(keepends=True))


def _text(body: bytes) -> Any:
    """Bytes as JSON: a response usually is text already."""
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
