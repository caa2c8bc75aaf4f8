"""Tests whether this machine boots microVMs, by booting one: the presence of /dev/kvm is no proof.

The engines are optional packages, which ROCK does not install. Each is tested in a separate process with a time limit
and a temporary home, on a file system of a few files of this machine.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ENGINES = ("boxlite", "microsandbox")
PATIENCE = 40.0  # timeout of a boot in seconds
_PATH = "/usr/local/bin:/usr/bin:/bin"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_SHELL = "/bin/sh"
_BOOT = {
    "boxlite": """
import asyncio, sys
import boxlite
async def main():
    async with boxlite.SimpleBox(rootfs_path=sys.argv[2], memory_mib=128, cpus=1) as box:
        done = await box.exec("/bin/sh", "-c", "echo booted")
        print(done.stdout, flush=True)
asyncio.run(main())
""",
    "microsandbox": """
import asyncio, os, sys
from microsandbox import Sandbox
async def main():
    box = await Sandbox.create("rock-probe", image=sys.argv[1], memory=128, cpus=1)
    try:
        done = await box.exec("/bin/sh", ["-c", "echo booted"])
        print(done.stdout_text, flush=True)
    finally:
        await box.kill()
asyncio.run(main())
""",
}


@dataclass(frozen=True)
class Boot:
    """The result: ok is None where the engine is not installed."""

    engine: str
    ok: bool | None
    detail: str


def try_engine(engine: str, patience: float = PATIENCE) -> Boot:
    """Boot one machine and wait for its output. Blocking, for up to `patience` seconds where the engine is
    installed."""
    found = importlib.util.find_spec(engine)
    if found is None or not found.origin:
        return Boot(engine, None, "not installed")
    if not os.path.exists("/dev/kvm"):
        return Boot(engine, False, "installed; there is no /dev/kvm")
    with tempfile.TemporaryDirectory(prefix="rock-boot-", ignore_cleanup_errors=True) as folder:
        try:
            root, layout = _guest(Path(folder))
        except OSError as error:
            return Boot(engine, False, f"installed; no guest to boot could be made: {error}")
        # The temporary home hides the user's own packages.
        environment = {"PATH": _PATH, "HOME": folder, "TMPDIR": folder,
                       "PYTHONPATH": str(Path(found.origin).parent.parent)}
        return _run(engine, [str(root), str(layout)], environment, patience)


def _run(engine: str, arguments: list[str], environment: dict[str, str], patience: float) -> Boot:
    home = environment["HOME"]
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen([sys.executable, "-c", _BOOT[engine], *arguments], env=environment, cwd=home,
                                 stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            child.wait(patience)
            ended = f"status {child.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"no answer in {patience:g} s"
        finally:
            _end(child)
        out.seek(max(0, out.tell() - 4000))
        said = out.read().decode(errors="replace")
    if "booted" in said.split():
        return Boot(engine, True, "a machine was booted, and answered")
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.strip()]
    last = f": {lines[-1][:200]}" if lines else ""
    return Boot(engine, False, f"installed, but a machine does not boot: {ended}{last}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill it and its children: helpers of engines stay in its session."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.getsid(int(name)) == child.pid:
                    os.kill(int(name), signal.SIGKILL)
            except OSError:
                continue
    child.wait()


def _guest(folder: Path) -> tuple[Path, Path]:
    """A root file system with this machine's shell, as a folder and as an OCI layout."""
    root, layout = folder / "root", folder / "layout"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root"):
        (root / name).mkdir(parents=True)
    shell = os.path.realpath(_SHELL)
    shutil.copy(shell, root / "bin" / "sh")
    listed = subprocess.run(["ldd", shell], capture_output=True, text=True, timeout=20, env={"PATH": _PATH},
                            check=False)
    for path in re.findall(r"(/\S+) \(0x", listed.stdout):
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    _layout(root, layout)
    return root, layout


def _layout(root: Path, layout: Path) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.add(root, ".")
    machine = {"architecture": _MACHINES.get(platform.machine(), platform.machine()), "os": "linux"}
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    config = {**machine, "config": {"Cmd": [_SHELL]}, "rootfs": {
        "type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(plain.getvalue()).hexdigest()}"]}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": put(json.dumps(config).encode(), "config.v1+json"),
                "layers": [put(gzip.compress(plain.getvalue()), "layer.v1.tar+gzip")]}
    described = put(json.dumps(manifest).encode(), "manifest.v1+json")
    index = {"schemaVersion": 2, "manifests": [{**described, "platform": machine}]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
