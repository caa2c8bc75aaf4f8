"""What runsc, or this host, cannot give a sandbox: told before anything is started."""

from __future__ import annotations

import os
import shutil

from rock import errors
from rock.protocol.sandbox import Isolation, SandboxConfig
from rock.runtime.namespace import admission
from rock.runtime.namespace.cgroups import Cgroups

LEAST_MEMORY, LEAST_PIDS = 96 << 20, 128  # its own kernel and file server, 30 MB and 80 threads, are counted too
_UNHELD = {
    "disk": "runsc holds no limit of what is written",
    "inodes": "runsc holds no limit of files",
    "num_gpus": "this version of runsc gives sandboxes no accelerators",
    "accelerator_type": "this version of runsc gives sandboxes no accelerators",
}


def refuse(config: SandboxConfig, groups: Cgroups) -> None:
    """Raise Unsupported, InvalidConfig or NoCapacity for what `create` could not give."""
    if config.image_os != "linux":
        raise errors.Unsupported(f"image_os {config.image_os!r}: the gvisor runtime runs Linux images only")
    if config.use_kata_runtime or config.oci_runtime not in (None, "runsc"):
        raise errors.Unsupported("the gvisor runtime runs sandboxes under runsc, and nothing else",
                                 hint='runtime="docker" knows other OCI runtimes')
    for name, why in _UNHELD.items():
        if getattr(config, name):
            raise errors.Unsupported(f"{name}: {why}", hint=f"leave {name} unset")
    if config.network != "none":
        raise errors.Unsupported(f'network "{config.network}": sandboxes of the gvisor runtime have loopback only',
                                 hint='network="none"; ports inside can be reached all the same')
    if config.memory_bytes < LEAST_MEMORY:
        raise errors.Unsupported(f"memory={config.memory}: gVisor's own kernel is counted, and needs its share",
                                 hint=f"ask for at least {LEAST_MEMORY >> 20}m")
    if config.pids < LEAST_PIDS:
        raise errors.Unsupported(f"pids={config.pids}: the threads of gVisor's own kernel are counted too",
                                 hint=f"ask for at least {LEAST_PIDS}")
    admission.refuse_nofile(config)
    admission.refuse_level(config, Isolation.GVISOR)
    admission.refuse_too_large(config)


def refuse_host(program: str, groups: Cgroups) -> None:
    """Raise Unsupported where this host lacks what every sandbox needs."""
    if os.geteuid() != 0:
        raise errors.Unsupported("isolation gvisor: mounting images takes root", hint="run the server as root")
    if shutil.which(program) is None:
        raise errors.Unsupported(f"isolation gvisor: there is no {program} on this machine",
                                 hint="apt install runsc; or, with a container engine that knows it, "
                                      'runtime="docker" and oci_runtime="runsc"')
    for controller in ("memory", "cpu", "pids"):
        if groups.version(controller) is None:
            raise errors.Unsupported(
                f"isolation gvisor: no cgroup of the controller {controller} can be made, and limits would not be held "
                f"({groups.reasons.get(controller, 'it is missing')})", hint="run with delegated cgroups")
