"""Whether this machine can copy running processes, found by a fork of a sandbox with a shell and a child of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from rock.errors import RockError
from rock.images.store import ImageStore
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Handle, Process, Program
from rock.runtime.namespace.runtime import NamespaceRuntime

_PATIENCE = 20.0  # seconds for the answer of a copy
_CONFIG = SandboxConfig(image="host", memory="64m", cpus=0.5)
_SNAPSHOT = "0" * 32
_KEY = "probe"
# The variable and the pipe to the child have to continue.
_SCRIPT = "number=5; while read line; do echo $number$line; done | { read line; echo $line; }"


async def why_not(folder: Path) -> str:
    """The reason why processes cannot be copied; "" if they can. folder: an empty one."""
    try:
        answer = await _forked(folder)
    except (RockError, OSError, TimeoutError) as error:
        return str(error) or repr(error)
    return "" if answer == b"56\n" else "the copy of a shell does not continue"


async def _forked(folder: Path) -> bytes:
    """The output of a copied shell."""
    runtime = NamespaceRuntime(folder / "run", 0, ImageStore(folder / "images"))
    await runtime.open()
    handles: list[Handle] = []
    try:
        handles.append(await runtime.create("original", _CONFIG))
        program = Program(["/bin/sh", "-c", _SCRIPT], stdin="pipe", key=_KEY, keep=True)
        original = await runtime.spawn(handles[0], program)
        await runtime.checkpoint(handles[0], _SNAPSHOT, "switch", processes=True)
        handles.append(await runtime.create("child", _CONFIG.model_copy(update={"snapshot": _SNAPSHOT})))
        copy = await runtime.attach(handles[1], _KEY)
        try:
            return await _answer(copy)
        finally:
            copy.close()
            original.close()
    finally:
        for handle in handles:
            await runtime.destroy(handle)
        await runtime.drop_snapshot(_SNAPSHOT)
        await runtime.close()


async def _answer(copy: Process) -> bytes:
    assert copy.stdin is not None and copy.stdout is not None
    os.write(copy.stdin, b"6\n")
    await copy.close_stdin()
    async with asyncio.timeout(_PATIENCE):
        await copy.wait()
    return os.read(copy.stdout, 10)
