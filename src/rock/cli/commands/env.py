"""`rock env`: the environments of a server."""

from __future__ import annotations

import random
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rock.cli.output import OPTIONS, as_json, busy, table

if TYPE_CHECKING:
    from rock.protocol.env import EnvAbout

app = typer.Typer(no_args_is_help=True, help="List, show, add, build and play environments.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MOVES = ("up", "down", "left", "right")


@app.command("list")
def list_envs(
    words: Annotated[str | None, typer.Argument(help="Only those whose id contains this.")] = None,
    json: Json = False,
) -> None:
    """List the environments."""
    from rock.cli.commands.sandbox import client

    found = [item for item in client().list_envs() if not words or words.lower() in str(_id(item)).lower()]
    if json:
        as_json(found)
        return
    columns = list(dict.fromkeys(key for item in found for key in item))
    table([column.upper().replace("_", " ") for column in columns], [_row(item, columns) for item in found], "none")


def _id(item: dict[str, Any]) -> Any:
    return item.get("env_id") or item.get("id") or next(iter(item.values()), "")


def _row(item: dict[str, Any], columns: list[str]) -> list[object]:
    return [", ".join(map(str, v)) if isinstance(v := item.get(c), list) else v for c in columns]


@app.command()
def show(
    env_id: Annotated[str, typer.Argument(metavar="ID", help="An id, or a name that was added, with @VERSION.")],
    json: Json = False,
) -> None:
    """Show what is known of an environment; its spaces too, where what it needs is there."""
    from rock.cli.commands.sandbox import client

    about = client().about_env(env_id)
    told = about.model_dump(exclude={"versions"} if not json else set())
    if about.is_ready and about.protocol == "gym" and not about.source.startswith(("hf://", "image://")):
        told |= _spaces(about)
    if json:
        as_json({**told, "versions": about.versions})
        return
    for name, value in told.items():
        if value not in (None, "", []):
            print(f"{name.replace('_', ' '):<18} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for version in about.versions:
        print(f"version {version['version']:<10} {version['source']}  {version['digest'] or 'not built then'}")


def _spaces(about: EnvAbout) -> dict[str, Any]:
    """The spaces of an environment of Gymnasium, read from a new instance."""
    from rock.envs.client import EnvironmentClient, EnvironmentHandle
    from rock.protocol.env import OpenEnv

    link = EnvironmentClient(base_url=OPTIONS.base_url, api_key=OPTIONS.api_key)
    name = about.source.removeprefix("gym://")
    spec = OpenEnv(env_id=name, protocol="gym")
    if about.asked:
        spec.packages = about.asked
    link.open(spec, 60)
    made: dict[str, Any] = {"env_id": name, "protocol": "gym"}
    if about.imports:
        made["imports"] = about.imports
    player = EnvironmentHandle(link, link.make(made, 60))
    try:
        found = player.call("describe")
    finally:
        link.close_env(player.number)
    spaces = ("observation_space", "action_space")
    return {key: " ".join(f"{k}={v}".replace("\n", "") for k, v in found[key].items()) for key in spaces}


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What it is called from now on, like team/Cart.")],
    source: Annotated[str, typer.Argument(help="An id of GEM or Gymnasium, hf://ORG/REPO@COMMIT or image://NAME.")],
    packages: Annotated[list[str] | None, typer.Option(help="What pip installs for it; may be repeated.")] = None,
    imports: Annotated[list[str] | None, typer.Option(help="A module that registers it; may be repeated.")] = None,
    description: Annotated[str, typer.Option(help="What it is, for people.")] = "",
) -> None:
    """Register an environment under a name; another source or package set under it is a new version."""
    from rock.cli.commands.sandbox import client
    from rock.protocol.env import AddEnv

    spec = AddEnv(name=name, source=source, packages=packages or [], imports=imports or [], description=description)
    about = client().add_env(spec)
    print(f"{about.id}@{about.version}  {about.source}")


@app.command()
def build(
    env_id: Annotated[str, typer.Argument(metavar="ID", help="An id, or a name that was added, with @VERSION.")],
    packages: Annotated[list[str] | None, typer.Option(help="What else pip installs; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds.")] = 1200.0,
) -> None:
    """Install ahead what an environment needs, and print the image and its digest."""
    from rock.cli.commands.sandbox import client
    from rock.protocol.env import BuildEnv

    with busy(f"installing the packages of {env_id}"):
        about = client().build_env(BuildEnv(env_id=env_id, packages=packages or []), timeout=timeout)
    print(f"{about.image}  {about.digest}")


@app.command()
def play(
    env_id: Annotated[str, typer.Argument(metavar="ID", help="As in rock env list, like game:Sokoban-v0-easy.")],
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same start.")] = None,
    at_random: Annotated[bool, typer.Option("--random", help="Play random moves instead of asking.")] = False,
    choices: Annotated[str, typer.Option(help="What random moves are drawn from.")] = ",".join(MOVES),
    limit: Annotated[int, typer.Option("--max-steps", min=1, help="Stop after so many steps.")] = 200,
) -> None:
    """Play one episode in the terminal: type your actions, or let chance play."""
    from rock.envs.gem import make

    with busy(f"making {env_id}; the first one of a family installs its packages, which takes minutes"):
        env = make(env_id, base_url=OPTIONS.base_url, api_key=OPTIONS.api_key)
    with env:
        observation, info = env.reset(seed)
        _show(observation, info)
        dice = random.Random(seed)
        total, over, steps = 0.0, False, 0
        while not over and steps < limit:
            action = dice.choice(choices.split(",")) if at_random else _ask()
            if action is None:
                break
            observation, reward, terminated, truncated, info = env.step(_boxed(action))
            total, over, steps = total + reward, terminated or truncated, steps + 1
            print(f"\nstep {steps}: {action}  reward {reward:g}")
            _show(observation, info)
        print(f"\n{'over' if over else 'left'} after {steps} steps, reward {total:g}")


def _ask() -> str | None:
    """A line of input; None at its end."""
    try:
        return input("action> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _boxed(action: str) -> str:
    r"""GEM's form of an action, \boxed{...}, unless it is in some form already."""
    return action if re.search(r"\\boxed\{|[<\n]", action) else f"\\boxed{{{action}}}"


def _show(observation: Any, info: dict[str, Any]) -> None:
    print(str(observation).strip())
    suffix = str(info.get("suffix") or "").strip()
    if suffix:
        print(suffix)
