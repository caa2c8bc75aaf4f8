"""What was asked of a sandbox and has to outlive this process: who asked for it, and how it ended.

A file a sandbox: a line when a request with a key begins, one with its answer when it has ended. Like spool files it is
written to the page cache and not synced: see docs/decisions/0018-spool.md.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import orjson

from rock.errors import Conflict, from_wire
from rock.rocklet.spool import SpoolFile, SpoolFolder
from rock.wire.asgi import Answer, failure

log = logging.getLogger("rock.node")

_SIZE = 1 << 20  # bytes of a journal after which what nobody will ask for is dropped
_KEPT = 256 << 10  # bytes of answers that stay then
_LARGEST = 4 << 20  # bytes of an answer that is kept for whoever asks again after a crash
_MOMENT = 0.05  # seconds for which a line may wait for the next one, where what it tells can be found out without it


class Journal:
    """What was asked of a sandbox with keys. `begun`: without an answer yet, by place.

    Nothing is in memory of what has an answer: that is `Once`'s, until a crash. `found` is what a former rocklet left.
    """

    def __init__(self, folder: SpoolFolder) -> None:
        self._folder = folder
        self.begun: dict[str, dict[str, Any]] = {}
        self._found: OrderedDict[str, Answer] = OrderedDict()
        self._resumed: dict[str, asyncio.Task[Answer | None]] = {}
        self._size = 0
        self._most = _SIZE  # bytes above which it is made shorter
        self._waiting = b""  # lines that go with the next one, or in a moment
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # ---- spool files beside it ----

    def file(self, name: str) -> SpoolFile:
        """OSError."""
        self._check_open()
        return self._folder.file(name)

    def borrow(self) -> SpoolFile:
        """One that nobody uses. OSError."""
        self._check_open()
        return self._folder.borrow()

    def give_back(self, spool: SpoolFile) -> None:
        if self._closed:  # the folder is another sandbox's by now
            spool.close()
        else:
            self._folder.give_back(spool)

    def sweep(self) -> None:
        """Remove the spool files of programs that a former rocklet left, and of which nothing is begun."""
        self._folder.sweep({name for entry in self.begun.values() for name, _ in entry.get("spools", ())})

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the journal is closed")

    # ---- writing ----

    def begin(self, place: str | None, **entry: Any) -> None:
        """A request is about to be carried out. Without a key there is nobody to come back for it."""
        if place is not None:
            self.begun[place] = entry
            self._append({"begin": place, **entry})

    def written(self, place: str, *, found: bool = False) -> None:
        """The program has all of its input. found: which its pipe tells just as well, for a moment."""
        if place in self.begun:
            self.begun[place]["written"] = True
            self._append({"written": place}, wait=found)

    def forget(self, place: str) -> None:
        """It was not carried out after all."""
        if self.begun.pop(place, None) is not None:
            self._append({"forget": place})

    def finish(self, place: str | None, reply: Answer, *, found: bool = False) -> None:
        """It has an answer. found: which the spool files tell just as well, until the next request begins."""
        if place is None or self.begun.pop(place, None) is None:
            return
        line: dict[str, Any] = {"end": place, "status": reply.status}
        if len(reply.body) > _LARGEST:
            line["size"] = len(reply.body)
        else:
            line["body"] = _text(reply.body)
        self._append(line, wait=found)
        if self._size > self._most and not self._closed:
            self._drop_old()

    def flush(self) -> None:
        """Write what waits. To be called before anything happens that spool files would mix with what came before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            data, self._waiting = self._waiting, b""
            self._write(data)

    def _append(self, line: Mapping[str, Any], *, wait: bool = False) -> None:
        if self._closed:
            return  # of a sandbox that is gone
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        self._size += len(data)
        if wait:
            self._waiting += data
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_MOMENT, self._moment_over)
            return
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        self._write(data)

    def _moment_over(self) -> None:
        self._timer = None
        self.flush()

    def _write(self, data: bytes) -> None:
        try:
            fd = self._folder.journal()
            if os.write(fd, data) != len(data):
                os.write(fd, b"\n")
        except OSError as error:
            log.warning("%s: %s; its requests may be done twice if the server is killed now", self._folder.path, error)

    def _drop_old(self) -> None:
        """Keep what is begun, and the newest answers."""
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
            if not line.startswith(b'{"end"'):
                continue
            size += len(line)
            if kept and size > _KEPT:
                break
            kept.append(line)
        begun = [orjson.dumps({"begin": p, **e}, option=orjson.OPT_APPEND_NEWLINE) for p, e in self.begun.items()]
        data = b"".join([*reversed(kept), *begun])
        try:
            self._folder.replace_journal(data)
        except OSError as error:
            log.warning("%s: %s", self._folder.path, error)
            self._size = 0  # tried again after as much
            return
        self._size = len(data)
        self._most = max(_SIZE, 2 * len(data))  # what is begun may be large, and is not written anew each time

    # ---- after a restart ----

    def load(self) -> None:
        """Read what a former rocklet left."""
        try:
            data = self._folder.read_journal()
        except FileNotFoundError:
            return
        self._size = len(data)
        for text in data.splitlines():
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
        """Nothing is written any more, whoever asks. The folder stays open: it is whose it was given by."""
        await self.let_go()
        self.flush()
        self._closed = True


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
