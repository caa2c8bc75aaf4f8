"""Environments of a hub's repositories, `hf://org/repo@rev`: one commit, fetched by git and read as a tar.

There is never a checkout, so no hook, no filter and no link of a repository has an effect here: `git archive` reads
the objects of a bare repository that is gone when this is done. git runs without this machine's or user's
configuration, without a terminal, over http and https alone, and within bounds of size, memory and time.
Submodules are not fetched; files in large-file storage arrive as the pointers that they are in git.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rock import errors, settings
from rock.gym.tree import LIMIT

TIMEOUT = 300.0  # seconds, for all of it
_LARGEST_PACK = 2 * LIMIT
_LARGEST_TAR = 2 * LIMIT
_MEMORY = 4 << 30  # bytes of address space of one git
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
    """What an `hf://` source names. revision: None is the default branch; task: "suite" or "suite/task", or None."""

    repository: str
    revision: str | None
    task: str | None

    @classmethod
    def parse(cls, rest: str) -> HubSource:
        """`rest`: what follows hf://. InvalidConfig says what is wrong with it."""
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
        """InvalidConfig where code of others would run that nobody agreed to, or that may change."""
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
    """The commit of a tag, else of a branch, of that very name."""
    names = ["HEAD"] if revision is None else [
        f"refs/tags/{revision}^{{}}", f"refs/tags/{revision}", f"refs/heads/{revision}"
    ]  # fmt: skip
    with _Git(url, deadline) as git:
        told = git.run("ls-remote", "--", url, *names, limit=_MOST_REFS).decode(errors="replace")
    found = {name: commit for commit, _, name in (line.partition("\t") for line in told.splitlines())}
    for name in names:
        if _FULL.fullmatch(found.get(name, "")):
            return found[name]
    raise errors.NotFound(f"{url} has no tag or branch {revision!r}", hint="branches and tags are named in full")


@lru_cache(maxsize=2)
def _archive(url: str, commit: str) -> bytes:
    """The files of a commit. What its digits name never changes, so the last ones are kept."""
    with _Git(url, time.monotonic() + TIMEOUT) as git:
        git.run("init", "--quiet", "--bare", "--template=", "--", git.folder, limit=0)
        git.run("fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--", url, commit, limit=0)
        return git.run("archive", "--format=tar", commit, "--", limit=_LARGEST_TAR)


class _Git:
    """git over a folder of its own, which is gone in the end."""

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
        """What it prints, at most `limit` bytes."""
        options = [part for pair in _CONFIG for part in ("-c", pair)]
        command = [self._program, f"--git-dir={self.folder}", *options, *arguments]
        told = Path(self._home.name, "told")
        with open(told, "wb") as stderr, subprocess.Popen(
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
            raise self._failure(told.read_bytes()[-4000:].decode(errors="replace"), status)
        return data

    def _too_large(self, more: str = "") -> errors.InvalidConfig:
        return errors.InvalidConfig(f"{self._url} is larger than {LIMIT >> 20} MiB{more}",
                                    hint="large files belong into a package or an image")  # fmt: skip

    def _failure(self, told: str, status: int) -> errors.RockError:
        """What git said, as an error: its words are those of the locale C."""
        last = next((line for line in reversed(told.splitlines()) if line.strip()), f"git ended with {status}")
        if "signal 25" in told or "index-pack" in told or status == -signal.SIGXFSZ:
            return self._too_large(", or makes no sense")
        if re.search(r"not our ref|not find remote ref|unadvertised object|not a valid object name|not a tree", told):
            return errors.NotFound(f"{self._url} has no such commit", hint="is it one of another repository?")
        if re.search(r"could not read Username|not found|error: 40[134]|Authentication failed", told):
            return errors.NotFound(f"there is no public repository {self._url}", hint="check its name")
        return errors.Unavailable(f"{self._url} cannot be fetched: {last[:500]}", details={"output": told})


def _bound(pid: int) -> None:
    """Bounds for git and all that it starts from now on. It has to read its configuration first, so that is in time;
    the size of what it prints is bounded beside."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LARGEST_PACK, _LARGEST_PACK))
        resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _too_late(late: threading.Event, pid: int) -> None:
    late.set()
    _kill(pid)


def _kill(pid: int) -> None:
    """All of its session: it was started as the leader of one and is not reaped yet."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
