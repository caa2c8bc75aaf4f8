"""What a disk says, in our words."""

from __future__ import annotations

import errno

from rock.errors import RockError, StartFailed, StorageFull

FULL = (errno.ENOSPC, errno.EDQUOT)


def not_started(error: OSError, sandbox_id: str | None = None) -> RockError:
    """The error of a start of which something could not be written."""
    if error.errno in FULL:
        return StorageFull(f"the sandbox could not be made: {error}", sandbox_id=sandbox_id,
                           hint="free some disk space and try again; nothing half-made was kept")
    return StartFailed(f"the sandbox could not be made: {error}", sandbox_id=sandbox_id)
