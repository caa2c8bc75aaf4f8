"""Attempts on files: of the host from inside, and through the API from outside over what the guest put there."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

from rock import errors
from tests.escape.attempt import Attempt, Host
from tests.runtime.boxes import Box

THEME = "files"


def _secret(host: Host, box: Box) -> str | None:
    """Whether the host's file, which an attempt wanted to change, is as it was."""
    with open(host.facts["secret"]) as file:
        return None if file.read() == host.facts["token"] else "the host's file was changed"


def _mode(host: Host, box: Box) -> str | None:
    found = os.stat(host.facts["secret"])
    if found.st_mode & 0o777 != 0o644 or abs(found.st_mtime - found.st_ctime) > 3600:
        os.chmod(host.facts["secret"], 0o644)
        os.utime(host.facts["secret"])
        return "the mode or the time of the host's file was changed"
    return None


def _interpreter(host: Host, box: Box) -> str | None:
    found = os.stat(host.facts["interpreter"])
    return None if [found.st_size, found.st_mtime_ns] == host.facts["interpreter_stat"] else "a program was changed"


_READ = "tried(lambda: (lambda data: data if HOST['token'].encode() in data else blocked('another file'))(read(%s)))"

INSIDE = [
    Attempt(THEME, "a file of the host by its path", _READ % "HOST['secret']", control=True),
    Attempt(THEME, "a file of the host by pid 1's root", _READ % "'/proc/%d/root' % HOST['init'] + HOST['secret']",
            control=True),
    Attempt(THEME, "a file of the host by pid 1's folder",
            _READ % "'/proc/%d/cwd/../../../../../../../..' % HOST['init'] + HOST['secret']"),
    Attempt(THEME, "a file of the host by a process of the host",
            _READ % "'/proc/%d/root' % HOST['victim'] + HOST['secret']", control=True),
    Attempt(THEME, "a file of the host by .. from everywhere",
            _READ % "'/work' * os.path.isdir('/work') + '/..' * 40 + HOST['secret']"),
    Attempt(THEME, "a file of the host by an open folder that was left", """
found = []
for fd in range(3, 4096):
    try: target = os.readlink('/proc/self/fd/%d' % fd)
    except OSError: continue
    found.append((fd, target))
    for path in ('..' + '/..' * 30 + HOST['secret'], '.' + HOST['secret']):
        try:
            inner = os.open(path, os.O_RDONLY, dir_fd=fd)
            if HOST['token'].encode() in os.read(inner, 4096): opened(fd, target)
        except OSError: pass
blocked('descriptors', *(target for fd, target in found)) if found else blocked('none is open')
"""),
    Attempt(THEME, "the working folder that it was started in", """
fd = os.open('.', os.O_RDONLY)
for _ in range(80): os.chdir('..')
try: data = read('.' + HOST['secret'])
except OSError as error: blocked(name_of(error))
opened('read')
""", control=True),
    Attempt(THEME, "overwrite a file of the host", "tried(lambda: write(HOST['secret'], b'escaped'))", look=_secret),
    Attempt(THEME, "mode, owner, times and attributes of a file of the host", """
path = HOST['secret']
tried(lambda: os.chmod(path, 0o600), lambda: os.utime(path, (1, 1)), lambda: os.chown(path, os.getuid(), -1),
      lambda: os.setxattr(path, 'user.escape', b'x'), lambda: os.symlink(path, path + '3'),
      lambda: os.truncate(path, 0), lambda: os.link(path, './linked'), lambda: os.rename(path, path + '2'),
      lambda: os.unlink(path), lambda: os.mkdir(path + '.d'))
""", look=_mode),
    Attempt(THEME, "overwrite the running program (/proc/self/exe)", """
def go(path):
    return lambda: (os.open(path, os.O_WRONLY), path)
tried(go('/proc/self/exe'), go(os.path.realpath('/proc/self/exe')), go('/proc/%d/exe' % HOST['init']))
""", look=_interpreter),
    Attempt(THEME, "overwrite a host program while it does not run", """
data = read('/usr/bin/env', 64)
try:
    write('/usr/bin/env', data)  # the same: should it be the host's own, its time tells
except OSError as error:
    blocked(name_of(error))
blocked('what was written is a copy of its own')
""", look=_interpreter),
    Attempt(THEME, "files of other sandboxes and of the server", """
seen = []
for path in (HOST['run_dir'], HOST['home'], '/root/.ssh', os.path.expanduser('~/.rock')):
    try:
        names = os.listdir(path)
        seen.append((path, names[:3]))
    except OSError: pass
opened(*seen) if seen else blocked('not to be seen')
""", control=False),
    Attempt(THEME, "private files of /etc", """
tried(lambda: os.open('/etc/shadow', os.O_RDONLY), lambda: os.open('/etc/gshadow', os.O_RDONLY),
      lambda: os.listdir('/etc/ssl/private'),
      lambda: os.listdir('/etc/sudoers.d'))
""", control=True),
    Attempt(THEME, "a file of the host's /usr that root alone may read", """
if not HOST['private']: blocked('an ordinary user cannot make one')
try: found = read(HOST['private'])
except OSError as error: blocked(name_of(error))
opened('read') if HOST['token'].encode() in found else blocked('another file')
""", control=True),
]


async def _reads(box: Box, path: str) -> bytes:
    fd = await box.runtime.open_read(box.handle, path)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _api_read(name: str, prepare: str, path: str) -> Attempt:
    """Reading through the API what the guest made of it."""

    async def act(host: Host, box: Box) -> str:
        where = path.format(**host.facts, work=box.root)
        try:
            async with asyncio.timeout(30):
                data = await _reads(box, where)
        except errors.RockError as error:
            return f"blocked: {error.code}"
        if host.facts["token"].encode() in data:
            return "open: the host's file was read"
        return "blocked: it is a file inside"

    return Attempt(THEME, f"API: read {name}", prepare, act=act)


def _api(name: str, prepare: str, work: Callable[[Host, Box], Awaitable[str]], **options: Any) -> Attempt:
    return Attempt(THEME, f"API: {name}", prepare, act=work, **options)


async def _write_through_link(host: Host, box: Box) -> str:
    told = []
    for name in ("file-link", "folder-link/secret", "a/../folder-link/secret", "chain"):
        try:
            fd, token = await box.runtime.open_write(box.handle, f"{box.root}/{name}", parents=True)
            os.write(fd, b"escaped")
            os.close(fd)
            await box.runtime.commit_write(box.handle, token)
            told.append("inside")
        except errors.RockError as error:
            told.append(error.code)
    return f"blocked: {' '.join(dict.fromkeys(told))}"  # what it did outside is looked at afterwards


async def _swap_parent(host: Host, box: Box) -> str:
    """The folder becomes a link to the host's between the writing and the putting in place."""
    told = []
    for _ in range(20):
        await box.sh(f"cd {box.root}; rm -rf swap; mkdir swap")
        try:
            fd, token = await box.runtime.open_write(box.handle, f"{box.root}/swap/secret")
            os.write(fd, b"escaped")
            os.close(fd)
            await box.sh(f"cd {box.root}; rm -rf old; mv swap old; ln -s {host.facts['folder']} swap")
            await box.runtime.commit_write(box.handle, token)
            told.append("inside")
        except errors.RockError as error:
            told.append(error.code)
    return f"blocked: {' '.join(dict.fromkeys(told))}"


async def _remove_through_link(host: Host, box: Box) -> str:
    told = []
    for name in ("folder-link", "tree"):
        try:
            await box.runtime.remove(box.handle, f"{box.root}/{name}", recursive=True)
            told.append("removed inside")
        except errors.RockError as error:
            told.append(error.code)
    for operation in (box.runtime.chmod(box.handle, f"{box.root}/modes", 0o777, recursive=True),
                      box.runtime.chown(box.handle, f"{box.root}/modes", "0", recursive=True)):
        with contextlib.suppress(errors.RockError):
            await operation
    return f"blocked: {' '.join(dict.fromkeys(told))}"


def _there(host: Host, box: Box) -> str | None:
    found = os.stat(host.facts["secret"])
    if found.st_mode & 0o777 != 0o644:
        return "the mode of the host's file was changed"
    return _secret(host, box)


def _odd(name: str, prepare: str) -> Attempt:
    """Something that is no file in place of one: refused, and never waited for."""

    async def act(host: Host, box: Box) -> str:
        told = []
        for operation in ("read", "write", "append"):
            try:
                async with asyncio.timeout(30):
                    path = f"{box.root}/odd"
                    if operation == "read":
                        os.close(await box.runtime.open_read(box.handle, path))
                    else:
                        fd, token = await box.runtime.open_write(box.handle, path, append=operation == "append")
                        os.close(fd)
                        await box.runtime.abort_write(box.handle, token)
                return f"open: {operation} was allowed"
            except TimeoutError:
                return f"open: {operation} never answers"
            except errors.RockError as error:
                told.append(error.code)
        return f"blocked: {' '.join(dict.fromkeys(told))}"

    return Attempt(THEME, f"API: {name} in place of a file", prepare, act=act)


async def _sparse(host: Host, box: Box) -> str:
    """A file of holes: what is read of it is what is asked for."""
    try:
        fd = await box.runtime.open_read(box.handle, f"{box.root}/sparse")
    except errors.InvalidConfig as error:  # where a file has to come whole to the server first
        return f"blocked: {error.message}"
    try:
        seen = os.pread(fd, 1 << 20, 1 << 39)
    finally:
        os.close(fd)
    return f"blocked: {len(seen)} bytes for a read of a mebibyte"


async def _names(host: Host, box: Box) -> str:
    """Odd file names in a listing: told as they are, or refused; pid 1 and the link go on."""
    entries = await box.runtime.list(box.handle, f"{box.root}/names")
    alive = await box.sh("echo alive")
    return "blocked: listed" if len(entries) == 3 and alive == "alive\n" else f"open: {entries!r} {alive!r}"


async def _many(host: Host, box: Box) -> str:
    """A folder with more files than a listing has."""
    entries = await box.runtime.list(box.handle, f"{box.root}/many", limit=100)
    return "blocked: bounded" if len(entries) == 100 else f"open: {len(entries)}"


_LINKS = "os.symlink(HOST['secret'], 'link'); os.symlink(HOST['folder'], 'folder-link'); blocked('ready')"
_WRITE_LINKS = """
os.symlink(HOST['secret'], 'file-link'); os.symlink(HOST['folder'], 'folder-link')
os.symlink('file-link', 'chain'); os.mkdir('a')
os.makedirs('tree/below'); os.symlink(HOST['folder'], 'tree/below/out'); os.makedirs('modes')
os.symlink(HOST['secret'], 'modes/link')
blocked('ready')
"""

API = [
    _api_read("a link to a file of the host", _LINKS, "{work}/link"),
    _api_read("through a link to a folder of the host", _LINKS, "{work}/folder-link/secret"),
    _api_read("pid 1's root", _LINKS, "/proc/1/root{secret}"),
    _api_read("/proc/self/root", _LINKS, "/proc/self/root{secret}"),
    _api_read("by a descriptor of pid 1", _LINKS, "/proc/self/fd/3/../../../..{secret}"),
    _api_read("pid 1's environment", "blocked('ready')", "/proc/1/environ"),
    _api_read("pid 1's memory", "blocked('ready')", "/proc/1/mem"),
    _api_read("by .. over the root", "blocked('ready')", "/../../../../../..{secret}"),
    _api("write through links to the host", _WRITE_LINKS, _write_through_link, look=_secret),
    _api("a folder that becomes a link meanwhile", "blocked('ready')", _swap_parent, look=_secret),
    _api("remove, chmod and chown through links to the host", _WRITE_LINKS, _remove_through_link, look=_there),
    _odd("a FIFO", "os.mkfifo('odd'); blocked('ready')"),
    _odd("a socket", "import subprocess\ntry:\n  s = socket.socket(socket.AF_UNIX); s.bind('odd')\n"
                     "except OSError: os.mkfifo('odd')\nblocked('ready')"),
    _odd("a folder", "os.mkdir('odd'); blocked('ready')"),
    _odd("a link to a device", "os.symlink('/dev/zero', 'odd'); blocked('ready')"),
    _odd("a link to itself", "os.symlink('odd', 'odd'); blocked('ready')"),
    _odd("a link to a terminal", "os.symlink('/dev/ptmx', 'odd'); blocked('ready')"),
    _api("a sparse file of a terabyte", "open('sparse', 'w').truncate(1 << 40); blocked('ready')", _sparse),
    _api("file names that are no text", "os.mkdir('names')\nfor name in (b'a\\nb', b'\\xff\\xfe', b'\"}'):\n"
                                        "  open(b'names/' + name, 'w').close()\nblocked('ready')", _names),
    _api("a folder of twenty thousand files",
         "os.mkdir('many')\nfor n in range(20000):\n  open('many/%d' % n, 'w').close()\n"
         "blocked('ready')", _many),
]

ATTEMPTS = [*INSIDE, *API]
