"""Findings about a container engine: which of its OCI runtimes start a container, each from a container that ran.

The container is made from an empty image, with the programs of the engine's machine mounted read-only, without a
network, and runs `true`. Image and containers are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import secrets
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

from rock import errors
from rock.runtime.docker.engine import Engine, EngineError, Facts
from rock.runtime.docker.spec import Oci, kind_of
from rock.runtime.namespace.probe import Finding

_WITHIN = 30.0  # seconds for a container to end
_LOOK = 0.1
_FOLDERS = ("bin", "lib", "lib64", "usr")
_PROGRAMS: dict[Oci, tuple[str, ...]] = {
    "runc": ("runc", "crun"), "runsc": ("runsc",), "kata": ("kata-runtime", "containerd-shim-kata-v2"),
}  # fmt: skip


async def findings(host: str) -> list[Finding]:
    """Findings about the engine at `host`; never fails."""
    engine = Engine(host, patience=10.0)
    try:
        facts = await engine.facts()
    except (errors.RockError, EngineError) as error:
        hint = getattr(error, "hint", None) or ""
        return [Finding("container engine", None, f"{error.message}" + (f" ({hint})" if hint else ""))]
    return [
        Finding("container engine", True, f"{facts.version} at {engine.host}, {facts.driver} on {facts.backing}"),
        *await runtime_findings(engine, facts),
        Finding("containers", None, _rights(facts)),
    ]


async def runtime_findings(engine: Engine, facts: Facts) -> list[Finding]:
    """A finding for each runtime of the engine, and for each kind that it has not. Never fails."""
    names = [name for name in sorted(facts.runtimes) if not (name.startswith("io.containerd.runc") and "runc" in
             facts.runtimes)]  # fmt: skip
    image = f"rock-doctor:{secrets.token_hex(6)}"
    found = []
    try:
        await engine.load_image(image, _empty())
    except (errors.RockError, EngineError) as error:
        return [Finding(f"OCI runtime {name}", None, f"not checked: {error.message}") for name in names]
    try:
        for name in names:
            found.append(await _finding(engine, image, name, facts.runtimes[name]))
    finally:
        with contextlib.suppress(errors.RockError, EngineError):
            await engine.remove_image(image)
    kinds = {kind_of(name, facts.runtimes[name]) for name in names}
    return found + [_absent(kind) for kind in _PROGRAMS if kind not in kinds]


def _absent(kind: Oci) -> Finding:
    paths = [path for program in _PROGRAMS[kind] if (path := shutil.which(program))]
    why = f"{paths[0]} is not registered with the engine" if paths else "it is not installed"
    hint = f"add {kind} to `runtimes` of the engine's daemon.json" if paths else f"install {kind}"
    return Finding(f"OCI runtime {kind}", None, f"{why}: oci_runtime={kind} is refused", hint)


async def _finding(engine: Engine, image: str, name: str, entry: dict[str, Any]) -> Finding:
    began = time.monotonic()
    try:
        async with asyncio.timeout(_WITHIN):
            fault = await _run(engine, image, name)
    except TimeoutError:
        fault = f"its container did not end within {_WITHIN:g} s"
    except (errors.RockError, EngineError) as error:
        fault = error.message
    what = f"OCI runtime {name}"
    if not fault:
        return Finding(what, True, f"{kind_of(name, entry) or 'unknown'}: a container ran in "
                       f"{time.monotonic() - began:.1f} s")  # fmt: skip
    program = str(entry.get("path") or "")
    if program.startswith("/") and not Path(program).exists():
        return Finding(what, False, f"its program {program} does not exist", "install it, or correct daemon.json")
    return Finding(what, False, f"it starts no container: {fault[:300]}", "check its program and its log")


async def _run(engine: Engine, image: str, name: str) -> str:
    """"" when a container of the runtime ends with status 0, else the reason. EngineError, Unavailable."""
    binds = [f"{os.path.realpath(f'/{one}')}:/{one}:ro" for one in _FOLDERS if os.path.isdir(f"/{one}")]
    config = {"Image": image, "Cmd": ["/bin/true"], "Labels": {"rock.doctor": "1"}, "HostConfig": {
        "Runtime": name, "NetworkMode": "none", "Binds": binds, "PidsLimit": 64, "Memory": 256 << 20}}  # fmt: skip
    container = await engine.create(f"rock-doctor-{secrets.token_hex(6)}", config)
    try:
        await engine.start(container)
        while True:
            state = ((await engine.inspect(container)) or {}).get("State") or {}
            if state.get("Status") in ("exited", "dead"):
                return "" if state.get("ExitCode") == 0 else (str(state.get("Error") or "") or
                                                              f"its container ended with {state.get('ExitCode')}")
            await asyncio.sleep(_LOOK)
    finally:
        await engine.remove(container)


def _empty() -> bytes:
    """A tar of empty folders."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in (*_FOLDERS, "proc", "sys", "dev", "tmp", "etc"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
    return out.getvalue()


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
