"""A sandbox made by a runtime, step by step."""

from __future__ import annotations

import time

from rock import faults
from rock.errors import RockError
from rock.protocol.sandbox import Phase, SandboxConfig
from rock.rocklet.kept import KeptSandboxes
from rock.rocklet.runtimes import Runtimes
from rock.runtime.base import Handle, Runtime
from rock.telemetry import tracing

Made = tuple[Runtime, Handle, dict[str, Phase]]


async def make(runtimes: Runtimes, sandbox_id: str, config: SandboxConfig) -> Made:
    """A new one, its image first."""
    runtime, began = runtimes.of(config), time.time()
    try:
        await runtimes.prepare_image(runtime, config)
        image = _done("on disk", began)
        began = time.time()
        with tracing.span("create sandbox", {"rock.sandbox_id": sandbox_id, "rock.runtime": runtime.name}):
            await faults.point("node.create.begun")
            handle = await runtime.create(sandbox_id, config)
            await faults.point("node.create.made")
    except RockError as error:
        error.sandbox_id = sandbox_id
        raise
    return runtime, handle, {"image": image, "sandbox": _done("running", began)}


async def wake(kept: KeptSandboxes, sandbox_id: str, config: SandboxConfig) -> Made:
    """One over its kept files."""
    began = time.time()
    await faults.point("node.wake.begun")
    runtime, handle = await kept.wake(sandbox_id, config)
    await faults.point("node.wake.made")
    return runtime, handle, {"image": Phase(status="success", message="on disk"), "sandbox": _done("running", began)}


def _done(message: str, began: float) -> Phase:
    return Phase(status="success", message=message, started_at=began, completed_at=time.time())
