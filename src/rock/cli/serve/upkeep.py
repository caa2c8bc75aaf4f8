"""Backup and restore of a server's store: `rock admin backup|restore`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from rock import __version__
from rock.cli.serve.home import Home, make_private
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, StorageFull, Unavailable, Unsupported
from rock.gateway.runs import CALLS_FILE, REPLAY_FILE, RUN_FILE
from rock.host import atomic_file
from rock.settings import RESTORED, Settings
from rock.settings import STORE_NOTE as NOTE
from rock.store.migrations import SQLITE

_STORE, _CATALOGUE, _ABOUT = "rock.sqlite", "envhub.sqlite", "about.json"
_FILES = ("registries.json", "worker.json")  # copied unchanged
_GATEWAY = "gateway"  # the folder of the model gateway, in the archive
_RUN_PARTS = (RUN_FILE, CALLS_FILE, REPLAY_FILE)
_IN_GATEWAY = re.compile(rf"{_GATEWAY}/(secret|upstreams\.json|runs/[A-Za-z0-9_-]{{1,64}}/"
                         rf"({'|'.join(map(re.escape, _RUN_PARTS))}))")
_MOST = 64 << 30  # maximum bytes of one file of a backup
_BACKUP = "give a file that `rock admin backup` wrote"


def store_file(settings: Settings) -> Path:
    """The file of the store. Unsupported for a database."""
    if "://" in settings.store:
        raise Unsupported("ROCK_STORE is a PostgreSQL database, which has tools of its own",
                          hint="pg_dump DATABASE > FILE; and to restore: psql DATABASE < FILE")  # fmt: skip
    return Path(settings.store).expanduser().absolute() if settings.store else settings.database


def fact(path: Path) -> dict[str, Any]:
    """Metadata of a store: schema, identity, changed (seconds since the epoch), sandboxes. Unavailable."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as db:
            schema = int(db.execute("PRAGMA user_version").fetchone()[0])
            if not schema:
                return {"schema": 0, "identity": "", "changed": 0.0, "sandboxes": 0}
            count, created, stopped = db.execute(
                "SELECT count(*), coalesce(max(created_at), 0), coalesce(max(stopped_at), 0) FROM sandbox").fetchone()
            key = db.execute("SELECT coalesce(max(created_at), 0) FROM api_key").fetchone()[0] if schema > 1 else 0
            identity = db.execute("SELECT value FROM about WHERE name = 'identity'").fetchone() if schema > 4 else None
            return {"schema": schema, "identity": identity[0] if identity else "", "sandboxes": count,
                    "changed": max(created, stopped, key)}  # fmt: skip
    except sqlite3.Error as error:
        raise Unavailable(f"{path} cannot be read as a store: {error}",
                          hint="`rock doctor store` checks the files of the server") from None


def _copied(source: Path, target: Path) -> None:
    """A consistent copy of a SQLite file that may have concurrent writers."""
    with contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30.0)) as db, \
            contextlib.closing(sqlite3.connect(target)) as copy:
        db.backup(copy, pages=1000, sleep=0.005)


def backup(settings: Settings, target: Path) -> dict[str, Any]:
    """Write the store, the catalogue, the registry logins and the gateway's folder, which has the keys of upstreams, to
    a file with mode 0600. Returns a summary."""
    source = store_file(settings)
    if not source.exists():
        raise NotFound(f"there is no store at {source}", hint="set ROCK_HOME to the home folder of the server")
    target = target.expanduser().absolute()
    try:
        with tempfile.TemporaryDirectory(prefix=".rock-backup-", dir=target.parent) as name:
            folder = Path(name)
            files = {_STORE: folder / _STORE}
            _copied(source, files[_STORE])
            about = {"format": 1, "version": __version__, "made_at": time.time(), **fact(files[_STORE])}
            if settings.catalogue.exists():
                files[_CATALOGUE] = folder / _CATALOGUE
                _copied(settings.catalogue, files[_CATALOGUE])
            files |= {name: settings.home / name for name in _FILES if (settings.home / name).is_file()}
            data = json.dumps(about).encode()
            beside = folder / "backup"
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as out, \
                    tarfile.open(fileobj=out, mode="w:gz", compresslevel=3) as tar:
                head = tarfile.TarInfo(_ABOUT)
                head.size, head.mode = len(data), 0o600
                tar.addfile(head, io.BytesIO(data))
                for name, path in files.items():
                    tar.add(path, name, recursive=False)
                runs = _add_gateway(settings.gateway_dir, tar)
                out.flush()
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(beside, target)
    except sqlite3.Error as error:
        raise Unavailable(f"the store {source} cannot be copied: {error}", hint="rock doctor store") from None
    except OSError as error:
        raise _told(error, target) from None
    return {**about, "file": str(target), "bytes": target.stat().st_size, "files": sorted(files), "runs": runs}


def _add_gateway(folder: Path, tar: tarfile.TarFile) -> int:
    """Add the gateway's folder, whose server may be at work; returns the number of runs."""
    for name in ("secret", "upstreams.json"):
        if (folder / name).is_file():
            tar.add(folder / name, f"{_GATEWAY}/{name}", recursive=False)
    count = 0
    for run in sorted((folder / "runs").iterdir()) if (folder / "runs").is_dir() else ():
        if run.name.startswith("."):
            continue
        with contextlib.ExitStack() as opened:
            # All are open before the first is copied: a run that is deleted meanwhile is copied completely, or not.
            # The state comes first, because the calls of an ended run do not change.
            try:
                files = {name: opened.enter_context((run / name).open("rb")) for name in _RUN_PARTS
                         if name != REPLAY_FILE or (run / name).exists()}  # fmt: skip
            except FileNotFoundError:
                continue
            for name, file in files.items():
                entry = tar.gettarinfo(arcname=f"{_GATEWAY}/runs/{run.name}/{name}", fileobj=file)
                tar.addfile(entry, file)  # as many bytes as it has now
            count += 1
    return count


def restore(settings: Settings, source: Path, force: bool) -> dict[str, Any]:
    """Replace the store by a backup; the former one is retained beside it. Conflict while a server runs, and when the
    present store is newer and `force` is not set."""
    target = store_file(settings)
    make_private(settings.home)
    home = Home(settings.home)
    try:
        home.take()
    except Conflict:
        raise Conflict(f"a server runs with ROCK_HOME={settings.home}", hint="rock admin stop --keep") from None
    try:
        with tempfile.TemporaryDirectory(prefix=".rock-restore-", dir=target.parent) as name:
            folder = Path(name)
            about = _unpacked(source, folder)
            found = fact(folder / _STORE)
            if found["schema"] > len(SQLITE):
                raise Unsupported(f"{source} is of a newer version of ROCK (schema {found['schema']})",
                                  hint="use that version")  # fmt: skip
            _check_whole(folder / _STORE, source)
            if target.exists() and not force:
                _refuse_newer(target, found)
            replaced = []
            places = {_STORE: target, _GATEWAY: settings.gateway_dir}
            for part in (_STORE, _CATALOGUE, *_FILES, _GATEWAY):
                place = places.get(part, settings.home / part)
                if (folder / part).exists():
                    replaced += _put(folder / part, place)
            note = settings.run_dir / NOTE
            if note.exists():  # the next start compares the running sandboxes with the store
                atomic_file.replace(note, atomic_file.summed(json.dumps({"identity": RESTORED})))
    except OSError as error:
        raise _told(error, target) from None
    finally:
        home.release()
    return {**about, **found, "store": str(target), "kept": replaced}


def _unpacked(source: Path, folder: Path) -> dict[str, Any]:
    try:
        with tarfile.open(source.expanduser(), "r:gz") as tar:
            for entry in tar:
                known = entry.name in (_ABOUT, _STORE, _CATALOGUE, *_FILES) or _IN_GATEWAY.fullmatch(entry.name)
                if known and entry.isreg() and entry.size <= _MOST:
                    data = tar.extractfile(entry)
                    assert data is not None
                    (folder / entry.name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    with open(os.open(folder / entry.name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as out:
                        while part := data.read(1 << 20):
                            out.write(part)
        about = json.loads((folder / _ABOUT).read_text())
        if about.get("format") != 1 or not (folder / _STORE).exists():
            raise ValueError("it is of another format")
    except FileNotFoundError as error:
        if Path(str(error.filename)) == source.expanduser():
            raise NotFound(f"there is no file {source}", hint="check the path of the backup") from None
        raise InvalidConfig(f"{source} is no backup: it has no {Path(str(error.filename)).name}",
                            hint=_BACKUP) from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InvalidConfig(f"{source} is no backup, or it is damaged: {error}", hint=_BACKUP) from None
    return dict(about)


def _check_whole(path: Path, source: Path) -> None:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        if (told := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise InvalidConfig(f"the store in {source} is damaged: {told}", hint=_BACKUP)


def _refuse_newer(target: Path, found: dict[str, Any]) -> None:
    try:
        there = fact(target)
    except Unavailable:
        return  # a damaged store is a reason for a restore
    if there["changed"] > found["changed"]:
        raise Conflict(
            f"the store {target} is newer than the backup: it has {there['sandboxes']} sandboxes, and changed last at "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(there['changed']))}",
            hint="--force replaces it; it is kept beside, as rock.sqlite.replaced-TIME",
        )


def _put(file: Path, place: Path) -> list[str]:
    """Move a file to its place; the former file and its log are retained."""
    kept, stamp = [], time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", "-wal", "-shm"):
        old = Path(f"{place}{suffix}")
        if old.exists():
            aside = Path(f"{place}.replaced-{stamp}{suffix}")
            os.replace(old, aside)
            kept.append(str(aside))
    shutil.move(file, place)
    return kept


def _told(error: OSError, path: Path) -> RockError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{path} cannot be written: the disk is full",
                           hint="free some space, or choose another disk")
    return Unavailable(f"{path} cannot be written: {error.strerror or error}",
                       hint="check the permissions of the folder")
