"""Attempts on our own protocols: pid 1's requests, the streams of other programs, numbers that were used before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

from rock import errors
from tests.escape.attempt import Attempt, Host
from tests.runtime.boxes import Box, read_all

THEME = "protocol"


async def _used_number(host: Host, box: Box) -> str:
    """A handle of an ended program must not reach the process that got its number."""
    first = await box.spawn("sh", "-c", "exit 0")
    await first.wait()
    program = (
        "import os, sys, time\nwanted = int(sys.argv[1])\n"
        "for _ in range(70000):\n  pid = os.fork()\n"
        "  if pid == 0:\n    if os.getpid() == wanted: time.sleep(30)\n    os._exit(0)\n"
        "  if pid == wanted: print('got', flush=True); os.waitpid(pid, 0); break\n  os.waitpid(pid, 0)\n")
    # The number comes around only where pid_max is low; that the handle is dead holds in any case.
    del program
    if await first.signal(signal.SIGKILL) or await first.kill_tree():
        return "open: a signal went somewhere"
    return "blocked: an ended program gets no signal"


async def _other_streams(host: Host, box: Box) -> str:
    """Another program's streams by /proc: the same user's are open to it inside, but never the host's ends."""
    other = await box.spawn("sh", "-c", "read x; echo $x", stdin="pipe")
    assert other.stdin is not None
    assert other.stdout is not None
    seen = await box.sh(f"ls -l /proc/{other.pid}/fd /proc/self/fd 2>/dev/null | grep -c '/run/\\|socket:' ; true")
    os.write(other.stdin, b"mine\n")
    out = await read_all(other.stdout)
    if out != b"mine\n" or seen.strip() not in ("0", ""):
        return f"open: {out!r} {seen!r}"
    return "blocked: no stream of the host, no socket"


async def _raw_requests(host: Host, box: Box) -> str:
    """What a guest could send if it had pid 1's socket: garbage and unknown requests are answered, or cut off."""
    link = await box.runtime.linked(box.handle)
    told = []
    specs = (("no_such_thing", {}), ("spawn", {"argv": []}), ("spawn", {"argv": ["x"] * 10, "channels": {"1": "r"}}),
              ("signal", {"pid": 1, "signal": 9}), ("kill_tree", {"pid": 1}), ("open_read", {"path": "a\0b"}),
              ("dial", {"port": 10 ** 9, "host": "127.0.0.1", "timeout": 1}))
    for op, fields in specs:
        try:
            reply, fds = await link.request(op, fields)
            told.append(str(reply.get("count", "answered")))
            for fd in fds:
                os.close(fd)
        except errors.RockError as error:
            told.append(error.code)
    alive = await box.sh("echo alive")
    return "blocked: " + " ".join(dict.fromkeys(told)) if alive == "alive\n" else f"open: {alive!r}"


async def _forged_frames(host: Host, box: Box) -> str:
    """Replies of a pid 1 that was taken over: the server cuts the link and goes on."""
    import json
    import socket
    import tempfile
    from pathlib import Path

    from rock.runtime.init.link import InitLink, bind_listener

    told = []
    forged = (b"\xff\xfe", b"[]", b'{"id": "x"}', b'{"id": 1}', b"{" * 5000, b'{"event": "exit", "pid": "x"}',
              b'{"memfd": 99999999999}', b'{"id": 1, "error": [1]}', b'{"event": "exit"}',
              json.dumps({"id": 1, "ok": True, "pid": 7, "streams": ["stdin"] * 5, "pty": False}).encode())
    with tempfile.TemporaryDirectory() as folder:
        for number, packet in enumerate(forged):
            home = Path(folder) / str(number)
            home.mkdir()
            listener = bind_listener(home)
            link = InitLink.connect(home, "forged")
            one, _ = listener.accept()
            with listener, one:
                task = asyncio.ensure_future(link.request("hello", patience=5))
                await asyncio.sleep(0)
                one.send(packet)
                with_fds = number == 3
                if with_fds:
                    socket.send_fds(one, [b'{"id": 1, "ok": true}'], [one.fileno()])
                try:
                    await asyncio.wait_for(asyncio.shield(task), 1.5)
                    told.append("answered")
                except TimeoutError:
                    told.append("waits")
                except errors.RockError as error:
                    told.append(error.code)
                link.close()
                await asyncio.gather(task, return_exceptions=True)
                if link._waiting or (task.done() and not task.cancelled() and isinstance(
                        task.exception(), Exception) and not isinstance(task.exception(), errors.RockError)):
                    return f"open: {packet[:40]!r} {task.exception()!r}"
    return "blocked: " + " ".join(dict.fromkeys(told))


async def _too_many_programs(host: Host, box: Box) -> str:
    """As many programs as there are processes: pid 1 refuses the next, and can still be told to end them."""
    started = []
    told = ""
    try:
        for _ in range(400):
            started.append(await box.spawn("sleep", "30", stdout="null", stderr="null"))
    except errors.RockError as error:
        told = error.code
    for process in started:
        await process.kill_tree()
    return f"blocked: {told}" if told and await box.sh("echo alive") == "alive\n" else "open: nothing stopped it"


# Calls pid 1 as a process of another kind would: in the pid namespace of the sandbox, or as root inside.
_CALLER = """
import ctypes, os, socket, sys
from rock.runtime.namespace.launcher import kernel
folder, pid, how, base = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
where = os.open(folder, os.O_PATH)
if how == "inside":
    kernel.setns(os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY), kernel.CLONE_NEWPID)
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
elif how == "root inside":
    kernel.prctl(8, 1)  # PR_SET_KEEPCAPS, for a socket that others may not open
    os.setresuid(base, base, base)
    kernel.capset(1 << 1)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(10)
try:
    sock.connect(f"/proc/self/fd/{where}/s")
    sock.send(b'{"id": 1, "op": "hello"}')
    print("answered" if sock.recv(4096) else "closed", flush=True)
except ConnectionError:
    print("closed", flush=True)
"""


def _calls(how: str) -> Attempt:
    async def act(host: Host, box: Box) -> str:
        folder = f"{host.facts['run_dir']}/{box.handle.data['slot']}"
        said = {}
        for who in ("server", how):  # the server itself is answered, so the call is a real one
            done = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _CALLER, folder, str(box.handle.data["pid"]), who, str(box.handle.data["base"]),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            out, err = await asyncio.wait_for(done.communicate(), 60)
            said[who] = out.decode().strip() or err.decode()[-200:]
        if said["server"] != "answered" or said[how] not in ("answered", "closed"):
            raise RuntimeError(f"pid 1 was not called: {said}")
        return "open: pid 1 serves it" if said[how] == "answered" else "blocked: pid 1 closes the connection"

    return Attempt(THEME, f"pid 1 called by {how}", act=act, root=True, absent={
        "landlock": "pid 1 knows the server by its user alone", "gvisor": "pid 1 has no socket"})


ATTEMPTS = [
    *(_calls(how) for how in ("inside", "root inside")),
    Attempt(THEME, "signal a number that was used before", act=_used_number),
    Attempt(THEME, "streams of other programs, and sockets", act=_other_streams),
    Attempt(THEME, "requests to pid 1 that make no sense", act=_raw_requests),
    Attempt(THEME, "forged answers of pid 1", act=_forged_frames),
    Attempt(THEME, "more programs than processes", act=_too_many_programs),
]
