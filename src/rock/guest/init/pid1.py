"""pid 1 of a sandbox: reaps, starts programs and serves files on request. Single-threaded, standard library only.

    server ── SOCK_SEQPACKET, one JSON object a packet, descriptors by SCM_RIGHTS ──► init ── fork, exec ──► programs

A request is {"id": n, "op": name, ...}, its reply {"id": n, "ok": true, ...} or {"id": n, "error": [code, message]}. A
packet over `PACKET` bytes is {"memfd": length}, with the JSON in a memory file. Exits are reported to every connection:
{"event": "exit", "pid": n, "code": n} or "signal". Programs survive the connections.

It is forked from the launcher before the root switch, so the image needs no file of ours, or it is started as `python
-I -S pid1.py '{"listen": FD, "uid": UID}'`.
"""

from __future__ import annotations

import os
import sys

# started by its path: allow imports of rock without rock/__init__.py
if __name__ == "__main__" and "rock" not in sys.modules:
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from rock.guest.init import files, process_tree, programs, syscalls, users
from rock.guest.init.freeze import Freeze
from rock.guest.init.link import Connection, Fault, Loop, of_os_error, send_patiently
from rock.guest.init.listening import Listening, start_connection
from rock.guest.init.sharing import PageSharing

_CHILD_PATIENCE = 600.0
_MOST_CHILDREN = 64
_MOST_CONNECTIONS = 32
_STARTS = 0.005  # seconds after which it is looked again whether a program has started


class Init(Loop):
    """The state and the operations of pid 1.

    listener: the socket for servers; None when connections arrive by `adopt`.
    uid: of the server, as seen here; outside: whether the server must be outside of this pid namespace.
    """

    def __init__(self, listener: socket.socket | None, uid: int, outside: bool) -> None:
        super().__init__()
        self.listener = listener
        self.uid = uid
        self.outside = outside
        self.connections: list[Connection] = []
        self.programs: dict[int, programs.Program] = {}
        self.children: dict[int, tuple[Connection, int, float]] = {}  # pid -> requester, request id, deadline
        self.starting: dict[int, Callable[[], None]] = {}  # pid -> callback that completes its start
        self.stopping = False
        self.untold: list[dict[str, Any]] = []  # the end of the first program, when there was no connection
        self.sockets: list[int] = []  # egress sockets, served by the proxy
        self.frozen = Freeze(self._handle)
        self.listening = Listening(self, self)
        os.umask(0o022)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limits[1], self.limits[1]))

    def run(self) -> None:
        """Serve until a stop request; never returns otherwise."""
        wake_reader, wake_writer = socket.socketpair()
        wake_reader.setblocking(False)
        wake_writer.setblocking(False)
        syscalls.default_signals()
        signal.set_wakeup_fd(wake_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, _ignore)  # not SIG_IGN, which programs would inherit; exec resets a handler
        if self.listener is not None:
            self.listener.setblocking(False)
            self.watch(self.listener.fileno(), self._accept)
        self.watch(wake_reader.fileno(), lambda: self._drain(wake_reader))
        self.guard(self._reap)  # a first program may have ended already
        while not self.stopping:
            self.turn()
            self.guard(self._reap)

    def complain(self, error: BaseException) -> None:
        """Report an internal error to the server; never fails. pid 1 has no log file, because it holds nothing
        outside."""
        try:
            self.tell({"event": "complaint", "text": repr(error)[:1000]})
        except Exception:
            pass

    @staticmethod
    def _drain(sock: socket.socket) -> None:
        try:
            while sock.recv(4096):
                pass
        except BlockingIOError:
            pass

    def share(self, sweep: PageSharing, pages: int) -> None:
        """Release unchanged memory pages after each period of work. `pages`: the descriptor of the own page table."""

        def rest() -> None:
            if not self.starting:  # otherwise a child before exec may write to this memory
                sweep.run(pages)

        self.rest = rest

    def take_over(self, pid: int, held: list[int], connection: int, watching: bool) -> None:
        """Take over what was started before there was work: the session's shell (a negative pid: it did not start), the
        descriptors that are retained for its streams, a connection, or -1, and the watch of the streams."""
        if pid > 0:
            shell = self.programs[pid] = programs.Program(pid, programs.FIRST_KEY, True, False)
            shell.held = dict(zip(programs.FIRST_STREAMS, held, strict=True))
            if watching:
                self._watch_streams(shell)
        else:
            for fd in held:
                os.close(fd)
        if connection >= 0:
            self._admit(socket.socket(fileno=connection))

    # ---- connections ----

    def _accept(self) -> None:
        try:
            sock = self.listener.accept()[0] if self.listener is not None else None
        except OSError:
            return
        if sock is not None:
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        pid, uid, _gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != self.uid or (self.outside and pid != 0) or len(self.connections) >= _MOST_CONNECTIONS:
            sock.close()
            return
        self.adopt(sock)

    def adopt(self, sock: socket.socket) -> None:
        """Serve a connection."""
        connection = Connection(sock)
        self.connections.append(connection)
        self.watch(sock.fileno(), lambda: self._readable(connection))
        untold, self.untold = self.untold, []
        for event in untold:
            self.tell(event)

    def _readable(self, connection: Connection) -> None:
        if connection.waiting and not connection.flush():
            self.drop(connection)
            return
        for _ in range(16):  # then other connections get a turn
            try:
                request = connection.receive()
            except BlockingIOError:
                break
            except (OSError, ValueError):
                request = None
            if request is None:
                self.drop(connection)
                return
            self._handle(connection, request)
        self._rearm(connection)

    def _rearm(self, connection: Connection) -> None:
        if connection in self.connections:
            mask = select.EPOLLIN | (select.EPOLLOUT if connection.waiting else 0)
            if mask != connection.mask:
                connection.mask = mask
                self.epoll.modify(connection.sock.fileno(), mask)

    def drop(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
            self.unwatch(connection.sock.fileno())
            connection.close()
            if self.frozen.owner is connection:
                self.frozen.end()

    def answer(self, connection: Connection, number: int, reply: dict[str, Any], fds: list[int]) -> None:
        """Reply and close `fds`, also when the connection is broken."""
        if connection not in self.connections:
            for fd in fds:
                os.close(fd)
        elif connection.send({"id": number, "ok": True, **reply}, fds):
            self._rearm(connection)
        else:
            self.drop(connection)

    def refuse(self, connection: Connection, number: int, fault: Fault) -> None:
        if connection in self.connections:
            if connection.send({"id": number, "error": [fault.code, fault.message]}, []):
                self._rearm(connection)
            else:
                self.drop(connection)

    def tell(self, event: dict[str, Any]) -> None:
        for connection in list(self.connections):
            if connection.send(event, []):
                self._rearm(connection)
            else:
                self.drop(connection)

    # ---- requests ----

    def _handle(self, connection: Connection, request: dict[str, Any]) -> None:
        number = int(request.get("id", 0))
        try:
            if self.frozen.holds(connection, request):
                return
            op = request.get("op")
            if op in files.OPERATIONS:
                if files.in_child(request):
                    raise files.Later
                self.answer(connection, number, *files.OPERATIONS[op](request))
                return
            method = getattr(self, f"do_{op}", None)
            if method is None:
                raise Fault("unsupported", f"pid 1 does not know {op!r}")
            method(connection, number, request)
        except files.Later:
            self._later_in_child(connection, number, request)
        except Fault as fault:
            self.refuse(connection, number, fault)
        except OSError as error:
            self.refuse(connection, number, of_os_error(error, str(request.get("op"))))
        except Exception as error:
            self.complain(error)
            self.refuse(connection, number, Fault("internal", f"{request.get('op')}: {error!r}"))

    def do_hello(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        running = [{**program.describe(), "starting": program.pid in self.starting}
                   for program in self.programs.values()]
        self.answer(connection, number, {"pid": os.getpid(), "programs": running}, [])

    def do_sockets(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self.answer(connection, number, {}, [os.dup(fd) for fd in self.sockets])

    def do_spawn(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        key, keep = str(request.get("key") or ""), bool(request.get("keep"))
        if key and any(program.key == key for program in self.programs.values()):
            raise Fault("conflict", f"a program with the key {key!r} exists already")
        if not request.get("argv"):
            raise Fault("invalid_config", "argv is empty")
        user = users.find(str(request["user"])) if request.get("user") else None
        streams = programs.Streams(request, user)
        try:
            plan = programs.Plan(request, streams, user, self.limits)
            self._start(connection, number, programs.Program(0, key, keep, streams.pty), plan)
        except BaseException:
            streams.close()
            raise

    def _start(self, connection: Connection, number: int, program: programs.Program, plan: programs.Plan, *,
               by_fork: bool = False) -> None:
        start = programs.Start(plan, by_fork=by_fork)
        pid = program.pid = start.pid
        self.programs[pid] = program

        def settle() -> None:
            try:
                verdict = os.read(start.verdict, 4096)
            except BlockingIOError:
                return
            del self.starting[pid]
            self.unwatch(start.verdict)
            fault = start.settle(verdict)
            if fault is None:
                self._started(connection, number, program, plan.streams)
                return
            del self.programs[pid]
            try:
                if start.by_fork:
                    raise fault
                self._start(connection, number, program, plan, by_fork=True)
            except Fault as final:
                plan.streams.close()
                self.refuse(connection, number, final)

        self.starting[pid] = settle
        self.watch(start.verdict, settle)

    def _started(self, connection: Connection, number: int, program: programs.Program,
                 streams: programs.Streams) -> None:
        streams.close_theirs()
        if program.keep:
            program.held = {name: os.dup(fd) for name, fd in streams.ours.items()}
        reply = {"pid": program.pid, "streams": list(streams.ours), "pty": streams.pty}
        self.answer(connection, number, reply, list(streams.ours.values()))

    def do_attach(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        program = self._kept(str(request.get("key")))
        if program.pid in self.starting:  # it has no streams yet, and may turn out not to start
            self.later(_STARTS, lambda: self._handle(connection, request))
            return
        self._unwatch_streams(program)
        fds = [os.dup(fd) for fd in program.held.values()]
        self.answer(connection, number, program.describe(), fds)

    def do_watch_streams(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """Watch the streams of a kept program for a server that closes its copies: the first output or end of file is
        reported once. `attach` ends it."""
        self._watch_streams(self._kept(str(request.get("key"))))
        self.answer(connection, number, {}, [])

    def _watch_streams(self, program: programs.Program) -> None:
        def report() -> None:
            self._unwatch_streams(program)
            self.tell({"event": "readable", "pid": program.pid})

        for fd in program.held.values():
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
                self.watch(fd, report)

    def _unwatch_streams(self, program: programs.Program) -> None:
        for fd in program.held.values():
            self.unwatch(fd)

    def do_forget(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """Close the held copies of its streams; forget it if it has ended."""
        program = self.programs.get(int(request.get("pid", 0)))
        if program is not None and program.ended is not None:
            self._unwatch_streams(program)
            program.release()
            del self.programs[program.pid]
        self.answer(connection, number, {}, [])

    def do_adopt(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self.answer(connection, number, *programs.adopt(self.programs, request["programs"]))

    def do_close_stream(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """Close the held copy of one stream, so that the program sees end of file once the server closes its own
        copy."""
        program = self.programs.get(int(request["pid"]))
        fd = program.held.pop(str(request["stream"]), None) if program is not None else None
        if fd is not None:
            self.unwatch(fd)
            os.close(fd)
        self.answer(connection, number, {}, [])

    def _kept(self, key: str) -> programs.Program:
        for program in self.programs.values():
            if program.keep and program.key == key:
                return program
        raise Fault("not_found", f"no kept program has the key {key!r}")

    def do_signal(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        pid, signum = int(request["pid"]), int(request["signal"])
        if not 0 < signum < signal.NSIG:
            raise Fault("invalid_config", f"{signum} is not a signal")
        program = self.programs.get(pid)
        if program is None or program.ended is not None:
            count = 0
        elif request.get("tree"):
            count = process_tree.signal_tree(pid, signum, request.get("since"), bool(request.get("root", True)))
        else:
            os.kill(pid, signum)  # not reaped yet, so the pid is not reused
            count = 1
        self.answer(connection, number, {"count": count}, [])

    def do_kill_tree(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        pid = int(request["pid"])
        program = self.programs.get(pid)
        if program is None or program.ended is not None:
            self.answer(connection, number, {"count": 0}, [])
            return
        root = bool(request.get("root", True))
        job = process_tree.kill_tree(pid, request.get("since"), root, tell=request.get("tell"))
        self._step(job, lambda count: self.answer(connection, number, {"count": count}, []))

    def do_pause(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """Stop every process until `resume`, or the end of this connection."""

        def done(count: int) -> None:
            if count >= 0:
                self.answer(connection, number, {"count": count}, [])
                return
            if self.frozen.owner is connection:
                self.frozen.end()
            self.refuse(connection, number, Fault("unavailable", "not all processes could be stopped"))

        self._step(self.frozen.begin(connection), done)

    def do_resume(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        if self.frozen.owner is connection:
            self.frozen.end()
        self.answer(connection, number, {}, [])

    def do_hold(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """Stop every process until `release`; it survives this connection."""

        def done(count: int) -> None:
            if count >= 0:
                self.answer(connection, number, {"count": count}, [])
                return
            self.frozen.unpause()
            self.refuse(connection, number, Fault("unavailable", "not all processes could be stopped"))

        self._step(self.frozen.pause(), done)

    def do_release(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self.frozen.unpause()
        self.answer(connection, number, {}, [])

    def _step(self, job: Generator[float, None, int], done: Callable[[int], None]) -> None:
        """Run a job step by step from the loop, which serves other requests meanwhile."""
        try:
            pause = next(job)
        except StopIteration as end:
            done(int(end.value))
            return
        self.later(pause, lambda: self._step(job, done))

    def do_stop(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        """SIGTERM (and SIGHUP to programs with a terminal), SIGKILL after `grace` seconds; then pid 1 exits."""
        end = time.monotonic() + max(0.0, min(float(request.get("grace", 0)), 3600.0))
        self.answer(connection, number, {}, [])
        self.frozen.unpause()
        self.frozen.end()
        for program in self.programs.values():
            if program.has_pty and program.ended is None:
                os.kill(program.pid, signal.SIGHUP)
        me = os.getpid()
        if end > time.monotonic():
            process_tree.signal_tree(me, signal.SIGTERM, None, False)
            process_tree.signal_tree(me, signal.SIGCONT, None, False)

        def look() -> None:
            self._reap()
            if time.monotonic() < end and process_tree.alive_under(me, None):
                self.later(0.01, look)
            elif me == 1:
                self.stopping = True  # the end of pid 1 ends all processes
            else:
                process_tree.run(_kill_under(me))
                self.stopping = True

        look()

    def do_dial(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        start_connection(self, self, connection, number, request)

    def do_listen(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self.answer(connection, number, {"port": self.listening.listen(int(request["port"]))}, [])

    def do_accept(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self.listening.accept(connection, number, int(request["port"]))

    def do_unlisten(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        self.listening.unlisten(int(request["port"]))
        self.answer(connection, number, {}, [])

    # ---- children: long operations and those as another user ----

    def _later_in_child(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        try:
            self._in_child(connection, number, request)
        except Fault as fault:
            self.refuse(connection, number, fault)

    def _in_child(self, connection: Connection, number: int, request: dict[str, Any]) -> None:
        if len(self.children) >= _MOST_CHILDREN:
            raise Fault("unavailable", "too many file operations at once")
        user = users.find(str(request["user"])) if request.get("user") else None
        try:
            pid = os.fork()
        except OSError as error:
            raise of_os_error(error, "no further process can be started: the sandbox's limit is reached") from None
        if pid:
            self.children[pid] = connection, number, time.monotonic() + _CHILD_PATIENCE
            self.later(_CHILD_PATIENCE, lambda: self._give_up(pid))
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            syscalls.close_all_but(2, connection.sock.fileno())  # the child must hold no stream of a program
            request["in_child"] = True
            message: dict[str, Any]
            fds: list[int] = []
            try:
                if user is not None:
                    programs.drop(user)
                reply, fds = files.OPERATIONS[request["op"]](request)
                message = {"id": number, "ok": True, **reply}
            except Fault as fault:
                message = {"id": number, "error": [fault.code, fault.message]}
            except Exception as error:
                message = {"id": number, "error": ["internal", f"{request['op']}: {error!r}"]}
            send_patiently(connection.sock, message, fds)
            status = 0
        except BaseException:
            pass  # the exit status tells the result
        finally:
            os._exit(status)

    def _give_up(self, pid: int) -> None:
        if pid in self.children:
            os.kill(pid, signal.SIGKILL)

    # ---- exits ----

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid in self.starting:
                self.guard(self.starting[pid])
            if pid in self.children:
                connection, number, _ = self.children.pop(pid)
                if code != 0:
                    fault = Fault("action_error", "the file operation was killed inside the sandbox")
                    self.refuse(connection, number, fault)
            elif pid in self.programs:
                self._ended(self.programs[pid], code)

    def _ended(self, program: programs.Program, code: int) -> None:
        program.ended = {"code": code} if code >= 0 else {"signal": -code}
        if not program.keep:
            del self.programs[program.pid]
        event = {"event": "exit", "pid": program.pid, **program.ended}
        if not self.connections and program.key == programs.FIRST_KEY:
            self.untold = [event]
        self.tell(event)


def _kill_under(root: int) -> Generator[float, None, int]:
    """Send SIGKILL to all descendants of a process that continues: used where pid 1 has no namespace to end."""
    end = time.monotonic() + 10
    count = 0
    while time.monotonic() < end and (left := process_tree.alive_under(root, None)):
        for entry in left:
            process_tree.send(entry, signal.SIGSTOP)
        count += sum(process_tree.send(entry, signal.SIGKILL) for entry in left)
        yield 0.001
    return count


def _ignore(_number: int, _frame: object) -> None:
    """Handler of a signal that pid 1 ignores, or that only wakes its loop."""


def prepare(listener: socket.socket, uid: int, outside: bool) -> Init:
    """Create an Init whose process others cannot inspect."""
    return hidden(Init(listener, uid, outside))


_Made = TypeVar("_Made", bound=Init)


def hidden(made: _Made) -> _Made:
    """Prevent other processes from inspecting this one; returns the Init."""
    if os.getpid() != 1:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.run_soon()
    syscalls.close_on_exec_from(3)
    return made


def main() -> None:
    """Entry point, see the module's docstring."""
    options = json.loads(sys.argv[1])
    os.setsid() if os.getsid(0) != os.getpid() else None
    init = prepare(socket.socket(fileno=int(options["listen"])), int(options["uid"]), bool(options.get("outside")))
    gc.freeze()
    init.run()


if __name__ == "__main__":
    main()
