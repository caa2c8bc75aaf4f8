"""Limits beside memory, CPUs and processes: disk, files, shared memory, isolation by name; refused where not held."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rock import errors
from rock.host.resources import Gpus
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.docker import spec
from rock.runtime.docker.engine import Facts
from rock.runtime.fake import FakeRuntime
from rock.runtime.gvisor.runtime import GvisorRuntime
from rock.runtime.landlock.runtime import LandlockRuntime
from rock.runtime.namespace import admission
from rock.runtime.namespace.limits import cgroups
from rock.runtime.namespace.runtime import NamespaceRuntime
from rock.runtime.process.runtime import ProcessRuntime
from tests.runtime.boxes import ROOT, Box, HandMade, namespace_box, namespace_runtime, run

_FILL = """
import os
def full(make, most):
    n = 0
    try:
        while n < most: make(n); n += 1
    except OSError as error: return n, error.errno
    return n, 0
data = os.urandom(1 << 20)
with open('big', 'wb', buffering=0) as big:
    print(*full(lambda n: big.write(data) == 1 << 20 or big.write(data), 100))
os.unlink('big')
print(*full(lambda n: open('file%d' % n, 'w').close(), 5000))
"""


def _loops(folder: Path) -> list[str]:
    """Loop devices over files of a test."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if str(folder) in path.read_text():
                found.append(path.parts[3])
        except OSError:
            continue
    return found


def test_a_disk_with_a_limit(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path, disk="24m", inodes=600, memory="256m") as b:
            assert b.handle.enforced["disk"] in ("loop", "tmpfs")
            if ROOT and os.path.exists("/dev/loop-control") and os.path.exists("/sbin/mke2fs"):
                assert b.handle.enforced["disk"] == "loop"
            (size, first), (files, second) = [line.split() for line in (await b.python(_FILL)).splitlines()]
            assert first == second == "28"
            assert 8 <= int(size) <= 24
            assert 200 < int(files) <= 600
            with pytest.raises(errors.StorageFull):
                await b.runtime.open_write(b.handle, "/work/by-api")
            assert await b.sh("rm -f file*; head -c 1000000 /dev/urandom > kept; echo alive") == "alive\n"
            used = (await b.runtime.usage(b.handle)).disk_bytes
            assert used is not None and 1_000_000 <= used <= 24 << 20
            with pytest.raises(errors.Unsupported, match="disk with a limit"):
                async for _ in b.runtime.snapshot(b.handle, 1 << 20):
                    pass

    run(main())
    assert _loops(tmp_path) == []


def test_disks_that_cannot_be_given(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            kept = SandboxConfig(image="hand", memory="64m", cpus=1, disk="16m", auto_delete_seconds=60)
            with pytest.raises(errors.Unsupported, match="cannot be kept"):
                await runtime.check(kept)
            runtime._disks._reasons, runtime._disks.way = [], "tmpfs"
            with pytest.raises(errors.Unsupported, match="half of that, 64m"):
                await runtime.check(SandboxConfig(image="hand", memory="64m", cpus=1, disk="40m"))

    run(main())


def test_a_disk_in_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            runtime._disks._reasons, runtime._disks.way = [], "tmpfs"
            from tests.runtime.boxes import Box

            handle = await runtime.create("box", SandboxConfig(image="hand", memory="128m", cpus=1, disk="20m"))
            b = Box(runtime, handle, Path("/work"))
            assert handle.enforced["disk"] == "tmpfs"
            size, number = (await b.python(_FILL)).splitlines()[0].split()
            assert (number, int(size) <= 20) == ("28", True)
            b.close()
            await runtime.destroy(handle)

    run(main())


def test_what_was_written_without_a_limit_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path) as b:
            await b.sh("head -c 3000000 /dev/urandom > /work/a; mkdir -p /work/deep/er; cp /work/a /work/deep/er/b")
            used = (await b.runtime.usage(b.handle)).disk_bytes
            assert used is not None and 6_000_000 <= used < 7_000_000

    run(main())


def test_what_ends_is_not_slowed_down(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path, cpus=0.05) as b:
            if not b.handle.enforced["cpus"].startswith("cgroup"):
                pytest.skip(f"this host holds CPUs by {b.handle.enforced['cpus']}")
            folders = list(b.handle.data["cgroups"].values())
            files = [path for folder in folders for name in ("cpu.cfs_quota_us", "cpu.max")
                     if (path := Path(folder) / name).exists()]
            assert [path.read_text().split()[0] for path in files] == ["5000"]
            cgroups.lift_cpus(folders)  # as the launcher does when it has killed pid 1
            assert [path.read_text().split()[0] for path in files] in (["-1"], ["max"])

    run(main())


def test_open_files(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path, nofile=100) as b:
            assert b.handle.enforced["nofile"] == "rlimit"
            assert await b.sh("ulimit -Sn; ulimit -Hn") == "100\n100\n"
            assert await b.sh("ulimit -Hn", nofile=50) == "50\n"
            assert await b.sh("ulimit -Hn", nofile=500) == "100\n"
            assert "cannot" in await b.sh("ulimit -n 101 2>&1 || echo cannot")

    run(main())


def test_shared_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path, shm_size="3m", memory="64m") as b:
            assert b.handle.enforced["shm_size"] == "tmpfs"
            assert await b.sh("stat -f -c '%b %S' /dev/shm") == f"{(3 << 20) // 4096} 4096\n"
            out = await b.sh("head -c 9m /dev/zero > /dev/shm/x 2>/dev/null; stat -c %s /dev/shm/x")
            assert out == f"{3 << 20}\n"

    run(main())


@pytest.mark.skipif(ROOT, reason="root has a cgroup that counts it")
def test_files_in_memory_count_where_memory_is_watched(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_box(tmp_path, memory="64m") as b:
            if b.handle.enforced["memory"] != "watched":
                pytest.skip("this user has a memory cgroup")
            script = "import os, time\nfd = os.memfd_create('x')\nfor _ in range(300): os.write(fd, bytes(1 << 20))\n" \
                     "time.sleep(60)"
            process = await b.spawn("/usr/bin/python3", "-I", "-S", "-c", script)
            assert (await process.wait()).signal == 9
            assert await b.sh("echo alive") == "alive\n"

    run(main())


_NEVER: dict[str, Any] = {"num_gpus": 1, "accelerator_type": "x", "use_kata_runtime": True, "image_os": "windows",
                          "network": "nat", "minimum_isolation": "microvm", "isolation": "gvisor"}
_NO_LIMITS = {"disk": "1g", "inodes": 1000, "nofile": 100, "shm_size": "1m", "limit_cpus": 1.0, "oci_runtime": "runc"}
# By runtime the settings that it cannot hold, with a value that asks for something.
_REFUSED: dict[str, dict[str, Any]] = {
    "process": {**_NEVER, **_NO_LIMITS, "image": "other", "isolation": "namespaces"},
    "fake": {**_NEVER, **_NO_LIMITS, "isolation": "namespaces"},
    "landlock": {**_NEVER, "disk": "1g", "inodes": 1000, "shm_size": "1m", "image": "other", "nofile": 1 << 20,
                 "isolation": "userns", "oci_runtime": "runc"},
    "namespace": {**_NEVER, "nofile": 1 << 20, "oci_runtime": "runsc"},
    "gvisor": {**_NEVER, "disk": "1g", "inodes": 1000, "nofile": 1 << 20, "isolation": "namespaces",
               "oci_runtime": "runc", "pids": 100, "memory": "64m"},
    "docker": {**_NEVER, "disk": "1g", "inodes": 1000, "nofile": 1 << 20, "image": "host", "oci_runtime": "kata",
               "minimum_isolation": "gvisor"},
}
# By runtime the settings that it holds, each with a test of its own that it does.
_HELD: dict[str, set[str]] = {
    "process": set(), "fake": set(), "landlock": {"limit_cpus"}, "docker": {"limit_cpus", "shm_size"},
    "namespace": {"limit_cpus", "disk", "inodes", "shm_size"}, "gvisor": {"limit_cpus", "shm_size"},
}  # fmt: skip
# What the server sees to whatever the runtime is; Handle.enforced says of memory, cpus and pids how they are held.
_SERVERS = {
    "base_url", "api_key", "xrl_authorization", "extra_headers", "image", "runtime", "memory", "cpus", "pids",
    "auto_clear_seconds", "auto_archive_seconds", "auto_delete_seconds", "timeout", "on_timeout", "startup_timeout",
    "egress", "env", "labels", "user_id", "experiment_id", "namespace", "cluster", "route_key", "pull",
    "registry_username", "registry_password", "sandbox_id", "public_registries", "reconnect_timeout", "name",
    "snapshot", "snapshot_worker",  # refused by `Runtimes.of` for runtimes without the capability Forks
    "record",  # by the server, whatever the runtime is
    "auto_pause",  # refused by `Runtimes.of` for runtimes without the capability Pauses
    "volumes", "mounts", "agents",  # refused by `Runtimes.of` for runtimes without the capability Mounts
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_REFUSED))
def test_every_setting_is_held_refused_or_the_servers(kind: str) -> None:
    """A setting that is added has to be thought of for every runtime: none is dropped in silence."""
    thought_of = _HELD[kind] | set(_REFUSED[kind]) | _SERVERS
    assert set(SandboxConfig.model_fields) - thought_of == set()
    assert _HELD[kind] & set(_REFUSED[kind]) == set()


@asynccontextmanager
async def _checking(kind: str, folder: Path) -> AsyncIterator[tuple[Any, str]]:
    """A runtime, open, and an image that it has."""
    if kind == "namespace":
        async with namespace_runtime(folder) as runtime:
            yield runtime, "hand"
        return
    made: Any = {
        "process": lambda: ProcessRuntime(folder / "run"), "fake": FakeRuntime,
        "landlock": lambda: LandlockRuntime(folder / "run"),
        "gvisor": lambda: GvisorRuntime(folder / "run", folder / "guest", HandMade(folder / "image")),
    }[kind]()  # fmt: skip
    await made.open()
    try:
        yield made, "hand" if kind == "gvisor" else "host"
    finally:
        await made.close()


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in _REFUSED.items() for name in names])
def test_what_cannot_be_held_is_refused_before_the_start(tmp_path: Path, kind: str, name: str) -> None:
    """Never dropped in silence: a typed error, from the check and from the start, and nothing is left."""
    value = _REFUSED[kind][name]
    request = {"memory": "128m", "cpus": 1, name: value, **({"disk": "64m"} if name == "inodes" else {})}
    if kind == "namespace" and name == "network":
        pytest.skip("whether a host can give it is for the tests of networks")
    if name == "nofile" and value == 1 << 20:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard == resource.RLIM_INFINITY or hard >= 1 << 20:
            resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))  # of this process, for good

    async def main() -> None:
        async with _checking(kind, tmp_path) as (runtime, image):
            config = SandboxConfig(**{"image": image, **request})
            with pytest.raises(errors.Unsupported) as told:
                await runtime.check(config)
            assert told.value.hint or told.value.message
            with pytest.raises(errors.Unsupported):
                await runtime.create("refused", config)
        folder = tmp_path / "run"
        assert [path.name for path in folder.iterdir() if path.name[1:2] == "-"] == [] if folder.exists() else True

    if kind == "docker":  # with an engine: tests/runtime/docker
        facts = Facts(runtimes={"runc": {"path": "runc"}}, security=("seccomp",), driver="overlay2", backing="extfs")
        config = SandboxConfig(**{"image": "any", **request})
        with pytest.raises(errors.Unsupported):
            oci = spec.wanted_runtime(config)
            spec.runtime_name(facts, oci)
            spec.refuse(config, facts, oci, Gpus([]))
            admission.refuse_nofile(config)
        return
    run(main())


def test_a_level_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with namespace_runtime(tmp_path) as runtime:
            given = runtime.isolation
            await runtime.check(SandboxConfig(image="hand", memory="64m", cpus=1, isolation=given))
            other = Isolation.USERNS if given is Isolation.NAMESPACES else Isolation.NAMESPACES
            with pytest.raises(errors.Unsupported, match=f"gives {given.value}"):
                await runtime.check(SandboxConfig(image="hand", memory="64m", cpus=1, isolation=other))

    run(main())


@pytest.mark.parametrize("values, text", [
    ({"inodes": 1000}, "give disk too"), ({"disk": "1m"}, "at least 4m"), ({"shm_size": "1k"}, "at least 64k"),
    ({"shm_size": "600m", "memory": "1g"}, "over half"), ({"nofile": 3}, "16"), ({"disk": "much"}, "Invalid disk size"),
    ({"isolation": "none", "minimum_isolation": "userns"}, "weaker"), ({"isolation": "walls"}, "isolation"),
])
def test_settings_that_make_no_sense(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SandboxConfig(**values)  # type: ignore[arg-type]


def test_levels_are_ordered() -> None:
    order = ["none", "landlock", "userns-shared-proc", "userns", "namespaces", "container", "gvisor", "microvm"]
    assert [level.value for level in sorted(Isolation, key=lambda level: level.rank)] == order


_TAKES = {
    "a large file": "head -c 40000000 /dev/zero > /work/large",
    "a removed file that is open": "exec 9> /work/gone; rm /work/gone; head -c 40000000 /dev/zero >&9",
    "many small files": "mkdir m; i=0; while [ $i -lt 3000 ]; do echo $i > m/$i; i=$((i+1)); done",
    "behind a closed folder": "mkdir c; head -c 40000000 /dev/zero > c/x; chmod 000 c",
}


@pytest.mark.parametrize("what", list(_TAKES))
def test_who_fills_the_disk_is_ended(tmp_path: Path, what: str) -> None:
    """Without disk=: the files are measured. A neighbour that keeps to the limit goes on."""

    async def main() -> None:
        runtime = NamespaceRuntime(tmp_path / "run", 0, HandMade(tmp_path / "image"), disk_limit=8 << 20)
        try:
            await runtime.open()
        except errors.Unsupported as error:
            pytest.skip(f"no namespaces here: {error.message}")
        try:
            config = SandboxConfig(image="hand", memory="256m", cpus=1)
            full, modest = [Box(runtime, await runtime.create(name, config), Path("/work")) for name in ("f", "m")]
            assert full.handle.enforced["disk"] == "watched"
            await modest.sh("head -c 2000000 /dev/zero > fine")
            ended = asyncio.create_task(runtime.wait(full.handle))
            await full.spawn("sh", "-c", f"cd /work; {_TAKES[what]}; sleep 60")
            async with asyncio.timeout(30):
                assert await ended == "disk"
            assert await modest.sh("wc -c < fine") == "2000000\n"
            for box in (full, modest):
                box.close()
                await runtime.destroy(box.handle)
        finally:
            await runtime.close()

    run(main())
