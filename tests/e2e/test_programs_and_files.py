"""One-shot programs, background processes and files, through the SDK and a real sandbox."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.conftest import RunningServer, running

from rock.actions import Command
from rock.errors import ClientError, InvalidConfig, NotFound, RockError
from rock.sync import Sandbox

# ---- programs


def test_execute(sandbox: Sandbox) -> None:
    done = sandbox.execute(Command(command=["sh", "-c", "echo out; echo err >&2; exit 3"]))
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n", "err\n", 3)
    done = sandbox.execute(Command(command="echo $X $PWD; cat", env={"X": "1"}, cwd="/tmp", stdin="input"))
    assert (done.stdout, done.exit_code) == ("1 /tmp\ninput", 0)
    assert sandbox.execute(["sh", "-c", "kill -9 $$"]).signal == signal.SIGKILL


@pytest.mark.parametrize(
    "command",
    [
        Command(command=["nosuchprogram"]),
        Command(command=["true"], cwd="/nowhere"),
        Command(command=["true"], user="nosuchuser"),
    ],
)
def test_what_is_missing_is_named(sandbox: Sandbox, command: Command) -> None:
    with pytest.raises(NotFound, match=r"nosuchprogram|/nowhere|nosuchuser"):
        sandbox.execute(command)


def test_a_timeout_kills_the_whole_tree(sandbox: Sandbox) -> None:
    done = sandbox.execute(Command(command="echo partial; (setsid sleep 4321 &); sleep 4321", timeout=2))
    assert (done.stdout, done.exit_code, done.timed_out) == ("partial\n", None, True)
    assert running(sandbox, "sleep 4321") == 0


def test_a_daemon_does_not_hold_the_call(sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert sandbox.execute("sleep 5 & echo started").stdout == "started\n"
    assert time.monotonic() - began < 2


def test_background_processes(sandbox: Sandbox) -> None:
    process = sandbox.processes.start("echo one; sleep 1.5; echo two; echo err >&2; exit 5")
    assert process.status().running
    info = process.wait(5)
    assert (info.running, info.exit_code) == (False, 5)
    assert process.logs().data == b"one\ntwo\n"
    assert process.logs(offset=4).data == b"two\n"
    assert process.logs("stderr").data == b"err\n"
    process.forget()
    with pytest.raises(NotFound):
        process.status()


def test_signals_and_input(sandbox: Sandbox) -> None:
    process = sandbox.processes.start("cat; echo end; sleep 30")
    process.write_stdin(b"typed\n")
    process.write_stdin(b"", close=True)
    assert b"".join(part for part in _some(process, b"end\n")) == b"typed\nend\n"
    process.signal(signal.SIGTERM)
    info = process.wait(5)
    assert (info.exit_code, info.signal) in ((143, 15), (143, None))
    process.forget()


def _some(process: object, until: bytes) -> list[bytes]:
    parts: list[bytes] = []
    for part in process.follow():  # type: ignore[attr-defined]
        parts.append(part)
        if b"".join(parts).endswith(until):
            return parts
    return parts


def test_streaming_shows_output_while_it_is_made(sandbox: Sandbox) -> None:
    began = time.monotonic()
    times = [(chunk.text, time.monotonic() - began) for chunk in sandbox.stream("echo a; sleep 0.5; echo b")]
    assert "".join(text for text, _ in times) == "a\nb\n"
    assert times[0][1] < 0.4


def test_nohup_mode_tells_the_true_status(sandbox: Sandbox) -> None:
    seen = sandbox.arun("echo working; exit 4", mode="nohup", wait_timeout=10)
    assert (seen.output, seen.exit_code) == ("working\n", 4)


# ---- files


def test_read_write_append_list_stat(sandbox: Sandbox) -> None:
    sandbox.fs.write("/tmp/d/e/f.bin", bytes(range(256)))
    assert sandbox.fs.read("/tmp/d/e/f.bin") == bytes(range(256))
    assert sandbox.fs.read("/tmp/d/e/f.bin", offset=250) == bytes(range(250, 256))
    sandbox.fs.append("/tmp/d/e/f.bin", b"more")
    assert sandbox.fs.stat("/tmp/d/e/f.bin").size == 260
    sandbox.fs.chmod("/tmp/d/e/f.bin", 0o640)
    assert sandbox.arun("stat -c %a /tmp/d/e/f.bin").output == "640\n"
    assert [f.name for f in sandbox.fs.list("/tmp/d")] == ["e"]
    sandbox.fs.move("/tmp/d/e/f.bin", "/tmp/d/g")
    with pytest.raises(NotFound):
        sandbox.fs.read("/tmp/d/e/f.bin")
    sandbox.fs.remove("/tmp/d", recursive=True)
    assert not sandbox.fs.exists("/tmp/d")
    with pytest.raises(InvalidConfig, match="absolute"):
        sandbox.fs.read("relative")


def test_up_and_down_of_files_and_folders(sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(os.urandom(5_000_001))
    sandbox.fs.upload_file(str(source), "/tmp/big")
    want = hashlib.sha256(source.read_bytes()).hexdigest()
    assert sandbox.arun("sha256sum < /tmp/big").output.split()[0] == want
    sandbox.fs.download_file("/tmp/big", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "x.txt").write_text("x")
    (tree / "link").symlink_to("sub/x.txt")
    os.chmod(tree / "sub" / "x.txt", 0o755)
    sandbox.fs.upload_dir(str(tree), "/tmp/tree")
    assert sandbox.arun("cd /tmp/tree; cat link; stat -c %a sub/x.txt; ls sub").output == "x755\nempty\nx.txt\n"
    sandbox.fs.download_dir("/tmp/tree", str(tmp_path / "again"))
    assert (tmp_path / "again" / "link").read_text() == "x"
    assert (tmp_path / "again" / "sub" / "empty").is_dir()


@pytest.mark.parametrize(
    "make",
    [
        "ln -s /etc/shadow /tmp/trap",
        "mkfifo /tmp/trap",
        "ln -s /proc/1/mem /tmp/trap",
        "ln -s /dev/zero /tmp/trap",
        "ln -s trap /tmp/trap",
        "mkdir /tmp/trap",
    ],
)
def test_traps_in_the_way_of_a_read(sandbox: Sandbox, make: str) -> None:
    sandbox.arun(make)
    began = time.monotonic()
    with pytest.raises(RockError) as caught:
        sandbox.fs.read("/tmp/trap")
    assert isinstance(caught.value, ClientError)
    assert time.monotonic() - began < 2


def test_a_link_never_leads_to_a_file_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    sandbox.arun(f"mkdir -p {tmp_path}; ln -s {secret} /tmp/link; ln -s / /tmp/root")
    with pytest.raises(NotFound):
        sandbox.fs.read("/tmp/link")
    sandbox.fs.write("/tmp/link", b"inside")
    assert secret.read_text() == "of the host"
    sandbox.fs.write(f"/tmp/root{tmp_path}/other", b"inside")
    assert not (tmp_path / "other").exists()


def test_a_write_that_breaks_off_leaves_the_old_file(sandbox: Sandbox, server: RunningServer) -> None:
    sandbox.fs.write("/tmp/f", b"old")
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), 5) as raw:
        path = f"/v1/sandboxes/{sandbox.sandbox_id}/files/content?path=/tmp/f"
        raw.sendall(f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nnew".encode())
        time.sleep(0.1)
    time.sleep(0.2)
    assert sandbox.fs.read("/tmp/f") == b"old"
    assert sandbox.arun("ls -A /tmp | wc -l").output == "1\n"
