"""`rock worker ls|drain|undrain|rm`: the machines of a server."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from rock.cli.output import OPTIONS, as_json, table
from rock.errors import Unavailable

app = typer.Typer(no_args_is_help=True, help="Workers: the machines that sandboxes are on.")

AsJson = Annotated[bool, typer.Option("--json", help="JSON.")]
Name = Annotated[str, typer.Argument(help="Its name, as rock worker ls shows it.")]


@app.command("ls")
def list_workers(json: AsJson = False) -> None:
    """List workers, lost ones too."""
    from rock.sync import Client

    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        found = client.list_workers()
    if json:
        as_json([worker.model_dump(mode="json") for worker in found])
        return
    rows = []
    for worker in found:
        status = worker.status
        room = ("", "", "", "")
        if status is not None:
            free = f"{status.memory_free / (1 << 30):.1f}/{status.memory_total / (1 << 30):.1f} GiB"
            room = (f"{status.sandboxes}/{status.sandbox_limit}", str(status.cpus), free, f"{status.load:.2f}")
        heard = f"{worker.age:.0f} s" if worker.url else ""
        rows.append((worker.name, worker.state.value, *room, heard, worker.url))
    table(("NAME", "STATE", "SANDBOXES", "CPUS", "MEMORY FREE", "LOAD", "HEARD", "URL"), rows,
          "no workers; start one with: rocklet --join URL")  # fmt: skip


@app.command()
def drain(
    name: Name,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it has no sandboxes.")] = 0.0,
    json: AsJson = False,
) -> None:
    """It gets no more sandboxes, and keeps those that it has."""
    from rock.sync import Client

    end = time.monotonic() + wait
    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        info = client.drain_worker(name)
        while wait > 0:
            left = client.list_sandboxes(states="pending,running,stopping", limit=1, worker=name)
            if not left:
                break
            if time.monotonic() > end:
                raise Unavailable(f"worker {name} still has sandboxes after {wait:g} s", hint="wait, or stop them")
            time.sleep(0.5)
    if json:
        as_json(info.model_dump(mode="json"))
    else:
        typer.echo(f"{name} gets no more sandboxes")


@app.command()
def undrain(name: Name, json: AsJson = False) -> None:
    """It gets sandboxes again."""
    from rock.sync import Client

    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        info = client.drain_worker(name, False)
    if json:
        as_json(info.model_dump(mode="json"))
    else:
        typer.echo(f"{name} gets sandboxes again")


@app.command()
def rm(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Take it for lost now: its sandboxes are over.")] = False,
    json: AsJson = False,
) -> None:
    """Forget a worker that is lost. One that comes back joins anew."""
    from rock.sync import Client

    with Client(OPTIONS.base_url, OPTIONS.api_key) as client:
        info = client.remove_worker(name, force=force)
    if json:
        as_json(info.model_dump(mode="json"))
    else:
        typer.echo(f"forgot {name}")
