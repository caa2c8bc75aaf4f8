"""Dockerfiles, built by a real server: what comes out, what is taken over, and what is refused with its line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer
from tests.e2e.test_bad_requests import ask
from tests.e2e.test_images import small_root
from tests.image.registries import USER, docker_registry
from tests.waiting import until

from rock.errors import CommandFailed, CommandTimeout, ImageError, InvalidConfig, NotFound, RockError, Unsupported
from rock.images.store import ImageStore
from rock.protocol.images import BuildRequest, BuiltImage
from rock.protocol.routes import ROUTES, STREAM_TYPE, Frame, pack_frame
from rock.sync import Client, Sandbox

BASE = "small:1"
FULL = r"""
# syntax=docker/dockerfile:1
ARG BASE=small:1
ARG GLOBAL=from-outside
FROM ${BASE} AS made
ARG GLOBAL
ARG WHO=nobody
ENV GREETING="hello $WHO" PLACE=/work
WORKDIR $PLACE
RUN echo "$GREETING $GLOBAL" > greeting; echo gone > gone; mkdir folder; echo 1 > folder/old
RUN rm gone; rm -r folder; mkdir folder; echo 2 > folder/new
COPY --chmod=640 --chown=7:8 data/ kept/
COPY *.txt "other file" /texts/
COPY <<-HERE <<'RAW' /here/
	$WHO was here
HERE
$WHO stays
RAW
RUN <<SCRIPT
set -e
cat /here/HERE /here/RAW
ls kept > listing
SCRIPT
ADD packed.tar.gz /unpacked

FROM ${BASE} AS unused
RUN exit 9

FROM ${BASE}
COPY --from=made /work /work
COPY --from=0 /texts/a.txt /only
USER 7:8
WORKDIR /work/sub/deep
LABEL made.by="tests" 'a b'=c
EXPOSE 80 443/udp
VOLUME /data
ENTRYPOINT ["cat"]
CMD ["/only"]
"""


def context_of(folder: Path, dockerfile: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile)
    (folder / "data" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "deep" / "file").write_text("deep\n")
    (folder / "data" / "top").write_text("top\n")
    for name in ("a.txt", "b.txt", "other file", "secret.key"):
        (folder / name).write_text(f"{name}\n")
    with tarfile.open(folder / "packed.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("inside/file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    programs = ("rm", "mkdir", "sleep", "id", "stat", "env", "sh")
    root = small_root(tmp_path_factory.mktemp("root"), *programs)
    (root / "bin").mkdir(exist_ok=True)
    if not (root / "bin" / "sh").exists():
        (root / "bin" / "sh").symlink_to("/usr/bin/sh")
    return root


@pytest.fixture
def store(server: RunningServer, root: Path) -> ImageStore:
    """The server's, with a small image; steps of other tests are gone."""
    store = ImageStore(server.home / "images")
    store.prune(steps=True)
    if store.has("team/built:1"):
        store.remove("team/built:1")
    if not store.has(BASE):
        store.import_folder(root, BASE)
    return store


def build(server: RunningServer, folder: Path, tag: str = "team/built:1", **fields: object) -> tuple[BuiltImage, str]:
    """(the image, all output)."""
    told: list[str] = []
    with Client(server.url) as client:
        return client.build_image(folder, tag, progress=told.append, **fields), "".join(told)  # type: ignore[arg-type]


def run(server: RunningServer, image: str, command: str, **more: object) -> str:
    with Sandbox(base_url=server.url, image=image, memory="256m") as sandbox:
        done = sandbox.execute(["/bin/sh", "-c", command], **more)  # type: ignore[arg-type]
        assert done.exit_code == 0, done.stderr
        return done.stdout


def test_all_of_it(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    folder = context_of(tmp_path / "context", FULL)
    made, told = build(server, folder, build_args={"WHO": "me", "NOBODY": "x"}, labels={"more": "label"})
    assert (made.name, made.ran, made.cached) == ("team/built:1", 3, 0)
    assert "me was here\n$WHO stays\n" in told, "what RUN printed"
    assert "warning: no ARG NOBODY" in told and "VOLUME is kept" in told and "unused" not in told
    record = store.inspect("team/built:1")
    assert (record.user, record.cwd, record.entrypoint, record.cmd) == ("7:8", "/work/sub/deep", ("cat",), ("/only",))
    assert record.labels == {"made.by": "tests", "a b": "c", "more": "label"}
    assert record.other == {"ExposedPorts": {"80/tcp": {}, "443/udp": {}}, "Volumes": {"/data": {}}}
    assert record.layers[0] == store.inspect(BASE).layers[0], "the image below shares its layer"
    seen = run(server, "team/built:1", "cat /work/greeting /work/listing /only; ls /work /work/folder; pwd; env; id -u")
    assert seen.startswith("hello me from-outside\ndeep\ntop\na.txt\n")
    words = seen.split()
    assert "gone" not in words and "old" not in words and "new" in words and "/work/sub/deep" in words
    assert "GREETING" not in seen, "that was of another stage"
    with pytest.raises(AssertionError, match="No such file"):
        run(server, "team/built:1", "cat /here/RAW", user="0")
    target, _ = build(server, folder, "team/stage:1", build_args={"WHO": "me"}, target="MADE")
    assert target.ran == 0 and target.cached >= 6
    owners = run(server, "team/stage:1", "stat -c '%a %u:%g' kept/top kept/deep; cat /unpacked/inside/file; env")
    mine = "7:8" if os.geteuid() == 0 else "0:0"
    assert owners.startswith((f"640 {mine}\n640 {mine}\nabc", f"640 {mine}\n740 {mine}\nabc"))
    assert "GREETING=hello me\n" in owners
    for name in ("team/built:1", "team/stage:1"):
        store.remove(name)


def test_what_was_made_before_is_taken_over(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    text = "FROM small:1\nARG A=1\nCOPY a.txt /a\nRUN echo $A; cat /a > /b\nCOPY data /data\nRUN echo last > /c\n"
    folder = context_of(tmp_path / "context", text)
    first, _ = build(server, folder)
    assert (first.ran, first.cached) == (2, 0)
    again, told = build(server, folder)
    assert (again.ran, again.cached, again.digest) == (0, 4, first.digest) and told.count("taken over") == 4
    os.utime(folder / "a.txt", (1, 1))
    (folder / "b.txt").write_text("nobody copies this")
    assert build(server, folder)[0].ran == 0
    (folder / "data" / "top").write_text("changed\n")
    late, _ = build(server, folder)
    assert (late.ran, late.cached) == (1, 2), "what comes before a change is taken over, what comes after it is not"
    assert build(server, folder, build_args={"A": "2"})[0].ran == 2
    (folder / "a.txt").write_text("changed\n")
    assert build(server, folder)[0].ran == 2
    assert build(server, folder, use_cache=False)[0].ran == 2
    assert store.prune(steps=True).names
    assert run(server, "team/built:1", "cat /b /c") == "changed\nlast\n", "the image does not need its steps"
    store.remove("team/built:1")


def refused(server: RunningServer, folder: Path, text: str, **fields: object) -> RockError:
    with pytest.raises(RockError) as caught:
        build(server, context_of(folder, text), **fields)
    assert not ImageStore(server.home / "images").has("team/built:1")
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "kind", "match"),
    [
        ("FROM small:1\nRUN echo one; echo two >&2; exit 3", 2, CommandFailed, "RUN ended with status 3"),
        ("FROM small:1\nRUN kill -9 $$", 2, CommandFailed, "signal 9"),
        ("FROM small:1\nRUN sleep 600", 2, CommandTimeout, "longer than 1 s"),
        ('FROM small:1\nRUN ["/no/such"]', 2, NotFound, "/no/such"),
        ('FROM small:1\n\nSHELL ["/no/shell"]\nRUN x', 4, NotFound, "/no/shell"),
        ("FROM small:1\nUSER nobody-here\nRUN x", 3, NotFound, "nobody-here"),
        ("FROM small:1\nCOPY nothing /", 2, NotFound, "nothing"),
        ("FROM small:1\nCOPY ../../etc/passwd /", 2, NotFound, "etc/passwd"),
        ("FROM small:1\nCOPY a.txt b.txt /x", 2, InvalidConfig, "several files"),
        ("FROM small:1\nCOPY a.txt", 2, InvalidConfig, "no target"),
        ("FROM small:1\nCOPY --chown=nobody-here a.txt /", 2, NotFound, "nobody-here"),
        ("FROM small:1\nCOPY --chmod=u+x a.txt /", 2, Unsupported, "octal"),
        ("FROM small:1\nADD https://example.com/x /", 2, Unsupported, "fetched from elsewhere"),
        ("FROM small:1\nONBUILD RUN x", 2, Unsupported, "ONBUILD"),
        ("FROM small:1\nRUN --mount=type=cache,target=/x y", 2, Unsupported, "--mount"),
        ("FROM small:1\nRUN --network=host y", 2, Unsupported, "network none"),
        ("FROM --platform=linux/s390x small:1", 1, Unsupported, "s390x"),
        ("FROM small:1 AS a\nCOPY --from=b /x /x\nFROM small:1 AS b\nFROM a", 2, InvalidConfig, "comes later"),
        ("FROM $NONE", 1, InvalidConfig, "is nothing"),
        ("FROM 127.0.0.1:1/none:1", 1, ImageError, "cannot be reached"),
        ("FROM small:1\nWORKDIR /marker", 2, InvalidConfig, "not a folder"),
        ("FROM python:3.11\nCOPY a.txt /usr/share/x", 2, Unsupported, "this machine's own"),
        ("FROM python:3.11 AS a\nFROM small:1\nCOPY --from=a /etc/passwd /x", 3, Unsupported, "own system"),
    ],
)
def test_what_is_refused_names_its_line(
    server: RunningServer, store: ImageStore, tmp_path: Path, text: str, line: int, kind: type[RockError], match: str
) -> None:
    if "USER" in text and os.geteuid() != 0:
        pytest.skip("an ordinary user's sandboxes have one user")
    error = refused(server, tmp_path / "context", text, timeout=1 if "sleep" in text else 60)
    assert isinstance(error, kind) and match in error.message, error
    assert error.message.startswith(f"Dockerfile line {line}: ") and error.details["line"] == line
    if "exit 3" in text:
        assert error.details["output"] == "one\ntwo\n"
        assert error.hint is not None and "no network" in error.hint


def test_other_refusals(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    folder = tmp_path / "context"
    assert "no stage" in refused(server, folder, "FROM small:1", target="nothing").message
    for tag in ("host", "UPPER", "localhost/rock-build:x", "a@sha256:" + "0" * 64):
        with pytest.raises(InvalidConfig):
            build(server, folder, tag)
    with pytest.raises(InvalidConfig, match="network"):
        build(server, folder, network="all")
    for fields in ({"memory": "abc"}, {"cpus": float("inf")}, {"timeout": float("inf")}, {"build_args": {"A": "\0"}}):
        with pytest.raises(InvalidConfig):
            build(server, folder, **fields)
        head = BuildRequest.model_construct(image_tag="a:1", dockerfile="FROM small:1", **fields)
        frame = pack_frame(Frame.RESULT, json.dumps(head.model_dump(), default=str).encode())
        row = ROUTES["build_image"]
        status, told = ask(server, row.method, row.path, frame, **{"content-type": STREAM_TYPE})
        assert (status, told["error"]["code"]) == (422, "invalid_config")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        build(server, tmp_path / "none")
    (folder / ".wh.a.txt").write_text("")
    assert "no layer can have" in refused(server, folder, "FROM small:1").message


def test_nothing_leads_out_of_a_context(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    """A context comes from whoever asks for the build: its links are those of the context and not of the machine."""
    folder = context_of(tmp_path / "context", "FROM small:1\nCOPY data /data\nCOPY out/hostname /here\n")
    (folder / "out").symlink_to("/etc")
    (folder / "data" / "link").symlink_to("/etc/hostname")
    os.mkfifo(folder / "data" / "fifo")
    with pytest.raises(NotFound, match="line 3"):
        build(server, folder)
    (folder / "Dockerfile").write_text("FROM small:1\nCOPY data /data\n")
    build(server, folder)
    seen = run(server, "team/built:1", "ls /data; cat /data/link")
    assert seen == "deep\nlink\ntop\nsandbox\n", "that of the sandbox"
    store.remove("team/built:1")


def test_what_is_ignored_does_not_travel(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    folder = context_of(tmp_path / "context", "FROM small:1\nCOPY . /all\n")
    (folder / ".dockerignore").write_text("# none\n*.key\n**/top\ndata/deep\n!data/deep/file\n*.tar.gz\nDocker*\n")
    build(server, folder)
    seen = run(server, "team/built:1", "cd /all; ls . data data/deep").split()
    assert seen == [".:", "a.txt", "b.txt", "data", "other", "file", "data:", "deep", "data/deep:", "file"]
    store.remove("team/built:1")


def test_of_nothing(server: RunningServer, store: ImageStore, root: Path, tmp_path: Path) -> None:
    """FROM scratch; and files work where there is no shell."""
    folder = context_of(tmp_path / "context", "FROM scratch\nCOPY data /data\nENV A=b\n")
    made, _ = build(server, folder)
    assert made.layers == 1
    with Sandbox(base_url=server.url, image="team/built:1", memory="256m") as sandbox:
        assert sandbox.fs.read("/data/top") == b"top\n"
        sandbox.fs.write("/data/more", b"x")
        assert {found.name for found in sandbox.fs.list("/data")} == {"deep", "more", "top"}
        with pytest.raises(NotFound):
            sandbox.execute(["/bin/sh", "-c", "true"])
    store.remove("team/built:1")


def test_of_this_machines_own_system(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    text = f"FROM {IMAGE}\nENV A=b\nWORKDIR /task\nRUN python3 -c 'print(6 * 7)' > answer\nCOPY data /data\n" \
           "USER nobody\n"
    made, _ = build(server, context_of(tmp_path / "context", text))
    assert made.ran == 1
    user = "nobody" if os.geteuid() == 0 else "root"  # an ordinary user's sandboxes have one user
    assert run(server, "team/built:1", "cat answer /data/top; echo $A; id -un") == f"42\ntop\nb\n{user}\n"
    with pytest.raises(Unsupported, match="own system"):
        store.push("team/built:1")
    error = refused_run(server, tmp_path / "usr", f"FROM {IMAGE}\nRUN echo > /usr/local/share/x")
    assert error.details["line"] == 2
    store.remove("team/built:1")


def refused_run(server: RunningServer, folder: Path, text: str) -> RockError:
    with pytest.raises(RockError) as caught:
        build(server, context_of(folder, text), "team/other:1")
    return caught.value


def test_bases_and_results_in_a_registry(
    own_server: Callable[..., RunningServer], root: Path, tmp_path: Path
) -> None:
    """FROM pulls with a login, what was built is pushed, and another machine runs it."""
    server, other = own_server(), own_server()
    (tmp_path / "registry").mkdir()
    with docker_registry(tmp_path / "registry", login=True) as address:
        base, tag = f"{address}/team/base:1", f"{address}/team/task:1"
        store = ImageStore(server.home / "images")
        store.import_folder(root, base)
        store.push(base, USER)
        store.remove(base)
        folder = context_of(tmp_path / "context", f"FROM {base}\nRUN echo 41 > /answer; rm /marker\nEXPOSE 80\n")
        with pytest.raises(ImageError, match=r"line 1: .*without a login"):
            build(server, folder, tag)
        login = {"registry_username": USER.username, "registry_password": USER.password}
        build(server, folder, tag, **login)
        store.push(tag, USER)
        options = {"base_url": other.url, "image": tag, "memory": "256m", **login}
        with Sandbox(**options) as sandbox:
            assert sandbox.arun("cat /answer; ls /marker").output.startswith("41\n")
            assert sandbox.arun("ls /marker").exit_code != 0
        assert ImageStore(other.home / "images").inspect(tag).other == {"ExposedPorts": {"80/tcp": {}}}
    kept = [path for path in server.home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in kept if USER.password.encode() in path.read_bytes()]


def test_who_leaves_ends_the_build(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    folder = context_of(tmp_path / "context", "FROM small:1\nRUN echo begun; sleep 600\n")
    command = [sys.executable, "-m", "rock.cli.main", "image", "build", "-t", "team/built:1", str(folder)]
    environ = {**os.environ, "ROCK_BASE_URL": server.url}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        while "begun" not in child.stderr.readline():
            assert child.poll() is None
        child.kill()
    end = time.monotonic() + 60
    while list((server.home / "images" / "tmp").iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not list((server.home / "images" / "tmp").iterdir()) and not store.has("team/built:1")


def test_a_server_that_dies_leaves_nothing_half_made(
    own_server: Callable[..., RunningServer], root: Path, tmp_path: Path
) -> None:
    server = own_server()
    store = ImageStore(server.home / "images")
    store.import_folder(root, BASE)
    folder = context_of(tmp_path / "context", "FROM small:1\nRUN echo 1 > /one\nRUN echo begun; sleep 600\n")
    begun, failed = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            with Client(server.url) as client:
                client.build_image(folder, "team/built:1", progress=lambda text: "begun\n" in text and begun.set())
        except RockError:
            failed.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(60)
    server.kill()
    asking.join()
    assert failed.is_set()
    server.start()
    (folder / "Dockerfile").write_text("FROM small:1\nRUN echo 1 > /one\nRUN echo 2 > /two\n")
    made, _ = build(server, folder)
    assert (made.cached, made.ran) == (1, 1), "the step that was done is there"
    assert not list((store.folder / "tmp").iterdir())
    server.stop()
    store.remove("team/built:1")
    assert json.dumps(server.inventory(), default=str)


def test_in_a_terminal(server: RunningServer, store: ImageStore, tmp_path: Path) -> None:
    folder = context_of(tmp_path / "context", "FROM small:1\nARG A\nRUN echo got $A\n")
    environ = {**os.environ, "ROCK_BASE_URL": server.url, "ROCK_HOME": str(server.home)}

    def rock(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rock.cli.main", "image", *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)

    done = rock("build", "-t", "team/built:1", str(folder), "--build-arg", "A=b")
    assert done.returncode == 0 and done.stdout.startswith("team/built:1  sha256:") and "got b\n" in done.stderr
    layout = tmp_path / "layout.tar"
    assert rock("export", "team/built:1", str(layout)).returncode == 0
    assert rock("import", str(layout), "team/again:1").returncode == 0
    assert run(server, "team/again:1", "cat /marker") == "from the image\n"
    assert "rock-build" not in rock("ls").stdout and "rock-build" in rock("ls", "--steps").stdout

    def pruned() -> bool:
        assert rock("prune").returncode == 0
        return "rock-build" not in rock("ls", "--steps").stdout

    until(pruned, 30, "the worker retains the lease of an image for two seconds after a create")
    text = b"FROM small:1\nLABEL a=b\n"
    command = [sys.executable, "-m", "rock.cli.main", "image", "build", "-t", "team/piped:1", "-"]
    assert subprocess.run(command, env=environ, input=text, timeout=60).returncode == 0, "a Dockerfile as input"
    for mode in ("w", "w:gz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:
            archive.add(folder, ".")
        assert subprocess.run(command, env=environ, input=buffer.getvalue(), timeout=60).returncode == 0, mode
    for wrong in (b"", b"\x1f\x8bno tar"):
        refused = subprocess.run(command, env=environ, input=wrong, capture_output=True, text=False, timeout=60)
        assert refused.returncode == 1 and b"error: the standard input is" in refused.stderr
    store.remove("team/piped:1")
    (folder / "Dockerfile").write_text("FROM small:1\nRUN exit 5\n")
    bad = rock("build", "-t", "team/built:1", str(folder))
    assert bad.returncode == 1 and "error: Dockerfile line 2: RUN ended with status 5" in bad.stderr
    for name in ("team/built:1", "team/again:1"):
        store.remove(name)
