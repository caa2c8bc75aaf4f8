"""`rock agent`: recipes of agents, their layers on this machine, and one run of an agent in a new sandbox."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import click

from rock.agents import Recipe, RecipeError, builtin, load
from rock.cli.connection import variables
from rock.cli.output import age, as_json, busy, fail, size, table
from rock.cli.parsing import Group, json_option
from rock.errors import InvalidConfig, RockError
from rock.settings import Settings
from rock.sync import Sandbox
from rock.sync.sandbox.agent.recipes import recipe_of


@click.group(cls=Group)
def agent() -> None:
    """List, install and run agents.

    A recipe says which packages an agent has and how it runs. Its packages are installed once on each worker, in
    ROCK_HOME, and mounted read-only into sandboxes. `run` uses the server.
    """


def _layers() -> Any:
    """AgentLayers. The client runs on machines that cannot store images, so it is imported here."""
    from rock.images.agents import AgentLayers

    return AgentLayers(Settings.read().image_dir / "agents")


def _is_file(name: str) -> bool:
    return name.endswith(".toml") or "/" in name


def _recipe(layers: Any, name: str) -> Recipe:
    """A recipe by its name or its file. InvalidConfig."""
    if not _is_file(name):
        found: Recipe = layers.recipe(name)
        return found
    try:
        return load(name)
    except (RecipeError, OSError) as error:
        hint = "docs/guides/agents.md has the format"
        raise InvalidConfig(f"the recipe cannot be read: {error}", hint=hint) from None


@agent.command("ls", example="rock agent ls")
@json_option
@click.option("--no-trunc", is_flag=True, help="Do not cut cells.")
def list_agents(json_: bool, no_trunc: bool) -> None:
    """List recipes, and the installed ones."""
    layers = _layers()
    rows, items = [], []
    for name in layers.names():
        recipe = layers.recipe(name)
        layer = layers.find(recipe)
        state = "installed" if layer else "" if recipe.packages else "no packages"
        item = {"name": name, "version": recipe.version, "dialect": recipe.dialect, "about": recipe.about,
                "installed": layer is not None, "size": layer.size if layer else None,
                "own": builtin(name) != recipe}  # fmt: skip
        items.append(item)
        rows.append([name, recipe.version, recipe.dialect, state, size(layer.size) if layer else "",
                     age(layer.created) if layer else "", recipe.about])  # fmt: skip
    if json_:
        as_json(items)
    else:
        table(["NAME", "VERSION", "DIALECT", "STATE", "SIZE", "AGE", "ABOUT"], rows, "no recipes", whole=no_trunc)


@agent.command(example="rock agent show claude-code")
@click.argument("name", metavar="NAME|FILE")
@json_option
def show(name: str, json_: bool) -> None:
    """Show a recipe."""
    recipe = _recipe(_layers(), name)
    if json_:
        found = asdict(recipe)
        found.pop("text")
        as_json(found)
    else:
        print(recipe.text.rstrip())


@agent.command(example="rock agent add claude-code")
@click.argument("recipes", metavar="NAME|FILE...", nargs=-1, required=True)
@click.option("--python", metavar="PATH", help="Python of this machine for the layer, if the agent needs one.")
def add(recipes: tuple[str, ...], python: str | None) -> int:
    """Install agents on this machine.

    A file is a recipe of your own; it is kept under its name, and sandboxes may use it then.
    """
    layers, failed = _layers(), 0
    for name in recipes:
        try:
            recipe, began = _recipe(layers, name), time.monotonic()
            with busy(f"installing {recipe.name}") as update:
                layer = layers.ensure(recipe, update, python)
            if _is_file(name):
                layers.keep_recipe(recipe)
            took = time.monotonic() - began
            print(f"{recipe.name}  {size(layer.size) if layer else 'no packages'}  {took:.0f} s")
        except RockError as error:
            failed = fail(error)
    return failed


@agent.command(example="rock agent rm claude-code")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> int:
    """Remove agents from this machine.

    An agent that a sandbox uses is not removed.
    """
    layers, failed = _layers(), 0
    for name in names:
        try:
            with busy(f"removing {name}"):
                freed = layers.remove(name)
            print(f"{name}  {size(freed)} freed")
        except RockError as error:
            failed = fail(error)
    return failed


@agent.command("run", example='rock agent run claude-code "fix the tests" --image team/app:1 --upstream main')
@click.argument("name", metavar="NAME|FILE")
@click.argument("prompt")
@click.option("--image", default="python:3.11", show_default=True, help="Image of the sandbox.")
@click.option("--sandbox", metavar="ID", help="An existing sandbox that has the agent, instead of a new one.")
@click.option("--upstream", required=True, help="Upstream of the gateway that answers the calls.")
@click.option("--model", help="Name of the model; by default that of the recipe.")
@click.option("--calls", type=int, help="Budget: number of calls.")
@click.option("--tokens", type=int, help="Budget: number of tokens.")
@click.option("--cost", type=float, help="Budget: cost.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Time limit; by default that of the recipe.")
@click.option("--cwd", metavar="PATH", help="Working directory inside.")
@click.option("--env", "-e", metavar="K=V", multiple=True, help="Variable of the agent. Repeatable.")
@click.option("--network", type=click.Choice(["none", "nat", "host"]), default="none", show_default=True,
              help="Network of a new sandbox.")  # fmt: skip
@click.option("--memory", "-m", default="8g", show_default=True, metavar="SIZE", help="Memory limit of a new sandbox.")
@json_option
def run_agent(
    name: str, prompt: str, image: str, sandbox: str | None, upstream: str, model: str | None, calls: int | None,
    tokens: int | None, cost: float | None, timeout: float | None, cwd: str | None, env: tuple[str, ...], network: str,
    memory: str, json_: bool,
) -> int:  # fmt: skip
    """Run an agent on a task, and print its final message.

    The exit status is that of the agent, and 124 after a timeout. The run keeps every call: rock runs show RUN.
    """
    recipe = recipe_of(name)
    budget: dict[str, Any] = {key: value for key, value in (("calls", calls), ("tokens", tokens), ("cost", cost))
                              if value is not None}  # fmt: skip
    if sandbox is not None:
        inside = Sandbox.connect(sandbox)
    else:
        options: Any = {"network": network, "memory": memory, "idle_timeout": 0}
        inside = Sandbox(image, agents=[recipe.name], startup_timeout=1800.0, **options)
        with busy(f"starting a sandbox with {recipe.name}"):
            inside.start()
    try:
        with busy(f"{recipe.name} works"):
            result = inside.run_agent(recipe, prompt, upstream=upstream, model=model, budget=budget or None, cwd=cwd,
                                      env=variables(env, "--env") or None, timeout=timeout)  # fmt: skip
    finally:
        if sandbox is None:
            inside.stop()
    status = 124 if result.timed_out else result.exit_code if result.exit_code is not None else 1
    if json_:
        as_json({"run": result.run_id, "agent": result.agent, "exit_code": result.exit_code,
                 "timed_out": result.timed_out, "text": result.text, "input_tokens": result.input_tokens,
                 "output_tokens": result.output_tokens, "calls": result.run.counts.calls,
                 "duration": result.duration})  # fmt: skip
        return status
    print(result.text or result.stdout.strip())
    if status:
        print(result.stderr.strip()[-2000:], file=sys.stderr)
    print(f"run {result.run_id}: {result.run.counts.calls} calls, {result.input_tokens} + {result.output_tokens} "
          f"tokens, {result.duration:.1f} s", file=sys.stderr)  # fmt: skip
    return status
