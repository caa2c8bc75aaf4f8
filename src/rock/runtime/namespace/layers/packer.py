"""A process that packs or unpacks the files of a stopped sandbox, so that a hostile tree delays no other work.

    python -I -S packer.py '{"op": "pack", ...}'     tar on stdout; finally {"size", "digest"} or {"error"} on `status`
    python -I -S packer.py '{"op": "unpack", ...}'   tar on stdin; the same, after size and digest were compared

As an ordinary user it creates a user namespace in which it is root, so it can read files that the guest, who has the
same user id, made unreadable. Standard library only.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import hashlib
import json
import resource
from collections.abc import Iterator
from typing import Any

from rock.errors import ImageError
from rock.images.layers.tar_writer import Packer, Part, TarWriter, unpack
from rock.runtime.namespace.launcher import userns

_MEMORY = 2 << 30
ARCHIVE_ALTERED = "restart the sandbox once more; if it persists, the archive in ROCK_ARCHIVE is damaged"
_CHUNK = 1 << 20


class _Sum:
    """Length and digest of a stream."""

    def __init__(self) -> None:
        self.size = 0
        self._sha = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self._sha.update(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha.hexdigest()}"


def _pack(options: dict[str, Any], parts: list[Part], total: _Sum) -> None:
    buffer = bytearray()

    def put(data: bytes) -> None:
        buffer.extend(data)
        if len(buffer) >= _CHUNK:
            flush()

    def flush() -> None:
        data = bytes(buffer)
        buffer.clear()
        total.add(data)
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]

    Packer(TarWriter(put), options["overlay"], int(options["limit"])).pack(parts)
    flush()


def _unpack(options: dict[str, Any], parts: list[Part], total: _Sum) -> None:
    def chunks() -> Iterator[bytes]:
        while data := os.read(0, _CHUNK):
            total.add(data)
            if total.size > int(options["size"]):
                raise ImageError(f"the stream is longer than the {options['size']} bytes of the archive",
                                 hint=ARCHIVE_ALTERED)
            yield data

    unpack(chunks(), parts, one_owner=bool(options["one_owner"]))
    if (total.size, total.digest) != (options["size"], options["digest"]):
        raise ImageError(f"the stream differs from the archive: {total.size} bytes with {total.digest}, not "
                         f"{options['size']} with {options['digest']}", hint=ARCHIVE_ALTERED)


def main() -> None:
    options = json.loads(sys.argv[1])
    total = _Sum()
    try:
        if options["enter"]:
            userns.become_root()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        os.umask(0)
        parts = [Part(part["folder"], os.fsencode(part["target"].strip("/"))) for part in options["parts"]]
        (_pack if options["op"] == "pack" else _unpack)(options, parts, total)
        result: dict[str, Any] = {"size": total.size, "digest": total.digest}
    except ImageError as error:
        result = {"error": error.message, "hint": error.hint, "kind": "refused"}
    except MemoryError:
        result = {"error": "there are too many files", "hint": "remove some", "kind": "refused"}
    except OSError as error:
        result = {"error": str(error), "hint": None, "kind": "system", "errno": error.errno}
    os.write(int(options["status"]), json.dumps(result).encode())


if __name__ == "__main__":
    main()
