"""A real container engine for the tests: Debian's, unpacked into the tests' cache, with everything of its own: data,
sockets, processes. No other engine on the machine is touched."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rock.guest.init import process_tree
from rock.guest.init.remove import remove_tree

_PACKAGES = (
    "docker.io", "containerd", "runc", "runsc", "tini", "iptables", "libdevmapper1.02.1", "libseccomp2", "libxtables12",
    "libip4tc2", "libip6tc2", "libnftnl11", "libmnl0", "libnfnetlink0", "libnetfilter-conntrack3", "busybox-static",
    "musl",
)  # fmt: skip
HOST = "ROCK_TEST_ENGINE"  # tells our own children where the engine of this run listens
_TOOLS = (
    "bash cat chmod chown cp cut date dd env false find grep head hostname id kill ln ls mkdir mkfifo "
    "mktemp mv nohup od printf ps pwd python3 readlink rm rmdir sed seq setsid sh sleep sort stat stty "
    "tail tar tee test timeout touch tr true truncate tty umount mount uname uniq wc which whoami xargs "
    "yes "
)


class CannotBeHad(Exception):
    """Why there is no engine here, as a sentence."""


@functools.cache
def programs() -> Path:
    """The folder with Debian's packages unpacked; CannotBeHad. Downloaded once."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "docker-engine"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "ready").exists():
            _fetch(cache)
            (cache / "ready").touch()
    return cache


def _fetch(cache: Path) -> None:
    try:
        for attempt in ([], ["apt-get", "update"]):
            if attempt:
                subprocess.run(attempt, capture_output=True, timeout=120)
            run = subprocess.run(["apt-get", "download", *_PACKAGES], cwd=cache, capture_output=True, timeout=300)
            if run.returncode == 0:
                break
        else:
            raise CannotBeHad(f"apt has no container engine: {run.stderr.decode()[-200:].strip()}")
        for package in sorted(cache.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, cache], check=True, capture_output=True)
            package.unlink()
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBeHad(f"no container engine can be had here: {error}") from None


def _environment() -> dict[str, str]:
    root = programs()
    folders = f"{root}/usr/bin:{root}/usr/sbin:{root}/sbin"
    libraries = [str(path) for path in (*root.glob("usr/lib/*-linux-gnu"), *root.glob("lib/*-linux-gnu"))]
    return {**os.environ, "PATH": f"{folders}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "LD_LIBRARY_PATH": ":".join(libraries)}  # fmt: skip


@dataclass
class TestEngine:
    """One dockerd. `host` is what DOCKER_HOST would say."""

    __test__ = False
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ("--bridge=none", "--iptables=false", "--ip6tables=false")
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/sock"

    def start(self, seconds: float = 60.0) -> None:
        """Start it, and wait until it answers. CannotBeHad with the end of its log."""
        runsc = {"path": f"{programs()}/usr/bin/runsc", "runtimeArgs": ["--platform=ptrace", "--network=none"]}
        (self.folder / "daemon.json").write_text(json.dumps({"runtimes": {"runsc": runsc}, **self.settings}))
        environment = _environment()
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["dockerd", "--config-file", self.folder / "daemon.json", "--data-root", self.folder / "data",
                 "--exec-root", self.folder / "exec", "--pidfile", self.folder / "pid", "-H", self.host,
                 *self.options], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd="/",
                executable=shutil.which("dockerd", path=environment["PATH"]), start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/_ping")[0] == 200:
                    return
            time.sleep(0.05)
        text = (self.folder / "log").read_text(errors="replace")[-600:]
        self.end()
        raise CannotBeHad(f"dockerd does not start here: {text}")

    def end(self) -> None:
        """End it with all that it started."""
        if self.process is None:
            return
        children = [*process_tree.descendants(process_tree.scan(), self.process.pid)]
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for entry in [*children, *self._shims()]:
            process_tree.send(entry, signal.SIGKILL)
        self.process = None

    def _shims(self) -> Iterator[process_tree.Entry]:
        """What outlives a killed dockerd: its containerd, and shims that nobody's child is any more."""
        for entry in process_tree.scan().values():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{entry.pid}/cmdline").read_bytes()
                if f"{self.folder}/exec".encode() in command and b"containerd" in command.partition(b"\0")[0]:
                    yield entry

    def remove(self) -> None:
        self.end()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (place := line.split()[1]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", place], capture_output=True)
        remove_tree(str(self.folder))

    def ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, seconds: float = 60.0,
            **headers: str) -> tuple[int, bytes]:
        """One request to it, by hand: what tests look at must not depend on what they test."""
        connection = http.client.HTTPConnection("engine", timeout=seconds)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(seconds)
        try:
            connection.sock.connect(f"{self.folder}/sock")
            connection.request(method, path, body, {"Host": "engine", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        status, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)

    def containers(self, **labels: str) -> list[dict[str, Any]]:
        """Running or not, with these labels (dots as __)."""
        words = [f"{name.replace('__', '.')}={value}" for name, value in labels.items()]
        filters = urllib.parse.quote(json.dumps({"label": words}))
        found: list[dict[str, Any]] = self.json(f"/containers/json?all=1&filters={filters}")
        return found

    def make_image(self, name: str, tar: bytes, *changes: str) -> None:
        """An image of one layer, with changes as in a Dockerfile."""
        query = urllib.parse.urlencode({"fromSrc": "-", "repo": name.partition(":")[0], "tag": name.partition(":")[2]})
        query += "".join(f"&changes={urllib.parse.quote(change)}" for change in changes)
        kind = {"Content-Type": "application/x-tar"}
        status, body = self.ask("POST", f"/images/create?{query}", tar, 120, **kind)
        assert status == 200 and b"errorDetail" not in body, body


@functools.cache
def shared() -> TestEngine:
    """The engine of this run, with the images; CannotBeHad. Ended with this process."""
    if found := os.environ.get(HOST):
        return TestEngine(Path(found))  # our parent's
    if os.geteuid() != 0:
        raise CannotBeHad("an engine of our own needs root")
    folder = Path(tempfile.mkdtemp(prefix="rock-engine-"))
    engine = TestEngine(folder)
    atexit.register(engine.remove)
    engine.start()
    engine.make_image("rock-test/hand:1", hand_made(), "ENV FROM_IMAGE=yes", "ENV PATH=/usr/local/bin:/usr/bin:/bin",
                      "WORKDIR /work")
    engine.make_image("rock-test/busybox:1", busybox())
    engine.make_image("rock-test/empty:1", packed({"etc/none": b""}))
    os.environ[HOST] = str(folder)
    return engine


def pid() -> int:
    """Of the shared one."""
    return int((shared().folder / "pid").read_text())


@functools.cache
def guest_python() -> Path:
    """Where the Pythons for pid 1 are kept, for all runtimes of a run."""
    return shared().folder / "guest-python"


# ---- images, as tars of one layer -----------------------------------------------------------------------------------


def packed(files: dict[str, bytes | Path | str], folders: Iterable[str] = ()) -> bytes:
    """A tar: content, a file of this machine, or "-> target" by path."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        seen: set[str] = set()

        def folder(path: str) -> None:
            if path and path not in seen:
                folder(os.path.dirname(path))
                seen.add(path)
                info = tarfile.TarInfo(path)
                info.type, info.mode = tarfile.DIRTYPE, 0o1777 if path == "tmp" else 0o755
                tar.addfile(info)

        for path in folders:
            folder(path)
        for path, content in files.items():
            folder(os.path.dirname(path))
            info = tarfile.TarInfo(path)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content.removeprefix("-> ")
                tar.addfile(info)
                continue
            data = content.read_bytes() if isinstance(content, Path) else content
            info.size = len(data)
            info.mode = content.stat().st_mode & 0o755 if isinstance(content, Path) else 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


_PASSWD = (b"root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n"
           b"nobody:x:65534:65534::/:/bin/sh\n")  # fmt: skip
_GROUP = b"root:x:0:\nalice:x:1000:\nstaff:x:50:alice\nnogroup:x:65534:\n"
_LEFT_OUT = {"test", "idlelib", "tkinter", "ensurepip", "site-packages", "dist-packages"}
_FOLDERS = ("tmp", "root", "work", "proc", "sys", "dev", "etc", "home")


def hand_made() -> bytes:
    """A system of this machine's own programs: shells, coreutils and a Python with its library."""
    files: dict[str, bytes | Path | str] = {"etc/passwd": _PASSWD, "etc/group": _GROUP}
    for name in _TOOLS.split():
        found = shutil.which(name, path="/usr/bin:/bin")
        if found:
            files[f"usr/bin/{name}"] = Path(os.path.realpath(found))
    library = Path(subprocess.check_output(
        ["/usr/bin/python3", "-I", "-S", "-c", "import os; print(os.path.dirname(os.__file__))"], text=True).strip())
    for path in library.rglob("*"):
        inner = path.relative_to(library).parts
        if path.is_file() and not _LEFT_OUT & {*inner}:
            files[str(path).lstrip("/")] = path
    for path in [*files.values()]:
        if isinstance(path, Path) and (path.suffix == ".so" or path.parent.name == "bin"):
            files.update(_libraries(path))
    for name in ("bin", "lib", "lib64", "sbin"):
        files[name] = f"-> usr/{name}"
    return packed(files, (*_FOLDERS, "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"))


def _libraries(path: Path) -> dict[str, bytes | Path | str]:
    listed = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
    words = [word for line in listed.splitlines() for word in line.split() if word.startswith("/")]
    return {_merged(word): Path(os.path.realpath(word)) for word in words}


def _merged(path: str) -> str:
    """The same place where /lib is a link into /usr."""
    return path.lstrip("/") if path.startswith("/usr/") else f"usr{path}"


def busybox() -> bytes:
    """No C library at all: one static program under many names."""
    names = ("sh", "ls", "cat", "echo", "sleep", "id", "mkdir", "true", "ps", "wc", "tr", "env")
    binary = next(path for path in (programs() / "bin/busybox", programs() / "usr/bin/busybox") if path.exists())
    files: dict[str, bytes | Path | str] = {"bin/busybox": binary, "etc/passwd": _PASSWD, "etc/group": _GROUP}
    files |= {f"bin/{name}": "-> busybox" for name in names}
    return packed(files, _FOLDERS)
