"""Template builds: the steps of a template as a Dockerfile, built by the native builder to an image.

A template is a file in a folder of the server. Its id is derived from tenant and name, and the name of its image
from the id, so that there is no table.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import secrets
import tarfile
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field

from rock.dialects.e2b.errors import NotRunning
from rock.dialects.e2b.native import Sandbox
from rock.dialects.e2b.state import BASE, Body, Options, time_of
from rock.dialects.e2b.tokens import Tokens
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, StartFailed, Unsupported, from_wire, unexpected
from rock.host import atomic_file
from rock.http.asgi import Answer, App, Request, answer, validate
from rock.protocol.images import BuildRequest
from rock.protocol.keys import Caller, caller_of
from rock.protocol.routes import ROUTES, Frame, FrameParser, pack_frame

log = logging.getLogger("rock.e2b")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}(?:/[a-z0-9][a-z0-9_-]{0,127})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ID = re.compile(r"tpl[0-9a-f]{20}")
_HASH = re.compile(r"[0-9a-f]{64}")
_BASE_IMAGES = ("e2bdev/base", "e2bdev/base:latest", "e2bdev/code-interpreter:latest")
_MOST_STEPS, _MOST_BUILDS, _MOST_LINES, _PAGE = 1000, 256, 20_000, 100
_LARGEST_UPLOAD, _LARGEST_CONTEXT = 4 << 30, 8 << 30  # bytes
_KEPT = 7 * 86400.0  # seconds for which an uploaded file is kept
_CHUNK = 1 << 20
_LONGEST_COMMAND = 64 << 10
_READY_WITHIN, _READY_EVERY = 120.0, 0.2  # seconds
# bash where the image has it, because the commands of templates are written for it
_SHELL = 'if [ -x /bin/bash ]; then exec /bin/bash -c "$0"; else exec /bin/sh -c "$0"; fi'


class NewTemplate(Body):
    name: str | None = None
    alias: str | None = None
    tags: list[str] = Field(default_factory=list, max_length=20)
    teamID: str | None = None
    cpuCount: int | None = Field(default=None, ge=1, le=1024)
    memoryMB: int | None = Field(default=None, ge=8, le=1 << 24)
    minFreeDiskMB: int | None = None


class Step(Body):
    type: str
    args: list[str] = Field(default_factory=list, max_length=1000)
    filesHash: str | None = None
    force: bool | None = None


class StartBuild(Body):
    fromImage: str | None = Field(default=None, max_length=400)
    fromTemplate: str | None = Field(default=None, max_length=400)
    fromImageRegistry: dict[str, Any] | None = None
    force: bool | None = None
    steps: list[Step] = Field(default_factory=list, max_length=_MOST_STEPS)
    startCmd: str | None = Field(default=None, max_length=_LONGEST_COMMAND)
    readyCmd: str | None = Field(default=None, max_length=_LONGEST_COMMAND)


@dataclass(frozen=True)
class Template:
    """A template that was built. cpus, memory: of its sandboxes; None is the default of the server. start: a command
    that runs in each sandbox from its start on. ready: a command that succeeds when that has started."""

    id: str
    tenant: str
    name: str
    cpus: float | None = None
    memory: str | None = None
    start: str = ""
    ready: str = ""

    @property
    def image(self) -> str:
        return f"e2b-template/{self.id}"


@dataclass
class Build:
    """A build in progress or ended."""

    id: str
    template: Template
    tags: list[str]
    status: str = "waiting"
    lines: list[tuple[float, str]] = field(default_factory=list)
    problem: str = ""
    step: str = ""
    task: asyncio.Task[None] | None = None


# ---- steps as a Dockerfile ----


def dockerfile_of(spec: StartBuild, image: str) -> str:
    """The steps of a template as a Dockerfile. InvalidConfig, Unsupported."""
    lines, user = [f"FROM {_word(image)}"], ""
    for number, step in enumerate(spec.steps, 1):
        where, args = f"step {number} ({step.type[:20]})", step.args
        if step.type == "RUN" and args:
            other = args[1] if len(args) > 1 else ""
            lines += [f"USER {_word(other)}"] if other else []
            lines.append("RUN " + _list("/bin/sh", "-c", _SHELL, args[0]))
            lines += [f"USER {_word(user or 'root')}"] if other else []
        elif step.type == "COPY" and len(args) >= 2 and step.filesHash and _HASH.fullmatch(step.filesHash):
            options = f"--chown={_word(args[2])} " if len(args) > 2 and args[2] else ""
            options += f"--chmod={_word(args[3])} " if len(args) > 3 and args[3] else ""
            source = args[0].removeprefix("./")
            if source.startswith("/") or ".." in source.split("/"):
                raise InvalidConfig(f"{where}: {source[:80]!r} is outside of the context", hint="copy a path below it")
            lines.append(f"COPY {options}{_list(f'{step.filesHash}/{source}', args[1])}")
        elif step.type == "ENV" and args and len(args) % 2 == 0:
            lines += [f"ENV {_variable(args[at])}={_quoted(args[at + 1])}" for at in range(0, len(args), 2)]
        elif step.type == "WORKDIR" and len(args) == 1:
            lines.append(f"WORKDIR {_quoted(args[0])}")
        elif step.type == "USER" and len(args) == 1:
            user = args[0]
            lines.append(f"USER {_word(user)}")
        elif step.type in ("RUN", "COPY", "ENV", "WORKDIR", "USER"):
            raise InvalidConfig(f"{where} has wrong arguments", hint="build the template with an SDK of E2B")
        else:
            raise Unsupported(f"{where}: a step of this type is not supported",
                              hint="use RUN, COPY, ENV, WORKDIR and USER")
    return "\n".join(lines) + "\n"


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_./:@+-]{1,400}", text):
        raise InvalidConfig(f"{text[:80]!r} is not a name of an image or a user, or a mode",
                            hint="use letters, digits and _./:@+-")  # fmt: skip
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InvalidConfig(f"{name[:80]!r} is no name of a variable", hint="use letters, digits and '_'")
    return name


def _quoted(text: str) -> str:
    if "\n" in text or "\0" in text:
        raise InvalidConfig("a value has a line end or a NUL character", hint="write it to a file by a RUN step")
    return '"' + re.sub(r'([\\"$])', r"\\\1", text) + '"'


def _list(*words: str) -> str:
    if any("\0" in word for word in words):
        raise InvalidConfig("a command or a path has a NUL character", hint="remove it")
    return json.dumps(words)


# ---- templates and builds ----


class Builds:
    """The templates of a server. folder: has the templates, and files that clients upload for builds. data: the data
    plane."""

    def __init__(self, folder: Path, data: App, tokens: Tokens, options: Options) -> None:
        self._templates = folder / "templates"
        self._uploads = folder / "uploads"
        self._data = data
        self._tokens = tokens
        self._options = options
        self._builds: OrderedDict[str, Build] = OrderedDict()

    async def close(self) -> None:
        tasks = [build.task for build in self._builds.values() if build.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, caller: Caller, text: str) -> Template | None:
        """A template of the caller's tenant by its id or its name; a tag is a part of the image's name."""
        name = text.partition(":")[0].lower()
        template_id = name if _ID.fullmatch(name) else _id_of(caller.owner, name)
        try:
            found = orjson.loads((self._templates / f"{template_id}.json").read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        if caller.tenant is not None and found["tenant"] != caller.owner:
            return None
        return Template(**found)

    def image_of(self, template: Template, text: str) -> str:
        """The image of a template with the tag in its name."""
        tag = text.partition(":")[2]
        return f"{template.image}:{tag if _TAG.fullmatch(tag) and tag != 'default' else 'latest'}"

    # ---- routes ----

    async def create(self, request: Request) -> Answer:
        spec = validate(NewTemplate, await request.json())
        name, _, tag = (spec.name or spec.alias or "").strip().partition(":")
        name = name.lower()  # as in E2B
        tags = [*([tag] if tag else []), *spec.tags]
        if not _NAME.fullmatch(name) or name in BASE or not all(_TAG.fullmatch(each) for each in tags):
            raise InvalidConfig(f"name={name[:80]!r} and tags {tags[:5]} are no names of a template",
                                hint="use lower-case letters, digits, '_' and '-'; not base")  # fmt: skip
        caller = caller_of(request.scope)
        template = Template(_id_of(caller.owner, name), caller.owner, name,
                            None if spec.cpuCount is None else float(spec.cpuCount),
                            None if spec.memoryMB is None else f"{spec.memoryMB}m")  # fmt: skip
        build = Build(secrets.token_hex(16), template, tags)
        self._builds[build.id] = build
        while len(self._builds) > _MOST_BUILDS:
            old = next((each for each in self._builds.values() if each.status not in ("building",)), None)
            if old is None or old is build:
                del self._builds[build.id]
                raise Conflict(f"{_MOST_BUILDS} builds are in progress", hint="wait until some have ended")
            del self._builds[old.id]
        return answer({"templateID": template.id, "buildID": build.id, "public": False, "names": [name],
                       "tags": tags, "aliases": [name]}, 202)  # fmt: skip

    def _build(self, request: Request) -> Build:
        build = self._builds.get(request.path["build"])
        caller = caller_of(request.scope)
        mine = build is not None and (caller.tenant is None or build.template.tenant == caller.owner)
        if build is None or not mine or build.template.id != request.path["template"]:
            raise NotFound(f"build {request.path['build'][:80]!r} not found", hint="request another build: those of "
                           "an earlier run of the server are forgotten")  # fmt: skip
        return build

    async def files(self, request: Request) -> Answer:
        """Whether a file of a build was uploaded, and the URL for it."""
        name = _hash_of(request)
        caller = caller_of(request.scope)
        if self._upload(caller, name).exists():
            return answer({"present": True}, 201)
        scheme = "https" if request.scope.get("scheme") == "https" else "http"
        host = request.header(b"host") or "127.0.0.1"
        token = self._tokens.upload(name, caller)
        path = f"/e2b/templates/{request.path['template']}/files/{name}"
        return answer({"present": False, "url": f"{scheme}://{host}{path}?token={token}"}, 201)

    async def upload(self, request: Request) -> Answer:
        """Store the tar of the files of one COPY step."""
        target = self._upload(caller_of(request.scope), _hash_of(request))
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        await asyncio.to_thread(_remove_old, target.parent)
        fd, part = tempfile.mkstemp(dir=target.parent, prefix=".part-")
        try:
            size = 0
            with os.fdopen(fd, "wb") as file:
                async for chunk in request.chunks():
                    size += len(chunk)
                    if size > _LARGEST_UPLOAD:
                        raise InvalidConfig(f"the upload is over {_LARGEST_UPLOAD} bytes", hint="copy less")
                    await asyncio.to_thread(file.write, chunk)
            os.replace(part, target)
        except BaseException:
            os.unlink(part)
            raise
        return Answer(b"", 200)

    def _upload(self, caller: Caller, name: str) -> Path:
        return self._uploads / (caller.owner or "_owner") / f"{name}.tar"

    async def start(self, request: Request) -> Answer:
        spec = validate(StartBuild, await request.json())
        build, caller = self._build(request), caller_of(request.scope)
        if build.status != "waiting":
            raise Conflict(f"build {build.id} was started already", hint="request another build")
        if any("\0" in (command or "") for command in (spec.startCmd, spec.readyCmd)):
            raise InvalidConfig("startCmd or readyCmd has a NUL character", hint="remove it")
        build.template = replace(build.template, start=spec.startCmd or "", ready=spec.readyCmd or "")
        wanted = self._request(spec, build, caller)
        hashes = sorted({step.filesHash for step in spec.steps if step.type == "COPY" and step.filesHash})
        uploads = {name: self._upload(caller, name) for name in hashes}
        missing = [name for name, file in uploads.items() if not file.exists()]
        if missing:
            raise InvalidConfig(f"the files {missing[0][:16]}... of a COPY step were not uploaded", hint="build again")
        build.status = "building"
        build.task = asyncio.create_task(self._run(build, wanted, uploads, caller), name=f"e2b-build-{build.id}")
        return Answer(b"", 202)

    def _request(self, spec: StartBuild, build: Build, caller: Caller) -> BuildRequest:
        """The native build. InvalidConfig, Unsupported."""
        login = spec.fromImageRegistry or {}
        if login and login.get("type") != "registry":
            raise Unsupported("fromImageRegistry of AWS and GCP is not supported by this server",
                              hint="give username and password, or pull the image first")  # fmt: skip
        image = spec.fromImage or ""
        if spec.fromTemplate:
            found = self.find(caller, spec.fromTemplate)
            image = self.image_of(found, spec.fromTemplate) if found is not None else ""
            if found is None and spec.fromTemplate.partition(":")[0] in BASE:
                image = self._options.image
        if image in _BASE_IMAGES:
            image = self._options.image
        if not image:
            raise InvalidConfig("the template has no image: fromImage and fromTemplate name none",
                                hint="begin with an image, or with a template that exists")  # fmt: skip
        network: Literal["nat", "none"] = "nat" if self._options.network == "nat" else "none"
        return BuildRequest(
            image_tag=self.image_of(build.template, f":{build.tags[0]}" if build.tags else ""),
            dockerfile=dockerfile_of(spec, image), network=network, use_cache=not spec.force,
            memory=build.template.memory or self._options.memory, cpus=build.template.cpus or self._options.cpus,
            registry_username=login.get("username"), registry_password=login.get("password"),
        )  # fmt: skip

    async def status(self, request: Request) -> Answer:
        build = self._build(request)
        offset = request.integer("logsOffset", 0)
        lines = build.lines[offset : offset + _PAGE]
        found: dict[str, Any] = {
            "templateID": build.template.id, "buildID": build.id, "status": build.status, "logs": [],
            "logEntries": [{"timestamp": time_of(when), "level": "info", "message": text} for when, text in lines],
        }  # fmt: skip
        if build.status == "error":
            found["reason"] = {"message": build.problem}
        return answer(found)

    async def begin(self, template: Template, sandbox_id: str, caller: Caller) -> None:
        """Run the start command of a template in a new sandbox, and wait until it is ready. StartFailed. A repeated
        call finds the command running."""
        native = Sandbox(self._data, sandbox_id, caller)
        try:
            start, ready = (["/bin/sh", "-c", _SHELL, command] for command in (template.start, template.ready))
            known = await native.json("list_processes")
            if template.start and not any(item["command"] == start for item in known["items"]):
                await native.json("start_process", {"command": start, "stdin": "", "timeout": None})
            end = time.monotonic() + _READY_WITHIN
            while template.ready:
                found = await native.json("execute", {"command": ready, "timeout": _READY_WITHIN})
                if found["exit_code"] == 0:
                    return
                if time.monotonic() > end:
                    raise StartFailed(f"readyCmd of template {template.name} has not succeeded in {_READY_WITHIN:g} s",
                                      sandbox_id=sandbox_id, hint="run its commands in a sandbox without them")
                await asyncio.sleep(_READY_EVERY)
        except NotRunning:
            raise StartFailed(f"sandbox {sandbox_id} ended during the start command of template {template.name}",
                              sandbox_id=sandbox_id, hint="create another one") from None
        finally:
            await native.close()

    async def delete(self, caller: Caller, text: str) -> bool:
        """Delete a template; whether there was one. Its image stays, as do those of `rock image build`."""
        found = self.find(caller, text)
        if found is None:
            return False
        (self._templates / f"{found.id}.json").unlink(missing_ok=True)
        return True

    # ---- one build ----

    async def _run(self, build: Build, wanted: BuildRequest, uploads: dict[str, Path], caller: Caller) -> None:
        try:
            with tempfile.TemporaryDirectory(dir=self._folder(), prefix=".build-") as folder:
                tar = Path(folder) / "context.tar"
                await asyncio.to_thread(_merge, uploads, tar)
                await self._native(build, wanted, tar, caller)
                for tag in build.tags[1:]:
                    again = wanted.model_copy(update={"image_tag": self.image_of(build.template, f":{tag}")})
                    await self._native(build, again, tar, caller)  # its steps are cached
            self._save(build.template)
            build.status = "ready"
        except asyncio.CancelledError:
            build.status, build.problem = "error", "the server stopped"
            raise
        except RockError as error:
            build.status, build.problem = "error", str(error)
        except Exception as error:
            log.exception("build of template %s", build.template.name)
            build.status, build.problem = "error", str(unexpected(error))

    def _folder(self) -> Path:
        self._uploads.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._uploads

    def _save(self, template: Template) -> None:
        self._templates.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_file.replace(self._templates / f"{template.id}.json", json.dumps(template.__dict__), durable=True)

    async def _native(self, build: Build, wanted: BuildRequest, tar: Path, caller: Caller) -> None:
        """Build an image. RockError."""
        native = Sandbox(self._data, "", caller)
        spec = wanted.model_dump_json(exclude_none=True).encode()
        try:
            reply = await native.request("POST", ROUTES["build_image"].path, "", [], _frames(spec, tar))
            if reply.status >= 400:
                raise from_wire(orjson.loads(await reply.read()), reply.status)
            parser = FrameParser()
            async for chunk in reply.chunks():
                for kind, payload in parser.feed(chunk):
                    if kind is Frame.RESULT:
                        return
                    if kind is Frame.ERROR:
                        raise from_wire(orjson.loads(payload))
                    _add_lines(build, payload)
            raise InvalidConfig("the build ended without a result", hint="build again")
        finally:
            await native.close()


def _add_lines(build: Build, payload: bytes) -> None:
    for text in payload.decode("utf-8", "replace").splitlines():
        if len(build.lines) < _MOST_LINES:
            build.lines.append((time.time(), text[:4096]))


def _id_of(tenant: str, name: str) -> str:
    return f"tpl{hashlib.sha256(f'{tenant} {name}'.encode('utf-8', 'surrogatepass')).hexdigest()[:20]}"


def _hash_of(request: Request) -> str:
    name = request.path["hash"]
    if not _HASH.fullmatch(name):
        raise InvalidConfig(f"{name[:80]!r} is not a SHA-256 digest", hint="send 64 hexadecimal digits")
    return name


async def _frames(spec: bytes, tar: Path) -> AsyncGenerator[bytes]:
    yield pack_frame(Frame.RESULT, spec)
    with open(tar, "rb") as file:
        while part := await asyncio.to_thread(file.read, _CHUNK):
            yield pack_frame(Frame.STDOUT, part)


def _remove_old(folder: Path) -> None:
    for file in folder.glob("*.tar"):
        if time.time() - file.stat().st_mtime > _KEPT:
            file.unlink(missing_ok=True)


def _merge(uploads: dict[str, Path], target: Path) -> None:
    """One tar with the files of each upload below a folder with its hash. In a thread. InvalidConfig."""
    left = _LARGEST_CONTEXT
    with tarfile.open(target, "w") as merged:
        for name, file in uploads.items():
            try:
                with tarfile.open(file, "r:*") as source:
                    for member in source:
                        left -= member.size
                        parts = f"{member.name}/{member.linkname if member.islnk() else ''}".split("/")
                        if member.name.startswith("/") or ".." in parts or left < 0 or not (
                                member.isfile() or member.isdir() or member.issym()):  # fmt: skip
                            raise InvalidConfig(f"{member.name[:80]!r} of a COPY step cannot be copied",
                                                hint="copy files, folders and symbolic links, of less than 8 GiB")
                        member.name = f"{name}/{member.name}"
                        merged.addfile(member, source.extractfile(member) if member.isfile() else None)
            except (tarfile.TarError, EOFError, OSError) as error:
                raise InvalidConfig(f"the files of a COPY step are no tar: {error}", hint="upload them again") from None


