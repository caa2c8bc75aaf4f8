"""`rock docker`: real processes against a real server, with the exit codes and texts of Docker's command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.forking import Forking
from tests.conftest import IMAGE, RunningServer

from rock.cli.docker.flags import Flag, Refused, Spec, parse
from rock.cli.docker.templates import compiled
from rock.errors import InvalidConfig
from rock.sync import Client

forking: list[Forking] = []


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    forking.append(Forking())
    yield
    forking.pop().close()


def docker(*words: str, input: bytes = b"", **options: Any) -> subprocess.CompletedProcess[str]:
    done = forking[0].run("docker", *words, stdin=input, **options)
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def web(server: RunningServer) -> Iterator[str]:
    """A container that runs."""
    made = docker("run", "-d", "--name", "web", "-w", "/tmp/work", "-e", "ONE=1", "--label", "team=blue", IMAGE,
                  "sh", "-c", "echo out; echo err >&2; exec sleep 1000")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(r"[0-9a-f]{12,64}\n", made.stdout)
    yield made.stdout.strip()
    docker("rm", "-f", made.stdout.strip())


# ---- the grammar

SPEC = Spec("run", "[OPTIONS] IMAGE", (
    Flag("detach", "d", "bool"), Flag("tty", "t", "bool"), Flag("rm", "", "bool"), Flag("env", "e", "list"),
    Flag("name"), Flag("privileged", "", "bool", reason="no")), 1, None, False)  # fmt: skip


def test_flags_have_dockers_forms() -> None:
    call = parse(SPEC, ["-dt", "-eA=1", "-e", "B=2", "--env=C=3", "--name", "x", "--rm=false", "image", "sh", "-d"])
    assert call.on("detach") and call.on("tty") and not call.on("rm")
    assert call.many("env") == ["A=1", "B=2", "C=3"] and call.text("name") == "x"
    assert call.words == ["image", "sh", "-d"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--foo", "x"], 125, "unknown flag: --foo"),
        (["-dz", "x"], 125, "unknown shorthand flag: 'z' in -dz"),
        (["--name"], 125, "flag needs an argument: --name"),
        (["-e"], 125, "flag needs an argument: 'e' in -e"),
        (["--rm=maybe", "x"], 125, 'invalid argument "maybe" for "--rm" flag'),
        (["--privileged", "x"], 125, "ROCK does not support --privileged"),
        ([], 1, "'docker run' requires at least 1 argument"),
    ],
)
def test_wrong_flags(words: list[str], code: int, text: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(SPEC, words)
    assert caught.value.code == code and text in str(caught.value)


VALUE = {"ID": "abc", "State": {"Status": "running", "Pid": 7, "Up": True}, "Names": ["a", "b"], "Labels": {"k": "v"}}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{.ID}}", "abc"),
        ("{{ .State.Status }}:{{.State.Up}}", "running:true"),
        ("{{json .Names}}", '["a","b"]'),
        ("{{.State | json}}", '{"Status":"running","Pid":7,"Up":true}'),
        ('{{index .Labels "k"}} {{index .Names 1}}', "v b"),
        ('{{range .Names}}<{{.}}>{{end}}', "<a><b>"),
        ('{{if eq .State.Status "running"}}up{{else}}down{{end}}', "up"),
        ('{{if not .State.Up}}1{{else if gt .State.Pid 5}}2{{else}}3{{end}}', "2"),
        ('{{join .Names ","}} {{len .Names}} {{upper .ID}}', "a,b 2 ABC"),
        ('{{with .State}}{{.Pid}}{{end}} {{- " x"}}', "7 x"),
        ('{{printf "%s-%d" .ID .State.Pid}}', "abc-7"),
        ("{{range .Names}}{{$.ID}}{{end}}", "abcabc"),
        ("{{.State}}", "map[Pid:7 Status:running Up:true]"),
        ("{{(index .Names 0) | upper}}", "A"),
    ],
)
def test_templates(template: str, expected: str) -> None:
    assert compiled(template)(VALUE) == expected


@pytest.mark.parametrize(
    "template", ["{{.Nope}}", "{{", "{{end}}", "{{if .ID}}", "{{nope .ID}}", "{{.ID | }}", "{{(.ID}}",
                 "{{index .Names 9}}", "{{range .ID}}{{end}}", "{{}}", "{{" + "(" * 100 + "}}",
                 "{{printf \"%x\" 1}}", "{{len .State.Pid}}",
                 '{{"\\q"}}', "{{lt 1 .ID}}"],
)  # fmt: skip
def test_wrong_templates_are_errors(template: str) -> None:
    with pytest.raises(InvalidConfig):
        compiled(template)(VALUE)


# ---- run


def test_run_has_the_output_and_the_exit_code_of_the_program(server: RunningServer) -> None:
    done = docker("run", "--rm", "-e", "A=x y", "--network", "none", "--memory", "256m", "--cpus", "1", IMAGE,
                  "sh", "-c", "echo $A; echo err >&2; exit 7")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "x y\n", "err\n")
    assert docker("run", "--rm", "-i", IMAGE, "cat", input=b"in\n").stdout == "in\n"
    assert docker("run", "--rm", "--entrypoint", "echo", IMAGE, "-n", "word").stdout == "word"
    killed = docker("run", "--rm", IMAGE, "sh", "-c", "kill -9 $$")
    assert killed.returncode == 137
    missing = docker("run", "--rm", IMAGE, "nosuchprogram")
    assert missing.returncode == 127
    assert missing.stderr.startswith("docker: Error response from daemon: ")
    assert 'exec: "nosuchprogram": executable file not found in $PATH' in missing.stderr
    denied = docker("run", "--rm", IMAGE, "/etc/passwd")
    assert denied.returncode == 126 and 'exec: "/etc/passwd": permission denied' in denied.stderr
    with Client() as client:
        assert not client.list_sandboxes("pending,running,stopping")


UNSUPPORTED = [
    (["--privileged"], "--privileged"), (["--cap-add", "ALL"], "--cap-add"), (["-P"], "--publish-all"),
    (["-v", "/etc:/x"], "--volume /etc:/x"), (["-d", "-p", "80:80"], "--publish with --detach"),
    (["--network", "own"], "--network own"), (["--restart", "always"], "--restart always"),
    (["--gpus", "all"], "--gpus all"), (["--ulimit", "core=1"], "--ulimit core=1"), (["--read-only"], "--read-only"),
    (["--platform", "linux/s390x"], "--platform linux/s390x"), (["-p", "0.0.0.0:80:80"], "--publish 0.0.0.0:80:80"),
]  # fmt: skip


def test_unsupported_options_are_rejected_by_name(server: RunningServer) -> None:
    for words, name in UNSUPPORTED:
        done = docker("run", "--rm", *words, IMAGE, "touch", "/tmp/x")
        assert (done.returncode, done.stdout) == (125, "") and f"does not support {name}" in done.stderr, name


ERRORS = [
    (["run", "--memory", "much", IMAGE], 125,
     'invalid argument "much" for "-m, --memory" flag: invalid size: \'much\'\n\nUsage:  docker run '),
    (["run", "--cpus", "many", IMAGE], 125, 'invalid argument "many" for "--cpus" flag'),
    (["run"], 1, "'docker run' requires at least 1 argument"),
    (["exec", "x"], 1, "'docker exec' requires at least 2 arguments"),
    (["exec", "nosuch", "true"], 1, "Error response from daemon: No such container: nosuch"),
    (["stop", "nosuch"], 1, "Error response from daemon: No such container: nosuch"),
    (["logs", "nosuch"], 1, "Error response from daemon: No such container: nosuch"),
    (["ps", "--nosuch"], 125, "unknown flag: --nosuch"),
    (["ps", "--filter", "volume=x"], 125, "invalid filter 'volume'"),
    (["compose", "up"], 125, "ROCK does not support `docker compose`"),
    (["nosuch"], 1, "unknown command: docker nosuch"),
    (["-H", "tcp://x", "ps"], 125, "ROCK does not support the global option -H"),
    (["run", "--rm", "nosuch.invalid/image:1", "true"], 125, "docker: Error response from daemon: "),
    (["run", "-it", IMAGE, "sh"], 1, "the input device is not a TTY"),
]  # fmt: skip


def test_errors_have_dockers_exit_codes(server: RunningServer) -> None:
    for words, code, text in ERRORS:
        done = docker(*words)
        assert (done.returncode, done.stdout) == (code, "") and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


# ---- a container that runs


def test_exec_has_the_directory_and_variables_of_the_container(web: str) -> None:
    done = docker("exec", "-e", "TWO=2", "web", "sh", "-c", "echo $ONE $TWO $PWD; exit 3")
    assert (done.returncode, done.stdout) == (3, "1 2 /tmp/work\n")
    assert docker("exec", "-w", "/", web[:6], "pwd").stdout == "/\n"
    assert docker("exec", "-i", web, "cat", input=b"piped").stdout == "piped"
    missing = docker("exec", "web", "nosuchprogram")
    assert missing.returncode == 127 and missing.stderr.startswith("OCI runtime exec failed: ")
    assert docker("exec", "--privileged", "web", "true").returncode == 125
    assert docker("exec", "-d", "web", "touch", "/tmp/work/made").returncode == 0
    end = time.monotonic() + 20
    while docker("exec", "web", "test", "-e", "/tmp/work/made").returncode:
        assert time.monotonic() < end


def test_ps_and_inspect_have_dockers_fields(web: str) -> None:
    shown = docker("ps").stdout.splitlines()
    assert re.split(r"\s{2,}", shown[0].strip()) == [
        "CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]  # fmt: skip
    assert len(shown) == 2 and shown[1].startswith(web[:12]) and shown[1].endswith("web") and " Up " in shown[1]
    assert docker("ps", "-q", "--no-trunc").stdout == f"{web}\n"
    assert docker("ps", "--format", r"{{.Names}}\t{{.State}}\t{{.Labels}}").stdout == "web\trunning\tteam=blue\n"
    assert docker("ps", "--format", "table {{.Names}}").stdout == "NAMES\nweb\n"
    assert json.loads(docker("ps", "--format", "{{json .}}").stdout)["Names"] == "web"
    for match in ("name=web", "label=team", "label=team=blue", "status=running", f"id={web[:5]}", f"ancestor={IMAGE}"):
        assert docker("container", "ls", "-qf", match).stdout, match
    for other in ("name=nosuch", "label=team=red", "status=exited"):
        assert not docker("ps", "-aqf", other, "-f", f"id={web}").stdout, other
    document, = json.loads(docker("inspect", "web").stdout)  # fmt: skip
    assert document["Id"] == web and document["Name"] == "/web" and document["State"]["Running"] is True
    assert document["Config"]["Cmd"][0] == "sh" and document["Config"]["WorkingDir"] == "/tmp/work"
    assert document["Config"]["Labels"] == {"team": "blue"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", document["Created"])
    assert docker("inspect", "-f", "{{.State.Status}} {{.Name}}", "web").stdout == "running /web\n"
    assert docker("inspect", "--format={{json .State.ExitCode}}", web).stdout == "0\n"
    missing = docker("inspect", "nosuch")
    assert (missing.returncode, missing.stdout, missing.stderr) == (1, "[]\n", "Error: No such object: nosuch\n")
    wrong = docker("inspect", "-f", "{{.Nope}}", "web")
    assert wrong.returncode == 1 and "Nope" in wrong.stderr


def test_logs_and_copies(web: str, tmp_path: Path) -> None:
    end = time.monotonic() + 20
    while (done := docker("logs", "web")).stdout != "out\n" or done.stderr != "err\n":
        assert time.monotonic() < end, done
    assert docker("logs", "--tail", "0", "web").stdout == ""
    assert docker("logs", "-n", "1", "web").stdout == "out\n"
    (tmp_path / "file").write_text("content")
    assert docker("cp", str(tmp_path / "file"), "web:/tmp/work/").returncode == 0
    assert docker("exec", "web", "cat", "file").stdout == "content"
    assert docker("cp", "web:tmp/work/file", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_text() == "content"
    packed = forking[0].run("docker", "cp", "web:/tmp/work/file", "-", stdin=b"")
    (tmp_path / "packed.tar").write_bytes(packed.stdout)
    with tarfile.open(tmp_path / "packed.tar") as archive:
        assert archive.getnames() == ["file"]
    assert docker("cp", "-L", "web:/x", "y").returncode == 125


def test_the_end_of_a_container(web: str) -> None:
    refused = docker("rm", "web")
    assert refused.returncode == 1 and 'cannot remove container "web": container is running' in refused.stderr
    assert docker("stop", "-t", "5", "web").stdout == "web\n"
    assert docker("ps", "-q").stdout == ""
    assert docker("ps", "-a", "--format", "{{.Names}} {{.State}}", "-f", "name=web").stdout == "web exited\n"
    assert docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "web").stdout == "exited 143\n"
    stopped = docker("exec", "web", "true")
    assert stopped.returncode == 1 and stopped.stderr == f"Error response from daemon: container {web} is not running\n"
    assert docker("wait", "web").stdout == "143\n"
    assert docker("rm", "web").stdout == "web\n"
    gone = docker("rm", "web")
    assert gone.returncode == 1 and gone.stderr == "Error response from daemon: No such container: web\n"
    assert docker("rm", "-f", "web").returncode == 0


def test_a_program_that_ends_leaves_an_exited_container(server: RunningServer) -> None:
    made = docker("run", "-d", IMAGE, "sh", "-c", "echo done; exit 4").stdout.strip()
    try:
        assert docker("wait", made).stdout == "4\n"
        assert docker("ps", "-q").stdout == ""
        assert docker("ps", "-aq", "--no-trunc", "--filter", "exited=4").stdout == f"{made}\n"
        assert docker("logs", made).stdout == "done\n"
        assert docker("exec", made, "true").returncode == 1
    finally:
        assert docker("rm", made).stdout == f"{made}\n"


def test_rm_of_a_detached_container_deletes_it_at_its_stop(server: RunningServer, tmp_path: Path) -> None:
    cidfile = tmp_path / "id"
    made = docker("run", "-d", "--rm", "--cidfile", str(cidfile), IMAGE, "sleep", "1000").stdout.strip()
    assert cidfile.read_text() == made
    assert docker("run", "--cidfile", str(cidfile), IMAGE, "true").returncode == 125
    assert docker("kill", made).stdout == f"{made}\n"
    assert docker("inspect", made).returncode == 1


# ---- images and the link


def test_build_and_images(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f'FROM {IMAGE}\nENV WORD=built\nENTRYPOINT ["echo", "entry"]\nCMD ["default"]\n')
    here = {**os.environ, "ROCK_HOME": str(server.home)}
    built = docker("build", "-q", "-t", "team/tool:7", str(tmp_path), env=here)
    assert (built.returncode, built.stdout) == (0, "team/tool:7\n"), built.stderr
    assert docker("run", "--rm", "team/tool:7").stdout == "entry default\n"
    assert docker("run", "--rm", "team/tool:7", "word").stdout == "entry word\n"
    assert docker("run", "--rm", "--entrypoint", "", "team/tool:7", "sh", "-c", "echo $WORD").stdout == "built\n"
    listed = docker("images", "--format", "{{.Repository}}:{{.Tag}}", "team/tool", env=here)
    assert listed.stdout == "team/tool:7\n"
    assert json.loads(docker("image", "inspect", "team/tool:7", env=here).stdout)[0]["RepoTags"] == ["team/tool:7"]
    assert docker("image", "inspect", "nosuch", env=here).returncode == 1
    assert docker("build", "--squash", str(tmp_path)).returncode == 125
    missing = docker("build", str(tmp_path / "nosuch"))
    assert missing.returncode == 1 and "unable to prepare context" in missing.stderr


def test_a_link_named_docker_is_the_command(tmp_path: Path, server: RunningServer) -> None:
    program = Path(sys.executable).with_name("rock")
    environ = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    made = forking[0].run("docker", "install-link", str(tmp_path), env=environ, stdin=b"")
    assert made.returncode == 0 and made.stdout.decode() == f"{tmp_path}/docker\n", made.stderr
    link = tmp_path / "docker"
    done = subprocess.run([link, "run", "--rm", IMAGE, "echo", "linked"], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "linked\n"), done.stderr
    link.unlink()
    link.write_text("another program")
    assert forking[0].run("docker", "install-link", str(tmp_path), env=environ, stdin=b"").returncode == 1
    assert link.read_text() == "another program"
