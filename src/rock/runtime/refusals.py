"""Errors that several runtimes raise, in the same words."""

from __future__ import annotations

from rock.errors import Conflict, InvalidConfig, NotFound

LINUX_ONLY = "leave image_os unset; the runtimes run Linux images"
START_LOG = "the log of the worker has the cause; `rock doctor` checks the machine"


def no_such_path(path: str) -> NotFound:
    return NotFound(f"no such file or directory: {path!r}", hint="check the path; a list of its parent has the entries")


def not_absolute(path: str) -> InvalidConfig:
    return InvalidConfig(f"the path {path!r} is not absolute", hint="write the whole path, as in /tmp/a.txt")


def not_a_folder(path: str, within: str | None = None) -> Conflict:
    """within: the path that leads through it."""
    where = f" in {within!r}" if within else ""
    return Conflict(f"not a folder: {path!r}{where}", hint="give the path of a folder, or remove the file first")


def is_a_folder(path: str) -> InvalidConfig:
    return InvalidConfig(f"{path!r} is a folder, not a file", hint="give the path of a file")


def not_regular(path: str) -> InvalidConfig:
    return InvalidConfig(f"not a regular file: {path!r}",
                         hint="give the path of a regular file; FIFOs, devices and sockets are refused")


def not_writing(sandbox_id: str) -> InvalidConfig:
    return InvalidConfig("no write with this token is open", sandbox_id=sandbox_id, hint="start the write again")


def no_program(sandbox_id: str) -> InvalidConfig:
    return InvalidConfig("argv has no program, or a NUL character", sandbox_id=sandbox_id,
                         hint="give the program and its arguments, as in ['python3', 'main.py']")


def no_such_user(name: str, hint: str) -> NotFound:
    return NotFound(f"no such user: {name!r}", hint=hint)


def key_taken(key: str, sandbox_id: str) -> Conflict:
    return Conflict(f"a program with the key {key!r} exists already", sandbox_id=sandbox_id,
                    hint="attach to it, or choose another key")


def no_kept_program(key: str, sandbox_id: str) -> NotFound:
    return NotFound(f"no retained program has the key {key!r}", sandbox_id=sandbox_id,
                    hint="it has ended; start it again")


def not_a_terminal_size(rows: int, columns: int, sandbox_id: str) -> InvalidConfig:
    return InvalidConfig(f"{rows} x {columns} is not a terminal size", sandbox_id=sandbox_id,
                         hint="give rows and columns from 1 to 65535, as in (24, 80)")


def unavailable_channel(number: int, way: str, sandbox_id: str | None = None) -> InvalidConfig:
    return InvalidConfig(f"channel {number} with direction {way!r} is not supported", sandbox_id=sandbox_id,
                         hint="use a number from 3 to 255, and r or w")
