"""An admin without sandboxes of its own: it commands the rocklets that ROCK_WORKERS names, over the wire.

Several of them may share a database; one of them leads (admin/leader.py). Requests to sandboxes are forwarded.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import orjson

from rock.admin.app import Admin
from rock.admin.auth import Authenticated, require_key_beyond_loopback
from rock.admin.worker import FENCE, Transport, WireWorker, Worker
from rock.cli.home import Home
from rock.cli.observing import observe
from rock.errors import InvalidConfig, RockError, Unsupported
from rock.protocol import routes
from rock.proxy.app import Proxy, is_data
from rock.sdk.transport import Transport as Client
from rock.settings import Settings
from rock.store.base import Store
from rock.wire.asgi import App, Receive, Scope, Send
from rock.wire.remote import Remote

_LONG = ("/commit", "/wake")
_USUAL = 100.0  # seconds that a worker may be silent


def transport_to(url: str, key: str | None) -> Transport:
    """Requests of a WireWorker, each with the token of the lease by which it is made."""
    clients: dict[int | None, Client] = {}

    async def carry(method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
        fence = FENCE.get()
        client = clients.get(fence)
        if client is None:
            clients.clear()  # of leases that are over
            client = clients[fence] = Client(url, key, {} if fence is None else {routes.FENCE: str(fence)})
        makes = method == "PUT" or path.endswith(_LONG) or path == routes.ROUTES["node_image"].path
        try:
            return 200, await client.call(method, f"{path}?{query}" if query else path, body,
                                          timeout=None if makes else _USUAL)  # fmt: skip
        except RockError as error:
            return error.status, orjson.dumps(error.to_wire(), default=repr)

    return carry


def workers_of(text: str) -> dict[str, str]:
    """URLs by name of "name=url,name=url". InvalidConfig."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, url = part.partition("=")
        if not separator or not name or not url.startswith(("http://", "https://")):
            raise InvalidConfig(f"ROCK_WORKERS: {part!r} names no worker", hint="NAME=http://HOST:PORT,NAME=...")
        if name in found:
            raise InvalidConfig(f"ROCK_WORKERS: {name} is named twice")
        found[name] = url
    return found


class Control:
    """Store, admin and proxy, over workers that are elsewhere."""

    def __init__(self, settings: Settings, store: Store) -> None:
        require_key_beyond_loopback(settings.host, settings.api_key)
        if settings.archive not in ("", "off"):
            raise Unsupported("ROCK_ARCHIVE: files of workers elsewhere are not archived yet", hint="leave it out")
        self.home = Home(settings.home)
        self.store = store
        key = settings.worker_key or settings.api_key
        urls = workers_of(settings.workers)
        # Not as Authorization: that may be for a program inside
        headers = {} if key is None else {routes.OTHER_KEY: key}
        self._remotes = [Remote(url, headers) for url in urls.values()]
        apps: dict[str, App] = dict(zip(urls, self._remotes, strict=True))
        self._proxy = Proxy(store, apps, local=False)
        workers: dict[str, Worker] = {name: WireWorker(name, transport_to(url, key)) for name, url in urls.items()}
        self.admin = Admin(replace(settings, archive="off"), store, workers, ["write", "read"], self._proxy)
        self.observed = observe(settings, "admin", store)
        door = Authenticated(self.observed.measured(self._route), settings.api_key, self.admin.keys)
        self.app = self.observed.over(door)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and is_data(scope["path"]):
            await self._proxy(scope, receive, send)
        else:
            await self.admin.app(scope, receive, send)

    def let_go(self) -> None:
        """Nothing is held here."""

    @property
    def left(self) -> int:
        return 0

    async def open(self) -> None:
        self.home.take()
        try:
            await self.admin.open()
        except BaseException:
            self.home.release()
            raise
        self.observed.open()

    async def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.home.release)
            await self.observed.close()
            for remote in self._remotes:
                await remote.close()
            await self.admin.close()
