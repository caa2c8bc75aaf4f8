"""A whole server whose sandboxes are in memory: what a user's own tests rely on."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rock import errors
from rock.sync import Sandbox
from rock.testing import Call, FakeServer

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "testing.md"


async def upper(call: Call) -> int:
    while piece := await call.read():
        call.out(piece.upper())
        await call.flush()
    return 5


def raising(call: Call) -> int:
    raise ValueError("a mistake of the user")


async def stubborn(call: Call) -> int:
    try:
        await asyncio.sleep(1000)
    finally:
        call.files.write("/work/cleaned", b"yes")
    return 0


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    before = threading.active_count()
    with FakeServer({"upper": upper, "raising": raising, "stubborn": stubborn}) as made:
        yield made
    assert threading.active_count() <= before + 1  # a shared pool of the SDK's may have come


@pytest.fixture
def sandbox(server: FakeServer) -> Iterator[Sandbox]:
    with Sandbox(image="any:1", base_url=server.url, env={"FROM": "config"}) as made:
        yield made


SCRIPTS = {
    "echo a  'b  c' \"d $FROM\" ${NONE:-none}": "a b  c d config none\n",
    "x=1; f() { local x=2; echo $1; return 4; }; f in; echo $?": "in\n4\n",
    "for i in 1 2 3; do [ $i = 2 ] && continue; echo $i; done": "1\n3\n",
    "i=0; while [ $i -lt 3 ]; do i=$((i + 1)); done; echo $i $((7 / 2 * -2 % 4))": "3 -2\n",
    "case abc.txt in *.py) echo py;; a*.txt|b) echo txt;; *) echo other;; esac": "txt\n",
    "cat <<E\n$FROM `echo tick` $((1+1))\nE\ncat <<'E'\n$FROM\nE": "config tick 2\n$FROM\n",
    "printf '%s-%03d|' a 7 b 8; echo": "a-007|b-008|\n",
    "mkdir -p d/e; echo x > d/e/f; cp -r d g; mv g/e/f g/e/h; ls d/e g/e; echo d/* g/*/*; rm -r d g; ls":
        "d/e:\nf\n\ng/e:\nh\nd/e g/e/h\n",
    "seq 5 | sort -rn | head -n 2; seq 2 2 6 | tail -n +2 | wc -l": "5\n4\n2\n",
    "echo one two | { read a b; echo $b $a; }": "two one\n",
    "(cd /tmp; pwd); pwd": "/tmp\n/work\n",
    "echo err >&2 2>/dev/null; { echo out; echo gone >&2; } 2>/dev/null": "err\nout\n",
    "p=/a/b/c.tar.gz; echo ${p##*/} ${p%.*} ${#p} ${p#/a}": "c.tar.gz /a/b/c.tar 13 /b/c.tar.gz\n",
    "set -- 'a b' c; for x in \"$@\"; do echo \"<$x>\"; done; echo $# $1": "<a b>\n<c>\n2 a b\n",
    "touch 1.a 2.a .h; echo *.a '*.a' no*such; rm *.a .h": "1.a 2.a *.a no*such\n",
    "true && false || echo $?; ! false; echo $?": "1\n0\n",
    "sleep 0.05 & wait $!; echo $?; echo $(sleep 0.01; echo sub)": "0\nsub\n",
    "echo 'echo script $1 $0' > s; chmod +x s; sh s arg; rm s": "script arg s\n",
    "printf '#!/bin/sh\\necho ran $#' > s; chmod +x s; ./s a b; rm s": "ran 2\n",
    "trap 'echo bye' EXIT; echo hi | grep -o h": "h\n",
    "echo hello | upper; echo ${PIPE:-$?}": "HELLO\n5\n",
    "env -i A=1 env; X=2 sh -c 'echo $X'; echo ${X-unset}": "A=1\n2\nunset\n",
    "unterminated() { echo": "",
}


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_the_shell(sandbox: Sandbox, script: str) -> None:
    seen = sandbox.arun(script)
    if SCRIPTS[script]:
        assert seen.output == SCRIPTS[script]
    else:
        assert seen.exit_code == 2 and "syntax error" in seen.output
    assert sandbox.arun("echo usable").output.endswith("usable\n")


@pytest.mark.parametrize("script", [script for script, out in SCRIPTS.items() if out and "upper" not in script])
def test_a_real_shell_says_the_same(tmp_path: Path, script: str) -> None:
    """The expectations above are those of a real shell, not of ours."""
    argv, env = ["bash", "--norc", "-c", f"exec 2>&1; {script}"], {"FROM": "config", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=env)
    wanted = SCRIPTS[script].replace("/work\n", f"{tmp_path}\n")
    assert done.stdout == wanted + ("bye\n" if script.startswith("trap") else "")  # a session goes on


def test_programs(sandbox: Sandbox) -> None:
    done = sandbox.execute(["upper"], stdin="abc")
    assert (done.stdout, done.exit_code) == ("ABC", 5)
    done = sandbox.execute(["raising"])
    assert done.exit_code == 1 and "ValueError: a mistake of the user" in done.stderr
    assert sandbox.execute(["stubborn"], timeout=0.1).timed_out
    assert sandbox.fs.read("/work/cleaned") == b"yes"
    with pytest.raises(errors.NotFound, match="no-such"):
        sandbox.execute(["no-such"])


def test_what_it_lacks_is_refused(server: FakeServer, sandbox: Sandbox) -> None:
    with pytest.raises(errors.RockError, match="terminals"):
        sandbox.create_session(session="terminal", pty=(24, 80))
    with pytest.raises(errors.Unsupported, match="isolates nothing"):
        Sandbox(image="any:1", base_url=server.url, minimum_isolation="userns").start()
    for fields in ({"nofile": 100}, {"shm_size": "1m"}):
        with pytest.raises(errors.Unsupported, match="cannot enforce"):
            Sandbox(image="any:1", base_url=server.url, **fields).start()
    with pytest.raises(errors.RockError):
        sandbox.execute(["true"], user="alice")


def test_an_endless_loop_holds_up_nobody(server: FakeServer, sandbox: Sandbox) -> None:
    with Sandbox(image="any:1", base_url=server.url) as other:
        busy = sandbox.processes.start("while :; do :; done")
        assert other.arun("echo served").output == "served\n"
        assert sandbox.arun("while :; do :; done", timeout=0.3).timed_out
        busy.kill()
        assert sandbox.arun("echo usable").output == "usable\n"
        bomb = ":(){ :|:& };:; sleep 100"
        assert sandbox.execute(["sh", "-c", bomb], timeout=1.0).timed_out
        assert other.arun("echo served").output == "served\n"


def test_the_fixture_of_the_docs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "test_mine.py").write_text(next(code for code in blocks if "fixture" in code))
    argv = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest",
            str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
