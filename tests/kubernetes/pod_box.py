"""A box like a pod with hostUsers: false: a user namespace of 65,536 ids, own pid, mount, network and ipc namespaces,
a read-only cgroup tree, and optionally a masked /proc. It needs root, and no cluster.

    PodBox("A").run("rock", "doctor", "--kubernetes")

Level A is root of that namespace; level B is an ordinary user without capabilities.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.unprivileged import interpreter, open_to_all

FIRST, COUNT = 1_000_000_000, 65_536
_SETUP = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs "$BOX_HOME"
mount --bind /sys/fs/cgroup /sys/fs/cgroup 2>/dev/null && mount -o remount,bind,ro /sys/fs/cgroup 2>/dev/null || true
ip link set lo up 2>/dev/null || true
if [ -n "$BOX_MASKED" ]; then
    mount -t tmpfs -o ro tmpfs /proc/acpi
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys
fi
"""


# A user namespace and a mount namespace inside of those that made the mounts: what these mounts hide is locked.
_LOCKED = """
import os, sys
from rock.runtime.namespace.launcher import userns
fd = userns.make("0 0 65536\\n", "0 0 65536\\n")
os.set_inheritable(fd, True)
os.execvp("nsenter", ["nsenter", f"--user=/proc/self/fd/{fd}", "-S", "0", "-G", "0", "--", "unshare", "--mount",
                      *sys.argv[1:]])
"""


class PodBox:
    """level: A or B. home: a folder of the tests, in which anybody may enter. path: PYTHONPATH. masked: /proc as it is
    without procMount: Unmasked. locked: as a container engine does that makes the mounts before the user namespace, so
    that nothing inside can remove the masks."""

    def __init__(self, level: str, home: Path, path: str, masked: bool = False, locked: bool = False) -> None:
        self.level = level
        self._home = home
        self._path = path
        self._masked = masked
        self._locked = locked

    @contextmanager
    def _namespace(self) -> Iterator[int]:
        """Made by another process: the child of a process with threads may wait for a lock that is never released."""
        text = f"0 {FIRST} {COUNT}\n"
        made = "import sys; from rock.runtime.namespace.launcher import userns; t = sys.argv[1]; " \
               "print(userns.make(t, t), flush=True); sys.stdin.read()"  # fmt: skip
        with subprocess.Popen([sys.executable, "-c", made, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": self._path}, text=True) as maker:  # fmt: skip
            assert maker.stdout is not None
            fd = os.open(f"/proc/{maker.pid}/fd/{int(maker.stdout.readline())}", os.O_RDONLY | os.O_CLOEXEC)
            maker.communicate()
        try:
            yield fd
        finally:
            os.close(fd)

    def run(self, *argv: str, timeout: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program in a new box, to its end."""
        self._home.mkdir(exist_ok=True)
        drop = "exec "
        if self.level == "B":
            user = "--reuid 1000 --regid 1000 --clear-groups --bounding-set=-all"
            drop = f'chown 1000:1000 "$BOX_HOME"; exec setpriv {user} '
        if self._locked:
            argv = (interpreter() or "python3", "-c", _LOCKED, *argv)
        given = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": self._path,
                 "BOX_HOME": str(self._home), "BOX_MASKED": "1" if self._masked else "", "HOME": str(self._home),
                 "TMPDIR": str(self._home), "ROCK_HOME": f"{self._home}/rock", "LANG": "C.UTF-8",
                 "PYTHONDONTWRITEBYTECODE": "1", **environment}  # fmt: skip
        with self._namespace() as fd:
            return subprocess.run(
                ["nsenter", f"--user=/proc/self/fd/{fd}", "-S", "0", "-G", "0", "--",
                 "unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child",
                 "bash", "-c", _SETUP + drop + '"$@"', "box", *argv],
                env=given, pass_fds=[fd], capture_output=True, text=True, timeout=timeout, cwd="/")  # fmt: skip


@contextmanager
def readable_path(folder: Path) -> Iterator[str]:
    """PYTHONPATH of the checkout and its packages for any user; copies where the checkout is private."""
    top, packages = Path(__file__).parent.parent.parent, Path(sysconfig.get_paths()["purelib"])
    found = []
    for name, source in (("src", top / "src"), ("tests", top / "tests"), ("packages", packages)):
        if open_to_all(source):
            found.append(str(source if name != "tests" else top))
            continue
        folder.chmod(0o755)
        target = folder / ("checkout/tests" if name == "tests" else name)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        found.append(str(target if name != "tests" else target.parent))
    yield ":".join(found)
