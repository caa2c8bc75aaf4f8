# GENERATED from src/rock/sdk/sandbox/agent/recipes.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""`Sandbox.run_agent`: an agent of a recipe on one task, with a run of the model gateway."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

from rock import errors
from rock.agents import Recipe, RecipeError, builtin, load, names
from rock.agents.results import parse as parse_log
from rock.protocol.runs import RunInfo
from rock.sync import primitives
from rock.sync.sandbox.link import CLEAN_UP
from rock.sync.sandbox.processes import Processes
from rock.sync.sandbox.runs import Run, Runs
from rock.sync.transport import Transport

HOMES = "/tmp/rock-agents"  # inside: one home folder for each run
_STEP = 60.0  # seconds of each command before the agent
_OUTPUT = 8 << 20  # bytes of stdout and stderr each
_LOOK = 'printf "%s\\n" "$PATH"; [ "$1" = "" ] || [ -d "$1" ]'
_WRITE = 'umask 077; mkdir -p -- "${1%/*}" && cat > "$1"'


class Host(Protocol):
    """What `run_agent` uses of its `Sandbox`."""

    sandbox_id: str | None
    processes: Processes
    _transport: Transport


class AgentOptions(TypedDict, total=False):
    """Options of `run_agent`.

    upstream: name of an upstream of the gateway. pull: the caller answers the calls. replay: fields of `Replay`, or the
    id of a recorded run. run: an existing active run in this sandbox instead of these; it is not ended.
    model: name that the agent requests; without it that of the recipe. budget: calls, tokens, seconds, cost.
    sampling, models, tags: as of a run. cwd: working directory. env: additional variables. user: user inside.
    timeout: seconds after which the agent is killed; without it that of the recipe.
    end: end the run afterwards. False: the caller ends it with a reward.
    """

    upstream: str | None
    pull: bool
    replay: str | dict[str, Any] | None
    run: Run | None
    model: str | None
    models: dict[str, str] | None
    budget: dict[str, float] | None
    sampling: dict[str, Any] | None
    tags: dict[str, str] | None
    cwd: str | None
    env: dict[str, str] | None
    user: str | None
    timeout: float | None
    end: bool


@dataclass(frozen=True)
class AgentResult:
    """The end of an agent.

    exit_code: of its command; None after a timeout. text: its final message, as its output says it. stdout, stderr: at
    most 8 MiB each. run: the run with its counts and budget. input_tokens, output_tokens: of the run; where it has
    none, those in the output. duration: seconds. home: its home folder inside.
    """

    agent: str
    version: str
    exit_code: int | None
    timed_out: bool
    text: str | None
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)
    run: RunInfo = field(repr=False)
    input_tokens: int = 0
    output_tokens: int = 0
    duration: float = 0.0
    home: str = ""

    @property
    def run_id(self) -> str:
        return self.run.id

    @property
    def success(self) -> bool:
        return self.exit_code == 0


def recipe_of(agent: str | os.PathLike[str] | Recipe) -> Recipe:
    """A recipe by its name, by the path of its file, or itself. InvalidConfig."""
    if isinstance(agent, Recipe):
        return agent
    text = os.fspath(agent)
    found = builtin(text) if isinstance(agent, str) else None
    if found is not None:
        return found
    if isinstance(agent, str) and not text.endswith(".toml") and "/" not in text:
        raise errors.InvalidConfig(
            f"there is no recipe {text!r}", hint=f"use one of {', '.join(names())}, or the path of a recipe file"
        )
    try:
        return load(Path(text))
    except RecipeError as error:
        hint = "docs/guides/agents.md has the format"
        raise errors.InvalidConfig(f"the recipe is wrong: {error}", hint=hint) from None
    except OSError as error:
        reason = f"the recipe {text} cannot be read: {error.strerror}"
        raise errors.InvalidConfig(reason, hint="check its path") from None


def run_agent(
    sandbox: Host, agent: str | os.PathLike[str] | Recipe, prompt: str, **options: Unpack[AgentOptions]
) -> AgentResult:
    """`Sandbox.run_agent`."""
    recipe = recipe_of(agent)
    user = options.get("user")
    mount = recipe.mount if recipe.packages else ""
    looked = sandbox.processes.run(["sh", "-c", _LOOK, "sh", mount], timeout=_STEP, user=user)
    if looked.exit_code != 0:
        raise errors.InvalidConfig(
            f"agent {recipe.name} is not in the sandbox", sandbox_id=sandbox.sandbox_id,
            hint=f'create the sandbox with it: Sandbox(image, agents=["{recipe.name}"])',
        )  # fmt: skip
    given = options.get("run")
    run = _create(sandbox, recipe, options) if given is None else given
    ends = given is None and options.get("end", True)
    try:
        result = _execute(sandbox, recipe, prompt, run, looked.stdout.strip(), options)
    except BaseException:
        if ends:
            primitives.settle(lambda: run.end(valid=False, reason="the agent was not started"), CLEAN_UP)
        raise
    return _finished(result, run, ends)


def _create(sandbox: Host, recipe: Recipe, options: AgentOptions) -> Run:
    tags = {"agent": recipe.name, **(options.get("tags") or {})}
    spec: dict[str, Any] = {"tags": tags}
    replay = options.get("replay")
    if replay is not None:
        spec["replay"] = {"run": replay} if isinstance(replay, str) else replay
    for name, value in (("upstream", options.get("upstream")), ("models", options.get("models")),
                        ("budget", options.get("budget")), ("sampling", options.get("sampling"))):  # fmt: skip
        if value is not None:
            spec[name] = value
    if options.get("pull"):
        spec["pull"] = True
    return Runs(sandbox._transport).create(sandbox=sandbox.sandbox_id, **spec)


def _execute(
    sandbox: Host, recipe: Recipe, prompt: str, run: Run, path: str, options: AgentOptions
) -> AgentResult:
    info, user, home = run.info, options.get("user"), f"{HOMES}/{run.id}"
    if run.api_key is None:
        raise errors.InvalidConfig(f"the secret of run {run.id} is unknown here", hint="pass the run that created it")
    command = recipe.render(prompt, base_url=run.base_url, api_key=run.api_key, home=home,
                            model=options.get("model"), path=path)  # fmt: skip
    for name, text in {f"{home}/.rock-agent": f"{recipe.name} {recipe.version}\n", **command.files}.items():
        argv = ["sh", "-c", _WRITE, "sh", name]
        sandbox.processes.run(argv, timeout=_STEP, check=True, user=user, stdin=text)
    timeout = options.get("timeout")
    env: Mapping[str, str] = {**command.env, **(options.get("env") or {})}
    seen = sandbox.processes.run(
        ["sh", "-c", command.line], timeout=recipe.timeout if timeout is None else timeout, env=dict(env),
        cwd=options.get("cwd"), user=user, max_output_bytes=_OUTPUT,
    )  # fmt: skip
    output = seen.stdout
    if recipe.log.file:
        argv = ["cat", f"{home}/{recipe.log.file}"]
        output = (sandbox.processes.run(argv, timeout=_STEP, user=user, max_output_bytes=_OUTPUT)).stdout
    parsed = parse_log(recipe.log, output)
    return AgentResult(
        agent=recipe.name, version=recipe.version, exit_code=None if seen.timed_out else seen.exit_code,
        timed_out=seen.timed_out, text=parsed.text, stdout=seen.stdout, stderr=seen.stderr, run=info,
        input_tokens=parsed.input_tokens or 0, output_tokens=parsed.output_tokens or 0, duration=seen.duration or 0.0,
        home=home,
    )  # fmt: skip


def _finished(result: AgentResult, run: Run, ends: bool) -> AgentResult:
    """The result with the counts of the run."""
    info = (run.end(reason="timeout" if result.timed_out else None) if ends else run.refresh())
    counts = info.counts
    counted = counts.prompt_tokens or counts.completion_tokens
    if not counted:
        return replace(result, run=info)
    return replace(result, run=info, input_tokens=counts.prompt_tokens, output_tokens=counts.completion_tokens)
