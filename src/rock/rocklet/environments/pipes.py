"""The pipes between the rocklet and guest/environments/host.py, and the start of that program, without threads."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import zlib
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

from rock.guest.environments import frames, host
from rock.guest.environments.frames import HEAD, HEADER, LIMIT
from rock.images.host import PYTHON_LIBRARIES
from rock.rocklet.commands.output import Reader
from rock.runtime.base import Process, Program

with contextlib.suppress(ImportError):  # Windows, where only the fake runtime runs
    import fcntl

_READ = 1 << 15  # a larger buffer costs the kernel a mapping for each read
_LARGE = 32 << 10  # the pipe is enlarged for a frame of this size or more
_PIPE = 1 << 20
_STDERR_KEPT = 8192

class PipeWriter:
    """Writes messages to a pipe, and buffers data until the pipe accepts it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._watching = False

    def send(self, stream: int, message: bytes) -> None:
        """Write a message. A closed pipe is no error here: the reader side reports the end of the host."""
        if not self._waiting and len(message) <= frames.PIECE:
            piece = HEADER.pack(len(message), frames.FIRST | frames.LAST, stream) + message
            try:
                os.write(self._fd, piece)
            except BlockingIOError:
                self._waiting.append(piece)
                self._write()
            except OSError:
                return
            return
        idle = not self._waiting
        self._waiting.extend(frames.pieces(stream, message))
        if idle:
            self._write()

    def _write(self) -> None:
        """Write one piece, small enough that the kernel accepts it completely or not at all."""
        while self._waiting:
            try:
                os.write(self._fd, self._waiting[0])
            except BlockingIOError:
                if not self._watching:
                    self._watching = True
                    asyncio.get_running_loop().add_writer(self._fd, self._write)
                return
            except OSError:
                self._waiting.clear()
                break
            self._waiting.popleft()
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            asyncio.get_running_loop().remove_writer(self._fd)

    def drop(self) -> None:
        """Drop the buffered data and the descriptor."""
        self._waiting.clear()
        self._unwatch()


class SharedPipeReader:
    """Reads messages from the pipe that all environments share, from the reply to the greeting on: an earlier rocklet
    process may have read half of a message.

    token: the content of the greeting. answered: called with each frame; its exceptions count as invalid data too.
    ended: called once, with None at the end of the pipe, or with a description of the invalid data.
    """

    def __init__(self, fd: int, answered: Callable[[bytes], None], ended: Callable[[str | None], None]) -> None:
        self.token = secrets.token_hex(16)
        self._fd = fd
        self._answered = answered
        self._ended = ended
        self._joiner = frames.Joiner()
        self._seeking: bytes | None = b'{"hello": "' + self.token.encode()
        self._seen = bytearray()
        asyncio.get_running_loop().add_reader(fd, self._read)

    def forget(self, stream: int) -> None:
        """Drop the incomplete message of a stream that has ended."""
        self._joiner.forget(stream)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.stop()
            self._ended(None)
            return
        if self._seeking is not None:
            data = self._found(data, self._seeking)
        try:
            for _, message in self._joiner.feed(data):
                self._answered(message)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.stop()
            self._ended(f"{type(error).__name__}: {error}")

    def _found(self, data: bytes, sought: bytes) -> bytes:
        before = HEADER.size + HEAD.size
        self._seen += data
        place = self._seen.find(sought)
        if place < before:
            del self._seen[: -(len(sought) + before)]
            return b""
        found = bytes(self._seen[place - before :])
        self._seeking = None
        self._seen.clear()
        return found


class FrameReader:
    """Reads whole frames from the pipe that one environment has for its responses.

    answered: called with each frame, which the callee owns. nonsense: called with a description of invalid data; no
    more frames are read until `seek` or `drain`.
    """

    def __init__(self, fd: int, answered: Callable[[bytearray], None], nonsense: Callable[[str], None]) -> None:
        self._fd = fd
        self._answered = answered
        self._nonsense = nonsense
        self._seeking: bytes | None = None
        self._buffer = bytearray()  # less than a frame, or the space of one
        self._filled: int | None = None  # how much of the space is filled
        self._deaf = False
        self._large = False
        self.start()

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def seek(self, token: bytes) -> None:
        """Skip all data up to the end of this token, and clear the error state."""
        self._deaf = False
        self._seeking = token
        self._buffer.clear()
        self._filled = None

    def drain(self) -> None:
        """Read the available data, and drop an incomplete frame, which will not be completed."""
        while self._read():
            pass
        self._seeking = None
        self._buffer = bytearray()
        self._filled = None
        self._deaf = False

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)

    def _read(self) -> bool:
        try:
            if self._filled is not None:
                return self._fill(self._filled)
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.stop()  # the host has ended, which the end of its shared pipe reports
            return False
        if not self._deaf:
            self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        self._buffer += data
        if self._seeking is not None:
            place = self._buffer.find(self._seeking)
            if place < 0:
                del self._buffer[: -len(self._seeking)]
                return
            del self._buffer[: place + len(self._seeking)]
            self._seeking = None
        while len(self._buffer) >= HEAD.size:
            length = HEAD.size + int.from_bytes(self._buffer[:4], "big")
            if length == len(self._buffer):
                frame, self._buffer = self._buffer, bytearray()
                self._tell(frame)
                return
            if length > HEAD.size + LIMIT:
                self._refuse(f"a frame of {length} bytes is over the limit of {LIMIT}")
                return
            if length > len(self._buffer):
                if length > _LARGE:
                    self._make_room(length)
                return
            frame = self._buffer[:length]
            del self._buffer[:length]
            self._tell(frame)

    def _make_room(self, length: int) -> None:
        if not self._large:
            self._large = True
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE)
        self._filled = len(self._buffer)
        room = bytearray(length)
        room[: self._filled] = self._buffer
        self._buffer = room

    def _fill(self, filled: int) -> bool:
        length = len(self._buffer)
        with memoryview(self._buffer) as room:
            while filled < length:
                with room[filled:] as rest:
                    got = os.readv(self._fd, [rest])
                if not got:
                    self.stop()
                    return False
                filled += got
                self._filled = filled
        if filled == length:
            frame, self._buffer = self._buffer, bytearray()
            self._filled = None
            self._tell(frame)
        return True

    def _tell(self, frame: bytearray) -> None:
        try:
            self._answered(frame)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._refuse(f"{type(error).__name__}: {error}")

    def _refuse(self, why: str) -> None:
        self._deaf = True
        self._buffer = bytearray()
        self._nonsense(why)


class OutputTail:
    """The last lines of output of a program."""

    def __init__(self, fd: int | None) -> None:
        self._kept = b""
        self._reader = None if fd is None else Reader(fd, self._add)

    @property
    def text(self) -> str:
        return self._kept.decode(errors="replace").strip()

    def _add(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-_STDERR_KEPT:]

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.close()


# ---- the host program ----

_ENVIRONMENT = {
    "LANG": "C.UTF-8", "HOME": "/tmp", "MPLCONFIGDIR": "/tmp",
    # Some environments iterate over sets of words. With this variable a seed gives the same episode in every process.
    "PYTHONHASHSEED": "0", "PYTHONPATH": "",
    # A Python that is built with a shared library finds it by its own path, which differs inside. Without this variable
    # it would load the machine's library of the same name, whose modules are incompatible.
    "LD_LIBRARY_PATH": PYTHON_LIBRARIES,
    # Threads do not survive a fork.
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMEXPR_NUM_THREADS": "1",
}  # fmt: skip
_MODULES = ("values", "frames", "tasks", "spaces", "agents", "hosting", "forking", "worker", "host")
_LOADER = """import base64, json, sys, types, zlib
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed, and this is " + sys.version)
for name in ("rock", "rock.guest", "rock.guest.environments"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, text in json.loads(zlib.decompress(base64.b64decode("{packed}"))):
    sys.modules[name] = module = types.ModuleType(name)
    setattr(sys.modules["rock.guest.environments"], name.rpartition(".")[2], module)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["rock.guest.environments.tasks"] = sys.modules["rock.guest.environments.tasks"]
sys.modules["rock.guest.environments.host"].main()
"""


def program(folder: str | None, python: str, key: str, adapter: str = "") -> Program:
    """The program of the host. folder: the path of its packages inside, None for an image whose `python` has them
    itself; adapter: the adapter of a training set that guest/environments/tasks.py installs."""
    channels: dict[int, Literal["r", "w", "m"]] = dict.fromkeys((host.REQUESTS, *host.PIPES), "r")
    channels.update(dict.fromkeys((host.ANSWERS, *(pipe + host.OWN for pipe in host.PIPES)), "w"))
    channels[host.MEMORY] = "m"
    if folder is None:
        # These variables configure our Python and must not affect the Python of the image.
        own = {name: value for name, value in _ENVIRONMENT.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
        return Program([python, "-B", "-X", "utf8", "-c", source(), "", adapter], env=own, stdout="null", stderr="pipe",
                       channels=channels, key=key, keep=True)  # fmt: skip
    return Program(
        [python, "-s", "-P", "-B", "-X", "utf8", "-c", source(), f"{folder}/site", adapter],
        env={**_ENVIRONMENT, "NLTK_DATA": f"{folder}/nltk_data"}, cwd="/", stdout="null", stderr="pipe",
        channels=channels, key=key, keep=True,
    )  # fmt: skip


@cache
def source() -> str:
    """The source of the program. It is passed on the command line, so the image needs no extra file.

    It is compressed, because one argument is limited to 128 KiB.
    """
    folder = Path(host.__file__).parent
    texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES}
    modules = [(f"rock.guest.environments.{name}", text) for name, text in texts.items()]
    packed = base64.b64encode(zlib.compress(json.dumps(modules).encode(), 9)).decode()
    return _LOADER.format(packed=packed)


class HostPipes:
    """The pipes to the host."""

    def __init__(
        self,
        process: Process,
        answered: Callable[[bytes | bytearray, int | None], None],
        ended: Callable[[str | None], None],
        nonsense: Callable[[int, str], None],
    ) -> None:
        self.process = process
        self.inlet = SharedPipeReader(process.channels[host.ANSWERS], lambda frame: answered(frame, None), ended)
        self.tail = OutputTail(process.stderr)
        self.own: dict[int, FrameReader] = {}
        for pipe in host.PIPES:
            self._add(pipe, answered, nonsense)
        self.memory = _sealed(process.channels.get(host.MEMORY))
        self.egress = {pipe: PipeWriter(process.channels[pipe]) for pipe in (host.REQUESTS, *host.PIPES)}

    def _add(
        self, pipe: int, answered: Callable[[bytearray, int | None], None], nonsense: Callable[[int, str], None]
    ) -> None:
        self.own[pipe + host.OWN] = FrameReader(
            self.process.channels[pipe + host.OWN],
            lambda frame: answered(frame, pipe),
            lambda why: nonsense(pipe, why),
        )

    def stop(self) -> None:
        self.inlet.stop()
        self.tail.stop()
        for own in self.own.values():
            own.stop()
        for outlet in self.egress.values():
            outlet.drop()


def _sealed(memory: int | None) -> int | None:
    """The shared memory when its size is sealed: it comes from inside, and a truncated file would kill a process that
    maps it."""
    if memory is None:
        return None
    try:
        seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
        whole = os.fstat(memory).st_size >= len(host.PIPES) * frames.PART
    except OSError:
        return None
    return memory if whole and seals & fcntl.F_SEAL_SHRINK else None
