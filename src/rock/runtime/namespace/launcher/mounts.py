"""Run folders and the file system view of a sandbox: overlay, binds, /proc, /sys, /dev, and the root switch.

    staging (a tmpfs of the launcher, visible to each child in its own mount namespace)
      ├── l0, l1, ...   the image's layers, with the sandbox's id mapping
      ├── rw            the sandbox's run folder with its upper and work folders, mapped too
      ├── b0, b1, ...   lower folders of writable binds
      ├── p0, p1, ...   their publicly readable part
      ├── nothing       an empty folder
      ├── dev           a /dev to copy: null zero full random urandom tty, links
      ├── sys           a /sys that shows a network namespace with loopback only
      └── root          overlay, becomes /

The launcher's namespace, and so that of each child at first, has a read-only tmpfs as its root, with the host's tree
below it. A sandbox's overlay covers that root and the host's tree is detached, which changes no other process.
pivot_root would visit every process of the machine.

A run folder is created and removed in a few system calls. It has few files, because some disks are slow with them: `s`
is pid 1's socket, `upper` and `work` belong to the overlay. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection
from typing import Any

from rock.host import folders
from rock.runtime.namespace.launcher import kernel, userns

# ---- run folder ----

# Content of a run folder without written files. The kernel owns `work`, which the sandbox cannot access.
_FILES = ("s", "record.json", "work/work/incompat/volatile/dirty")
_FOLDERS = ("work/work/incompat/volatile", "work/work/incompat", "work/work", "work", "upper")


def make_folder(folder: str) -> None:
    """Create the content of a new run folder."""
    os.mkdir(f"{folder}/upper", 0o755)
    os.mkdir(f"{folder}/work")


def remove_folder(folder: str) -> bool:
    """Remove it without listing it; False when it contains more, or cannot be removed."""
    try:
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{folder}/{name}")
        for name in _FOLDERS:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(f"{folder}/{name}")
        os.rmdir(folder)
    except OSError:
        return False
    return True


# ---- mounts ----


HOST_NAME = "sandbox"
_HOSTS = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{HOST_NAME}\n"
SLOTS = 64  # mount points for layers and binds in the staging folder
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
          "ptmx": "pts/ptmx", "core": "/proc/kcore"}
_READ_ONLY_PROC = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs")
_MASKED_FILES = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats")
_MASKED_FOLDERS = ("/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/fs/selinux")
_EMPTY = "/dev/mqueue"  # a folder of the read-only /dev; a separate tmpfs would cost 50 us
_SAFE = kernel.ATTR_NOSUID | kernel.ATTR_NODEV
_QUIET = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
_SYS_ADMIN = 21
_HOST = "host"  # the host's tree, in the root of the launcher's namespace
_TARGETS = {errno.EXDEV: "it is in a folder that the sandbox already mounts: choose another one, like /data",
            errno.ENOTDIR: "a part of it is not a folder", errno.ELOOP: "a part of it is a link in a loop",
            errno.EROFS: "it cannot be created there"}  # fmt: skip
_LONGEST = 3500  # characters of overlay options for mount(2), whose limit is a page


def prepare_staging(staging: str) -> None:
    """Create the staging tmpfs; once, in the launcher's mount namespace."""
    os.makedirs(staging, mode=0o700, exist_ok=True)
    kernel.mount("rock", staging, "tmpfs", kernel.MS_NOSUID, "mode=755,size=1m")
    for name in ("root", "rw", "dev", "sys", "nothing", *(f"{kind}{i}" for kind in "lbp" for i in range(SLOTS))):
        os.mkdir(f"{staging}/{name}")
    _fill_dev(f"{staging}/dev")


def _fill_dev(folder: str) -> None:
    kernel.mount("rock-dev", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=64k")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{folder}/{name}")
    for name, target in _LINKS.items():
        os.symlink(target, f"{folder}/{name}")
    for name in _DEVICES:
        os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        device = kernel.open_tree(f"/dev/{name}")
        kernel.set_attributes(device, kernel.ATTR_NOSUID)
        kernel.move_mount(device, f"{folder}/{name}")
        os.close(device)
    kernel.mount("", folder, "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
                 | kernel.MS_NODEV)


def make_base(folder: str) -> None:
    """Create the top layer of every image with the host name files. The host name is the same everywhere, for
    reproducible runs."""
    os.makedirs(f"{folder}/etc", mode=0o755, exist_ok=True)
    write_file(f"{folder}/etc/hostname", f"{HOST_NAME}\n")
    write_file(f"{folder}/etc/hosts", _HOSTS)


def write_file(path: str, text: str) -> None:
    """Write a small file, and follow no link."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def make_folders(spec: dict[str, Any]) -> None:
    """Create the run folder's content, unless it was prepared, and the mount points that this image lacks.

    A restarted sandbox already has all of it; files that a guest wrote are not read.
    """
    upper = f"{spec['slot']}/upper"
    if spec["woken"]:
        return
    if not os.path.isdir(upper):
        make_folder(spec["slot"])
    for index, bind in enumerate(spec["binds"]):
        if bind["writable"]:
            os.mkdir(f"{spec['slot']}/upper{index}")
            os.mkdir(f"{spec['slot']}/work{index}")
            if bind.get("over"):
                copy_owner(bind["over"][0], f"{spec['slot']}/upper{index}")
    if spec.get("frozen"):
        copy_owner(f"{spec['frozen']}/upper", upper)
    for name, mode in (("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("tmp", 0o1777)):
        if not any(os.path.isdir(f"{layer}/{name}") for layer in reversed(spec["layers"])):
            os.mkdir(f"{upper}/{name}")
            os.chmod(f"{upper}/{name}", mode)
    if spec.get("frozen") and not _make_identity(spec, upper):
        return
    if spec["etc"]:
        os.makedirs(f"{upper}/etc", 0o755, exist_ok=True)
    for name, text in spec["etc"].items():
        write_file(f"{upper}/etc/{name}", text)


def copy_owner(source: str, target: str) -> None:
    """The top folder of the written files is a root directory inside: owner, mode and times are those of the layer
    below."""
    info = os.lstat(source)
    os.chown(target, info.st_uid, info.st_gid)
    os.chmod(target, info.st_mode & 0o7777)
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def _make_identity(spec: dict[str, Any], upper: str) -> bool:
    """Give a sandbox of a snapshot a machine id of its own, and hide the host keys of the one that the snapshot was
    taken of. False when /etc is not a folder: then nothing is written there."""
    for folder in ("etc", "etc/ssh"):
        if folder == "etc" and not spec["etc"] and not spec["identity"]:
            continue
        if folder == "etc/ssh" and not any(path.startswith("etc/ssh/") for path in spec["identity"]):
            continue
        above = next((path for layer in spec["layers"] if os.path.lexists(path := f"{layer}/{folder}")), None)
        if above is not None and (os.path.islink(above) or not os.path.isdir(above)):
            return False
        os.mkdir(f"{upper}/{folder}", 0o755)
        if above is not None:
            copy_owner(above, f"{upper}/{folder}")
    for path in spec["identity"]:
        if path == "etc/machine-id":
            write_file(f"{upper}/{path}", f"{os.urandom(16).hex()}\n")
        else:
            os.mknod(f"{upper}/{path}", stat.S_IFCHR, 0)  # overlay's mark of a deleted file
    return True


def stack(spec: dict[str, Any], staging: str, userns: int) -> list[tuple[int, str]]:
    """Mount the overlay at staging/root; returns detached mounts and their targets after the switch, in order."""
    os.chdir(staging)
    with contextlib.ExitStack() as opened:
        return _detached(spec, _stack_root(spec, userns, opened), userns)


def attach_lowers(spec: dict[str, Any], staging: str, userns: int) -> None:
    """Attach the layers of a privileged sandbox but the first, which is still written to, for `stack_written`."""
    os.chdir(staging)
    with contextlib.ExitStack() as opened:
        for index, layer in enumerate(spec["layers"]):
            if index:
                _stacked(layer, index, userns, opened)


def stack_written(spec: dict[str, Any], staging: str, userns: int, targets: Collection[str]) -> dict[str, int]:
    """The overlays of a sandbox that it writes to, as detached mounts by target: the root and those of `targets`. After
    `attach_lowers` in this mount namespace."""
    os.chdir(staging)
    made: dict[str, int] = {}
    try:
        with contextlib.ExitStack() as opened:
            writable = _stack_root(spec, userns, opened, attached=True)
            made["/"] = kernel.open_tree("root")
            for index, bind in enumerate(spec["binds"]):
                if bind["target"] in targets:
                    made[bind["target"]] = _writable_bind(bind, index, spec, writable, userns)
        return made
    except BaseException:
        for fd in made.values():
            os.close(fd)
        raise


def _stack_root(spec: dict[str, Any], userns: int, opened: contextlib.ExitStack, *, attached: bool = False) -> str:
    """Mount the overlay at root; returns the folder with the writable folders, valid until `opened` is closed.
    attached: see `attach_lowers`."""
    mapped = userns >= 0
    if spec["disk"]:
        if mapped:
            kernel.set_attributes(spec["mounted"], _SAFE, userns=userns)
        kernel.move_mount(spec["mounted"], "rw")
    elif mapped:
        _attach_mapped(spec["slot"], "rw", userns)
    writable = "rw" if mapped or spec["disk"] else _unnamed(spec["slot"], opened)
    lowers = []
    for index, layer in enumerate(spec["layers"]):
        lowers.append(f"l{index}" if attached and index else _stacked(layer, index, userns, opened))
    overlay("root", lowers, f"{writable}/upper", f"{writable}/work", rootless=not spec["privileged"])
    return writable


def _stacked(layer: str, index: int, userns: int, opened: contextlib.ExitStack) -> str:
    if not os.path.isdir(layer):
        raise FileNotFoundError(errno.ENOENT, "a layer of the image is missing", layer)
    return _lower(layer, f"l{index}", index < SLOTS, userns, opened)


def _lower(layer: str, spot: str, prepared: bool, userns: int, opened: contextlib.ExitStack) -> str:
    """A lower folder with the sandbox's id mapping; its spot in the staging folder is made unless it is prepared."""
    if userns < 0:
        return _unnamed(layer, opened)
    if not prepared:
        with contextlib.suppress(FileExistsError):
            os.mkdir(spot)
    _attach_mapped(layer, spot, userns)
    return spot


def _unnamed(folder: str, opened: contextlib.ExitStack) -> str:
    """An alias for a folder of the host, because the mount table inside shows the options of an overlay. Valid until
    `opened` is closed."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"


def _detached(spec: dict[str, Any], writable: str, userns: int) -> list[tuple[int, str]]:
    """The mounts over the root after the switch, in order."""
    waiting = []
    for index, bind in enumerate(spec["binds"]):
        waiting.append((_detached_bind(bind, index, spec, writable, userns), bind["target"]))
    waiting.append((kernel.open_tree("dev", recursive=True), "/dev"))
    return waiting


def _attach_mapped(source: str, target: str, userns: int) -> None:
    fd = kernel.open_tree(source)
    try:
        kernel.set_attributes(fd, _SAFE, userns=userns)
        kernel.move_mount(fd, target)
    finally:
        os.close(fd)


def overlay(target: str, lowers: list[str], upper: str, work: str, *, rootless: bool) -> None:
    options = {"upperdir": upper, "workdir": work}
    flags = ["userxattr"] if rootless else ["volatile"]
    text = ",".join([f"lowerdir={':'.join(_escaped(path) for path in lowers)}",
                     *(f"{key}={_escaped(value)}" for key, value in options.items()), *flags])
    if len(text) < _LONGEST:
        kernel.mount("overlay", target, "overlay", kernel.MS_NOSUID | kernel.MS_NODEV, text)
    else:
        kernel.mount_overlay(target, lowers, options, flags)


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _detached_bind(bind: dict[str, Any], index: int, spec: dict[str, Any], writable: str, userns: int) -> int:
    if bind["writable"] and os.path.isdir(bind["source"]):
        with contextlib.suppress(OSError):  # fails where the host's root is an overlay over another: read-only then
            return _writable_bind(bind, index, spec, writable, userns)
    if bind.get("unnamed"):
        return kernel.open_tree(bind["unnamed"])
    attributes = _SAFE | kernel.ATTR_RDONLY
    recursive = False
    try:
        fd = kernel.open_tree(bind["source"])
    except OSError as error:
        if error.errno != errno.EINVAL:  # in a user namespace, submounts must be included
            raise
        recursive = True
        fd = kernel.open_tree(bind["source"], recursive=True)
    if userns >= 0 and bind["idmap"] and not bind["writable"]:  # else root inside could read root-only files
        with contextlib.suppress(OSError):  # a file system without id mapping shows its own owners
            kernel.set_attributes(fd, attributes, userns=userns, private=True)
            return fd
    kernel.set_attributes(fd, attributes, recursive=recursive, private=True)
    return fd


def _writable_bind(bind: dict[str, Any], index: int, spec: dict[str, Any], writable: str, userns: int) -> int:
    """An overlay over the bind's source, with an upper folder of the sandbox."""
    lower = bind["source"]
    if userns >= 0:
        _attach_mapped(lower, f"b{index}", userns)
        mount_public(f"b{index}", f"p{index}", "nothing", spec["base"])
        lower = f"p{index}"
    with contextlib.ExitStack() as opened:
        frozen = [_lower(folder, f"o{index}.{number}", prepared=False, userns=userns, opened=opened)
                  for number, folder in enumerate(bind.get("over", ()))]  # fmt: skip
        spot = f"b{SLOTS - 1 - index}"
        overlay(spot, [*frozen, lower], f"{writable}/upper{index}", f"{writable}/work{index}",
                rootless=not spec["privileged"])  # fmt: skip
    return kernel.open_tree(spot)


def open_folders(spec: dict[str, Any], userns: int) -> list[int]:
    """The volumes and host folders of a sandbox, as detached mounts in the order of `spec["folders"]`."""
    made: list[int] = []
    try:
        for folder in spec["folders"]:
            made.append(_open_folder(folder, userns))
    except BaseException:
        close_folders(made)
        raise
    return made


def close_folders(opened: list[int]) -> None:
    for fd in opened:
        os.close(fd)


def _open_folder(folder: dict[str, Any], userns: int) -> int:
    """The path was checked by the server, and is resolved again here: its owner may have changed it since."""
    source = folders.open_listed(folder["root"], folder["path"])
    try:
        info = os.fstat(source)
        if folder["identity"] and folder["identity"] != [info.st_dev, info.st_ino]:
            raise OSError(errno.ESTALE, "the folder was replaced while the sandbox started", folder["target"])
        recursive = False
        try:
            fd = kernel.open_tree("", folder=source)
        except OSError as error:
            if error.errno != errno.EINVAL or folder["volume"]:  # in a user namespace, submounts must be included
                raise
            recursive = True
            fd = kernel.open_tree("", folder=source, recursive=True)
    finally:
        os.close(source)
    try:
        attributes = _SAFE | (kernel.ATTR_RDONLY if folder["read_only"] else 0)
        mapping = userns if folder["volume"] else -1  # files of the host keep their owners
        kernel.set_attributes(fd, attributes, userns=mapping, recursive=recursive, private=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach_folders(spec: dict[str, Any], opened: list[int]) -> None:
    """Attach them, in a complete sandbox without the old root. Missing targets are created in the writable layer."""
    if not opened:
        return
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for fd, folder in zip(opened, spec["folders"], strict=True):
            try:
                target = folders.make_in_root(root, folder["target"])
            except OSError as error:
                raise OSError(error.errno, f"target {folder['target']}: {_TARGETS.get(error.errno or 0, error)}") \
                    from None  # fmt: skip
            try:
                kernel.move_mount(fd, "", target)
            finally:
                os.close(target)
    finally:
        os.close(root)


class UnnamedFolders:
    """Read-only folders of the host as overlays in the staging folder, created once by the launcher. The mount table
    shows the host's path of a bind mount, but for an overlay the lower folder names that the launcher chose.

    staging: the folder. privileged: the launcher is root.
    """

    def __init__(self, staging: str, privileged: bool) -> None:
        self._staging = staging
        self._privileged = privileged
        self._count = 0
        self._made: dict[str, tuple[tuple[int, int], str]] = {}  # by source: identity of the folder, and its place

    def prepare(self, binds: list[dict[str, Any]]) -> None:
        """Map each bind to a folder of the staging folder, before a child is cloned."""
        for bind in binds:
            if bind["source"] != bind["target"] and not bind["idmap"] and os.path.isdir(bind["source"]):
                bind["unnamed"] = self._get(bind["source"])

    def _get(self, source: str) -> str:
        found = os.stat(source)
        key = (found.st_dev, found.st_ino)
        known = self._made.get(source)
        if known is None or known[0] != key:
            self._count += 1
            name = ""  # not available; not retried
            with contextlib.suppress(OSError):
                name = self._make(source, f"below{self._count}", f"shown{self._count}")
            known = self._made[source] = key, name
        return known[1]

    def _make(self, source: str, below: str, shown: str) -> str:
        os.chdir(self._staging)  # names are relative: mount_public cannot traverse the server's folders
        for folder in (below, shown):
            os.mkdir(folder, 0o755)
        fd = kernel.open_tree(source)
        try:
            kernel.set_attributes(fd, _SAFE | kernel.ATTR_RDONLY, private=True)
            kernel.move_mount(fd, below)
        finally:
            os.close(fd)
        if self._privileged:
            mount_public(below, shown, "nothing", 0)
        else:
            kernel.mount("overlay", shown, "overlay", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV,
                         f"lowerdir={below}:nothing,userxattr")
        return shown


def mount_public(source: str, target: str, nothing: str, owner: int) -> None:
    """Mount the publicly readable part of the folder `source` at `target`, read-only.

    At each open, the kernel checks the rights of the user who mounted the overlay. This overlay is mounted by a user
    who owns no files and has no rights over files of others. The result therefore does not depend on the user inside,
    nor on when a file was created or changed its mode. Names in publicly listable folders remain visible.

    nothing: an empty folder, because an overlay has two lower folders. owner: the owner of new files afterwards, see
    kernel.set_file_owner.
    """
    permitted = kernel.permitted()
    kernel.set_file_owner(userns.IDS.stranger)
    kernel.capset(permitted, 1 << _SYS_ADMIN)
    try:
        options = f"lowerdir={_escaped(source)}:{_escaped(nothing)}"
        kernel.mount("overlay", target, "overlay", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, options)
    finally:
        kernel.capset(permitted)  # first, because a change of user requires a capability
        kernel.set_file_owner(owner)


def lift_host(staging: str) -> None:
    """Move the host's tree below a new root of this process's mount namespace; once. `enter_host` enters it."""
    os.mkdir(f"{staging}/base")
    os.chdir(f"{staging}/base")
    kernel.mount("rock-root", ".", "tmpfs", _QUIET, "mode=755,size=4k")
    os.chdir(f"{staging}/base")  # the new mount
    os.mkdir(_HOST)
    kernel.mount("", ".", "", kernel.MS_REMOUNT | kernel.MS_RDONLY | _QUIET)
    kernel.pivot_root(".", _HOST)


def enter_host() -> None:
    """From the root of a namespace of the launcher, or of a new child: make the host's tree the root of this
    process."""
    os.chdir(f"/{_HOST}")
    os.chroot(".")


def switch(staging: str, base: int) -> None:
    """Make staging/root the root. The host's tree stays the working directory for now: a user namespace may mount a
    new /proc or /sys only while a complete one is visible.

    base: the root of the mount namespace, which is covered from now on.
    """
    host = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    root = kernel.open_tree(f"{staging}/root")
    try:
        kernel.move_mount(root, "", base)
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(host)
    finally:
        os.close(host)
        os.close(root)


def leave() -> None:
    """Detach the old root, which is the working directory; no path leads to it afterwards."""
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)


def mount_sys(target: str) -> None:
    """Mount a /sys, which shows the devices of this process's network namespace."""
    kernel.mount("sysfs", target, "sysfs", _QUIET | kernel.MS_RDONLY)


def furnish(spec: dict[str, Any], waiting: list[tuple[int, str]], *, own_sys: bool) -> None:
    """Attach the waiting mounts (binds, /dev, /proc) and mount /sys, unless it is one of them, after the switch."""
    for fd, target in waiting:
        try:
            kernel.move_mount(fd, target)
        finally:
            os.close(fd)
    base = spec["base"]
    terminals = f"newinstance,ptmxmode=0666,mode=0620{f',gid={base + 5}' if spec['privileged'] else ''}"
    kernel.mount("devpts", "/dev/pts", "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, terminals)
    owner = f",uid={base},gid={base}" if spec["privileged"] else ""
    kernel.mount("shm", "/dev/shm", "tmpfs", _QUIET & ~kernel.MS_NOEXEC, f"mode=1777,size={spec['shared']}{owner}")
    if own_sys:
        try:
            mount_sys("/sys")
        except OSError:  # a user namespace may be denied one of its own
            kernel.mount("none", "/sys", "tmpfs", _QUIET | kernel.MS_RDONLY, "size=0,mode=755")
    _mask()


def _mask() -> None:
    for path in _READ_ONLY_PROC:
        with contextlib.suppress(FileNotFoundError):
            fd = kernel.open_tree(path)
            kernel.set_attributes(fd, _SAFE | kernel.ATTR_NOEXEC | kernel.ATTR_RDONLY)
            kernel.move_mount(fd, path)
            os.close(fd)
    for nothing, paths in (("/dev/null", _MASKED_FILES), (_EMPTY, _MASKED_FOLDERS)):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                kernel.mount(nothing, path, "", kernel.MS_BIND)
