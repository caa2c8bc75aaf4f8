"""`rock ps`, `stop`, `restart`, `archive`, `rm`, `rename`, `wait` and `commit`: the life of sandboxes."""

from __future__ import annotations

import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import click

from rock.cli.connection import LIVING, client, connected, find
from rock.cli.output import age, as_json, busy, fail, printable, rendered, short, table
from rock.cli.parsing import (
    FAILED,
    TIMED_OUT,
    command,
    complete_id,
    json_option,
    sandbox_argument,
    sandboxes_argument,
)
from rock.errors import InvalidConfig, NotFound, RockError, Unavailable
from rock.protocol.sandbox import SandboxInfo
from rock.sync import Client
from rock.sync.primitives import gather

ENDED = ("stopped", "archived", "deleted")
_FILTERS = ("id", "name", "image", "state", "label", "isolation", "runtime", "worker", "cause", "user_id",
            "experiment_id", "namespace")  # fmt: skip


@command(example="rock ps -a --filter state=stopped --filter label=job=7\n"
                 "rock ps --format '{{.ID}}\\t{{.Name}}\\t{{.Image}}'")  # fmt: skip
@click.option("--all", "-a", "everything", is_flag=True, help="Include ended sandboxes.")
@click.option("--quiet", "-q", is_flag=True, help="Print full ids only.")
@click.option("--filter", "-f", "filters", metavar="KEY=VALUE", multiple=True,
              help=f"Show matching sandboxes only; repeatable. Keys: {', '.join(_FILTERS)}. A value may have * and ?; "
                   "label is K=V or K.")  # fmt: skip
@click.option("--since", type=float, metavar="SECONDS", help="Show sandboxes that were created within this time only.")
@click.option("--format", "template", metavar="TEMPLATE",
              help="Print each sandbox with a template like '{{.ID}} {{.Name}}' or '{{json .}}'. Fields are those of "
                   "`rock inspect`, and ID, Age and Status.")  # fmt: skip
@click.option("--no-trunc", is_flag=True, help="Do not shorten ids and cells.")
@json_option
def ps(
    everything: bool, quiet: bool, filters: tuple[str, ...], since: float | None, template: str | None, no_trunc: bool,
    json_: bool,
) -> None:  # fmt: skip
    """List sandboxes.

    Without --all it shows those that are pending, running or stopping.
    """
    tests = [_filter(text) for text in filters]
    ended = everything or any(text.startswith(("state=", "cause=")) for text in filters)
    found = [info for info in client().list_sandboxes(None if ended else LIVING)
             if all(test(info) for test in tests) and (since is None or info.created_at > time.time() - since)]
    if json_:
        as_json([info.model_dump(mode="json") for info in found])
    elif quiet:
        for info in found:
            print(info.sandbox_id)
    elif template is not None:
        for info in found:
            print(rendered(template, _fields(info)))
    else:
        _table(found, ended, no_trunc)


def _fields(info: SandboxInfo) -> dict[str, Any]:
    status = "paused" if info.paused_at else info.state.value
    more = {"ID": info.sandbox_id, "Age": age(info.created_at, info.stopped_at), "Status": status}
    return {**more, **info.model_dump(mode="json")}


def _table(found: list[SandboxInfo], ended: bool, whole: bool) -> None:
    columns = ["ID", "NAME", "IMAGE", "STATE", "AGE", "MEMORY", "CPUS", "ISOLATION"]
    rows = [
        [
            info.sandbox_id if whole else short(info.sandbox_id),
            info.name,
            info.image,
            "paused" if info.paused_at else info.state.value,
            age(info.created_at, info.stopped_at),
            info.memory,
            f"{info.cpus:g}",
            info.isolation.value if info.isolation else None,
            *([info.reason] * ended),
        ]
        for info in found
    ]
    table(columns + ["REASON"] * ended, rows, "no sandboxes", whole=whole)


def _filter(text: str) -> Callable[[SandboxInfo], bool]:
    key, equals, value = text.partition("=")
    if not equals or key not in _FILTERS:
        raise InvalidConfig(f"--filter {text!r} is not KEY=VALUE with a known key",
                            hint=f"the keys are {', '.join(_FILTERS)}")
    if key == "id":
        return lambda info: info.sandbox_id.startswith(value)
    if key == "label":
        name, equals, wanted = value.partition("=")
        return lambda info: name in info.labels and (not equals or fnmatchcase(info.labels[name], wanted))
    return lambda info: fnmatchcase(str(getattr(info, key) or ""), value)


@command(example="rock stop web\nrock stop --all")
@sandboxes_argument
@click.option("--all", "everything", is_flag=True, help="Stop all running sandboxes.")
def stop(sandboxes: tuple[str, ...], everything: bool) -> int:
    """Stop sandboxes.

    Their records stay, which `rock ps -a` shows; so do files that are retained.
    """
    server = client()
    return each(chosen(server, sandboxes, everything), server.stop_sandbox, "stopping")


@command(example="rock pause web")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_id)
def pause(sandboxes: tuple[str, ...]) -> int:
    """Stop all processes of sandboxes for a while.

    Memory, sessions and processes are kept, and there is no idle timeout. `rock resume` continues them.
    """
    return each(list(sandboxes), client().pause_sandbox, "pausing")


@command(example="rock resume web")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_id)
def resume(sandboxes: tuple[str, ...]) -> int:
    """Continue paused sandboxes."""
    return each(list(sandboxes), client().resume_sandbox, "resuming")


@command(example="rock restart web")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_id)
def restart(sandboxes: tuple[str, ...]) -> int:
    """Restart stopped or archived sandboxes.

    They have the files that were retained (`rock run --retain`).
    """
    return each(list(sandboxes), client().restart_sandbox, "restarting")


@command(example="rock archive web")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_id)
def archive(sandboxes: tuple[str, ...]) -> int:
    """Move the retained files of sandboxes to the archive.

    The sandboxes must be stopped. `rock restart` brings the files back.
    """
    return each(list(sandboxes), client().archive_sandbox, "archiving")


@command(example="rock rm web\nrock rm --all --stopped")
@sandboxes_argument
@click.option("--all", "everything", is_flag=True, help="Delete all stopped sandboxes; with --force all.")
@click.option("--stopped", is_flag=True, help="With --all: only stopped ones, also with --force.")
@click.option("--force", "-f", is_flag=True, help="Stop running sandboxes first.")
def rm(sandboxes: tuple[str, ...], everything: bool, stopped: bool, force: bool) -> int:
    """Delete stopped sandboxes and their retained files."""
    if stopped and not everything:
        raise click.UsageError("--stopped is for --all")
    server = client()
    names = chosen(server, sandboxes, everything, None if force and not stopped else ",".join(ENDED))
    return each(names, lambda name: server.delete_sandbox(name, force=force), "deleting")


@command(example="rock rename 3f2a web")
@sandbox_argument
@click.argument("name")
def rename(sandbox: str, name: str) -> None:
    """Change the name of a sandbox.

    The name is unique among running sandboxes. An empty name, "", removes it.
    """
    server = client()
    info = server.update_sandbox(find(sandbox, server).sandbox_id, name=name or None)
    print(info.name or info.sandbox_id)


@command(example="rock wait web")
@click.argument("sandboxes", metavar="SANDBOX...", nargs=-1, required=True, shell_complete=complete_id)
@click.option("--process", "-p", metavar="ID",
              help="Wait for this background process of one sandbox, and exit with its exit code.")  # fmt: skip
@click.option("--timeout", type=float, metavar="SECONDS", help="Exit with 124 after this time.")
def wait(sandboxes: tuple[str, ...], process: str | None, timeout: float | None) -> int:
    """Wait until sandboxes end, and print the causes."""
    end = None if timeout is None else time.monotonic() + timeout
    if process is not None:
        if len(sandboxes) > 1:
            raise click.UsageError("--process is for one sandbox")
        from rock.cli.commands.logs import process_of

        state = process_of(connected(sandboxes[0]), process).wait(timeout)
        if state.running:
            fail(Unavailable(f"process {process} still runs after {timeout:g} s", hint="wait longer"))
            return TIMED_OUT
        print("unknown" if state.exit_code is None else state.exit_code)
        return FAILED if state.exit_code is None else state.exit_code
    server = client()
    for text in sandboxes:
        info = find(text, server)
        pause = 0.1
        while info.state.value not in ENDED and info.state.value != "archiving":
            if end is not None and time.monotonic() >= end:
                fail(Unavailable(f"sandbox {text} still runs after {timeout:g} s", hint="wait longer, or rock stop it"))
                return TIMED_OUT
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)
            info = server.get_sandbox(info.sandbox_id)
        print(printable(info.cause.value if info.cause else info.state.value))
    return 0


@command(example="rock commit web team/web:2\nrock commit web localhost:5000/team/web:2 --push --username me")
@sandbox_argument
@click.argument("tag", metavar="NAME")
@click.option("--push", is_flag=True, help="Push the image to the registry in its name.")
@click.option("--username", help="User of the registry; the password is prompted for.")
def commit(sandbox: str, tag: str, push: bool, username: str | None) -> None:
    """Create an image of a sandbox.

    A running sandbox is paused meanwhile; a stopped one needs retained files. NAME is like
    localhost:5000/team/tool:1.0.
    """
    password = None if username is None else click.prompt("Password", hide_input=True, err=True)
    target = connected(sandbox)
    with busy(f"committing {sandbox} to {tag}"):
        status = target.commit(tag, username, password, push=push)
    print(f"{status.image_tag}  {status.pushed_digest or status.image_digest}")


# ---- several sandboxes at once


def chosen(server: Client, ids: tuple[str, ...], everything: bool, states: str | None = LIVING) -> list[str]:
    """The given sandboxes, or all in some states with --all."""
    if bool(ids) == everything:
        raise click.UsageError("give sandboxes, or --all")
    return list(ids) or [info.sandbox_id for info in server.list_sandboxes(states)]


def each(names: list[str], act: Callable[[str], SandboxInfo], doing: str) -> int:
    """Apply an operation to all sandboxes concurrently; print the ids, and return 1 when one failed."""

    def one(name: str) -> str:
        try:
            return act(name).sandbox_id
        except NotFound:
            return act(find(name).sandbox_id).sandbox_id

    failed = 0
    what = names[0] if len(names) == 1 else f"{len(names)} sandboxes"
    with busy(f"{doing} {what}"):
        outcomes = gather([partial(one, name) for name in names], 16)
    for outcome in outcomes:
        if isinstance(outcome, RockError):
            failed = fail(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            print(outcome)
    return failed
