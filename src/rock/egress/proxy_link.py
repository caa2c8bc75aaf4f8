"""The rocklet's client of the egress proxy: starts it, sends requests, and reports its death."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rock import errors
from rock.host.child_process import PATIENCE, ChildLink

_PROXY = Path(__file__).with_name("proxy.py")


class ProxyLink(ChildLink):
    """One proxy at a time. Its end closes all connections; the sandboxes continue to run without egress.

    resolvers: see dns.py. lost: called when the proxy died.
    """

    what = "the network proxy"
    again = "try again"

    def __init__(self, resolvers: Sequence[str], log: Path, lost: Callable[[], None]) -> None:
        super().__init__(_PROXY, {"resolvers": list(resolvers)}, log)
        self._when_lost = lost

    def _greeted(self, data: bytes) -> None:
        if not data:
            raise OSError("it ended at once")

    def _not_started(self, error: OSError | TimeoutError) -> errors.RockError:
        return errors.Unavailable(f"the network proxy did not start: {error!r}", hint=f"see {self._log}")

    async def request(self, op: str, fields: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request to the proxy, with copies of `fds`. Unavailable when it dies meanwhile, or on a timeout."""
        return await self.ask(op, fields, fds, PATIENCE)

    def _lost(self) -> None:
        if self._sock is not None:
            self.close()
            self._when_lost()
