"""Persisted sandbox state: the state directory, from which a restarted rocklet recovers its sandboxes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rock.host import atomic_file
from rock.protocol.sandbox import Isolation, SandboxConfig, kept
from rock.rocklet.commands.shell_process import Shell
from rock.rocklet.durability.spool import SpoolFolder
from rock.runtime.base import Handle

_FREE_SPOOLS = 16


class StateDirectory:
    """The state directory of a rocklet, and knowledge that sandboxes of one image share.

        folder/records/ID   config, handle, sessions and processes of a sandbox
        folder/logs/ID/     one folder per background process
        folder/spools/N/    spool files; the record of a sandbox names its folder
        shells              path of the shell of the last sandbox, by runtime, image and requested shell
    """

    def __init__(self, folder: Path) -> None:
        self._records = folder / "records"
        self._logs = folder / "logs"
        self._spools = folder / "spools"
        self.damaged = folder.parent / "damaged"
        self._free: list[SpoolFolder] = []  # empty folders for the next sandboxes
        self.shells: dict[tuple[str, str, str | None], Shell] = {}

    def make(self) -> None:
        for folder in (self._records, self._logs, self._spools):
            folder.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(self._records):
            if name.startswith(".new-"):  # a crash came between the write and the rename
                with contextlib.suppress(OSError):
                    os.unlink(self._records / name)

    def record(self, sandbox_id: str) -> str:
        return f"{self._records}/{sandbox_id}"

    def logs(self, sandbox_id: str) -> Path:
        return self._logs / sandbox_id

    def ids(self) -> list[str]:
        """The ids of all sandboxes that have a record."""
        return sorted(name for name in os.listdir(self._records) if not name.startswith("."))

    def load(self, sandbox_id: str) -> tuple[SandboxConfig, Handle, dict[str, Any]]:
        """Read a record. atomic_file.Damaged. OSError. Any other exception: a record of a newer version."""
        with open(self.record(sandbox_id), "rb", buffering=0) as file:
            record = atomic_file.parsed(file.readall())
        handle = record["handle"]
        handle["isolation"] = Isolation(handle["isolation"])
        return SandboxConfig.model_validate(record["config"]), Handle(**handle), record

    def rest(self, config: SandboxConfig, handle: Handle) -> None:
        """Write the record of a sandbox that is stopped, or is being stopped or started, and whose files are
        retained."""
        atomic_file.replace(self.record(handle.id), written(config, handle, stopped=True))

    # ---- spool folders ----

    def spools(self, name: str | None = None) -> SpoolFolder:
        """The spool folder of a sandbox of an earlier rocklet process, or an empty one for a new sandbox."""
        if name is None and self._free:
            return self._free.pop()
        return SpoolFolder(self._spools / os.path.basename(name or os.urandom(6).hex()), self.damaged)

    def give_back(self, spools: SpoolFolder) -> None:
        """Return the folder of a sandbox that has no record any more."""
        if len(self._free) < _FREE_SPOOLS and spools.clear():
            self._free.append(spools)
        else:
            spools.remove()

    def sweep_logs(self) -> None:
        """Remove the output of processes of sandboxes that have no record."""
        known = set(self.ids())
        for name in os.listdir(self._logs):
            if name not in known:
                shutil.rmtree(self._logs / name, ignore_errors=True)

    def unused(self, used: set[str]) -> list[str]:
        """The folders of earlier rocklet processes, except those in `used`."""
        return [name for name in os.listdir(self._spools) if name not in used]

    def sweep(self, names: Sequence[str]) -> None:
        """Remove the files of sandboxes that no longer exist."""
        for name in names:
            shutil.rmtree(self._spools / name, ignore_errors=True)

    def close(self) -> None:
        for spools in self._free:
            spools.remove()
        self._free.clear()

    # ---- removal ----

    def remove(self, sandbox_id: str) -> None:
        self.remove_logs(sandbox_id)  # first: as long as the record exists, the next start repeats the removal
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.record(sandbox_id))

    def set_aside(self, sandbox_id: str) -> None:
        """Move a damaged record to the folder for inspection. OSError."""
        self.damaged.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.record(sandbox_id), self.damaged / f"record-{sandbox_id}")

    def remove_logs(self, sandbox_id: str) -> None:
        shutil.rmtree(self.logs(sandbox_id), ignore_errors=True)


def written(config: SandboxConfig, handle: Handle, **more: Any) -> str:
    """The text of a record."""
    rest = {
        "handle": {"runtime": handle.runtime, "id": handle.id, "isolation": handle.isolation.value,
                   "enforced": dict(handle.enforced), "data": handle.data},
        **more,
    }  # fmt: skip
    return atomic_file.summed(f'{{"config": {kept(config)}, {json.dumps(rest)[1:]}')
