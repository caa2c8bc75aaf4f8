"""Composition of the control plane: store, scheduler, workers, service, reconciler, API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from rock.admin.api.agentscope import Training
from rock.admin.api.bare import About, Heartbeats, LazyApp, guarded
from rock.admin.api.rock_v1 import RockV1
from rock.admin.api.sandboxes import Sandboxes
from rock.admin.audit import Audit
from rock.admin.configuration import LiveConfiguration, source_of
from rock.admin.environments import Environments
from rock.admin.reconciler import Reconciler
from rock.admin.sandboxes.service import Service
from rock.admin.tags import MetricTags
from rock.admin.tenants import Keys, TenantServices
from rock.admin.workers.leader import Leader
from rock.admin.workers.registry import WorkerRegistry
from rock.envhub.catalogue import Catalogue
from rock.errors import InvalidConfig, Unavailable, Unsupported
from rock.http.asgi import App, Scope
from rock.http.tunnels import Tunnels
from rock.kubernetes.access import Access, from_kubeconfig, in_cluster
from rock.kubernetes.client import Api
from rock.kubernetes.kinds import kind_of
from rock.kubernetes.pods import PodReservations, PodSettings
from rock.kubernetes.templates import read_templates
from rock.protocol.configuration import Configuration
from rock.protocol.keys import POD_PREFIX
from rock.protocol.node import JoinWorker
from rock.protocol.sandbox import parse_size
from rock.scheduler.local import LocalScheduler
from rock.scheduler.raylink import RayReservations
from rock.settings import Settings
from rock.store.base import Store
from rock.store.blobs import Blobs, FolderBlobs


def make_blobs(settings: Settings) -> Blobs | None:
    """The archive from the settings; None when it is off. InvalidConfig."""
    if settings.archive == "off":
        return None
    if settings.archive.startswith("s3://"):
        from rock.store.s3 import Bucket, S3Blobs  # imports an HTTP client and XML, which a folder does not need

        s = settings
        return S3Blobs(Bucket.parse(s.archive, s.s3_endpoint, s.s3_region, s.s3_key, s.s3_secret))
    return FolderBlobs(settings.archive_dir)


def _limit(text: str) -> int:
    try:
        return parse_size(text, "archive")
    except ValueError as error:
        raise InvalidConfig(f"ROCK_ARCHIVE_LIMIT has an invalid size: {error}",
                            hint="set a size, as in ROCK_ARCHIVE_LIMIT=10g") from None


def _ttl(seconds: float) -> float:
    if not 1.0 <= seconds <= 10 * 365 * 86400.0:
        raise InvalidConfig(f"ROCK_SNAPSHOT_TTL={seconds:g} is not from one second to ten years", hint="3600 is usual")
    return seconds


def make_reservations(settings: Settings, workers: WorkerRegistry) -> RayReservations | PodReservations | None:
    """The external scheduler that decides on placement, if one is configured. InvalidConfig."""
    if settings.scheduler in ("", "local"):
        return None
    if settings.scheduler == "kubernetes":
        return pods_of(settings, workers)
    if settings.scheduler != "ray":
        raise InvalidConfig(f"ROCK_SCHEDULER={settings.scheduler} is not a known scheduler",
                            hint="set ROCK_SCHEDULER to local, ray or kubernetes")
    key = settings.worker_key or settings.api_key
    if key is None:
        raise InvalidConfig("ROCK_SCHEDULER=ray: its rocklets join with a key", hint="set ROCK_API_KEY")
    if not settings.advertise:
        raise InvalidConfig("ROCK_SCHEDULER=ray: where its rocklets reach this server is not known",
                            hint="ROCK_ADVERTISE=http://HOST:PORT")  # fmt: skip
    return RayReservations({
        "address": settings.ray_address, "namespace": "rock", "join": settings.advertise, "token": key,
        "runtime": settings.runtime, "home": settings.ray_home,
    })  # fmt: skip


def pods_of(settings: Settings, workers: WorkerRegistry) -> PodReservations:
    """One pod for each sandbox. InvalidConfig, Unsupported."""
    if not settings.worker_key:
        raise InvalidConfig("ROCK_SCHEDULER=kubernetes: the keys of pods are derived from ROCK_WORKER_KEY",
                            hint="set ROCK_WORKER_KEY")  # fmt: skip
    if not settings.advertise:
        raise InvalidConfig("ROCK_SCHEDULER=kubernetes: where pods reach this server is not known",
                            hint="ROCK_ADVERTISE=http://HOST:PORT")  # fmt: skip
    if not settings.kubernetes_templates:
        raise InvalidConfig("ROCK_SCHEDULER=kubernetes: there are no pod templates",
                            hint="set ROCK_KUBERNETES_TEMPLATES to a file; docs/guides/kubernetes.md has one")
    access = access_of(settings)
    made = PodSettings(settings.kubernetes_namespace or access.namespace or "rock", settings.advertise,
                       settings.worker_key, settings.kubernetes_instance, settings.kubernetes_unschedulable,
                       settings.kubernetes_resync, kind_of(settings.kubernetes_kind))  # fmt: skip
    pods = PodReservations(Api(access, settings.kubernetes_qps),
                           read_templates(Path(settings.kubernetes_templates).expanduser()), made,
                           lambda name: workers.is_ready(name) and not workers.is_silent(name))  # fmt: skip
    workers.on_ready.append(pods.changed)
    return pods


def access_of(settings: Settings) -> Access:
    """How this process reaches the API server of the cluster. InvalidConfig."""
    if settings.kubernetes_config:
        return from_kubeconfig(Path(settings.kubernetes_config).expanduser())
    found = in_cluster(host=settings.kubernetes_host, port=settings.kubernetes_port)
    if found is None:
        raise InvalidConfig("ROCK_SCHEDULER=kubernetes: this process is in no pod with a service account",
                            hint="set ROCK_KUBERNETES_CONFIG to a kubeconfig, or mount the token of the pod")
    return found


def _join_check(pods: PodReservations | None) -> Callable[[JoinWorker], Awaitable[None]]:
    """Sandbox pods join by the address that the cluster reports, and only at servers that follow the cluster."""

    async def check(spec: JoinWorker) -> None:
        if spec.name.startswith(POD_PREFIX):
            if pods is None:
                raise Unavailable("this server does not follow the cluster", hint="join the writers only")
            await pods.check_join(spec.name, urlsplit(spec.url).hostname or "")

    return check


class Admin:
    """The control plane of one process. `app` serves once `open` has returned.

    data: the data plane, for the ROCK dialect, which serves both planes at one address. leads: whether it may become
    the leader that reconciles; a reader never is.
    """

    def __init__(
        self, settings: Settings, store: Store, workers: WorkerRegistry, roles: list[str], data: App,
        tunnels: Tunnels, leads: bool = True,
    ) -> None:
        self.opened: Callable[[], Awaitable[None]] | None = None  # called when the store is open
        self._blobs = make_blobs(settings)
        limit = _limit(settings.archive_limit)
        follows = leads or settings.scheduler != "kubernetes"  # a reader needs no access to the cluster
        self._reservations = make_reservations(settings, workers) if follows else None
        self._follows_elsewhere = not follows
        if settings.scheduler == "kubernetes":
            found = self._reservations
            workers.check_join = _join_check(found if isinstance(found, PodReservations) else None)
        self.service = Service(store, LocalScheduler(), workers, self._blobs, limit, self._reservations,
                               _ttl(settings.snapshot_ttl), settings.capacity_wait)
        self.workers = workers
        self.leader = Leader(store, lambda: Reconciler(self.service)) if leads else None
        self.catalogue = Catalogue(settings.catalogue)
        environments = Environments(self.service, self.catalogue)
        self.configuration = LiveConfiguration(store, workers, source_of(settings.live_config, settings.home), leads)
        self._tags = MetricTags()
        self.service.records.on_step.append(self._tags.step)
        self.configuration.on_change.append(self._apply)
        self.configuration.checks.append(self._check_templates)
        self.keys = Keys(store, bool(settings.api_key), lambda: self.configuration.current.quotas)
        self.configuration.on_change.append(lambda _: self.keys.reread())
        self.service.pools.budget = lambda: self.configuration.current.pools.budget
        tenant_services = TenantServices(self.service, self.keys, self.configuration)

        def pages() -> App:
            from rock.admin.api import native  # imports FastAPI, a third of a start

            return native.build(tenant_services, self.keys, self.service, environments, guarded=bool(settings.api_key))

        rest = RockV1(tenant_services, data, self.catalogue, settings.dialect_network).over(guarded(LazyApp(pages)))
        self.tenant_services = tenant_services
        # The busiest routes are matched first.
        about, heartbeats = About(tenant_services, workers, settings, roles), Heartbeats(workers, tunnels)
        self.audit = Audit(lambda: store.access, settings.audit_days)
        training = Training(tenant_services, data).over(rest)
        self.app: App = Sandboxes(tenant_services).over(training, about, heartbeats, self.audit, self.configuration)
        self._store = store

    def _apply(self, configuration: Configuration) -> None:
        self._tags.tags = configuration.metrics.tags
        if isinstance(self._reservations, PodReservations):
            self._reservations.warm.use(configuration.pools.pods)

    def _check_templates(self, configuration: Configuration) -> None:
        """Unsupported, InvalidConfig."""
        pools, names = configuration.pools.pods, configuration.templates.names()
        if isinstance(self._reservations, PodReservations):
            self._reservations.check_names(names)
            self._reservations.warm.check(pools)
        elif (pools or names) and not self._follows_elsewhere:
            what = "pools.pods" if pools else "templates"
            raise Unsupported(f"{what}: the sandboxes of this server are not pods",
                              hint=f"remove {what}, or set ROCK_SCHEDULER=kubernetes")  # fmt: skip

    async def check_sandbox(self, scope: Scope, sandbox_id: str) -> None:
        """NotFound for a sandbox that the caller of a request does not own."""
        await self.tenant_services(scope).get(sandbox_id)

    async def open(self) -> None:
        """Open the store and settle the unfinished operations of an earlier run."""
        await self._store.open()
        try:
            if self.opened is not None:
                await self.opened()
            await self.keys.check_guarded()
        except BaseException:
            await self._store.close()
            raise
        await self.catalogue.open()
        if isinstance(self._blobs, FolderBlobs):
            await self._blobs.sweep()
        try:
            await self.configuration.open()
            await self.workers.open()
            if self._reservations is not None:
                await self._reservations.open()
        except BaseException:
            await self.configuration.close()
            await self.workers.close()
            await self.catalogue.close()
            await self._store.close()
            raise
        if self.leader is not None:
            await self.leader.start()
        await self.audit.open()

    async def close(self) -> None:
        await self.configuration.close()
        await self.audit.close()
        if self.leader is not None:
            await self.leader.close()
        await self.service.close()
        if self._reservations is not None:
            await self._reservations.close()
        await self.workers.close()
        await self.catalogue.close()
        await self._store.close()
