"""The native control-plane API over the sandbox service: rows of protocol/routes.py, with an OpenAPI page."""

from __future__ import annotations

import html
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rock import __version__
from rock.admin import audit, configuration
from rock.admin.api import bare, jobs, reference, sandboxes, snapshots
from rock.admin.environments import Environments
from rock.admin.reconciler import mark_lost
from rock.admin.sandboxes.service import Service
from rock.admin.tenants import Keys, TenantServices
from rock.envhub import registry
from rock.errors import (
    ClientError,
    InvalidConfig,
    RockError,
    no_such_route,
    unexpected,
)
from rock.http.asgi import retry_after
from rock.protocol import action, env, keys, node, runs, sandbox
from rock.protocol import configuration as live_messages
from rock.protocol import jobs as job_messages
from rock.protocol import pools as pool_messages
from rock.protocol import recordings as recording_messages
from rock.protocol import snapshots as snapshot_messages
from rock.protocol.action import ConnectionList
from rock.protocol.env import AddEnv, BuildEnv, EnvAbout
from rock.protocol.keys import CreateKey, KeyInfo, KeyList, NewKey
from rock.protocol.node import CreateVolume, EnvList, SandboxList, VolumeInfo, VolumeList, WorkerInfo, WorkerList
from rock.protocol.route import Route
from rock.protocol.routes import IDEMPOTENCY_KEY, METHODS, ROUTES
from rock.protocol.rows import gateway_rows
from rock.protocol.sandbox import SandboxInfo
from rock.store.base import Query as Listing

GATEWAY = tuple(row.name for row in gateway_rows() if row.plane == "control")
BARE = (*sandboxes.NAMES, *bare.NAMES, *bare.WORKER_NAMES, *audit.NAMES, *configuration.NAMES, *GATEWAY)
Wait = Annotated[float, Query(ge=0, le=3600)]


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(orjson.dumps(model.model_dump(mode="json")), status, media_type="application/json")


def _row(name: str, model: type[BaseModel], tag: str) -> dict[str, Any]:
    """The arguments of a route's decorator."""
    return {"path": ROUTES[name].path, "summary": ROUTES[name].summary, "response_model": model, "tags": [tag]}


def _failure(error: RockError) -> Response:
    headers = {"retry-after": str(retry_after(error))} if error.retryable else None
    return Response(orjson.dumps(error.to_wire(), default=repr), error.status, headers, "application/json")


def build(
    tenant_services: TenantServices, keys: Keys, service: Service, envs: Environments, *, guarded: bool
) -> FastAPI:
    """The FastAPI application of the control plane. guarded: the server requires a key, so its front page must not show
    protected data."""
    for kind in _models().values():
        kind.model_config["defer_build"] = False  # otherwise FastAPI's part is built late too, with warnings
    app = FastAPI(title="ROCK", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    _errors(app)
    _sandboxes(app, tenant_services)
    _volumes(app, tenant_services)
    snapshots.add_routes(app, tenant_services)
    snapshots.add_pool_routes(app, tenant_services)
    snapshots.add_recording_routes(app, tenant_services)
    jobs.add_routes(app, service.store.jobs)
    _keys(app, keys)
    _environments(app, envs)
    add_routes(app, service)
    reference.add_pages(app)

    @app.get("/", include_in_schema=False, response_model=None)
    async def front(request: Request) -> Response | dict[str, str]:
        if "text/html" not in request.headers.get("accept", ""):
            return {"message": "hello, ROCK!"}
        # This page requires no key.
        listing = SandboxList(items=[]) if guarded else await tenant_services(request.scope).list(Listing(limit=100))
        return HTMLResponse(_front_page(listing))

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _sandboxes(app: FastAPI, tenant_services: TenantServices) -> None:
    @app.get(**_row("list_connections", ConnectionList, "sandboxes"))
    async def list_connections(request: Request, sandbox_id: str) -> Response:
        """Connections and connection attempts, oldest first; also of a stopped sandbox."""
        return _json(await tenant_services(request.scope).connections(sandbox_id))

    @app.delete(**_row("delete_sandbox", SandboxInfo, "sandboxes"))
    async def delete_sandbox(request: Request, sandbox_id: str, force: bool = False) -> Response:
        """Delete a stopped one and its retained files; `force` stops it first."""
        return _json(await tenant_services(request.scope).delete(sandbox_id, force))


def _volumes(app: FastAPI, tenant_services: TenantServices) -> None:
    @app.post(**_row("create_volume", VolumeInfo, "volumes"), status_code=201)
    async def create_volume(request: Request, body: CreateVolume) -> Response:
        """Create a volume on a worker; the same idempotency key returns the same volume."""
        key = request.headers.get(IDEMPOTENCY_KEY)
        return _json(await tenant_services(request.scope).create_volume(body, key), 201)

    @app.get(**_row("list_volumes", VolumeList, "volumes"))
    async def list_volumes(request: Request) -> Response:
        """Volumes, oldest first; for the server's owner those of all tenants."""
        return _json(VolumeList(items=list(await tenant_services(request.scope).list_volumes())))

    @app.get(**_row("get_volume", VolumeInfo, "volumes"))
    async def get_volume(request: Request, volume: str, tenant: str = "") -> Response:
        """A volume by its name. `tenant`: its tenant, for the server's owner alone."""
        return _json(await tenant_services(request.scope).get_volume(volume, tenant))

    @app.delete(**_row("delete_volume", VolumeInfo, "volumes"))
    async def delete_volume(request: Request, volume: str, tenant: str = "") -> Response:
        """Delete a volume that no sandbox uses, and its files. `tenant`: as of get_volume."""
        return _json(await tenant_services(request.scope).delete_volume(volume, tenant))


def _keys(app: FastAPI, keys: Keys) -> None:
    @app.post(**_row("create_key", NewKey, "keys"), status_code=201)
    async def create_key(body: CreateKey) -> Response:
        """Make an API key. The response is the only copy: the server stores only its digest."""
        return _json(await keys.create(body), 201)

    @app.get(**_row("list_keys", KeyList, "keys"))
    async def list_keys() -> Response:
        """API keys, including revoked ones, oldest first."""
        return _json(KeyList(items=await keys.list()))

    @app.delete(**_row("revoke_key", KeyInfo, "keys"))
    async def revoke_key(key_id: str) -> Response:
        """Revoke a key at once. The sandboxes of its tenant stay."""
        return _json(await keys.revoke(key_id))


def _environments(app: FastAPI, envs: Environments) -> None:
    @app.get(**_row("list_envs", EnvList, "environments"))
    async def list_envs() -> Response:
        """Environments that can be made."""
        added = await envs.listed()
        return _json(EnvList(items=[*(_catalogue_row(env_id) for env_id in registry.IDS), *added]))

    @app.get(**_row("about_env", EnvAbout, "environments"))
    async def about_env(id: Annotated[str, Query(min_length=1, max_length=512)]) -> Response:
        """Description of an environment, and whether its packages are installed."""
        return _json(await envs.about(id))

    @app.post(**_row("add_env", EnvAbout, "environments"))
    async def add_env(body: AddEnv) -> Response:
        """Register an environment under a name."""
        return _json(await envs.add(body))

    @app.post(**_row("build_env", EnvAbout, "environments"))
    async def build_env(body: BuildEnv, wait: Wait = 0.0) -> Response:
        """Install the packages of an environment in advance; responds after `wait` seconds at the latest."""
        return _json(await envs.build(body, wait))


def _catalogue_row(env_id: str) -> dict[str, Any]:
    spec = registry.find(env_id)
    aliases = [alias for alias, name in registry.ALIASES.items() if name == spec.id]
    return {"id": spec.id, "protocol": spec.protocol, "image": spec.image, "note": spec.note, "aliases": aliases}


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RockError)
    async def rock_error(request: Request, error: RockError) -> Response:
        return _failure(error)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        text = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        return _failure(InvalidConfig(text, hint="/docs on this server lists the fields and their types"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return _failure(no_such_route(request.url.path, request.method))
        refused = ClientError(f"{request.method} {request.url.path} was refused: {error.detail}")
        return Response(
            orjson.dumps(refused.to_wire()), error.status_code, dict(error.headers or {}), "application/json"
        )

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> Response:
        return _failure(unexpected(error))


def _front_page(listing: SandboxList) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(i.sandbox_id)}<td>{i.state}<td>{html.escape(i.image)}<td>{i.cause or ''}"
        for i in listing.items
    )
    return (
        "<!doctype html><title>ROCK</title><style>body{font:15px system-ui;margin:2rem}td,th{padding:.2rem 1rem;"
        "text-align:left}</style><h1>ROCK</h1><p>Version " + __version__ + ", <a href=/docs>API</a></p>"
        f"<table><tr><th>sandbox<th>state<th>image<th>cause{rows}</table>"
    )


def _tag(row: Route) -> str:
    if row.plane == "data":
        return "data"
    return "server" if row.name in bare.NAMES else "gateway" if row.name in GATEWAY else "sandboxes"


def _models() -> dict[str, type[BaseModel]]:
    """The wire models, by name."""
    return {
        name: kind
        for module in (sandbox, action, env, node, keys, runs, job_messages, snapshot_messages, pool_messages,
                       recording_messages, live_messages)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's own schema plus the routes whose handlers are not FastAPI's."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    from fastapi.openapi.utils import get_openapi

    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = _models()
    components = schema.setdefault("components", {}).setdefault("schemas", {})

    def reference(name: str) -> dict[str, Any]:
        if name not in models:
            return {"schema": {}}
        made = models[name].model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(made.pop("$defs", {}))
        components[name] = made
        return {"schema": {"$ref": f"#/components/schemas/{name}"}}

    for row in ROUTES.values():
        if not (row.plane == "data" or row.name in BARE) or row.method == "WEBSOCKET":
            continue
        names = [part[1:-1] for part in row.path.split("/") if part.startswith("{")]
        asked, *queries = (row.request or " ").split(" ")
        parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
        parameters += [
            {"name": q.lstrip("?").partition("=")[0], "in": "query", "schema": {"type": "string"}}
            for q in [asked, *queries]
            if q.startswith("?")
        ]
        kind = "application/octet-stream" if row.answer == "raw" else "application/json"
        status = "201" if row.name in ("create_sandbox", "create_group", "open_env", "create_run") else "200"
        operation: dict[str, Any] = {
            "summary": row.summary,
            "operationId": row.name,
            "tags": [_tag(row)],
            "parameters": parameters,
            "responses": {status: {"description": "done", "content": {kind: reference(row.answer)}}},
        }
        if asked in models:
            operation["requestBody"] = {"content": {"application/json": reference(asked)}}
        for method in METHODS if row.method == "ANY" else (row.method,):
            unique = {"operationId": f"{row.name}_{method.lower()}"} if row.method == "ANY" else {}
            schema["paths"].setdefault(row.path, {})[method.lower()] = {**operation, **unique}
    app.openapi_schema = schema
    return schema


# ---- workers ----
#
# The owner of the server lists, drains and removes workers. Heartbeats are in bare.py.

def add_routes(app: FastAPI, service: Service) -> None:
    worker_registry = service.workers

    @app.get(**_row("list_workers", WorkerList, "workers"))
    async def list_workers() -> WorkerList:
        """Workers, including lost ones."""
        return WorkerList(items=await worker_registry.infos())

    @app.post(**_row("drain_worker", WorkerInfo, "workers"))
    async def drain_worker(worker: str, archive: bool = False) -> WorkerInfo:
        """Drain a worker: it retains its current sandboxes, and gets no more. archive: those that retain their files
        are stopped and archived, and can be restarted on another worker. Unsupported without an archive."""
        if archive:
            service.archive.check_there()
        return await worker_registry.drain(worker, True, archive)

    @app.post(**_row("undrain_worker", WorkerInfo, "workers"))
    async def undrain_worker(worker: str) -> WorkerInfo:
        """The worker accepts sandboxes again."""
        return await worker_registry.drain(worker, False)

    @app.delete(**_row("remove_worker", WorkerInfo, "workers"))
    async def remove_worker(worker: str, force: bool = False) -> WorkerInfo:
        """Remove a lost worker without volumes. `force`: declare it lost first, which ends its sandboxes and removes
        the records of its volumes."""
        info = await worker_registry.info(worker)
        if not force:
            await service.volumes.refuse_removal(worker)
            await service.snapshots.refuse_removal(worker)
        if force and not info.is_lost:
            await worker_registry.lose(info, surely=True)
        if (await worker_registry.info(worker)).is_lost:
            await mark_lost(service, worker)
            await service.volumes.lose(worker)
            await service.snapshots.lose(worker)
        await worker_registry.remove(worker)
        return info
