"""Devices: a process in the groups of a sandbox opens none but those of its /dev, even one that is the host's root."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from rock.runtime.namespace.limits import devices
from tests.runtime.boxes import ROOT, namespace_box, run

pytestmark = pytest.mark.skipif(not ROOT, reason="takes root")
# Joins a group, then opens by name as root of the host; tells what it could.
_OPEN = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
for path in sys.argv[2:]:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
        print(path, "opened")
    except PermissionError:
        print(path, "refused")
    except OSError as error:
        print(path, error.strerror)
"""
_FINE = ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/ptmx"]


def _forbidden() -> list[str]:
    found = [path for path in ("/dev/kvm", "/dev/loop-control", "/dev/fuse", "/dev/net/tun", "/dev/kmsg", "/dev/mem")
             if os.path.exists(path)]
    if not found:
        pytest.skip("this machine has no other devices")
    return found


def _told(group: str) -> dict[str, str]:
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _OPEN, group, *_FINE, *_forbidden()], capture_output=True,
                          text=True, timeout=30, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_every_sandbox_is_in_the_group(tmp_path: Path) -> None:
    if not os.path.exists("/sys/fs/cgroup/devices/devices.list"):
        pytest.skip("this machine has no version 1 of the devices controller")

    async def main() -> None:
        async with namespace_box(tmp_path) as box:
            lines = Path(f"/proc/{box.handle.data['pid']}/cgroup").read_text().splitlines()
            path = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "devices")
            assert "rock-" in path
            told = _told(f"/sys/fs/cgroup/devices{path}")
            assert {told[name] for name in _FINE} == {"opened"}
            assert {told[name] for name in _forbidden()} == {"refused"}
            assert (await box.sh("echo x > /dev/null && head -c 3 /dev/zero | wc -c")).strip() == "3"
            assert "x" in await box.sh("echo x", pty=(24, 80))

    run(main())


def test_the_program_of_version_2(tmp_path: Path) -> None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    top = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), None)
    if top is None:
        pytest.skip("this machine has no cgroups of version 2")
    parent = Path(top) / f"rock-test-{secrets.token_hex(6)}"
    child = parent / "sandbox"
    child.mkdir(parents=True)
    try:
        try:
            devices.limit_folder(str(parent))
            devices.limit_folder(str(parent))  # as a server that is started again
        except OSError as error:
            pytest.skip(f"this kernel takes no such program: {error}")
        told = _told(str(child))
        assert {told[name] for name in _FINE} == {"opened"}
        assert {told[name] for name in _forbidden()} == {"refused"}
    finally:
        child.rmdir()
        parent.rmdir()
