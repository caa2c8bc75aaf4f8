"""Agents of trials: the interface of agents, and those that need no installation: oracle, nop and a shell command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rock.agents import builtin
from rock.errors import InvalidConfig
from rock.jobs.plan import AgentPlan, TrialFailed
from rock.sdk.sandbox.sandbox import Sandbox

INSTALL_TIMEOUT = 1800.0  # seconds
PROMPT = "/tmp/rock-instruction.md"  # the instruction, for shell commands


@dataclass(frozen=True)
class AgentTask:
    """What an agent is to do. workdir: None is the sandbox's. timeout: seconds of its run. solution: local folder of
    the oracle, with solve.sh. run: a gateway run (`base_url`, `api_key`, `environ`), None without one."""

    name: str
    instruction: str
    timeout: float
    workdir: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    solution: Path | None = None
    solution_env: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] | None = None


@dataclass
class AgentResult:
    """The end of an agent. output: its last bytes as text. usage: n_input_tokens, n_cache_tokens, n_output_tokens,
    cost_usd, and metadata, as far as they are known. A timeout is not an error: the tests run afterwards."""

    exit_code: int | None = 0
    timed_out: bool = False
    output: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


class Programs(Protocol):
    """Runs programs of a trial so that a runner that takes over continues to wait for them."""

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox of the agent."""
        ...

    async def program(
        self, name: str, script: str, timeout: float, *, env: dict[str, str] | None = None, cwd: str | None = None
    ) -> AgentResult:
        """Run a script of /bin/sh once for each try. name: unique in the trial."""
        ...

    async def is_started(self, name: str) -> bool:
        """Whether the program of this name was started, by this runner or an earlier one."""
        ...


class AgentRunner(Protocol):
    """An agent. A runner that takes over a trial calls `setup` and `run` again: both use `Programs.program` for all
    that must not be repeated."""

    name: str
    version: str

    def fields(self) -> dict[str, Any]:
        """Fields of SandboxConfig that the agent needs."""
        ...

    async def setup(self, programs: Programs, task: AgentTask) -> None:
        """Install and configure it."""
        ...

    async def run(self, programs: Programs, task: AgentTask) -> AgentResult:
        """Run it to its end, at most `task.timeout` seconds."""
        ...


class Nop:
    """Does nothing: the reward of an unchanged sandbox."""

    name, version = "nop", "1"

    def __init__(self, plan: AgentPlan) -> None:
        self.plan = plan

    def fields(self) -> dict[str, Any]:
        return {}

    async def setup(self, programs: Programs, task: AgentTask) -> None:
        return None

    async def run(self, programs: Programs, task: AgentTask) -> AgentResult:
        return AgentResult()


class Oracle(Nop):
    """Runs the solution of the task."""

    name = "oracle"

    async def run(self, programs: Programs, task: AgentTask) -> AgentResult:
        if task.solution is None or not (task.solution / "solve.sh").is_file():
            raise TrialFailed(f"task {task.name} has no solution/solve.sh", "request", hint="the oracle needs it")
        if not await programs.is_started("agent"):
            await programs.sandbox.fs.upload_dir(task.solution, "/solution", check="raise")
        return await programs.program("agent", "exec bash /solution/solve.sh", task.timeout, cwd=task.workdir,
                                      env={**task.solution_env, **self.plan.env})  # fmt: skip


class Command(Nop):
    """A shell command in the sandbox: `AgentPlan.command`. The instruction is in ROCK_INSTRUCTION_FILE."""

    name = "bash"

    def __init__(self, plan: AgentPlan) -> None:
        super().__init__(plan)
        if not plan.command:
            raise InvalidConfig("agent bash has no command", hint="set agents.kwargs.command")
        self.command = plan.command

    async def setup(self, programs: Programs, task: AgentTask) -> None:
        if not await programs.is_started("agent"):
            await programs.sandbox.fs.write(PROMPT, task.instruction.encode("utf-8", "replace"))

    async def run(self, programs: Programs, task: AgentTask) -> AgentResult:
        run = task.run or {}
        env = {**task.env, **{str(k): str(v) for k, v in (run.get("environ") or {}).items()}, **self.plan.env,
               "ROCK_TASK_ID": task.name, "ROCK_INSTRUCTION_FILE": PROMPT}  # fmt: skip
        return await programs.program("agent", self.command, task.timeout, env=env, cwd=task.workdir)


class Recipe(Protocol):
    """A recipe of an agent: the programs that a worker mounts, and the command line of one run."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def packages(self) -> Any: ...

    def render(self, prompt: str, *, base_url: str, api_key: str, home: str, model: str | None, path: str) -> Any:
        """The command: `line` for a shell, `env`, and `files` by absolute path."""
        ...


class RecipeAgent(Nop):
    """An agent of a recipe. It calls the model through a gateway run, so the plan needs `model`."""

    def __init__(self, plan: AgentPlan, recipe: Recipe) -> None:
        super().__init__(plan)
        self.recipe = recipe
        self.name, self.version = recipe.name, recipe.version or "0"

    def fields(self) -> dict[str, Any]:
        """Its programs, and time for a worker to install them."""
        if not self.recipe.packages:
            return {}
        return {"agents": [self.recipe.name], "startup_timeout": max(self.plan.setup_timeout, INSTALL_TIMEOUT)}

    async def run(self, programs: Programs, task: AgentTask) -> AgentResult:
        if await programs.is_started("agent"):  # by an earlier runner, which alone had the secret of the run
            return await programs.program("agent", "", task.timeout)
        run = task.run or {}
        if not run.get("api_key"):
            raise TrialFailed(f"agent {self.name} has no gateway run", "request", hint="set `model` of the job plan")
        home = f"/tmp/rock-agent-{run['id']}"
        found = await programs.program("path", 'printf %s "$PATH"', 60.0)
        command = self.recipe.render(task.instruction, base_url=str(run["base_url"]), api_key=str(run["api_key"]),
                                     home=home, model=self.plan.model, path=found.output.strip())  # fmt: skip
        await programs.sandbox.fs.mkdir(home, mode=0o700)
        for path, text in command.files.items():
            await programs.sandbox.fs.write(path, text, mode=0o600)
        env = {**task.env, **command.env, **self.plan.env}
        return await programs.program("agent", command.line, task.timeout, env=env, cwd=task.workdir)


_AGENTS: dict[str, Callable[[AgentPlan], AgentRunner]] = {"oracle": Oracle, "nop": Nop, "bash": Command}


def register_agent(name: str, make: Callable[[AgentPlan], AgentRunner]) -> None:
    """Make an agent available by name to jobs of this process."""
    _AGENTS[name] = make


_find_recipe: Callable[[str], Recipe | None] = builtin


def use_recipes(find: Callable[[str], Recipe | None]) -> None:
    """Where agents that are not registered are found. find: a recipe by its name, or None."""
    global _find_recipe
    _find_recipe = find


def agent_of(plan: AgentPlan) -> AgentRunner:
    """The agent of a plan. InvalidConfig with the known names."""
    make = _AGENTS.get(plan.name)
    if make is None:
        recipe = _find_recipe(plan.name)
        if recipe is not None:
            return RecipeAgent(plan, recipe)
        raise InvalidConfig(f"there is no agent {plan.name!r}", hint=f"known agents: {', '.join(sorted(_AGENTS))}")
    return make(plan)

