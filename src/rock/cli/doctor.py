"""`rock doctor`: what this machine can give, and what keeps it from more."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rock.cli.output import as_json, busy, table


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at this machine: isolation, limits, images. Exits with 1 when something essential is missing."""
    with busy("trying what this machine can do"):
        findings = _findings()
    if json:
        as_json([{"name": f.name, "ok": f.ok, "detail": f.detail, "hint": f.hint} for f in findings])
    else:
        table(["", "", ""], [["ok" if f.ok else "no", f.name, _text(f)] for f in findings])
    if not all(f.ok for f in findings if not f.hint):
        raise typer.Exit(1)


def _text(finding: Any) -> str:
    return f"{finding.detail} -> {finding.hint}" if finding.hint and not finding.ok else str(finding.detail)


def _findings() -> list[Any]:
    import sys

    from rock.errors import Unsupported

    if sys.platform != "linux":
        raise Unsupported("sandboxes need Linux; here ROCK is a client only", hint="set ROCK_BASE_URL to a server")
    from rock.runtime.namespace.probe import host_report

    return list(host_report())
