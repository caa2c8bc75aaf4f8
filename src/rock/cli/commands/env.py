"""`rock env`: the environments of a server."""

from __future__ import annotations

import random
import re
import sys
from typing import Any

import click

from rock.cli.connection import OPTIONS, client
from rock.cli.output import as_json, busy, table
from rock.cli.parsing import Group, json_option
from rock.envs.client import EnvironmentClient, EnvironmentHandle
from rock.envs.gem import make
from rock.protocol.env import AddEnv, BuildEnv, EnvAbout, OpenEnv

MOVES = ("up", "down", "left", "right")


_env_id = click.argument("env_id", metavar="ID")


@click.group(cls=Group)
def env() -> None:
    """List, show, add, build and play environments.

    ID is an id of `rock env list`, or a name that was added, with @VERSION for an older version.
    """


@env.command("list", example="rock env list sokoban")
@click.argument("words", metavar="[TEXT]", required=False)
@json_option
def list_envs(words: str | None, json_: bool) -> None:
    """List environments, those whose id contains TEXT."""
    found = [item for item in client().list_envs() if not words or words.lower() in str(_id(item)).lower()]
    if json_:
        as_json(found)
        return
    columns = list(dict.fromkeys(key for item in found for key in item))
    table([column.upper().replace("_", " ") for column in columns], [_row(item, columns) for item in found],
          "no environments")  # fmt: skip


def _id(item: dict[str, Any]) -> Any:
    return item.get("env_id") or item.get("id") or next(iter(item.values()), "")


def _row(item: dict[str, Any], columns: list[str]) -> list[object]:
    return [", ".join(map(str, v)) if isinstance(v := item.get(c), list) else v for c in columns]


@env.command(example="rock env show game:Sokoban-v0-easy")
@_env_id
@json_option
def show(env_id: str, json_: bool) -> None:
    """Show what an environment is and needs.

    Of an installed environment of Gymnasium it shows the spaces too.
    """
    about = client().about_env(env_id)
    told = about.model_dump(exclude={"versions"} if not json_ else set())
    if about.is_ready and about.protocol == "gym" and not about.source.startswith(("hf://", "image://")):
        told |= _spaces(about)
    if json_:
        as_json({**told, "versions": about.versions})
        return
    for name, value in told.items():
        if value not in (None, "", []):
            print(f"{name.replace('_', ' '):<18} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for version in about.versions:
        print(f"version {version['version']:<10} {version['source']}  {version['digest'] or 'not built'}")


def _spaces(about: EnvAbout) -> dict[str, Any]:
    """The spaces of an environment of Gymnasium, read from a new instance."""
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


@env.command(example="rock env add team/Cart CartPole-v1 --packages 'gymnasium[classic-control]'")
@click.argument("name")
@click.argument("source")
@click.option("--packages", metavar="PACKAGE", multiple=True, help="Package that pip installs for it. Repeatable.")
@click.option("--imports", metavar="MODULE", multiple=True, help="Module that registers it. Repeatable.")
@click.option("--description", default="", help="Description for people.")
def add(name: str, source: str, packages: tuple[str, ...], imports: tuple[str, ...], description: str) -> None:
    """Register an environment under a name.

    SOURCE is an id of GEM or Gymnasium, hf://ORG/REPO@COMMIT or image://NAME. Another source or other packages under
    the same name are a new version.
    """
    spec = AddEnv(name=name, source=source, packages=list(packages), imports=list(imports), description=description)
    about = client().add_env(spec)
    print(f"{about.id}@{about.version}  {about.source}")


@env.command(example="rock env build game:Sokoban-v0-easy")
@_env_id
@click.option("--packages", metavar="PACKAGE", multiple=True, help="Further package that pip installs. Repeatable.")
@click.option("--timeout", type=click.FloatRange(min=1), default=1200.0, show_default=True, metavar="SECONDS",
              help="Fail after this time.")  # fmt: skip
def build(env_id: str, packages: tuple[str, ...], timeout: float) -> None:
    """Install the packages of an environment ahead of its use.

    Prints the image and its digest. The first environment of a family takes minutes.
    """
    with busy(f"installing the packages of {env_id}"):
        about = client().build_env(BuildEnv(env_id=env_id, packages=list(packages)), timeout=timeout)
    print(f"{about.image}  {about.digest}")


@env.command(example="rock env play game:Sokoban-v0-easy --seed 7")
@_env_id
@click.option("--seed", type=int, help="The same seed gives the same start.")
@click.option("--random", "at_random", is_flag=True, help="Play random moves instead of reading them.")
@click.option("--choices", default=",".join(MOVES), show_default=True, help="The random moves.")
@click.option("--max-steps", "limit", type=click.IntRange(min=1), default=200, show_default=True,
              help="Stop after this number of steps.")  # fmt: skip
def play(env_id: str, seed: int | None, at_random: bool, choices: str, limit: int) -> None:
    """Play one episode in the terminal.

    Type the actions, or let --random play.
    """
    with busy(f"creating {env_id}; the first one of a family installs its packages, which takes minutes"):
        player = make(env_id, base_url=OPTIONS.base_url, api_key=OPTIONS.api_key)
    with player:
        observation, info = player.reset(seed)
        _show(observation, info)
        dice = random.Random(seed)
        total, over, steps = 0.0, False, 0
        while not over and steps < limit:
            action = dice.choice(choices.split(",")) if at_random else _ask()
            if action is None:
                break
            observation, reward, terminated, truncated, info = player.step(_boxed(action))
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
