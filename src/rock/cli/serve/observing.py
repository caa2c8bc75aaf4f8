"""Metrics and traces of the roles of a process, according to its settings."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable

from rock import __version__
from rock.admin.workers.client import WireWorker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import InvalidConfig, RockError, Unsupported
from rock.http.middleware import Exporter, Observability
from rock.protocol.node import WorkerInfo, WorkerState
from rock.rocklet.node import Node
from rock.settings import Settings
from rock.store.base import Store
from rock.telemetry.metrics import OTHER, Family, Labels, Number, gauge_of

log = logging.getLogger("rock.server")
_HOLDING = ("pending", "running", "stopping")  # states in which a sandbox has a slot, or waits for one
_PATIENCE = 5.0  # seconds for the metrics of a rocklet process
_MOST_TENANTS = 100  # in the labels of gauges: the tenants with the most sandboxes


def attributes_of(text: str) -> dict[str, str]:
    """Parse tags "name=value,name=value". InvalidConfig."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = part.partition("=")
        if not separator or not name.strip():
            raise InvalidConfig(f"ROCK_OTEL_ATTRIBUTES: {part!r} is no tag", hint="NAME=VALUE,NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def make_export(settings: Settings, role: str) -> Exporter | None:
    """The exporter of traces and metrics from the settings; None without an endpoint. InvalidConfig, Unsupported."""
    tags = attributes_of(settings.otel_attributes)
    if not settings.otel_endpoint:
        return None
    if not settings.otel_endpoint.startswith(("http://", "https://")):
        raise InvalidConfig(f"ROCK_OTEL_ENDPOINT={settings.otel_endpoint!r} is no URL", hint="http://HOST:4318")
    try:
        from rock.telemetry.otel import Export
    except ImportError:
        raise Unsupported(
            "traces and metrics cannot be exported without the packages of OpenTelemetry",
            hint="pip install 'rock-sandbox[otel]', or unset ROCK_OTEL_ENDPOINT and OTEL_EXPORTER_OTLP_ENDPOINT",
        ) from None
    return Export(settings.otel_endpoint, {"service.version": __version__, **tags}, f"rock-{role}")


def observe(settings: Settings, role: str, store: Store | None = None, node: Node | None = None) -> Observability:
    """Register the metrics of a process. store: its sandboxes by state; node: the resources of this machine."""

    async def extra() -> Iterable[Family[Number]]:
        told: list[Family[Number]] = []
        if store is not None:
            try:
                tally = await store.tally()
                told.append(_by_state(tally))
                told += _slots(tally, await store.workers.list())
            except RockError as error:
                log.warning("sandboxes could not be counted: %s", error)
        if node is not None:
            here: dict[Labels, float] = {(): float(node.count)}
            told.append(gauge_of("rock_worker_sandboxes", "Sandboxes that live on this machine", (), here))
            room: dict[Labels, float] = {(): float(node.limit)}
            told.append(gauge_of("rock_worker_sandbox_limit", "Most sandboxes on this machine", (), room))
        told.append(gauge_of("rock_info", "This server", ("version", "role"), {(__version__, role): 1.0}))
        return told

    return Observability(extra, make_export(settings, role), settings.otel_interval)


async def metrics_of(workers: WorkerRegistry, names: Iterable[str]) -> dict[str, bytes]:
    """The metrics of the rocklet processes with these names, as text. Those of a process that does not respond are
    absent."""

    async def ask(name: str) -> bytes | None:
        worker = workers.get(name)
        if not isinstance(worker, WireWorker):
            return None  # it has not joined yet
        try:
            async with asyncio.timeout(_PATIENCE):
                return await worker.metrics()
        except (RockError, TimeoutError) as error:
            log.warning("metrics of %s: %r", name, error)
            return None

    names = list(names)
    found = await asyncio.gather(*map(ask, names))
    return {name: text for name, text in zip(names, found, strict=True) if text is not None}


def _slots(tally: dict[tuple[str, str], int], workers: Iterable[WorkerInfo]) -> list[Family[Number]]:
    """The signals of an autoscaler: demand and supply of sandboxes, on workers that joined."""
    wanted = sum(count for (_, state), count in tally.items() if state in _HOLDING)
    slots = sum(one.status.sandbox_limit for one in workers if one.state is WorkerState.READY and one.status)
    return [
        gauge_of("rock_slots_wanted", "Sandboxes that run, start or wait for a worker", (), {(): float(wanted)}),
        gauge_of("rock_slots", "Sandboxes that the ready workers can have", (), {(): float(slots)}),
    ]


def _by_state(tally: dict[tuple[str, str], int]) -> Family[Number]:
    sizes: Counter[str] = Counter()
    for (tenant, _), count in tally.items():
        sizes[tenant] += count
    named = {tenant for tenant, _ in sizes.most_common(_MOST_TENANTS)}
    values: Counter[Labels] = Counter()
    for (tenant, state), count in tally.items():
        values[tenant if tenant in named else OTHER, state] += count
    told = {labels: float(count) for labels, count in values.items()}
    return gauge_of("rock_sandboxes", "Sandboxes that are remembered", ("tenant", "state"), told)
