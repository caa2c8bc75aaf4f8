"""The live configuration of a worker: received from the admin, stored for the next start, applied to its parts."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from pydantic import ValidationError

from rock.errors import RockError
from rock.host import atomic_file
from rock.images.registry import rules
from rock.protocol.configuration import Configuration, NodeConfiguration
from rock.rocklet.runtimes import Runtimes
from rock.runtime.pools import Resizes
from rock.telemetry import set_log_level

log = logging.getLogger("rock.node")


class WorkerConfiguration:
    """The configuration that this worker applies. file: stores it. own_logs: the process has its log level to itself;
    otherwise a server of the same process sets it."""

    def __init__(self, file: Path, runtimes: Runtimes, own_logs: bool) -> None:
        self._file = file
        self._runtimes = runtimes
        self._own_logs = own_logs
        self._current: NodeConfiguration | None = None

    def open(self) -> None:
        """Apply the stored configuration, if there is one. A damaged file is removed: the admin sends it again."""
        try:
            self._apply(NodeConfiguration.model_validate_json(self._file.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, ValidationError, ValueError) as error:
            log.warning("the stored configuration is not used: %s", error)
            self._file.unlink(missing_ok=True)

    def close(self) -> None:
        """Return to the settings of the process."""
        if self._current is not None:
            self._current = None
            self._spread(Configuration())

    async def configure(self, spec: NodeConfiguration) -> NodeConfiguration:
        """Apply a version; one that is older than the applied one changes nothing. Returns the applied one."""
        if self._current is not None and self._current.at > spec.at:
            return self._current
        try:
            await asyncio.to_thread(atomic_file.replace, self._file, spec.model_dump_json())
        except OSError as error:
            log.warning("the configuration is applied, and not stored for the next start: %s", error)
        self._apply(spec)
        return spec

    def _apply(self, spec: NodeConfiguration) -> None:
        self._current = spec
        self._spread(spec.configuration)
        log.info("configuration: version %d", spec.version)

    def _spread(self, configuration: Configuration) -> None:
        images = configuration.images
        rules.set_rules(images.mirrors, images.insecure_registries, images.private_registries)
        for name in self._runtimes.names():
            runtime = self._runtimes[name]
            if isinstance(runtime, Resizes):
                try:
                    runtime.resize_pool(configuration.pools.size)
                except RockError as error:
                    log.warning("the warm pool of runtime %s keeps its size: %s", name, error)
        if self._own_logs:
            set_log_level(configuration.log.level)
