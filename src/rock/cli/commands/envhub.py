"""`envhub`: the registry of environments as a separate server. Every ROCK server includes the same routes."""

from __future__ import annotations

import logging
from pathlib import Path

from rock.admin.api.rock_v1.environments import EnvHub
from rock.admin.auth import Authenticated, names_of
from rock.admin.preflight import require_key_beyond_loopback
from rock.cli.serve.serve import http_over, listen, run, stop_on_signals
from rock.envhub.catalogue import Catalogue
from rock.errors import InvalidConfig, Unsupported
from rock.http.asgi import App, Router
from rock.protocol.route import Route
from rock.settings import Settings
from rock.telemetry import set_up_logs

log = logging.getLogger("rock.envhub")

_SCHEME = "sqlite:///"


def serve_envhub(settings: Settings, db_url: str | None = None) -> None:
    """Serve in this process until SIGTERM or SIGINT. RockError when it cannot start."""
    require_key_beyond_loopback(settings.host, settings.api_key)
    catalogue = Catalogue(database_of(db_url) if db_url else settings.catalogue)
    set_up_logs(settings.log_level, style=settings.log_format)
    run(_serve(settings, catalogue))


def database_of(url: str) -> Path:
    """The file of `sqlite:///FILE`: relative to the working folder, or absolute as in `sqlite:////var/lib/envs.db`."""
    scheme, _, _ = url.partition("://")
    if not url.startswith(_SCHEME):
        if scheme in ("sqlite", url):
            raise InvalidConfig(f"{url!r} names no file", hint="write it like sqlite:///envs.db")
        raise Unsupported(f"there is no store for {scheme}://", hint="sqlite:///FILE is the one there is")
    name = url.removeprefix(_SCHEME).partition("?")[0]
    if not name or name == ":memory:":
        raise InvalidConfig(f"{url!r} names no file: what is registered would not outlive the server",
                            hint="write it like sqlite:///envs.db")
    return Path(name).expanduser().absolute()


def application(catalogue: Catalogue) -> App:
    """An application with the registry's routes only."""
    router = Router("envhub")
    for method, path, handler, access in EnvHub(catalogue).routes():
        row = Route(f"envhub{path}", method, path, "control", "the registry of environments", access=access)
        router.add(row, handler)
    return router


async def _nothing() -> None:
    """Lifespan without startup or shutdown work."""


async def _serve(settings: Settings, catalogue: Catalogue) -> None:
    listener = listen(settings.host, settings.port)
    try:
        await catalogue.open()
        try:
            http = http_over(Authenticated(application(catalogue), settings.api_key,
                                           names=names_of(settings.host, settings.public_names)))  # fmt: skip
            port = listener.getsockname()[1]
            with stop_on_signals(http, _nothing):
                log.info("serving on http://%s:%d, catalogue %s", settings.host, port, catalogue.path)
                print(f"EnvHub serves on http://{settings.host}:{port} ({catalogue.path})", flush=True)
                await http.serve(sockets=[listener])
        finally:
            await catalogue.close()
    finally:
        listener.close()
