"""`rock bench`: measurements of the embedded runtime, each next to its lower bound from the same run.

The measured server is a separate process with its own home; the client is the SDK over HTTP, as in normal use.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from dataclasses import dataclass, field
from typing import Any

import click

from rock.cli.bench import forks, gateway, profiling
from rock.cli.bench.floors import bare_server
from rock.cli.bench.measuring import (
    commands,
    cycles,
    first_commands,
    install,
    many_bare,
    many_sessions,
    memory,
    running_server,
    server_side,
    transfers,
)
from rock.cli.parsing import command, json_option
from rock.cli.serve import serve


@dataclass
class Figure:
    """One row: `values` in `unit`; `floor` is the same operation without ROCK, from the same run."""

    name: str
    unit: str
    values: list[float]
    target: str
    floor_name: str = ""
    floor: list[float] = field(default_factory=list)

    def spread(self, values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {
            "n": len(ordered),
            "min": ordered[0],
            "p50": statistics.median(ordered),
            "p95": ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
        }

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "unit": self.unit, **self.spread(self.values), "target": self.target}
        if self.floor:
            row["floor"] = {"name": self.floor_name, **self.spread(self.floor)}
            base = row["floor"]["p50"]
            row["ratio"] = row["p50"] / base if base else None
        return row


async def measure(short: bool, inside: tuple[list[float], list[float]]) -> list[Figure]:
    """All rows. `short`: few repetitions, as a functional test. inside: the result of `server_side`, on its own
    loop."""
    from rock.runtime.namespace.floors import floor as bare_namespaces
    from rock.runtime.namespace.floors import whole, whole_rates

    n = 5 if short else 40
    rounds = 1 if short else 4
    figures = []
    cold: list[float] = []
    floor: list[float] = []
    with running_server(0) as (url, pid):
        for _ in range(rounds):  # alternates with its floor: a machine's speed changes within a minute
            floor += [1000 * s for s in await whole(n // rounds)]
            cold += await first_commands(url, n // rounds, 0.05)
        fork = [1000 * s for s in await bare_namespaces(n)]
        made = "a whole sandbox and bash in the launcher"
        forked = "bare namespaces and bash, forked"
        figures.append(Figure("create to first command, no pool", "ms", cold, "<= 2.5x floor", forked, fork))
        figures.append(Figure("a whole sandbox in the launcher", "ms", floor, "", forked, fork))
        rates: list[float] = []
        most: list[float] = []
        for _ in range(rounds):
            most += await whole_rates(2 if short else 6, 8)
            rates += await cycles(url, 1 if short else 4, 8)
        figures.append(
            Figure(
                "create + command + destroy, 8 at once",
                "1/s",
                rates,
                ">= 200",
                "the same in the launcher, 8 at once",
                most,
            )
        )
        with bare_server() as bare_url:
            each, alone = await commands(url, bare_url, 50 if short else 1000)
            figures.append(
                Figure("a command in a session", "ms", each, "<= 1.3x floor", "a bare HTTP server and bash", alone)
            )
            figures.append(
                Figure("the same, server side", "ms", inside[0], "<= 0.4, x13", "a command on a bare bash's pipes",
                       inside[1])
            )  # fmt: skip
            many = await many_sessions(url, 1 if short else 15, 32)
            bare = await many_bare(bare_url, 1 if short else 8, 32)
            beside = "a bare HTTP server and bash"
            figures.append(Figure("commands a second, 32 sessions", "1/s", many, ">= 0.6x floor", beside, bare))
        up, down, plain = await transfers(url, 1 if short else 5)
        figures.append(Figure("upload of 100 MB", "MB/s", up, ">= 300", "a copy on this disk", plain))
        figures.append(Figure("download of 100 MB", "MB/s", down, ">= 300", "a copy on this disk", plain))
        figures.append(
            Figure("memory of an idle sandbox, all in", "MB", await memory(url, pid, 5 if short else 50), "<= 1.2")
        )
    figures += await _gateway(short)
    figures += await _forks(short)
    warm: list[float] = []
    again: list[float] = []
    with running_server(4) as (url, _):
        for _ in range(rounds):
            warm += await first_commands(url, n // rounds, 0.15)
            again += [1000 * s for s in await whole(n // rounds)]
    figures.append(Figure("create to first command, warm pool", "ms", warm, "<= 2.5", made, again))
    count, size = install()
    figures.append(Figure("base install, distributions", "", [float(count)], "<= 40"))
    figures.append(Figure("base install, size", "MB", [size], "<= 60"))
    return figures


async def _forks(short: bool) -> list[Figure]:
    """The rows of snapshots."""
    n = 3 if short else 40
    floor = forks.overlay_commits(n)
    with running_server(0) as (url, _):
        times = await forks.snapshots(url, n)
        few, size = (2, 100) if short else (10, 100)
        copies = await forks.copies(url, few, size)
        plain = await first_commands(url, n // 2 + 1, 0.05)
    commit = "the commit of an overlay, bare system calls"
    return [
        Figure("checkpoint of a sandbox with a bash", "ms", times["checkpoint"], "<= 6", commit, floor),
        Figure("its processes are stopped", "ms", times["pause"], "", commit, floor),
        Figure("rollback and a command", "ms", times["rollback"], "<= 10", "create to first command", plain),
        Figure("a child and its first command", "ms", times["child"], "<= 10", "create to first command", plain),
        *(_of_copies(copies, forks.bare_forks(few, size), plain) if copies else ()),
    ]


def _of_copies(times: dict[str, list[float]], bare: list[float], plain: list[float]) -> list[Figure]:
    """The rows of copied processes."""
    fork = "os.fork of a Python with 100 MB"
    return [
        Figure("checkpoint of a Python with 100 MB", "ms", times["checkpoint"], "", fork, bare),
        Figure("it is stopped", "ms", times["pause"], "", fork, bare),
        Figure("a child of it until it answers", "ms", times["child"], "", fork, bare),
        Figure("a command of the original meanwhile", "ms", times["meanwhile"], "", "create to first command", plain),
    ]


async def _gateway(short: bool) -> list[Figure]:
    """The rows of the model gateway."""
    with running_server(0) as (url, pid), gateway.fake_upstream() as upstream:
        memory_used = await gateway.memory_of_calls(url, pid, upstream, 50 if short else 1000)
        times = await gateway.overhead(url, upstream, 5 if short else 100)
        agents, calls = 200, 1 if short else 5
        return [
            Figure("a model call of 80 kB", "ms", times["call"][0], "<= floor + 2", "the same without gateway",
                   times["call"][1]),
            Figure("the first streamed byte of one", "ms", times["first byte"][0], "<= floor + 2",
                   "the same without gateway", times["first byte"][1]),
            Figure("a model call in pull mode", "ms", await gateway.pulled(url, 5 if short else 100), "<= 5"),
            Figure("model calls a second, 200 agents at once", "1/s",
                   await gateway.many_agents(url, upstream, agents, calls), ">= 200"),
            Figure("memory of a recorded call of 80 kB", "kB", memory_used, "<= 20"),
        ]  # fmt: skip


@command(example="rock bench --short")
@json_option
@click.option("--short", is_flag=True, help="Repeat each measurement a few times only, as a functional test.")
@click.option("--profile", type=click.Choice(list(profiling.ROWS)), metavar="ROW",
              help=f"Show in which processes and parts an operation spends its time: {', '.join(profiling.ROWS)}.")
def bench(json_: bool, short: bool, profile: str | None) -> None:
    """Measure this machine: results against a baseline.

    It measures the embedded runtime with a server of its own, and takes about a minute and a half.
    """
    if profile is not None:
        if json_:
            raise click.UsageError("--profile prints a table, and excludes --json")
        profiling.show(profile, short)
        return
    inside = serve.run(server_side(50 if short else 1000))
    rows = [figure.row() for figure in asyncio.run(measure(short, inside))]
    if json_:
        print(json.dumps({"figures": rows}, indent=1))
        return
    print(f"{'':<40} {'unit':>5} {'n':>5} {'min':>9} {'p50':>9} {'p95':>9}  {'target':<14} floor p50, ratio")
    for row in rows:
        floor = row.get("floor")
        beside = f"{floor['p50']:9.2f} x{row['ratio']:.2f}  {floor['name']}" if floor else ""
        print(
            f"{row['name']:<40} {row['unit']:>5} {row['n']:>5} {row['min']:>9.2f} {row['p50']:>9.2f} "
            f"{row['p95']:>9.2f}  {row['target']:<14} {beside}"
        )
