"""`rock worker ls|drain|undrain|rm`: the machines of a server."""

from __future__ import annotations

import time

import click

from rock.cli.connection import client, drain_rocklet
from rock.cli.output import as_json, busy, table
from rock.cli.parsing import Group, json_option
from rock.errors import Unavailable
from rock.protocol.node import EVACUATION, WorkerInfo
from rock.protocol.sandbox import SandboxInfo, State

_name = click.argument("name")


@click.group(cls=Group)
def worker() -> None:
    """List, drain and remove workers.

    Workers are the machines on which sandboxes run.
    """


@worker.command("ls", example="rock worker ls")
@json_option
def list_workers(json_: bool) -> None:
    """List workers, lost ones included."""
    with client() as server:
        found = server.list_workers()
    if json_:
        as_json([item.model_dump(mode="json") for item in found])
        return
    rows = []
    for item in found:
        status = item.status
        room = ("", "", "", "")
        if status is not None:
            free = f"{status.memory_free / (1 << 30):.1f}/{status.memory_total / (1 << 30):.1f} GiB"
            room = (f"{status.sandboxes}/{status.sandbox_limit}", str(status.cpus), free, f"{status.load:.2f}")
        seen = f"{item.age:.0f} s" if item.url else ""
        evacuated = item.evacuating or (status is not None and status.evacuate)
        state = f"{item.state.value}, archives" if evacuated else item.state.value
        rows.append((item.name, state, *room, seen, item.url))
    table(("NAME", "STATE", "SANDBOXES", "CPUS", "MEMORY FREE", "LOAD", "LAST SEEN", "URL"), rows,
          "no workers; start one with: rocklet --join URL")  # fmt: skip


@worker.command(example="rock worker drain gpu-3 --wait 600")
@click.argument("name", required=False)
@click.option("--self", "own", is_flag=True, help="Drain the rocklet of this machine (preStop of a pod).")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS",
              help="Wait up to this time until the worker has no sandboxes.")  # fmt: skip
@click.option("--archive", type=click.FloatRange(min=0), metavar="SECONDS",
              help="For the last SECONDS of the wait, stop and archive what retains its files.")  # fmt: skip
@json_option
def drain(name: str | None, own: bool, wait: float, archive: float | None, json_: bool) -> None:
    """Place no further sandboxes on a worker.

    The sandboxes that it has continue. With --archive, those with retention are stopped and archived; a restart
    continues on another worker. Those without end with the machine.
    """
    if own == (name is not None):
        raise click.UsageError("give the name of a worker, or --self on its own machine")
    end = time.monotonic() + wait
    archive_at = float("inf") if archive is None else end - archive
    if name is None:
        _drain_own(end, archive_at, json_)
        return
    with client() as server:
        info = server.drain_worker(name)
        with busy(f"waiting until {name} has no sandboxes"):
            while True:
                if time.monotonic() >= archive_at and not info.evacuating:
                    info = server.drain_worker(name, archive=True)
                states = "pending,running,stopping" + (",stopped,archiving" if info.evacuating else "")
                left = server.list_sandboxes(states=states, worker=name) if wait > 0 else []
                if info.evacuating:
                    left = [one for one in left if one.kept or one.state is not State.STOPPED]
                if not left:
                    break
                if time.monotonic() > end:
                    raise Unavailable(f"worker {name} still has sandboxes after {wait:g} s{_why(left)}",
                                      hint="wait, or stop them")
                time.sleep(0.5)
    _show(info, json_, f"{name} gets no more sandboxes")


def _why(left: list[SandboxInfo]) -> str:
    """The reasons why sandboxes are not archived."""
    found = [f"{one.sandbox_id}: {one.phases[EVACUATION].message}" for one in left if EVACUATION in one.phases]
    return "".join(f"\n  {line}" for line in found[:20])


def _drain_own(end: float, archive_at: float, json_: bool) -> None:
    """Drain the rocklet of this machine until a time. It needs no rights at the server: a signal, and the rocklet's own
    list with its own key."""
    left, archive = drain_rocklet()
    waits = end > time.monotonic()
    with busy("waiting until this worker has no sandboxes"):
        while True:
            if time.monotonic() >= archive_at:
                archive()
                archive_at = float("inf")
            count = left()
            if not count or time.monotonic() >= end:
                break
            time.sleep(0.5)
    if count and waits:
        raise Unavailable(f"this worker still has {count} sandboxes", hint="wait longer, or stop them")
    if json_:
        as_json({"sandboxes": count})
    else:
        print(f"this worker gets no more sandboxes; it has {count}")


def _show(info: WorkerInfo, json_: bool, text: str) -> None:
    if json_:
        as_json(info.model_dump(mode="json"))
    else:
        print(text)


@worker.command(example="rock worker undrain gpu-3")
@_name
@json_option
def undrain(name: str, json_: bool) -> None:
    """Place sandboxes on a drained worker again."""
    with client() as server:
        info = server.drain_worker(name, False)
    _show(info, json_, f"{name} gets sandboxes again")


@worker.command(example="rock worker rm gpu-3")
@_name
@click.option("--force", is_flag=True, help="Mark the worker lost first, which ends its sandboxes.")
@json_option
def rm(name: str, force: bool, json_: bool) -> None:
    """Remove a lost worker.

    A removed worker that comes back joins as a new one.
    """
    with client() as server:
        info = server.remove_worker(name, force=force)
    _show(info, json_, f"removed {name}")
