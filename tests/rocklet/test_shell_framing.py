"""The framing against real shells: whatever a command says, the next one starts in step."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rock.rocklet.commands import shell_protocol

SHELLS = {"bash": (shell_protocol.BASH, "/bin/bash"), "sh": (shell_protocol.SH, "/bin/sh")}


class Harness:
    """A real shell on pipes, driven by the pure framing alone."""

    def __init__(self, dialect: shell_protocol.Dialect, path: str) -> None:
        self.dialect = dialect
        script_read, self.script = os.pipe()
        self.status, status_write = os.pipe()
        self.output, output_write = os.pipe()
        self.errors, errors_write = os.pipe()

        def place() -> None:
            os.dup2(status_write, dialect.status)
            os.dup2(errors_write, dialect.errors)

        self.process = subprocess.Popen(
            dialect.argv(path),
            stdin=script_read,
            stdout=output_write,
            stderr=subprocess.STDOUT,
            preexec_fn=place,
            close_fds=False,
            cwd="/",
            env={"PATH": os.environ["PATH"], **dialect.environment()},
        )
        for fd in (script_read, status_write, output_write, errors_write):
            os.close(fd)
        os.set_blocking(self.output, False)
        os.set_blocking(self.errors, False)
        self.parser = shell_protocol.ReportParser()
        self.token = 0
        self.previous = 0
        self.pending: list[shell_protocol.Report] = []
        self._send(shell_protocol.preamble(dialect, self._next(), cwd="/", sources=[]))
        assert isinstance(self._report(), shell_protocol.Done)

    def _next(self) -> int:
        self.token += 1
        return self.token

    def _send(self, data: bytes) -> None:
        os.write(self.script, data)

    def _report(self, seconds: float = 10.0) -> shell_protocol.Report | None:
        """The next report that concerns us; None when the shell has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self.pending:
                report = self.pending.pop(0)
                if isinstance(report, shell_protocol.Restarted) or report.token == self.token:
                    return report
            if select.select([self.status], [], [], 0.05)[0]:
                data = os.read(self.status, 65536)
                self.pending += self.parser.feed(data)
                if not data:
                    return None
        raise AssertionError("no report in time")

    def _read(self, fd: int) -> bytes:
        try:
            return os.read(fd, 1 << 20)
        except BlockingIOError:
            return b""

    def run(self, command: str, separate: bool = False) -> tuple[int | None, bytes]:
        self._send(shell_protocol.frame(self.dialect, command, self._next(), previous=self.previous, separate=separate))
        report = self._report()
        output = self._read(self.output)
        if report is None:
            return None, output
        if isinstance(report, shell_protocol.Restarted):
            self._send(shell_protocol.restore(self.dialect, self._next()))
            assert isinstance(self._report(), shell_protocol.Done)
        self.previous = report.code
        return report.code, output

    def close(self) -> int:
        self.process.kill()
        code = self.process.wait()
        for fd in (self.script, self.status, self.output, self.errors):
            os.close(fd)
        return code


@pytest.fixture(params=sorted(SHELLS))
def any_shell(request: pytest.FixtureRequest) -> Iterator[Harness]:
    harness = Harness(*SHELLS[request.param])
    yield harness
    harness.close()


@pytest.fixture
def bash() -> Iterator[Harness]:
    harness = Harness(*SHELLS["bash"])
    yield harness
    harness.close()


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("echo hi", 0, b"hi\n"),
        ("false", 1, b""),
        ("(exit 42)", 42, b""),
        ("cat <<E\na $((1+1))\nE", 0, b"a 2\n"),
        ("cat", 0, b""),
        ("read x; echo $?", 0, b"1\n"),
        ("printf 'D 0 / 1\\000R 7\\000'", 0, b"D 0 / 1\0R 7\0"),
        ("echo a; echo b >&2; echo c", 0, b"a\nb\nc\n"),
        ("", 0, b""),
        ("# nothing", 0, b""),
        ("echo 'it''s'", 0, b"its\n"),
        ("for i in 1 2\ndo echo $i\ndone", 0, b"1\n2\n"),
    ],
)
def test_commands(any_shell: Harness, command: str, code: int, output: bytes) -> None:
    assert any_shell.run(command) == (code, output)
    assert any_shell.run("echo next") == (0, b"next\n")


@pytest.mark.parametrize(
    "command", ["echo 'unbalanced", 'echo "unbalanced', "if true", "echo $(", "}", "do", "(", "a() {"]
)
def test_a_syntax_error_is_an_error_at_once(any_shell: Harness, command: str) -> None:
    code, output = any_shell.run(command)
    assert code not in (0, None)
    assert output
    assert any_shell.run("echo next") == (0, b"next\n")


def test_state_is_kept(any_shell: Harness) -> None:
    any_shell.run("x=5; export y=6; cd /tmp; f() { echo f$1; }")
    assert any_shell.run("echo $x $y $PWD; f 1") == (0, b"5 6 /tmp\nf1\n")


def test_the_status_of_the_command_before(any_shell: Harness) -> None:
    any_shell.run("(exit 3)")
    assert any_shell.run("echo $?") == (0, b"3\n")
    assert any_shell.run("echo $?") == (0, b"0\n")


def test_streams_apart(any_shell: Harness) -> None:
    assert any_shell.run("echo out; echo err >&2", separate=True) == (0, b"out\n")
    assert any_shell._read(any_shell.errors) == b"err\n"


@pytest.mark.parametrize(
    "ender", ["set -e; false; echo no", "set -u; echo $nope; echo no", ": ${nope:?is missing}; echo no"]
)
def test_bash_survives_what_ends_a_script(bash: Harness, ender: str) -> None:
    bash.run("x=5; f() { echo f$x; }; alias ll='echo alias'; cd /tmp; arr=(1 2 3)")
    code, output = bash.run(ender)
    assert code == 1
    assert b"no\n" not in output
    assert bash.run("set +eu; f; echo $PWD ${arr[2]}") == (0, b"f5\n/tmp 3\n")
    assert bash.run("ll") == (0, b"alias\n")


def test_exit_ends_the_shell_with_its_status(any_shell: Harness) -> None:
    assert any_shell.run("exit 7")[0] is None
    assert any_shell.process.wait(5) == 7


def test_exit_without_a_number_has_the_last_status(bash: Harness) -> None:
    assert bash.run("false; exit")[0] is None
    assert bash.process.wait(5) == 1


def test_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        shell_protocol.frame(shell_protocol.BASH, "echo a\0b", 1)


_TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60)


@pytest.fixture(scope="module", params=sorted(SHELLS))
def long_lived(request: pytest.FixtureRequest) -> Iterator[Harness]:
    harness = Harness(*SHELLS[request.param])
    yield harness
    harness.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=_TEXT)
def test_any_text_passes_through_one_shell_exactly(long_lived: Harness, text: str) -> None:
    assert long_lived.run(f"printf %s {shell_protocol.quote(text)}") == (0, text.encode())


@settings(max_examples=100, deadline=None)
@given(reports=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255), _TEXT), max_size=5), data=st.data())
def test_reports_in_any_portions(reports: list[tuple[int, int, str]], data: st.DataObject) -> None:
    wire = b"".join(b"D %d %s %d\0" % (c, cwd.encode(), t) for t, c, cwd in reports)
    parser = shell_protocol.ReportParser()
    seen: list[shell_protocol.Report] = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        seen += parser.feed(wire[:size])
        wire = wire[size:]
    assert seen == [shell_protocol.Done(t, c, cwd) for t, c, cwd in reports]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_the_parser_takes_anything(junk: bytes) -> None:
    parser = shell_protocol.ReportParser()
    list(parser.feed(junk))
    assert [r for r in parser.feed(b"\0D 2 /x 1\0") if isinstance(r, shell_protocol.Done) and r.cwd == "/x"]


def test_a_trace_is_not_seen(any_shell: Harness) -> None:
    """Under `set -x` neither, whether it is set or taken away."""
    any_shell.run("set -x")
    for spec, told in (("00-ab", b"00-ab"), (None, b"none")):
        any_shell._send(shell_protocol.trace(spec))
        code, output = any_shell.run("echo ${TRACEPARENT:-none}")
        assert (code, output.splitlines()[-1]) == (0, told)
        assert b"export" not in output and b"unset" not in output


def test_a_shell_that_replaced_itself_has_its_standard_error(bash: Harness) -> None:
    bash.run("X=1; set -e; false")
    assert bash.run("echo $X >&2") == (0, b"1\n")
