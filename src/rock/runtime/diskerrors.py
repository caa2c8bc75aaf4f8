"""What a disk says, in our words."""

from __future__ import annotations

import errno
import os

from rock.errors import RockError, StartFailed, StorageFull, Unavailable

FULL = (errno.ENOSPC, errno.EDQUOT)


def not_started(error: OSError, sandbox_id: str | None = None) -> RockError:
    """The error of a start of which something could not be written."""
    if error.errno in FULL:
        return StorageFull(f"the sandbox could not be made: {_words(error)}", sandbox_id=sandbox_id,
                           hint="free some disk space and try again; nothing half-made was kept")
    return StartFailed(f"the sandbox could not be made: {_words(error)}", sandbox_id=sandbox_id)


def not_kept(error: OSError, sandbox_id: str, what: str) -> RockError:
    """The error of a request that needs room on the server's disk. what: for what."""
    message = f"there is no room for {what} on the server's disk: {_words(error)}"
    if error.errno in FULL:
        return StorageFull(message, sandbox_id=sandbox_id, hint="free some disk space and try again")
    return Unavailable(f"{what} cannot be kept on the server's disk: {_words(error)}", sandbox_id=sandbox_id)


def _words(error: OSError) -> str:
    """Without the path, which is the server's own."""
    return os.strerror(error.errno) if error.errno else str(error)
