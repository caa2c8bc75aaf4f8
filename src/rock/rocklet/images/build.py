"""Builds of images from Dockerfiles: each RUN runs in a sandbox of its own, each COPY is written directly to a layer.

    stages     those that the target needs, in order            dockerfile.py
    settings   ENV, WORKDIR, USER, ... change only the image's settings      build_plan.py
    layers     RUN, COPY, ADD, and a WORKDIR that does not exist yet

Each layer has a key: a digest of the layers below, the instruction after variable substitution, and the copied files. A
step is stored as an image named after its key, so the next build finds it, a crash leaves no partial result, and `rock
image prune` removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rock.errors import CommandFailed, CommandTimeout, InvalidConfig, RockError, Unsupported
from rock.images import dockerfile
from rock.images.copy import Copy, Owner, Source, digest_of, is_archive, owner_of, sources
from rock.images.derive import unpack_context, unpack_written
from rock.images.dockerfile import Instruction, Words, at_line, refuse, unsupported
from rock.images.layers.store import Fill
from rock.images.layers.views import Merged
from rock.images.layers.writer import LayerWriter
from rock.images.records import Lease, RootFS
from rock.images.registry.reference import BUILD_STEPS, new_name
from rock.images.store import PATH, ImageStore
from rock.protocol.images import BuildRequest, BuiltImage
from rock.protocol.sandbox import SandboxConfig
from rock.rocklet.commands.output import Capped, Reader
from rock.rocklet.images.build_plan import BuildScope, Plan, Settings, apply
from rock.rocklet.images.commits import written
from rock.rocklet.images.store import Images
from rock.rocklet.runtimes import Runtimes
from rock.runtime.base import Files, Handle, Program, Runtime, Snapshots

_LIMIT = 64 << 30  # bytes that one RUN may write
_VERSION = "1"  # version of the keys: another version invalidates all cached steps

Tell = Callable[[bytes], None]


@dataclass
class _State:
    """The current state of a stage. named: the name under which `rootfs` with `settings` is in the store; "" where it
    is not."""

    rootfs: RootFS
    key: str
    settings: Settings
    named: str = ""
    args: dict[str, str] = field(default_factory=dict)

    @property
    def below(self) -> RootFS:
        """The image that the next layer is based on."""
        return self.settings.over(self.rootfs)


class Build:
    """One build of a Dockerfile."""

    def __init__(
        self, images: Images, runtimes: Runtimes, spec: BuildRequest, plan: Plan, context: Merged, folder: Path,
        tell: Tell, flow: BuildOutput, tenant: str = "",
    ) -> None:  # fmt: skip
        self._images = images
        self._runtimes = runtimes
        self._store: ImageStore = images.store
        self._spec = spec
        self._plan = plan
        self._context = context
        self._folder = folder
        self._tell = tell
        self._flow = flow
        self._tenant = tenant
        self._done: dict[int, _State] = {}
        self._leases: list[Lease] = []
        self._steps = self._cached = self._ran = 0
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        for lease in self._leases:
            lease.close()

    async def run(self) -> BuiltImage:
        """Build the target stage and the stages that it needs."""
        wanted = self._plan.wanted(self._spec.target)
        for number in self._plan.needed(wanted):
            await self._stage(number)
        for name in sorted(set(self._spec.build_args) - self._plan.args_used - PREDEFINED):
            self._line(f"warning: no ARG {name} takes the build argument of that name")
        state = self._done[wanted]
        settings = replace(state.settings, labels={**state.settings.labels, **self._spec.labels})
        record = await asyncio.to_thread(
            self._store.extend, self._spec.image_tag, settings.over(state.rootfs), owner=self._tenant)
        await asyncio.to_thread(self._store.came, record.name)
        return BuiltImage(name=record.name, digest=record.digest, size=record.size, layers=len(record.layers),
                          steps=self._steps, cached=self._cached, ran=self._ran)  # fmt: skip

    # ---- stages ----

    async def _stage(self, number: int) -> None:
        stage = self._plan.stages[number]
        base = self._plan.base(stage)
        self._line(f"FROM {base}" + (f" AS {stage.name}" if stage.name else ""))
        try:
            state = await self._begin(base, number)
        except RockError as error:
            raise at_line(stage.line, error) from None
        if state.settings.other.get("OnBuild"):
            raise unsupported(stage.line, f"image {base} has ONBUILD instructions", "write out what they do")
        for instruction in stage.instructions:
            self._steps += 1
            try:
                await self._step(state, instruction)
            except RockError as error:
                raise at_line(instruction.line, error) from None
            except OSError as error:
                raise at_line(instruction.line, InvalidConfig(f"the instruction {instruction.keyword} failed: {error}",
                                                              hint="check the files of the build context and the disk "
                                                                   "of the server")) from None
        self._done[number] = state

    async def _begin(self, base: str, number: int) -> _State:
        if base == "scratch":
            rootfs = RootFS(digest="scratch", layers=(), name="scratch", env={"PATH": PATH})
            return _State(rootfs, _key(_VERSION, "scratch"), Settings.of(rootfs))
        other = self._plan.number(base, number, by_number=False)
        if other is not None:
            state = self._done[other]
            return _State(state.rootfs, state.key, replace(state.settings, own_cmd=False), state.named)
        rootfs = await self._image(base)
        return _State(rootfs, _key(_VERSION, rootfs.digest), Settings.of(rootfs))

    async def _image(self, name: str) -> RootFS:
        """An image of the store, or of its registry, which is protected from removal until the build ends."""
        spec = self._spec
        config = SandboxConfig(image=name, pull=spec.pull, registry_username=spec.registry_username,
                               registry_password=spec.registry_password,
                               public_registries=spec.public_registries)  # fmt: skip
        await self._images.prepare(config, lambda text: self._tell_soon(f"  {text}\n"))
        rootfs = await asyncio.to_thread(self._store.resolve, name)
        await self._hold(rootfs)
        return rootfs

    async def _hold(self, rootfs: RootFS) -> None:
        if rootfs.layers:
            self._leases.append(await asyncio.to_thread(self._store.lease, rootfs))

    async def _step(self, state: _State, instruction: Instruction) -> None:
        self._line(f"{instruction.keyword} {instruction.text}")
        place = BuildScope(state.args, state.settings.env, self._plan.escape)
        if instruction.keyword == "ARG":
            state.args = self._plan.arguments(instruction, place)
        elif instruction.keyword == "RUN":
            await self._run(state, instruction)
        elif instruction.keyword in ("COPY", "ADD"):
            await self._copy(state, instruction, place.words(instruction.line))
        else:
            settings, warning = apply(instruction, state.settings, place)
            if warning:
                self._line(f"warning: line {instruction.line}: {warning}")
            if instruction.keyword == "WORKDIR":
                await self._workdir(state, settings.cwd)
            if settings != state.settings:
                state.settings, state.named = settings, ""
                state.key = _key(state.key, "settings", repr(settings))

    # ---- steps that make a layer ----

    async def _taken_over(self, state: _State, key: str) -> bool:
        """Whether the layer of `key` exists from an earlier build; if so, the stage uses it."""
        name = BUILD_STEPS + key
        if not self._spec.use_cache or not await asyncio.to_thread(self._store.has, name):
            return False
        try:
            rootfs = await asyncio.to_thread(self._store.resolve, name)
            await self._hold(rootfs)
        except RockError:  # it was removed in this moment
            return False
        state.rootfs, state.key, state.named = rootfs, key, name
        self._cached += 1
        self._line("  taken over from a former build")
        return True

    async def _add(self, state: _State, key: str, base: RootFS, fill: Fill, what: str) -> None:
        """Make the layer of `key`, over `base`, and store it."""

        def make() -> RootFS:
            self._store.extend(BUILD_STEPS + key, base, fill, what)
            return self._store.resolve(BUILD_STEPS + key)

        state.rootfs = await asyncio.to_thread(make)
        await self._hold(state.rootfs)
        state.key, state.named = key, BUILD_STEPS + key

    async def _copy(self, state: _State, instruction: Instruction, words: Words) -> None:
        array = instruction.array
        listed = [words.one(item) for item in array] if array is not None else words.split(instruction.text)
        inline = {f"<<{heredoc.name}": heredoc for heredoc in instruction.heredocs}
        names = [item for item in listed[:-1] if item.replace("<<-", "<<") not in inline]
        if len(listed) < 2:
            raise refuse(instruction.line, f"{instruction.keyword} has no target", "write SOURCE ... TARGET")
        for name in names:
            if instruction.keyword == "ADD" and ("://" in name or name.startswith("git@")):
                raise unsupported(instruction.line, f"ADD {name}: nothing is fetched from elsewhere",
                                  "put the file into the context, or fetch it in a RUN with a network")
        target = listed[-1] if listed[-1].startswith("/") else f"{state.settings.cwd.rstrip('/')}/{listed[-1]}"
        target = os.path.normpath(target) + ("/" if target.endswith(("/", "/.")) or listed[-1] == "." else "")
        tree, owner = await self._tree(instruction)
        found = await asyncio.to_thread(sources, tree, names)
        below = self._merged(state.rootfs)
        if "chown" in instruction.flags:
            owner = await asyncio.to_thread(owner_of, words.one(instruction.flags["chown"]), below)
        mode = _mode(words.one(instruction.flags["chmod"]), instruction.line) if "chmod" in instruction.flags else None
        texts = [(heredoc.name, words.inner(heredoc.text) if heredoc.expand else heredoc.text)
                 for heredoc in instruction.heredocs]
        content = await asyncio.to_thread(digest_of, found)
        key = _key(state.key, instruction.keyword, repr((target, owner, mode, texts, [s.base for s in found])), content)

        def fill(writer: LayerWriter) -> str:
            copy = Copy(below, writer, owner, mode, _refused_of(state.rootfs))
            if len(found) + len(texts) > 1 and not target.endswith("/"):
                raise InvalidConfig("several files are copied to a target that does not end with /",
                                    hint="end the target with /, as in COPY a.txt b.txt /data/")
            _put(copy, found, texts, os.fsencode(target), unpack=instruction.keyword == "ADD")
            return copy.digest

        if not await self._taken_over(state, key):
            await self._add(state, key, state.below, fill, f"copying for line {instruction.line}")

    async def _tree(self, instruction: Instruction) -> tuple[Merged, Owner | None]:
        """The source tree of a COPY, and the default owner of its files."""
        source = instruction.flags.get("from", "")
        if not source:
            return self._context, Owner(0, 0)
        number = self._plan.number(source)
        if number is not None and number in self._done:
            rootfs = self._done[number].rootfs
        else:
            rootfs = await self._image(source)
        if rootfs.binds:
            raise unsupported(instruction.line, f"image {source} shows this machine's own system: nothing is copied "
                              "from it", "use an image that was imported, pulled or built from scratch")  # fmt: skip
        return self._merged(rootfs), None

    def _merged(self, rootfs: RootFS) -> Merged:
        if rootfs.layers:
            return Merged(rootfs.layers)
        nothing = self._folder / "nothing"
        nothing.mkdir(exist_ok=True)
        return Merged([str(nothing)])

    async def _workdir(self, state: _State, cwd: str) -> None:
        below = self._merged(state.rootfs)
        path = os.fsencode(cwd)
        there = await asyncio.to_thread(below.find, path)
        if there is not None and there.is_folder:
            return
        if (shown := _shown(state.rootfs, cwd)) is not None and os.path.isdir(shown):
            return
        owner = await asyncio.to_thread(owner_of, state.settings.user, below) if state.settings.user != "root" else None

        def fill(writer: LayerWriter) -> str:
            copy = Copy(below, writer, owner, None, _refused_of(state.rootfs))
            copy.folder(path)
            return copy.digest

        key = _key(state.key, "WORKDIR", cwd, repr(owner))
        if not await self._taken_over(state, key):
            await self._add(state, key, state.below, fill, f"making {cwd}")

    # ---- RUN ----

    async def _run(self, state: _State, instruction: Instruction) -> None:
        network = instruction.flags.get("network", "default")
        if network not in ("default", "none") and network != self._spec.network:
            raise unsupported(instruction.line, f"RUN --network={network}: this build has network {self._spec.network}",
                              f"build with --network {network}")  # fmt: skip
        network = self._spec.network if network == "default" else network
        argv, script = program(instruction, state.settings.shell)
        args = {name: value for name, value in self._spec.build_args.items() if name in PREDEFINED} | state.args
        told = {name: value for name, value in args.items() if name not in PREDEFINED}
        key = _key(state.key, "RUN", repr((argv, script, sorted(told.items()), network)))
        if await self._taken_over(state, key):
            return
        if not state.named:
            state.named = BUILD_STEPS + _key(state.key, "before", repr(state.settings))
            await asyncio.to_thread(self._store.extend, state.named, state.below)
        config = self._spec.limits(state.named).model_copy(update={"network": network})
        runtime = self._runtimes.of(config)
        if not isinstance(runtime, Snapshots) or not isinstance(runtime, Files):
            raise Unsupported(f"runtime {self._runtimes.default!r} cannot build images",
                              hint="start the server with the namespace runtime; `rock doctor` shows what it needs")
        handle = await runtime.create(f"build-{uuid.uuid4().hex[:12]}", config)
        try:
            self._ran += 1
            run = Run(runtime, handle, self._spec.timeout, self._tell, self._flow)
            await run.execute(argv, script, args, network)
            tar = self._folder / "written.tar"
            with contextlib.suppress(FileNotFoundError):
                tar.unlink()
            files = await written(runtime, handle, _LIMIT, tar)
            base = state.settings.over(runtime.image(handle))
        finally:
            await asyncio.shield(runtime.destroy(handle))
        await self._add(state, key, base, lambda writer: unpack_written(tar, writer, files.digest), "unpacking")

    def _line(self, text: str) -> None:
        self._tell(f"{text}\n".encode("utf-8", "surrogateescape"))

    def _tell_soon(self, text: str) -> None:
        self._loop.call_soon_threadsafe(self._tell, text.encode())


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:40]


def _put(copy: Copy, found: Sequence[Source], texts: Sequence[tuple[str, str]], target: bytes, unpack: bool) -> None:
    archives = [source for source in found if unpack and is_archive(source.node)]
    copy.put([source for source in found if source not in archives], target)
    for source in archives:
        copy.unpack(source, target)
    for name, text in texts:
        copy.text(text.encode("utf-8", "surrogateescape"), target, name.encode())


def _mode(text: str, line: int) -> int:
    if not re.fullmatch(r"[0-7]{3,4}", text, re.ASCII):
        raise unsupported(line, f"--chmod={text[:40]}: only octal modes are supported", "write it like 755")
    return int(text, 8)


def _shown(rootfs: RootFS, path: str) -> str | None:
    """The path on this machine, for an image that shows the machine's own system."""
    for bind in rootfs.binds:
        if path == bind.target or path.startswith(f"{bind.target.rstrip('/')}/"):
            return bind.source + path.removeprefix(bind.target)
    return None


def _refused_of(rootfs: RootFS) -> Callable[[tuple[bytes, ...]], None]:
    """Raises for paths below the folders of this machine that an image shows."""

    def look(parts: tuple[bytes, ...]) -> None:
        path = "/" + "/".join(os.fsdecode(part) for part in parts)
        if _shown(rootfs, path) is not None:
            raise Unsupported(f"{path} is this machine's own in image {rootfs.name}, and cannot be part of an image",
                              hint="copy elsewhere, or build on an image that was imported or pulled")  # fmt: skip

    return look


# ---- builds of this machine ----

_AT_ONCE = 2


class Builds:
    """The builds of this machine, at most two at a time."""

    def __init__(self, images: Images, runtimes: Runtimes) -> None:
        self._images = images
        self._runtimes = runtimes
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[BuiltImage]] = set()

    async def close(self) -> None:
        """Cancel the running builds; their partial results are removed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def build(
        self, spec: BuildRequest, tar: Path, folder: Path, tell: Tell, flow: BuildOutput, tenant: str = ""
    ) -> BuiltImage:
        """Build from the context in `tar`, in `folder`, which the caller removes. Cancelling the caller ends the build.
        tenant: of the request; "" is the server's owner.

        InvalidConfig and Unsupported for the Dockerfile, CommandFailed and CommandTimeout for a RUN, ImageError for
        images; each names its line.
        """
        task = asyncio.create_task(self._build(spec, tar, folder, tell, flow, tenant), name=f"build-{spec.image_tag}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    async def _build(
        self, spec: BuildRequest, tar: Path, folder: Path, tell: Tell, flow: BuildOutput, tenant: str
    ) -> BuiltImage:
        new_name(spec.image_tag)
        plan = Plan(dockerfile.parse(spec.dockerfile), spec.build_args)
        if self._gate.locked():
            tell(b"waiting for another build to end\n")
        async with self._gate:
            context = folder / "context"
            await asyncio.to_thread(unpack_context, tar, context)
            build = Build(self._images, self._runtimes, spec, plan, Merged([str(context)]), folder, tell, flow, tenant)
            try:
                return await build.run()
            finally:
                build.close()


# ---- one RUN ----

_TAIL = 16 << 10  # bytes of a failed RUN's output in its error
_SCRIPT = "/dev/shm/rock-run"  # in memory, and therefore in no layer
# Predefined arguments of every build, which do not affect the result.
PREDEFINED = frozenset(
    form for name in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for form in (name, name.lower())
)  # fmt: skip


class BuildOutput:
    """Flow control of the output of a RUN: the client may be slow."""

    def __init__(self) -> None:
        self._reader: Reader | None = None
        self._paused = False

    def use(self, reader: Reader | None) -> None:
        self._reader = reader
        if reader is not None and self._paused:
            reader.pause()

    def pause(self) -> None:
        self._paused = True
        if self._reader is not None:
            self._reader.pause()

    def resume(self) -> None:
        self._paused = False
        if self._reader is not None:
            self._reader.resume()


class Run:
    """A RUN in a sandbox of its own. timeout: seconds."""

    def __init__(
        self, runtime: Runtime, handle: Handle, timeout: float, tell: Callable[[bytes], None], flow: BuildOutput
    ) -> None:
        self._runtime = runtime
        self._handle = handle
        self._timeout = timeout
        self._tell = tell
        self._flow = flow

    async def execute(self, argv: Sequence[str], script: str | None, args: Mapping[str, str], network: str) -> None:
        """Run it to its end. script: the text of the program that argv names. CommandFailed, CommandTimeout."""
        if script is not None:
            await self._put(script)
        process = await self._runtime.spawn(self._handle, Program(list(argv), env=args, stderr="stdout"))
        tail = Capped(_TAIL)

        def take(data: bytes) -> None:
            tail.add(data)
            self._tell(data)

        assert process.stdout is not None
        reader = Reader(process.stdout, take)
        self._flow.use(reader)
        try:
            async with asyncio.timeout(self._timeout):
                status = await process.wait()
            reader.drain()
        except TimeoutError:
            await process.kill_tree()
            raise CommandTimeout(f"RUN took longer than {self._timeout:g} s and was killed",
                                 details=_output(tail)) from None  # fmt: skip
        finally:
            self._flow.use(None)
            reader.close()
            process.close()
        if status.code != 0:
            how = f"status {status.code}" if status.code is not None else f"signal {status.signal}"
            hint = "RUN has no network in this build: build with --network host where it needs one" \
                if network == "none" else None  # fmt: skip
            raise CommandFailed(f"RUN ended with {how}", hint=hint, details=_output(tail))

    async def _put(self, script: str) -> None:
        assert isinstance(self._runtime, Files)
        fd, token = await self._runtime.open_write(self._handle, _SCRIPT, mode=0o755)
        with open(fd, "wb") as file:
            file.write(script.encode("utf-8", "surrogateescape"))
        await self._runtime.commit_write(self._handle, token)


def _output(tail: Capped) -> dict[str, str]:
    return {"output": tail.take()[0].decode("utf-8", "replace")}


def program(instruction: Instruction, shell: Sequence[str]) -> tuple[list[str], str | None]:
    """(argv, a script to be stored at the path in argv) of a RUN."""
    if instruction.array is not None:
        if not instruction.array:
            raise refuse(instruction.line, "RUN [] runs nothing")
        return list(instruction.array), None
    text, heredocs = instruction.text, instruction.heredocs
    if len(heredocs) == 1 and len(text.split()) == 1:
        content = heredocs[0].text
        return ([_SCRIPT], content) if content.startswith("#!") else ([*shell, content], None)
    for heredoc in heredocs:
        text += f"\n{heredoc.text}{heredoc.name}"
    return [*shell, text], None
