"""What `rock doctor` tells of the container engine, if there is one: it is needed for runtime "docker" alone."""

from __future__ import annotations

from rock import errors
from rock.runtime.docker.engine import Engine, EngineError, Facts
from rock.runtime.docker.shape import kind_of
from rock.runtime.namespace.probe import Finding


async def findings(host: str) -> list[Finding]:
    """Of the engine at `host`; never fails."""
    engine = Engine(host, patience=10.0)
    try:
        facts = await engine.facts()
    except (errors.RockError, EngineError) as error:
        hint = getattr(error, "hint", None) or ""
        return [Finding("container engine", None, f"{error.message}" + (f" ({hint})" if hint else ""))]
    kinds = sorted({kind for name, entry in facts.runtimes.items() if (kind := kind_of(name, entry)) is not None})
    return [
        Finding("container engine", True, f"{facts.version} at {engine.host}, {facts.driver} on {facts.backing}"),
        Finding("OCI runtimes", None, ", ".join(kinds) or "none"),
        Finding("containers", None, _rights(facts)),
    ]


def _rights(facts: Facts) -> str:
    limits = [word for word, there in (("memory", facts.memory), ("cpus", facts.cpus), ("pids", facts.pids)) if there]
    mapped = "userns" in facts.security or "rootless" in facts.security
    return "; ".join((
        f"limits of {', '.join(limits) or 'nothing'}",
        "seccomp" if "seccomp" in facts.security else "no seccomp: refused",
        "root inside is nobody outside" if mapped else "root inside is root outside, without its powers "
                                                        "(userns-remap in daemon.json maps it)",
        f"live-restore is {'on' if facts.live_restore else 'off: they end with the engine'}",
    ))  # fmt: skip
