"""`rock env`: the environments that a server can make."""

from __future__ import annotations

import random
import re
import sys
from typing import Annotated, Any

import typer

from rock.cli.output import OPTIONS, as_json, busy, table

app = typer.Typer(no_args_is_help=True, help="List and play environments.")

MOVES = ("up", "down", "left", "right")


@app.command("list")
def list_envs(
    words: Annotated[str | None, typer.Argument(help="Only those whose id contains this.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the environments."""
    from rock.cli.sandbox import client

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
def play(
    env_id: Annotated[str, typer.Argument(metavar="ID", help="As in rock env list, like game:Sokoban-v0-easy.")],
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same start.")] = None,
    at_random: Annotated[bool, typer.Option("--random", help="Play random moves instead of asking.")] = False,
    choices: Annotated[str, typer.Option(help="What random moves are drawn from.")] = ",".join(MOVES),
    limit: Annotated[int, typer.Option("--max-steps", min=1, help="Stop after so many steps.")] = 200,
) -> None:
    """Play one episode in the terminal: type your actions, or let chance play."""
    from rock.envs import make

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
    """A line of the player; None at the end of the input."""
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
