"""Where archives are kept: the same contract for a folder and for a bucket of a real S3 server."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rock.errors import InvalidConfig, NotFound, ServerError, Unavailable
from rock.settings import Settings
from rock.store.blobs import Blobs, FolderBlobs
from rock.store.s3 import Bucket, Request, S3Blobs, signed


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return FolderBlobs(tmp_path / "archive")
    endpoint = request.getfixturevalue("s3_endpoint")
    place = Bucket.parse(f"s3://rock-test/{tmp_path.name}/a b+c", endpoint, "us-east-1", "k", "s")
    return S3Blobs(place, part=5 << 20)


async def pieces(data: bytes, size: int = 700_000, fail: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
    if fail:
        raise RuntimeError("whoever gave it broke off")


async def whole(blobs: Blobs, name: str) -> bytes:
    return b"".join([part async for part in blobs.get(name)])


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (5 << 20) + 1, 23_000_001])
def test_what_is_put_is_got(blobs: Blobs, size: int) -> None:
    data = os.urandom(size)

    async def main() -> None:
        await blobs.put("one", pieces(b"before"))
        await blobs.put("one", pieces(data))
        assert await whole(blobs, "one") == data
        await blobs.put("two.x-y_z", pieces(b"2"))
        assert await blobs.list() == ["one", "two.x-y_z"]
        await blobs.delete("one")
        await blobs.delete("one")
        assert await blobs.list() == ["two.x-y_z"]
        with pytest.raises(NotFound):
            await whole(blobs, "one")
        await blobs.delete("two.x-y_z")

    asyncio.run(main())


def test_what_broke_off_leaves_what_was_there(blobs: Blobs) -> None:
    async def main() -> None:
        await blobs.put("one", pieces(b"before"))
        for size in (10, 12 << 20):
            with pytest.raises(RuntimeError):
                await blobs.put("one", pieces(bytes(size), fail=True))
        assert await whole(blobs, "one") == b"before"
        assert await blobs.list() == ["one"]
        await blobs.delete("one")

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", ".hidden", "a" * 201, "a\0b"])
def test_a_name_is_one_name(blobs: Blobs, name: str) -> None:
    async def main() -> None:
        for work in (blobs.put(name, pieces(b"x")), blobs.delete(name), whole(blobs, name)):
            with pytest.raises(InvalidConfig):
                await work

    asyncio.run(main())


def test_a_folder_is_private_and_swept(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    blobs = FolderBlobs(folder)

    async def main() -> None:
        await blobs.put("one", pieces(b"x"))
        (folder / ".new-two-0000").write_bytes(b"half")
        assert await blobs.list() == ["one"]
        await blobs.sweep()

    asyncio.run(main())
    assert sorted(p.name for p in folder.iterdir()) == ["one"]
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "one").stat().st_mode & 0o777 == 0o600


def test_signatures_are_those_of_the_published_examples() -> None:
    """Amazon's own, of its page on signing: the bucket's list, and its life cycle."""
    place = Bucket("https://examplebucket.s3.amazonaws.com", "examplebucket", key="AKIAIOSFODNN7EXAMPLE",
                  secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")  # fmt: skip
    now = datetime(2013, 5, 24, tzinfo=UTC)
    for query, signature in (
        ((("prefix", "J"), ("max-keys", "2")), "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
        ((("lifecycle", ""),), "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
    ):
        headers = signed(place, Request("GET", "/", query), "examplebucket.s3.amazonaws.com", now)
        assert headers["authorization"].endswith(f"Signature={signature}")


@pytest.fixture
def flaky() -> Iterator[Callable[[list[int]], S3Blobs]]:
    """A service that answers with these statuses, one after the other."""
    servers: list[ThreadingHTTPServer] = []

    def make(statuses: list[int]) -> S3Blobs:
        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(statuses.pop(0))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        return S3Blobs(Bucket.parse("s3://rock-test", endpoint, "us-east-1", "k", "s"))

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_may_pass_is_tried_again(flaky: Callable[[list[int]], S3Blobs]) -> None:
    statuses = [503, 500, 200]
    asyncio.run(flaky(statuses).put("one", pieces(b"x")))
    assert statuses == []
    statuses = [403, 200]
    with pytest.raises(ServerError, match="403"):
        asyncio.run(flaky(statuses).put("one", pieces(b"x")))
    assert statuses == [200]


def test_nobody_there_is_told(free_port: Callable[[], int]) -> None:
    blobs = S3Blobs(Bucket.parse("s3://rock-test", f"http://127.0.0.1:{free_port()}", "us-east-1", "k", "s"))
    with pytest.raises(Unavailable, match="does not respond"):
        asyncio.run(blobs.put("one", pieces(b"x")))
    with pytest.raises(Unavailable, match="does not respond"):
        asyncio.run(whole(blobs, "one"))


def test_settings_that_name_no_bucket(tmp_path: Path) -> None:
    from rock.admin.app import make_blobs

    assert make_blobs(Settings(tmp_path, archive="off")) is None
    assert isinstance(make_blobs(Settings(tmp_path)), FolderBlobs)
    for settings in (
        Settings(tmp_path, archive="s3://bucket"),
        Settings(tmp_path, archive="s3://", s3_key="k", s3_secret="s"),
        Settings(tmp_path, archive="s3://bucket", s3_key="k", s3_secret="s", s3_endpoint="nothing"),
    ):
        with pytest.raises(InvalidConfig):
            make_blobs(settings)
    named = make_blobs(Settings(tmp_path, archive="s3://bucket/some/where", s3_key="k", s3_secret="s"))
    assert isinstance(named, S3Blobs) and named.place.prefix == "some/where/"
    assert "secret" not in repr(Settings(tmp_path, s3_secret="very secret")).replace("s3_secret", "")
