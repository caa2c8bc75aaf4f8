"""The files of an environment's source, in memory: read of a folder or a tar, laid over each other, and sent as a tar.

Nothing is ever unpacked on this machine. What a tar says is somebody else's: a link in it leads nowhere before it is
inside a sandbox.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from rock import errors

FILE = "env.py"
REQUIREMENTS = "requirements.txt"
LIMIT = 64 << 20  # bytes
_MOST = 20_000  # entries
_MOST_REQUIREMENTS = 64 << 10  # bytes
_LEFT_OUT = {".git", "__pycache__", ".venv"}

Entry = tuple[tarfile.TarInfo, bytes]


class Tree:
    """Files, folders and symbolic links by their paths. `what`: how errors name it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, Entry] = {}

    @classmethod
    def of_folder(cls, folder: Path) -> Tree:
        """A folder of this machine, links as links; InvalidConfig when it is too large."""
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
        """A tar that may be anybody's: entries of other kinds are left out. InvalidConfig for what cannot be right."""
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
            raise errors.InvalidConfig(f"{what} is no tar of a source: {error}") from None
        return tree

    def _add(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts or "\0" in entry.name:
            raise errors.InvalidConfig(f"{self.what} has a file with the name {entry.name[:200]!r}")
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
        """The other one with these files laid over it."""
        both = Tree(other.what)
        both._entries = {**other._entries, **self._entries}
        return both

    def lay(self, path: Path, cwd: str) -> Tree:
        """This one with a folder's files, or a file beside env.py in `cwd`, of this machine laid over it."""
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
        """A regular file as text; None when there is none of that name. InvalidConfig for anything else."""
        found = self._entries.get(name)
        if found is None:
            return None
        if not found[0].isreg():
            raise errors.InvalidConfig(f"{name} in {self.what} is a link or a folder", hint="it has to be a file")
        if len(found[1]) > limit:
            raise errors.InvalidConfig(f"{name} in {self.what} is larger than {limit >> 10} KiB")
        try:
            return found[1].decode()
        except UnicodeDecodeError as error:
            raise errors.InvalidConfig(f"{name} in {self.what} is no text: {error}") from None

    def check(self, cwd: str) -> None:
        """InvalidConfig unless there is an env.py in the folder `cwd` of it."""
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
        """All of it as a tar. Folders come first, so that a file laid over another does not hide its parents."""
        buffer = io.BytesIO()
        if sum(len(data) for _, data in self._entries.values()) > LIMIT:
            raise _too_large(self.what)
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for _, (entry, data) in sorted(self._entries.items(), key=lambda item: (not item[1][0].isdir(), item[0])):
                archive.addfile(entry, io.BytesIO(data))
        return buffer.getvalue()


def _too_large(what: str) -> errors.InvalidConfig:
    return errors.InvalidConfig(f"{what} is larger than {LIMIT >> 20} MiB, or has more than {_MOST} files")
