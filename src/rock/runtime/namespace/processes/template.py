"""A template: a fork of the launcher that holds the memory of copied processes, and starts copies of them.

    launcher ── fork ──► template ── ptrace, process_vm_readv ◄── the processes of a sandbox        (take)
                            └── clone ──► processes of other sandboxes, which share its memory     (start)

It has one snapshot, serves one request after the other, and ends with its socket or with the launcher. When it ends,
the processes that it has stopped continue, and those that it is building end. Another template reads the same state
from the folder of the snapshot. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as Dictionary
from typing import Any

from rock.guest.init.link import pack, receive_packet, unpack
from rock.runtime.namespace.launcher import kernel, ptrace, seccomp, switch
from rock.runtime.namespace.processes import capture, injected, rebuild, starting, state, traced
from rock.runtime.namespace.processes.address_space import Mapping, TooMany
from rock.runtime.namespace.processes.capture import Reserved
from rock.runtime.namespace.processes.inventory import MOST_PROCESSES

_PATIENCE = 10.0  # seconds in which the state and the pages have to be taken while the processes are stopped
_LONG_PATIENCE = 300.0  # seconds in which the pages have to be taken while the processes continue
_REAPED_WITHIN = 5.0  # seconds
_WALL = 0x40000000
_BUFFER = 1 << 17
_EVENT_SEMAPHORE = 1

Switch = Callable[[dict[str, Any], Callable[[ptrace.Stopped], None]], dict[str, Any]]


class Template:
    """switch: freezes the files of a sandbox, and calls a function while its processes are stopped."""

    def __init__(self, sock: socket.socket, switch: Switch) -> None:
        self._sock = sock
        self._launcher = os.getppid()
        self._switch = switch
        self._tree: state.Tree | None = None
        self._memory: Reserved | None = None
        self._special: Sequence[Mapping] = ()
        self._tables = rebuild.Tables()
        self._taken: tuple[str, state.Tree, capture.Pages] | None = None  # not complete
        self._finished: dict[str, Any] = {}
        self._filter = seccomp.build()

    def run(self, request: dict[str, Any]) -> None:
        """Serve a first request, and then those of the socket. A start comes with descriptors, by the socket."""
        buffer = bytearray(_BUFFER)
        fds: list[int] = []
        if request["op"] == "start":
            packet, fds = receive_packet(self._sock, buffer)
            request = unpack(packet, fds)
        while True:
            reply = self._serve(request, fds)
            for fd in fds:
                os.close(fd)
            data, extra = pack({"id": request["id"], **reply})
            socket.send_fds(self._sock, [data], extra)
            for fd in extra:
                os.close(fd)
            if self._taken is not None:  # the processes continue
                self._finished = self._finish(*self._taken)
                self._taken = None
            elif self._tree is None:
                return
            packet, fds = receive_packet(self._sock, buffer)
            if not packet:
                return
            request = unpack(packet, fds)

    def _serve(self, request: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        try:
            if request["op"] == "take":
                return self._take(request)
            if request["op"] == "finish":
                return self._finished
            if self._tree is None:
                self._load(request["folder"])
            return self._start(request, fds)
        except switch.Refused as error:
            return {"refused": [str(reason) for reason in error.args]}
        except capture.Refused as error:
            return {"refused": [str(reason) for reason in error.args], "passing": error.passing}
        except (capture.TooLarge, TooMany) as error:
            return {"refused": [str(error)]}
        except (starting.Failed, state.Damaged) as error:
            return {"error": str(error), "errno": 0}
        except OSError as error:
            return {"error": str(error), "errno": error.errno or 0}

    # ---- take ----

    def _take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take processes and files of a sandbox at one moment, and the pages, or duplicates that have them."""
        taken: list[tuple[state.Tree, capture.Pages]] = []

        def between(stopped: ptrace.Stopped) -> None:
            if request["dry"]:
                capture.inspect(stopped, request["pid"], request["programs"])
                raise capture.Refused
            taken.append(capture.capture(stopped, request["pid"], request["programs"], request["most"],
                                         request["limit"], check, prepared))  # fmt: skip
            if os.getppid() != self._launcher:  # the server will not record a switch
                raise capture.Refused("the launcher has ended")

        prepared = None if request["dry"] else _prepared(request["pid"], request["most"], request["limit"])
        check = _within(_PATIENCE)
        try:
            with _lock(request["slot"]):
                reply = self._switch(request, between)
        except BaseException:
            for _, pages in taken:
                pages.let_go()
            raise
        finally:
            if prepared is not None:
                prepared.close()
        [(tree, pages)] = taken
        self._taken = request["frozen"], tree, pages
        return {**reply, "copied": len(tree.processes), "bytes": tree.bytes,
                "keys": [one.key for one in tree.programs]}

    def _finish(self, folder: str, tree: state.Tree, pages: capture.Pages) -> dict[str, Any]:
        """Read the pages of the duplicates, and store all beside the files, which are switched."""
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            pages.complete(_within(_LONG_PATIENCE))
        except injected.Vanished:
            return {"vanished": "processes of the sandbox ended the copy of its memory, or it exceeded a limit"}
        except (capture.Refused, OSError) as error:
            return {"vanished": str(error)}
        try:
            write_pages(f"{folder}/{state.PAGES}", tree, pages.memory)
            state.write(folder, tree)
        except OSError as error:
            return {"failed": error.strerror or str(error), "errno": error.errno or 0}
        self._hold(tree, pages.memory)
        return {"finished": len(tree.processes)}

    def _hold(self, tree: state.Tree, memory: Reserved) -> None:
        memory.keep_shared()
        traced.prepare_room(memory)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        self._tree, self._memory, self._special = tree, memory, rebuild.own_special()

    def _load(self, folder: str) -> None:
        """Read the state of an earlier template. Damaged, OSError."""
        tree = state.read(folder)
        memory = capture.reserve(tree.size, [(each.start, each.end) for one in tree.processes for each in one.mappings])
        memory.favour_huge([(run.place, run.place + run.end - run.start) for one in tree.processes for run in one.runs])
        read_pages(f"{folder}/{state.PAGES}", tree, memory)
        self._hold(tree, memory)

    # ---- start ----

    def _start(self, request: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        """Start copies in a sandbox. fds: the ends of the streams of `streams`, each a key and a name."""
        tree, memory = self._tree, self._memory
        assert tree is not None and memory is not None
        target = starting.Target(int(request["pid"]), int(request["start"]), list(request["cgroups"]))
        streams = {(str(key), str(name)): fd for (key, name), fd in zip(request["streams"], fds, strict=True)}
        began = time.monotonic()
        made: list[rebuild.Rebuilt] = []
        waiting: list[starting.Waiting] = []
        reading, writing = os.pipe2(os.O_CLOEXEC)
        descriptors, entrant = Descriptors(tree), starting.Entrant()
        try:
            descriptors.make(streams)
            waiting = starting.start(tree, target, descriptors.found, reading, memory.address, entrant)
            if not any(one.threads for one in tree.processes):
                entrant.end()  # its memory is released while the others are rebuilt
            for one in waiting:
                made.append(rebuild.Rebuilt(one))
            places = rebuild.Places(self._special, memory, self._filter, capture.limits(target.pid))
            for each in made:  # the kernel works for one while the table of the next is made
                each.begin(tree, places, self._tables)
            for each in made:
                each.build(memory, entrant.choose)
            entrant.close()
            for each in reversed(made):
                each.go()
            waiting = []
        finally:
            for one in waiting:
                with contextlib.suppress(OSError):
                    os.kill(one.outside, signal.SIGKILL)
            for each in made:
                each.close()
            descriptors.close()
            os.close(reading)
            os.close(writing)
            entrant.close()
            _reap([one.outside for one in waiting])
        return {"started": len(made), "seconds": time.monotonic() - began}


def _within(seconds: float) -> Callable[[], None]:
    """A function that raises Refused when the time is over."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise capture.Refused(f"the processes cannot be read in {seconds:g} s")

    return check


def _prepared(first: int, most: int, limit: int) -> capture.Prepared | None:
    """Memory for the processes below pid 1, which still run. None if it cannot be prepared: the pause is then longer,
    and a real problem is found in it."""
    try:
        pids = switch.descendants([first])
        return capture.Prepared(pids, most, first, limit) if len(pids) <= MOST_PROCESSES else None
    except (capture.TooLarge, TooMany, OSError, ValueError):
        return None


@contextlib.contextmanager
def _lock(slot: str) -> Iterator[None]:
    """Hold the lock of a switch; a server that settles an interrupted one waits for it."""
    path = f"{slot}/{switch.LOCK}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(fd)


def _reap(killed: Sequence[int]) -> None:
    """Wait for processes that ended while they were traced. killed: those that end now: pid 1 of their sandbox cannot
    end before they are reaped."""
    left, end = set(killed), time.monotonic() + _REAPED_WITHIN
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG | _WALL)[0]:
                pass
        for pid in list(left):
            try:
                found, status = os.waitpid(pid, os.WNOHANG | _WALL)
            except ChildProcessError:  # it is reaped, or was never traced
                left.discard(pid)
                continue
            if found and not os.WIFSTOPPED(status):
                left.discard(pid)
        if not left or time.monotonic() > end:
            return
        time.sleep(0.001)


class Descriptors:
    """Open file descriptions that copies get from this process: streams, pipes and events. found: by index."""

    def __init__(self, tree: state.Tree) -> None:
        self._tree = tree
        self.found: dict[int, int] = {}
        self._own: list[int] = []

    def make(self, streams: Dictionary[tuple[str, str], int]) -> None:
        """streams: the ends of pipes to pid 1, by key and name. Failed, OSError."""
        ends: dict[tuple[int, bool], int] = {}
        for index, one in enumerate(self._tree.descriptions):
            if one.kind == "stream":
                if one.stream not in streams:
                    raise starting.Failed(f"pid 1 has no stream {one.stream[1]} of {one.stream[0]!r}")
                self._add(index, self._opened(streams[one.stream], one.flags))
                self._fill_stream(one.pipe, streams[one.stream], ends)
            elif one.kind == "pipe":
                if one.pipe not in ends:
                    reading, writing = os.pipe2(os.O_CLOEXEC)
                    self._own += [reading, writing]
                    ends[one.pipe[0], True], ends[one.pipe[0], False] = reading, writing
                    self._fill(one.pipe[0], writing)
                self._add(index, self._opened(ends[one.pipe], one.flags))
            elif one.kind == "socket":
                if one.pipe not in ends:
                    pair = socket.socketpair(socket.AF_UNIX, one.value)
                    ends[one.pipe[0], True], ends[one.pipe[0], False] = (each.detach() for each in pair)
                    self._own += [ends[one.pipe[0], True], ends[one.pipe[0], False]]
                os.set_blocking(ends[one.pipe], not one.flags & os.O_NONBLOCK)
                self._add(index, ends[one.pipe])
            elif one.kind == "event":
                flags = os.EFD_CLOEXEC | (one.flags & os.O_NONBLOCK) | (one.flags & _EVENT_SEMAPHORE)
                fd = os.eventfd(0, flags)
                self._own.append(fd)
                if one.value:
                    os.eventfd_write(fd, one.value)
                self._add(index, fd)

    def _add(self, index: int, fd: int) -> None:
        self.found[index] = fd

    def _opened(self, fd: int, flags: int) -> int:
        """A description of its own for the same end of a pipe, with these flags."""
        made = os.open(f"/proc/self/fd/{fd}", flags & (os.O_ACCMODE | os.O_NONBLOCK) | os.O_NONBLOCK | os.O_CLOEXEC)
        self._own.append(made)
        os.set_blocking(made, not flags & os.O_NONBLOCK)
        return made

    def _fill_stream(self, pipe: tuple[int, bool], fd: int, ends: dict[tuple[int, bool], int]) -> None:
        """Write into the pipe of a stream what the program had not read, once."""
        if pipe[1] and pipe not in ends:
            ends[pipe] = fd
            writing = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                self._fill(pipe[0], writing)
            finally:
                os.close(writing)

    def _fill(self, index: int, writing: int) -> None:
        pipe = self._tree.pipes[index]
        if pipe.capacity:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, pipe.capacity)
        if pipe.content:
            os.set_blocking(writing, False)
            if os.write(writing, pipe.content) != len(pipe.content):
                raise starting.Failed("the content of a pipe does not fit")

    def close(self) -> None:
        for fd in self._own:
            os.close(fd)
        self._own.clear()


# ---- pages on disk ----


def write_pages(path: str, tree: state.Tree, memory: Reserved) -> None:
    """Write the pages to a sparse file. OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for one in tree.processes:
            for run in one.runs:
                view, place = memory.view(run.place, run.end - run.start), run.place
                while view:
                    count = os.pwrite(fd, view, place)
                    view, place = view[count:], place + count
        os.ftruncate(fd, max(tree.size, 1))
    finally:
        os.close(fd)


def read_pages(path: str, tree: state.Tree, memory: Reserved) -> None:
    """Read the pages of `write_pages`. Damaged, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != max(tree.size, 1):
            raise state.Damaged("the memory of its copied processes is incomplete")
        for one in tree.processes:
            for run in one.runs:
                view, place = memory.view(run.place, run.end - run.start), run.place
                while view:
                    count = os.preadv(fd, [view], place)
                    if not count:
                        raise state.Damaged("the memory of its copied processes is incomplete")
                    view, place = view[count:], place + count
    finally:
        os.close(fd)


def main(sock: socket.socket, request: dict[str, Any], kept: Sequence[int], switch: Switch) -> None:
    """Entry of a fork of the launcher; never returns. kept: the descriptors that it uses beside the socket."""
    try:
        # It completes a switch also when the launcher ends meanwhile: an injected call must not be left half-way.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _close_all_but({sock.fileno(), 1, 2, *kept} - {-1})
        sock.setblocking(True)
        kernel.set_name(b"rock-template")
        Template(sock, switch).run(request)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"template: {error!r}\n".encode())
            sock.send(json.dumps({"id": request["id"], "error": f"template: {error!r}", "errno": 0}).encode())
    finally:
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    last = -1
    for fd in sorted(kept):
        if fd > last + 1:
            os.closerange(last + 1, fd)
        last = fd
    kernel.close_from(last + 1)
