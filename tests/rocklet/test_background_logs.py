"""The logs of background processes: what is read while a log grows."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.runtime.boxes import namespace_box, run, until

from rock.rocklet.commands import programs
from rock.rocklet.commands.programs import Background
from rock.rocklet.durability.checksums import Checksums


def test_a_log_that_grows_while_it_is_read_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first output arrives after the file was read and before the result is returned."""
    gate = tmp_path / "gate"

    def slow(path: Path, offset: int, limit: int) -> bytes:
        data = _read_at(path, offset, limit)
        if not gate.exists():
            gate.touch()
            time.sleep(0.5)
        return data

    _read_at = programs._read_at
    monkeypatch.setattr(programs, "_read_at", slow)

    async def main() -> None:
        async with namespace_box(tmp_path / "box") as box:
            process = await box.spawn("sh", "-c", "read line; echo $line", stdin="pipe")
            folder = tmp_path / "logs"
            folder.mkdir()
            marks = Checksums(tmp_path / "marks")
            background = Background("p", "sh", process, folder, marks=marks)
            try:
                reading = asyncio.ensure_future(background.read("stdout", 0, 100, 0))
                await until(gate.exists)
                await background.write(b"hello\n", True)
                await until(lambda: background.info.stdout_size == 6)
                data, more = await reading
                if not data:
                    assert more
                    data, _ = await background.read("stdout", 0, 100, 5)
                assert data == b"hello\n"
            finally:
                await background.forget()
                marks.close()

    run(main())
