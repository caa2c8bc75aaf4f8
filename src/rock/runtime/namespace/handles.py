"""What a handle of this runtime says: plain data, from which a later server finds the sandbox again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.base import Handle, Program
from rock.runtime.image.rootfs import RootFS
from rock.runtime.initfiles import merged
from rock.runtime.namespace import keeping
from rock.runtime.namespace.disks import Disks
from rock.runtime.namespace.slots import Sandbox, Slots

RUNTIME = "namespace"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_NOTES = 100


class Handles:
    """isolation: the level that sandboxes have here. disk_limit: bytes for the files of one without a disk of its own;
    0 is no limit."""

    def __init__(self, slots: Slots, disks: Disks, disk_limit: int) -> None:
        self._disk_limit = disk_limit
        self.isolation = Isolation.NAMESPACES
        self._slots = slots
        self._disks = disks
        self._notes: dict[str, tuple[RootFS, dict[str, Any]]] = {}

    def of(self, sandbox: Sandbox, id: str, rootfs: RootFS, config: SandboxConfig) -> Handle:
        """Of a living sandbox, under the name `id`."""
        data = {**sandbox.record(id), "env": merged({"PATH": _PATH}, rootfs.env, config.env),
                "cwd": rootfs.cwd or "/", "user": rootfs.user, "memory": sandbox.memory or config.memory_bytes}
        # Of one that can rest it is called otherwise: its handle says so.
        data["rootfs" if config.keeps_files else "image"] = self._note(rootfs)
        if config.network == "nat":
            data["egress"] = config.egress
        enforced = self._slots.limiter.enforced()
        if config.disk is not None:
            data["disk"], enforced["disk"] = config.disk_bytes, self._disks.way
        elif self._disk_limit:
            data["disk_limit"], enforced["disk"] = self._disk_limit, "watched"
        else:
            enforced["disk"] = "none"
        if config.nofile is not None:
            data["nofile"], enforced["nofile"] = config.nofile, "rlimit"
        if config.shm_size is not None:
            enforced["shm_size"] = "tmpfs"
        return Handle(RUNTIME, id, self.isolation, enforced, data)

    def claimed(self, sandbox: Sandbox, id: str, rootfs: RootFS, config: SandboxConfig) -> Handle:
        """Of one that is somebody's from now on, with the limits of `config`."""
        sandbox.disk = self._disk_limit if config.disk is None else 0
        sandbox.memory = config.memory_bytes - self._disks.in_memory(config)
        if sandbox.link is not None:
            sandbox.link.sandbox_id = id
        return self.of(sandbox, id, rootfs, config)

    def _note(self, rootfs: RootFS) -> dict[str, Any]:
        """The image as plain data, which nobody changes: it takes 0.1 ms to make, and is the same for many."""
        known = self._notes.get(rootfs.digest)
        if known is None or known[0] != rootfs:
            if len(self._notes) >= _MOST_NOTES:
                self._notes.clear()
            known = self._notes[rootfs.digest] = rootfs, keeping.note(rootfs)
        return known[1]

    def complete(self, handle: Handle, program: Program) -> Program:
        """The program with what the handle says where it says nothing itself."""
        data = handle.data
        if (most := data.get("nofile")) is not None:
            program = replace(program, nofile=min(program.nofile or most, most))
        user = program.user
        if user is None and self.isolation == Isolation.NAMESPACES:  # else there is one user only, who is root inside
            user = data["user"]
        return replace(program, env=merged(data["env"], program.env), cwd=program.cwd or data["cwd"], user=user or None)
