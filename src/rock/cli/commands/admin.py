"""`rock admin start|stop|status|backup|restore`: the server as a background process of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rock.admin.preflight import require_key_beyond_loopback, role_of
from rock.cli import installation
from rock.cli.serve.home import Home, make_private
from rock.cli.serve.tls import tls_of
from rock.errors import Conflict, InvalidConfig, RockError, ServerError, Unavailable
from rock.settings import Settings, child_environment

if TYPE_CHECKING:
    from rock.sync.transport import Transport

app = typer.Typer(no_args_is_help=True, help="Start and stop the server of this machine.")

_START_TIMEOUT = 60.0


def _settings(**given: Any) -> Settings:
    try:
        return Settings.read(**given)
    except ValueError as error:
        raise InvalidConfig(str(error)) from None


@app.command()
def start(
    port: Annotated[int | None, typer.Option(help="Port; 8080 by default, 0 takes a free one.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; beyond loopback an API key is needed.")
    ] = None,
    env: Annotated[str, typer.Option(help="Kept for ROCK's command line; local is the only one.")] = "local",
    role: Annotated[
        str | None, typer.Option(help="all, write (or admin), read (or proxy); the last two have no sandboxes here.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Serve TLS with this chain of certificates, in PEM.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="The key of the certificate, in PEM.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and log to the terminal.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="The store was lost: go on with the sandboxes that run, in a new one.")
    ] = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="The store was lost: end all sandboxes, and remove files that are kept.")
    ] = False,
) -> None:
    """Start the server and return when it serves. Sandboxes of a server that crashed are found again."""
    installation.require_server()
    if adopt and abandon:
        raise InvalidConfig("--adopt and --abandon exclude each other")
    changed = "adopt" if adopt else "abandon" if abandon else None
    settings = _settings(host=host, port=port, tls_cert=_file(tls_cert), tls_key=_file(tls_key), role=role,
                         store_changed=changed)  # fmt: skip
    role_of(settings.role)
    require_key_beyond_loopback(settings.host, settings.api_key)
    tls_of(settings)
    if foreground:
        from rock.cli.serve.serve import (
            run_server,  # the complete server, imported only in the foreground mode
        )

        run_server(settings, log_to_file=False)
        return
    running = Home(settings.home).read()
    if running is not None:
        raise Conflict(f"a server runs already for {settings.home} ({_where(running)})", hint="rock admin stop")
    began = time.monotonic()
    note = _launch(settings)
    typer.echo(
        f"ROCK serves on {_where(note)} after {time.monotonic() - began:.2f} s "
        f"(pid {note['pid']}, home {settings.home}, log {settings.log_dir / 'server.log'})"
    )


def _file(name: str | None) -> str | None:
    """An absolute path: the server has another working directory."""
    return None if name is None else str(Path(name).expanduser().absolute())


def _launch(settings: Settings) -> dict[str, Any]:
    """Start a server in a session of its own, so that it survives the terminal."""
    make_private(settings.home)
    settings.log_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    output = settings.log_dir / "start.log"
    with output.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "rock.cli.server", "--host", settings.host, "--port", str(settings.port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=child_environment(
                ROCK_HOME=str(settings.home), ROCK_TLS_CERT=settings.tls_cert, ROCK_TLS_KEY=settings.tls_key,
                ROCK_ROLE=settings.role, ROCK_STORE_CHANGED=settings.store_changed,
            ),
        )
    home = Home(settings.home)
    end = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < end:
        note = home.read()
        if note and note.get("pid") == child.pid:
            return note
        if child.poll() is not None:
            raise _why(output)
        time.sleep(0.02)
    child.terminate()
    raise Unavailable(f"the server did not start within {_START_TIMEOUT:g} s", hint=f"look into {output}")


def _why(output: Path) -> RockError:
    lines = output.read_text(errors="replace").strip().splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    if told:
        return ServerError(told[-1], hint=hints[-1] if hints else None)
    return ServerError(f"the server ended at once: {lines[-1] if lines else 'no output'}", hint=f"look into {output}")


def _where(note: dict[str, Any]) -> str:
    host = note.get("host", "?")
    scheme = "https" if note.get("tls_cert") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in str(host) else host}:{note.get('port', '?')}"


@app.command()
def stop(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the sandboxes alive for the next start.")] = False,
) -> None:
    """Stop the server and, without --keep, every sandbox first, so that nothing is left behind."""
    settings = _settings()
    home = Home(settings.home)
    note = home.read()
    if note is None:
        typer.echo(f"no server runs for {settings.home}")
        return
    pid = int(note.get("pid", 0))
    if not pid:
        raise Unavailable("a server holds the folder but has not said where it listens; try again")
    if not keep:
        count = _stop_sandboxes(note, settings)
        typer.echo(f"stopped {count} sandboxes")
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    end = time.monotonic() + 30.0 + settings.drain_seconds
    while home.read() is not None:
        if time.monotonic() > end:
            raise Unavailable(f"the server (pid {pid}) does not stop", hint=f"kill -9 {pid}; sandboxes survive that")
        time.sleep(0.02)
    typer.echo("stopped")


def _own_transport(note: dict[str, Any], key: str | None) -> Transport:
    """A transport to the server of this folder, which accepts exactly its certificate, for any name."""
    import ssl

    from rock.sync.transport import Transport

    if not note.get("tls_cert"):
        return Transport(_where(note), key)
    context = ssl.create_default_context(cafile=str(note["tls_cert"]))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever issued it
    return Transport(_where(note), key, ssl_context=context)


def _stop_sandboxes(note: dict[str, Any], settings: Settings) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from rock.sync import Client

    with Client(_where(note), settings.api_key) as client:
        client.transport = _own_transport(note, settings.api_key)
        ids = [item.sandbox_id for item in client.list_sandboxes(states="pending,running,stopping")]
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(client.stop_sandbox, ids):
                pass
    return len(ids)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Whether a server runs for this ROCK_HOME, and where."""
    settings = _settings()
    note = Home(settings.home).read()
    if as_json:
        typer.echo(json.dumps({"running": note is not None, "home": str(settings.home), **(note or {})}))
    elif note is None:
        typer.echo(f"no server runs for {settings.home}; start one with: rock admin start")
    else:
        typer.echo(f"serving on {_where(note)} (pid {note.get('pid')}, home {settings.home})")
    if note is None:
        raise typer.Exit(3)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; it is replaced at once.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Copy the store, the catalogue and the logins of registries to a file. The server may run. Files of sandboxes and
    images are not in it."""
    from rock.cli.serve import upkeep

    done = upkeep.backup(_settings(), file)
    if as_json:
        typer.echo(json.dumps(done))
    else:
        typer.echo(f"{done['sandboxes']} records of sandboxes, {', '.join(done['files'])}: {done['bytes']} bytes in "
                   f"{done['file']}")  # fmt: skip


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `rock admin backup` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a store that is newer than the backup.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Put a backup in the place of the store, while no server runs. What was there is kept beside it."""
    from rock.cli.serve import upkeep

    done = upkeep.restore(_settings(), file, force)
    if as_json:
        typer.echo(json.dumps(done))
    else:
        kept = f"; what was there is kept: {', '.join(done['kept'])}" if done["kept"] else ""
        typer.echo(f"restored {done['sandboxes']} records of sandboxes to {done['store']}{kept}")
