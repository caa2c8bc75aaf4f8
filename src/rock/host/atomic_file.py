"""Atomic replacement of small files, and the errors of a full or failing disk. A crash leaves the old or the new file.

Most replacements are not synced, because sandboxes end with the machine too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from typing import Any

from rock.errors import RockError, StartFailed, StorageFull, Unavailable

_SUM = ', "crc": "'
_SUM_LENGTH = len(_SUM) + 8 + len('"}')


class Damaged(ValueError):
    """The content of a file does not match its checksum."""


def summed(text: str) -> str:
    """Serialize a JSON object, with the checksum of the text as its last member."""
    return f'{text[:-1]}{_SUM}{zlib.crc32(text.encode("utf-8", "surrogateescape")):08x}"}}'


def parsed(data: bytes) -> dict[str, Any]:
    """Parse the text of `summed`, or of a version without checksums. Damaged."""
    try:
        found = _object(data.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise Damaged(str(error)) from None
    found.pop("crc", None)
    return found


def _object(text: str) -> dict[str, Any]:
    if text[-_SUM_LENGTH:-10] == _SUM:
        bare = text[:-_SUM_LENGTH] + "}"
        if text[-2:] != '"}' or int(text[-10:-2], 16) != zlib.crc32(bare.encode("utf-8", "surrogateescape")):
            raise ValueError("its checksum does not fit its content")
        text = bare
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def replace(path: str | os.PathLike[str], text: str, *, durable: bool = False) -> None:
    """Replace a file atomically, by a rename of `.new-NAME`; mode 0600. durable: it is on the disk on return."""
    folder, name = os.path.split(os.fspath(path))
    beside = f"{folder}/.new-{name}"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            data = memoryview(text.encode("utf-8", "surrogateescape"))
            while data:
                data = data[os.write(fd, data):]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, os.path.join(folder, name))
        if durable:
            _sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _sync_folder(folder: str) -> None:
    fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- disk errors ----

FULL = (errno.ENOSPC, errno.EDQUOT)


def not_started(error: OSError, sandbox_id: str | None = None) -> RockError:
    """The error of a start that could not write its files."""
    if error.errno in FULL:
        return StorageFull(f"the sandbox could not be made: {_words(error)}", sandbox_id=sandbox_id,
                           hint="free some disk space and try again; nothing half-made was kept")
    return StartFailed(f"the sandbox could not be made: {_words(error)}", sandbox_id=sandbox_id,
                       hint="the server's log has the whole error; try again once its disk and ROCK_HOME are writable")


def not_kept(error: OSError, sandbox_id: str, what: str) -> RockError:
    """The error of a request that could not write to the server's disk. what: the data, for the message."""
    message = f"there is no room for {what} on the server's disk: {_words(error)}"
    if error.errno in FULL:
        return StorageFull(message, sandbox_id=sandbox_id, hint="free some disk space and try again")
    return Unavailable(f"the server's disk cannot store {what}: {_words(error)}", sandbox_id=sandbox_id,
                       hint="check the disk and the permissions of ROCK_HOME on the server, then try again")


def _words(error: OSError) -> str:
    """The error text without the path, which belongs to the server."""
    return os.strerror(error.errno) if error.errno else str(error)
