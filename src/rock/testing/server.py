"""A server with the fake runtime, in a thread of this process."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

try:
    import uvicorn
except ModuleNotFoundError as error:
    raise ImportError("rock.testing runs a server: pip install 'rock-sandbox[server]'") from error

from rock.cli.serve.serve import Server, http_over, listen
from rock.runtime.fake import Call, FakeRuntime, Program
from rock.settings import Settings

__all__ = ["Call", "FakeServer", "Program"]


class FakeServer:
    """A server with the runtime "fake", in its own thread, on a free port of this machine; a context manager.

    programs: functions of a `Call` by name; they run in the server's thread. settings: of `rock.settings.Settings`.
    `url` is its address.
    """

    def __init__(self, programs: Mapping[str, Program] | None = None, **settings: object) -> None:
        self.runtime = FakeRuntime(programs)
        self.url = ""
        self._settings = settings
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: uvicorn.Server | None = None
        self._server: Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start serving; raises the reason of a failure."""
        self._folder = tempfile.TemporaryDirectory(prefix="rock-fake-")
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="rock fake server", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all sandboxes and the server. Idempotent."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._let_go)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _let_go(self) -> None:
        if self._server is not None and self._http is not None:
            self._server.node.let_go()
            self._http.should_exit = True

    def _run(self, ready: Future[None]) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _serve(self, ready: Future[None]) -> None:
        assert self._folder is not None
        given = {"runtime": "fake", "sandbox_limit": 1_000_000, "pool_size": 0, **self._settings}
        settings = Settings(Path(self._folder.name), **given)  # type: ignore[arg-type]
        listener = listen("127.0.0.1", 0)
        try:
            self._server = Server(settings, {"fake": self.runtime})
            await self._server.open()
            try:
                self._http = http_over(self._server.app)
                self._loop = asyncio.get_running_loop()
                self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                ready.set_result(None)
                await self._http.serve(sockets=[listener])
            finally:
                await self._server.close()
        finally:
            listener.close()
