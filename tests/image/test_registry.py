"""Pulling from registries: a real one, with and without a login, and hostile ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.image.image_archives import entry, leftovers, tar
from tests.image.registries import USER, Odd, blobs_of, docker_registry, odd_registry, push
from tests.waiting import until

from rock.errors import ImageError, Unavailable
from rock.images.registry.client import Registry
from rock.images.registry.logins import Login
from rock.images.registry.reference import parse
from rock.images.registry.transfers import shared_pull
from rock.images.store import ImageStore

BASE = tar([entry("etc"), entry("etc/old", b"old"), entry("etc/kept", b"kept" * 50_000)])
TOP = tar([entry("etc/.wh.old", b""), entry("new", b"new")])
OTHER = tar([entry("other", b"x")])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "push"
    folder.mkdir()
    return folder


def test_an_image_is_pulled_once(store: ImageStore, registry: str, scratch: Path) -> None:
    name = f"{registry}/team/tool:1.0"
    digest = push(name, [BASE, TOP], scratch, Env=["A=b"], WorkingDir="/etc", User="nobody")
    told: list[str] = []
    record = store.pull(name, progress=told.append)
    assert (record.name, record.digest, record.env["A"]) == (name, digest, "b")
    assert (record.cwd, record.user) == ("/etc", "nobody")
    assert told[0].startswith("2 of 2 layers to fetch")
    rootfs = store.resolve(name)
    top, base = (Path(layer) for layer in rootfs.layers)
    assert (top / "new").read_bytes() == b"new" and (base / "etc/kept").read_bytes() == b"kept" * 50_000
    told.clear()
    assert store.pull(name, progress=told.append) == record and told == ["0 of 2 layers to fetch, 0.0 MB"]
    assert store.pull(f"{registry}/team/tool@{digest}").layers == record.layers


def test_layers_are_shared_and_a_tag_moves_on(store: ImageStore, registry: str, scratch: Path) -> None:
    name = f"{registry}/team/moving:latest"
    push(name, [BASE, TOP], scratch, index=False)
    first = store.pull(name)
    push(name, [BASE, OTHER], scratch)
    told: list[str] = []
    second = store.pull(name, progress=told.append)
    assert told[0].startswith("1 of 2 layers to fetch") and second.layers[0] == first.layers[0] != second.layers[1]
    assert store.resolve(name).digest == second.digest


def test_many_at_once(store: ImageStore, registry: str, scratch: Path) -> None:
    name = f"{registry}/team/busy:1"
    push(name, [BASE, TOP, OTHER], scratch)
    told: list[str] = []
    threads = [threading.Thread(target=store.pull, args=(name, None, told.append)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(text.startswith("3 of 3") for text in told) == 1
    assert sum(text.startswith("0 of 3") for text in told) == 4


def test_what_is_not_there(store: ImageStore, registry: str) -> None:
    with pytest.raises(ImageError, match="has no"):
        store.pull(f"{registry}/team/nothing:1")
    with pytest.raises(ImageError, match="cannot be reached"):
        store.pull("127.0.0.1:1/team/tool")
    assert not leftovers(store)


def test_logins(store: ImageStore, tmp_path: Path, scratch: Path) -> None:
    with docker_registry(tmp_path, login=True) as address:
        name = f"{address}/team/secret:1"
        push(name, [BASE], scratch, USER)
        for login, whom in ((None, "without a login"), (Login("alice", "wrong"), "for alice")):
            with pytest.raises(ImageError, match=f"refuses .* {whom}") as caught:
                store.pull(name, login)
            assert "wrong" not in str(caught.value) and caught.value.hint
        assert store.pull(name, USER).name == name
    assert "sesame" not in repr(USER)


# ---- registries that do not keep to the rules

IMAGE = blobs_of([BASE, TOP])
LARGEST = list(IMAGE)[1]  # its first layer


def pulled(store: ImageStore, kind: type[Odd], blobs: dict[str, bytes] = IMAGE) -> str:
    with odd_registry(kind, blobs) as address:
        return store.pull(f"{address}/team/tool:1.0").digest


def test_a_broken_connection_is_gone_on_with(store: ImageStore) -> None:
    class Broken(Odd):
        def answer(self, path: str) -> bool:
            if not path.endswith(LARGEST) or self.headers.get("range"):
                return False
            self.send_response(200)
            self.send_header("content-length", str(len(self.blobs[LARGEST])))
            self.end_headers()
            self.wfile.write(self.blobs[LARGEST][:100])
            self.close_connection = True
            return True

    assert pulled(store, Broken) == list(IMAGE)[-1]


def test_a_busy_registry_is_waited_for(store: ImageStore) -> None:
    class Busy(Odd):
        left = 2

        def answer(self, path: str) -> bool:
            if Busy.left and path.startswith("manifests"):
                Busy.left -= 1
                self.send(429, b"", retry_after="1")
                return True
            return False

    assert pulled(store, Busy) == list(IMAGE)[-1]


def answered(status: int, body: bytes, only: str = "", **headers: str) -> type[Odd]:
    class Answering(Odd):
        def answer(self, path: str) -> bool:
            if path.startswith(only or "manifests"):
                self.send(status, body, **headers)
                return True
            return False

    return Answering


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (answered(200, b"{}" * (3 << 20)), "larger than"),
        (answered(200, b"not json"), "not a JSON object"),
        (answered(200, b"[" * 100_000), "not a JSON object"),
        (answered(200, b'{"manifests": 7}'), "manifests"),
        (answered(200, b'{"manifests": []}'), "no image for linux"),
        (answered(200, b'{"config": {"digest": "sha256:../../../../etc/passwd", "size": 1}}'), "not sha256"),
        (answered(200, b'{"config": {"digest": "sha256:' + b"a" * 64 + b'", "size": -1}}'), "without a valid size"),
        (answered(200, b"", "blobs"), "came only in part|does not match its digest"),
        (answered(200, b"x" * 1_000_000, "blobs"), "longer than"),
        (answered(302, b"", location="/v2/team/tool/manifests/1.0"), "redirects too often"),
        (answered(302, b"", location="http://169.254.169.254/latest"), "connection without TLS"),
        (answered(302, b"", location="file:///etc/passwd"), "connection without TLS"),
        (answered(401, b"", www_authenticate='Bearer realm="http://192.0.2.1/token"'), "without TLS"),
        (answered(401, b"", www_authenticate='Basic realm="x"'), "refuses"),
        (answered(401, b""), "refuses"),
        (answered(403, b'{"errors": [{"message": "no entry"}]}'), "no entry"),
        (answered(418, b'{"errors": 7}'), "answered HTTP 418"),
    ],
)
def test_hostile_answers(store: ImageStore, kind: type[Odd], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ImageError, match=match):
        pulled(store, kind)
    assert not leftovers(store)


def test_a_blob_with_other_content(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**IMAGE, LARGEST: bytes(len(IMAGE[LARGEST]))}
    with pytest.raises(ImageError, match="does not match its digest"):
        pulled(store, Odd, wrong)
    assert not leftovers(store)


def test_tokens(store: ImageStore) -> None:
    class Bearer(Odd):
        def answer(self, path: str) -> bool:
            if self.path.startswith("/token?"):
                self.send(200, b'{"token": "let-me-in"}')
                return True
            if self.headers.get("authorization") == "Bearer let-me-in":
                return False
            realm = f"http://{self.headers['host']}/token"
            self.send(401, b"", www_authenticate=f'Bearer realm="{realm}",service="s",scope="repository:a:b"')
            return True

    with odd_registry(Bearer, IMAGE) as address:
        assert store.pull(f"{address}/team/tool:1.0", USER).digest == list(IMAGE)[-1]
        tokens = [row for row in Bearer.asked if row[1].startswith("/token")]
        assert len(tokens) == 1 and "scope=repository%3Ateam%2Ftool%3Apull" in tokens[0][1]
        assert tokens[0][2] == USER.basic


def test_an_upload_is_sent_nowhere_else(tmp_path: Path) -> None:
    class Elsewhere(Odd):
        def do_POST(self) -> None:
            self.send(202, b"", location="http://192.0.2.1/upload")

    (tmp_path / "blob").write_bytes(b"x")
    with odd_registry(Elsewhere, IMAGE) as address:
        with pytest.raises(ImageError, match="another host"):
            Registry(parse(f"{address}/team/tool")).upload("sha256:" + "a" * 64, 1, tmp_path / "blob")


def test_a_pull_that_waits_for_another_reports_its_progress(tmp_path: Path) -> None:
    reported: list[str] = []
    with ThreadPoolExecutor(1) as threads:
        with shared_pull(tmp_path / "lock", None) as share:
            assert share is not None

            def wait() -> None:
                with shared_pull(tmp_path / "lock", reported.append):
                    reported.append("acquired")

            waiting = threads.submit(wait)
            until(lambda: "another process pulls it" in reported)
            share("1 of 2 layers " + "x" * 1000)
            until(lambda: any(words.startswith("1 of 2 layers x") for words in reported))
            share("short")
            until(lambda: reported[-1] == "short")
        waiting.result(60)
    assert reported[-1] == "acquired"

    def refuse(words: str) -> None:
        raise Unavailable("the pull was canceled")

    with shared_pull(tmp_path / "lock", None), pytest.raises(Unavailable), shared_pull(tmp_path / "lock", refuse):
        raise AssertionError("the lock is taken")
