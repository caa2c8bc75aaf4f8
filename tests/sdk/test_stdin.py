"""Standard input and output as bytes: small and streamed inputs, whole characters, errors of the input."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from rock import Sandbox as Asynchronous
from rock import errors
from rock.sync import Sandbox

EVERY = bytes(range(256))


@pytest.fixture
def box(server: Any) -> Iterator[Sandbox]:
    with Sandbox("host", memory="512m", cpus=1.0) as made:
        yield made


@pytest.mark.parametrize("data", [EVERY, "text é\n", "", b"", b"plain", bytearray(b"\xff\xfe")])
def test_small_input_arrives_byte_for_byte(box: Sandbox, data: Any) -> None:
    result = box.exec("cat", stdin=data)
    expected = data.encode() if isinstance(data, str) else bytes(data)
    assert (result.stdout_bytes, result.exit_code) == (expected, 0)


def test_large_and_file_inputs_are_streamed(box: Sandbox) -> None:
    data = EVERY * (12 << 10)  # 3 MiB
    for source in (data, io.BytesIO(data), (data[i : i + 70_000] for i in range(0, len(data), 70_000))):
        result = box.exec("sha256sum | cut -c1-64", stdin=source)
        assert result.exit_code == 0, result
        import hashlib

        assert result.stdout.strip() == hashlib.sha256(data).hexdigest()
    assert box.processes.list() == []


def test_an_endless_input_ends_with_its_program(box: Sandbox) -> None:
    result = box.exec("head -1", stdin=itertools.repeat(b"y\n"), timeout=60)
    assert (result.stdout, result.exit_code) == ("y\n", 0)


def test_an_input_that_never_comes_does_not_keep_the_call(box: Sandbox) -> None:
    class Silent:
        def read(self, size: int) -> bytes:
            time.sleep(600)
            return b""

    began = time.monotonic()
    assert box.exec("exit 3", stdin=Silent(), timeout=60).exit_code == 3  # type: ignore[arg-type]
    assert time.monotonic() - began < 30


def test_an_error_of_the_input_kills_the_program_and_is_raised(box: Sandbox) -> None:
    def failing() -> Iterator[bytes]:
        yield b"one\n"
        raise ZeroDivisionError("a mistake of the user")

    with pytest.raises(ZeroDivisionError, match="a mistake"):
        box.exec("cat; sleep 600", stdin=failing())
    assert box.processes.list() == []


def test_a_timeout_ends_a_program_with_a_streamed_input(box: Sandbox) -> None:
    result = box.exec("sleep 600", stdin=iter([b"x"]), timeout=1.0)
    assert result.timed_out and result.exit_code is None and "1 s" in result.failure_reason
    with pytest.raises(errors.CommandTimeout):
        box.exec("sleep 600", stdin=iter([b"x"]), timeout=1.0, check=True)


def test_a_conversation_over_a_streamed_input(box: Sandbox) -> None:
    def slowly() -> Iterator[str]:
        for word in ("a\n", "b\n"):
            yield word
            time.sleep(0.5)

    began, times = time.monotonic(), []
    with box.stream("while read x; do echo got $x; done", stdin=slowly()) as output:
        for chunk in output:
            times.append((chunk.text, time.monotonic() - began))
    assert "".join(text for text, _ in times) == "got a\ngot b\n"
    assert times[0][0] == "got a\n"  # before the second line was written


def test_asynchronous_inputs(server: Any) -> None:
    async def numbers() -> AsyncIterator[bytes]:
        for number in itertools.count():
            yield b"%d\n" % number

    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        raise KeyError("mine")

    async def main() -> None:
        async with Asynchronous("host", memory="512m", cpus=1.0) as sandbox:
            result = await sandbox.exec("head -2", stdin=numbers(), timeout=60)
            assert result.stdout == "0\n1\n"
            assert (await sandbox.exec("cat", stdin=iter([EVERY]))).stdout_bytes == EVERY
            with pytest.raises(KeyError):
                await sandbox.exec("cat", stdin=failing(), timeout=60)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await sandbox.exec("cat > /dev/null", stdin=itertools.repeat(b"y" * 1000))
            assert await sandbox.processes.list() == []

    asyncio.run(main())


def test_a_stream_splits_no_character(box: Sandbox) -> None:
    script = r"printf '\303'; sleep 0.3; printf '\251\n'; printf '\303' >&2"
    with box.stream(script) as output:
        chunks = list(output)
    assert "".join(chunk.text for chunk in chunks if chunk.kind == "stdout") == "é\n"
    assert "".join(chunk.text for chunk in chunks if chunk.kind == "stderr") == "\ufffd"
    assert b"".join(chunk.data for chunk in chunks if chunk.kind == "stdout") == "é\n".encode()


def test_results_have_text_and_bytes(box: Sandbox) -> None:
    result = box.exec(r"printf 'a\377'; printf 'b\376' >&2")
    assert (result.stdout, result.stderr, result.output) == ("a\ufffd", "b\ufffd", "a\ufffdb\ufffd")
    assert (result.stdout_bytes, result.stderr_bytes, result.output_bytes) == (b"a\xff", b"b\xfe", b"a\xffb\xfe")
    seen = box.run(r"printf 'a\377'; printf 'b\376' >&2", separate=True)
    assert (seen.stdout, seen.stdout_bytes, seen.stderr_bytes) == ("a\ufffd", b"a\xff", b"b\xfe")


LONG = "A" * ((16 << 20) + 4)


@pytest.mark.parametrize(
    "fields", [{"stdin_base64": "no!"}, {"stdin": "a", "stdin_base64": "YQ=="}, {"stdin_base64": LONG}]
)
def test_a_server_rejects_a_malformed_input(box: Sandbox, fields: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidConfig, match="stdin"):
        box._transport.json("POST", box._path("execute"), {"command": "cat", **fields})
