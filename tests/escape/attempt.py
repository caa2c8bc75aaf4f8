"""What an attempt to escape is, and the words with which its program tells how it went."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Runtime
from tests.runtime.boxes import Box

# Runs before each program, inside. A program must end with one of the three words: one that breaks proves nothing.
PRELUDE = r"""
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
HOST = json.loads(sys.argv[1])
REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)

def end(word, *detail):
    sys.stdout.write('\n%s: %s\n' % (word, ' '.join(str(part) for part in detail)))
    sys.stdout.flush()
    os._exit(0)

def blocked(*detail): end('blocked', *detail)
def opened(*detail): end('open', *detail)

def name_of(error):
    return errno.errorcode.get(error.errno or 0, str(error)) if isinstance(error, OSError) else str(error)

def call(number, *arguments):
    # The result, or minus the error number.
    ctypes.set_errno(0)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    return result if result >= 0 else -ctypes.get_errno()

def judge(result, what=''):
    # A refusal is one; whatever else the kernel says, it has looked at the call.
    if result < 0 and -result in REFUSALS:
        blocked(what, errno.errorcode[-result])
    opened(what, result if result >= 0 else errno.errorcode.get(-result, result))

def tried(*actions, refusals=None):
    # Open as soon as one of them works; blocked when all are refused.
    seen = []
    for action in actions:
        try:
            result = action()
        except OSError as error:
            if refusals is not None and error.errno not in refusals:
                raise
            seen.append(name_of(error))
        else:
            opened(result)
    blocked(*dict.fromkeys(seen))

def read(path, size=4096):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)

def write(path, data, flags=0):
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | flags)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)

def text(value):
    return ctypes.c_char_p(value)

def in_child(action):
    # The exit status of a child that does it; negative for a signal.
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(action() or 0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@dataclass(frozen=True)
class Host:
    """What the host has that an attempt could reach; all of it belongs to the tests."""

    facts: dict[str, Any]
    neighbour: Box | None = None
    level: str = ""
    common: Mapping[str, Any] = field(default_factory=dict)  # config of each sandbox
    shared: Box | None = None  # for attempts that change nothing


@contextlib.asynccontextmanager
async def box_of(runtime: Runtime, config: Mapping[str, Any]) -> AsyncIterator[Box]:
    """A sandbox, destroyed at the end."""
    handle = await runtime.create(f"box-{secrets.token_hex(3)}", SandboxConfig(**config))
    box = Box(runtime, handle, Path(str(handle.data.get("home", "/root"))))
    try:
        yield box
    finally:
        box.close()
        await runtime.destroy(handle)


@dataclass(frozen=True)
class Attempt:
    """One attempt. Either `program` runs inside, or `act` is done from outside against what `program` prepared.

    control: it works where nothing isolates, and does no harm there: tried at level "none" as root, where it has to be
        open. So we know that it is an attack at all.
    open_at: levels at which it is known to work, and why: told in docs/security.md, not hidden.
    look: asks the host afterwards; answers what became of it, or None when nothing did.
    config: of the sandbox, beside the usual one. user: who tries it, inside. pty: with a terminal.
    quiet: the program may end without a word, as it hits itself too.
    absent: levels that do not have what it attacks, and why.
    shared: it changes nothing, so one sandbox serves all such attempts with the same config.
    root: only a runner that is root can look.
    """

    theme: str
    name: str
    program: str = ""
    act: Callable[[Host, Box], Awaitable[str]] | None = None
    control: bool = False
    open_at: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    look: Callable[[Host, Box], str | None] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    user: str | None = None
    pty: bool = False
    quiet: bool = False
    x86_only: bool = False
    shared: bool = False
    root: bool = False

    @property
    def key(self) -> str:
        return f"{self.theme}: {self.name}"
