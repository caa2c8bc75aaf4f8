"""The image `host`: this machine's own system, without its secrets.

    /usr and its links          the machine's, mounted read-only (Bind)
    /etc                        files of an allow-list; only publicly readable ones, and no private key
    /root /home /tmp /var ...   empty
    /opt/rock/python            the Python that runs ROCK, where it is not under /usr

Everything but the binds is a small layer, the skeleton, rebuilt when its inputs have changed. The binds are never
mapped to the sandbox's users: a file of the machine that only its owner may read stays unreadable inside.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rock.images.layers.importer import this_architecture
from rock.images.layers.store import LayerStore
from rock.images.layers.tar_reader import Entry, Kind
from rock.images.layers.writer import LayerWriter
from rock.images.records import Bind, ImageRecord, RootFS
from rock.images.registry.reference import HOST

_VERSION = 1  # increase when the code below builds another skeleton from the same inputs
_GLANCE_EVERY = 1.0  # seconds between two checks of the input folders: 0.3 ms
_LOOK_EVERY = 30.0  # and of each input: 10 ms
_LARGEST = 4 << 20
_PYTHON = "/opt/rock/python"
PYTHON_LIBRARIES = f"{_PYTHON}/lib"
_BIN = "/opt/rock/bin"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/root/.local/bin"
_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

# Allowed files of /etc: names that usually hold no secrets, and the mirrors of apt and pip. A file with credentials or
# a key is left out (_public). Deliberately excluded: hosts, environment, profile and bashrc (edited by administrators;
# generated below instead), gitconfig, npmrc and apt's auth.conf (tokens).
_ETC = (
    "alternatives", "apt/apt.conf", "apt/apt.conf.d", "apt/keyrings", "apt/preferences", "apt/preferences.d",
    "apt/sources.list", "apt/sources.list.d", "apt/trusted.gpg", "apt/trusted.gpg.d",
    "bash_completion", "bash_completion.d", "bindresvport.blacklist", "ca-certificates",
    "ca-certificates.conf", "crypto-policies/back-ends", "crypto-policies/config", "debian_version", "fonts",
    "gai.conf", "host.conf", "inputrc", "issue", "java-*-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "localtime", "locale.alias", "locale.conf", "locale.gen", "login.defs", "lsb-release", "magic", "magic.mime",
    "mime.types", "netconfig", "networks", "nsswitch.conf", "os-release", "perl", "pip.conf", "pki/ca-trust/extracted",
    "pki/tls/cert.pem", "pki/tls/certs", "pki/tls/openssl.cnf", "protocols", "python", "python3", "python3.*",
    "redhat-release", "rpc", "services", "shells", "ssl/cert.pem", "ssl/certs", "ssl/openssl.cnf", "system-release",
    "terminfo", "timezone", "vim", "xattr.conf",
)  # fmt: skip

_FOLDERS = (
    "dev", "etc", "etc/pam.d", "home", "media", "mnt", "opt", "opt/rock", "opt/rock/bin", "opt/rock/envs", "proc",
    "root", "run", "run/lock", "srv", "sys", "tmp", "usr", "var", "var/cache", "var/lib", "var/local", "var/log",
    "var/mail", "var/opt", "var/spool", "var/tmp",
)  # fmt: skip
_MODES = {"root": 0o700, "tmp": 0o1777, "var/tmp": 0o1777, "run/lock": 0o1777}

_MADE = {
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/resolv.conf": "",
    "etc/hostname": "sandbox\n",
    "etc/machine-id": "",
    "etc/fstab": "",
    "etc/profile": "[ -n \"$BASH\" ] && [ -r /etc/bash.bashrc ] && . /etc/bash.bashrc\numask 022\n",
    "etc/bash.bashrc": "[ -z \"$PS1\" ] && return\nshopt -s checkwinsize\nPS1='\\u@\\h:\\w\\$ '\n",
}  # fmt: skip
# su and runuser: root may switch to any user, and other users to none. Without these files they reject root too.
_PAM = """\
auth sufficient pam_rootok.so
auth required pam_deny.so
account required pam_permit.so
session required pam_permit.so
password required pam_deny.so
"""
_MADE |= {f"etc/pam.d/{name}": _PAM for name in ("su", "su-l", "runuser", "runuser-l")}
_MADE["etc/pam.d/other"] = "".join(f"{kind} required pam_deny.so\n" for kind in ("auth", "account", "password"))
_LINKS = {"etc/mtab": "/proc/self/mounts", "var/run": "/run", "var/lock": "/run/lock"}


@dataclass(frozen=True)
class Host:
    """The prepared image `host`: digest of its skeleton, whose layer is in the store, and the binds over it."""

    diff_id: str
    binds: tuple[Bind, ...]
    env: dict[str, str]


@dataclass
class HostImage:
    """Builds and caches the skeleton in `layers`."""

    layers: LayerStore
    _known: Host | None = field(default=None, init=False)
    _glanced: float = field(default=float("-inf"), init=False)
    _looked: float = field(default=float("-inf"), init=False)
    _watched: tuple[str, ...] = field(default=(), init=False)
    _stamps: list[tuple[int, int]] = field(default_factory=list, init=False)

    def diff_id(self) -> str:
        """Digest of the skeleton for the current state of the machine, without building it."""
        return _signature(list(_plan()))

    def current(self) -> Host:
        """The image of the machine's recent state: an installed or upgraded package appears within a second, a file
        written in place within half a minute."""
        now = time.monotonic()
        if self._known is not None and os.path.isdir(self.layers.path(self._known.diff_id)):
            if now - self._glanced < _GLANCE_EVERY:
                return self._known
            if now - self._looked < _LOOK_EVERY and self._stamps == _stamps(self._watched):
                self._glanced = now
                return self._known
        plan = list(_plan())
        self._watched = _watched(plan)
        self._stamps = _stamps(self._watched)
        diff_id = _signature(plan)
        self.layers.add("making the host image", lambda writer: _write(plan, writer, diff_id), diff_id)
        self._known = Host(diff_id, _binds(), _env())
        self._glanced = self._looked = now
        return self._known


@dataclass(frozen=True)
class _Planned:
    """One entry of the skeleton: a copy of `source`, a file with `text`, a link to `target`, or a folder."""

    path: str
    mode: int = 0o755
    source: str = ""
    text: str | None = None
    target: str | None = None
    stamp: tuple[int, ...] = ()


def _plan() -> Iterator[_Planned]:
    for path in _FOLDERS:
        yield _Planned(path, _MODES.get(path, 0o755))
    for name in _TOP:
        if os.path.islink(f"/{name}"):
            yield _Planned(name, target=os.readlink(f"/{name}"))
        elif os.path.isdir(f"/{name}"):
            yield _Planned(name)
    for path, text in _MADE.items():
        yield _Planned(path, 0o644, text=text)
    for path, target in _LINKS.items():
        yield _Planned(path, target=target)
    for path, name in (("etc/passwd", "/etc/passwd"), ("etc/group", "/etc/group")):
        yield _Planned(path, 0o644, text=_system_only(name))
    yield from _python_links()
    names = os.listdir("/etc")
    for pattern in _ETC:
        tops = fnmatch.filter(names, pattern) if "*" in pattern else [pattern]
        for top in sorted(tops):
            if os.path.lexists(f"/etc/{top}"):
                parts = top.split("/")[:-1]
                yield from (_Planned("/".join(("etc", *parts[: n + 1]))) for n in range(len(parts)))
                yield from _copied(f"/etc/{top}")


def readable() -> tuple[str, ...]:
    """The publicly readable parts of this machine's system, for a sandbox that uses them in place and not as a copy."""
    names = os.listdir("/etc")
    etc = [name for pattern in _ETC for name in (fnmatch.filter(names, pattern) if "*" in pattern else [pattern])]
    tops = [f"/{name}" for name in _TOP if os.path.isdir(f"/{name}")]
    prefix = _prefix()
    return ("/usr", *tops, *(f"/etc/{name}" for name in (*etc, "passwd", "group", "hosts", "resolv.conf")),
            *((prefix,) if prefix else ()))


def _watched(plan: list[_Planned]) -> tuple[str, ...]:
    """Folders that a package change modifies, and the files of /etc itself."""
    inputs = {f"/{item.path}" for item in plan if item.path.startswith("etc/") and item.target is None
              and item.text is None and (not item.source or item.path.count("/") == 1)}  # fmt: skip
    return tuple(sorted({"/etc", "/etc/passwd", "/etc/group", "/usr/bin", "/usr/local/bin", *inputs}))


def _stamps(paths: tuple[str, ...]) -> list[tuple[int, int]]:
    found = []
    for path in paths:
        try:
            info = os.lstat(path)
            found.append((info.st_mtime_ns, info.st_ino))
        except OSError:
            found.append((0, 0))
    return found


def _copied(path: str) -> Iterator[_Planned]:
    try:
        info = os.lstat(path)
        inside = path.lstrip("/")
        if stat.S_ISLNK(info.st_mode):
            yield _Planned(inside, target=os.readlink(path))
        elif not info.st_mode & stat.S_IROTH:
            return
        elif stat.S_ISREG(info.st_mode) and info.st_size <= _LARGEST:
            stamp = (info.st_size, info.st_mtime_ns, info.st_ino)
            yield _Planned(inside, stat.S_IMODE(info.st_mode) & 0o755, source=path, stamp=stamp)
        elif stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_IXOTH:
            yield _Planned(inside)
            for name in sorted(os.listdir(path)):
                yield from _copied(f"{path}/{name}")
    except (FileNotFoundError, PermissionError):
        return


def _system_only(path: str) -> str:
    """Lines of passwd or group of the system's own users; excludes personal accounts."""
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.rstrip("\n").split(":")
            if len(fields) < 4 or not fields[2].isdigit() or not (int(fields[2]) < 1000 or int(fields[2]) == 65534):
                continue
            if path.endswith("group"):
                fields[3] = ""
            elif fields[0] == "root":
                fields[4:] = ["root", "/root", "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"]
            fields[1] = "x" if path.endswith("group") else "*"
            kept.append(":".join(fields))
    return "\n".join(kept) + "\n"


def _signature(plan: list[_Planned]) -> str:
    return f"sha256:{hashlib.sha256(repr((_VERSION, os.geteuid() == 0, plan)).encode()).hexdigest()}"


def _write(plan: list[_Planned], writer: LayerWriter, diff_id: str) -> str:
    for item in plan:
        path = os.fsencode(item.path)
        if item.target is not None:
            writer.add(Entry(path, Kind.SYMLINK, target=os.fsencode(item.target)))
            continue
        data = item.text.encode() if item.text is not None else _public(item.source) if item.source else None
        if data is not None:
            writer.add(Entry(path, Kind.FILE, item.mode, size=len(data)), [data])
        elif not item.source:
            writer.add(Entry(path, Kind.FOLDER, item.mode))
    return diff_id


def _public(path: str) -> bytes | None:
    """A file's content unless it contains a private key or a password in a URL."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError:
        return None
    if len(data) > _LARGEST or b"PRIVATE KEY" in data or re.search(rb"://[^/\s@]+@", data):
        return None
    return data


# ---- the Python that runs ROCK ----


def _prefix() -> str | None:
    """Its prefix, if it is not under /usr and is publicly readable."""
    prefix = os.path.realpath(sys.base_prefix)
    if prefix == "/usr" or prefix.startswith("/usr/"):
        return None
    library = os.path.join(prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}")
    for path, needed in ((prefix, 0o005), (library, 0o005), (f"{library}/os.py", 0o004), (_executable(prefix), 0o005)):
        try:
            if os.stat(path).st_mode & needed != needed:
                return None
        except OSError:
            return None
    return prefix


def _executable(prefix: str) -> str:
    return os.path.join(prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")


def rock_python() -> str | None:
    """Path inside of the Python that runs ROCK, which matches packages built by it; None where it cannot be mounted."""
    prefix = os.path.realpath(sys.base_prefix)
    if prefix == "/usr" or prefix.startswith("/usr/"):
        return _executable(prefix) if os.path.exists(_executable(prefix)) else None
    return _executable(_PYTHON) if _prefix() else None


def _system_python() -> tuple[str, tuple[int, int]] | None:
    """The python3 of /usr with its version, which is in the name that its links resolve to."""
    for folder in ("/usr/local/bin", "/usr/bin"):
        found = re.fullmatch(r"python(\d)\.(\d+)", os.path.basename(os.path.realpath(f"{folder}/python3")))
        if found and os.access(f"{folder}/python3", os.X_OK):
            return f"{folder}/python3", (int(found[1]), int(found[2]))
    return None


def _needs_ours() -> bool:
    system = _system_python()
    return system is None or system[1] < (3, 11)


def _python_links() -> Iterator[_Planned]:
    if _prefix():
        yield _Planned(_PYTHON.lstrip("/"))
    if not any(os.path.exists(f"{folder}/python") for folder in ("/usr/local/bin", "/usr/bin")):
        system = _system_python()
        python = system[0] if system and not _needs_ours() else rock_python()
        if python:
            yield _Planned(f"{_BIN.lstrip('/')}/python", target=python)


# ---- visible folders ----


def system_folders() -> tuple[str, ...]:
    """/usr, and the top-level folders that are not links into it on this machine."""
    return ("/usr", *(f"/{n}" for n in _TOP if os.path.isdir(f"/{n}") and not os.path.islink(f"/{n}")))


def _binds() -> tuple[Bind, ...]:
    binds = [Bind(path, path) for path in system_folders()]
    if prefix := _prefix():
        binds.append(Bind(prefix, _PYTHON))
    return tuple(binds)


def _env() -> dict[str, str]:
    path = f"{_PATH}:{_BIN}"
    if _prefix() and _needs_ours():
        path += f":{_PYTHON}/bin"
    # The machine's Python is read-only, so pip installs for the user; a distribution's EXTERNALLY-MANAGED does not
    # apply
    return {"PATH": path, "LANG": "C.UTF-8", "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"}


# ---- images that show this machine's system ----
#
# This machine's own system as an image: the built-in `host`, aliases of it, and images derived from it.

_BY_REFERENCE = "shows this machine's own system: changes of the machine show in it"


class HostImages:
    """layers: those of the store."""

    def __init__(self, layers: LayerStore) -> None:
        self._layers = layers
        self._host = HostImage(layers)

    def diff_id(self) -> str:
        """Digest of its own layer for the current state of the machine, without building it."""
        return self._host.diff_id()

    def record(self, name: str, created: float) -> ImageRecord:
        """Its record under a name; created: seconds since the epoch."""
        host = self._host.current()
        return ImageRecord(
            name=name, kind=HOST, digest=host.diff_id, id=host.diff_id, layers=(host.diff_id,), size=0, created=created,
            by_reference=True, architecture=this_architecture(), env=host.env, note=_BY_REFERENCE,
        )  # fmt: skip

    def rootfs(self, name: str = HOST, *, writable: bool = False) -> RootFS:
        """Its root file system, ready to be mounted. writable: each sandbox may write anywhere, in its own overlay."""
        host = self._host.current()
        binds: tuple[Bind, ...] = host.binds
        if writable:
            binds = tuple(_opened(bind) for bind in binds)
        digest = host.diff_id if binds is host.binds else f"{host.diff_id}-{_hash_of(binds)}"
        return RootFS(digest=digest, layers=(self._layers.path(host.diff_id),), binds=binds, env=host.env, name=name)

    def named(self, record: ImageRecord) -> RootFS:
        """The root file system of a record that includes this machine's system."""
        extra = [self._layers.path(diff) for diff in reversed(record.layers[1:])]
        rootfs = self.rootfs(record.name, writable=os.geteuid() == 0 and not extra)
        if not extra:
            return rootfs
        # Derived from an image of this machine's system: its changed settings are its own.
        made = replace(
            rootfs, env={**rootfs.env, **record.env}, cwd=record.cwd, user=record.user, labels=record.labels,
            entrypoint=record.entrypoint, cmd=record.cmd, other=record.other,
        )  # fmt: skip
        said = (sorted(made.env.items()), made.cwd, made.user, made.entrypoint, made.cmd)
        return replace(made, digest=f"{rootfs.digest}-{_hash_of(said)}").with_layers(extra)


def _hash_of(value: object) -> str:
    """A short digest of a value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _opened(bind: Bind) -> Bind:
    """Binds of the machine's folders as writable; its Python may be in a user's home and stays read-only."""
    return replace(bind, writable=True, idmap=True) if bind.source == bind.target else bind
