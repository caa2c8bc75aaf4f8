"""Room on the disk: what a budget and a prune remove, and what they never do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.image.image_archives import entry, tar
from tests.image.registries import Odd, blobs_of, odd_registry

from rock.errors import InvalidConfig, NotFound
from rock.images.records import locked
from rock.images.store import ImageStore
from rock.settings import Settings

MB = 1_000_000


def add(store: ImageStore, folder: Path, name: str, *sizes: int, used: float = 1000.0) -> None:
    """An image with files of its own, which was last used so many seconds ago."""
    root = folder / name.replace(":", "-")
    root.mkdir()
    for number, size in enumerate(sizes):
        (root / f"{name[0]}{number}").write_bytes(name.encode() * (size // len(name)))
    store.import_folder(root, name)
    age(store, name, used)


def age(store: ImageStore, name: str, seconds: float) -> None:
    """As if it had been made and used that long ago."""
    record = store.inspect(name)
    file = next(path for path in (store.folder / "images").glob("*.json") if f'"{record.name}"' in path.read_text())
    then = time.time() - seconds
    file.write_text(file.read_text().replace(str(record.created), str(then)))
    os.utime(store.folder / "used" / file.stem, (then, then))


def names(store: ImageStore) -> list[str]:
    return [record.name for record in store.list() if record.name != "host"]


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", budget=3 * MB)
    for name, used in (("a:1", 500.0), ("b:1", 900.0), ("c:1", 700.0)):
        add(store, tmp_path, name, 900_000, used=used)
    assert names(store) == ["a:1", "b:1", "c:1"]
    add(store, tmp_path, "d:1", 900_000)
    assert names(store) == ["a:1", "c:1", "d:1"], "b:1 was used longest ago"
    other = ImageStore(tmp_path / "images")  # it notes a use once a minute
    other.lease(other.resolve("c:1")).close()
    age(store, "a:1", 5000)
    add(store, tmp_path, "e:1", 900_000, used=0)
    assert names(store) == ["c:1", "d:1", "e:1"]
    assert len(store.layers.ids()) == 4 and not list((store.folder / "tmp").iterdir()), "theirs, and that of `host`"


def test_what_stays_over_any_budget(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", budget=MB)
    add(store, tmp_path, "pinned:1", 900_000, used=9000)
    store.pin("pinned:1")
    add(store, tmp_path, "mounted:1", 900_000, used=8000)
    held = store.lease(store.resolve("mounted:1"))
    age(store, "mounted:1", 8000)
    add(store, tmp_path, "idle:1", 900_000, used=7000)
    store.from_host("mine:1")
    add(store, tmp_path, "new:1", 900_000, used=0)
    assert names(store) == ["mine:1", "mounted:1", "new:1", "pinned:1"]
    held.close()
    assert "mounted:1" in store.prune(most=MB * 2).names
    assert store.prune(everything=True).names == ("new:1",)
    assert names(store) == ["mine:1", "pinned:1"]
    with pytest.raises(NotFound):
        store.pin("new:1")
    store.import_folder(tmp_path / "pinned-1", "pinned:1")
    assert store.inspect("pinned:1").pinned, "a newer image of that name stays pinned"
    store.pin("pinned:1", False)
    assert store.prune(everything=True).names == ("pinned:1",)


def test_shared_layers_count_once(tmp_path: Path, store: ImageStore) -> None:
    add(store, tmp_path, "a:1", 900_000)
    store.import_folder(tmp_path / "a-1", "same:1")
    assert store.prune(most=MB).names == (), "both are one layer"
    assert store.prune(most=1).freed > 0


def test_while_an_image_is_added_nothing_goes(store: ImageStore, tmp_path: Path) -> None:
    add(store, tmp_path, "a:1", 1000)
    with locked(store.folder / "locks" / "store", shared=True):
        assert store.prune(everything=True).busy
    assert names(store) == ["a:1"]


def test_a_budget_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="ROCK_IMAGE_BUDGET"):
        ImageStore.of(Settings(home=tmp_path, image_budget="much"))
    assert ImageStore.of(Settings(home=tmp_path, image_budget="2g")).budget == 2 << 30


def test_a_pull_that_was_killed_is_gone_on_with(store: ImageStore) -> None:
    """What was unpacked is there, and nothing else."""
    blobs = blobs_of([tar([entry(f"file{n}", os.urandom(200_000))]) for n in range(3)])
    last = list(blobs)[3]

    class Slow(Odd):
        stuck = True

        def answer(self, path: str) -> bool:
            if Slow.stuck and path.endswith(last):
                self.send_response(200)
                self.send_header("content-length", str(len(self.blobs[last])))
                self.end_headers()
                self.wfile.write(self.blobs[last][:1000])
                self.wfile.flush()
                while Slow.stuck:
                    time.sleep(0.02)
                self.close_connection = True
                return True
            return False

    program = "import sys; from pathlib import Path; from rock.images.store import ImageStore\n" \
              "ImageStore(Path(sys.argv[1])).pull(sys.argv[2])"
    with odd_registry(Slow, blobs) as address:
        name = f"{address}/team/tool:1.0"
        child = subprocess.Popen([sys.executable, "-c", program, str(store.folder), name])
        end = time.monotonic() + 60
        while len(store.layers.ids()) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        Slow.stuck = False
        assert len(store.layers.ids()) == 2 and not store.has(name)
        again = ImageStore(store.folder)  # removes what was half-made
        assert not list((store.folder / "tmp").iterdir())
        told: list[str] = []
        again.pull(name, progress=told.append)
        assert told[0].startswith("1 of 3 layers to fetch")
