"""Runs inside a PodBox: the namespace runtime with the rights of a pod, and attempts at what a sandbox must not do."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from rock.errors import RockError
from rock.images.store import ImageStore
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.base import Handle, Program
from rock.runtime.namespace.runtime import NamespaceRuntime

# each prints nothing that matters; the exit status is 0 where the attempt succeeded
ATTEMPTS = {
    "mount": "mount -t tmpfs none /mnt",
    "see the rocklet": "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep in_[p]od",
    "write /proc/sys": "echo 1 > /proc/sys/kernel/panic",
    "write the host name of the pod": "echo x > /proc/sys/kernel/hostname",
    "load a module": "modprobe dummy",
    "make a device": "mknod /tmp/device b 8 0",
    "read the rocklet's home": "ls $OUTER_HOME/run",
    "a user namespace": "unshare -U true",
    "reboot": "reboot -f",
    "raise a limit": "ulimit -n 10000000",
}


async def output_of(runtime: NamespaceRuntime, handle: Handle, script: str) -> tuple[str, int | None]:
    process = await runtime.spawn(handle, Program(argv=["/bin/bash", "-c", script]))
    assert process.stdout is not None
    parts = []
    while True:
        try:
            part = os.read(process.stdout, 65536)
        except BlockingIOError:
            await asyncio.sleep(0.01)
            continue
        if not part:
            break
        parts.append(part)
    status = await process.wait()
    process.close()
    return b"".join(parts).decode(), status.code


async def main(home: Path) -> dict[str, Any]:
    store = ImageStore(home / "images")
    store.from_host("host:1")
    runtime = NamespaceRuntime(home / "run", 0, store)
    try:
        await runtime.open()
    except RockError as error:
        return {"error": type(error).__name__, "message": error.message}
    found: dict[str, Any] = {"isolation": runtime.isolation.value, "most": runtime.most_sandboxes}
    config = SandboxConfig(image="host:1", memory="256m")
    handle, other = await runtime.create("a", config), await runtime.create("b", config)
    found["map"] = (await output_of(runtime, handle, "cat /proc/self/uid_map"))[0].split()
    found["other_map"] = (await output_of(runtime, other, "cat /proc/self/uid_map"))[0].split()
    found["chown"] = (await output_of(runtime, handle, "touch /tmp/x; chown 33 /tmp/x && chown 65534 /tmp/x"))[1]
    found["written"] = (await output_of(runtime, handle, "echo data > /root-file; cat /root-file"))[0]
    found["unseen"] = (await output_of(runtime, other, "cat /root-file"))[1]
    found["processes"] = (await output_of(runtime, handle, "ls -d /proc/[0-9]* | wc -l"))[0].strip()
    outer = f"OUTER_HOME={home}; "
    found["attempts"] = {name: (await output_of(runtime, handle, outer + script))[1]
                         for name, script in ATTEMPTS.items()}  # fmt: skip
    if runtime.most_sandboxes is not None:
        made, refusal = [], ""
        try:
            for number in range(runtime.most_sandboxes + 1):
                made.append(await runtime.create(f"many-{number}", config))
        except RockError as error:
            refusal = type(error).__name__
        found["many"], found["refusal"] = len(made) + 2, refusal
        for one in made:
            await runtime.destroy(one)
    for one in (handle, other):
        await runtime.destroy(one)
    await runtime.close()
    found["left"] = [name for name in os.listdir(home / "run") if name.startswith("n-")]
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
