"""Environment sources: repositories of a hub (`hf://org/repo@rev`) and folders, as in-memory file trees.

A repository is fetched at one commit by git and read as a tar. There is no checkout, so hooks, filters and links of a
repository have no effect here: `git archive` reads the objects of a temporary bare repository. git runs without this
machine's or user's configuration, without a terminal, over http and https only, and within limits of size, memory and
time. Submodules are not fetched; files in large-file storage arrive as git pointers.

`Tree` holds the files of a folder or a tar, which can be overlaid and are sent as a tar. Nothing is unpacked on this
machine. A tar is untrusted: links in it are resolved only inside a sandbox.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from rock import errors, settings

# ---- file tree ----

FILE = "env.py"
REQUIREMENTS = "requirements.txt"
LIMIT = 64 << 20  # bytes
_MOST = 20_000  # entries
_MOST_REQUIREMENTS = 64 << 10  # bytes
_LEFT_OUT = {".git", "__pycache__", ".venv"}

Entry = tuple[tarfile.TarInfo, bytes]


class Tree:
    """Files, folders and symbolic links by path. `what`: its name in errors."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, Entry] = {}

    @classmethod
    def of_folder(cls, folder: Path) -> Tree:
        """Read a folder of this machine, links as links; InvalidConfig when it is too large."""
        buffer = io.BytesIO()
        size = 0

        def chosen(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
            nonlocal size
            if Path(entry.name).name in _LEFT_OUT:
                return None
            size += entry.size
            if size > LIMIT:
                raise _too_large(str(folder))
            return entry

        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name, filter=chosen)
        return cls.of_tar(buffer.getvalue(), str(folder))

    @classmethod
    def of_tar(cls, raw: bytes, what: str) -> Tree:
        """Read an untrusted tar: entries of other kinds are skipped. InvalidConfig for an invalid one."""
        tree = cls(what)
        size = 0
        try:
            with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
                for entry in archive:
                    size += entry.size
                    if size > LIMIT or len(tree._entries) >= _MOST:
                        raise _too_large(what)
                    tree._add(archive, entry)
        except tarfile.TarError as error:
            raise errors.InvalidConfig(f"{what} is not a tar of a source: {error}",
                                       hint="build the environment again") from None
        return tree

    def _add(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts or "\0" in entry.name:
            raise errors.InvalidConfig(f"{self.what} has a file with an absolute name or with `..`: "
                                       f"{entry.name[:200]!r}",
                                       hint="rename the file; names must be relative and inside the source")
        name = str(path)
        if entry.islnk():
            known = self._entries.get(str(PurePosixPath(entry.linkname)))
            if known is not None:
                self._put(name, known[0], known[1])
        elif entry.isreg():
            file = archive.extractfile(entry)
            assert file is not None
            self._put(name, entry, file.read())
        elif entry.isdir() or entry.issym():
            self._put(name, entry, b"")

    def _put(self, name: str, like: tarfile.TarInfo, data: bytes) -> None:
        made = tarfile.TarInfo(name)
        made.type, made.linkname, made.mode, made.size = like.type, like.linkname, like.mode & 0o755, len(data)
        if like.isreg():
            made.type = tarfile.REGTYPE
        self._entries[name] = made, data

    def over(self, other: Tree) -> Tree:
        """The other tree with these files on top."""
        both = Tree(other.what)
        both._entries = {**other._entries, **self._entries}
        return both

    def lay(self, path: Path, cwd: str) -> Tree:
        """This tree with a local folder's files, or a file beside env.py in `cwd`, on top."""
        if path.is_dir():
            return Tree.of_folder(path).over(self)
        if not path.is_file():
            raise errors.InvalidConfig(f"override: there is no {path}", hint="a file or a folder of this machine")
        if path.stat().st_size > LIMIT:
            raise _too_large(str(path))
        data = path.read_bytes()
        entry = tarfile.TarInfo(path.name)
        entry.mode = 0o644
        laid = Tree(self.what)
        laid._put(str(PurePosixPath(cwd, path.name)), entry, data)
        return laid.over(self)

    def text_of(self, name: str, limit: int) -> str | None:
        """A regular file as text; None when it is missing. InvalidConfig for other kinds."""
        found = self._entries.get(name)
        if found is None:
            return None
        if not found[0].isreg():
            raise errors.InvalidConfig(f"{name} in {self.what} is a link or a folder", hint="it has to be a file")
        if len(found[1]) > limit:
            raise errors.InvalidConfig(f"{name} in {self.what} is larger than {limit >> 10} KiB",
                                       hint=f"reduce it to {limit >> 10} KiB")
        try:
            return found[1].decode()
        except UnicodeDecodeError as error:
            raise errors.InvalidConfig(f"{name} in {self.what} is not text: {error}", hint="save it as UTF-8") from None

    def check(self, cwd: str) -> None:
        """Raise InvalidConfig unless its folder `cwd` contains an env.py."""
        name = str(PurePosixPath(cwd, FILE))
        if self.text_of(name, LIMIT) is None:
            raise errors.InvalidConfig(f"there is no {name} in {self.what}", hint="it defines make_env(**kwargs)")

    def requirements(self, cwd: str) -> Sequence[str]:
        """The lines of requirements.txt beside env.py, else at the top."""
        text = None
        for folder in dict.fromkeys((cwd, ".")):
            text = text or self.text_of(str(PurePosixPath(folder, REQUIREMENTS)), _MOST_REQUIREMENTS)
        lines = (line.partition("#")[0].strip() for line in (text or "").splitlines())
        return [line for line in lines if line]

    def packed(self) -> bytes:
        """The tree as a tar. Folders come first, so that an overlaid file does not hide its parents."""
        buffer = io.BytesIO()
        if sum(len(data) for _, data in self._entries.values()) > LIMIT:
            raise _too_large(self.what)
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for _, (entry, data) in sorted(self._entries.items(), key=lambda item: (not item[1][0].isdir(), item[0])):
                archive.addfile(entry, io.BytesIO(data))
        return buffer.getvalue()


def _too_large(what: str) -> errors.InvalidConfig:
    return errors.InvalidConfig(f"{what} is larger than {LIMIT >> 20} MiB, or has more than {_MOST} files",
                                hint="move large files into a package or an image")


# ---- repositories ----


TIMEOUT = 300.0  # seconds for the whole fetch
_LARGEST_PACK = 2 * LIMIT
_LARGEST_TAR = 2 * LIMIT
_MEMORY = 4 << 30  # bytes of address space per git process
_MOST_REFS = 64 << 10  # bytes
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,198}[A-Za-z0-9_-])?")
_FULL = re.compile(r"[0-9a-f]{40}")
_CONFIG = (
    "protocol.version=2", "core.bigFileThreshold=1m", "core.hooksPath=/dev/null", "core.fsmonitor=false",
    "credential.helper=", "fetch.unpackLimit=1", "fetch.recurseSubmodules=no", "gc.auto=0", "maintenance.auto=false",
    "http.followRedirects=initial", "pack.threads=1", "tar.umask=0022",
)  # fmt: skip


@dataclass(frozen=True)
class HubSource:
    """A parsed `hf://` source. revision: None is the default branch; task: "suite" or "suite/task", or None."""

    repository: str
    revision: str | None
    task: str | None

    @classmethod
    def parse(cls, rest: str) -> HubSource:
        """Parse the part after hf://. InvalidConfig states what is wrong with it."""
        place, has_task, task = rest.partition(":")
        repository, has_revision, revision = place.partition("@")
        hint = "hf://ORG/REPO@REVISION, and :SUITE/TASK where there are several"
        if not _REPOSITORY.fullmatch(repository) or ".." in repository or repository.endswith(".git"):
            raise errors.InvalidConfig(f"{repository[:200]!r} is not the name of a repository", hint=hint)
        bad = not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or ".lock" in revision
        if has_revision and bad:
            raise errors.InvalidConfig(f"{revision[:200]!r} is not a revision", hint=hint)
        if has_task and not task:
            raise errors.InvalidConfig("there is nothing after the colon of the source", hint=hint)
        return cls(repository, revision or None, task or None)

    def allow(self, trusted: bool, unpinned: bool) -> None:
        """Raise InvalidConfig for untrusted code without consent, or for code that may change."""
        if not trusted:
            raise errors.InvalidConfig(f"hf://{self.repository} is code of others, which runs in the sandbox",
                                       hint="pass trust_remote_code=True if that is wanted")  # fmt: skip
        if not unpinned and not (self.revision and _FULL.fullmatch(self.revision)):
            raise errors.InvalidConfig(
                f"hf://{self.repository} has no pinned revision: {self.revision or 'the default branch'} may change",
                hint="write @ and the 40 digits of a commit, or pass allow_unpinned_hf=True",
            )

    def fetch(self) -> tuple[str, bytes]:
        """(the commit's digits, its files as a tar). NotFound, InvalidConfig, Unavailable, Unsupported without git."""
        url = f"{_endpoint()}/{self.repository}"
        deadline = time.monotonic() + TIMEOUT
        if self.revision and _FULL.fullmatch(self.revision):
            commit = self.revision
        else:
            commit = _resolve(url, self.revision, deadline)
        return commit, _archive(url, commit)


def _endpoint() -> str:
    text = settings.hub_endpoint().rstrip("/")
    parts = urllib.parse.urlsplit(text)
    odd = parts.query or parts.fragment or any(not 33 <= ord(letter) < 127 for letter in text)
    if parts.scheme not in ("https", "http") or not parts.hostname or odd:
        raise errors.InvalidConfig(f"HF_ENDPOINT={text!r} is no address", hint="like https://huggingface.co")
    return text


def _resolve(url: str, revision: str | None, deadline: float) -> str:
    """The commit of a tag, else of a branch, with exactly this name."""
    names = ["HEAD"] if revision is None else [
        f"refs/tags/{revision}^{{}}", f"refs/tags/{revision}", f"refs/heads/{revision}"
    ]  # fmt: skip
    with _Git(url, deadline) as git:
        refs = git.run("ls-remote", "--", url, *names, limit=_MOST_REFS).decode(errors="replace")
    found = {name: commit for commit, _, name in (line.partition("\t") for line in refs.splitlines())}
    for name in names:
        if _FULL.fullmatch(found.get(name, "")):
            return found[name]
    raise errors.NotFound(f"{url} has no tag or branch {revision!r}", hint="branches and tags are named in full")


@lru_cache(maxsize=2)
def _archive(url: str, commit: str) -> bytes:
    """The files of a commit. They never change, so recent ones are cached."""
    with _Git(url, time.monotonic() + TIMEOUT) as git:
        git.run("init", "--quiet", "--bare", "--template=", "--", git.folder, limit=0)
        git.run("fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--", url, commit, limit=0)
        return git.run("archive", "--format=tar", commit, "--", limit=_LARGEST_TAR)


class _Git:
    """git in a private temporary folder."""

    def __init__(self, url: str, deadline: float) -> None:
        self._url = url
        self._deadline = deadline
        program = shutil.which("git")
        if program is None:
            raise errors.Unsupported("an hf:// source is fetched by git, which is not installed here",
                                     hint="install git, or give a folder that you have fetched yourself")  # fmt: skip
        self._program = program
        self._home = tempfile.TemporaryDirectory(prefix="rock-hub-")
        self.folder = f"{self._home.name}/repository.git"

    def __enter__(self) -> _Git:
        return self

    def __exit__(self, *_: object) -> None:
        self._home.cleanup()

    def run(self, *arguments: str, limit: int) -> bytes:
        """The output of a git command, at most `limit` bytes."""
        options = [part for pair in _CONFIG for part in ("-c", pair)]
        command = [self._program, f"--git-dir={self.folder}", *options, *arguments]
        log = Path(self._home.name, "log")
        with open(log, "wb") as stderr, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, cwd=self._home.name,
            env=settings.git_environment(self._home.name), start_new_session=True,
        ) as child:  # fmt: skip
            _bound(child.pid)
            late = threading.Event()
            clock = threading.Timer(max(0.0, self._deadline - time.monotonic()), _too_late, (late, child.pid))
            clock.start()
            try:
                assert child.stdout is not None
                data = child.stdout.read(limit + 1)
                if len(data) > limit:
                    raise self._too_large()
                status = child.wait()
            finally:
                clock.cancel()
                clock.join()
                if child.poll() is None:
                    _kill(child.pid)
        if late.is_set():
            raise errors.Unavailable(f"{self._url} took longer than {TIMEOUT:g} seconds", hint="try again")
        if status != 0:
            raise self._failure(log.read_bytes()[-4000:].decode(errors="replace"), status)
        return data

    def _too_large(self, more: str = "") -> errors.InvalidConfig:
        return errors.InvalidConfig(f"{self._url} is larger than {LIMIT >> 20} MiB{more}",
                                    hint="large files belong into a package or an image")  # fmt: skip

    def _failure(self, output: str, status: int) -> errors.RockError:
        """Convert git's error message, which is in the locale C, to an error."""
        last = next((line for line in reversed(output.splitlines()) if line.strip()), f"git ended with {status}")
        if "signal 25" in output or "index-pack" in output or status == -signal.SIGXFSZ:
            return self._too_large(", or makes no sense")
        if re.search(r"not our ref|not find remote ref|unadvertised object|not a valid object name|not a tree", output):
            return errors.NotFound(f"{self._url} has no such commit", hint="is it one of another repository?")
        if re.search(r"could not read Username|not found|error: 40[134]|Authentication failed", output):
            return errors.NotFound(f"there is no public repository {self._url}", hint="check its name")
        return errors.Unavailable(f"{self._url} cannot be fetched: {last[:500]}", details={"output": output},
                                  hint="check the URL and the network of this machine, then try again")


def _bound(pid: int) -> None:
    """Limit git and its child processes. Call after the start, because git first reads its configuration; the size of
    its output is limited separately."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LARGEST_PACK, _LARGEST_PACK))
        resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _too_late(late: threading.Event, pid: int) -> None:
    late.set()
    _kill(pid)


def _kill(pid: int) -> None:
    """Kill its session: git leads it and is not reaped yet."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
