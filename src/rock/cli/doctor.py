"""`rock doctor`: what this machine can give, and what keeps it from more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rock.cli.output import as_json, busy, table

if TYPE_CHECKING:
    from rock.runtime.namespace.probe import Finding


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at this machine: isolation, limits, images. Exits with 1 when something essential is missing."""
    with busy("trying what this machine can do"):
        findings = _findings()
    if json:
        as_json([{"name": f.name, "ok": f.ok, "detail": f.detail, "hint": f.hint} for f in findings])
    else:
        signs = {True: "ok", False: "no", None: "-"}
        table(["", "", ""], [[signs[f.ok], f.name, _text(f)] for f in findings])
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)


def _text(finding: Finding) -> str:
    told = finding.ok is not False or not finding.hint
    return finding.detail if told else f"{finding.detail} -> {finding.hint}"


def _findings() -> list[Finding]:
    import sys

    from rock.errors import Unsupported

    if sys.platform != "linux":
        raise Unsupported("sandboxes need Linux; here ROCK is a client only", hint="set ROCK_BASE_URL to a server")
    from rock.runtime.namespace.probe import host_report

    return host_report()
