"""Attempts to be somebody else, or to reach other processes."""

from __future__ import annotations

import os
from pathlib import Path

from tests.escape.attempt import Attempt, Host
from tests.runtime.boxes import Box

THEME = "identity"


def _victim(host: Host, box: Box) -> str | None:
    """Whether the host's process, which an attempt wanted to end, is still there."""
    try:
        os.kill(int(host.facts["victim"]), 0)
    except OSError:
        return "the host's process was killed"
    return None


def _owner(host: Host, box: Box) -> str | None:
    """At the level of root, no process inside may be root or the server's user outside."""
    if host.level not in ("namespaces", "landlock") or os.geteuid() != 0:
        return None
    pid = box.handle.data.get("init", box.handle.data["pid"])  # where a warden holds it, that is the server's user
    status = Path(f"/proc/{pid}/status").read_text()
    ids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    return None if all(int(id) >= 100_000 for id in ids) else f"it runs as {ids}"


_OWN_PID_1 = {"landlock": "pid 1 has its programs' user: who ends it ends this sandbox, of which nothing is left"}
ATTEMPTS = [
    Attempt(THEME, "kill a process of the host", """
tried(lambda: (os.kill(HOST['victim'], 0), os.kill(HOST['victim'], signal.SIGKILL)))
""", look=_victim),
    Attempt(THEME, "signal a process of the host", "tried(lambda: os.kill(HOST['victim'], 0))", control=True),
    Attempt(THEME, "kill everything (kill -1)", """
pid = os.fork()
if pid == 0:
    os.kill(-1, signal.SIGKILL)
    os._exit(0)
time.sleep(0.3)
blocked('what was hit is inside')
""", look=_victim, quiet=True, open_at=_OWN_PID_1),
    Attempt(THEME, "see processes of the host", """
try:
    line = read('/proc/%d/cmdline' % HOST['victim'])
except OSError as error:
    blocked(name_of(error))
opened(line[:40]) if HOST['victim_word'].encode() in line else blocked('another process has that number inside')
""", control=True, open_at={"landlock": "no pid namespace: numbers, names and command lines of other processes are "
                                        "seen, unless the host's /proc hides them"}),
    Attempt(THEME, "read the environment of a process of the host", """
try:
    text = read('/proc/%d/environ' % HOST['victim'], 65536)
except OSError as error:
    blocked(name_of(error))
opened('read') if HOST['token'].encode() in text else blocked('another process has that number inside')
""", control=True),
    Attempt(THEME, "read the memory of a process of the host", """
try:
    maps = read('/proc/%d/maps' % HOST['victim'])
    os.open('/proc/%d/mem' % HOST['victim'], os.O_RDONLY)
except OSError as error:
    blocked(name_of(error))
opened('opened') if HOST['pid_of_runner'] != os.getppid() else blocked('inside')
""", control=True),
    Attempt(THEME, "another priority, for a process of the host",
            "tried(lambda: os.setpriority(os.PRIO_PROCESS, HOST['victim'], 19))", control=True),
    Attempt(THEME, "a realtime class for itself", """
tried(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)),
      lambda: os.setpriority(os.PRIO_PROCESS, 0, -20))
""", control=True),
    Attempt(THEME, "capabilities over the host", """
status = dict(line.split(':\\t') for line in open('/proc/self/status').read().splitlines() if ':\\t' in line)
kept = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 10, 18))
names = ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')
over = [name for name in names if int(status[name], 16) & ~kept and (name != 'CapBnd' or status['NoNewPrivs'] == '0')]
opened(*over) if over else blocked('CapEff', status['CapEff'])
""", control=True),
    Attempt(THEME, "capabilities raised by capset", """
header = struct.pack('=Ii', 0x20080522, 0)
data = struct.pack('=IIIIII', 0xffffffff, 0xffffffff, 0, 0x1ff, 0x1ff, 0)
judge(call(126, ctypes.c_char_p(header), ctypes.c_char_p(data)))
""", x86_only=True),
    Attempt(THEME, "no_new_privs taken back", """
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
libc.prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0)
opened('off') if libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0 else blocked('still on')
""", control=True),
    Attempt(THEME, "the system call filter taken off", """
# PR_SET_SECCOMP with mode 0, and a filter that would allow all: the strictest one counts.
libc.prctl(22, 0, 0, 0, 0)
program = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000), 8)
filter = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(program)), 16)
libc.prctl(38, 1, 0, 0, 0)
libc.prctl(22, 2, filter, 0, 0)
judge(call(101, 0, 0, 0, 0))
""", control=True, x86_only=True),
    Attempt(THEME, "a set-user-id program of its own making", """
import shutil
shutil.copy('/bin/sleep' if os.path.exists('/bin/sleep') else sys.executable, './elevated')
os.chmod('./elevated', 0o6755)
pid = os.fork()
if pid == 0:
    try:
        os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
    except OSError as error:
        os._exit(77)
    try:
        os.execv('./elevated', ['./elevated', '3'])
    finally:
        os._exit(78)
time.sleep(0.3)
gone, status = os.waitpid(pid, os.WNOHANG)
if gone:
    code = os.waitstatus_to_exitcode(status)
    blocked('no other user here' if code == 77 else 'it does not start (%d)' % code)
uids = [line for line in open('/proc/%d/status' % pid).read().splitlines() if line.startswith('Uid:')][0].split()[1:]
os.kill(pid, signal.SIGKILL)
opened(*uids) if uids[1] != uids[0] else blocked('it runs as', uids[1])
"""),
    Attempt(THEME, "set-user-id programs of the image", """
import glob
names = [p for p in ('/usr/bin/su', '/bin/su', '/usr/bin/mount', '/usr/bin/passwd', '/usr/bin/chsh', '/usr/bin/newgrp')
         if os.path.exists(p) and os.stat(p).st_mode & 0o4000]
if not names: blocked('there is none')
flags = os.statvfs(names[0]).f_flag
opened(*names) if not flags & os.ST_NOSUID and libc.prctl(39, 0, 0, 0, 0) == 0 else blocked('nosuid or no_new_privs')
"""),
    Attempt(THEME, "become the host's root by set*id", """
def to(uid):
    def go():
        os.setresuid(uid, uid, uid)
        return os.getresuid()
    return go
if os.getuid() == 0: blocked('it is root of its own range, and of nothing else')
tried(to(0))
""", look=_owner),
    Attempt(THEME, "an id beyond its range", """
tried(lambda: os.chown(open('./mine', 'w').name, 70000, 70000), lambda: os.setresuid(70000, 70000, 70000),
      lambda: os.setresgid(0xfffffffe, 0xfffffffe, 0xfffffffe))
""", control=True),
    Attempt(THEME, "write a uid map", """
tried(lambda: write('/proc/self/uid_map', b'0 0 4294967295'), lambda: write('/proc/1/uid_map', b'0 0 4294967295'))
"""),
    Attempt(THEME, "pid 1: kill, stop, debug", """
for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGHUP):
    try: os.kill(HOST['init'], number)
    except OSError: pass
time.sleep(0.2)
blocked('it goes on, as the look from outside shows')
""", open_at=_OWN_PID_1),
    Attempt(THEME, "pid 1: memory, descriptors, root, environment", """
init = HOST['init']
paths = ['/proc/%d/%s' % (init, name) for name in ('mem', 'environ', 'auxv', 'maps', 'stack', 'io')]
tried(*(lambda path=path: (os.open(path, os.O_RDONLY), read(path)) for path in paths),
      lambda: os.listdir('/proc/%d/fd' % init), lambda: os.listdir('/proc/%d/root' % init),
      lambda: os.readlink('/proc/%d/exe' % init), lambda: os.listdir('/proc/%d/map_files' % init))
"""),
    Attempt(THEME, "limits, CPUs and priority of pid 1", """
init = HOST['init']
def limits():
    now = resource.prlimit(init, resource.RLIMIT_NOFILE)
    return resource.prlimit(init, resource.RLIMIT_NOFILE, now)
tried(limits, lambda: (os.sched_setaffinity(init, os.sched_getaffinity(init)), 'CPUs'),
      lambda: (os.setpriority(os.PRIO_PROCESS, init, os.getpriority(os.PRIO_PROCESS, init)), 'priority'))
"""),
    Attempt(THEME, "be spared by the out-of-memory killer", """
def score(value):
    return lambda: (write('/proc/self/oom_score_adj', value), value)
tried(score(b'-1000'), score(b'-1'))
""", control=False),
    Attempt(THEME, "more open files, processes or locked memory than allowed", """
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
def more():
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
    return 'RLIMIT_NOFILE'
try:
    more()
except (OSError, ValueError) as error:
    blocked(name_of(error))
opened(hard)
"""),
]
