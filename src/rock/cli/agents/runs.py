"""`rock runs ls|show|calls|export|end|rm`: runs of agents at the model gateway, and their recorded calls."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rock.cli.connection import client
from rock.cli.output import age, as_json, for_each, table
from rock.cli.parsing import Group, json_option
from rock.errors import InvalidConfig
from rock.protocol.runs import RunInfo, TrajectoryFormat

_run = click.argument("run")
_whole = click.option("--no-trunc", is_flag=True, help="Do not cut cells.")


@click.group(cls=Group)
def runs() -> None:
    """List runs of agents, and read, export and end them.

    A run is one agent on one task: it has the secret of the model endpoint, a budget, and all model calls.
    """


@runs.command("ls", example="rock runs ls --tag group=g1")
@click.option("--state", type=click.Choice(["active", "ended"]), help="Only runs of this state.")
@click.option("--sandbox", help="Only runs of this sandbox.")
@click.option("--upstream", help="Only runs of this upstream.")
@click.option("--tag", multiple=True, metavar="NAME=VALUE", help="Only runs with this tag; repeatable.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Number of runs.")
@json_option
@_whole
def list_runs(
    state: str | None,
    sandbox: str | None,
    upstream: str | None,
    tag: tuple[str, ...],
    limit: int,
    json_: bool,
    no_trunc: bool,
) -> None:
    """List runs, newest first."""
    tags = dict(_pair(text) for text in tag)
    found = client().runs.list(state=state, sandbox=sandbox, upstream=upstream, tags=tags, limit=limit)
    if json_:
        as_json([item.model_dump(mode="json") for item in found])
        return
    rows = [
        [item.id, item.state, item.upstream or item.source, item.counts.done, _tokens(item), _reward(item),
         age(item.created_at), item.sandbox or "", ",".join(f"{k}={v}" for k, v in sorted(item.tags.items()))]
        for item in found
    ]  # fmt: skip
    table(["RUN", "STATE", "SOURCE", "CALLS", "TOKENS", "REWARD", "AGE", "SANDBOX", "TAGS"], rows, "no runs",
          whole=no_trunc)  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidConfig(f"--tag {text!r} is not NAME=VALUE", hint="write it like --tag group=g1")
    return name, value


def _tokens(info: RunInfo) -> int:
    return info.counts.prompt_tokens + info.counts.completion_tokens


def _reward(info: RunInfo) -> str:
    if info.reward_valid is False:
        return "invalid"
    if info.reward is None:
        return ",".join(f"{name}={value:g}" for name, value in info.rewards.items())
    return f"{info.reward:g}"


@runs.command(example="rock runs show run-0123456789abcdef")
@_run
def show(run: str) -> None:
    """Show all fields of a run as JSON."""
    as_json(client().runs.get(run).info.model_dump(mode="json"))


@runs.command(example="rock runs calls run-0123456789abcdef --bodies --json")
@_run
@click.option("--after", type=click.IntRange(0), default=0, help="Only calls above this number.")
@click.option("--limit", type=click.IntRange(1), help="Number of calls.")
@click.option("--bodies", is_flag=True, help="With --json: with requests, responses and token ids.")
@json_option
@_whole
def calls(run: str, after: int, limit: int | None, bodies: bool, json_: bool, no_trunc: bool) -> None:
    """List the recorded calls of a run in order of arrival."""
    found = client().runs.get(run).calls(after=after, limit=limit, bodies=bodies and json_)
    if json_:
        as_json([call.model_dump(mode="json") for call in found])
        return
    rows = [
        [call.number, call.parent or "", call.state, call.dialect, call.model, call.usage.prompt,
         call.usage.completion, f"{1000 * ((call.ended or call.started) - call.started):.0f} ms",
         call.error or call.finish_reason or ""]
        for call in found
    ]  # fmt: skip
    table(["CALL", "PARENT", "STATE", "DIALECT", "MODEL", "PROMPT", "COMPLETION", "TIME", "END"], rows, "no calls",
          whole=no_trunc)  # fmt: skip


@runs.command(example="rock runs export run-0123456789abcdef --format atif -o trajectory.json")
@_run
@click.option("--format", "kind", type=click.Choice(["atif", "openai", "chains", "rock"]), default="atif",
              show_default=True, help="Format of the trajectory.")  # fmt: skip
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File; by default the output.")
def export(run: str, kind: TrajectoryFormat, output: Path | None) -> None:
    """Export the calls of a run, as ATIF, OpenAI, token chains or LLMTraj."""
    found = client().runs.get(run).trajectory(kind)
    if output is None:
        as_json(found)
    else:
        output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@runs.command(example="rock runs end run-0123456789abcdef --reward 1")
@_run
@click.option("--reward", type=float, help="Reward of the run.")
@click.option("--invalid", is_flag=True, help="An infrastructure error prevented a reward.")
@click.option("--reason", help="Why it ended, for people.")
def end(run: str, reward: float | None, invalid: bool, reason: str | None) -> None:
    """End a run: its running calls are cancelled, later ones are refused."""
    print(client().runs.get(run).end(reward, valid=not invalid, reason=reason).id)


@runs.command(example="rock runs rm run-0123456789abcdef")
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@click.option("--force", "-f", is_flag=True, help="End active runs first.")
def rm(names: tuple[str, ...], force: bool) -> int:
    """Delete runs and their recorded calls."""
    server = client()
    return for_each(names, lambda name: server.runs.get(name).delete(force=force))
