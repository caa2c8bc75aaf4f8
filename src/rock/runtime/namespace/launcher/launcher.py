"""The launcher: a small single-threaded process that forks sandboxes. Run by its path, `python -I -S launcher.py JSON`.

    rocklet ── SOCK_SEQPACKET, JSON ──► launcher ── zygote.py ──► a waiting child in new namespaces (child_setup.py)
                                           └── enters them, builds the mounts (furnish.py), then lets the child continue

Requests: create, retire (end a sandbox and remove its remains), switch (freeze its files as a layer), take, finish,
start and forget (copies of processes, by a template: templates.py), ahead (prepare
user namespaces and run folders while idle), wired (whether networks with egress are possible), floor (a bare namespace
fork, for `bench`). Several creates run concurrently; the launcher replies when each sandbox is ready. It exits when its
socket closes; sandboxes continue to run. Standard library only, with few imports: each import adds to the memory of
every pid 1.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import contextlib
import errno
import fcntl
import gc
import json
import select
import signal
import socket
import time
from collections import deque
from typing import Any

from rock.guest.init import native, process_tree, syscalls
from rock.guest.init.link import pack, receive_packet, unpack
from rock.runtime.namespace.launcher import child_setup, furnish, kernel, mounts, seccomp, snapshot, switch, userns
from rock.runtime.namespace.launcher.templates import Templates
from rock.runtime.namespace.launcher.zygote import Area, NoSpace, Zygote
from rock.runtime.namespace.limits import cgroups, counters
from rock.runtime.namespace.limits.counters import Counters
from rock.runtime.namespace.limits.devices import SharedGroups
from rock.runtime.namespace.network import IsolatedNetworkPool, NetworkPool

_ALL = (kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET)
_START_PATIENCE = 60.0
_OVERFLOW_UID = int(cgroups.read_text("/proc/sys/kernel/overflowuid") or 65534)


class Launcher:
    """options: privileged (as root, with a uid range per sandbox), staging (a folder for mounts), native (False: use
    fork instead of the compiled functions)."""

    def __init__(self, sock: socket.socket, options: dict[str, Any]) -> None:
        self.sock = sock
        self.privileged = bool(options["privileged"])
        self.staging = str(options["staging"])
        self.counters = Counters(own_account=self.privileged)
        if not options.get("native", True):
            native.disable()
        self.constants = child_setup.Constants(seccomp.build() if seccomp.supported() else b"")
        self.groups = SharedGroups(os.path.dirname(self.staging)) if self.privileged else None
        self.zygote = Zygote(child_setup.live, snapshot.rehearse, self.groups.join if self.groups else lambda: None)
        self.buffer = bytearray(1 << 17)
        self.queue: deque[dict[str, Any]] = deque()
        # by descriptor of the readiness socket: request, pid, area, deadline, the socket
        self.starting: dict[int, tuple[dict[str, Any], int, Area, float, socket.socket]] = {}
        self.retiring: dict[int, dict[str, Any]] = {}  # by pidfd of the killed pid 1
        self.spare: deque[int | str] = deque()  # first ids of ranges, and run folders, to prepare while idle
        self.listeners: dict[str, socket.socket] = {}
        self.outgoing: deque[tuple[bytes, list[int]]] = deque()
        self.templates = Templates(self._answer, self._be_template)

    def prepare(self) -> None:
        """Create a private mount namespace with the staging folder; as an ordinary user, a user namespace first."""
        self.counters.limit_launcher()
        if self.privileged:
            os.setgroups([])  # they would apply to its mounts: mounts.mount_public
            kernel.unshare(kernel.CLONE_NEWNS)
        else:
            userns.become_root(kernel.CLONE_NEWNS)
            counters.write(self.counters.settings_of_all())
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
        mounts.prepare_staging(self.staging)
        mounts.lift_host(self.staging)
        mounts.enter_host()
        self.nets = NetworkPool(usable=self.privileged)
        self.wired = IsolatedNetworkPool(self.privileged)
        self.unnamed = mounts.UnnamedFolders(self.staging, self.privileged)
        self.home = furnish.HostNamespaces(self.privileged, self.nets)
        self.home.share_sys(self.staging)
        self.ranges = userns.Ranges(single=not self.privileged, settings=self.counters.settings_of_one(),
                                    root=(self.home.outside, mounts.enter_host))
        if self.privileged:
            self._favour_moves()

    def _favour_moves(self) -> None:
        """Reduce the cost of moving a process into a cgroup from 14 ms to 0.3 ms.

        The kernel's switch for it is an option of any hierarchy. The launcher mounts a private empty hierarchy in its
        own mount namespace, which disappears with it.
        """
        with contextlib.suppress(OSError):
            os.mkdir(f"{self.staging}/dynmods")
            options = "none,name=rock,favordynmods"
            kernel.mount("rock", f"{self.staging}/dynmods", "cgroup", kernel.MS_NOSUID | kernel.MS_NODEV, options)

    def run(self) -> None:
        wake_reader, wake_writer = socket.socketpair()
        wake_reader.setblocking(False)
        wake_writer.setblocking(False)
        syscalls.default_signals()  # a first program resets only the signals that are set here
        signal.set_wakeup_fd(wake_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN)  # Ctrl-C at the server's terminal must not end the launcher
        self.sock.setblocking(False)
        self.poll = select.poll()
        self.poll.register(self.sock, select.POLLIN)
        self.poll.register(wake_reader, select.POLLIN)
        alive = True
        while alive:
            for fd, _ in self._wait():
                if fd == self.sock.fileno():
                    alive = self._read()
                elif fd == wake_reader.fileno():
                    with contextlib.suppress(BlockingIOError):
                        wake_reader.recv(4096)
                elif fd in self.starting:
                    self._settle(fd)
                elif fd in self.retiring:
                    self._retired(fd)
                elif fd in self.templates:
                    self.templates.readable(fd, self.poll)
            self._reap()
            self._give_up()
            if self.queue and not self.zygote.full:  # create one, then poll for ready children
                self._start(self.queue.popleft())
        self.zygote.close()
        if self.groups is not None:
            self.groups.remove()

    def _wait(self) -> list[tuple[int, int]]:
        if self.outgoing:
            self.poll.modify(self.sock, select.POLLIN | select.POLLOUT)
        if self.spare and not self.queue and not self.starting:
            ready = self.poll.poll(0)
            if not ready:
                with contextlib.suppress(OSError):
                    self._make_ahead(self.spare.popleft())
            return ready
        if self.queue and not self.zygote.full:
            return self.poll.poll(0)
        return self.poll.poll(1000 if self.starting else None)

    def _read(self) -> bool:
        self._flush()
        while True:
            try:
                data, fds = receive_packet(self.sock, self.buffer)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            request = unpack(data, fds)
            if request["op"] == "create":
                request["lease"] = fds.pop() if fds and request["leased"] else -1
                request["streams"], request["data"] = self._streams(request, fds)
                self.queue.append(request)
            elif request["op"] == "retire":
                self._retire(request)
            elif request["op"] == "switch":
                self._answer(request, self._switch(request))
            elif request["op"] in ("take", "start"):
                request["cgroups"] = [*request["cgroups"], *(self.groups.folders if self.groups else ())]
                self.templates.forward(request, fds, self.poll)
            elif request["op"] == "finish":
                self.templates.forward(request, fds, self.poll)
            elif request["op"] == "forget":
                self.templates.forget(request["snapshot"], self.poll)
            elif request["op"] == "ahead":
                bases = [base for base in request["ranges"] if base not in self.ranges]
                self.spare = deque([*bases, *request["folders"]])  # replaces the earlier request
            elif request["op"] == "wired":
                self._answer(request, self._try_wired())
            elif request["op"] == "floor":
                self._answer(request, {"seconds": floor()})
            else:
                self._answer(request, {"error": f"unknown request {request['op']!r}", "errno": errno.EINVAL})
            for fd in fds:
                os.close(fd)

    def _streams(self, request: dict[str, Any], fds: list[int]) -> tuple[list[int], int]:
        """Take the descriptors of the first program with that of the connection, and that of its data; none and -1
        where it is not to be started with pid 1. Their numbers are none of those that the program has."""
        program = request["program"]
        if program is None or not self.zygote.starts_programs:
            return [], -1
        if len(fds) != 2 * len(program["numbers"]) + 1 + bool(program["data"]):
            return [], -1
        taken, wanted = fds[:], {number for numbers in program["numbers"] for number in numbers} | {program["data"]}
        fds.clear()
        for index, fd in enumerate(taken):
            if fd in wanted:
                taken[index] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(wanted) + 1)
                os.close(fd)
        data = taken.pop() if program["data"] else -1
        return taken, data

    def _answer(self, request: dict[str, Any], reply: dict[str, Any]) -> None:
        self.outgoing.append(pack({"id": request["id"], **reply}))
        self._flush()

    def _flush(self) -> None:
        while self.outgoing:
            data, fds = self.outgoing[0]
            try:
                socket.send_fds(self.sock, [data], fds)
            except BlockingIOError:
                return
            except OSError:
                self.outgoing.clear()
                return
            self.outgoing.popleft()
            for fd in fds:
                os.close(fd)
        self.poll.modify(self.sock, select.POLLIN)

    # ---- sandboxes ----

    def _make_ahead(self, what: int | str) -> None:
        if isinstance(what, int):
            self.ranges.get(what)
        else:
            os.mkdir(what, 0o700)
            mounts.make_folder(what)
            self.listeners[os.path.basename(what)] = furnish.bind(what)
            self._answer({"id": 0}, {"made": os.path.basename(what)})

    def _start(self, spec: dict[str, Any]) -> None:
        spec["privileged"], spec["rlimits"] = self.privileged, self.counters.rlimits_of_one()
        listener = self.listeners.pop(os.path.basename(spec["slot"]), None)
        net, sockets = self.nets.take() if spec["network"] == "none" else -1, []
        pid, area = 0, self.zygote.area()
        ready, reporting = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gate = os.pipe2(os.O_CLOEXEC)
        try:
            namespace = self.ranges.get(spec["base"])
            if spec["network"] == "nat":
                net, *sockets = self.wired.take()
            listener = listener or furnish.bind(spec["slot"])
            fds = child_setup.Descriptors(listener.fileno(), reporting.fileno(), gate, namespace, spec["lease"], net,
                                          tuple(sockets), tuple(spec["streams"][:-1]),
                                          spec["streams"][-1] if spec["streams"] else -1, spec["data"])
            child_setup.plan(area, self.constants, fds, spec)
            self.unnamed.prepare(spec["binds"])
            flags = _ALL & ~(kernel.CLONE_NEWNET if spec["network"] == "host" or net >= 0 else 0)
            pid = self.zygote.clone(area, flags, child_setup.pack_note(fds, self._server_uid()))
            reporting.close()
            found = furnish.build(spec, pid, self.staging, namespace, self.home,
                                  lambda: child_setup.receive_proc(ready), net)
            if found is not None and fds.streams:
                with contextlib.suppress(NoSpace):  # the server starts it later
                    child_setup.plan_program(area, self.constants, fds, spec, *found, self.zygote.shared)
                    spec["path"] = found[0]
            child_setup.open_gate(gate[1])
        except (OSError, furnish.Failure, child_setup.SetupFailed) as error:
            if isinstance(error, child_setup.SetupFailed):
                self._answer(spec, self._reply(pid, area, error.message))
            else:
                number = error.number if isinstance(error, furnish.Failure) else error.errno or 0
                self._answer(spec, {"error": str(error), "errno": number, "hint": furnish.explain(number)})
            if pid:
                with contextlib.suppress(ProcessLookupError):  # it exited when its socket was closed
                    os.kill(pid, signal.SIGKILL)
                self._await_end(pid)
            self.zygote.free(area)
            ready.close()
        else:
            self._wait_for(spec, pid, area, ready)
        finally:
            reporting.close()
            if listener is not None:
                listener.close()
            for fd in (*gate, spec["lease"], net, *sockets, *spec["streams"], spec["data"]):
                if fd >= 0:
                    os.close(fd)

    def _switch(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Freeze the written files of a sandbox as a layer."""
        spec["privileged"] = self.privileged
        try:
            namespace = self.ranges.get(spec["base"]) if self.privileged else -1
            return switch.switch(spec, self.staging, namespace, self.home)
        except switch.Refused as error:
            return {"refused": [str(reason) for reason in error.args]}
        except OSError as error:
            return {"error": str(error), "errno": error.errno or 0}

    def _be_template(self, sock: socket.socket, request: dict[str, Any]) -> None:
        """In a fork: hold the memory of a snapshot. Its modules are imported there, so that sandboxes do not have
        them."""
        from rock.runtime.namespace.processes import template

        namespace = self.ranges.get(request["base"]) if self.privileged and request["op"] == "take" else -1
        request["privileged"] = self.privileged
        template.main(sock, request, [*self.home.descriptors, namespace], lambda spec, between: switch.switch(
            spec, self.staging, namespace, self.home, between))

    def _try_wired(self) -> dict[str, Any]:
        """Whether this host supports a network namespace with egress; leaves nothing behind."""
        trial = IsolatedNetworkPool(self.privileged)
        try:
            for fd in trial.take():
                os.close(fd)
            return {}
        except OSError as error:
            return {"error": str(error), "errno": error.errno or 0}
        finally:
            trial.close()

    def _retire(self, request: dict[str, Any]) -> None:
        """Kill a pid 1, and its pid namespace with it; clean up when it is gone. Never kills another process with a
        reused pid."""
        try:
            fd = os.pidfd_open(request["pid"])
        except OSError:
            fd = -1
        entry = process_tree.read(request["pid"])
        if fd < 0 or entry is None or entry.start != request["start"]:
            if fd >= 0:
                os.close(fd)
            self._bury(request)
            return
        with contextlib.suppress(OSError):
            request["net"] = os.open(f"/proc/{request['pid']}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        cgroups.lift_cpus(request["cgroups"])
        self.retiring[fd] = request
        self.poll.register(fd, select.POLLIN)

    def _retired(self, fd: int) -> None:
        request = self.retiring.pop(fd)
        self.poll.unregister(fd)
        os.close(fd)
        self._bury(request)

    def _bury(self, request: dict[str, Any]) -> None:
        """Remove the remains of a dead sandbox as far as that is fast; the server removes the rest."""
        if request.get("net", -1) >= 0:
            self.nets.give(request["net"])
        clean = cgroups.remove_empty(request["cgroups"])
        self._answer(request, {"clean": mounts.remove_folder(request["slot"]) and clean})

    def _wait_for(self, spec: dict[str, Any], pid: int, area: Area, ready: socket.socket) -> None:
        ready.setblocking(False)
        self.starting[ready.fileno()] = spec, pid, area, time.monotonic() + _START_PATIENCE, ready
        self.poll.register(ready, select.POLLIN)

    def _server_uid(self) -> int:
        """The server's uid as pid 1 sees it: the overflow uid when it has no mapping."""
        return _OVERFLOW_UID if self.privileged else 0

    @staticmethod
    def _await_end(pid: int) -> None:
        """Wait until a killed child is gone and its area is free; it may be the zygote's child, so waitpid does not
        apply."""
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(5000)
            os.close(fd)

    def _settle(self, fd: int) -> None:
        spec, pid, area, _, ready = self.starting.pop(fd)
        self.poll.unregister(fd)
        with ready:
            data = ready.recv(4096)
        reply = self._reply(pid, area, data)
        if "path" in spec and "pid" in reply and (program := area.started()) > 0:
            reply |= {"program": program, "path": spec["path"]}
        self.zygote.free(area)
        self._answer(spec, reply)

    def _reply(self, pid: int, area: Area, message: bytes) -> dict[str, Any]:
        """The reply for a pid 1's message; an empty message means that pid 1 ended."""
        report: dict[str, Any] = json.loads(message) if message else {"error": "it was killed while it started"}
        if "row" in report:
            what, number = area.reason(int(report["row"]))
            return {"error": f"{what}: {os.strerror(number)}", "errno": number, "hint": furnish.explain(number)}
        entry = process_tree.read(pid)
        if "error" not in report and entry is not None:
            return {"pid": pid, "start": entry.start}
        return {"error": report.get("error", "its pid 1 ended at once"), "errno": 0}

    def _give_up(self) -> None:
        now = time.monotonic()
        for _, pid, _, deadline, _ in list(self.starting.values()):
            if deadline < now:
                os.kill(pid, signal.SIGKILL)  # its readiness socket then reads end of file

    @staticmethod
    def _reap() -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def floor() -> float:
    """Seconds from a fork with all namespaces to the response of a bash on pipes in them; nothing else is created."""
    started = time.perf_counter()
    theirs_in, ours_out = os.pipe2(os.O_CLOEXEC)
    ours_in, theirs_out = os.pipe2(os.O_CLOEXEC)
    pid = kernel.fork_into(_ALL)
    if pid == 0:
        try:
            os.dup2(theirs_in, 0)
            os.dup2(theirs_out, 1)
            for shell in ("/bin/bash", "/bin/sh"):
                with contextlib.suppress(OSError):
                    os.execve(shell, [shell], {"PATH": "/usr/bin:/bin"})
        finally:
            os._exit(127)
    os.close(theirs_in)
    os.close(theirs_out)
    os.write(ours_out, b"echo ready\n")
    os.read(ours_in, 100)
    seconds = time.perf_counter() - started
    os.close(ours_in)
    os.close(ours_out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return seconds


def main() -> None:
    """Prepare, send {"ready": true} or {"error"} on the socket, and serve."""
    options = json.loads(sys.argv[1])
    sock = socket.socket(fileno=int(options["fd"]))
    os.set_inheritable(sock.fileno(), False)
    launcher = Launcher(sock, options)
    kernel.set_title(b"rock-init")
    syscalls.run_soon()
    try:
        launcher.prepare()
    except OSError as error:
        sock.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
        return
    sock.send(b'{"ready": true}')
    gc.collect()
    gc.freeze()
    launcher.run()


if __name__ == "__main__":
    main()
