"""Sessions through the SDK, HTTP and a real sandbox: the true status, exact output, and usable after anything."""

from __future__ import annotations

import re
import threading
import time

import pytest
from tests.conftest import IMAGE, RunningServer, running

from rock.actions import Action, BashAction, CreateBashSessionRequest
from rock.errors import CommandFailed, CommandTimeout, Conflict, InvalidConfig, NotFound, SessionClosed, StartFailed
from rock.sync import Sandbox, SandboxConfig


def usable(sandbox: Sandbox, session: str = "default") -> None:
    seen = sandbox.arun("echo still here", session=session)
    assert (seen.output, seen.exit_code) == ("still here\n", 0)


@pytest.mark.parametrize(
    ("command", "output", "code"),
    [
        ("echo hi", "hi\n", 0),
        ("false", "", 1),
        ("exit_code() { return 9; }; exit_code", "", 9),
        ("echo one\necho two", "one\ntwo\n", 0),
        ("cat <<'EOF'\nheredoc $x\nEOF", "heredoc $x\n", 0),
        ("cat", "", 0),
        ("read line; echo status $?", "status 1\n", 0),
        ("printf 'D 0 / 1\\000R 5\\000SHELLPS1PREFIX'", "D 0 / 1\0R 5\0SHELLPS1PREFIX", 0),
        ("echo ünïcødé", "ünïcødé\n", 0),
        ("{ sh -c 'kill -KILL $$'; } 2>/dev/null; echo $?", "137\n", 0),
        ("nosuchcommand 2>/dev/null", "", 127),
        ("(echo sub; exit 4)", "sub\n", 4),
        ("", "", 0),
    ],
)
def test_status_and_output(sandbox: Sandbox, command: str, output: str, code: int) -> None:
    seen = sandbox.arun(command)
    assert (seen.output, seen.exit_code, seen.failure_reason) == (output, code, "")
    usable(sandbox)


def test_state_lasts(sandbox: Sandbox) -> None:
    sandbox.arun("cd /tmp; x=7; export Y=8; f() { echo f $x $Y; }; alias hi='echo alias'")
    assert sandbox.arun("f; pwd; hi").output == "f 7 8\n/tmp\nalias\n"
    assert sandbox.arun("false").exit_code == 1
    assert sandbox.arun("echo $?").output == "1\n"


@pytest.mark.parametrize("broken", ["echo 'unbalanced", 'echo "unbalanced', "if true; then", "echo $((", "done"])
def test_a_syntax_error_is_told_at_once(sandbox: Sandbox, broken: str) -> None:
    began = time.monotonic()
    seen = sandbox.arun(broken)
    assert seen.exit_code not in (0, None)
    assert "/bin/bash" in seen.output
    assert time.monotonic() - began < 2
    usable(sandbox)


@pytest.mark.parametrize(
    "ender", ["set -e; false; echo no", "set -u; echo $unset_name; echo no", ": ${unset_name:?gone}"]
)
def test_what_would_end_a_script_leaves_the_session(sandbox: Sandbox, ender: str) -> None:
    sandbox.arun("x=kept; cd /tmp")
    seen = sandbox.arun(ender)
    assert seen.exit_code == 1
    assert "no\n" not in seen.output
    assert not seen.session_closed
    assert sandbox.arun("set +eu; echo $x $PWD").output == "kept /tmp\n"


def test_exit_closes_the_session_with_its_status(sandbox: Sandbox) -> None:
    sandbox.create_session(CreateBashSessionRequest(session="one"))
    seen = sandbox.arun("echo bye; exit 7", session="one")
    assert (seen.output, seen.exit_code, seen.session_closed) == ("bye\n", 7, True)
    assert "7" in seen.failure_reason
    with pytest.raises(SessionClosed, match="closed"):
        sandbox.arun("echo", session="one")
    sandbox.create_session(CreateBashSessionRequest(session="one"))
    usable(sandbox, "one")


def test_the_default_session_comes_back(sandbox: Sandbox) -> None:
    assert sandbox.arun("exit 3").session_closed
    usable(sandbox)


def test_exec_replaces_the_shell_and_its_status_is_told(sandbox: Sandbox) -> None:
    sandbox.create_session(CreateBashSessionRequest(session="e"))
    seen = sandbox.arun("exec sh -c 'echo replaced; exit 5'", session="e")
    assert (seen.output, seen.exit_code, seen.session_closed) == ("replaced\n", 5, True)


def test_background_jobs_go_on(sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert sandbox.arun("(sleep 2; echo done > /tmp/job) &").exit_code == 0
    assert time.monotonic() - began < 2
    assert sandbox.arun("wait; cat /tmp/job").output == "done\n"


def test_a_timeout_gives_what_there_was_and_kills_the_tree(sandbox: Sandbox) -> None:
    sandbox.arun("x=kept")
    command = "echo partial; (setsid sleep 1234 &); setsid sleep 1234 & sleep 1234; echo never"
    seen = sandbox.arun(command, timeout=2.5)
    assert (seen.output, seen.exit_code, seen.timed_out) == ("partial\n", None, True)
    assert "2.5" in seen.failure_reason
    assert sandbox.arun("echo $x").output == "kept\n"
    assert running(sandbox, "sleep 1234") == 0


def test_state_survives_every_timeout(sandbox: Sandbox) -> None:
    """The shell hands its state over by a child of its own, which the killing of the command must not catch."""
    for number in range(20):
        sandbox.arun(f"x=kept{number}")
        seen = sandbox.arun("(setsid sleep 1234 &); sleep 1234; echo never", timeout=0.03).output
        # bash reports the end of a process that it has just started, and does not wait for yet
        assert re.fullmatch(r"(bash: line \d+: +\d+ Killed +sleep 1234\n)?", seen), seen
        assert sandbox.arun("echo $x").output == f"kept{number}\n"


def test_a_timeout_of_the_shell_itself(sandbox: Sandbox) -> None:
    sandbox.arun("x=kept; f() { echo function; }")
    assert sandbox.arun("while :; do :; done", timeout=0.3).timed_out
    assert sandbox.arun("f; echo $x").output == "function\nkept\n"


def test_a_shell_that_cannot_be_asked_is_started_anew_and_says_so(sandbox: Sandbox) -> None:
    sandbox.arun("cd /tmp")
    seen = sandbox.arun("trap '' TERM; while :; do :; done", timeout=0.3)
    assert seen.timed_out and seen.session_restarted
    assert "anew" in seen.failure_reason
    assert sandbox.arun("pwd").output == "/tmp\n"


def test_check_raise(sandbox: Sandbox) -> None:
    with pytest.raises(CommandFailed) as caught:
        sandbox.run_in_session(Action(command="echo why; exit_with() { return 6; }; exit_with", session="default"))
    assert caught.value.observation.exit_code == 6
    assert caught.value.observation.output == "why\n"
    assert sandbox.run_in_session(BashAction(command="false", check="silent")).exit_code == 1
    with pytest.raises(CommandTimeout):
        sandbox.arun("sleep 5", timeout=0.2, check="raise")
    usable(sandbox)


def test_interrupt(sandbox: Sandbox) -> None:
    sandbox.arun("x=kept")
    timer = threading.Timer(0.4, sandbox.sessions.interrupt)
    timer.start()
    began = time.monotonic()
    seen = sandbox.arun("echo before; sleep 20; echo after")
    timer.join()
    assert time.monotonic() - began < 5
    assert (seen.output, seen.exit_code, seen.interrupted) == ("before\n", 130, True)
    assert sandbox.arun("echo $x").output == "kept\n"


def test_interrupt_lets_a_program_clean_up(sandbox: Sandbox) -> None:
    program = "python3 -c 'import time\ntry: time.sleep(20)\nexcept KeyboardInterrupt: print(\"cleaned\")'"
    timer = threading.Timer(0.6, sandbox.sessions.interrupt)
    timer.start()
    seen = sandbox.arun(program)
    timer.join()
    assert "cleaned" in seen.output
    usable(sandbox)


def test_binary_output_is_exact(sandbox: Sandbox) -> None:
    seen = sandbox.arun(r"printf '\000\001\377\376\r\n\033[31m'")
    assert seen.output_bytes == b"\0\1\xff\xfe\r\n\x1b[31m"


def test_100_megabytes_of_output(sandbox: Sandbox) -> None:
    seen = sandbox.arun("echo start; head -c 100000000 /dev/zero | tr '\\0' x; echo end", timeout=60)
    assert seen.exit_code == 0
    assert seen.output.startswith("start\nxxx") and seen.output.endswith("xxxend\n")
    assert seen.dropped_bytes == 100_000_000 + 10 - (16 << 20)
    usable(sandbox)


def test_streams_apart(sandbox: Sandbox) -> None:
    seen = sandbox.run_in_session(BashAction(command="echo out; echo err >&2", separate=True))
    assert (seen.output, seen.stderr) == ("out\n", "err\n")


def test_a_long_command(sandbox: Sandbox) -> None:
    text = "x" * 300_000
    assert sandbox.arun(f"echo {text} | wc -c").output == "300001\n"
    assert sandbox.arun("ls -a /tmp | grep -c rock").output == "0\n"


def test_names_and_errors(sandbox: Sandbox) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        sandbox.arun("echo", session="zz")
    sandbox.create_session(CreateBashSessionRequest(session="a", env={"K": "v w"}, cwd="/tmp"))
    with pytest.raises(Conflict, match="exists already"):
        sandbox.create_session(CreateBashSessionRequest(session="a"))
    assert sandbox.arun("echo $K $PWD", session="a").output == "v w /tmp\n"
    sandbox.close_session("a")
    with pytest.raises(NotFound, match="does not exist"):
        sandbox.arun("echo", session="a")
    with pytest.raises((StartFailed, NotFound)):
        sandbox.create_session(CreateBashSessionRequest(session="b", startup_source=["/nowhere.sh"]))
    with pytest.raises((StartFailed, NotFound)):
        sandbox.create_session(CreateBashSessionRequest(session="b", remote_user="nosuchuser"))


def test_startup_source(sandbox: Sandbox) -> None:
    sandbox.fs.write("/tmp/rc", b"echo from rc; RC=1\n")
    answer = sandbox.create_session(CreateBashSessionRequest(session="rc", startup_source=["/tmp/rc"]))
    assert answer.output == "from rc\n"
    assert sandbox.arun("echo $RC", session="rc").output == "1\n"


def test_a_created_session_reads_bashrc(sandbox: Sandbox) -> None:
    text = """
[ -z "$PS1" ] && return
echo noise; alias hi='echo hello'; act() { ACTIVE=$1; }
act env; export PATH=/opt/conda/bin:$PATH
cd /tmp
false
"""
    sandbox.fs.write("/root/.bashrc", text)
    assert sandbox.create_session(CreateBashSessionRequest(session="rc", cwd="/srv")).output == "noise\n"
    seen = sandbox.arun("hi; echo $ACTIVE $PWD ${PATH%%:*}", session="rc")
    assert seen.output == "hello\nenv /tmp /opt/conda/bin\n"
    assert sandbox.arun("act other; set -u; echo $NOTHING", session="rc").exit_code != 0  # it replaces itself
    assert sandbox.arun("hi $ACTIVE", session="rc").output == "hello other\n"
    assert sandbox.arun("echo ${ACTIVE-none}").output == "none\n"  # the session that is there anyway
    sandbox.create_session(CreateBashSessionRequest(session="sh", shell="sh"))
    assert sandbox.arun("echo ${ACTIVE-none}", session="sh").output == "none\n"
    if sandbox.remote_user.create_remote_user("agent"):
        sandbox.fs.write("/home/agent/.bashrc", "ACTIVE=agents", user="agent")
        sandbox.create_session(CreateBashSessionRequest(session="own", remote_user="agent"))
        assert sandbox.arun("echo $ACTIVE", session="own").output == "agents\n"


def test_a_bashrc_that_is_no_good(sandbox: Sandbox) -> None:
    sandbox.fs.write("/root/.bashrc", "echo (\n")
    assert "syntax error" in sandbox.create_session(CreateBashSessionRequest(session="a")).output
    assert sandbox.arun("echo usable", session="a").output == "usable\n"
    sandbox.fs.write("/root/.bashrc", "echo bye; exit 3\n")
    with pytest.raises(StartFailed, match="bye"):
        sandbox.create_session(CreateBashSessionRequest(session="b"))
    sandbox.fs.write("/root/.bashrc", "sleep 300\n")
    with pytest.raises(StartFailed):
        sandbox.create_session(CreateBashSessionRequest(session="c", startup_timeout=2))
    assert sandbox.arun("echo usable").output == "usable\n"
    sandbox.fs.remove("/root/.bashrc")
    sandbox.fs.mkdir("/root/.bashrc")
    sandbox.create_session(CreateBashSessionRequest(session="d"))
    assert sandbox.arun("echo usable", session="d").output == "usable\n"


def test_root_becomes_another_user_by_the_images_own_means(sandbox: Sandbox) -> None:
    if not sandbox.remote_user.create_remote_user("agent"):
        pytest.skip("an ordinary user's sandbox has one user id: there are no other users in it")
    for command in ("su - agent -c", "su agent -c", "runuser - agent -c"):
        seen = sandbox.arun(f"{command} 'id -un; echo $HOME'")
        assert (seen.output, seen.exit_code) == ("agent\n/home/agent\n", 0), command
    for command in ("su -c id", "su root -c id", "su - daemon -s /bin/sh -c id"):
        seen = sandbox.execute(command, user="agent", stdin="\n")
        assert seen.exit_code != 0 and "uid=" not in seen.stdout, command


def test_a_terminal(sandbox: Sandbox) -> None:
    sandbox.create_session(CreateBashSessionRequest(session="t", pty=(24, 80)))
    assert sandbox.arun("test -t 0 && test -t 1 && stty size", session="t").output == "24 80\r\n"
    sandbox.sessions.resize(50, 132, session="t")
    assert sandbox.arun("stty size", session="t").output == "50 132\r\n"
    timer = threading.Timer(0.3, lambda: sandbox.sessions.send_input("typed\n", session="t"))
    timer.start()
    assert "got typed" in sandbox.arun("read line; echo got $line", session="t").output
    timer.join()
    timer = threading.Timer(0.3, lambda: sandbox.sessions.interrupt(session="t"))
    timer.start()
    assert sandbox.arun("sleep 20", session="t").exit_code == 130
    timer.join()
    with pytest.raises(InvalidConfig):
        sandbox.run_in_session(BashAction(session="t", command="echo", separate=True))
    usable_output = sandbox.arun("echo still here", session="t").output
    assert usable_output == "still here\r\n"


def test_sessions_are_apart_and_run_at_once(sandbox: Sandbox) -> None:
    for name in ("a", "b"):
        sandbox.create_session(CreateBashSessionRequest(session=name))
    began = time.monotonic()
    threads = [threading.Thread(target=sandbox.arun, args=("sleep 2",), kwargs={"session": n}) for n in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 3.9
    assert {s.session for s in sandbox.sessions.list()} == {"default", "a", "b"}


def test_calls_to_one_session_queue(sandbox: Sandbox) -> None:
    sandbox.arun("n=0")
    threads = [threading.Thread(target=sandbox.arun, args=("m=$n; sleep 0.01; n=$((m+1))",)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sandbox.arun("echo $n").output == "10\n"


def test_a_session_that_is_still_being_opened_can_be_closed(server: RunningServer) -> None:
    for _ in range(5):  # the default one is opened behind the back of whoever started the sandbox
        with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m", cpus=1.0)) as sandbox:
            sandbox.close_session("default")
            sandbox.create_session(CreateBashSessionRequest(session="default", env={"A": "1"}))
            assert sandbox.arun("echo $A").output == "1\n"
