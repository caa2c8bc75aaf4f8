"""`rock ui` and `rock audit`: the web page of a server, and its audit log."""

from __future__ import annotations

import sys
import time
import webbrowser
from datetime import datetime

import click

from rock.cli.connection import client
from rock.cli.output import as_json, printable, table
from rock.cli.parsing import command, json_option


@command(example="rock ui\nrock ui --print")
@click.option("--print", "only_print", is_flag=True, help="Print the address instead of opening a browser.")
def ui(only_print: bool) -> None:
    """Open the web page of the server, signed in.

    The link signs in once, within a minute. It contains no key. On a server that recognizes its owner without a key,
    it is the plain address of the page.
    """
    with client() as server:
        url = server.transport.url.partition(";")[0].rstrip("/") + server.page_link()
    if only_print:
        print(url)
        return
    print(f"opening {url.partition('#')[0]}", file=sys.stderr)
    if not webbrowser.open(url):
        print(url)


@command(example="rock audit --action stop_sandbox\nrock audit --tenant blue --since 86400 --json")
@click.option("--tenant", help="Entries of this tenant; other tenants are visible to the server's owner alone.")
@click.option("--key", "key_id", metavar="ID", help="Entries of the key with this id.")
@click.option("--action", help="Entries of this action, like create_sandbox, stop_sandbox or create_key.")
@click.option("--target", help="Entries about the resource with this id or name.")
@click.option("--since", type=click.FloatRange(min=0), metavar="SECONDS", help="Entries of the last SECONDS.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=100, show_default=True,
              help="Maximum number of entries.")  # fmt: skip
@json_option
def audit(tenant: str | None, key_id: str | None, action: str | None, target: str | None, since: float | None,
          limit: int, json_: bool) -> None:  # fmt: skip
    """Show which key performed which action, newest first.

    The log has the calls that change something: sandboxes, groups, volumes, environments, keys and workers. It has no
    bodies of requests. Commands inside sandboxes are not part of it.
    """
    start = None if since is None else time.time() - since
    with client() as server:
        found = server.audit(tenant=tenant, key_id=key_id, action=action, target=target, since=start, limit=limit)
    if json_:
        as_json([entry.model_dump(mode="json") for entry in found])
        return
    rows = [(datetime.fromtimestamp(entry.at).astimezone().strftime("%Y-%m-%d %H:%M:%S"), entry.tenant or "(owner)",
             entry.key_id, printable(entry.action), printable(entry.target), entry.status or "", entry.address)
            for entry in found]  # fmt: skip
    table(("TIME", "TENANT", "KEY", "ACTION", "TARGET", "STATUS", "ADDRESS"), rows, "no entries")
