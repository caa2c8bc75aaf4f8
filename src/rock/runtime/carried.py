"""One descriptor of a carried sandbox: what was given out, our end of it, and the bytes between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

from rock.guest import carrying
from rock.guest.carrying import frame

if TYPE_CHECKING:
    from rock.runtime.carrier import Carrier

_LARGEST_FILE = 16 << 30


class Channel:
    """A file: its content comes whole before it is given out, or goes whole when that is asked for.

    ours, theirs: two descriptors; the second is given out.
    """

    def __init__(self, carrier: Carrier, number: int, kind: bytes, ours: int, theirs: int) -> None:
        self.number = number
        self.kind = kind
        self.given = os.fstat(theirs).st_ino
        self.complete = False
        self.failure = 0
        self._carrier = carrier
        self._ours = ours
        self._theirs = theirs
        self._size = 0
        self._credit = carrying.WINDOW
        self._changed = asyncio.Event()

    def give(self) -> int:
        """The descriptor for the others; theirs from now on."""
        if self.kind == carrying.CONTENT:
            fd = os.open(f"/proc/self/fd/{self._theirs}", os.O_RDONLY | os.O_CLOEXEC)  # with a place of its own in it
            self.drop()
            return fd
        fd, self._theirs = self._theirs, -1
        return fd

    def take(self, data: bytes) -> None:
        self._size += len(data)
        if self.kind != carrying.CONTENT or self._size > _LARGEST_FILE:
            raise ValueError("content that nobody asked for")
        view = memoryview(data)
        while view:
            view = view[os.write(self._ours, view):]
        self._carrier.send(frame(carrying.CREDIT, self.number, struct.pack(">I", len(data))))

    def ended(self, failure: int) -> None:
        self.complete, self.failure = True, failure
        self._changed.set()
        self._carrier.forget(self)

    def gone(self) -> None:
        """The other side takes no more."""

    def allow(self, size: int) -> None:
        self._credit = min(self._credit + size, carrying.WINDOW)
        self._changed.set()

    def arm(self) -> None:
        """Wait for what can be done now."""

    async def carry(self) -> int:
        """Carry what was written inside; answers the number of what went wrong there, 0 for nothing."""
        at = 0
        while not self.complete:
            if self._credit <= 0 or self._carrier.full:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self._changed.wait()
                continue
            data = os.pread(self._ours, min(self._credit, carrying.MOST), at)
            if not data:
                break
            self._credit -= len(data)
            at += len(data)
            self._carrier.send(frame(carrying.DATA, self.number, data))
            await asyncio.sleep(0)
        self._carrier.send(frame(carrying.END, self.number))
        while not self.complete:
            self._changed.clear()
            await self._changed.wait()
        return self.failure

    def _close_ours(self) -> None:
        fd, self._ours = self._ours, -1
        if fd >= 0:
            os.close(fd)
        self._carrier.forget(self)

    def drop(self) -> None:
        """Close what was not given out. Idempotent."""
        self._close_ours()
        fd, self._theirs = self._theirs, -1
        if fd >= 0:
            os.close(fd)


class Pump(Channel):
    """A pipe, a connection or a terminal: bytes as they come, in one direction or both."""

    def __init__(self, carrier: Carrier, number: int, kind: bytes, ours: int, theirs: int) -> None:
        super().__init__(carrier, number, kind, ours, theirs)
        both = kind in (carrying.SOCKET, carrying.TERMINAL)
        self._comes = both or kind == carrying.READ
        self._goes = both or kind == carrying.WRITE
        self._waiting = bytearray()  # from inside, not yet taken
        self._owed = carrying.WINDOW  # bytes that may still come without our word
        self._ending = False
        self._reading = self._writing = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(ours, False)
        os.set_blocking(theirs, False)
        self.arm()

    def take(self, data: bytes) -> None:
        self._owed -= len(data)
        if not self._comes:
            return
        if self._owed < 0 or not data:
            raise ValueError("more bytes than there was room for")
        self._waiting += data
        self._write()

    def ended(self, failure: int) -> None:
        self._ending = True
        self._write()

    def gone(self) -> None:
        self._goes = False
        self._settle()

    def allow(self, size: int) -> None:
        super().allow(size)
        self.arm()

    def arm(self) -> None:
        if self._ours < 0:
            return
        reading = self._goes and self._credit > 0 and not self._carrier.full
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._ours, self._read)
            else:
                self._loop.remove_reader(self._ours)
        writing = bool(self._waiting)
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._ours, self._write)
            else:
                self._loop.remove_writer(self._ours)

    def _read(self) -> None:
        try:
            data = os.read(self._ours, min(self._credit, carrying.MOST))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._credit -= len(data)
            self._carrier.send(frame(carrying.DATA, self.number, data))
            self.arm()
            return
        self._goes = False
        self._carrier.send(frame(carrying.END, self.number))
        if self.kind == carrying.TERMINAL:  # closed by those who have it: nothing of it is wanted any more
            self._comes = False
            self._waiting.clear()
        self._settle()

    def _write(self) -> None:
        taken = 0
        while self._waiting and self._ours >= 0:
            try:
                size = os.write(self._ours, memoryview(self._waiting)[: 64 << 10])
            except BlockingIOError:
                break
            except OSError:  # nobody reads it any more
                self._waiting.clear()
                if self._comes and not self._ending:
                    self._carrier.send(frame(carrying.GONE, self.number))
                self._comes = False
                break
            del self._waiting[:size]
            taken += size
        if taken and not self._ending:
            self._owed += taken
            self._carrier.send(frame(carrying.CREDIT, self.number, struct.pack(">I", taken)))
        if self._ending and not self._waiting:
            self._comes = False
            if self.kind == carrying.TERMINAL:
                self._goes = False
            elif self.kind == carrying.SOCKET and self._ours >= 0:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._ours)) as sock:
                    sock.shutdown(socket.SHUT_WR)
        self._settle()

    def _settle(self) -> None:
        if self._comes or self._goes or self._waiting:
            self.arm()
        else:
            self._close_ours()  # theirs may not have been given out yet

    def _close_ours(self) -> None:
        if self._ours >= 0:
            self._loop.remove_reader(self._ours)
            self._loop.remove_writer(self._ours)
        super()._close_ours()
