"""The console scripts `admin`, `rocklet` and `envhub`: servers in the foreground."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Literal

from rock.cli.installation import require_server
from rock.cli.output import status_of
from rock.settings import Settings, envhub_database


def admin_main() -> None:
    """`admin`: the server, or one of its roles."""
    parser = argparse.ArgumentParser(prog="admin", description="The ROCK server in the foreground.")
    parser.add_argument("--env", default="local", help="kept for ROCK's command line; local is the only one")
    parser.add_argument("--role", default="all", choices=["all", "admin", "write", "proxy", "read"])
    given = _place(parser)
    _run(given, "Server", role=given.role)


def rocklet_main() -> None:
    """`rocklet`: the sandboxes of one machine without a control plane, for the server that it joins or that lists
    it."""
    text = "The sandboxes of this machine: the data plane and the node plane of the wire, without an admin."
    parser = argparse.ArgumentParser(prog="rocklet", description=text)
    parser.add_argument("--join", default=None, metavar="URL", help="be a worker of this server; several: URL,URL")
    parser.add_argument("--token", default=None, help="ROCK_WORKER_KEY or ROCK_API_KEY of the servers; asked here too")
    parser.add_argument("--name", default=None, help="of this worker; the machine's name unless given")
    parser.add_argument("--advertise", default=None, metavar="URL", help="where servers reach this rocklet")
    parser.add_argument("--tunnel", action="store_const", const="on", default=None,
                        help="servers cannot reach this rocklet: open connections to them instead")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="N",
                        help="N rocklet processes, the workers NAME, NAME-1, ... at the ports PORT, PORT + 1, ...; "
                             "requires --join, and is 1 unless given")  # fmt: skip
    given = _place(parser)
    _run(given, "Rocklet", api_key=given.token, join=given.join, worker_name=given.name, advertise=given.advertise,
         tunnel=given.tunnel, processes=given.workers)  # fmt: skip


def envhub_main() -> None:
    """`envhub`: the registry of environments only."""
    text = "The registry of environments alone; `rock admin start` has it too."
    parser = argparse.ArgumentParser(prog="envhub", description=text)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--db-url", default=None, help="sqlite:///FILE; the one of the server's home unless given")
    given = parser.parse_args()

    def work() -> None:
        require_server()
        from rock.cli.commands.envhub import serve_envhub  # needs the extra `server`

        serve_envhub(Settings.read(host=given.host, port=given.port), given.db_url or envhub_database())

    _exit(work)


def _place(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--host", default=None)
    parser.add_argument("--port", type=int, default=None)
    return parser.parse_args()


def _run(given: argparse.Namespace, kind: Literal["Server", "Rocklet"], **more: Any) -> None:
    def work() -> None:
        require_server()
        from rock.cli.serve import serve  # needs the extra `server`

        serve.run_server(Settings.read(host=given.host, port=given.port, **more), getattr(serve, kind))

    _exit(work)


def _exit(work: Callable[[], object]) -> None:
    if status := status_of(work):
        sys.exit(status)
