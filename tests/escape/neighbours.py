"""Attempts of one sandbox on another of the same server, and on what the host shares by name: System V IPC, message
queues, abstract sockets, ports, files, signals, and what the kernel counts per user."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from rock.runtime.base import Process
from tests.escape.attempt import PRELUDE, Attempt, Host, box_of
from tests.runtime.boxes import Box, until_line

THEME = "neighbours"
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")
_NO_IPC = {"landlock": "System V IPC and message queues are refused"}
_SLEEP = "\nprint('ready', flush=True)\ntime.sleep(600)\n"


async def _start(box: Box, program: str, facts: dict[str, Any]) -> Process:
    """A program of the victim, once it has printed a line."""
    process = await box.spawn(*PYTHON, PRELUDE + program + _SLEEP, json.dumps(facts), cwd=str(box.root),
                              stderr="stdout")
    assert process.stdout is not None
    line = await asyncio.wait_for(until_line(process.stdout), 30)
    if line != b"ready\n":
        raise RuntimeError(f"the victim's program failed: {line!r}")
    return process


async def _attack(box: Box, program: str, facts: dict[str, Any]) -> str:
    _, out, _ = await box.run(*PYTHON, PRELUDE + program, json.dumps(facts), cwd=str(box.root), stderr="stdout")
    lines = [line for line in out.decode(errors="replace").splitlines() if line.startswith(("blocked:", "open:"))]
    if not lines:
        raise RuntimeError(f"the attack did not tell how it went: {out[-300:]!r}")
    return lines[-1]


def _pair(name: str, victim: str, attack: str, *, network: str = "none", **options: Any) -> Attempt:
    """Two sandboxes: `victim` runs in one until `attack` has ended in the other. Both have HOST['word']."""

    async def act(host: Host, box: Box) -> str:
        word = secrets.token_hex(6)
        facts = {"word": word, "key": int(word[:7], 16), "port": 20_000 + int(word[:4], 16) % 30_000}
        async with box_of(box.runtime, {**host.common, "network": network}) as other:
            process = await _start(other, victim, facts)
            facts["pid"] = process.pid
            told = await _attack(box, attack, facts)
            await process.kill_tree()
        return told

    return Attempt(THEME, name, act=act, config={"network": network}, **options)


_MINE = "\nif HOST['word'] in found: opened(found)\nblocked('another one')\n"
_COUNT = "taken = 0\nwhile taken < 60 and libc.inotify_init() >= 0: taken += 1\n"
_CONNECT = """
try:
    sock = socket.create_connection(('127.0.0.1', HOST['port']), 3)
    sock.settimeout(3)
    found = sock.recv(100).decode()
except OSError as error: blocked(name_of(error))
""" + _MINE
_SERVE = """
import threading
listener = socket.create_server(('127.0.0.1', HOST['port']))
def serve():
    while True:
        client, _ = listener.accept()
        client.sendall(HOST['word'].encode()); client.close()
threading.Thread(target=serve, daemon=True).start()
"""

PAIRS = [
    _pair("a System V segment of another sandbox", """
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(HOST['key'], 4096, 0o1666)
ctypes.memmove(libc.shmat(segment, None, 0), HOST['word'].encode(), len(HOST['word']))
""", """
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(HOST['key'], 4096, 0)
if segment < 0: blocked(errno.errorcode[ctypes.get_errno()])
found = ctypes.string_at(libc.shmat(segment, None, 0), 12).decode()
""" + _MINE, absent=_NO_IPC),
    _pair("a message queue of another sandbox", """
queue = libc.mq_open(b'/' + HOST['word'].encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
assert queue >= 0
os.chmod('/proc/self/fd/%d' % queue, 0o666)
""", """
if libc.mq_open(b'/' + HOST['word'].encode(), os.O_RDONLY) < 0: blocked(errno.errorcode[ctypes.get_errno()])
opened('it can be opened')
""", absent={**_NO_IPC, "gvisor": "it has no message queues"}),
    _pair("an abstract unix socket of another sandbox", """
listener = socket.socket(socket.AF_UNIX)
listener.bind('\\0' + HOST['word'])
listener.listen()
""", """
sock = socket.socket(socket.AF_UNIX)
tried(lambda: (sock.connect('\\0' + HOST['word']), 'connected'))
""", absent={"landlock": "unix sockets are refused"}),
    _pair("a port of another sandbox", _SERVE, _CONNECT, absent={
        "landlock": 'sockets are refused with network="none"'}),
    _pair("a port of another sandbox, both with network nat", _SERVE, _CONNECT, network="nat", absent={
        "landlock": 'it has no network "nat"', "gvisor": 'it has no network "nat"'}),
    _pair("files of another sandbox: /tmp, /dev/shm, the system", """
for folder in ('/tmp', '/dev/shm', '/usr/share', os.getcwd()):
    try:
        with open(folder + '/' + HOST['word'], 'w') as file: file.write(HOST['word'])
    except OSError: pass
""", """
seen = [folder for folder in ('/tmp', '/dev/shm', '/usr/share', os.getcwd())
        if os.path.exists(folder + '/' + HOST['word'])]
opened(*seen) if seen else blocked('not there')
"""),
    _pair("processes of another sandbox: seen, signalled, traced", """
libc.prctl(15, HOST['word'].encode(), 0, 0, 0)
""", """
seen = []
for name in os.listdir('/proc'):
    if not name.isdigit(): continue
    try:
        if open('/proc/%s/comm' % name).read().strip() == HOST['word']: seen.append(int(name))
    except OSError: pass
if not seen: blocked('not seen')
tried(*(lambda pid=pid: (os.kill(pid, signal.SIGUSR1), pid) for pid in seen),
      *(lambda pid=pid: os.open('/proc/%d/mem' % pid, os.O_RDONLY) for pid in seen))
"""),
    _pair("inotify instances of another sandbox used up", "while libc.inotify_init() >= 0: pass",
          _COUNT + "blocked(taken, 'are left') if taken >= 15 else opened('only', taken, 'are left')",
          absent={"landlock": "inotify is refused", "gvisor": "its own kernel counts them"}),
    _pair("pending signals of another sandbox used up", """
event = (ctypes.c_int * 16)(0, 0, 10, 0)
made = ctypes.c_void_p()
for _ in range(200000):
    if libc.timer_create(1, event, ctypes.byref(made)): break
""", """
event = (ctypes.c_int * 16)(0, 0, 10, 0)
made = ctypes.c_void_p()
taken = 0
while taken < 1000 and libc.timer_create(1, event, ctypes.byref(made)) == 0: taken += 1
blocked(taken, 'are left') if taken >= 500 else opened('only', taken, 'are left')
""", absent={"gvisor": "its own kernel counts them"}),
]


def _of_host(name: str, program: str) -> Attempt:
    return Attempt(THEME, name, program, control=True)


HOST = [
    _of_host("a System V segment of the host", """
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(HOST['ipc_key'], 4096, 0)
if segment < 0: blocked(errno.errorcode[ctypes.get_errno()])
found = ctypes.string_at(libc.shmat(segment, None, 0), 12).decode()
opened(found) if HOST['token'].startswith(found) else blocked('another one')
"""),
    _of_host("a message queue of the host", """
if libc.mq_open(HOST['queue'].encode(), os.O_RDONLY) < 0: blocked(errno.errorcode[ctypes.get_errno()])
opened('it can be opened')
"""),
]
ATTEMPTS = [*PAIRS, *HOST]
