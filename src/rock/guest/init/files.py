"""File operations of a sandbox, executed inside it, where links and permissions apply as for its programs.

Each takes the request and returns (reply, descriptors). None of them blocks: a possible FIFO or device is opened with
O_PATH and inspected before it is opened for use. Long operations run in a child, see `in_child`. Standard library only.
"""

from __future__ import annotations

import binascii
import errno
import json
import os
import stat
from collections.abc import Callable
from typing import Any

from rock.guest.init import remove, syscalls, users
from rock.guest.init.link import Fault, of_os_error

Reply = tuple[dict[str, Any], list[int]]
Operation = Callable[[dict[str, Any]], Reply]

_KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}
_LARGEST_COPY = 1 << 20


class Later(Exception):
    """Raised by an operation that may take long; it is then repeated in a child."""


def open_read(request: dict[str, Any]) -> Reply:
    path = _path(request)
    try:
        return {}, [_open_regular(path, os.O_RDONLY, bool(request.get("in_child")))]
    except OSError as error:
        raise of_os_error(error, path) from None


def _open_regular(path: str, flags: int, in_child: bool) -> int:
    """Open an existing regular file and nothing else; never blocks and never triggers a device's side effects.

    pid 1 must not open /proc files, where its own memory and descriptors are accessible to it. A child does this
    instead, because the kernel denies it that access.
    """
    if in_child:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    else:
        try:
            handle = syscalls.open_plain(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Later from None
            raise
    try:
        found = os.fstat(handle)
        if not in_child and found.st_dev == os.stat("/proc").st_dev:
            raise Later
        mode = found.st_mode
        if stat.S_ISDIR(mode):
            raise Fault("invalid_config", f"{path}: it is a folder, not a file")
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "special file")
            raise Fault("invalid_config", f"{path}: it is a {kind}, not a regular file")
        return os.open(f"/proc/self/fd/{handle}", flags | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(handle)


def open_write(request: dict[str, Any]) -> Reply:
    path = os.path.realpath(_path(request))
    mode, in_child = request.get("mode"), bool(request.get("in_child"))
    try:
        if request.get("parents", True):
            make_parents(os.path.dirname(path) or "/")
        old = _stat_or_none(path)
        if old is not None and not stat.S_ISREG(old.st_mode):
            os.close(_open_regular(path, os.O_RDONLY, in_child))  # raises the matching fault
        if request.get("append"):
            return {"token": ""}, [_open_append(path, mode, old is not None, in_child)]
        return _open_beside(path, mode, old, str(request.get("user") or ""), in_child)
    except OSError as error:
        raise of_os_error(error, path) from None


def _stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _open_append(path: str, mode: int | None, exists: bool, in_child: bool) -> int:
    if exists:
        fd = _open_regular(path, os.O_WRONLY | os.O_APPEND, in_child)
    else:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o644)
    if mode is not None:
        os.fchmod(fd, mode)
    return fd


def _open_beside(path: str, mode: int | None, old: os.stat_result | None, user: str, in_child: bool) -> Reply:
    """Create a file in the same folder, with the owner and the mode of the old one."""
    if old is not None and not os.access(path, os.W_OK, effective_ids=True):
        raise Fault("permission_denied", f"{path}: permission denied")
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name[:100]}.{os.urandom(6).hex()}.part")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except PermissionError:
        if old is None:
            raise
        return {"token": ""}, [_open_regular(path, os.O_WRONLY | os.O_TRUNC, in_child)]  # the folder is not writable
    try:
        if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            try:
                os.fchown(fd, old.st_uid, old.st_gid)
            except PermissionError:
                pass  # an ordinary user cannot change the owner; the new file belongs to that user
        os.fchmod(fd, mode if mode is not None else stat.S_IMODE(old.st_mode) if old is not None else 0o644)
    except OSError:
        os.close(fd)
        os.unlink(beside)
        raise
    return {"token": json.dumps({"beside": beside, "path": path, "user": user})}, [fd]


def commit_write(request: dict[str, Any]) -> Reply:
    beside, path = _token(request)
    try:
        try:
            os.rename(beside, path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a mount point such as /etc/hosts can only be written in place
                raise
            if not request.get("in_child"):
                raise Later from None
            _copy_into(beside, path)
            os.unlink(beside)
    except OSError as error:
        try:
            os.unlink(beside)
        except OSError:
            pass
        raise of_os_error(error, path) from None
    return {}, []


def _copy_into(source: str, target: str) -> None:
    reading = _open_regular(source, os.O_RDONLY, True)
    try:
        writing = _open_regular(target, os.O_WRONLY | os.O_TRUNC, True)
        try:
            while piece := os.read(reading, _LARGEST_COPY):
                view = memoryview(piece)
                while view:
                    view = view[os.write(writing, view):]
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def abort_write(request: dict[str, Any]) -> Reply:
    beside, path = _token(request)
    try:
        os.unlink(beside)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise of_os_error(error, path) from None
    return {}, []


def _token(request: dict[str, Any]) -> tuple[str, str]:
    try:
        token = json.loads(request["token"])
        return str(token["beside"]), str(token["path"])
    except (KeyError, TypeError, ValueError):
        raise Fault("invalid_config", "this is no token of open_write") from None


def stat_path(request: dict[str, Any]) -> Reply:
    path = _path(request)
    try:
        found = os.stat(path, follow_symlinks=bool(request.get("follow", True)))
        return {"stat": _describe(path, os.path.basename(path.rstrip("/")) or "/", found)}, []
    except OSError as error:
        raise of_os_error(error, path) from None


def _describe(path: str, name: str, found: os.stat_result) -> list[Any]:
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "device")
    target = None
    if kind == "symlink":
        try:
            target = os.readlink(path)
        except OSError:
            pass
    return [name, kind, found.st_size, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime, target]


def list_folder(request: dict[str, Any]) -> Reply:
    path = _path(request)
    offset, limit = max(0, int(request.get("offset", 0))), max(0, int(request.get("limit", 10_000)))
    try:
        entries = []
        for name in sorted(os.listdir(path))[offset : offset + limit]:
            inner = os.path.join(path, name)
            try:
                entries.append(_describe(inner, name, os.lstat(inner)))
            except FileNotFoundError:
                continue
        return {"entries": entries}, []
    except OSError as error:
        raise of_os_error(error, path) from None


def remove_path(request: dict[str, Any]) -> Reply:
    path = _path(request)
    if os.path.normpath(path).lstrip("/") == "":
        raise Fault("invalid_config", f"{path}: the root folder cannot be removed")
    path = path.rstrip("/")
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif request.get("recursive"):
            remove.remove_tree(path)
        else:
            os.rmdir(path)
    except OSError as error:
        raise of_os_error(error, path) from None
    return {}, []


def make_parents(path: str) -> None:
    """Create a folder and its parents, as os.makedirs does, but for paths of any depth. OSError."""
    missing: list[str] = []
    if os.path.lexists(path) and not os.path.isdir(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path.rstrip("/")) or "/"
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise


def make_dir(request: dict[str, Any]) -> Reply:
    path = _path(request)
    try:
        if request.get("parents", True):
            if os.path.isdir(path):
                return {}, []
            make_parents(os.path.dirname(path.rstrip("/")) or "/")
        os.mkdir(path)
        os.chmod(path, int(request.get("mode", 0o755)))
    except OSError as error:
        raise of_os_error(error, path) from None
    return {}, []


def symlink(request: dict[str, Any]) -> Reply:
    path = _path(request)
    try:
        os.symlink(str(request["target"]), path)
    except OSError as error:
        raise of_os_error(error, path) from None
    return {}, []


def move(request: dict[str, Any]) -> Reply:
    """Rename; across mounts, copy the file or tree and remove the old one; links are preserved."""
    source, target = _path(request, "source"), _path(request, "target")
    try:
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            import shutil  # in a child only: saves memory in pid 1

            shutil.copytree(source, target, symlinks=True) if os.path.isdir(source) and not os.path.islink(source) \
                else shutil.copy2(source, target, follow_symlinks=False)
            remove_path({"path": source, "recursive": True})
    except OSError as error:
        raise of_os_error(error, f"{source} -> {target}") from None
    return {}, []


def chmod(request: dict[str, Any]) -> Reply:
    path, mode = _path(request), int(request["mode"])
    try:
        os.chmod(path, mode)
        if request.get("recursive"):
            for folder, folders, files in os.walk(path):
                for name in (*folders, *files):
                    inner = os.path.join(folder, name)
                    if not os.path.islink(inner):
                        os.chmod(inner, mode)
    except OSError as error:
        raise of_os_error(error, path) from None
    return {}, []


def chown(request: dict[str, Any]) -> Reply:
    path, owner = _path(request), users.find(str(request["owner"]))
    try:
        os.chown(path, owner.uid, owner.gid)
        if request.get("recursive"):
            for folder, folders, files in os.walk(path):
                for name in (*folders, *files):
                    os.lchown(os.path.join(folder, name), owner.uid, owner.gid)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Fault("unsupported", f"{path}: this sandbox has no user {owner.uid}:{owner.gid}") from None
        raise of_os_error(error, path) from None
    return {}, []


def _path(request: dict[str, Any], name: str = "path") -> str:
    path = str(request.get(name) or "")
    if not path.startswith("/") or "\0" in path:
        raise Fault("invalid_config", f"{path!r} is not an absolute path")
    return path


def space(request: dict[str, Any]) -> Reply:
    """Used and total bytes of the file system at a path, and used and total inodes."""
    path = _path(request)
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise of_os_error(error, path) from None
    return {"space": [(found.f_blocks - found.f_bfree) * found.f_frsize, found.f_blocks * found.f_frsize,
                      found.f_files - found.f_ffree, found.f_files]}, []


# ---- many small files in one request ----

BATCH = 40_000  # bytes of all contents of a request or a reply: it fits into one packet
BATCH_ENTRIES = 64  # pid 1 serves nothing else meanwhile


def write_entries(request: dict[str, Any]) -> Reply:
    """Create folders, links and small files in order. Each file replaces an old one atomically; when one fails, those
    before it stay."""
    child = bool(request.get("in_child"))
    folders: dict[str, str] = {}  # resolved, by path
    for entry in request["entries"][:BATCH_ENTRIES]:
        fields = {**entry, "in_child": child}
        if entry["kind"] == "directory":
            make_dir(fields)
        elif entry["kind"] == "symlink":
            try:
                remove_path(fields)
            except Fault as fault:
                if fault.code != "not_found":
                    raise
            symlink(fields)
            folders.clear()
        else:
            _write_file(fields, folders)
    return {}, []


def _write_file(fields: dict[str, Any], folders: dict[str, str]) -> None:
    path = _path(fields)
    data = memoryview(binascii.a2b_base64(fields["data"]))
    folder, name = os.path.split(path)
    try:
        place = folders.get(folder)
        if place is None:
            place = folders[folder] = os.path.realpath(folder)
            make_parents(place)
        if name in ("", ".", "..") or _stat_or_none(f"{place}/{name}") is not None:
            _replace_file(fields, data)
            return
        beside = f"{place}/.{name[:100]}.{os.urandom(6).hex()}.part"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                while data:
                    data = data[os.write(fd, data):]
                os.fchmod(fd, int(fields["mode"]))
            finally:
                os.close(fd)
            os.rename(beside, f"{place}/{name}")
        except OSError:
            os.unlink(beside)
            raise
    except OSError as error:
        raise of_os_error(error, path) from None


def _replace_file(fields: dict[str, Any], data: memoryview) -> None:
    """As a write of the whole file: it keeps the owner, follows a link, and knows mount points."""
    reply, [fd] = open_write(fields)
    token = {"token": reply["token"], "in_child": fields["in_child"]}
    try:
        try:
            while data:
                data = data[os.write(fd, data):]
        finally:
            os.close(fd)
    except OSError:
        if reply["token"]:
            abort_write(token)
        raise
    if reply["token"]:
        commit_write(token)


def read_files(request: dict[str, Any]) -> Reply:
    """Contents of regular files, of BATCH bytes together; null for one that is larger, or cannot be read."""
    left = BATCH
    found: list[str | None] = []
    for path in request["paths"][:BATCH_ENTRIES]:
        content = _read_small(str(path), left, bool(request.get("in_child")))
        left -= len(content or b"")
        found.append(None if content is None else binascii.b2a_base64(content, newline=False).decode())
    return {"files": found}, []


def _read_small(path: str, most: int, in_child: bool) -> bytes | None:
    try:
        fd = _open_regular(_path({"path": path}), os.O_RDONLY, in_child)
    except (Fault, OSError):
        return None
    try:
        content = os.read(fd, most + 1)
        complete = len(content) == os.fstat(fd).st_size
    except OSError:
        return None
    finally:
        os.close(fd)
    return content if complete and len(content) <= most else None


OPERATIONS: dict[str, Operation] = {
    "open_read": open_read, "open_write": open_write, "commit_write": commit_write, "abort_write": abort_write,
    "stat": stat_path, "list": list_folder, "remove": remove_path, "make_dir": make_dir, "symlink": symlink,
    "move": move, "chmod": chmod, "chown": chown, "space": space,
    "write_entries": write_entries, "read_files": read_files,
}


def in_child(request: dict[str, Any]) -> bool:
    """Whether a request must not run in pid 1 itself: it may take long, or it runs as another user."""
    return bool(request.get("user") or request.get("recursive") or request["op"] in ("list", "move"))
