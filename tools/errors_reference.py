"""Write docs/reference/errors.md from src/rock/errors.py. `--check`: only compare."""

from __future__ import annotations

import sys
from pathlib import Path

from rock import errors

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "errors.md"
# What to do, by class; a page without a row for each class is not written.
ADVICE = {
    "RockError": "catch it for all errors of ROCK",
    "InternalServerRockError": "read the server's log (`ROCK_HOME/logs`); it has the traceback",
    "ClientError": "change the request as the hint says",
    "InvalidConfig": "correct the value; `details[\"field\"]` names it where there is one",
    "Unsupported": "use another runtime, level or worker; `rock doctor` lists what this machine supports",
    "NotFound": "check the name or id; `rock ps -a` lists sandboxes",
    "NotHere": "clients of the admin never receive it",
    "WrongRole": "send the request to a server of the role in `details[\"role\"]`",
    "Conflict": "use another name, or wait for the operation that is in progress",
    "Unauthorized": "set `ROCK_API_KEY` to a valid key",
    "Forbidden": "use a key with the scope that the message names",
    "PermissionDenied": "use `user=\"root\"`, another path, or change the mode of the file",
    "QuotaExceeded": "retry after `details[\"retry_after\"]` seconds, or stop sandboxes",
    "SandboxError": "start a new sandbox",
    "StartFailed": "read the message; increase `startup_timeout` for a large image",
    "ImageError": "check the name of the image and the registry; `rock image ls` lists stored images",
    "OutOfMemory": "increase `memory`, or use less in the sandbox",
    "DiskFull": "increase `disk`, or write less",
    "SandboxStopped": "start a new sandbox; increase `idle_timeout` or `max_lifetime` if one of them ended it",
    "Exited": "do not replay lost work: code inside may have caused the end",
    "Lost": "start a new sandbox and replay the lost work",
    "EnvHubError": "read `__cause__`, the original error",
    "CommandRockError": "handle it as `ActionError`",
    "ActionError": "read the output of the program in the message and in `details`",
    "CommandFailed": "read `observation`: output and exit code",
    "CommandTimeout": "increase `timeout`; the session stays usable",
    "EnvironmentRaised": "read `type` and `traceback`; the environment stays usable",
    "EnvironmentEnded": "create a new environment; `details` has its last output",
    "SessionClosed": "use another session; `sandbox.sessions.create` opens one",
    "PortFailed": "check the program that listens on the port",
    "PortTimeout": "check the program that listens on the port, or increase the timeout",
    "ServerError": "report it, with the server's log",
    "NoCapacity": "retry later, request fewer resources, or add a worker",
    "StorageFull": "free space on the server's disk, then retry",
    "Unavailable": "check that the server runs (`rock admin status`), then retry",
}
HEAD = """# Errors

Every error of the SDK is a `rock.errors.RockError` with `message` (what happened), `hint` (what to do), `sandbox_id`,
`retryable` and `details`. The HTTP API has the same fields in the body of each response that is not 2xx:

```text
{"error": {"code": "not_found", "message": "...", "sandbox_id": "...", "retryable": false, "hint": "...",
           "details": {}}}
```

A class is listed below its base class, so `except SandboxError` catches the classes that are indented below it. The
command line prints `error: MESSAGE` and the hint.

This page is generated from `src/rock/errors.py` by `python tools/errors_reference.py`.

| class | HTTP status | code | retryable | cause | what to do |
|---|---|---|---|---|---|
"""


def _cause(kind: type[errors.RockError]) -> str:
    text = " ".join((kind.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|")


def _rows(kind: type[errors.RockError], depth: int) -> list[str]:
    indent = "&nbsp;&nbsp;" * depth
    retry = "yes" if kind.retryable else "no"
    name = kind.__name__
    code = f"<a id='{kind.code}'></a>`{kind.code}`"  # troubleshooting.md and others link to it
    rows = [f"| {indent}`{name}` | {kind.status} | {code} | {retry} | {_cause(kind)} | {ADVICE[name]} |"]
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            rows += _rows(child, depth + 1)
    return rows


def page() -> str:
    """The page, as Markdown. KeyError: a class has no advice."""
    rows = _rows(errors.RockError, 0)
    assert len(rows) == len(ADVICE), "there is advice for a class that does not exist"
    aliases = sorted(
        (name, kind.__name__) for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.RockError) and kind.__name__ != name
    )  # fmt: skip
    other = "\n".join(f"- `{name}` is `{kind}`" for name, kind in aliases)
    return f"{HEAD}{chr(10).join(rows)}\n\nOther names, for code that was written for the original ROCK:\n\n{other}\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            print(f"{PAGE} is not current: python tools/errors_reference.py", file=sys.stderr)
            return 1
        return 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
