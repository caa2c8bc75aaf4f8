"""Commands of admins that lead no more are refused: each carries the token of its lease, and those only grow."""

from __future__ import annotations

import logging
from pathlib import Path

from rock.errors import ClientError, Conflict, InvalidConfig
from rock.protocol.routes import FENCE
from rock.runtime import wholefile
from rock.wire.asgi import App, Receive, Scope, Send, failure

log = logging.getLogger("rock.node")

_HEADER = FENCE.encode()


class Fence:
    """The highest token that was seen, in a file, so that it is known to the next rocklet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._highest: int | None = None

    def check(self, text: str) -> None:
        """Conflict for a token below one that was seen; InvalidConfig for what is none."""
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidConfig(f"{text[:20]!r} is no token")
        token, highest = int(text), self._read()
        if token < highest:
            log.warning("refused a command by lease %d: %d was seen", token, highest)
            raise Conflict(f"a command by lease {token}, which is over: lease {highest} was seen",
                           details={"fence": highest})  # fmt: skip
        if token > highest:
            wholefile.replace(self._path, str(token))
            self._highest = token

    def _read(self) -> int:
        if self._highest is None:
            try:
                self._highest = int(self._path.read_text())
            except (FileNotFoundError, ValueError):
                self._highest = 0
        return self._highest

    def over(self, app: App) -> App:
        """`app`, whose node plane refuses what comes too late."""

        async def fenced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/node/"):
                try:
                    for name, value in scope["headers"]:
                        if name == _HEADER:
                            self.check(value.decode("latin-1"))
                except ClientError as error:
                    await failure(error).send(send)
                    return
            await app(scope, receive, send)

        return fenced
