"""The one exception that pid 1 answers with: a code of `rock.errors` and a sentence.

Everything in this folder runs inside sandboxes: standard library only, and nothing of ours from outside the folder.
"""

from __future__ import annotations

import errno

_CODES = {
    "not_found": (errno.ENOENT, errno.ENXIO, errno.ESRCH, errno.ENODEV),
    "conflict": (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.EBUSY, errno.ETXTBSY),
    "unauthorized": (errno.EACCES, errno.EPERM, errno.EROFS),
    "storage_full": (errno.ENOSPC, errno.EDQUOT),
    "quota_exceeded": (errno.EAGAIN, errno.ENOMEM),
    "invalid_config": (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EXDEV, errno.E2BIG, errno.EFBIG,
                       errno.EBADF),
    "unavailable": (errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT),
}
_BY_ERRNO = {number: code for code, numbers in _CODES.items() for number in numbers}
_SENTENCES = {
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "it exists already",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.EROFS: "it is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ELOOP: "too many symbolic links",
    errno.EFBIG: "larger than files may be here",
}


class Fault(Exception):
    """What a request is answered with when it fails. `code` is a code of `rock.errors`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def of_os_error(error: OSError, what: str) -> Fault:
    """The fault that an OSError stands for; `what` is the path or the action that it was about."""
    number = error.errno or 0
    sentence = _SENTENCES.get(number) or (error.strerror or str(error)).lower()
    return Fault(_BY_ERRNO.get(number, "internal"), f"{what}: {sentence}")
