"""Integrity checks of a server's files on disk: `rock doctor store`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rock.cli.serve.home import Home
from rock.cli.serve.upkeep import store_file
from rock.errors import Conflict, Unsupported
from rock.gateway import recording
from rock.gateway.runs import CALLS_FILE, RUN_FILE
from rock.host import atomic_file
from rock.rocklet.durability import checksums, journal
from rock.settings import Settings
from rock.store.migrations import SQLITE


@dataclass
class Found:
    """One finding. kind: store, catalogue, identity, record, journal, output, log, runtime record, orphan, gateway or
    image.

    path: of the file; ok: whether it is intact; detail: the damage, or the checked content; hint: the remedy. repaired:
    the path to which it was moved.
    """

    kind: str
    path: str
    ok: bool
    detail: str = ""
    hint: str = ""
    repaired: str | None = None


class Check:
    """Checks a home folder. repair: move damaged files to ROCK_HOME/damaged. No file is deleted."""

    def __init__(self, settings: Settings, repair: bool = False, images: bool = False) -> None:
        self._settings = settings
        self._home, self._run = settings.home, settings.run_dir
        self._repair = repair
        self._images = images
        self._running = Home(settings.home).read() is not None
        self._used: set[str] = set()  # folders of spool files
        self._counts: dict[str, int] = {}

    def run(self) -> list[Found]:
        """All findings, and one line for each intact kind. Conflict for a repair while a server runs."""
        if self._repair and self._running:
            raise Conflict(f"a server runs with ROCK_HOME={self._home}: its files are in use",
                           hint="rock admin stop --keep, then repair")  # fmt: skip
        found: list[Found] = []
        kinds: list[tuple[str, Callable[[], Iterator[Found]]]] = [
            ("store", self._store), ("catalogue", self._catalogue), ("identity", self._identity),
            ("record", self._records), ("runtime record", self._runtime_records), ("journal", self._journals),
            ("orphan", self._orphans), ("gateway", self._gateway)]  # fmt: skip
        if self._images:
            kinds.append(("image", self._layers))
        for kind, look in kinds:
            wrong = list(look())
            found += wrong
            if not wrong:
                count = self._counts.get(kind, 0)
                found.append(Found(kind, "", True, f"{count} looked at" if count else "nothing to look at"))
        return found

    def _looked(self, kind: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def _moved(self, found: Found) -> Found:
        """The finding, after moving the file aside if a repair was requested."""
        path = Path(found.path)
        if self._repair and path.exists():
            folder = self._home / "damaged"
            folder.mkdir(mode=0o700, exist_ok=True)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            target = folder / f"{path.parent.name}-{path.name}-{stamp}"
            shutil.move(path, target)
            found.repaired = str(target)
        return found

    # ---- databases ----

    def _store(self) -> Iterator[Found]:
        try:
            path = store_file(self._settings)
        except Unsupported as error:
            self._looked("store")
            if "postgres" not in self._settings.store:
                yield Found("store", self._settings.store, False, error.message)
            return
        if path.exists():
            yield from self._database("store", path, self._rows)
        elif (self._run / "store.json").exists() and any(self._names("records")):
            yield Found("store", str(path), False, "it is missing, and there are sandboxes",
                        "rock admin restore FILE, or rock admin start --adopt")  # fmt: skip

    def _catalogue(self) -> Iterator[Found]:
        if self._settings.catalogue.exists():
            yield from self._database("catalogue", self._settings.catalogue, lambda db, path: iter(()))

    def _database(
        self, kind: str, path: Path, rows: Callable[[sqlite3.Connection, Path], Iterator[Found]]
    ) -> Iterator[Found]:
        self._looked(kind)
        hint = "rock admin stop --keep, then rock admin restore FILE"
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)) as db:
                told = [row[0] for row in db.execute("PRAGMA integrity_check(5)")]
                if told != ["ok"]:
                    yield Found(kind, str(path), False, "; ".join(told), hint)
                    return
                yield from rows(db, path)
        except sqlite3.Error as error:
            yield Found(kind, str(path), False, str(error), hint)

    def _rows(self, db: sqlite3.Connection, path: Path) -> Iterator[Found]:
        schema = db.execute("PRAGMA user_version").fetchone()[0]
        if schema > len(SQLITE):
            yield Found("store", str(path), False, f"schema {schema} is of a newer version of ROCK", "use that version")
            return
        if not schema:
            return
        for name, info, config in db.execute("SELECT id, info, config FROM sandbox"):
            self._looked("store")
            try:
                if json.loads(info)["sandbox_id"] != name or not isinstance(json.loads(config), dict):
                    raise ValueError("it is of another sandbox")
            except (ValueError, KeyError, TypeError) as error:
                yield Found("store", str(path), False, f"the row of sandbox {name}: {error}", "restore a backup")

    def _identity(self) -> Iterator[Found]:
        note = self._run / "store.json"
        if not note.exists():
            return
        self._looked("identity")
        try:
            noted = atomic_file.parsed(note.read_bytes()).get("identity")
        except (OSError, ValueError) as error:
            yield self._moved(Found("identity", str(note), False, str(error), "the next start writes it again"))
            return
        with contextlib.suppress(Unsupported, sqlite3.Error):
            path = store_file(self._settings)
            if path.exists():
                with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                    found = db.execute("SELECT value FROM about WHERE name = 'identity'").fetchone()
                if found is None or found[0] != noted:
                    yield Found("identity", str(path), False, "it is not the store that the sandboxes were made with",
                                "rock admin restore FILE, or rock admin start --adopt")  # fmt: skip

    # ---- sandboxes ----

    def _names(self, part: str) -> list[str]:
        folder = self._run / part
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def _records(self) -> Iterator[Found]:
        for name in self._names("records"):
            path = self._run / "records" / name
            if name.startswith("."):
                continue
            self._looked("record")
            try:
                record = atomic_file.parsed(path.read_bytes())
                if "handle" not in record or "config" not in record:
                    raise ValueError("it is no record of a sandbox")
            except FileNotFoundError:
                continue  # its sandbox has just ended
            except (OSError, ValueError) as error:
                yield self._moved(Found(
                    "record", str(path), False, f"sandbox {name} cannot be used: {error}",
                    f"rock rm {name} ends it; with --repair the next start does"))  # fmt: skip
                continue
            if record.get("spools"):
                self._used.add(os.path.basename(str(record["spools"])))

    def _runtime_records(self) -> Iterator[Found]:
        for path in sorted(self._run.glob("*/*/record.json")):
            self._looked("runtime record")
            try:
                atomic_file.parsed(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                yield Found("runtime record", str(path), False, str(error), "it is only read when the record of the "
                            "sandbox is missing: end the sandbox with rock rm when you can")  # fmt: skip

    def _journals(self) -> Iterator[Found]:
        for name in self._names("spools"):
            folder = self._run / "spools" / name
            if name in self._used and folder.is_dir():
                self._looked("journal")
                wrong = list(self._folder(folder))
                if wrong and self._running:  # it may have been written just now
                    time.sleep(0.2)
                    wrong = list(self._folder(folder))
                yield from wrong
        for name in self._used - set(self._names("spools")):
            yield Found("journal", str(self._run / "spools" / name), False, "the folder is missing",
                        "keys from before are refused after the next start")  # fmt: skip

    def _folder(self, folder: Path) -> Iterator[Found]:
        hint = "the next start refuses the keys that it may hold, and keeps a copy in ROCK_HOME/damaged"
        found = checksums.read(folder / "marks")
        try:
            data = (folder / "journal").read_bytes()
        except FileNotFoundError:
            data = b""
        size, checksum = found.journal or (0, 0)
        damaged = journal.verify(data[:size])
        if len(data) < size or zlib.crc32(data[:size]) != checksum or damaged:
            detail = f"{size} bytes were written, {len(data)} are there; {damaged} entries are damaged"
            yield Found("journal", str(folder / "journal"), False, detail, hint)
        if found.damaged or (data and not found.exists):
            yield Found("journal", str(folder / "marks"), False, "its marks are damaged or missing", hint)
        if self._running:
            return  # a running server's files differ from their marks for a moment
        for path in folder.iterdir():
            slot = found.slots.get(checksums.digest(path.name))
            if slot is None:
                continue
            with path.open("rb") as file:
                file.seek(slot.start)
                part = file.read(slot.end - slot.start)
            if len(part) < slot.end - slot.start or zlib.crc32(part) != slot.checksum:
                yield Found("output", str(path), False, f"{slot.end - slot.start} bytes of a command are damaged",
                            "the command goes on; its answer tells how much is missing")  # fmt: skip

    def _orphans(self) -> Iterator[Found]:
        if self._running:
            return  # a new sandbox has no record for a moment
        known = {name for name in self._names("records") if not name.startswith(".")}
        for name in self._names("logs"):
            self._looked("orphan")
            if name not in known:
                yield self._orphan(self._run / "logs" / name, "output of processes of a sandbox that has no record")
        for name in self._names("spools"):
            self._looked("orphan")
            folder = self._run / "spools" / name
            if name not in self._used and any(path.stat().st_size for path in folder.glob("*")):
                yield self._orphan(folder, "the journal of a sandbox that has no record")

    def _orphan(self, path: Path, detail: str) -> Found:
        return self._moved(Found("orphan", str(path), False, detail, "the next start removes it"))

    # ---- model gateway ----

    def _gateway(self) -> Iterator[Found]:
        folder = self._settings.gateway_dir
        for name, read, hint in (("secret", _secret, "after a repair, active runs need to be created again"),
                                 ("upstreams.json", atomic_file.parsed, "after a repair, define the upstreams again")):
            if (folder / name).exists():
                self._looked("gateway")
                try:
                    read((folder / name).read_bytes())
                except (OSError, ValueError) as error:
                    yield self._moved(Found("gateway", str(folder / name), False, str(error), hint))
        for run in sorted((folder / "runs").iterdir()) if (folder / "runs").is_dir() else ():
            if not run.name.startswith(".") and (run / RUN_FILE).exists():
                self._looked("gateway")
                yield from self._recording(run)

    def _recording(self, run: Path) -> Iterator[Found]:
        try:
            atomic_file.parsed((run / RUN_FILE).read_bytes())
        except FileNotFoundError:
            return  # it was deleted just now
        except (OSError, ValueError) as error:  # without its state, the next start would remove the calls too
            yield self._moved(Found("gateway", str(run), False, f"run {run.name} cannot be used: {error}",
                                    "the server leaves it as it is; restore a backup for its calls"))  # fmt: skip
            return
        try:
            detail = recording.damage(run / CALLS_FILE)
            if detail and self._running:  # a record may have been written just now
                time.sleep(0.2)
                detail = recording.damage(run / CALLS_FILE)
        except FileNotFoundError:
            detail = f"run {run.name} has no calls" if run.exists() else None
        except OSError as error:
            detail = str(error)
        if detail:
            yield Found("gateway", str(run / CALLS_FILE), False, detail,
                        "the next use of the run moves these bytes to calls.torn-1")  # fmt: skip

    # ---- images ----

    def _layers(self) -> Iterator[Found]:
        """Layers are stored unpacked, so their digest cannot be recomputed: files are counted and measured instead."""
        folder = self._settings.image_dir
        for meta in sorted((folder / "meta").glob("*.json")) if (folder / "meta").is_dir() else ():
            self._looked("image")
            layer = folder / "layers" / meta.stem
            try:
                told = json.loads(meta.read_bytes())
                expected, wrong = int(told["size"]), str(told["diff_id"]).removeprefix("sha256:")[:16] != meta.stem
            except (OSError, ValueError, KeyError, TypeError) as error:
                yield Found("image", str(meta), False, str(error), "rock image rm, and pull it again")
                continue
            size = _size(layer) if layer.is_dir() else -1
            if wrong or size != expected:
                detail = "it has the description of another layer" if wrong else f"{size} of {expected} bytes are there"
                yield Found("image", str(layer), False, detail, "rock image rm, and pull it again")


def _secret(data: bytes) -> None:
    if len(data) < 32:
        raise ValueError("it is too short")


def _size(folder: Path) -> int:
    """Bytes of the regular files below a folder, each once."""
    size, seen = 0, set()
    for root, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(os.path.join(root, name))
            if (found.st_mode & 0o170000) == 0o100000 and found.st_ino not in seen:
                seen.add(found.st_ino)
                size += found.st_size
    return size


def as_data(found: Found) -> dict[str, Any]:
    return asdict(found)
