"""`rock admin start|stop|status|backup|restore`: the server as a background process of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rock.admin.preflight import require_key_beyond_loopback, role_of
from rock.cli import installation
from rock.cli.contexts import url_of
from rock.cli.output import busy
from rock.cli.parsing import Group, json_option
from rock.cli.serve.home import Home, make_private
from rock.cli.serve.tls import tls_of
from rock.errors import Conflict, InvalidConfig, RockError, ServerError, Unavailable
from rock.settings import Settings, child_environment

if TYPE_CHECKING:
    from rock.sync.transport import Transport

_START_TIMEOUT = 60.0
_RUNNING = (
    "all commands of this ROCK_HOME use it already; `rock admin status` describes it. For a second server set another "
    "ROCK_HOME and --port 0"
)


def _settings(**given: Any) -> Settings:
    try:
        return Settings.read(**given)
    except ValueError as error:
        raise InvalidConfig(str(error), hint="correct the variable or the option") from None


@click.group(cls=Group)
def admin() -> None:
    """Start, stop, back up and restore the server of this machine.

    The server of ROCK_HOME, which is ~/.rock by default.
    """


@admin.command(example="rock admin start\nrock admin start --port 0")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; by default 8080. 0 selects a free port.")
@click.option("--host", help="Address to listen on, by default 127.0.0.1; other addresses need an API key.")
@click.option("--env", default="local", help="Accepted for ROCK's command line; local is the only one.")
@click.option("--role", help="all, write (or admin), or read (or proxy); the last two have no sandboxes here.")
@click.option("--workers", type=click.IntRange(1, 64),
              help="Rocklet processes of this machine; by default one for 8 CPUs, and at least 1.")  # fmt: skip
@click.option("--tls-cert", metavar="FILE", help="Serve TLS with this certificate chain, in PEM.")
@click.option("--tls-key", metavar="FILE", help="Key of the certificate, in PEM.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground, and log to the terminal.")
@click.option("--adopt", is_flag=True, help="The store was lost: continue with the running sandboxes in a new one.")
@click.option("--abandon", is_flag=True, help="The store was lost: end all sandboxes, and delete retained files.")
def start(
    port: int | None, host: str | None, env: str, role: str | None, workers: int | None, tls_cert: str | None,
    tls_key: str | None, foreground: bool, adopt: bool, abandon: bool,
) -> None:  # fmt: skip
    """Start the server, and return when it serves.

    A server that crashed continues with its running sandboxes.
    """
    installation.require_server()
    if adopt and abandon:
        raise InvalidConfig("--adopt and --abandon exclude each other", hint="give one of them")
    changed = "adopt" if adopt else "abandon" if abandon else None
    settings = _settings(host=host, port=port, tls_cert=_file(tls_cert), tls_key=_file(tls_key), role=role,
                         store_changed=changed, processes=workers)  # fmt: skip
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
        raise Conflict(f"a server runs already with ROCK_HOME={settings.home}: {url_of(running)}", hint=_RUNNING)
    began = time.monotonic()
    with busy("starting the server"):
        note = _launch(settings)
    print(
        f"ROCK serves on {url_of(note)} after {time.monotonic() - began:.2f} s "
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
                ROCK_PROCESSES=str(settings.processes),
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


@admin.command(example="rock admin stop\nrock admin stop --keep")
@click.option("--keep", is_flag=True, help="Leave the sandboxes running for the next start.")
def stop(keep: bool) -> None:
    """Stop the server and all its sandboxes.

    With --keep the sandboxes continue, and the next start finds them.
    """
    settings = _settings()
    home = Home(settings.home)
    note = home.read()
    if note is None:
        print(f"no server runs for {settings.home}")
        return
    pid = int(note.get("pid", 0))
    if not pid:
        raise Unavailable("a server has locked ROCK_HOME and does not listen yet", hint="try again in a second")
    if not keep:
        with busy("stopping the sandboxes"):
            count = _stop_sandboxes(note, settings)
        print(f"stopped {count} sandboxes")
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    with busy("stopping the server"):
        end = time.monotonic() + 30.0 + settings.drain_seconds
        while home.read() is not None:
            if time.monotonic() > end:
                raise Unavailable(f"the server (pid {pid}) does not stop",
                                  hint=f"kill -9 {pid}; sandboxes survive that")
            time.sleep(0.02)
    print("stopped")


def _own_transport(note: dict[str, Any], key: str | None) -> Transport:
    """A transport to the server of this folder, which accepts exactly its certificate, for any name."""
    import ssl

    from rock.sync.transport import Transport

    if not note.get("tls_cert"):
        return Transport(url_of(note), key)
    context = ssl.create_default_context(cafile=str(note["tls_cert"]))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever issued it
    return Transport(url_of(note), key, ssl_context=context)


def _stop_sandboxes(note: dict[str, Any], settings: Settings) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from rock.sync import Client

    with Client(url_of(note), settings.api_key) as client:
        client.transport = _own_transport(note, settings.api_key)
        ids = [item.sandbox_id for item in client.list_sandboxes(states="pending,running,stopping")]
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(client.stop_sandbox, ids):
                pass
    return len(ids)


@admin.command(example="rock admin status --json")
@json_option
def status(json_: bool) -> int:
    """Show whether a server runs with this ROCK_HOME, and where.

    The exit code is 3 when none runs.
    """
    settings = _settings()
    note = Home(settings.home).read()
    if json_:
        print(json.dumps({"running": note is not None, "home": str(settings.home), **(note or {})}))
    elif note is None:
        print(f"no server runs for {settings.home}; start one with: rock admin start")
    else:
        print(f"serving on {url_of(note)} (pid {note.get('pid')}, home {settings.home})")
    return 3 if note is None else 0


@admin.command(example="rock admin backup rock-backup.tar")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def backup(file: Path, json_: bool) -> None:
    """Copy the store of the server to a file.

    It has the records of sandboxes, the catalogue, the logins of registries, and the runs and upstreams of the model
    gateway with their keys, but no files of sandboxes and no images. The server may run. An existing file is replaced.
    """
    from rock.cli.serve import upkeep

    done = upkeep.backup(_settings(), file)
    if json_:
        print(json.dumps(done))
    else:
        print(f"{done['sandboxes']} records of sandboxes, {done['runs']} runs, "
              f"{', '.join(done['files'])}: {done['bytes']} bytes in {done['file']}")  # fmt: skip


@admin.command(example="rock admin restore rock-backup.tar")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a store that is newer than the backup.")
@json_option
def restore(file: Path, force: bool, json_: bool) -> None:
    """Replace the store by a backup, while no server runs.

    The replaced files are kept beside it.
    """
    from rock.cli.serve import upkeep

    done = upkeep.restore(_settings(), file, force)
    if json_:
        print(json.dumps(done))
    else:
        kept = f"; what was there is kept: {', '.join(done['kept'])}" if done["kept"] else ""
        print(f"restored {done['sandboxes']} records of sandboxes to {done['store']}{kept}")
