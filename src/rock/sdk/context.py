"""The context of a build on its way to the server: a folder as a tar, without what .dockerignore leaves out."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from rock.errors import InvalidConfig
from rock.protocol.formats import tar
from rock.protocol.images import BuildRequest
from rock.protocol.routes import Frame, pack_frame
from rock.sdk.archive import FolderSource, header

_LARGEST_IGNORE = 1 << 20


class Ignored:
    """What patterns leave out: `*`, `?`, `[...]` in a name, `**` over folders, `!` takes back; the last one wins."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        for line in lines:
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            back = text.startswith("!")
            text = os.path.normpath(text.removeprefix("!").strip()).lstrip("/")
            if text not in ("", "."):
                self._rules.append((_pattern(text, line), back))
        self._takes_back = any(back for _, back in self._rules)

    def __call__(self, path: str) -> bool:
        """Whether a file or folder stays out, by its path in the context. A folder takes along what is in it."""
        out = False
        above = [path]
        while "/" in above[-1]:
            above.append(above[-1].rpartition("/")[0])
        for pattern, back in self._rules:
            if out is back and any(pattern.fullmatch(name) for name in above):
                out = not back
        return out

    def prunes(self, path: str) -> bool:
        """Whether a folder need not be looked into."""
        return self(path) and not self._takes_back


def _pattern(text: str, line: str) -> re.Pattern[str]:
    out, place = "", 0
    while place < len(text):
        c = text[place]
        if text.startswith("**", place):
            place += 2
            if text.startswith("/", place):
                place += 1
                out += "(?:.*/)?"
            else:
                out += ".*"
            continue
        end = text.find("]", place + 2) if c == "[" else -1
        if c == "*":
            out += "[^/]*"
        elif c == "?":
            out += "[^/]"
        elif end > 0:
            inside = text[place + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out += f"[{'^' + inside[1:] if inside[0] in '^!' else inside}]"
            place = end
        elif c == "\\" and place + 1 < len(text):
            place += 1
            out += re.escape(text[place])
        else:
            out += re.escape(c)
        place += 1
    try:
        return re.compile(out, re.DOTALL)
    except re.error:
        raise InvalidConfig(
            f".dockerignore has an invalid pattern: {line!r}", hint="use a pattern like *.log or **/build"
        ) from None


class ContextSource(FolderSource):
    """A build request and its context, in frames. Sockets, FIFOs and devices are left out."""

    def __init__(self, folder: str | os.PathLike[str], spec: BuildRequest, ignored: Ignored) -> None:
        super().__init__(folder)
        self._spec = spec
        self._ignored = ignored

    def chunks(self) -> Iterator[bytes]:
        yield pack_frame(Frame.RESULT, self._spec.model_dump_json().encode())
        for part in super().chunks():
            yield pack_frame(Frame.STDOUT, part)

    def _walk(self, folder: str, prefix: str) -> Iterator[bytes]:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            path, status = entry.path, entry.stat(follow_symlinks=False)
            out = self._ignored(name)
            if stat.S_ISDIR(status.st_mode):
                if not out:
                    yield header(name + "/", status, tar.FOLDER)
                if not self._ignored.prunes(name):
                    yield from self._walk(path, name + "/")
            elif out:
                continue
            elif stat.S_ISLNK(status.st_mode):
                yield header(name, status, tar.LINK, os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                yield from self._file(path, name, status)


def read_context(folder: str | os.PathLike[str], file: str | os.PathLike[str] | None) -> tuple[str, Ignored]:
    """(text of the Dockerfile, what stays out). InvalidConfig when there is none. Blocking."""
    path = Path(file) if file is not None else Path(folder) / "Dockerfile"
    try:
        text = path.read_bytes()[: (1 << 20) + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} cannot be read: {error}", hint="name another with -f") from None
    lines: list[str] = []
    for ignore in (path.with_name(f"{path.name}.dockerignore"), Path(folder) / ".dockerignore"):
        if ignore.is_file():
            lines = ignore.read_bytes()[:_LARGEST_IGNORE].decode("utf-8", "replace").removeprefix("\ufeff").splitlines()
            break
    return text, Ignored(lines)
