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
    runtime = runtimes.of(config)
    phases = {"image": Phase(status="running", started_at=time.time()), "sandbox": Phase()}

    def tell(text: str) -> None:
        phases["image"] = phases["image"].model_copy(update={"message": text})

    try:
        await runtimes.prepare_image(runtime, config, tell)
        phases["image"] = _finished(phases["image"], "on disk")
        phases["sandbox"] = Phase(status="running", started_at=time.time())
        with tracing.span("create sandbox", {"rock.sandbox_id": sandbox_id, "rock.runtime": runtime.name}):
            await faults.point("node.create.begun")
            handle = await runtime.create(sandbox_id, config)
            await faults.point("node.create.made")
        phases["sandbox"] = _finished(phases["sandbox"], "running")
    except RockError as error:
        error.sandbox_id = sandbox_id
        raise
    return runtime, handle, phases


async def wake(kept: KeptSandboxes, sandbox_id: str, config: SandboxConfig) -> Made:
    """One over its kept files."""
    phases = {"image": Phase(status="success", message="on disk"),
              "sandbox": Phase(status="running", started_at=time.time())}  # fmt: skip
    await faults.point("node.wake.begun")
    runtime, handle = await kept.wake(sandbox_id, config)
    await faults.point("node.wake.made")
    phases["sandbox"] = _finished(phases["sandbox"], "running")
    return runtime, handle, phases


def _finished(phase: Phase, message: str) -> Phase:
    return phase.model_copy(update={"status": "success", "message": message, "completed_at": time.time()})
