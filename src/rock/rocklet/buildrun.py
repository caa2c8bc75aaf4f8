"""One RUN of a Dockerfile, in its sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from rock.errors import CommandFailed, CommandTimeout
from rock.rocklet.streams import Capped, Reader
from rock.runtime.base import Files, Handle, Program, Runtime
from rock.runtime.image.dockerfile import Instruction, refuse

_TAIL = 16 << 10  # bytes of a failed RUN's output in its error
_SCRIPT = "/dev/shm/rock-run"  # in memory, and so in no layer
# Arguments that every build has, and that make no difference to what is built
PREDEFINED = frozenset(
    form for name in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for form in (name, name.lower())
)  # fmt: skip


class Flow:
    """Whether the output of what runs is taken now: the client may be slow."""

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
    """A RUN in a sandbox that is there for it alone. timeout: seconds."""

    def __init__(
        self, runtime: Runtime, handle: Handle, timeout: float, tell: Callable[[bytes], None], flow: Flow
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
    """(argv, a script to be put where argv says) of a RUN."""
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
