"""Small files that are replaced at once: a crash leaves the old one or the new one. Not synced, as sandboxes end with
the machine too."""

from __future__ import annotations

import os


def replace(path: str | os.PathLike[str], text: str) -> None:
    """Write a file for our user alone, beside its place (as `.new-NAME`), and move it there."""
    folder, name = os.path.split(os.fspath(path))
    beside = f"{folder}/.new-{name}"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        data = memoryview(text.encode("utf-8", "surrogateescape"))
        while data:
            data = data[os.write(fd, data):]
    finally:
        os.close(fd)
    os.rename(beside, os.path.join(folder, name))
