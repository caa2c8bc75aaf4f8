"""`rock connections`: what a sandbox connected to."""

from __future__ import annotations

from typing import Annotated

import typer

from rock.cli.output import age, as_json, table


def connections(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.")],
    refused: Annotated[bool, typer.Option("--refused", help="Those that were not allowed, only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what a sandbox connected to over network nat, or tried to; of a stopped one too."""
    from rock.cli.sandbox import attached

    found = attached(target).connections()
    items = [item for item in found.items if not (refused and item.allowed)]
    if json:
        as_json([item.model_dump(mode="json") for item in items])
        return
    rows = [
        [
            item.number,
            age(item.at, item.ended_at),
            "allowed" if item.allowed else "refused",
            item.protocol,
            item.host,
            f"{item.address}:{item.port}" if ":" not in item.address else f"[{item.address}]:{item.port}",
            item.sent,
            item.received,
            item.reason,
        ]
        for item in items
    ]
    table(["#", "TIME", "", "PROTOCOL", "HOST", "ADDRESS", "SENT", "RECEIVED", "WHY"], rows, "no connections")
    if found.dropped:
        print(f"{found.dropped} more are no longer remembered")
