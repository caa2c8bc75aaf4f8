"""Container specification as plain data (limits, capabilities, network, mounts), and admission checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rock import errors
from rock.host.resources import Gpus
from rock.protocol.sandbox import Isolation, SandboxConfig, parse_size
from rock.runtime.base import Enforced
from rock.runtime.docker.engine import Facts
from rock.runtime.init.python import INSIDE, LINK, GuestPython
from rock.runtime.refusals import LINUX_ONLY

Oci = Literal["runc", "runsc", "kata"]
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "NET_BIND_SERVICE",
                "SYS_CHROOT")  # fmt: skip
HOME_LABEL, ID_LABEL = "rock.home", "rock.sandbox"
_ISOLATION: Mapping[Oci, Isolation] = {
    "runc": Isolation.CONTAINER, "runsc": Isolation.GVISOR, "kata": Isolation.MICROVM,
}  # fmt: skip
GPU_RUNTIME = "nvidia"
_KINDS: tuple[Oci, ...] = ("runsc", "kata", "runc")
_NETWORKS = {"none": "none", "bridge": "bridge", "host": "host"}
_QUOTA_DRIVERS = ("btrfs", "zfs", "devicemapper")
_MOST_SHARED = 2 << 30
_UNSET = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "LD_DEBUG", "GLIBC_TUNABLES")


def wanted_runtime(config: SandboxConfig) -> Oci:
    """The requested kind of OCI runtime. InvalidConfig when two are requested."""
    if config.use_kata_runtime and config.oci_runtime not in (None, "kata"):
        raise errors.InvalidConfig(f'use_kata_runtime and oci_runtime="{config.oci_runtime}" exclude each other',
                                   hint='leave one out, or set oci_runtime="kata"')
    return "kata" if config.use_kata_runtime else config.oci_runtime or "runc"


def kind_of(name: str, entry: Mapping[str, Any]) -> Oci | None:
    """The kind of an engine's runtime, by its program or type, else by its name."""
    program = str(entry.get("path") or entry.get("runtimeType") or name).rsplit("/", 1)[-1]
    for text in (program, name):
        for kind in _KINDS:
            if kind in text or (kind == "runc" and text in ("crun", "youki")):
                return kind
    return None


def runtime_name(facts: Facts, oci: Oci) -> str:
    """The engine's name for a runtime of that kind. Unsupported, with the list of available ones."""
    names = [name for name, entry in facts.runtimes.items() if kind_of(name, entry) == oci and "runtime.v1" not in name]
    if facts.default_runtime in names:
        return facts.default_runtime
    if oci in names:
        return oci
    if names:
        return sorted(names)[0]
    there = ", ".join(sorted(facts.runtimes)) or "none"
    raise errors.Unsupported(f"this container engine has no {oci} (its runtimes: {there})",
                             hint=f"install {oci} and name it under `runtimes` in the engine's daemon.json")


def isolation_of(oci: Oci) -> Isolation:
    return _ISOLATION[oci]


def enforced(facts: Facts, config: SandboxConfig) -> dict[str, Enforced]:
    """How the engine enforces limits."""
    by: Enforced = "cgroup-v2" if facts.cgroups == 2 else "cgroup-v1"
    found: dict[str, Enforced] = {"memory": by, "cpus": by, "pids": by}
    if config.nofile is not None:
        found["nofile"] = "rlimit"
    if config.shm_size is not None:
        found["shm_size"] = "tmpfs"
    return found


def _refuse_gpus(config: SandboxConfig, facts: Facts, oci: Oci, gpus: Gpus) -> None:
    if not config.num_gpus and not config.accelerator_type:
        return
    if oci != "runc":
        raise errors.Unsupported(f"{oci} gives sandboxes no accelerators", hint="leave gpus unset, or oci_runtime")
    if GPU_RUNTIME not in facts.runtimes:
        there = ", ".join(sorted(facts.runtimes)) or "none"
        raise errors.Unsupported(
            f"this container engine gives no accelerators: it has no {GPU_RUNTIME} runtime (its runtimes: {there})",
            hint="install nvidia-container-toolkit, or leave gpus unset")
    gpus.refuse(config)


def refuse(config: SandboxConfig, facts: Facts, oci: Oci, gpus: Gpus) -> None:
    """Raise Unsupported for options that this engine cannot provide."""
    if config.image_os != "linux":
        raise errors.Unsupported(f"image_os {config.image_os!r}: the docker runtime runs Linux images only",
                                 hint=LINUX_ONLY)
    _refuse_gpus(config, facts, oci, gpus)
    if config.image == "host":
        raise errors.Unsupported('image "host" is this machine\'s own system, which no container engine has',
                                 hint="name an image that the engine has or can pull, or use the namespace runtime")
    if config.network not in _NETWORKS:
        raise errors.Unsupported(f'network "{config.network}": a container engine does not keep sandboxes from private '
                                 "addresses and from the services of its machine",
                                 hint='network="bridge" is the engine\'s own, without that promise')
    if "seccomp" not in facts.security:
        raise errors.Unsupported("this container engine filters no system calls (seccomp is off)",
                                 hint="run an engine with its default seccomp profile")
    for word, there in (("memory", facts.memory), ("cpus", facts.cpus), ("pids", facts.pids)):
        if not there:
            raise errors.Unsupported(f"this container engine cannot hold {word}",
                                     hint="it needs that cgroup controller; a rootless engine needs it delegated")
    if config.disk is not None and not _has_quota(facts):
        raise errors.Unsupported(
            f"disk={config.disk}: the engine's storage ({facts.driver} on {facts.backing or 'an unknown file system'}) "
            "holds no disk limit", hint="overlay2 on xfs with pquota, btrfs or zfs can; else leave disk unset")
    if config.inodes is not None:
        raise errors.Unsupported("inodes: the engine's storage holds no limit of files", hint="leave inodes unset")
    if config.isolation not in (None, _ISOLATION[oci]):
        raise errors.Unsupported(f"isolation {config.isolation}: {oci} gives {_ISOLATION[oci].value}",
                                 hint='"container" is runc, "gvisor" is oci_runtime="runsc", "microvm" is "kata"')
    if config.minimum_isolation.rank > _ISOLATION[oci].rank:
        raise errors.Unsupported(
            f"minimum_isolation {config.minimum_isolation.value}: {oci} gives {_ISOLATION[oci].value}",
            hint='oci_runtime="runsc" or "kata" give more')


def _has_quota(facts: Facts) -> bool:
    return facts.driver in _QUOTA_DRIVERS or (facts.driver == "overlay2" and facts.backing == "xfs")


def container(config: SandboxConfig, image: str, labels: Mapping[str, str], python: GuestPython, link: str | None,
              runtime: str, options: dict[str, object], gpus: Sequence[str] = ()) -> dict[str, Any]:
    """The request body for POST /containers/create. link: the folder of its socket, if any. gpus: UUIDs of its GPUs."""
    command = python.command(options)
    hard = config.limit_cpus or config.cpus
    mounts = [_shown(str(python.folder), INSIDE)]
    if link is not None:
        mounts.append(_shown(link, LINK))
    host: dict[str, Any] = {
        "Runtime": runtime, "Mounts": mounts, "NetworkMode": _NETWORKS[config.network], "Privileged": False,
        "CapDrop": ["ALL"], "CapAdd": list(CAPABILITIES), "SecurityOpt": ["no-new-privileges"],
        "Memory": config.memory_bytes, "MemorySwap": config.memory_bytes, "NanoCpus": round(hard * 1e9),
        "CpuShares": max(2, min(round(config.cpus * 1024), 262144)), "PidsLimit": config.pids,
        "ShmSize": config.shm_bytes or min(_MOST_SHARED, max(1 << 20, config.memory_bytes // 4)), "IpcMode": "private",
        "CgroupnsMode": "private", "LogConfig": {"Type": "none", "Config": {}}, "RestartPolicy": {"Name": "no"},
        "AutoRemove": False, "Init": False, "OomKillDisable": False,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
    }  # fmt: skip
    if config.disk is not None:
        host["StorageOpt"] = {"size": str(parse_size(config.disk, "disk"))}
    if gpus:
        host["DeviceRequests"] = [{"Driver": "nvidia", "DeviceIDs": list(gpus), "Capabilities": [["gpu"]]}]
    carried = link is None
    return {
        "Image": image, "Entrypoint": command[:1], "Cmd": command[1:], "User": "0:0", "Tty": False,
        # Variables of the image's environment that would mislead our loader are cleared; programs get the full
        # environment.
        "Env": [f"{name}=" for name in _UNSET], "Labels": dict(labels),
        "Healthcheck": {"Test": ["NONE"]}, "OpenStdin": carried, "StdinOnce": False, "AttachStdin": carried,
        "AttachStdout": carried, "AttachStderr": False,
        **({} if config.network == "host" else {"Hostname": "sandbox"}), "HostConfig": host,
    }  # fmt: skip


def _shown(source: str, target: str) -> dict[str, Any]:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True,
            "BindOptions": {"Propagation": "rprivate"}}


def image_settings(image: Mapping[str, Any]) -> tuple[dict[str, str], str, str]:
    """Environment, working directory and user of an image; each may be missing or malformed."""
    found = image.get("Config") or {}
    pairs = (str(entry).partition("=") for entry in found.get("Env") or ())
    env = {name: value for name, equals, value in pairs if name and equals and "\0" not in name + value}
    cwd = str(found.get("WorkingDir") or "/")
    return env, cwd if cwd.startswith("/") else "/" + cwd, str(found.get("User") or "")


# ---- findings of `rock doctor` about the container engine, which only runtime "docker" needs ----
