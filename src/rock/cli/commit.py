"""`rock commit`: an image made of a sandbox."""

from __future__ import annotations

from typing import Annotated

import typer

from rock.cli.output import busy


def commit(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id of a sandbox, or how it begins.")],
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Name of the image, like localhost:5000/team/tool:1.0.")],
    push: Annotated[bool, typer.Option("--push", help="Send it to the registry that its name tells.")] = False,
    username: Annotated[str | None, typer.Option(help="For the registry; its password is asked for.")] = None,
) -> None:
    """Make an image of a sandbox: of one that runs, which stands still meanwhile, or of one whose files are kept."""
    from rock.cli.sandbox import attached

    password = None if username is None else typer.prompt("Password", hide_input=True, err=True)
    with busy(f"committing {target} to {tag}"):
        status = attached(target).commit(tag, username, password, push=push)
    print(f"{status.image_tag}  {status.pushed_digest or status.image_digest}")
