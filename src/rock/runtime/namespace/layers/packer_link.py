"""The rocklet's client of the packer: one process per archive, ended with its reader or writer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from rock import errors
from rock.host.atomic_file import FULL
from rock.images.records import RootFS
from rock.protocol.sandbox import ArchivedFiles
from rock.runtime.namespace import records

_PACKER = str(Path(__file__).with_name("packer.py"))
_CHUNK = 1 << 20
_LONGEST_STATUS = 1 << 16


def parts(folder: Path, rootfs: RootFS) -> list[dict[str, str]]:
    """The folders with a sandbox's written files, and their paths inside."""
    return [{"folder": str(folder / name), "target": "" if bind is None else bind.target}
            for name, bind in records.written(rootfs) if bind is None or (folder / name).is_dir()]  # fmt: skip


class _Packer:
    """The process and the pipe on which it reports its result."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._status = -1

    async def __aenter__(self) -> asyncio.subprocess.Process:
        self._status, theirs = os.pipe2(os.O_CLOEXEC)
        pipes = {"pack": "stdout", "unpack": "stdin"}
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.DEVNULL)
        streams[pipes[self._options["op"]]] = asyncio.subprocess.PIPE
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", _PACKER, json.dumps({**self._options, "status": theirs}),
                **streams, limit=2 * _CHUNK, pass_fds=[theirs], cwd="/", start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1"})
        except BaseException:
            os.close(self._status)
            raise
        finally:
            os.close(theirs)
        return self._process

    async def result(self) -> dict[str, Any]:
        """The result. InvalidConfig for files that cannot be packed, Unavailable and StorageFull for other errors."""
        await self._process.wait()
        data = os.read(self._status, _LONGEST_STATUS)
        result: dict[str, Any] = json.loads(data) if data else {"error": "the packer was killed", "kind": "system"}
        if "error" not in result:
            return result
        text = f"the files could not be {self._options['op']}ed: {result['error']}"
        if result["kind"] == "refused":
            raise errors.InvalidConfig(text, hint=result.get("hint"))
        full = result.get("errno") in FULL
        raise (errors.StorageFull if full else errors.Unavailable)(text)

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(OSError):
                await self._process.stdin.wait_closed()
        if self._process.stdout is not None:  # otherwise its end is not detected
            while await self._process.stdout.read(_CHUNK):
                pass
        await self._process.wait()
        os.close(self._status)


async def pack(options: dict[str, Any], image_digest: str) -> AsyncGenerator[bytes | ArchivedFiles]:
    """Yield the chunks of a packer, and finally the summary."""
    packer = _Packer({"op": "pack", **options})
    async with packer as process:
        assert process.stdout is not None
        while data := await process.stdout.read(_CHUNK):
            yield data
        result = await packer.result()
    yield ArchivedFiles(size=result["size"], digest=result["digest"], image_digest=image_digest)


async def unpack(options: dict[str, Any], data: AsyncIterator[bytes]) -> None:
    """Feed a packer, and check its result."""
    packer = _Packer({"op": "unpack", **options})
    async with packer as process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended early, and reports the reason
            async for part in data:
                process.stdin.write(part)
                await process.stdin.drain()
            process.stdin.close()
        await packer.result()
