"""`rock doctor`: the features of this machine, and the reasons for missing ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rock.cli.output import as_json, busy, table
from rock.cli.parsing import Group, json_option
from rock.settings import Settings

if TYPE_CHECKING:
    from rock.runtime.base import Runtime
    from rock.runtime.namespace.probe import Finding

_PATIENCE = 30.0  # timeout in seconds for a runtime to open


@click.group(cls=Group, invoke_without_command=True, no_args_is_help=False)
@click.option("--kubernetes", is_flag=True, help="Report the level of this pod, and the YAML for a higher one.")
@json_option
@click.pass_context
def doctor(context: click.Context, json_: bool, kubernetes: bool) -> int:
    """Check this machine, or the files of its server.

    Without a command it checks isolation, limits and images. The exit code is 1 when something essential is missing.
    """
    if context.invoked_subcommand is not None:
        return 0
    with busy("checking this machine"):
        findings = _pod() if kubernetes else _findings()
    if json_:
        as_json([{"name": f.name, "ok": f.ok, "detail": f.detail, "hint": f.hint} for f in findings])
    else:
        signs = {True: "ok", False: "no", None: "-"}
        table(["", "", ""], [[signs[f.ok], f.name, _text(f)] for f in findings])
    return int(any(f.ok is False for f in findings))


@doctor.command(example="rock doctor store --repair")
@click.option("--repair", is_flag=True, help="Move damaged files to ROCK_HOME/damaged. It needs a stopped server.")
@click.option("--images", is_flag=True, help="Check the layers of images too.")
@json_option
def store(repair: bool, images: bool, json_: bool) -> int:
    """Check all files that the server stores.

    The exit code is 1 when something is damaged and was not repaired.
    """
    from rock.cli.serve.storecheck import Check, as_data

    with busy("checking the files of the server"):
        found = Check(Settings.read(), repair, images).run()
    wrong = [one for one in found if not one.ok and one.repaired is None]
    if json_:
        as_json({"ok": not wrong, "findings": [as_data(one) for one in found]})
    else:
        rows = [["ok" if one.ok else "moved" if one.repaired else "no", one.kind, one.path, one.detail,
                 one.repaired or one.hint] for one in found]  # fmt: skip
        table(["", "", "", "", ""], rows)
    return int(bool(wrong))


def _pod() -> list[Finding]:
    from rock.runtime.namespace import pod

    return pod.report(Settings.read().run_dir)


def _text(finding: Finding) -> str:
    told = finding.ok is not False or not finding.hint
    return finding.detail if told else f"{finding.detail} -> {finding.hint}"


def _findings() -> list[Finding]:
    import sys

    from rock.runtime.namespace.probe import Finding

    if sys.platform == "linux":
        from rock.runtime.namespace.probe import host_report

        found = [*host_report(), *_engine()]
    else:
        text = "isolation needs Linux: here are the runtimes process and fake, and clients"
        found = [Finding("isolation", None, text, "set ROCK_BASE_URL to a server")]
    return [*_installation(), *found, *_plugins(), *_runtime_classes()]


def _installation() -> list[Finding]:
    """The extra `server`, and other distributions with a package `rock`."""
    from rock.cli.installation import CONFLICT_HINT, conflicts
    from rock.runtime.namespace.probe import Finding

    return [Finding("installation", False, sentence, CONFLICT_HINT) for sentence in conflicts()]


def _engine() -> list[Finding]:
    """The container engine that runtime "docker" would use."""
    import asyncio

    from rock.runtime.docker.oci import findings

    return asyncio.run(findings(Settings.read().docker_host))


def _runtime_classes() -> list[Finding]:
    """The RuntimeClasses of the pod templates and the kind of the objects, where each sandbox is a pod."""
    import asyncio

    from rock.errors import RockError
    from rock.runtime.namespace.probe import Finding

    settings = Settings.read()
    if settings.scheduler != "kubernetes":
        return []
    from rock.admin.app import access_of
    from rock.kubernetes.kinds import kind_of
    from rock.kubernetes.runtime_classes import found_classes, found_kind

    try:
        access = access_of(settings)
        namespace = settings.kubernetes_namespace or access.namespace or "rock"
        rows = asyncio.run(found_classes(access, settings.kubernetes_templates))
        kind = asyncio.run(found_kind(access, kind_of(settings.kubernetes_kind), namespace))
    except RockError as error:
        return [Finding("pod templates", False, error.message, error.hint or "")]
    found = [Finding(f"RuntimeClass {row.name}", row.ok, row.detail, row.hint) for row in rows]
    return found + ([] if kind is None else [Finding(f"kind {kind.name}", kind.ok, kind.detail, kind.hint)])


def _plugins() -> list[Finding]:
    """Runtimes of other distributions, created and opened in a temporary folder."""
    import asyncio
    import tempfile
    from pathlib import Path

    from rock.images.store import ImageStore
    from rock.runtime import plugins
    from rock.runtime.namespace.probe import Finding

    async def why_not(runtime: Runtime) -> str | None:
        if isinstance(runtime, plugins.BrokenRuntime):
            return runtime.reason
        try:
            async with asyncio.timeout(_PATIENCE):
                await runtime.open()
                await runtime.close()
        except Exception as error:
            return str(error) or repr(error)
        return None

    findings = []
    with tempfile.TemporaryDirectory(prefix="rock-doctor-") as folder:
        images = ImageStore(Path(folder) / "images")
        made = plugins.load(lambda name: plugins.RuntimeContext(Path(folder) / name, images))
        for name, runtime in made.items():
            fault = asyncio.run(why_not(runtime))
            hint = "" if fault is None else "repair or remove the package that brings it"
            findings.append(Finding(f"runtime {name}", fault is None, fault or "can be opened", hint))
    return findings
