"""The commands of `rock`: lists, copies, contexts, help, and the reference that is generated from them."""

from __future__ import annotations

import http.client
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from tests.cli.forking import Forking
from tests.conftest import RunningServer

from rock.cli import connection
from rock.cli.connection import OPTIONS, connect_options
from rock.cli.contexts import Contexts
from rock.cli.main import ENTRIES, app
from rock.cli.output import len_of, lines_of, printable, rendered
from rock.cli.parsing import Command
from rock.errors import InvalidConfig
from rock.images.store import ImageStore
from rock.sync import Client, Sandbox

IMAGE = "host"
ROCK = [sys.executable, "-m", "rock.cli.main"]


forking: list[Forking] = []


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    forking.append(Forking())
    yield
    forking.pop().close()


def rock(*words: str, text: bool = True, input: str | bytes = b"", **options: Any) -> Any:
    """Run a command; its output is bytes with text=False."""
    done = forking[0].run(*words, stdin=input.encode() if isinstance(input, str) else input, **options)
    if not text:
        return done
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def box(server: Any) -> Iterator[Sandbox]:
    with Sandbox(IMAGE, memory="512m", cpus=1.0) as made:
        yield made


# ---- help


def commands(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield from commands(child, click.Context(child, info_name=name, parent=ctx))
    else:
        yield ctx.command_path, command


def test_every_command_has_an_example_and_a_short_help() -> None:
    root = click.Context(app, info_name="rock")
    found = dict(commands(app, root))
    assert len(found) > 45
    for path, command in found.items():
        assert isinstance(command, Command) and command.example.startswith(("rock ", "tar ", "eval ")), path
        first = (command.help or "").split("\n\n")[0]
        assert first.endswith(".") and len(first) < 80 and "..." not in command.get_short_help_str(80), path
    for entry in ENTRIES:
        real = app.get_command(root, entry.name)
        assert real is not None and (real.help or "").split("\n\n")[0] == entry.summary, entry.name


def _words(line: str) -> list[str]:
    """The words of the rock command in an example: what follows a pipe or precedes a redirection."""
    words = shlex.split(line)
    if "|" in words and words[0] != "rock":
        words = words[words.index("|") + 1 :]
    return words[: next((index for index, word in enumerate(words) if word in ("|", "<", ">", "2>")), len(words))]


def test_every_example_is_a_valid_call() -> None:
    """Each line has existing options and a valid number of arguments."""
    root = click.Context(app, info_name="rock")
    count = 0
    for path, command in commands(app, root):
        assert isinstance(command, Command)
        if path == "rock docker":  # Docker's options: tests/cli/test_docker_commands.py runs them
            continue
        for line in command.example.splitlines():
            if line.startswith("eval "):
                continue
            words = _words(line)
            assert words[: len(path.split())] == path.split(), line
            context = click.Context(command, info_name=path, parent=root)
            try:
                command.parse_args(context, words[len(path.split()) :])
            except click.BadParameter as error:  # a file of the example is not there
                assert "does not exist" in error.message, line
            count += 1
    assert count > 100


def test_the_reference_is_current() -> None:
    done = subprocess.run([sys.executable, "tools/cli_reference.py", "--check"], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_help_is_grouped() -> None:
    text = rock("--help").stdout
    sections = ("Sandboxes:", "Inspection:", "Files and ports:", "Images:", "Environments:", "Server:", "Other:")
    assert [text.index(section) for section in sections] == sorted(text.index(section) for section in sections)
    assert rock().stdout == text and rock().returncode == 0
    assert "did you mean rock run?" in rock("runn").stderr
    assert "did you mean rock image import?" in rock("image", "imports").stderr


# ---- output


def test_tables() -> None:
    rows = [["0123456789ab", "a" * 60, "b" * 40], ["x", None, "日本語"]]
    lines = lines_of(["ID", "NAME", "IMAGE"], rows, 40)
    assert all(len_of(line) <= 40 for line in lines) and lines[1].startswith("0123456789ab  a")
    assert lines_of(["ID", "NAME", "IMAGE"], rows, None)[1].endswith("b" * 40)
    assert printable("red\x1b[31m\nline") == "red?[31m line"


def test_templates() -> None:
    fields = {"ID": "x1", "sandbox_id": "x1", "labels": {"a": 1}}
    assert rendered(r"{{.ID}}\t{{ .SandboxID }} {{json .labels}}", fields) == 'x1\tx1 {"a": 1}'
    assert json.loads(rendered("{{json .}}", fields)) == fields
    with pytest.raises(InvalidConfig, match="unknown field"):
        rendered("{{.nosuch}}", fields)


def test_ps_filters_and_formats(server: Any) -> None:
    first = rock("run", "-d", "--name", "cli-one", "-l", "job=7", IMAGE).stdout.strip()
    second = rock("run", "-d", "--name", "cli-two", "-l", "job=8", "--idle-timeout", "90", IMAGE).stdout.strip()
    try:
        for words, found in (
            (["name=cli-*"], {first, second}), (["label=job=7"], {first}), (["label=job", "name=*two"], {second}),
            ([f"id={first[:9]}"], {first}), (["state=stopped", "name=cli-*"], set()), (["isolation=nosuch"], set()),
        ):  # fmt: skip
            filters = [part for word in words for part in ("--filter", word)]
            assert set(rock("ps", "-q", *filters).stdout.split()) == found, words
        shown = rock("ps", "--filter", "name=cli-two", "--format", r"{{.ID}}\t{{.Name}}\t{{.Status}}").stdout
        assert shown == f"{second}\tcli-two\trunning\n"
        wrong = rock("ps", "--filter", "colour=red")
        assert wrong.returncode == 1 and "the keys are id, name" in wrong.stderr
        (info,) = json.loads(rock("inspect", "cli-two").stdout)
        assert info["auto_stop_at"] and info["usage"]["pids"] and info["state_history"]
        assert rock("rename", "cli-two", "cli-three").stdout == "cli-three\n"
        with subprocess.Popen([*ROCK, "wait", "cli-three"], stdout=subprocess.PIPE, text=True) as waiting:
            time.sleep(1)
            assert waiting.poll() is None
            assert rock("stop", "cli-three").stdout == f"{second}\n"
            assert waiting.communicate(timeout=10)[0] == "stopped_by_user\n" and waiting.returncode == 0
        assert rock("wait", "--timeout", "0.2", "cli-one").returncode == 124
        assert "cli-three" in rock("ps", "-a", "--filter", "cause=stopped_by_user").stdout
    finally:
        rock("rm", "-f", "cli-one", "cli-three", "cli-two")
    assert {info.name for info in Client().list_sandboxes()}.isdisjoint({"cli-one", "cli-three"})


def test_rm_of_all_stopped_ones(box: Sandbox) -> None:
    other = rock("run", "-d", IMAGE).stdout.strip()
    rock("stop", other)
    removed = rock("rm", "--all", "--stopped", "--force").stdout.split()
    assert other in removed and box.sandbox_id not in removed
    assert box.info().state.value == "running"


# ---- run


def test_rm_and_keep(server: Any) -> None:
    assert rock("run", "--rm", "--name", "cli-removed", IMAGE, "true").returncode == 0
    assert all(info.name != "cli-removed" for info in Client().list_sandboxes())
    kept = rock("run", "--keep", "--name", "cli-kept", IMAGE, "--", "sh", "-c", "exit 3")
    assert kept.returncode == 3
    taken = rock("run", "--name", "cli-kept", IMAGE, "true")
    assert taken.returncode == 125 and "cli-kept" in taken.stderr
    assert rock("rm", "-f", "cli-kept").returncode == 0


def test_the_command_of_the_image_is_the_default(server: RunningServer, tmp_path: Path) -> None:
    """An image that has the host's files and a CMD of its own."""
    store = ImageStore(server.home / "images")
    without = rock("run", IMAGE)
    assert without.returncode == 125 and "neither ENTRYPOINT nor CMD" in without.stderr
    (tmp_path / "Dockerfile").write_text(f'FROM {IMAGE}\nCMD ["sh", "-c", "echo by default"]\n')
    made = rock("image", "build", "-t", "cli/cmd:1", str(tmp_path))
    assert made.returncode == 0, made.stderr
    try:
        assert rock("run", "--rm", "cli/cmd:1").stdout == "by default\n"
        name = rock("run", "-d", "cli/cmd:1").stdout.strip()
        assert rock("logs", "-f", name).stdout == "by default\n"
        rock("rm", "-f", name)
    finally:
        store.remove("cli/cmd:1")


def test_published_ports(server: Any, free_port: Any) -> None:
    port = free_port()
    program = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"
    words = ["run", "--rm", "-p", f"{port}:8000", IMAGE, "--", "python3", "-c", program]
    with subprocess.Popen([*ROCK, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None and child.stderr.readline() == f"127.0.0.1:{port} -> port 8000\n"
        end = time.monotonic() + 20
        status = 0
        while status != 200 and time.monotonic() < end:
            try:
                link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                link.request("GET", "/")
                status = link.getresponse().status
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
            finally:
                link.close()
        assert status == 200
        child.terminate()
        assert child.wait(20) == 143
    refused = rock("run", "-d", "-p", "80", IMAGE, "true")
    assert refused.returncode == 125 and "rock port-forward" in refused.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--volume", "/data:/data"], "--mount mounts a folder"),
        (["--volume", "data:relative"], "is not NAME:PATH[:ro]"),
        (["--mount", "data:/data"], "two absolute paths"),
        (["-p", "80:0"], "is not [LOCAL:]REMOTE"),
        (["--label", "x"], "--label: 'x' is not K=V"),
    ],
)
def test_wrong_options_of_run(words: list[str], why: str) -> None:
    done = rock("run", *words, IMAGE, "true")
    assert done.returncode == 125 and why in done.stderr


def test_resources_of_run(server: Any) -> None:
    write = "head -c 30000000 /dev/zero > /tmp/file"
    done = rock("run", "--disk", "10m", "--memory", "256m", "--isolation", "namespaces", IMAGE, "--", "sh", "-c", write)
    if "--isolation" not in done.stderr and done.returncode == 125:  # an ordinary user has another level
        done = rock("run", "--disk", "10m", "--memory", "256m", IMAGE, "--", "sh", "-c", write)
    assert done.returncode not in (0, 125) and done.stderr, "the disk is full, or the sandbox ended for it"
    for words, why in (
        (["--gpus", "1"], "no worker has 1 GPU"),
        (["--runtime", "nosuch"], "nosuch"),
        (["--isolation", "microvm"], "microvm"),
    ):
        refused = rock("run", *words, IMAGE, "true")
        assert refused.returncode == 125 and why in refused.stderr, refused.stderr
    named = rock("run", "--runtime", "namespace", IMAGE, "true")
    assert named.returncode == 0, named.stderr


# ---- cp


def test_cp_of_streams_and_between_sandboxes(box: Sandbox, tmp_path: Path) -> None:
    name = str(box.sandbox_id)
    box.exec("mkdir -p /tmp/cli-cp/tree/sub && printf 'x\\377y' > /tmp/cli-cp/tree/sub/file && "
             "chmod 750 /tmp/cli-cp/tree/sub/file && ln -s sub/file /tmp/cli-cp/tree/link", check=True)  # fmt: skip
    packed = rock("cp", f"{name}:/tmp/cli-cp/tree", "-", text=False).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert sorted(tar.getnames()) == ["tree", "tree/link", "tree/sub", "tree/sub/file"]
        member = tar.extractfile("tree/sub/file")
        assert member is not None and member.read() == b"x\xffy"
        assert tar.getmember("tree/sub/file").mode == 0o750
    single = rock("cp", f"{name}:/tmp/cli-cp/tree/sub/file", "-", text=False).stdout
    with tarfile.open(fileobj=io.BytesIO(single)) as tar:
        assert tar.getnames() == ["file"]
    box.files.mkdir("/tmp/cli-cp/into")
    done = rock("cp", "-", f"{name}:/tmp/cli-cp/into", input=packed, text=False)
    assert done.returncode == 0, done.stderr
    assert box.files.read("/tmp/cli-cp/into/tree/sub/file") == b"x\xffy"
    with Sandbox(IMAGE, memory="512m") as other:
        there = f"{other.sandbox_id}:/tmp"
        assert rock("cp", f"{name}:/tmp/cli-cp/tree", f"{there}/cli-copied").returncode == 0
        assert rock("cp", f"{name}:/tmp/cli-cp/tree/sub/file", f"{there}/cli-copied/").returncode == 0
        found = other.files.stat("/tmp/cli-copied/file")
        assert (other.files.read("/tmp/cli-copied/sub/file"), found.mode & 0o777) == (b"x\xffy", 0o750)
        other.files.remove("/tmp/cli-copied", recursive=True)
    box.files.remove("/tmp/cli-cp", recursive=True)
    assert not list(tmp_path.iterdir())


def test_cp_by_the_rules_of_docker(box: Sandbox, tmp_path: Path) -> None:
    name = str(box.sandbox_id)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("text")
    (tmp_path / "-").write_text("dash")
    box.files.mkdir("/tmp/cli-rules")

    def cp(*words: str) -> Any:
        return rock("cp", *words, cwd=tmp_path)

    folder = box.exec("pwd").stdout.strip()
    for words in (("tree/file", f"{name}:/tmp/cli-rules/no/file"), ("tree", f"{name}:/tmp/cli-rules/no/tree"),
                  ("tree/file", f"{name}:/tmp/cli-rules/no/")):  # fmt: skip
        refused = cp(*words)
        assert refused.returncode == 1 and "there is no folder /tmp/cli-rules/no" in refused.stderr
        assert "--parents" in refused.stderr
        assert not box.files.exists("/tmp/cli-rules/no")
    assert cp("--parents", "tree/file", f"{name}:/tmp/cli-rules/yes/file").returncode == 0
    assert cp("-a", "-r", "tree", f"{name}:/tmp/cli-rules").returncode == 0
    assert cp("-p", "tree/.", f"{name}:/tmp/cli-rules").returncode == 0
    assert [item.name for item in box.files.list("/tmp/cli-rules")] == ["file", "tree", "yes"]
    onto = cp("tree", f"{name}:/tmp/cli-rules/file")
    assert onto.returncode == 1 and "is a file, not a folder" in onto.stderr
    assert cp("./-", f"{name}:/tmp/cli-rules/dash").returncode == 0
    assert box.files.read("/tmp/cli-rules/dash") == b"dash"
    absent = cp(f"{name}:/tmp/cli-rules/file", "no/such/file")
    assert absent.returncode == 1 and "there is no local folder no/such" in absent.stderr
    assert cp(f"{name}:/tmp/cli-rules/file", "back").returncode == 0 and (tmp_path / "back").read_text() == "text"
    relative = os.path.relpath("/tmp/cli-rules/tree/file", folder)
    assert cp(f"{name}:{relative}", "relative").returncode == 0 and (tmp_path / "relative").read_text() == "text"
    assert rock("cp", "tree", "-", cwd=tmp_path).returncode == 2
    box.files.remove("/tmp/cli-rules", recursive=True)


# ---- contexts


def test_contexts(own_server: Any, tmp_path: Path) -> None:
    """Option, ROCK_BASE_URL, current context, server of ROCK_HOME, default: in this order."""
    running = own_server(ROCK_API_KEY="open sesame")
    home = tmp_path / "client"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROCK_")}

    def run(*words: str, **more: Any) -> Any:
        variables = {"ROCK_HOME": str(home), **more.pop("env", {})}
        return rock(*words, env={**kept, **variables}, **more)

    wrong = run("login", "--api-key-stdin", running.url, input="wrong\n")
    assert wrong.returncode == 1 and not (home / "contexts.json").exists()
    done = run("login", "--name", "lab", "--api-key-stdin", running.url, input="open sesame\n")
    assert (done.returncode, done.stdout) == (0, f"lab  {running.url}\n"), done.stderr
    assert (home / "contexts.json").stat().st_mode & 0o777 == 0o600
    assert run("ps").returncode == 0
    assert "open sesame" not in run("context", "ls", "--json").stdout + run("context", "ls").stdout
    assert f"{running.url}  (from the context lab)" in run("context", "show").stdout
    elsewhere = {"ROCK_BASE_URL": "http://127.0.0.1:9"}
    assert "no ROCK server at http://127.0.0.1:9" in run("ps", env=elsewhere).stderr
    option = run("--base-url", running.url, "--api-key", "open sesame", "ps", env=elsewhere)
    assert option.returncode == 0, option.stderr
    assert run("context", "use", "nosuch").returncode == 1
    assert run("context", "use", "--none").returncode == 0
    assert "(from the default)" in run("context", "show").stdout
    own = run("ps", env={"ROCK_HOME": str(running.home), "ROCK_API_KEY": "open sesame"})
    assert own.returncode == 0, own.stderr  # the server of this ROCK_HOME, on its port
    assert run("context", "rm", "lab").returncode == 0 and run("context", "ls", "--json").stdout == "[]\n"
    again = run("admin", "start", env={"ROCK_HOME": str(running.home), "ROCK_API_KEY": "open sesame"})
    assert again.returncode == 1 and running.url in again.stderr and "admin stop" not in again.stderr
    assert "rock admin status" in again.stderr
    shown = run("version", env={"ROCK_HOME": str(running.home)}).stdout
    assert shown.startswith("client  ") and running.url in shown


def test_a_damaged_file_of_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contexts.json").write_text("[1]")
    with pytest.raises(InvalidConfig, match="is damaged"):
        Contexts(tmp_path).all()
    monkeypatch.setenv("ROCK_HOME", str(tmp_path))
    monkeypatch.setenv("ROCK_BASE_URL", "http://box:1")
    monkeypatch.setattr(connection, "OPTIONS", OPTIONS)
    connect_options(None, None)  # the variable decides: the file is not read
    assert OPTIONS.source == "ROCK_BASE_URL"


# ---- volumes


@pytest.mark.skipif(not hasattr(Client, "create_volume"), reason="this server has no volumes")
def test_volumes(server: Any) -> None:
    assert rock("volume", "create", "cli-data", "--size", "20m").stdout == "cli-data\n"
    try:
        assert "cli-data" in rock("volume", "ls").stdout
        assert json.loads(rock("volume", "inspect", "cli-data").stdout)["size"] == 20 << 20
        write = rock("run", "--rm", "--volume", "cli-data:/data", IMAGE, "--", "sh", "-c", "echo kept > /data/file")
        assert write.returncode == 0, write.stderr
        read = rock("run", "--rm", "--volume", "cli-data:/data:ro", IMAGE, "--", "sh", "-c",
                    "cat /data/file; ! touch /data/x")  # fmt: skip
        assert (read.returncode, read.stdout) == (0, "kept\n"), read.stderr
    finally:
        assert rock("volume", "rm", "cli-data").stdout == "cli-data\n"
