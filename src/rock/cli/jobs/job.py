"""`rock job run|ls|show|cancel|resume|rm|compare`: agents on tasks, stored on the server as trials with rewards."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rock import settings
from rock.cli.connection import OPTIONS, client, variables
from rock.cli.output import age, as_json, busy, for_each, table
from rock.cli.parsing import Group, json_option
from rock.cli.progress import Progress
from rock.errors import InvalidConfig
from rock.jobs import reports, tasks
from rock.jobs.config import BashJobConfig, HarborJobConfig, JobConfig
from rock.jobs.plan import AgentPlan, Plan, plan_of
from rock.jobs.reports import rewards_by_task
from rock.jobs.statistics import compare as compared
from rock.protocol.jobs import JobTask, TrialInfo
from rock.sdk.job import Job
from rock.sync.training import TrainingSandbox

_job = click.argument("job_id", metavar="JOB")
_FORMATS = ("table", "json", "rock", "harbor", "swebench")


@click.group(cls=Group)
def job() -> None:
    """Run, list, show, cancel, resume and compare jobs.

    A job runs an agent on tasks, several attempts each. Its trials and rewards are stored on the server.
    """


# ---- run


@job.command(example="rock job run tasks/ --agent oracle --image python:3.11 --concurrency 4\n"
                     "rock job run job.yaml --all --jsonl")  # fmt: skip
@click.argument("config", metavar="CONFIG", required=False)
@click.option("--job-config", "--job_config", "job_config", hidden=True)
@click.option("--task", help="Run this task only.")
@click.option("--tasks", help="Run these tasks only: names or patterns, with commas.")
@click.option("--all", "all_", is_flag=True, help="Run all tasks of the data set. The default, except for scripts.")
@click.option("--limit", type=click.IntRange(1), help="Run the first N tasks.")
@click.option("--dataset", help="Data set of a script: a folder, of which each entry is a task.")
@click.option("--split", default="", help="Split of a training set, or of the data set of a script.")
@click.option("--agent", help="Agent: oracle, nop, bash (with --command) or a recipe.")
@click.option("--command", help="Shell command of agent bash.")
@click.option("--model", help="Model of the agent.")
@click.option("--upstream", help="Upstream of the model gateway: each trial gets a run.")
@click.option("--image", help="Image of the sandboxes.")
@click.option("--memory", help="Memory of the sandboxes.")
@click.option("--cpus", type=float, help="CPUs of the sandboxes.")
@click.option("--timeout", type=float, help="Seconds of one trial.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Variable of the sandboxes. Repeatable.")
@click.option("--concurrency", type=click.IntRange(1, 1000), help="Trials at the same time.")
@click.option("--attempts", type=click.IntRange(1, 1000), help="Attempts at each task.")
@click.option("--name", help="Name of the job.")
@click.option("--out", type=click.Path(file_okay=False), help="Local folder of logs and artifacts.")
@click.option("--jsonl", is_flag=True, help="Print an event per line as JSON.")
@click.option("--detach", is_flag=True, help="Run in the background; print the id of the job.")
def run(config: str | None, job_config: str | None, **options: Any) -> int:
    """Run a job: a YAML file, or a data set.

    A data set is a folder of Harbor tasks, a file of SWE-bench instances, or the name of a training set. The exit
    status is 0 if all trials are completed, and 1 otherwise. An interrupted job continues with `rock job resume`.
    """
    given = config or job_config
    if given is None:
        raise InvalidConfig("which job?", hint="rock job run CONFIG")
    made = _made(given, options)
    if options["detach"]:
        info = asyncio.run(made.create())
        _detach(info.job_id, options["out"], options["concurrency"])
        print(info.job_id)
        return 0
    return _follow(made, options["jsonl"])


def _made(given: str, options: Mapping[str, Any]) -> Job:
    """The job of a YAML file or of a data set, with the options."""
    place = Path(given)
    base_url, api_key = OPTIONS.base_url, OPTIONS.api_key
    names = options["tasks"].split(",") if options["tasks"] else [options["task"]] if options["task"] else None
    if place.suffix in (".yaml", ".yml"):
        if not place.is_file():
            raise InvalidConfig(f"there is no file {place}", hint="rock job run FILE.yaml")
        config = JobConfig.from_yaml(place)
        plan = plan_of(config)
        if OPTIONS.source != "the option --base-url" and "base_url" in config.environment.model_fields_set:
            base_url, api_key = config.environment.base_url, config.environment.api_key or api_key
        found = _config_tasks(config, plan, place.parent, names, options)
    else:
        found = tasks.selected(_tasks_of(given, options["split"]), names, None, options["limit"])
        plan = Plan(name=f"{place.stem or 'job'}-{_run_id()}", kind=str(found[0].spec["kind"]), dataset=place.name)
        plan = plan.model_copy(update={"labels": {"rock_dataset": place.name}})
    plan = _with_options(plan, options)
    return Job(plan, tasks=found, base_url=base_url, api_key=api_key, folder=options["out"], base=place.parent)


def _tasks_of(given: str, split: str) -> list[JobTask]:
    """The tasks of a local data set, or of a training set by its name."""
    if given not in tasks.TRAINING_SETS or Path(given).exists():
        return tasks.local_tasks(given)
    sandbox = TrainingSandbox(None, OPTIONS.base_url, OPTIONS.api_key, given)
    with busy(f"reading the tasks of {given}"), sandbox as box:
        return [tasks.training_task(given, name) for name in box.get_env_profile(given, split or "test")]


def _run_id() -> str:
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + secrets.token_hex(4)


def _config_tasks(
    config: Any, plan: Plan, base: Path, names: list[str] | None, options: Mapping[str, Any]
) -> list[JobTask]:
    if isinstance(config, HarborJobConfig):
        return tasks.selected(tasks.harbor_tasks(config, base), names, None, options["limit"])
    assert isinstance(config, BashJobConfig)
    script, own = config.text(base), config.environment.env
    if options["all_"]:
        if options["dataset"] is None:
            raise InvalidConfig("--all needs a data set", hint="pass --dataset FOLDER, or --tasks a,b")
        entries = {entry.stem if entry.is_file() else entry.name for entry in Path(options["dataset"]).iterdir()}
        names = sorted(name for name in entries if not name.startswith("."))
    names = (names or ([own["TASK"]] if own.get("TASK") else [plan.name]))[: options["limit"]]
    dataset = Path(options["dataset"]).name if options["dataset"] else ""
    run_id = _run_id()
    plan.labels = {**plan.labels, "rock_run_id": run_id}
    plan.dataset = dataset
    found = []
    for name in names:
        title = plan.name if len(names) == 1 else f"{dataset or plan.name}_{name}_{run_id}"
        env = {"TASK": name, "ROCK_TASK_ID": name, "ROCK_RUN_ID": run_id, "ROCK_JOB_NAME": title,
               "ROCK_DATASET": dataset, "ROCK_SPLIT": options["split"], **own}  # fmt: skip
        found.append(tasks.bash_task(name, script, {**env, "TASK": name}, config.reward_file))
    return tasks.unique(found)


def _with_options(plan: Plan, options: Mapping[str, Any]) -> Plan:
    """The plan with the options of the command line, which replace those of the file."""
    box = {name: options[name] for name in ("image", "memory", "cpus") if options[name] is not None}
    env = {**plan.environment.get("env", {}), **variables(options["env"])}
    changes: dict[str, Any] = {"environment": {**plan.environment, **box, **({"env": env} if env else {})}}
    for name, value in (("attempts", options["attempts"]), ("concurrency", options["concurrency"]),
                        ("timeout", options["timeout"]), ("name", options["name"]),
                        ("memory", options["memory"]), ("cpus", options["cpus"])):  # fmt: skip
        if value is not None:
            changes[name] = value
    if options["agent"] is not None or options["command"] is not None or options["model"] is not None:
        first = plan.agents[0]
        kind = options["agent"] or ("bash" if options["command"] else first.name)
        changes["agents"] = [AgentPlan(name=kind, command=options["command"] or first.command,
                                       model=options["model"] or first.model, env=first.env)]  # fmt: skip
    if options["upstream"] is not None:
        changes["model"] = {"upstream": options["upstream"]}
    return plan.model_copy(update=changes)


def _follow(made: Job, jsonl: bool, take_over: bool = False) -> int:
    """Run a job in this process and show its progress."""
    progress = Progress(jsonl)
    made.on_event = progress.event
    try:
        result = asyncio.run(made.run(take_over))
    except KeyboardInterrupt:
        progress.end()
        if made.info is not None:
            print(f"interrupted; continue with: rock job resume {made.info.job_id}", file=sys.stderr)
        return 130
    except BaseException:
        progress.end()
        raise
    progress.end()
    if jsonl:
        figures = result.summary
        print(json.dumps({
            "event": "summary", "status": result.status, "total": figures["trials"],
            "passed": sum(one.score is not None and one.score >= 1.0 for one in result.trial_results),
            "failed": figures["failed"], "avg_score": result.score, "duration_s": figures["duration"],
            "pass_rate": figures["pass_at_k"].get("1", {}).get("value"), "pass_at_k": figures["pass_at_k"],
            "run_id": result.job_id,
        }), flush=True)  # fmt: skip
    else:
        _summary(result.summary)
    return 0 if result.status == "completed" else 1


def _detach(job_id: str, out: str | None, concurrency: int | None) -> None:
    """Start a runner of a stored job in the background. Its output goes to a file below ROCK_HOME."""
    folder = settings.home() / "jobs"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    words = [sys.executable, "-m", "rock", "job", "resume", job_id, "--jsonl"]
    words += ["--out", os.path.abspath(out)] if out else []
    words += ["--concurrency", str(concurrency)] if concurrency else []
    reach = {"ROCK_BASE_URL": OPTIONS.base_url, "ROCK_API_KEY": OPTIONS.api_key}
    with open(os.open(folder / f"{job_id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                         env=settings.child_environment(**{k: v for k, v in reach.items() if v}))  # fmt: skip


@job.command(example="rock job resume 761724ebd00ac166")
@_job
@click.option("--take-over", is_flag=True, help="Do not wait until the leases of another runner end.")
@click.option("--concurrency", type=click.IntRange(1, 1000), help="Trials at the same time.")
@click.option("--out", type=click.Path(file_okay=False), help="Local folder of logs and artifacts.")
@click.option("--jsonl", is_flag=True, help="Print an event per line as JSON.")
def resume(job_id: str, take_over: bool, concurrency: int | None, out: str | None, jsonl: bool) -> int:
    """Continue a job. Final trials are not repeated.

    Trials that an earlier runner left continue in their sandboxes, or are repeated. They are leased again when the
    leases of that runner have ended, after 30 seconds, or at once with --take-over.
    """
    loaded = asyncio.run(Job.load(job_id, base_url=OPTIONS.base_url, api_key=OPTIONS.api_key, concurrency=concurrency,
                                  folder=out))  # fmt: skip
    return _follow(loaded, jsonl, take_over)


# ---- read


@job.command("ls", example="rock job ls --label suite=nightly")
@click.option("--label", help="Jobs with this label only: NAME=VALUE.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Number of jobs.")
@json_option
def list_jobs(label: str | None, limit: int, json_: bool) -> None:
    """List jobs, newest first."""
    found = client().jobs.list(label, limit)
    if json_:
        as_json([one.model_dump(mode="json") for one in found])
        return
    rows = []
    for one in found:
        done = one.trials - one.counts.pending - one.counts.running
        reward = "" if one.mean_reward is None else f"{one.mean_reward:.3f}"
        rows.append([one.job_id, one.name, one.state.value, f"{done}/{one.trials}", one.counts.failed, reward,
                     age(one.created_at)])  # fmt: skip
    table(["JOB", "NAME", "STATE", "DONE", "FAILED", "REWARD", "AGE"], rows,
          "no jobs; run one with: rock job run CONFIG")  # fmt: skip


@job.command(example="rock job show 761724ebd00ac166 --format harbor --out results/")
@_job
@click.option("--format", "format_", type=click.Choice(_FORMATS), default="table", show_default=True,
              help="Report: rock and swebench print JSON, harbor needs --out.")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write the files of the report here.")
@click.option("--task", help="Show all of the trials of this task, as JSON.")
def show(job_id: str, format_: str, out: Path | None, task: str | None) -> None:
    """Show a job and its trials, or write a report."""
    server = client()
    detail, trials = server.jobs.get(job_id), server.jobs.trials(job_id)
    if task is not None:
        as_json([trial.model_dump(mode="json") for trial in trials if trial.task == task])
        return
    if format_ == "json":
        as_json({**reports.summary(detail, trials), "trial_list": [trial.model_dump(mode="json") for trial in trials]})
        return
    if format_ == "table":
        _trial_table(trials)
        _summary(reports.summary(detail, trials))
        return
    agents = detail.config.get("agents") or [{}]
    model = str(agents[0].get("model") or agents[0].get("name") or "agent")
    files: Iterator[tuple[str, Any]] = iter([("result.json", reports.rock(detail, trials))])
    if format_ != "rock":
        files = reports.harbor(detail, trials) if format_ == "harbor" else reports.swe(detail, trials, model)
    if out is not None:
        for path in reports.write(out, files):
            print(path)
        return
    if format_ == "harbor":
        raise InvalidConfig("--format harbor writes a folder", hint="pass --out FOLDER")
    as_json(list(files)[-1][1])


def _trial_table(trials: Sequence[TrialInfo]) -> None:
    rows = []
    for trial in trials:
        took = "" if trial.started_at is None else f"{(trial.finished_at or time.time()) - trial.started_at:.1f}s"
        error = trial.error or (trial.history[-1] if trial.history else None)
        why = "" if error is None else f"{error.type}: {error.message}"
        rows.append([trial.number, trial.task, trial.attempt, trial.state.value,
                     "" if trial.reward is None else f"{trial.reward:g}", trial.tries, took, why])  # fmt: skip
    table(["#", "TASK", "ATTEMPT", "STATE", "REWARD", "TRIES", "TIME", "ERROR"], rows, "no trials")


def _summary(figures: Mapping[str, Any]) -> None:
    counts = ", ".join(f"{figures[name]} {name}" for name in ("completed", "failed", "cancelled"))
    print(f"job {figures['job_id']}: {figures['state']}, {counts} of {figures['trials']} trials; "
          f"{figures['invalid']} without a valid reward")
    if figures["mean_reward"] is not None:
        print(f"mean reward {_interval(figures['mean_reward'])}")
    for k, estimate in figures["pass_at_k"].items():
        print(f"pass@{k} {_interval(estimate)}")


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.3f} (95% interval {found['low']:.3f} to {found['high']:.3f}, {found['tasks']} tasks)"


# ---- change


@job.command(example="rock job cancel 761724ebd00ac166")
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
def cancel(jobs: tuple[str, ...]) -> int:
    """Cancel jobs.

    Pending trials end at once. Runners stop running ones with their next heartbeat.
    """
    return _each(jobs, lambda server, one: server.jobs.cancel(one))


@job.command(example="rock job rm 761724ebd00ac166")
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
def rm(jobs: tuple[str, ...]) -> int:
    """Delete jobs and their trials.

    A job that a runner runs is not deleted.
    """
    return _each(jobs, lambda server, one: server.jobs.delete(one))


def _each(jobs: Sequence[str], work: Any) -> int:
    server = client()
    return for_each(jobs, lambda one: work(server, one))


@job.command(example="rock job compare 761724ebd00ac166 8f43f0e39110d9aa")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@json_option
def compare(a: str, b: str, json_: bool) -> None:
    """Compare the rewards of two jobs by task.

    Only tasks with a valid reward in both jobs count. The interval and the p-value are those of paired differences.
    """
    server = client()
    with busy("reading the trials"):
        found = compared(*(rewards_by_task(server.jobs.trials(one)) for one in (a, b)))
    if json_:
        as_json(asdict(found))
        return
    print(f"{found.tasks} tasks in both: A {found.mean_a:.3f}, B {found.mean_b:.3f}")
    if found.difference is not None:
        print(f"difference B - A {_interval(asdict(found.difference))}; sign test p = {found.p_value:.3g}")
    for title, names in (("better in B", found.better), ("worse in B", found.worse), ("only in A", found.only_a),
                         ("only in B", found.only_b)):  # fmt: skip
        if names:
            print(f"{title} ({len(names)}): {', '.join(names[:50])}")
