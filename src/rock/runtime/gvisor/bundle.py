"""The OCI bundle's config.json and the command line of runsc, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rock.protocol.sandbox import SandboxConfig
from rock.runtime.init.python import INSIDE, GuestPython
from rock.runtime.namespace.launcher import seccomp

# The capabilities of sandboxes in every runtime.
CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
                "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT")  # fmt: skip
ROOT = "root"  # mount point of the image in the sandbox's folder, visible to runsc only
STATE = "state"  # state folder of runsc
MOUNT_POINT = INSIDE.strip("/")
_MOST_SHARED = 2 << 30
_OPTIONS = ["nosuid", "nodev", "noexec"]


def shared(config: SandboxConfig) -> int:
    """Size of /dev/shm in bytes."""
    return config.shm_bytes or min(_MOST_SHARED, max(1 << 20, config.memory_bytes // 4))


def _options() -> dict[str, object]:
    """Options of pid 1: the same filter as in every runtime, applied by gVisor's kernel."""
    return {"filter": seccomp.build().hex()} if seccomp.supported() else {}


def describe(config: SandboxConfig, python: GuestPython) -> dict[str, Any]:
    """config.json: pid 1 on our own Python, as root with few capabilities, over a root that is mounted beforehand."""
    rights = list(CAPABILITIES)
    return {
        "ociVersion": "1.0.2", "hostname": "sandbox",
        "process": {
            "terminal": False, "user": {"uid": 0, "gid": 0}, "args": python.command(_options()), "env": [], "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), rights),
            "noNewPrivileges": True, "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        },
        "root": {"path": ROOT, "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": _OPTIONS},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": [*_OPTIONS, "mode=1777", f"size={shared(config)}"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_OPTIONS, "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }  # fmt: skip


def command(program: str, folder: Path, slot: str) -> list[str]:
    """The command line of runsc, which runs until the sandbox ends; killing it ends the sandbox.

    The rocklet creates the cgroups around the whole process tree. The sandbox gets nothing of the host's network.
    """
    return [program, f"--root={folder / STATE}", "--ignore-cgroups", "--network=none", f"--log={folder / 'log'}",
            "run", f"--bundle={folder}", slot]
