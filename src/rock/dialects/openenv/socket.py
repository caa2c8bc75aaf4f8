"""The WebSockets of OpenEnv: /ws for episodes, /mcp for tools. A socket has one environment, which ends with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from rock.dialects.openenv import rpc
from rock.dialects.openenv.episode import Episode
from rock.dialects.openenv.messages import (
    EXECUTION_ERROR,
    SESSION_ERROR,
    UNKNOWN_TYPE,
    VALIDATION_ERROR,
    Failure,
    dumps,
    parsed,
)
from rock.dialects.openenv.sessions import Episodes
from rock.http.asgi import Receive, Send

_MOST_AHEAD = 16  # messages that a client may send ahead of the responses


class EpisodeSocket:
    """One socket. session_id: of a session that was created over HTTP. only_rpc: each message is JSON-RPC."""

    def __init__(
        self, episodes: Episodes, session_id: str | None, receive: Receive, send: Send, only_rpc: bool = False
    ) -> None:
        self._episodes = episodes
        self._session_id = session_id
        self._receive = receive
        self._send = send
        self._only_rpc = only_rpc
        self._ahead: deque[bytes | str] = deque()

    async def serve(self) -> None:
        """Serve until the client closes. The environment of a session over HTTP stays."""
        await self._receive()
        await self._send({"type": "websocket.accept"})
        kept, episode = None, self._episodes.one_off()
        if self._session_id is not None:
            try:
                kept = self._episodes.kept(self._session_id)
                if kept.attached:
                    raise Failure(SESSION_ERROR, "another socket uses this session")
            except Failure as error:
                await self._write(error.to_wire())
                await self._send({"type": "websocket.close", "code": 1008, "reason": "no such session"})
                return
            kept.attached, episode = True, kept.episode
        try:
            await self._messages(episode)
        finally:
            if kept is not None:
                kept.attached = False
            else:
                await asyncio.shield(episode.close())

    async def _messages(self, episode: Episode) -> None:
        listener: asyncio.Task[bytes | str | None] = asyncio.create_task(self._next())
        try:
            while True:
                text = self._ahead.popleft() if self._ahead else None
                if text is None:
                    text = await listener
                    if text is None:
                        return
                    listener = asyncio.create_task(self._next())
                work = asyncio.create_task(self._answer(episode, text))
                listener = await self._until(work, listener)
                if work.cancelled():
                    return
                reply = work.result()
                if reply is None:
                    await self._send({"type": "websocket.close", "code": 1000})
                    return
                await self._write(reply)
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    async def _until(
        self, work: asyncio.Task[dict[str, Any] | None], listener: asyncio.Task[bytes | str | None]
    ) -> asyncio.Task[bytes | str | None]:
        """Wait for a response while messages arrive; a client that has left cancels it."""
        try:
            while not work.done():
                if len(self._ahead) >= _MOST_AHEAD:
                    await asyncio.wait({work})
                    break
                both: set[asyncio.Task[Any]] = {work, listener}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if listener.done() and not work.done():
                    text = listener.result()
                    if text is None:
                        break
                    self._ahead.append(text)
                    listener = asyncio.create_task(self._next())
            return listener
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})

    async def _next(self) -> bytes | str | None:
        """The next message; None at the end."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            return None
        text: bytes | str | None = message.get("text")
        return text if text is not None else message.get("bytes") or b""

    async def _answer(self, episode: Episode, text: bytes | str) -> dict[str, Any] | None:
        """The response to a message; None for the end."""
        try:
            message = parsed(text)
            if self._only_rpc:
                return await rpc.response(message, self._episodes, episode)
            kind = message.get("type")
            if kind == "reset":
                return {"type": "observation", "data": await episode.reset(message.get("data"))}
            if kind == "step":
                return {"type": "observation", "data": await episode.step(message.get("data"))}
            if kind == "state":
                return {"type": "state", "data": episode.state}
            if kind == "mcp":
                return {"type": "mcp", "data": await rpc.response(message.get("data"), self._episodes, episode)}
            if kind == "close":
                return None
            raise Failure(UNKNOWN_TYPE, f"there is no message of type {str(kind)[:100]!r}; there are reset, step, "
                                        "state, mcp and close")
        except Failure as error:
            if self._only_rpc:
                return rpc.error(None, rpc.PARSE_ERROR, error.message)
            return error.to_wire()

    async def _write(self, value: dict[str, Any]) -> None:
        try:
            text = dumps(value).decode()
        except (TypeError, ValueError) as error:  # a value of the environment without a JSON form
            code = EXECUTION_ERROR if not self._only_rpc else VALIDATION_ERROR
            text = dumps(Failure(code, f"the response is not JSON: {error}").to_wire()).decode()
        with contextlib.suppress(RuntimeError, OSError):  # the client has left
            await self._send({"type": "websocket.send", "text": text})
