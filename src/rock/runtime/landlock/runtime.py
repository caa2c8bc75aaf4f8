"""Runtime "landlock": for hosts that forbid user namespaces, such as the inside of a container with default settings.

A sandbox is a folder of the host and a process tree under a supervisor process (parent.py). Landlock shows it the
machine's own system read-only and its folder writable, confines signals, and denies TCP. A seccomp filter denies all
sockets, and system calls as in the other runtimes. Each sandbox has a user id of its own, which protects what
Landlock does not cover (modes and owners of files, processes of the same user); this requires root. The isolation is
weaker than namespaces (docs/security.md), so the runtime must be selected by name."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import secrets
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rock import errors
from rock.guest.init import process_tree, remove
from rock.images import host
from rock.protocol.sandbox import Isolation, SandboxConfig, Usage
from rock.runtime.base import Enforced, Handle, Program, Trait
from rock.runtime.init.files import merged
from rock.runtime.init.link import InitLink, bind_listener
from rock.runtime.landlock import parent, ruleset
from rock.runtime.namespace import admission
from rock.runtime.namespace.launcher import seccomp, userns
from rock.runtime.namespace.limits import limiter
from rock.runtime.namespace.limits.limiter import MemoryWatch
from rock.runtime.process.runtime import PATH, ProcessRuntime, children, read_record, write_record
from rock.runtime.refusals import START_LOG

_NEEDED = 4  # the ABI version that introduces TCP rules
_FIRST_UID, _SPAN, _MOST = 1_700_000_000, 10_000, 20_000
OTHER_ISOLATION = "leave isolation unset, or use another runtime of this machine: `rock doctor` lists them"
_FILES = 65_536
_ELSEWHERE = Path("/var/lib/rock")
_ENFORCED: dict[str, Enforced] = {"memory": "watched", "cpus": "affinity", "pids": "rlimit"}


class LandlockRuntime(ProcessRuntime):
    """Sandboxes of Landlock. `run_dir` holds one folder per sandbox; it is created when missing."""

    name = "landlock"
    isolation = Isolation.LANDLOCK
    prefix = "l-"
    traits: Mapping[Isolation, frozenset[Trait]] = {
        Isolation.LANDLOCK: frozenset({Trait.PROGRAMS, Trait.TERMINALS, Trait.OUTLIVES, Trait.TREES}),
    }

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._homes = self._run_dir
        self._tried: asyncio.Task[None] | None = None
        self._watch = MemoryWatch("landlock", self._watched)
        self._memory: dict[str, tuple[int, int]] = {}  # pid 1 and bytes, by slot
        self._kills: dict[str, int] = {}
        self._uids: dict[str, int] = {}
        self._last_uid = 0
        self._cpus = itertools.cycle(sorted(os.sched_getaffinity(0)))

    async def open(self) -> None:
        await super().open()
        if not _open_to_others(self._run_dir):
            digest = hashlib.sha256(os.path.realpath(self._run_dir).encode()).hexdigest()[:12]
            self._homes = _ELSEWHERE / digest
        for folder in self._run_dir.glob(f"{self.prefix}*"):
            record = read_record(folder)
            if isinstance(record.get("uid"), int):
                self._uids[folder.name] = record["uid"]

    async def close(self) -> None:
        if self._tried is not None:
            self._tried.cancel()
            await asyncio.gather(self._tried, return_exceptions=True)
            self._tried = None
        await self._watch.close()
        self._memory.clear()
        await super().close()
        with contextlib.suppress(OSError):
            if self._homes != self._run_dir:
                self._homes.rmdir()
                _ELSEWHERE.rmdir()

    # ---- capabilities ----

    async def check(self, config: SandboxConfig) -> None:
        if config.image != "host":
            raise errors.Unsupported(f"the landlock runtime has no image {config.image!r}", hint='use image="host"')
        if config.network not in ("none", "host"):
            raise errors.Unsupported(f'the landlock runtime cannot give network "{config.network}"',
                                     hint='use "none" or "host"')
        for name in ("disk", "shm_size", "num_gpus", "accelerator_type"):
            if getattr(config, name) is not None:
                raise errors.Unsupported(f"the landlock runtime cannot hold {name}", hint=f"leave {name} unset")
        if config.use_kata_runtime or config.oci_runtime is not None or config.image_os != "linux":
            raise errors.Unsupported("the landlock runtime runs programs of this machine only, without an OCI runtime",
                                     hint="leave use_kata_runtime, oci_runtime and image_os unset")
        admission.refuse_nofile(config)
        admission.refuse_level(config, self.isolation)
        admission.refuse_too_large(config)
        await self.probe()

    async def probe(self) -> None:
        """Raise Unsupported when this host lacks a requirement. Tests it by creating a sandbox, once."""
        if self._tried is None:
            self._tried = asyncio.create_task(self._try_one(), name="landlock probe")
        await asyncio.shield(self._tried)

    async def _try_one(self) -> None:
        if os.geteuid() != 0:
            raise errors.Unsupported("isolation landlock: a user id of its own for each sandbox takes root",
                                     hint="run the server as root, of a container too")
        if (found := ruleset.version()) < _NEEDED:
            raise errors.Unsupported(
                f"isolation landlock: version {_NEEDED} is needed, this kernel has {found or 'none'}",
                hint="Linux 6.7 has it; it may be switched off: see lsm= of the kernel's command line")
        if not seccomp.supported():
            raise errors.Unsupported("isolation landlock: there is no system call filter for this processor",
                                     hint=OTHER_ISOLATION)
        secret = self._run_dir / f"probe-{secrets.token_hex(4)}"
        try:
            secret.write_text("to be out of reach")
            secret.chmod(0o644)
            handle = await self._make("probe", SandboxConfig(image="host", memory="64m", cpus=1, pids=64))
            try:
                os.close(await self.open_read(handle, str(secret)))
            except errors.PermissionDenied:
                return
            finally:
                await self.destroy(handle)
            raise errors.Unsupported("isolation landlock: the kernel did not enforce the rules in a test",
                                     hint=OTHER_ISOLATION)
        except (errors.StartFailed, OSError) as error:
            raise errors.Unsupported(f"isolation landlock: {error}", hint=OTHER_ISOLATION) from None
        finally:
            secret.unlink(missing_ok=True)

    # ---- create ----

    async def create(self, id: str, config: SandboxConfig) -> Handle:
        await self.check(config)
        return await self._make(id, config)

    async def _make(self, id: str, config: SandboxConfig) -> Handle:
        slot = f"{self.prefix}{secrets.token_hex(5)}"
        folder, home = self._run_dir / slot, self._homes / f"{slot}-home"
        uid = self._free_uid(slot)
        pid: int | None = None
        try:
            folder.mkdir(mode=0o700, parents=True)
            data: dict[str, Any] = {"slot": slot, "home": str(home), "env": dict(config.env), "id": id, "uid": uid,
                                    "network": config.network, "memory": config.memory_bytes}
            write_record(folder, data)
            self._make_home(home, uid)
            pid = self._start_parent(folder, home, uid, config)
            link = InitLink.connect(folder, id)
            self._links[slot] = link
            reply, _ = await link.request("hello", patience=config.startup_timeout)
            entry = process_tree.read(pid)
            if entry is None:
                raise errors.StartFailed(f"the supervisor process exited during its start: {_log_of(folder)}",
                                         sandbox_id=id, hint=START_LOG)
            data |= {"pid": pid, "start": entry.start, "init": int(reply["pid"])}
            enforced = dict(_ENFORCED)
            if config.nofile is not None:
                data["nofile"], enforced["nofile"] = config.nofile, "rlimit"
            write_record(folder, data)
            self._watch_memory(data)
            return Handle(self.name, id, self.isolation, enforced, data)
        except BaseException as error:
            last = _log_of(folder)
            await asyncio.shield(self._clean(slot, pid, None))
            if isinstance(error, OSError | errors.Lost | errors.Unavailable):
                raise errors.StartFailed(f"the landlock runtime failed to start the sandbox: {last or error}",
                                         sandbox_id=id, hint=START_LOG) from error
            raise

    def _make_home(self, home: Path, uid: int) -> None:
        if self._homes != self._run_dir:
            self._homes.mkdir(mode=0o711, parents=True, exist_ok=True)
            found = os.lstat(self._homes)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise OSError(errno.EPERM, f"{self._homes} must be a folder that root alone may write to")
        else:
            os.chmod(self._run_dir, 0o711)
        home.mkdir(mode=0o700)
        (home / "tmp").mkdir(mode=0o700)
        os.chown(home / "tmp", uid, uid)
        os.chown(home, uid, uid)

    def _start_parent(self, folder: Path, home: Path, uid: int, config: SandboxConfig) -> int:
        cpus = min(-int(-(config.limit_cpus or config.cpus) // 1), len(os.sched_getaffinity(0)))
        listener = bind_listener(folder)
        with listener, open(folder / "log", "ab") as log:
            options = json.dumps({
                "listen": listener.fileno(), "uid": os.geteuid(), "own_uid": uid, "home": str(home),
                "network": config.network, "processes": config.pids, "nofile": config.nofile or _FILES,
                "cpus": [next(self._cpus) for _ in range(cpus)], "readable": list(host.readable())})
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", parent.__file__, options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[listener.fileno()], start_new_session=True, cwd="/", env={"PATH": PATH})
        children[child.pid] = child
        return child.pid

    def _free_uid(self, slot: str) -> int:
        digest = hashlib.sha256(os.path.realpath(self._run_dir).encode()).digest()
        first, span = _FIRST_UID + int.from_bytes(digest[:4], "big") % _MOST * _SPAN, _SPAN
        if userns.IDS.end < first + span:  # a container in a user namespace: a quarter of its ids, from their end
            span = min(_SPAN, userns.IDS.size * userns.IDS.most // 4)
            first = userns.IDS.end - span
        used = set(self._uids.values())
        for _ in range(span):  # a different one each time: zombies still count for the last sandbox's user id
            self._last_uid = (self._last_uid + 1) % span
            if first + self._last_uid not in used:
                self._uids[slot] = first + self._last_uid
                return self._uids[slot]
        raise errors.NoCapacity(f"the landlock runtime has {span} sandboxes already", hint="stop some sandboxes")

    # ---- operations ----

    def complete(self, handle: Handle, program: Program) -> Program:
        home = handle.data["home"]
        if (most := handle.data.get("nofile")) is not None:
            program = replace(program, nofile=min(program.nofile or most, most))
        env = merged({"PATH": PATH, "HOME": home, "TMPDIR": f"{home}/tmp"}, handle.data["env"], program.env)
        return replace(program, env=env, cwd=program.cwd or home)

    async def dial(self, handle: Handle, port: int, *, host: str = "127.0.0.1", timeout: float = 10.0) -> int:
        if handle.data["network"] != "host":
            raise errors.Unsupported("a sandbox of the landlock runtime has no ports", sandbox_id=handle.id,
                                     hint='a network of its own takes namespaces; "host" would have ports')
        return await super().dial(handle, port, host=host, timeout=timeout)

    async def listen(self, handle: Handle, port: int) -> int:
        if handle.data["network"] != "host":
            raise errors.Unsupported("a sandbox of the landlock runtime has no ports", sandbox_id=handle.id,
                                     hint='a network of its own takes namespaces; "host" would have ports')
        return await super().listen(handle, port)

    async def usage(self, handle: Handle) -> Usage:
        self._watch_memory(dict(handle.data))
        return await asyncio.to_thread(limiter.usage, {}, handle.data["init"], self._kills.get(handle.data["slot"], 0))

    def oom_kills(self, handle: Handle) -> int:
        """The number of processes killed for memory so far."""
        return self._kills.get(handle.data["slot"], 0)

    def link(self, handle: Handle) -> InitLink:
        self._watch_memory(dict(handle.data))
        return super().link(handle)

    def _watch_memory(self, data: dict[str, Any]) -> None:
        self._memory[data["slot"]] = int(data["init"]), int(data["memory"])
        self._watch.start()

    def _watched(self) -> limiter.Watched:
        return {pid: (most, functools.partial(self._count_kill, slot)) for slot, (pid, most) in self._memory.items()}

    def _count_kill(self, slot: str) -> None:
        if slot in self._memory:
            self._kills[slot] = self._kills.get(slot, 0) + 1

    # ---- stop and destroy ----

    async def _clean(self, slot: str, pid: int | None, start: int | None) -> None:
        self._memory.pop(slot, None)
        await super()._clean(slot, pid, start)
        await asyncio.to_thread(remove.remove_tree, str(self._homes / f"{slot}-home"))
        self._uids.pop(slot, None)
        self._kills.pop(slot, None)


def _open_to_others(folder: Path) -> bool:
    """Whether other users can reach the content; the server sets the mode of the last folder itself."""
    return all(os.stat(path).st_mode & stat.S_IXOTH for path in Path(os.path.realpath(folder)).parents)


def _log_of(folder: Path) -> str:
    try:
        return (folder / "log").read_text(errors="replace").strip()[-300:]
    except OSError:
        return ""
