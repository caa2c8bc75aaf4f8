"""Logins of registries: ROCK's own, Docker's and its helpers'; and mirrors, which get none that is not theirs."""

from __future__ import annotations

import base64
import email.utils
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.image.image_archives import entry, tar
from tests.image.registries import USER, Odd, blobs_of, docker_registry, odd_registry, push

from rock.errors import ImageError, InvalidConfig, NotFound
from rock.images.registry.logins import Login, Logins, domain_of
from rock.images.store import ImageStore

LAYER = tar([entry("file", b"content" * 1000)])
IMAGE = blobs_of([LAYER])


@pytest.fixture(scope="module")
def locked_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("locked")
    with docker_registry(folder, login=True) as address:
        push(f"{address}/team/tool:1.0", [LAYER], folder, USER)
        yield address


def docker_folder(folder: Path, body: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def auth(login: Login) -> str:
    return base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def test_our_own_file(tmp_path: Path) -> None:
    file = tmp_path / "home" / "registries.json"
    logins = Logins(file)
    assert logins.of("a.example") is None and logins.domains() == {}
    logins.save("a.example", USER)
    logins.save("b.example", Login("bob", "x"))
    assert Logins(file).of("a.example") == USER
    assert file.stat().st_mode & 0o777 == 0o600
    assert logins.domains() == {"a.example": "alice", "b.example": "bob"}
    logins.forget("a.example")
    assert logins.of("a.example") is None and logins.of("b.example") == Login("bob", "x")
    with pytest.raises(NotFound):
        logins.forget("a.example")
    file.chmod(0o644)
    with pytest.raises(InvalidConfig, match="read by others"):
        logins.of("b.example")
    file.chmod(0o600)
    file.write_text("{")
    with pytest.raises(InvalidConfig, match="no JSON"):
        logins.of("b.example")


def test_names_of_registries() -> None:
    assert domain_of("https://index.docker.io/v1/") == domain_of("docker.io") == "docker.io"
    assert domain_of("http://localhost:5000/") == "localhost:5000"
    for name in ("python", "a/b", "", "x y.z", "ftp://a.b"):
        with pytest.raises(InvalidConfig):
            domain_of(name)


def test_dockers_configuration(tmp_path: Path) -> None:
    folder = docker_folder(tmp_path / "docker", {"auths": {
        "a.example": {"auth": auth(USER)}, "https://index.docker.io/v1/": {"auth": auth(USER)},
        "bad.example": {"auth": "%"}, "empty.example": {}}})  # fmt: skip
    logins = Logins(tmp_path / "none.json", folder)
    assert logins.of("a.example") == USER == logins.of("docker.io")
    assert logins.of("empty.example") is None is logins.of("other.example")
    with pytest.raises(InvalidConfig, match="damaged"):
        logins.of("bad.example")
    own = Logins(tmp_path / "own.json", folder)
    own.save("a.example", Login("bob", "x"))
    assert own.of("a.example") == Login("bob", "x"), "our own come first"


HELPER = f"""#!{sys.executable}
import json, sys
assert sys.argv[1:] == ["get"]
who = sys.stdin.read()
if who == "token.example":
    print(json.dumps({{"Username": "<token>", "Secret": "t"}}))
elif who.startswith("unknown"):
    print("credentials not found in native keychain"); sys.exit(1)
elif who.startswith("odd"):
    print("hm")
elif who.startswith("broken"):
    print("no keychain"); sys.exit(3)
else:
    print(json.dumps({{"ServerURL": who, "Username": "alice", "Secret": "open sesame"}}))
"""


def test_helper_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker-credential-probe").write_text(HELPER)
    (programs / "docker-credential-probe").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    names = ("a.example", "token.example", "unknown.example", "odd.example", "broken.example")
    helpers = {**dict.fromkeys(names, "probe"), "gone.example": "nowhere", "evil.example": "../../bin/sh"}
    logins = Logins(None, docker_folder(tmp_path / "docker", {"credHelpers": helpers}))
    assert logins.of("a.example") == USER
    assert logins.of("unknown.example") is None
    for domain, match in (("token.example", "identity token"), ("odd.example", "is not a login"),
                          ("broken.example", "status 3"), ("gone.example", "not on this machine"),
                          ("evil.example", "not on this machine")):  # fmt: skip
        with pytest.raises(ImageError, match=match):
            logins.of(domain)
    stored = Logins(None, docker_folder(tmp_path / "docker", {"credsStore": "probe", "auths": {"b.example": {}}}))
    assert stored.of("b.example") == USER and stored.of("c.example") is None


def test_a_kept_login_pulls_and_pushes(tmp_path: Path, locked_registry: str) -> None:
    logins = Logins(tmp_path / "registries.json")
    store = ImageStore(tmp_path / "images", logins)
    name = f"{locked_registry}/team/tool:1.0"
    with pytest.raises(ImageError, match="rock image login") as caught:
        try:
            store.pull(name)
        except ImageError as error:
            raise ImageError(f"{error.message} {error.hint}") from None
    assert "without a login" in caught.value.message
    logins.save(locked_registry, USER)
    record = store.pull(name)
    assert store.push(name) and record.layers
    kept = [path for path in (tmp_path / "images").rglob("*") if path.is_file() and not path.is_symlink()]
    assert kept and not [path for path in kept if USER.password.encode() in path.read_bytes()]


def test_in_a_terminal(tmp_path: Path, locked_registry: str) -> None:
    environ = {**os.environ, "ROCK_HOME": str(tmp_path / "home"), "DOCKER_CONFIG": str(tmp_path)}

    def rock(*words: str, told: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rock.cli.main", "image", *words]
        return subprocess.run(command, env=environ, input=told, capture_output=True, text=True, timeout=60)

    login = ("login", locked_registry, "--username", USER.username, "--password-stdin")
    wrong = rock(*login, told="wrong\n")
    assert wrong.returncode == 1 and "refuses" in wrong.stderr and "wrong" not in wrong.stderr.replace("right", "")
    assert rock("logins").stdout == ""
    right = rock(*login, told=f"{USER.password}\n")
    assert right.returncode == 0, right.stderr
    assert rock("logins").stdout.split()[-2:] == [locked_registry, "alice"]
    assert USER.password not in right.stdout + right.stderr
    name = f"{locked_registry}/team/tool:1.0"
    fetched = rock("prefetch", name, name, "--pin")
    assert fetched.stdout.splitlines() == [f"{name}  pulled", f"{name}  present"], fetched.stderr
    assert "pinned" in rock("ls").stdout
    assert rock("prune", "--all").stdout.splitlines()[-1].endswith("freed") and name in rock("ls").stdout
    assert rock("unpin", name).returncode == 0
    assert name in rock("prune", "--all").stdout and name not in rock("ls").stdout
    assert rock("prefetch", f"{locked_registry}/team/none:1").returncode == 1
    assert rock("prune", "--to", "lots").returncode == 1
    assert rock("logout", locked_registry).returncode == 0
    assert rock("pull", name).returncode == 1
    assert rock("logout", locked_registry).returncode == 1


# ---- mirrors


def test_a_mirror_is_asked_first(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the registry itself where the mirror has nothing, or something wrong. Neither sees the other's login."""
    largest = list(IMAGE)[1]

    class Mirror(Odd):
        pass

    class Wrong(Odd):
        pass

    class Origin(Odd):
        pass

    wrong = {**IMAGE, largest: bytes(len(IMAGE[largest]))}
    with odd_registry(Mirror, IMAGE) as mirror, odd_registry(Wrong, wrong) as bad:
        with odd_registry(Origin, IMAGE) as origin:
            name = f"{origin}/team/tool:1.0"
            monkeypatch.setenv("ROCK_REGISTRY_MIRRORS", f"{origin}={mirror}, other.example=127.0.0.1:1")
            assert store.pull(name, USER).digest == list(IMAGE)[-1]
            assert Mirror.asked and not Origin.asked
            assert not any(row[2] for row in Mirror.asked), "the login is not the mirror's"
            store.remove(name)
            monkeypatch.setenv("ROCK_REGISTRY_MIRRORS", f"{origin}=127.0.0.1:1,{origin}={bad}")
            told: list[str] = []
            assert store.pull(name, progress=told.append).name == name
            assert any("mirror 127.0.0.1:1: " in text and "cannot be reached" in text for text in told)
            assert any(f"mirror {bad}: " in text and "does not match its digest" in text for text in told)
            assert any(row[1].endswith(largest) for row in Origin.asked)


def busy(*waits: str) -> type[Odd]:
    class Busy(Odd):
        left = list(waits)

        def answer(self, path: str) -> bool:
            if self.left and path.startswith("manifests"):
                self.send(429, b"", retry_after=self.left.pop(0))
                return True
            return False

    return Busy


def test_how_long_a_registry_has_us_wait(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    date = email.utils.formatdate(time.time() + 40, usegmt=True)
    with odd_registry(busy("7", date, "soon"), IMAGE) as address:
        store.pull(f"{address}/team/tool:1.0")
    waits = [second for second in slept if second > 0.4]
    assert waits[0] == 7 and 20 < waits[1] <= 41 and waits[2] == 2.0, slept
    with odd_registry(busy("86400"), IMAGE) as address:
        with pytest.raises(ImageError, match="in 86400 s"):
            store.pull(f"{address}/team/tool:1.0")


def test_a_connection_that_breaks_before_an_answer(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Odd):
        left = 2

        def answer(self, path: str) -> bool:
            if Breaking.left and path.startswith("blobs"):
                Breaking.left -= 1
                self.close_connection = True
                return True
            return False

    assert store.has("x") is False
    with odd_registry(Breaking, IMAGE) as address:
        assert store.pull(f"{address}/team/tool:1.0").digest == list(IMAGE)[-1]
    assert Breaking.left == 0
