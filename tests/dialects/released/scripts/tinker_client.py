"""The sandbox interface of the Tinker cookbook."""

from __future__ import annotations

import asyncio

from checks import check, raises
from tinker_cookbook.sandbox.sandbox_interface import SandboxInterface, SandboxResource, SandboxTerminatedError

from rock.errors import InvalidConfig
from rock.integrations.tinker_cookbook import RockSandbox


async def main() -> None:
    box = await RockSandbox.create("host", memory="512m")
    with check("it implements SandboxInterface"):
        assert isinstance(box, SandboxInterface) and box.sandbox_id
    with check("commands"):
        done = await box.run_command("echo out; echo err >&2; pwd; exit 3", workdir="/tmp")
        assert (done.stdout, done.stderr, done.exit_code) == ("out\n/tmp\n", "err\n", 3)
        assert done.metrics["duration"] > 0
    with check("a timeout, a directory that does not exist, and a limit of the output"):
        done = await box.run_command("echo begun; sleep 4321", timeout=1)
        assert done.exit_code == 124 and done.stdout == "begun\n"
        assert (await box.run_command("true", workdir="/no/such/folder")).exit_code != 0
        done = await box.run_command("head -c 5000 /dev/zero | tr '\\0' a", max_output_bytes=100)
        assert len(done.stdout) < 300 and done.metrics["stdout_dropped"] == 4900
    with check("files"):
        assert (await box.write_file("/data/new/run.sh", "#!/bin/sh\necho ran", executable=True)).exit_code == 0
        assert (await box.run_command("/data/new/run.sh")).stdout == "ran\n"
        assert (await box.read_file("/data/new/run.sh", max_bytes=9)).stdout == "#!/bin/sh"
        await box.write_file("relative.txt", b"\xff")
        assert (await box.read_file("relative.txt")).stdout == "\ufffd"
        missing = await box.read_file("/no/such")
        assert missing.exit_code == 1 and "no/such" in missing.stderr
        assert (await box.write_file("/etc/hostname/x", "")).exit_code == 1
    with check("heartbeat, cleanup, and a sandbox that ended"):
        resource = SandboxResource(box)
        await resource.send_heartbeat()
        await resource.cleanup()
        await resource.cleanup()
        for call in (box.run_command("true"), box.read_file("/etc/hostname"), box.write_file("/tmp/x", ""),
                     box.send_heartbeat()):  # fmt: skip
            with raises(SandboxTerminatedError):
                await call
    with check("an unknown option is rejected by its name"), raises(InvalidConfig, "template"):
        await RockSandbox.create("host", template="x")


asyncio.run(main())
