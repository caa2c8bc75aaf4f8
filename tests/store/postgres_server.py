"""A real PostgreSQL for the tests: of this machine, or unpacked from Debian's packages into the tests' cache.

It runs as an ordinary user, as it refuses root, on a Unix socket in a folder of its own.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rock.guest.init import process_tree

_USER = "nobody"  # it has to be an account


def _installed(top: Path) -> Path | None:
    """The folder of programs of the newest version under a tree."""
    found = [path.parent for path in top.glob("usr/lib/postgresql/*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name)) if found else None


def programs() -> Path:
    """The folder with initdb and postgres."""
    found = _installed(Path("/"))
    if found is not None:
        return found
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "postgresql"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "ready").exists():
            fetch(cache)
            (cache / "ready").touch()
    found = _installed(cache)
    assert found is not None
    return found


def fetch(cache: Path) -> None:
    """Unpack Debian's server and the libraries that it names, without installing anything."""

    def apt(*words: str) -> str:
        done = subprocess.run(words, cwd=cache, capture_output=True, text=True, timeout=300)
        return done.stdout

    try:
        server = re.search(r"Depends: (postgresql-\d+)", apt("apt-cache", "depends", "postgresql"))
        if server is None:
            pytest.skip("PostgreSQL cannot be had: apt knows no package postgresql")
        named = re.findall(r"Depends: ((?:lib|postgresql-client-)[\w.+-]+)", apt("apt-cache", "depends", server[1]))
        apt("apt-get", "download", server[1], *dict.fromkeys(named))
        packages = sorted(cache.glob("*.deb"))
        if not any(package.name.startswith(server[1] + "_") for package in packages):
            pytest.skip("PostgreSQL cannot be had: apt-get download does not get it")
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, cache], check=True, capture_output=True)
            package.unlink()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"PostgreSQL cannot be had: {error}")


class Databases:
    """Makes databases: calling it makes a new one, and answers its URL."""

    def __init__(self, data: Path, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._data = data
        self._start = start
        self._number = 0
        self.server = start()

    def __call__(self) -> str:
        self._number += 1
        name = f"rock{self._number}"
        _run(self._data, f"CREATE DATABASE {name}")
        return f"postgresql://rock@/{name}?host={self._data}"

    def away(self, seconds: float) -> None:
        """Kill all processes of the server, as the crash of its machine does, and start it again so much later.

        SIGQUIT is no crash: the server then ends its processes in order, which took over two minutes in rare cases.
        """
        self.server.send_signal(signal.SIGSTOP)  # it starts no process while its processes are listed
        processes = list(process_tree.descendants(process_tree.scan(), self.server.pid))
        self.server.kill()
        self.server.wait(30)
        for process in processes:
            process_tree.send(process, signal.SIGKILL)
        end = time.monotonic() + 30
        while any(process_tree.lives(process.pid, process.start) for process in processes):
            assert time.monotonic() < end, "a process of PostgreSQL survived SIGKILL"
            time.sleep(0.01)
        time.sleep(seconds)
        self.server = self._start()

    def cut(self) -> None:
        """End every connection of clients."""
        _run(self._data, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() "
                         "AND backend_type = 'client backend'")  # fmt: skip


def _for_all(path: Path) -> bool:
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))


@contextmanager
def postgres() -> Iterator[Databases]:
    """A server. Calling what comes makes a new database, and answers its URL."""
    root = os.geteuid() == 0
    try:
        account = pwd.getpwnam(_USER) if root else pwd.getpwuid(os.geteuid())
    except KeyError:
        pytest.skip("PostgreSQL runs as a user that has an account, and this one has none")
    bin_folder = programs()
    with tempfile.TemporaryDirectory(prefix="rock-pg-") as folder:
        top = Path(folder)
        if root and not _for_all(bin_folder):
            tree = bin_folder.parents[4]  # of /usr/lib/postgresql/N/bin
            shutil.copytree(tree / "usr", top / "usr", symlinks=True)
            bin_folder = top / bin_folder.relative_to(tree)
        identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if root else {}
        libraries = [str(path) for path in bin_folder.parents[3].glob("lib/*-linux-gnu*")]
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": folder}
        if bin_folder.parents[4] != Path("/"):
            environment["LD_LIBRARY_PATH"] = ":".join(libraries)
        top.chmod(0o755)
        data = top / "data"
        data.mkdir(mode=0o700)
        if root:
            os.chown(data, account.pw_uid, account.pw_gid)
        made = subprocess.run(
            [bin_folder / "initdb", "-D", data, "-U", "rock", "--auth=trust", "--no-sync", "-E", "UTF8"],
            env=environment, cwd="/", capture_output=True, text=True, timeout=110, **identity,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        settings = {"unix_socket_directories": data, "listen_addresses": "", "fsync": "off", "max_connections": "100"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

        def start() -> subprocess.Popen[bytes]:
            with open(top / "log", "ab") as log:
                return subprocess.Popen([bin_folder / "postgres", "-D", data, *options], env=environment, cwd="/",
                                        stdout=log, stderr=log, stdin=subprocess.DEVNULL, **identity)  # type: ignore[call-overload,no-any-return]  # fmt: skip

        databases = Databases(data, start)
        try:
            end = time.monotonic() + 60
            while not (data / ".s.PGSQL.5432").exists():
                assert databases.server.poll() is None and time.monotonic() < end, (top / "log").read_text()
                time.sleep(0.05)
            yield databases
        finally:
            databases.server.terminate()
            try:
                databases.server.wait(5)  # a smart shutdown waits for clients that a failed test left
            except subprocess.TimeoutExpired:
                databases.server.send_signal(signal.SIGQUIT)
                databases.server.wait(20)


def _run(data: Path, statement: str) -> None:
    import asyncio

    import asyncpg

    async def main() -> None:
        end = time.monotonic() + 60
        while True:
            try:
                db = await asyncpg.connect(host=str(data), user="rock", database="postgres")
                break
            except (OSError, asyncpg.PostgresError):  # it is starting up
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)
        try:
            await db.execute(statement)
        finally:
            await db.close()

    asyncio.run(main())
