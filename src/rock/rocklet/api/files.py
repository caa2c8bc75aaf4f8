"""Routes of files: read, write, list, pack and unpack, over rocklet/transfers/."""

from __future__ import annotations

import posixpath
from typing import Any

from rock.errors import InvalidConfig
from rock.http.asgi import JSON_OBJECT, Answer, Request, Router, answer
from rock.protocol.action import ChmodRequest, ChownRequest, FileInfo
from rock.protocol.node import FileList
from rock.protocol.routes import ROUTES
from rock.rocklet.durability.idempotency import IdempotentCalls
from rock.rocklet.node import Node
from rock.rocklet.sandbox import Supervisor
from rock.rocklet.transfers import files, folders

_RAW = b"application/octet-stream"


def mode_of(text: str | int | None) -> int | None:
    """Permission bits of "755", "0o755" or the octal text of a number; None stays None."""
    if text is None or text == "":
        return None
    try:
        value = int(str(text).removeprefix("0o"), 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o7777:
        raise InvalidConfig(f"no such mode: {text!r}", hint="write it in octal, like 755")
    return value


class FileApi:
    def __init__(self, node: Node, once: IdempotentCalls) -> None:
        self.node = node
        self.once = once

    def _find(self, request: Request) -> Supervisor:
        return self.node.get(request.path["sandbox_id"])

    async def _info(self, sandbox: Supervisor, path: str, follow: bool = True) -> FileInfo:
        return files.describe(path, await files.of(sandbox.runtime).stat(sandbox.handle, path, follow=follow))

    async def read_file(self, request: Request) -> Answer:
        sandbox = self._find(request)
        path = files.inside(request.required("path"))
        offset = request.integer("offset", 0)
        length = request.integer("length", 0) if request.query.get("length") else None
        with sandbox.active():
            fd = await files.of(sandbox.runtime).open_read(sandbox.handle, path, user=request.query.get("user"))
        reading = files.Reading(fd, offset, length)
        return Answer(stream=sandbox.during(reading.chunks()), length=reading.length, content_type=_RAW)

    async def write_file(self, request: Request) -> Answer:
        sandbox = self._find(request)
        path = files.inside(request.required("path"))
        append = request.flag("append")
        mode = mode_of(request.query.get("mode"))

        async def work() -> Answer:
            async with sandbox.uploads.one():
                await files.write_stream(
                    sandbox.runtime, sandbox.handle, path, request.chunks(), append=append, mode=mode,
                    user=request.query.get("user"),
                )  # fmt: skip
            return answer(await self._info(sandbox, path))

        if append:
            return await self.once.call(sandbox, request, work)
        with sandbox.active():  # writing the same file again has no further effect, so no key is needed
            return await work()

    async def stat_file(self, request: Request) -> Answer:
        sandbox = self._find(request)
        with sandbox.active():
            return answer(
                await self._info(sandbox, files.inside(request.required("path")), request.flag("follow", True))
            )

    async def list_files(self, request: Request) -> Answer:
        sandbox = self._find(request)
        path = files.inside(request.required("path"))
        offset, limit = request.integer("offset", 0), request.integer("limit", 1000, low=1, high=10_000)
        with sandbox.active():
            found = await files.of(sandbox.runtime).list(sandbox.handle, path, offset=offset, limit=limit)
        items = [files.describe(posixpath.join(path, entry.name), entry) for entry in found]
        return answer(FileList.model_construct(items=items, next=offset + len(items) if items else None))

    async def remove_file(self, request: Request) -> Answer:
        sandbox = self._find(request)
        path = files.inside(request.required("path"))

        async def work() -> Answer:
            await files.of(sandbox.runtime).remove(sandbox.handle, path, recursive=request.flag("recursive"))
            return answer({})

        return await self.once.call(sandbox, request, work)

    async def make_dir(self, request: Request) -> Answer:
        sandbox = self._find(request)
        body = _object(await request.json())
        path = files.inside(str(body.get("path", "")))
        mode = mode_of(body.get("mode"))

        async def work() -> Answer:
            await files.of(sandbox.runtime).make_dir(
                sandbox.handle, path, parents=bool(body.get("parents", True)), mode=0o755 if mode is None else mode
            )
            return answer(await self._info(sandbox, path), 201)

        return await self.once.call(sandbox, request, work)

    async def move_file(self, request: Request) -> Answer:
        sandbox = self._find(request)
        body = _object(await request.json())
        source, target = (files.inside(str(body.get(name, ""))) for name in ("source", "target"))

        async def work() -> Answer:
            await files.of(sandbox.runtime).move(sandbox.handle, source, target)
            return answer(await self._info(sandbox, target, follow=False))

        return await self.once.call(sandbox, request, work)

    async def chmod(self, request: Request) -> Answer:
        sandbox = self._find(request)
        spec = await request.model(ChmodRequest)
        mode = mode_of(spec.mode)
        if mode is None or not spec.paths:
            raise InvalidConfig("chmod has no valid mode, or no path", hint="send {'paths': ['/tmp/a'], 'mode': '755'}")
        with sandbox.active():
            for path in spec.paths:
                await files.of(sandbox.runtime).chmod(
                    sandbox.handle, files.inside(path), mode, recursive=spec.recursive
                )
        return answer({"success": True, "message": ""})

    async def chown(self, request: Request) -> Answer:
        sandbox = self._find(request)
        spec = await request.model(ChownRequest)
        if not spec.paths:
            raise InvalidConfig("chown has no path", hint="send {'paths': ['/tmp/a'], 'remote_user': '1000'}")
        with sandbox.active():
            for path in spec.paths:
                await files.of(sandbox.runtime).chown(
                    sandbox.handle, files.inside(path), spec.remote_user, recursive=spec.recursive
                )
        return answer({"success": True, "message": ""})

    async def download_dir(self, request: Request) -> Answer:
        sandbox = self._find(request)
        path = files.inside(request.required("path"))
        with sandbox.active():
            await files.of(sandbox.runtime).stat(sandbox.handle, path)
        packed = folders.pack(sandbox.runtime, sandbox.handle, path)
        return Answer(stream=sandbox.during(packed), content_type=b"application/x-tar")

    async def upload_dir(self, request: Request) -> Answer:
        sandbox = self._find(request)
        path = files.inside(request.required("path"))
        with sandbox.active():
            async with sandbox.uploads.one():
                await folders.unpack(sandbox.runtime, sandbox.handle, path, request.chunks())
            return answer(await self._info(sandbox, path))


def _object(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidConfig("the body is not a JSON object", hint=JSON_OBJECT)
    return body


def add_routes(router: Router, node: Node, once: IdempotentCalls) -> None:
    api = FileApi(node, once)
    for name in (
        "read_file",
        "write_file",
        "stat_file",
        "list_files",
        "remove_file",
        "make_dir",
        "move_file",
        "chmod",
        "chown",
        "download_dir",
        "upload_dir",
    ):
        router.add(ROUTES[name], getattr(api, name))
