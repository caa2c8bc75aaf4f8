"""Attempts on the kernel: system calls that have opened sandboxes, and other doors into it."""

from __future__ import annotations

from tests.escape.attempt import Attempt

THEME = "kernel"


def _call(name: str, number: int, arguments: str = "", *, control: bool = False) -> Attempt:
    program = f"judge(call({number}{', ' if arguments else ''}{arguments}), {name!r})"
    return Attempt(THEME, name, program, control=control, x86_only=True)


_BUFFER = "ctypes.create_string_buffer(256)"
CALLS = [
    _call("ptrace of pid 1", 101, "16, 1, 0, 0"),
    _call("ptrace: be traced", 101, "0, 0, 0, 0", control=True),
    _call("process_vm_readv of pid 1", 310, f"1, {_BUFFER}, 1, {_BUFFER}, 1, 0"),
    _call("process_vm_writev of pid 1", 311, f"1, {_BUFFER}, 1, {_BUFFER}, 1, 0"),
    _call("pidfd_getfd: a descriptor of pid 1", 438, "call(434, 1, 0), 3, 0"),
    _call("kcmp with pid 1", 312, "1, os.getpid(), 0, 0, 0"),
    _call("add_key", 248, "text(b'user'), text(b'rock-escape'), text(b'x'), 1, -2", control=True),
    _call("keyctl: join a session keyring", 250, "1, text(b'rock-escape')", control=True),
    _call("keyctl: read the user's keyring", 250, f"11, -4, {_BUFFER}, 256"),
    _call("request_key", 249, "text(b'user'), text(b'rock-none'), 0, -2", control=True),
    _call("bpf: make a map", 321, "0, ctypes.create_string_buffer(struct.pack('=IIII', 2, 4, 4, 1), 72), 72",
          control=True),
    _call("io_uring_setup", 425, "1, ctypes.create_string_buffer(120)", control=True),
    _call("userfaultfd", 323, "1", control=True),
    _call("perf_event_open", 298,
          "ctypes.create_string_buffer(struct.pack('=IIQ', 1, 112, 0) + bytes(96)), 0, -1, -1, 0", control=True),
    _call("mount a tmpfs", 165, "text(b'x'), text(b'/tmp'), text(b'tmpfs'), 0, 0"),
    _call("mount: bind", 165, "text(b'/'), text(b'/tmp'), 0, 4096, 0"),
    _call("mount: remount / writable", 165, "0, text(b'/'), 0, 32, 0"),
    _call("umount2 of /proc", 166, "text(b'/proc'), 2"),
    _call("pivot_root", 155, "text(b'/tmp'), text(b'/tmp')"),
    _call("fsopen", 430, "text(b'tmpfs'), 0", control=True),
    _call("fspick", 433, "-100, text(b'/'), 0", control=True),
    _call("fsconfig", 431, "0, 0, 0, 0, 0", control=True),
    _call("fsmount", 432, "0, 0, 0", control=True),
    _call("open_tree: a copy of /", 428, "-100, text(b'/'), 1", control=True),
    _call("open_tree_attr", 467, "-100, text(b'/'), 1, 0, 0", control=True),
    _call("move_mount", 429, "-100, text(b'/nowhere-at-all'), -100, text(b'/tmp'), 0", control=True),
    _call("mount_setattr", 442, "-100, text(b'/tmp'), 0, 0, 1", control=True),
    _call("setns into pid 1's namespaces", 308, "call(434, 1, 0), 0x7e020000"),
    _call("swapon", 167, "text(b'/tmp/none'), 0", control=True),
    _call("reboot", 169, "0, 0, 0, 0"),
    _call("kexec_load", 246, "0, 1, 0, 0"),
    _call("kexec_file_load", 320, "-1, -1, 0, 0, 0"),
    _call("init_module", 175, "0, 0, text(b'')"),
    _call("finit_module", 313, "-1, text(b''), 0"),
    _call("delete_module", 176, "text(b'rock-no-such-module'), 0"),
    _call("open_by_handle_at", 304, "-100, ctypes.create_string_buffer(struct.pack('=Ii', 8, 1) + bytes(8)), 0",
          control=True),
    _call("name_to_handle_at", 303,
          "-100, text(b'/'), ctypes.create_string_buffer(struct.pack('=I', 64) + bytes(124)), "
          "ctypes.create_string_buffer(4), 0", control=True),
    _call("acct", 163, "text(b'/tmp/acct')"),
    _call("quotactl", 179, "0, 0, 0, 0", control=True),
    _call("quotactl_fd", 443, "0, 0, 0, 0"),
    _call("settimeofday", 164, "0, ctypes.create_string_buffer(8)"),
    _call("clock_settime", 227, "0, 0"),
    _call("adjtimex: set", 159, "ctypes.create_string_buffer(struct.pack('=I', 0x4000) + bytes(204))"),
    _call("syslog: the kernel's log", 103, f"3, {_BUFFER}, 256", control=True),
    _call("iopl", 172, "3"),
    _call("ioperm", 173, "0x80, 1, 1"),
    _call("modify_ldt", 154, "0, 0, 0", control=True),
    _call("vhangup", 153),
    _call("fanotify_init", 300, "0, 0", control=True),
    _call("lookup_dcookie", 212, f"0, {_BUFFER}, 256"),
    _call("personality: no address randomization", 135, "0x0040000", control=True),
    _call("personality: READ_IMPLIES_EXEC", 135, "0x0400000", control=True),
    _call("mbind", 237, "0, 0, 0, 0, 0, 0", control=True),
    _call("set_mempolicy", 238, "0, 0, 0", control=True),
    _call("move_pages of pid 1", 279, "1, 0, 0, 0, 0, 0"),
    _call("migrate_pages of pid 1", 256, "1, 0, 0, 0"),
    _call("uselib", 134, "text(b'/nowhere')"),
    _call("clone3", 435, "0, 0", control=True),
    Attempt(THEME, "calls that no list has: memfd_secret, statmount, listmount, lsm_list_modules", """
answers = {number: call(number, 0, 0, 0, 0) for number in (447, 457, 458, 461)}
reached = [number for number, answer in answers.items() if answer >= 0 or -answer not in REFUSALS]
opened(*reached) if reached else blocked('ENOSYS')
""", x86_only=True),
    _call("unshare: a time namespace", 272, "0x80", control=True),
    _call("chroot as one who may not", 161, "text(b'/')"),
]
CALLS[-1] = Attempt(THEME, "chroot out by an open folder", """
try:
    inside = os.open('/', os.O_RDONLY | os.O_DIRECTORY)
    os.makedirs('/tmp/jail', exist_ok=True)
    os.chroot('/tmp/jail')
    os.fchdir(inside)
    for _ in range(64): os.chdir('..')
    os.chroot('.')
except OSError as error:
    blocked(name_of(error))
try:
    opened('read', read(HOST['secret'])[:8])
except FileNotFoundError:
    blocked('the root that it gets to is the sandbox itself')
""", open_at={})

NAMESPACES = [
    Attempt(THEME, f"{how}: a new {kind} namespace", program % flag, control=True, x86_only=True)
    for kind, flag in (("user", 0x10000000), ("mount", 0x00020000), ("pid", 0x20000000), ("network", 0x40000000),
                       ("cgroup", 0x02000000), ("uts", 0x04000000), ("ipc", 0x08000000))
    for how, program in (
        ("clone", "pid = call(56, %#x | 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\njudge(pid)"),
        ("unshare", "judge(call(272, %#x))"))
]

_MACHINE_CODE = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex(%r))
run = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
def go():
    answer = run()
    return 7 if answer > 0 else 8
status = in_child(go)
if status == -signal.SIGSYS: blocked('killed by SIGSYS')
if status == 8: blocked('refused')
if status == -signal.SIGSEGV: blocked('this kernel has no such interface')
opened('status', status)
"""
DOORS = [
    # mov eax, 20 (getpid of 32 bit); int 0x80; ret
    Attempt(THEME, "system calls of 32-bit programs (int 0x80)", _MACHINE_CODE % "b814000000cd80c3", control=True,
            x86_only=True),
    # mov eax, 0x40000027 (getpid of x32); syscall; ret
    Attempt(THEME, "system calls of x32", _MACHINE_CODE % "b8270000400f05c3", x86_only=True),
    Attempt(THEME, "TIOCSTI: type into a terminal", "tried(lambda: fcntl.ioctl(0, 0x5412, b'x'))", pty=True),
    Attempt(THEME, "TIOCSTI with high bits set",
            "tried(lambda: judge(call(16, 0, 0x100005412, ctypes.create_string_buffer(b'x'))))", pty=True,
            x86_only=True),
    Attempt(THEME, "TIOCLINUX: paste into a console", "tried(lambda: fcntl.ioctl(0, 0x541C, b'\\x03'))", pty=True),
    Attempt(THEME, "TIOCSETD: load a line discipline",
            "judge(call(16, 0, 0x5423, ctypes.create_string_buffer(struct.pack('i', 21))))",
            pty=True, x86_only=True),
    *(Attempt(THEME, f"open {device}", f"tried(lambda: os.open({device!r}, {flags}))")
      for device, flags in (("/dev/mem", "os.O_RDONLY"), ("/dev/kmsg", "os.O_RDONLY | os.O_NONBLOCK"),
                            ("/dev/kvm", "os.O_RDWR"), ("/dev/net/tun", "os.O_RDWR"), ("/dev/fuse", "os.O_RDWR"),
                            ("/dev/userfaultfd", "os.O_RDWR"), ("/dev/loop-control", "os.O_RDWR"),
                            ("/proc/kcore", "os.O_RDONLY"), ("/proc/kmsg", "os.O_RDONLY | os.O_NONBLOCK"))),
    Attempt(THEME, "mknod of a disk and a console", """
made = []
for folder in ('.', '/tmp', '/dev/shm', '/dev'):
    for kind, device in ((0o60600, HOST['disk']), (0o20600, os.makedev(5, 1)), (0o20600, os.makedev(10, 232))):
        try:
            os.mknod(folder + '/escape-node', kind, device)
            made.append(folder)
            os.unlink(folder + '/escape-node')
        except OSError as error:
            last = error
opened(*made) if made else blocked(name_of(last))
""", control=True),
    Attempt(THEME, "write settings of the kernel", """
paths = ['/proc/sys/kernel/core_pattern', '/proc/sys/kernel/modprobe', '/proc/sys/vm/overcommit_memory',
         '/proc/sys/kernel/hostname', '/proc/sys/fs/binfmt_misc/register', '/proc/sys/vm/panic_on_oom',
         '/proc/sys/kernel/randomize_va_space', '/proc/sys/user/max_user_namespaces', '/proc/irq/default_smp_affinity']
def again(path):
    return lambda: (write(path, read(path)), path)
tried(*(again(path) for path in paths))
""", control=True),
    Attempt(THEME, "write to /proc/sysrq-trigger", "tried(lambda: os.open('/proc/sysrq-trigger', os.O_WRONLY))"),
    Attempt(THEME, "write to /sys", """
paths = ['/sys/kernel/uevent_helper', '/sys/kernel/uevent_seqnum', '/sys/power/state', '/sys/power/wake_lock',
         '/sys/kernel/mm/ksm/run', '/sys/kernel/mm/transparent_hugepage/enabled', '/sys/module/loop/uevent',
         '/sys/block/vda/queue/read_ahead_kb', '/sys/devices/system/cpu/cpu1/online']
tried(*(lambda path=path: (os.open(path, os.O_WRONLY), path) for path in paths))
""", control=True),
    Attempt(THEME, "cgroups: files of one, and a release_agent", """
found = []
for root, folders, files in os.walk('/sys/fs/cgroup'):
    for name in files:
        if name in ('cgroup.procs', 'release_agent', 'tasks', 'memory.limit_in_bytes', 'memory.max', 'pids.max'):
            found.append(root + '/' + name)
    if len(found) > 400: break
tried(*(lambda path=path: (os.open(path, os.O_WRONLY), path) for path in found)) if found else blocked('none is seen')
""", control=True),
    Attempt(THEME, "addresses of the kernel in /proc/kallsyms", """
try:
    lines = read('/proc/kallsyms', 4000).decode().splitlines()[:20]
except OSError as error:
    blocked(name_of(error))
shown = [line for line in lines if line.split()[0].strip('0')]
opened(shown[0]) if shown else blocked('all zero')
"""),
    Attempt(THEME, "tracing and debugging file systems", """
names = ('/sys/kernel/tracing', '/sys/kernel/debug', '/sys/fs/bpf', '/sys/kernel/config')
seen = []
for name in names:
    try:
        if os.listdir(name): seen.append(name)
    except OSError: pass
opened(*seen) if seen else blocked('empty or absent')
"""),
    Attempt(THEME, "a core file, and its limit raised", """
import ctypes
try:
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raised = resource.getrlimit(resource.RLIMIT_CORE)
except (OSError, ValueError) as error:
    raised = (0, 0)
def crash():
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(5)
pid = os.fork()
if pid == 0: crash()
status = os.waitpid(pid, 0)[1]
left = [name for name in os.listdir('.') if name.startswith('core')]
if raised[1] != 0 or left or os.WCOREDUMP(status): opened(raised, left)
blocked('limit 0, no core')
"""),
]

ATTEMPTS = [*CALLS, *NAMESPACES, *DOORS]
